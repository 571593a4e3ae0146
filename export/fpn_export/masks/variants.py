"""The systems of table 6 (Lin et al. 2017), each as changes of a base spec."""

from __future__ import annotations

import dataclasses

from fpn_engine.errors import SpecError
from fpn_engine.masks.spec import FIVE, SEVEN, MaskHead, MaskSpec

# Name: heads, and how many times the base's mask size.
VARIANTS: dict[str, tuple[tuple[MaskHead, ...], int]] = {
    "5x5": ((FIVE,), 1),
    "7x7": ((SEVEN,), 1),
    "dual": ((FIVE, SEVEN), 1),
    "dual-2x": ((FIVE, SEVEN), 2),
}


def make_variant(base: MaskSpec, variant: str) -> MaskSpec:
    """``base`` with the heads and mask size of a row of table 6.

    The 7x7 head alone is the twin of appendix A, with objects and regions sqrt(2) larger than the 5x5 head's.

    Args: variant: a key of ``VARIANTS``; "dual-2x" has masks of twice the base's side, 28 for 14.
    Raises: SpecError for an unknown variant.
    """
    if variant not in VARIANTS:
        raise SpecError(f"unknown variant {variant!r}; known are {', '.join(VARIANTS)}")
    heads, factor = VARIANTS[variant]
    return dataclasses.replace(base, heads=heads, mask_size=factor * base.mask_size)
