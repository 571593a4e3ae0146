"""The recipe's defaults are the paper's, its schedules are what they are called, and nonsense is refused."""

from __future__ import annotations

import json

import pytest

from fpn_engine.errors import SpecError
from fpn_export.training.recipe import Recipe, count_steps


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
        {"steps": 2**31},
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


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", "soon"),
        ("steps", None),
        ("batch_size", 2.5),
        ("batch_size", "4"),
        ("learning_rate", "fast"),
        ("learning_rate", float("nan")),
        ("milestones", 0.5),
        ("milestones", ["half"]),
        ("scales", [1]),
        ("scales", [1, 1, 1]),
        ("scales", 1),
        ("scales", "ab"),
        ("nesterov", "false"),
        ("freeze_norm", "False"),
        ("freeze_norm", 1),
        ("momentum", True),
        ("rois_per_image", 2.5),
        ("rois_per_image", "abc"),
        ("frozen_stages", 1.5),
        ("frozen_stages", float("inf")),
        ("precision", 16),
        ("schedule", ["step"]),
        ("seed", None),
    ],
)
def test_a_value_of_another_type_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(SpecError, match=f"^{name} in the recipe has a value of the wrong form: .* is not "):
        Recipe.from_dict({"steps": 10, name: value})


def test_whole_numbers_are_written_either_way() -> None:
    recipe = Recipe.from_dict({"steps": 10.0, "box_weight": 2, "scales": [1, 2], "learning_rate": None})
    assert recipe == Recipe(steps=10, box_weight=2.0, scales=(1.0, 2.0))
    assert isinstance(recipe.steps, int)


def test_epochs_as_updates() -> None:
    assert [count_steps(epochs, 6, 4) for epochs in (0, 0.1, 2, 3.1)] == [1, 1, 3, 5]
    for epochs in (float("inf"), float("nan"), 1e308):
        with pytest.raises(SpecError, match="epochs are no finite number of updates"):
            count_steps(epochs, 6, 4)
    with pytest.raises(SpecError, match="batch_size in the recipe"):
        count_steps(1, 6, "many")
    with pytest.raises(SpecError, match="batch_size must be at least 1, not 0"):
        count_steps(1, 6, 0)
