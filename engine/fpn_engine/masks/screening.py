"""The best places by scores of two precisions: rough ones everywhere choose candidates, exact ones decide among them.

Much of an image's time on a CPU goes into scores of which all but a thousand are thrown away. Whoever gets thrown away
by a wide margin may be scored roughly. How wide the margin has to be, the candidates say: each has a score of both
kinds. If the last winner's exact score is not above the best rough score outside by three times the largest difference
that was seen, there are more candidates, and at last exact scores everywhere. That is a check, not a proof: it takes
that no score outside is off by three times as much as the worst of hundreds inside.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fpn_engine.masks.winners import Winners, select_winners
from fpn_kernels import stable_topk

RESERVES = (1.5, 2.0, 3.0)  # candidates for each place to be found, and where those do not settle it
LEAST = 512  # candidates, for a view of how far off rough scores are
MARGIN = 3.0
SIDE_BITS = 24  # of a cell's y and x, more than any level has


class LayeredAnswer(Protocol):
    """A head's answer at places in two steps: (R, 4) places to (R, O) hidden numbers, and those to what they say."""

    def hide(self, number: int, features: Sequence[Tensor], places: Tensor, /) -> Tensor: ...

    def score(self, number: int, hidden: Tensor, /) -> Tensor: ...

    def draw(self, number: int, hidden: Tensor, /) -> Tensor: ...


class _Part(NamedTuple):
    """Candidates of one head: ``slots`` (R,) among all of the batch, and their hidden numbers (R, O)."""

    head: int
    slots: Tensor
    hidden: Tensor


def decide(
    features: Sequence[Tensor], rough: Sequence[Tensor], k: int, answer: LayeredAnswer
) -> tuple[Winners, Tensor] | None:
    """The ``k`` best places of each image by exact scores, as :func:`select_winners` has them, and their masks.

    Args:
        features, rough: levels (N, d, H_l, W_l) and their approximate score logits (N, A, H_l, W_l).
        answer: the heads, exactly.
    Returns:
        winners, whose logits are exact, and mask logits (N, K, S, S); None if rough scores do not settle who they are,
        or are not finite.
    """
    n, heads = rough[0].shape[:2]
    there = sum(level[0].numel() for level in rough)
    counts = [min(max(math.ceil(k * reserve), LEAST), there) for reserve in RESERVES]
    candidates = select_winners(rough, counts[-1])  # the best of them are the best of fewer
    places, numbers = candidates.places.flatten(0, 1), candidates.heads.flatten()
    rank = torch.arange(counts[-1]).repeat(n)
    exact = torch.full((n * counts[-1],), -torch.inf)
    parts: list[_Part] = []
    for done, count in pairwise([0, *counts]):
        new = (rank >= done) & (rank < count)
        for number in range(heads):
            slots = (new & (numbers == number)).nonzero()[:, 0]
            hidden = answer.hide(number, features, places[slots])
            exact[slots] = answer.score(number, hidden)
            parts.append(_Part(number, slots, hidden))
        scores = exact.view(n, -1)
        best = _best(scores, candidates, k)
        logits = scores.gather(1, best)
        if count == there or _is_settled(scores[:, :count], candidates.logits[:, :count], logits[:, -1]):
            at = best[:, :, None].expand(-1, -1, 4)
            winners = Winners(logits, candidates.heads.gather(1, best), candidates.places.gather(1, at))
            return winners, _draw(parts, best, counts[-1], answer)
    return None


def _best(exact: Tensor, candidates: Winners, k: int) -> Tensor:
    """(N, K) of the candidates, descending; ties by level, y, x, head."""
    _, level, y, x = candidates.places.unbind(dim=2)
    cell = (level << SIDE_BITS | y) << SIDE_BITS | x
    order = (cell * (1 + candidates.heads.max()) + candidates.heads).argsort(dim=1)
    return order.gather(1, stable_topk(exact.gather(1, order), min(k, exact.shape[1])))


def _is_settled(exact: Tensor, rough: Tensor, last: Tensor) -> bool:
    """No place outside the candidates can be among the winners, of which ``last`` (N,) are the lowest scores.

    NaN settles nothing.
    """
    off = (exact - rough).abs().amax(dim=1)
    return bool((last - rough[:, -1] > MARGIN * off).all())


def _draw(parts: Sequence[_Part], best: Tensor, count: int, answer: LayeredAnswer) -> Tensor:
    """Mask logits (N, K, S, S) of the candidates ``best``, (N, K) of ``count`` in each image."""
    n, k = best.shape
    place = torch.full((n * count,), -1)
    place[(best + torch.arange(n)[:, None] * count).flatten()] = torch.arange(n * k)
    masks: Tensor | None = None
    for head, slots, hidden in parts:
        wins = place[slots] >= 0
        drawn = answer.draw(head, hidden[wins]).to(torch.float32)
        if masks is None:
            masks = drawn.new_empty(n * k, *drawn.shape[1:])
        masks[place[slots[wins]]] = drawn
    assert masks is not None  # there is a head
    return masks.view(n, k, *masks.shape[1:])
