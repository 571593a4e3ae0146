"""Choosing by rough scores and deciding by exact ones gives what exact scores alone would."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fpn_engine.masks import screening
from fpn_engine.masks.screening import decide
from fpn_engine.masks.winners import select_winners

SIZES = [(40, 31), (20, 16), (3, 5)]
HEADS, SIDE = 2, 3


class Looked:
    """An answer that looks up scores; a mask is the place it is at. Counts the places that it was asked for."""

    def __init__(self, scores: Sequence[Tensor]) -> None:
        self.scores, self.asked = scores, 0

    def hide(self, number: int, features: Sequence[Tensor], places: Tensor) -> Tensor:
        self.asked += len(places)
        score = [self.scores[level][image, number, y, x] for image, level, y, x in places.tolist()]
        return torch.cat([torch.tensor(score).view(-1, 1), places.float()], dim=1)

    def score(self, number: int, hidden: Tensor) -> Tensor:
        return hidden[:, 0]

    def draw(self, number: int, hidden: Tensor) -> Tensor:
        return torch.cat([hidden[:, 1:], torch.full((len(hidden), SIDE**2 - 4), number)], dim=1).view(-1, SIDE, SIDE)


def make_scores(n: int = 2) -> list[Tensor]:
    """Every second one is worth a fifth: many ties."""
    g = torch.Generator().manual_seed(0)
    return [torch.randn(n, HEADS, h, w, generator=g).mul(5).round() / 5 for h, w in SIZES]


def blur(scores: Sequence[Tensor], off: float) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [score + off * (2 * torch.rand(score.shape, generator=g) - 1) for score in scores]


@pytest.mark.parametrize("k", [1, 10, 400, 100_000])
@pytest.mark.parametrize("off", [0.0, 0.001, 0.03])
def test_it_is_the_exact_choice(k: int, off: float) -> None:
    scores = make_scores()
    found = decide([], blur(scores, off), k, Looked(scores))
    assert found is not None
    winners, masks = found
    expected = select_winners(scores, k)
    for ours, right in zip(winners, expected, strict=True):
        assert torch.equal(ours, right)
    assert torch.equal(masks.flatten(2)[:, :, :4].long(), expected.places)
    assert torch.equal(masks.flatten(2)[:, :, 4].long(), expected.heads)


def test_candidates_are_few() -> None:
    scores = make_scores(1)
    answer = Looked(scores)
    assert decide([], blur(scores, 0.001), 400, answer) is not None
    assert answer.asked == 600
    answer.asked = 0
    assert decide([], blur(scores, 0.001), 1, answer) is not None
    assert answer.asked == screening.LEAST


def test_more_candidates_settle_what_few_do_not() -> None:
    scores = make_scores(1)
    answer = Looked(scores)
    found = decide([], blur(scores, 0.15), 400, answer)
    assert found is not None
    assert answer.asked in (800, 1200)
    assert torch.equal(found[0].places, select_winners(scores, 400).places)


@pytest.mark.parametrize("of", [0, 1])
def test_scores_that_are_too_rough_settle_nothing(of: int) -> None:
    """In one image of a batch is enough."""
    scores = make_scores()
    rough = blur(scores, 0.001)
    for level, worse in zip(rough, blur(scores, 3.0), strict=True):
        level[of] = worse[of]
    assert decide([], rough, 400, Looked(scores)) is None


@pytest.mark.parametrize("where", ["rough", "exact"])
def test_nan_settles_nothing(where: str) -> None:
    scores = make_scores()
    rough = blur(scores, 0.0)
    (rough if where == "rough" else scores)[0][1, 0, 7, 7] = torch.nan
    if where == "exact":
        rough[0][1, 0, 7, 7] = 9.0  # a candidate, then
    found = decide([], rough, 400, Looked(scores))
    if where == "exact":
        assert found is None
    else:  # ranks last and is no candidate; who looks for NaN finds it in the rough scores
        assert found is not None
        assert found[0].logits.isfinite().all()
