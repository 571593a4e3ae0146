"""ResNet, the bottom-up network (He et al. 2016; Lin et al. 2017, sec. 3, "Bottom-up pathway").

Parameter names are torchvision's (``layer2.0.conv1.weight``). The stride of a bottleneck sits on its 3x3
convolution, as in torchvision, not on the first 1x1 as in He et al.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

STEM_CHANNELS = 64


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: ResNet-18 and 34."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int, eps: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width, eps)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width, eps)
        self.downsample = _make_shortcut(in_channels, width, stride, eps)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """1x1 down to ``width``, 3x3, 1x1 up to four times ``width``, and a shortcut: ResNet-50 and 101."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int, eps: float) -> None:
        super().__init__()
        out_channels = width * self.expansion
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width, eps)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width, eps)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels, eps)
        self.downsample = _make_shortcut(in_channels, out_channels, stride, eps)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


STAGES: dict[str, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
}


class ResNet(nn.Module):
    """The convolutional part of a ResNet; ``out_channels`` gives the channels of c2..c5.

    Args:
        arch: a key of ``STAGES``.
        eps: added to the variance by every batch norm.
    """

    def __init__(self, arch: str, eps: float = 1e-5) -> None:
        super().__init__()
        block, depths = STAGES[arch]
        widths = [STEM_CHANNELS * 2**i for i in range(4)]
        self.out_channels = tuple(width * block.expansion for width in widths)
        self.conv1 = nn.Conv2d(3, STEM_CHANNELS, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM_CHANNELS, eps)
        self.layer1 = _make_stage(block, STEM_CHANNELS, widths[0], depths[0], 1, eps)
        self.layer2 = _make_stage(block, self.out_channels[0], widths[1], depths[1], 2, eps)
        self.layer3 = _make_stage(block, self.out_channels[1], widths[2], depths[2], 2, eps)
        self.layer4 = _make_stage(block, self.out_channels[2], widths[3], depths[3], 2, eps)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(N, 3, H, W) images to c2..c5 with strides 4, 8, 16, 32."""
        stem = F.max_pool2d(F.relu(self.bn1(self.conv1(images))), kernel_size=3, stride=2, padding=1)
        c2 = self.layer1(stem)
        c3 = self.layer2(c2)
        c4 = self.layer3(c3)
        c5 = self.layer4(c4)
        return c2, c3, c4, c5


def _make_stage(
    block: type[BasicBlock] | type[Bottleneck],
    in_channels: int,
    width: int,
    depth: int,
    stride: int,
    eps: float,
) -> nn.Sequential:
    first = block(in_channels, width, stride, eps)
    return nn.Sequential(first, *(block(width * block.expansion, width, 1, eps) for _ in range(depth - 1)))


def _make_shortcut(in_channels: int, out_channels: int, stride: int, eps: float) -> nn.Sequential | None:
    """The projection shortcut, or None where the block keeps its shape (He et al. 2016, eq. 2)."""
    if stride == 1 and in_channels == out_channels:
        return None
    conv = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels, eps))
