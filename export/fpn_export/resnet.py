"""ResNet, the bottom-up network (He et al. 2016; Lin et al. 2017, sec. 3, "Bottom-up pathway").

Parameter names are torchvision's (``layer2.0.conv1.weight``). The stride of a bottleneck sits on its 3x3
convolution, as in torchvision, not on the first 1x1 as in He et al.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


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


def stage_widths(width: int) -> list[int]:
    """Widths of the 3x3 convolutions in the four stages of a body of ``width``."""
    return [width * 2**i for i in range(4)]


class ResNet(nn.Module):
    """The convolutional part of a ResNet up to a stage; ``out_channels`` gives the channels of c2...

    Args:
        arch: a key of ``STAGES``.
        eps: added to the variance by every batch norm.
        width: channels of the stem and of the first stage's 3x3 convolutions; 64 in He et al.
        coarsest_stage: the last stage there is, 2..5.
    """

    def __init__(self, arch: str, eps: float = 1e-5, width: int = 64, coarsest_stage: int = 5) -> None:
        super().__init__()
        stages = range(1, coarsest_stage)  # layer1 makes c2
        self.stage_names = tuple(f"layer{stage}" for stage in stages)
        self.out_channels = tuple(w * STAGES[arch][0].expansion for w in stage_widths(width)[: len(stages)])
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width, eps)
        for stage, name in zip(stages, self.stage_names, strict=True):
            self.add_module(name, make_stage(arch, stage, eps, width))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """(N, 3, H, W) images to c2.. with strides 4, 8, 16, 32."""
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(images))), kernel_size=3, stride=2, padding=1)
        maps = []
        for name in self.stage_names:
            x = self.get_submodule(name)(x)
            maps.append(x)
        return tuple(maps)


def make_stage(arch: str, stage: int, eps: float, width: int) -> nn.Sequential:
    """``layer1`` .. ``layer4`` by number: the blocks that make c2 .. c5, of stride 1, 2, 2, 2."""
    block, depths = STAGES[arch]
    widths = stage_widths(width)
    in_channels = width if stage == 1 else widths[stage - 2] * block.expansion
    w = widths[stage - 1]
    first = block(in_channels, w, 1 if stage == 1 else 2, eps)
    return nn.Sequential(first, *(block(w * block.expansion, w, 1, eps) for _ in range(depths[stage - 1] - 1)))


def _make_shortcut(in_channels: int, out_channels: int, stride: int, eps: float) -> nn.Sequential | None:
    """The projection shortcut, or None where the block keeps its shape (He et al. 2016, eq. 2)."""
    if stride == 1 and in_channels == out_channels:
        return None
    conv = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels, eps))
