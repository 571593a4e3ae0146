"""Buckets: coarser padded sizes, so that fewer shapes serve all images; off unless asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from fpn_engine.errors import OptionError

Size: TypeAlias = tuple[int, int]


class Buckets:
    """Which size a batch is padded to, given what its images need.

    A larger bucket changes an image's result a little: convolutions see zeros where they saw the map's border, and
    anchors of the coarsest level move, since its stride is padded side // cells. docs/runtime.md says by how much.

    Args:
        sizes: None for no bucket at all; a number for multiples of it per side; or the sizes (h, w) themselves, of
            which the smallest that an image fits into is taken, and its own padded size where it fits into none.
        divisor: what every side must be a multiple of.
    Raises: OptionError if one is not.
    """

    def __init__(self, sizes: int | Sequence[Size] | None, divisor: int) -> None:
        try:
            listed = [(sizes, sizes)] if isinstance(sizes, int) else list(sizes or ())
            wrong = [size for size in listed if len(size) != 2 or min(size) < 1 or any(side % divisor for side in size)]
        except TypeError:
            raise OptionError(f"buckets are a number of pixels or sizes (h, w), not {sizes!r}") from None
        if wrong:
            raise OptionError(f"a bucket must be a multiple of {divisor} pixels per side, not {wrong[0]}")
        self._multiple = sizes if isinstance(sizes, int) else None
        self._sizes = [] if self._multiple else sorted(listed, key=lambda size: (size[0] * size[1], size))

    def __call__(self, needed: Size) -> Size:
        """The padded size for an image whose own one is ``needed``."""
        if self._multiple:
            return -(-needed[0] // self._multiple) * self._multiple, -(-needed[1] // self._multiple) * self._multiple
        fitting = (size for size in self._sizes if needed[0] <= size[0] and needed[1] <= size[1])
        return next(fitting, needed)
