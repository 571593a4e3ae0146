"""Run lengths and polygons: there and back, and what is refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from pycocotools import mask as coco_mask

from fpn_engine.errors import AnnotationError
from fpn_engine.masks.polygons import trace_polygons
from fpn_engine.masks.run_lengths import (
    areas_of,
    box_of,
    decode_masks,
    encode_columns,
    encode_masks,
    encode_region,
    read_segmentation,
)

MASKS = arrays.arrays(np.bool_, st.tuples(st.integers(1, 9), st.integers(1, 9)))


@settings(deadline=None)
@given(arrays.arrays(np.bool_, st.tuples(st.integers(0, 3), st.integers(1, 7), st.integers(1, 7))))
def test_there_and_back(masks):
    run_lengths = encode_masks(masks)
    assert np.array_equal(decode_masks(run_lengths, masks.shape[1:]), masks)
    assert encode_columns(np.ascontiguousarray(masks.transpose(0, 2, 1))) == run_lengths
    assert areas_of(run_lengths) == masks.sum(axis=(1, 2)).tolist()


@settings(deadline=None)
@given(MASKS, st.tuples(*[st.integers(0, 3)] * 4))
def test_a_region_is_the_mask_around_it(mask, margins):
    left, top, right, bottom = margins
    whole = np.pad(mask, ((top, bottom), (left, right)))
    assert encode_region(mask.T, left, top, whole.shape) == encode_masks(whole[None])[0]


@settings(deadline=None)
@given(MASKS)
def test_every_form_of_a_segmentation_reads_the_same(mask):
    [compressed] = encode_masks(mask[None])
    columns = mask.T.flatten()
    changes = np.flatnonzero(np.diff(np.concatenate([[False], columns])))
    counts = np.diff(np.concatenate([[0], changes, [mask.size]])).tolist()
    assert read_segmentation(compressed, mask.shape) == compressed
    assert read_segmentation({"size": list(mask.shape), "counts": counts}, mask.shape) == compressed


@settings(deadline=None, max_examples=300)
@given(MASKS)
def test_polygons_enclose_the_mask_and_its_holes(mask):
    """Rasterised pixel by pixel; a hole is what the outside cannot reach, not even across corners."""
    outside = np.pad(~mask, 1, constant_values=True)
    reached = np.zeros_like(outside)
    stack = [(0, 0)]
    while stack:
        y, x = stack.pop()
        if 0 <= y < outside.shape[0] and 0 <= x < outside.shape[1] and outside[y, x] and not reached[y, x]:
            reached[y, x] = True
            stack += [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    filled = ~reached[1:-1, 1:-1]
    polygons = trace_polygons(mask)
    covered = np.zeros(mask.shape, np.int64)
    for polygon in polygons:
        xs, ys = polygon[0::2], polygon[1::2]
        corners = list(zip(xs, ys, strict=True))
        assert all((a[0] == b[0]) != (a[1] == b[1]) for a, b in zip(corners, corners[1:] + corners[:1], strict=True))
        for y, x in np.ndindex(mask.shape):  # crossings of a ray to the left
            sides = [
                (x1, y1, y2)
                for (x1, y1), (x2, y2) in zip(corners, corners[1:] + corners[:1], strict=True)
                if x1 == x2 and x1 < x + 0.5 and min(y1, y2) < y + 0.5 < max(y1, y2)
            ]
            covered[y, x] |= len(sides) % 2
    assert np.array_equal(covered.astype(bool), filled)
    if polygons:
        read = read_segmentation(polygons, mask.shape)
        assert np.array_equal(decode_masks([read], mask.shape)[0], filled), "as pycocotools fills them"


def test_a_square_by_hand():
    mask = np.zeros((5, 6), np.bool_)
    mask[1:3, 2:5] = True
    assert trace_polygons(mask) == [[2, 1, 5, 1, 5, 3, 2, 3]]
    assert box_of(encode_masks(mask[None])[0]) == (2, 1, 5, 3)
    assert trace_polygons(np.zeros((3, 3), np.bool_)) == []


def test_pixels_that_touch_at_a_corner_are_apart():
    assert len(trace_polygons(np.eye(3, dtype=np.bool_))) == 3
    assert len(trace_polygons(np.eye(3, dtype=np.bool_)[::-1])) == 3


def test_polygons_of_coco_are_united():
    read = read_segmentation([[0, 0, 4, 0, 4, 4, 0, 4], [2, 2, 6, 2, 6, 6, 2, 6]], (8, 8))
    assert areas_of([read]) == [28]
    assert (
        read["counts"]
        == coco_mask.merge(coco_mask.frPyObjects([[0, 0, 4, 0, 4, 4, 0, 4], [2, 2, 6, 2, 6, 6, 2, 6]], 8, 8))[
            "counts"
        ].decode()
    )


@pytest.mark.parametrize(
    "segmentation",
    [
        None,
        [],
        [[]],
        "abc",
        [[0, 0, 1, 1]],
        [[0, 0, 1, 1, 2, 2, 3]],
        [[0, 0, float("nan"), 1, 2, 2]],
        [[0, 0, 1e30, 1, 2, 2]],
        [["a", 0, 1, 1, 2, 2]],
        {"size": [8, 8]},
        {"size": [8, 7], "counts": [56]},
        {"size": [8, 8], "counts": [63]},
        {"size": [8, 8], "counts": [-1, 65]},
        {"size": [8, 8], "counts": [1e300]},
        {"size": [8, 8], "counts": "zzzzzzzzzzzzzzzzzzzz"},
        {"size": [8, 8], "counts": "P"},
        {"size": [8, 8], "counts": "\x00"},
        {"size": [8, 8], "counts": "`"},
        {"size": [8, 8], "counts": "é"},
        {"size": [8, 8], "counts": 64},
        {"size": None, "counts": "0"},
    ],
    ids=str,
)
def test_what_is_no_segmentation_is_one_sentence(segmentation):
    with pytest.raises(AnnotationError, match=r"neither polygons nor run lengths") as caught:
        read_segmentation(segmentation, (8, 8))
    assert "\n" not in str(caught.value)


def test_masks_of_another_size():
    with pytest.raises(AnnotationError, match="3x2 pixels is not of the image's 2x3"):
        decode_masks(encode_masks(np.ones((1, 2, 3), np.bool_)), (3, 2))
