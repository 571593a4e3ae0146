"""Regions: the square of the image that the mask of a location covers (Lin et al. 2017, appendix A, fig. 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from fpn_engine.masks.spec import MaskSpec


class Regions:
    """Geometry of a spec's locations, as tables on a device.

    Attributes:
        strides: (L,) float32, pixels per cell. object_sizes, region_sizes: (L, A) float32 of each level and head.
    """

    def __init__(self, spec: MaskSpec, device: torch.device | str = "cpu") -> None:
        self.strides = torch.tensor(spec.strides, dtype=torch.float32, device=device)
        self.object_sizes, self.region_sizes = (
            torch.tensor([[size(head, level) for head in spec.heads] for level in spec.levels], device=device)
            for size in (spec.object_size, spec.region_size)
        )

    def locate(self, levels: Tensor, y: Tensor, x: Tensor) -> Tensor:
        """Centres (..., 2) float32, x and y in pixels, of cells (y, x) of ``levels``, positions among the spec's."""
        return torch.stack([x, y], dim=-1).to(torch.float32) * self.strides[levels][..., None]

    def cover(self, levels: Tensor, heads: Tensor, y: Tensor, x: Tensor) -> Tensor:
        """Regions (..., 4) float32, x1 y1 x2 y2 in pixels; they may reach beyond the image."""
        centres = self.locate(levels, y, x)
        half = 0.5 * self.region_sizes[levels, heads][..., None]
        return torch.cat([centres - half, centres + half], dim=-1)
