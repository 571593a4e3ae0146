"""The yardstick's training: its budget, and that more minutes go on from where the rate began to fall."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from benchmarks.ablations import BASE
from benchmarks.train_torchvision import Budget, Save, make_model, train
from fpn_engine.annotations import load_annotations
from fpn_export.checkpoint import load_checkpoint
from fpn_export.scenes import CATEGORIES
from fpn_export.scenes.dataset import IMAGES, write_coco
from fpn_export.training.examples import AnnotatedExamples

CPU = torch.device("cpu")


@pytest.mark.parametrize(("minutes", "share"), [(0, 1), (8, 1), (9, 0.5), (10, 0), (11, 0)])
def test_the_rate_falls_in_the_last_minutes(minutes: float, share: float) -> None:
    assert Budget(10, 0.2).share(60 * minutes) == pytest.approx(share)


def test_or_not_at_all() -> None:
    assert [Budget(10, 0).share(60 * minutes) for minutes in (0, 9.9, 10)] == [1, 1, 1]


def test_another_budget_goes_on_from_the_full_rate(tmp_path: Path) -> None:
    short = Save(tmp_path, Budget(10, 0.2))
    assert short.load(CPU) is None
    for step, minutes in enumerate((7, 9)):
        short.store({"step": step, "seconds": 60.0 * minutes})
    assert (short.load(CPU) or {})["step"] == 1
    assert (Save(tmp_path, Budget(20, 0.2)).load(CPU) or {})["step"] == 0


@pytest.mark.filterwarnings("default")  # of torchvision's code
def test_small_objects_have_boxes_in_bfloat16() -> None:
    """600 and 601 are one number in bfloat16."""
    torch.manual_seed(0)
    model = make_model(dataclasses.replace(BASE, min_size=640, max_size=640), (1.0,)).train()
    target = {"boxes": torch.tensor([[600.0, 600.0, 601.0, 601.0]]), "labels": torch.tensor([1])}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model([torch.rand(3, 640, 640)], [target])
    assert all(loss.isfinite() and loss.dtype == torch.float32 for loss in losses.values())


@pytest.mark.filterwarnings("default")  # of torchvision's code
def test_a_yardstick_is_trained_and_goes_on(tmp_path: Path) -> None:
    path = write_coco(tmp_path / "scenes", 7, 4, (96, 128))
    truth = load_annotations(path)
    spec = dataclasses.replace(BASE, body_width=64, fpn_channels=128, min_size=64, max_size=86)
    examples = AnnotatedExamples(truth, path.parent / IMAGES, CATEGORIES)
    steps = []
    for minutes, size in ((0.001, 64), (0.1, 72)):
        spec = dataclasses.replace(spec, min_size=size)
        train(spec, examples, tmp_path / "run", Budget(minutes, 0), 0.01, 2, 0)
        loaded = load_checkpoint(tmp_path / "run" / "last.pth")
        state = Save(tmp_path / "run", Budget(minutes, 0)).load(CPU)
        assert state is not None
        steps.append(state["step"])
        assert loaded.spec.fpn_channels == 128
        assert state["seconds"] >= 60 * minutes
    assert steps[1] > steps[0] > 0
    reached = json.loads((tmp_path / "run" / "last.json").read_text())["about"]["reached"]
    assert [(size, at["steps"]) for size, at in reached.items()] == [("64/86", steps[0]), ("72/86", steps[1])]
