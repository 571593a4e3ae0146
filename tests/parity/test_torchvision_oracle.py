"""The comparison itself can fail: each way of finding something else is noticed, and ties are told from faults."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.parity.torchvision_oracle import Comparison, Found, match

BOXES = np.array([[10, 10, 30, 40], [100, 20, 160, 70], [5, 60, 25, 90]], dtype=np.float32)
FOUND = Found(BOXES, np.array([0.9, 0.6, 0.3], dtype=np.float32), np.array([1, 2, 1]))


def moved(**changes: object) -> Found:
    return FOUND._replace(**changes)


OTHERS = {
    "a corner off by 0.2 px": moved(boxes=BOXES + np.array([[0, 0, 0, 0.2], [0] * 4, [0] * 4], dtype=np.float32)),
    "a score off by 0.002": moved(scores=FOUND.scores + np.array([0, 0.002, 0], dtype=np.float32)),
    "another class": moved(labels=np.array([1, 2, 2])),
    "one missing": FOUND.where(np.array([0, 2])),
    "one found twice": FOUND.where(np.array([0, 1, 2, 2])),
    "nothing": FOUND.where(np.array([], dtype=np.int64)),
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_answer_fails_on_either_side(other: str) -> None:
    for ours, theirs in ((OTHERS[other], FOUND), (FOUND, OTHERS[other])):
        with pytest.raises(AssertionError, match=r"torchvision (does not find|finds)"):
            Comparison().assert_twins(ours, theirs, iter([theirs, theirs]))


def test_twins_in_another_order() -> None:
    comparison = Comparison()
    near = moved(boxes=BOXES + np.float32(0.05), scores=FOUND.scores + np.float32(5e-4))
    comparison.assert_twins(near.where(np.array([2, 0, 1])), FOUND, iter([]))
    assert dataclasses.replace(comparison, score=0, corner=0) == Comparison(found=3)
    assert comparison.score == pytest.approx(5e-4, rel=1e-3)
    assert comparison.corner == pytest.approx(0.05, rel=1e-3)


def test_a_tie_is_what_torchvision_changes_its_mind_about() -> None:
    fewer = FOUND.where(np.array([0, 1]))
    for ours, theirs in ((FOUND, fewer), (fewer, FOUND)):
        comparison = Comparison()
        comparison.assert_twins(ours, theirs, iter([theirs, ours]), name="photograph")
        assert (comparison.tied, comparison.ties) == (1, ["photograph"])


def test_twins_are_the_closest_pairs() -> None:
    a = Found(np.float32([[0, 0, 10, 10], [0, 0, 10, 10.05]]), np.float32([0.5, 0.5]), np.array([1, 1]))
    b = a.where(np.array([1, 0]))
    rows, columns = match(a, b)
    assert sorted(zip(rows.tolist(), columns.tolist(), strict=True)) == [(0, 1), (1, 0)]
