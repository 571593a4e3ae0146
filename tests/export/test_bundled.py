"""The model that comes with the package: it is there, small, described, and finds shapes."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fpn_engine.annotations import load_annotations
from fpn_engine.engine import Engine
from fpn_export.bundled import CHECKPOINT, hash_bundled
from fpn_export.cached_plan import make_cached
from fpn_export.checkpoint import load_checkpoint
from fpn_export.demo import compare
from fpn_export.masks.checkpoint import load_mask_model
from fpn_export.masks.examples import SceneExamples
from fpn_export.masks.training import SegmentValidation
from fpn_export.scenes import CATEGORIES, make_scene
from fpn_export.scenes.dataset import IMAGES, write_coco
from fpn_export.training.validation import CocoValidation

ROOT = Path(__file__).parents[2]
MOST_BYTES = {"demo": 10_000_000, "scene-masks": 6_000_000}  # in the wheel, the first together with all code
HELD_OUT = 20_170_420  # the data set beside that of the demonstration
SCENES = 6
# One that is trained further has to find more, and less that is not there.
FOUND, SPURIOUS = 0.76, 0.38
MASK_SCENES, LEAST_RECALL = 20, 0.25
FRESH_SEED, FRESH_SCENES, LEAST_AP = 500, 30, 0.66  # the first of benchmarks.score_bundled, where 500 give AP 0.706


def test_it_is_described_in_full() -> None:
    loaded = load_checkpoint(CHECKPOINT)
    assert loaded.assumptions == []
    assert loaded.spec.categories == CATEGORIES
    assert loaded.spec.model == "faster_rcnn"


def test_it_is_kept_in_half_precision() -> None:
    assert {tensor.dtype for tensor in load_file(CHECKPOINT).values() if tensor.is_floating_point()} == {torch.float16}


def test_the_wheel_stays_small() -> None:
    """Weights do not compress, and code counts in full here."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert "models/*" in settings["package-data"]["fpn_export"]
    code = [path for folder in settings["packages"]["find"]["where"] for path in (ROOT / folder).rglob("*.py")]
    data = {
        name: [CHECKPOINT.with_name(f"{name}{suffix}") for suffix in (".safetensors", ".json")] for name in MOST_BYTES
    }
    assert sorted(CHECKPOINT.parent.iterdir()) == sorted(path for files in data.values() for path in files)
    data["demo"] += code
    for name, files in data.items():
        assert sum(path.stat().st_size for path in files) < MOST_BYTES[name]


def test_it_finds_most_of_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FPN_ENGINE_CACHE", str(tmp_path))
    engine = Engine.load(make_cached("demo", hash_bundled(), CHECKPOINT))
    found = there = spurious = 0
    for index in range(SCENES):
        scene = make_scene(HELD_OUT, index)
        (detections,) = engine(scene.image)
        comparison = compare(scene, detections.filter(min_score=0.5))
        found += comparison.found
        there += len(comparison.pairs)
        spurious += len(comparison.spurious)
    assert there > 60
    assert found > FOUND * there
    assert spurious <= SPURIOUS * there


def test_its_average_precision(tmp_path: Path) -> None:
    truth = load_annotations(write_coco(tmp_path, FRESH_SEED, FRESH_SCENES))
    assert CocoValidation(truth, tmp_path / IMAGES)(load_checkpoint(CHECKPOINT).model).AP >= LEAST_AP


def test_the_json_names_the_checkpoint() -> None:
    about = json.loads(CHECKPOINT.with_suffix(".json").read_text())["about"]
    assert about["sha256"] == load_checkpoint(CHECKPOINT).sha256


def test_the_mask_model_covers_objects() -> None:
    """Average recall 0.30 of 1000 masks on 100 scenes (benchmarks.mask_table6)."""
    others = SceneExamples(1_000_001, MASK_SCENES, (240, 320))
    validation = SegmentValidation(others.truth, lambda number: others[number].pixels)
    assert validation(load_mask_model(CHECKPOINT.with_name("scene-masks.safetensors"))).AR1000 >= LEAST_RECALL
