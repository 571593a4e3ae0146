"""Coarser padded sizes."""

from __future__ import annotations

import pytest

from fpn_engine.buckets import Buckets
from fpn_engine.errors import OptionError


@pytest.mark.parametrize(
    ("sizes", "needed", "expected"),
    [
        (None, (800, 1088), (800, 1088)),
        (128, (800, 1088), (896, 1152)),
        (128, (128, 1), (128, 128)),
        (128, (1344, 896), (1408, 896)),
        ([(800, 1344), (1344, 800)], (800, 1088), (800, 1344)),
        ([(1344, 1344), (800, 1344)], (800, 1088), (800, 1344)),
        ([(800, 1344), (1344, 800)], (832, 800), (1344, 800)),
        ([(800, 1344)], (832, 832), (832, 832)),
        ([], (64, 32), (64, 32)),
    ],
)
def test_where_a_size_goes(sizes: object, needed: tuple[int, int], expected: tuple[int, int]) -> None:
    assert Buckets(sizes, 32)(needed) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize("sizes", [100, 0, -32, [(800, 1000)], [(0, 32)], [(800,)]])
def test_what_is_no_bucket(sizes: object) -> None:
    with pytest.raises(OptionError, match="a bucket must be a multiple of 32 pixels per side, not"):
        Buckets(sizes, 32)  # type: ignore[arg-type]


@pytest.mark.parametrize("sizes", [2.5, [64, 128], [("a", "b")]])
def test_what_is_no_size(sizes: object) -> None:
    with pytest.raises(OptionError, match="buckets are a number of pixels or sizes"):
        Buckets(sizes, 32)  # type: ignore[arg-type]
