"""The mask-proposal model: a pyramid with small MLPs that slide over all levels (Lin et al. 2017, sec. 6, app. A)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fpn_engine.masks.pipeline import MaskPipeline, MaskTrunkOutput
from fpn_engine.masks.spec import MaskSpec
from fpn_export.detector import Backbone
from fpn_export.initialization import initialize_weights
from fpn_kernels import window_linear


class WindowHead(nn.Module):
    """A ``kernel`` x ``kernel`` convolution with ReLU, then sibling 1x1 convolutions for a mask and a score.

    Shared by all levels. :meth:`forward` is the fully convolutional evaluation, :meth:`answer` the same at chosen
    places alone.

    Args: channels: d, the width of the pyramid. hidden: of the convolution. kernel: odd. mask_size: side S of a mask.
    """

    def __init__(self, channels: int, hidden: int, kernel: int, mask_size: int) -> None:
        super().__init__()
        self.kernel, self.mask_size = kernel, mask_size
        self.conv = nn.Conv2d(channels, hidden, kernel, padding=kernel // 2)
        self.mask = nn.Conv2d(hidden, mask_size**2, 1)
        self.score = nn.Conv2d(hidden, 1, 1)

    def initialize(self) -> None:
        """Draw the weights anew, as the detectors' hidden layers and predictors; biases become 0."""
        nn.init.kaiming_uniform_(self.conv.weight, a=1)
        for layer in (self.mask, self.score):
            nn.init.normal_(layer.weight, std=0.01)
        for layer in (self.conv, self.mask, self.score):
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, level: Tensor) -> tuple[Tensor, Tensor]:
        """One level (N, d, H, W) to score logits (N, 1, H, W) and mask logits (N, S^2, H, W), rows y first."""
        hidden = F.relu(self.conv(level))
        return self.score(hidden), self.mask(hidden)

    def score_level(self, level: Tensor) -> Tensor:
        """The score logits alone, (N, 1, H, W)."""
        return self.score(F.relu(self.conv(level)))

    def answer(self, levels: Sequence[Tensor], places: Tensor) -> tuple[Tensor, Tensor]:
        """Score logits (R,) and mask logits (R, S, S) at ``places``, (R, 4) as :func:`fpn_kernels.window_linear`."""
        rows = self.conv.weight.permute(0, 2, 3, 1).flatten(1)
        hidden = window_linear(levels, places, rows, self.conv.bias, kernel=self.kernel, relu=True)
        masks = F.linear(hidden, self.mask.weight.flatten(1), self.mask.bias)
        scores = F.linear(hidden, self.score.weight.flatten(1), self.score.bias)
        return scores[:, 0], masks.view(-1, self.mask_size, self.mask_size)


class FpnMasks(nn.Module):
    """Backbone, named as the detectors', and one :class:`WindowHead` for each head of the spec."""

    def __init__(self, spec: MaskSpec) -> None:
        super().__init__()
        self.spec = spec
        self.backbone = Backbone(spec.backbone)
        self.mask_heads = nn.ModuleList(
            WindowHead(spec.fpn_channels, spec.hidden_channels, head.kernel, spec.mask_size) for head in spec.heads
        )
        initialize_weights(self)
        for head in self.mask_heads:
            assert isinstance(head, WindowHead)  # for mypy
            head.initialize()

    def pyramid(self, images: Tensor) -> tuple[Tensor, ...]:
        """(N, 3, H, W) images, normalised and padded, to the levels, each (N, d, H_l, W_l), finest first."""
        _, levels = self.backbone(images)
        return levels

    def trunk(self, images: Tensor) -> MaskTrunkOutput:
        """The levels, and the scores everywhere."""
        levels = self.pyramid(images)
        return MaskTrunkOutput(levels, self.score(levels))

    def score(self, levels: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Score logits of each level, (N, A, H_l, W_l), one channel for each of the A heads."""
        return tuple(
            torch.cat([self._head(number).score_level(level) for number in range(len(self.mask_heads))], dim=1)
            for level in levels
        )

    def head(self, number: int, levels: Sequence[Tensor], places: Tensor) -> tuple[Tensor, Tensor]:
        """Score and mask logits of head ``number`` at places; see :meth:`WindowHead.answer`."""
        return self._head(number).answer(levels, places)

    def answer(self, number: int, levels: Sequence[Tensor], places: Tensor) -> Tensor:
        """The mask logits alone, (R, S, S)."""
        return self.head(number, levels, places)[1]

    def _head(self, number: int) -> WindowHead:
        head = self.mask_heads[number]
        assert isinstance(head, WindowHead)  # for mypy
        return head

    def dense(self, images: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The fully convolutional evaluation, the oracle: each level's scores (N, A, H, W), masks (N, A, S^2, H, W)."""
        scores, masks = [], []
        for level in self.pyramid(images):
            answers = [head(level) for head in self.mask_heads]
            scores.append(torch.cat([score for score, _ in answers], dim=1))
            masks.append(torch.stack([mask for _, mask in answers], dim=1))
        return tuple(scores), tuple(masks)

    @property
    def pipeline(self) -> MaskPipeline:
        """Everything around the weights, on the device where they are."""
        return MaskPipeline(self.spec, self.trunk, self.answer, next(self.parameters()).device)
