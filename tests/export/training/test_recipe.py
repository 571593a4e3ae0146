"""The recipe's defaults are the paper's, its schedules are what they are called, and nonsense is refused."""

from __future__ import annotations

import json

import pytest

from fpn_engine.errors import SpecError
from fpn_export.training.recipe import Recipe


def test_the_defaults_are_the_papers() -> None:
    recipe = Recipe(steps=80_000)
    assert (recipe.batch_size, recipe.rate, recipe.momentum, recipe.weight_decay) == (16, 0.02, 0.9, 1e-4)
    assert (recipe.anchors_per_image, recipe.rois_per_image) == (256, 512)
    # 0.02 for the first 60k, 0.002 for the next 20k (sec. 5.2)
    assert recipe.rate_at(59_999) == pytest.approx(0.02)
    assert recipe.rate_at(60_000) == pytest.approx(0.002)
    # and for the RPN 30k of 40k (sec. 5.1)
    assert Recipe(steps=40_000).rate_at(30_000) == pytest.approx(0.002)


def test_the_rate_follows_the_batch_unless_given() -> None:
    assert Recipe(steps=1, batch_size=4).rate == pytest.approx(0.005)
    assert Recipe(steps=1, batch_size=4, learning_rate=0.02).rate == 0.02


def test_warm_up_rises_to_the_rate_and_cosine_falls_to_nothing() -> None:
    recipe = Recipe(steps=1000, schedule="cosine", warmup_steps=99, learning_rate=1.0)
    rates = [recipe.rate_at(step) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01)
    assert rates[:100] == sorted(rates[:100])
    assert rates[99:] == sorted(rates[99:], reverse=True)
    assert rates[500] == pytest.approx(0.5)
    assert rates[-1] < 1e-5


def test_it_survives_json() -> None:
    recipe = Recipe(steps=10, scales=(0.5, 2.0), milestones=(0.5, 0.9), learning_rate=0.1)
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 0},
        {"batch_size": 0},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"schedule": "linear"},
        {"milestones": (1.5,)},
        {"momentum": 1.0},
        {"momentum": 0.0, "nesterov": True},
        {"scales": (2.0, 1.0)},
        {"brightness": 1.0},
        {"frozen_stages": 6},
        {"precision": "fp16"},
        {"rois_per_image": 0},
        {"box_weight": 0.0},
        {"box_weight": float("inf")},
        {"seed": -1},
    ],
)
def test_nonsense_is_refused_by_name(changes: dict[str, object]) -> None:
    with pytest.raises(SpecError, match=next(iter(reversed(changes)))):
        Recipe(**({"steps": 10} | changes))  # type: ignore[arg-type]
