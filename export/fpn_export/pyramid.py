"""Feature pyramid: top-down pathway and lateral connections (Lin et al. 2017, sec. 3, fig. 3)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

FINEST_LEVEL = 2  # c2, the first stage of the bottom-up network
COARSEST_STAGE = 5  # c5, its last; p6 has no stage of its own


class FeaturePyramid(nn.Module):
    """Builds the levels ``levels`` from c2..c5.

        merged5 = lateral5(c5);  merged_k = lateral_k(c_k) + up(merged_(k+1));  p_k = output_k(merged_k)

    ``up`` is nearest-neighbour upsampling to the lateral's own size. p6 is p5 subsampled by 2 (footnote 2).

    Args:
        in_channels: channels of c2, c3, c4, c5.
        out_channels: d, the width of every level.
        levels: consecutive, finest first, from 2 to 6.

    Raises: ValueError for levels outside 2..6.
    """

    def __init__(self, in_channels: Sequence[int], out_channels: int, levels: Sequence[int]) -> None:
        super().__init__()
        finest, coarsest = levels[0], levels[-1]
        if finest < FINEST_LEVEL or finest > COARSEST_STAGE or coarsest > COARSEST_STAGE + 1:
            raise ValueError(f"levels must lie within 2..6 and start at 5 or finer, not {tuple(levels)}")
        self.first_stage = finest - FINEST_LEVEL
        self.has_p6 = coarsest == COARSEST_STAGE + 1
        num_outputs = min(coarsest, COARSEST_STAGE) - finest + 1
        # One-element Sequentials, because torchvision's keys have that extra 0: inner_blocks.0.0.weight.
        self.inner_blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, out_channels, 1)) for channels in in_channels[self.first_stage :]
        )
        self.layer_blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(out_channels, out_channels, 3, padding=1)) for _ in range(num_outputs)
        )

    def forward(self, stages: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """c2..c5, each (N, C_k, H_k, W_k), to the pyramid's levels, each (N, d, H_k, W_k), finest first."""
        laterals = [lateral(c) for lateral, c in zip(self.inner_blocks, stages[self.first_stage :], strict=True)]
        merged = laterals[-1:]
        for lateral in reversed(laterals[:-1]):
            merged.insert(0, lateral + F.interpolate(merged[0], size=lateral.shape[-2:], mode="nearest"))
        levels = [output(m) for output, m in zip(self.layer_blocks, merged, strict=False)]
        if self.has_p6:
            levels.append(F.max_pool2d(levels[-1], kernel_size=1, stride=2))
        return tuple(levels)
