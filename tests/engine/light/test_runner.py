"""When the light runner is taken, and what it does with networks that give NaN or nothing."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fpn_engine.engine import Engine
from fpn_engine.errors import NonFiniteError, PlanError
from fpn_engine.light import MOST_IMAGES, is_light
from fpn_engine.light.runner import LightRunner
from fpn_engine.plan import Plan, read_plan
from fpn_engine.runtime.runner import EagerRunner
from tests.engine.conftest import Tiny, make_picture


def load_light(path: Path, **options: Any) -> Engine:
    light = LightRunner(read_plan(path))
    return Engine(light, runner=light, **options)


def test_few_images_on_the_cpu_are_light(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = read_plan(tiny.plan).manifest
    assert not is_light(manifest, 1), "torch is here already"
    monkeypatch.delitem(sys.modules, "torch")
    assert is_light(manifest, 1)
    assert is_light(manifest, MOST_IMAGES, "cpu")
    assert not is_light(manifest, MOST_IMAGES + 1)
    assert not is_light(manifest, None)
    for device in ("cuda", "cuda:1", "elsewhere"):  # which the torch path refuses in words
        assert not is_light(manifest, 1, device)
    assert not is_light(manifest, 1, streams=2)
    assert not is_light(dataclasses.replace(manifest, backend="native"), 1)
    assert not is_light(dataclasses.replace(manifest, device="cuda"), 1)


def test_an_engine_takes_the_runner_that_suits(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(Engine.load(tiny.plan, images=1)._runner, EagerRunner)
    monkeypatch.setattr("fpn_engine.engine.is_light", lambda *given: given[1] == 1)
    assert isinstance(Engine.load(tiny.plan, images=1)._runner, LightRunner)
    assert isinstance(Engine.load(tiny.plan, images=2)._runner, EagerRunner)
    light = Engine.load(tiny.plan, images=1, batch_size=3, buckets=64, threads=1)
    assert light.batch_size == 3
    assert light.device.type == "cpu"
    light.warmup([(60, 80)])


def test_networks_that_give_nan(broken_plan: Path) -> None:
    engine = load_light(broken_plan)
    with pytest.raises(NonFiniteError, match="the network gave NaN or infinity"):
        engine(make_picture(60, 80))
    with pytest.raises(NonFiniteError):
        engine.propose(make_picture(60, 80))


def test_nothing_found(tiny: Tiny) -> None:
    (found,) = load_light(tiny.plan)(make_picture(60, 80), score_threshold=1.0)
    assert (found.boxes.shape, found.boxes.dtype) == ((0, 4), np.float32)
    assert (found.scores.dtype, found.labels.dtype) == (np.float32, np.int64)


def test_an_image_of_one_pixel(tiny: Tiny) -> None:
    ours, theirs = (engine(make_picture(1, 1))[0] for engine in (load_light(tiny.plan), Engine.load(tiny.plan)))
    np.testing.assert_allclose(ours.scores, theirs.scores, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(ours.labels, theirs.labels)


def test_a_plan_without_joints(tiny: Tiny) -> None:
    plan = read_plan(tiny.plan)
    parts = {name: part for name, part in plan.manifest.parts.items() if name in ("trunk.onnx", "head.onnx")}
    with pytest.raises(PlanError, match=r"not detections.onnx and head.onnx and rois.onnx and trunk.onnx; build it"):
        LightRunner(Plan(dataclasses.replace(plan.manifest, parts=parts), plan.parts))
