"""Pyramids: top-down pathway and lateral connections (Lin et al. 2017, sec. 3, fig. 3), and without either.

Names are torchvision's: ``inner_blocks`` are the 1x1 laterals, ``layer_blocks`` the 3x3 outputs, finest first.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from fpn_engine.spec import COARSEST_STAGE, FINEST_STAGE, ModelSpec


class FeaturePyramid(nn.Module):
    """Builds the levels ``levels`` from c2..c5.

        merged5 = lateral5(c5);  merged_k = lateral_k(c_k) + up(merged_(k+1));  p_k = output_k(merged_k)

    ``up`` is nearest-neighbour upsampling to the lateral's own size. p6 is p5 subsampled by 2 (footnote 1).

    Args:
        in_channels: channels of c2, c3, c4, c5.
        out_channels: d, the width of every level.
        levels: consecutive, finest first, from 2 to 6.

    Raises: ValueError for levels outside 2..6.
    """

    def __init__(self, in_channels: Sequence[int], out_channels: int, levels: Sequence[int]) -> None:
        super().__init__()
        finest, coarsest = levels[0], levels[-1]
        if finest < FINEST_STAGE or finest > COARSEST_STAGE or coarsest > COARSEST_STAGE + 1:
            raise ValueError(f"levels must lie within 2..6 and start at 5 or finer, not {tuple(levels)}")
        self.first_stage = finest - FINEST_STAGE
        self.num_outputs = min(coarsest, COARSEST_STAGE) - finest + 1
        self.has_p6 = coarsest == COARSEST_STAGE + 1
        # One-element Sequentials, because torchvision's keys have that extra 0: inner_blocks.0.0.weight.
        self.inner_blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(in_channels[stage], out_channels, 1)) for stage in self.lateral_stages()
        )
        self.layer_blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(out_channels, out_channels, 3, padding=1)) for _ in range(self.num_outputs)
        )

    def lateral_stages(self) -> range:
        """The stages that have a lateral, as indices of c2..c5."""
        return range(self.first_stage, COARSEST_STAGE - FINEST_STAGE + 1)

    def merge(self, stages: Sequence[Tensor]) -> list[Tensor]:
        """c2.. to what the 3x3 convolutions see, finest first."""
        laterals = [lateral(c) for lateral, c in zip(self.inner_blocks, stages[self.first_stage :], strict=True)]
        merged = laterals[-1:]
        for lateral in reversed(laterals[:-1]):
            merged.insert(0, lateral + _upsample(merged[0], lateral))
        return merged

    def forward(self, stages: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """c2..c5, each (N, C_k, H_k, W_k), to the pyramid's levels, each (N, d, H_k, W_k), finest first."""
        levels = [output(m) for output, m in zip(self.layer_blocks, self.merge(stages), strict=False)]
        if self.has_p6:
            levels.append(F.max_pool2d(levels[-1], kernel_size=1, stride=2))
        return tuple(levels)


class BottomUpPyramid(FeaturePyramid):
    """Without the top-down pathway (table 1, d): p_k = output_k(lateral_k(c_k)); stages beyond the last are not read.

    Arguments as :class:`FeaturePyramid`.
    """

    def lateral_stages(self) -> range:
        return range(self.first_stage, self.first_stage + self.num_outputs)

    def merge(self, stages: Sequence[Tensor]) -> list[Tensor]:
        return [lateral(c) for lateral, c in zip(self.inner_blocks, stages[self.first_stage :], strict=True)]


class TopDownPyramid(FeaturePyramid):
    """Without lateral connections (table 1, e): merged_k = up(merged_(k+1)), so that only c5 is read.

    Arguments as :class:`FeaturePyramid`. Of the finer stages only the size is used.
    """

    def lateral_stages(self) -> range:
        return range(COARSEST_STAGE - FINEST_STAGE, COARSEST_STAGE - FINEST_STAGE + 1)

    def merge(self, stages: Sequence[Tensor]) -> list[Tensor]:
        merged = [self.inner_blocks[0](stages[-1])]
        for stage in reversed(stages[self.first_stage : -1]):
            merged.insert(0, _upsample(merged[0], stage))
        return merged


class SingleMap(nn.Module):
    """No pyramid (tables 1-3, a and b): the one level is the last stage itself, and there are no weights."""

    def forward(self, stages: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """c2.. to the last of them, (N, C, H, W)."""
        return tuple(stages[-1:])


PYRAMIDS = {"fpn": FeaturePyramid, "bottom_up": BottomUpPyramid, "top_down": TopDownPyramid}


def make_pyramid(spec: ModelSpec) -> nn.Module:
    """The pyramid of a spec; raises as :class:`FeaturePyramid`."""
    if spec.pyramid == "none":
        return SingleMap()
    return PYRAMIDS[spec.pyramid](spec.stage_channels, spec.fpn_channels, spec.levels)


def _upsample(coarse: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(coarse, size=like.shape[-2:], mode="nearest")
