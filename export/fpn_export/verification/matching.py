"""Detections of two forms of a model beside each other: which are the same, and why others are not."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fpn_engine.detections import Detections

TWIN_IOU, TWIN_SCORE = 0.95, 0.02
TIE = 1e-3  # an IoU or a score this close to its threshold, or to another's, is decided by rounding
SAME_OBJECT = 0.5  # IoU from which two boxes are of one object

Array = NDArray[np.float64]


class Lost(NamedTuple):
    """A detection that only one side has.

    Attributes:
        side: "A" or "B". box: pixels of the original. cause: in plain words. tie: rounding decided between equals.
    """

    side: str
    name: str
    score: float
    box: tuple[float, float, float, float]
    cause: str
    tie: bool


class Matched(NamedTuple):
    """One image: ``pairs`` (n, 2) of indices of twins, and what is left on each side."""

    pairs: NDArray[np.int64]
    only_a: list[int]
    only_b: list[int]


class Limits(NamedTuple):
    """The thresholds that a side's detections passed: of score, of NMS, and how many at the most."""

    score: float
    nms: float
    most: int


def match_boxes(first: Array, second: Array, gaps: Array, most_gap: float) -> NDArray[np.int64]:
    """(n, 2) indices of boxes (n, 4) and (m, 4), one to one: those that overlap most first, from an IoU of 0.95 on.

    The order of neither side matters. Equal boxes, as levels propose them once clipped, are told apart by score.

    Args: gaps: (n, m), how far the scores of each two are apart; beyond ``most_gap`` they are no pair.
    """
    overlap = iou(first, second)
    rows, columns = np.nonzero((overlap >= TWIN_IOU) & (gaps <= most_gap))
    order = np.lexsort((gaps[rows, columns], -overlap[rows, columns]))
    taken: tuple[set[int], set[int]] = set(), set()
    pairs = []
    for row, column in zip(rows[order].tolist(), columns[order].tolist(), strict=True):
        if row not in taken[0] and column not in taken[1]:
            taken[0].add(row)
            taken[1].add(column)
            pairs.append((row, column))
    return np.array(sorted(pairs), np.int64).reshape(-1, 2)


def match_detections(first: Detections, second: Detections) -> Matched:
    """Twins have the same category, IoU 0.95 and a score within 0.02."""
    same = first.category_ids[:, None] == second.category_ids[None]
    gaps = np.where(same, find_gaps(first.scores, second.scores), np.inf)
    pairs = match_boxes(_double(first.boxes), _double(second.boxes), gaps, TWIN_SCORE)
    left = [sorted(set(range(len(side))) - set(pairs[:, i].tolist())) for i, side in enumerate((first, second))]
    return Matched(pairs, *left)


def explain(
    side: str, lost: list[int], ours: Detections, theirs: Detections, candidates: Detections, limits: Limits
) -> list[Lost]:
    """Why detections ``lost`` of ``ours``, the side "A" or "B", have no twin among ``theirs``.

    Args: candidates: what the NMS of ``ours`` had to choose from. limits: the thresholds of the other side.
    """
    overlaps = iou(_double(ours.boxes), _double(theirs.boxes))
    same = ours.category_ids[:, None] == theirs.category_ids[None]
    other = "B" if side == "A" else "A"
    found = []
    for index in lost:
        cause, tie = _cause(index, ours, theirs, np.where(same[index], overlaps[index], 0.0), candidates, limits, other)
        x1, y1, x2, y2 = ours.boxes[index].tolist()
        found.append(Lost(side, ours.names[index], float(ours.scores[index]), (x1, y1, x2, y2), cause, tie))
    return found


def _cause(
    index: int,
    ours: Detections,
    theirs: Detections,
    overlaps: Array,
    candidates: Detections,
    limits: Limits,
    other: str,
) -> tuple[str, bool]:
    """In plain words, and whether it is a tie; overlaps: (m,), IoU with ``theirs`` of the same category."""
    score = float(ours.scores[index])
    nearest = int(overlaps.argmax()) if len(overlaps) else -1
    overlap = float(overlaps[nearest]) if nearest >= 0 else 0.0
    if overlap >= TWIN_IOU:
        return f"{other} gives it {float(theirs.scores[nearest]):.3f}", False
    if overlap >= SAME_OBJECT and _was_equal(ours, index, theirs, nearest, candidates):
        return f"NMS tie: two boxes of the object score the same, and {other} kept the other", True
    if overlap and abs(overlap - limits.nms) <= TIE:
        return f"NMS tie: its IoU with a box of {other} is at the threshold {limits.nms:g}", True
    if overlap >= SAME_OBJECT:
        return f"{other}'s box of it has IoU {overlap:.2f}", False
    if abs(score - limits.score) <= TIE:
        return f"its score is at the threshold {limits.score:g}", True
    if len(theirs) == limits.most and score <= float(theirs.scores[-1]) + TIE:
        tie = abs(score - float(theirs.scores[-1])) <= TIE
        return f"{other} has {limits.most} better ones, the most that it reports", tie
    if score <= limits.score:
        return f"its score is below {other}'s threshold {limits.score:g}", False
    return f"{other} has nothing there", False


def _was_equal(ours: Detections, index: int, theirs: Detections, nearest: int, candidates: Detections) -> bool:
    """Among what NMS chose from was a twin of the other side's box with the same score, ties aside."""
    if not len(candidates):
        return False
    there = iou(_double(theirs.boxes[nearest : nearest + 1]), _double(candidates.boxes))[0] >= TWIN_IOU
    equal = np.abs(candidates.scores.astype(np.float64) - float(ours.scores[index])) <= TIE
    return bool((there & equal & (candidates.category_ids == ours.category_ids[index])).any())


def find_gaps(first: NDArray[np.float32], second: NDArray[np.float32]) -> Array:
    """(n, m), how far scores (n,) and (m,) are apart."""
    gaps: Array = np.abs(first[:, None].astype(np.float64) - second[None])
    return gaps


def iou(first: Array, second: Array) -> Array:
    """(n, m) of (n, 4) and (m, 4) boxes; 0 where both have no area."""
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    shared = (high - low).clip(0).prod(axis=2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).clip(0).prod(axis=1) for boxes in (first, second)]
    found: Array = shared / np.maximum(areas[0][:, None] + areas[1][None] - shared, 1e-12)
    return found


def _double(boxes: NDArray[np.float32]) -> Array:
    return boxes.astype(np.float64)
