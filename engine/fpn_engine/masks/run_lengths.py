"""Run lengths: binary masks as COCO stores them, column by column, by pycocotools."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from fpn_engine.errors import AnnotationError

Masks = NDArray[np.bool_]


class RunLengths(TypedDict):
    """A compressed COCO RLE, JSON-ready: ``size`` (height, width) and ``counts``."""

    size: list[int]
    counts: str


def encode_masks(masks: Masks) -> list[RunLengths]:
    """(K, H, W) bool to run lengths."""
    return encode_columns(masks.transpose(0, 2, 1))


def encode_columns(masks: Masks) -> list[RunLengths]:
    """(K, W, H) bool, columns first as :func:`fpn_engine.masks.paste.paste_in_chunks` gives them."""
    from pycocotools import mask as coco_mask

    # (H, W, K) in Fortran's order is this array as it lies in memory.
    columns = np.ascontiguousarray(masks).view(np.uint8).transpose(2, 1, 0)
    return [_as_text(run_lengths) for run_lengths in coco_mask.encode(columns)] if len(masks) else []


def encode_region(mask: Masks, x: int, y: int, size: tuple[int, int]) -> RunLengths:
    """A mask that is (w, h) bool, columns first, from pixel (x, y) on, and False elsewhere.

    Args: size: height and width of the image, which the mask lies within.
    """
    from pycocotools import mask as coco_mask

    height, width = size
    steps = np.diff(np.pad(mask.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    starts, ends = ((x + column) * height + y + row for column, row in (np.nonzero(steps == step) for step in (1, -1)))
    # A run may go on from the foot of a column to the head of the next.
    joined = np.nonzero(ends[:-1] == starts[1:])[0]
    starts, ends = np.delete(starts, joined + 1), np.delete(ends, joined)
    changes = np.concatenate([[0], np.stack([starts, ends], axis=1).ravel(), [height * width]])
    counts = np.diff(changes).tolist()
    if len(counts) > 1 and counts[-1] == 0:
        counts.pop()
    return _as_text(coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width))


def decode_masks(run_lengths: Sequence[RunLengths], size: tuple[int, int]) -> Masks:
    """(K, H, W) bool of masks that are all of ``size`` (height, width). Raises: AnnotationError for another size."""
    wrong = next((one["size"] for one in run_lengths if tuple(one["size"]) != tuple(size)), None)
    if wrong:
        raise AnnotationError(f"a mask of {wrong[1]}x{wrong[0]} pixels is not of the image's {size[1]}x{size[0]}")
    masks = np.zeros((len(run_lengths), *size), np.bool_)
    for mask, one in zip(masks, run_lengths, strict=True):
        counts = _expand(one["counts"])
        mask[:] = np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(size[1], size[0]).T
    return masks


def read_segmentation(segmentation: Any, size: tuple[int, int]) -> RunLengths:
    """COCO's "segmentation" of an object: polygons, their union; or run lengths, compressed or plain counts.

    Args: size: height and width of the image.
    Raises: AnnotationError for anything else, or run lengths of another size or that do not add up to it.
    """
    from pycocotools import mask as coco_mask

    height, width = size
    try:
        if isinstance(segmentation, Mapping):
            if tuple(segmentation["size"]) != (height, width):
                raise ValueError(f"its size is {segmentation['size']}, the image's [{height}, {width}]")
            counts = segmentation["counts"]
            # pycocotools would write beyond the mask where counts do not add up to it.
            plain = [_count(value) for value in (_expand(counts) if isinstance(counts, str) else counts)]
            if sum(plain) != height * width:
                raise ValueError(f"its counts add up to {sum(plain)}, not {height * width}")
            run_lengths = coco_mask.frPyObjects({"size": [height, width], "counts": plain}, height, width)
        elif isinstance(segmentation, Sequence) and not isinstance(segmentation, str) and len(segmentation):
            run_lengths = coco_mask.merge(coco_mask.frPyObjects(list(map(_polygon, segmentation)), height, width))
        else:
            raise ValueError("it is empty")
    except AnnotationError:
        raise
    except Exception as error:  # pycocotools raises bare exceptions
        raise AnnotationError(
            f"a segmentation is neither polygons nor run lengths of its image ({error}); correct the annotations"
        ) from None
    return _as_text(run_lengths)


def box_of(run_lengths: RunLengths) -> tuple[float, float, float, float]:
    """x1, y1, x2, y2 of a mask, half-open; zeros of an empty one."""
    from pycocotools import mask as coco_mask

    x, y, width, height = coco_mask.toBbox(run_lengths).tolist()
    return x, y, x + width, y + height


def areas_of(run_lengths: Iterable[RunLengths]) -> list[int]:
    """How many pixels each mask has."""
    from pycocotools import mask as coco_mask

    return [int(coco_mask.area(one)) for one in run_lengths]


def _polygon(values: Any) -> list[float]:
    points = np.array(values, np.float64)
    if points.ndim != 1 or len(points) < 6 or len(points) % 2 or not np.isfinite(points).all():
        raise ValueError("a polygon is x and y of at least three points")
    if np.abs(points).max() > 1e6:  # pycocotools walks along every edge
        raise ValueError("a polygon reaches a million pixels beyond its image")
    return points.tolist()


def _count(value: Any) -> int:
    if int(value) != value or value < 0:
        raise ValueError(f"{value!r} is no count")
    return int(value)


def _expand(text: str) -> list[int]:
    """The counts in COCO's text: five bits a letter, lowest first, from the third on the difference to two before."""
    counts: list[int] = []
    value = shift = 0
    for letter in text.encode("ascii"):
        bits = letter - ord("0")
        if not 0 <= bits < 64 or shift > 60:
            raise ValueError(f"{chr(letter)!r} has no place in run lengths")
        value |= (bits & 0x1F) << shift
        shift += 5
        if not bits & 0x20:
            value -= (bits >> 4 & 1) << shift
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    if shift:
        raise ValueError("it breaks off")
    return counts


def _as_text(run_lengths: Mapping[str, Any]) -> RunLengths:
    height, width = run_lengths["size"]
    return {"size": [int(height), int(width)], "counts": run_lengths["counts"].decode("ascii")}
