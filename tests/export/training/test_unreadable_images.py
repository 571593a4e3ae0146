"""An image that cannot be read ends a run with its state saved; once mended the run ends as if nothing had been."""

from __future__ import annotations

import csv
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fpn_engine.errors import FpnEngineError, ImageError, NonFiniteError
from fpn_engine.evaluation import DetectionScore
from fpn_export.detector import FpnDetector, make_detector
from fpn_export.masks.batches import load_mask_batches
from fpn_export.masks.examples import MaskExample, SceneExamples
from fpn_export.training.batches import BatchOrder, load_batches
from fpn_export.training.examples import Example
from fpn_export.training.processes import Processes
from fpn_export.training.recipe import Recipe
from fpn_export.training.run_folder import RunFolder
from fpn_export.training.trainer import Habits, Trainer
from tests.export.masks.tiny import tiny_spec as tiny_mask_spec
from tests.export.training.squares import Squares, tiny_spec

RECIPE = Recipe(
    steps=4, batch_size=2, learning_rate=0.01, anchors_per_image=16, rois_per_image=16, proposals_per_image=50
)
NAMES = ("AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


class Damaged(Squares):
    """Rectangles of which image ``damaged`` cannot be read."""

    damaged: int | None = None

    def __getitem__(self, index: int) -> Example:
        if index == self.damaged:
            raise ImageError(f"{index}.png is damaged")
        return super().__getitem__(index)


class Deadly(Squares):
    """Rectangles of which image 5 kills who reads it."""

    def __getitem__(self, index: int) -> Example:
        if index == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


class DamagedScenes(SceneExamples):
    def __getitem__(self, index: int) -> MaskExample:
        raise ImageError(f"{index}.png is damaged")


class Scores:
    """A validation that gives 0.1, 0.2, ... or fails."""

    def __init__(self) -> None:
        self.calls, self.failure = 0, None

    def __call__(self, model: FpnDetector) -> DetectionScore:
        if self.failure is not None:
            raise self.failure
        self.calls += 1
        return DetectionScore(AP=self.calls / 10, **dict.fromkeys(NAMES, 0.0), per_class={})


@pytest.fixture
def images() -> Damaged:
    return Damaged(seed=1, count=20)


class Second:
    """The second of two processes; the first has its wish when they ask each other for the ``at``-th time."""

    rank, world_size, is_first, device = 0, 1, False, torch.device("cpu")

    def __init__(self, at: int) -> None:
        self._at, self.asked = at, 0

    def wait(self) -> None:
        pass

    def agree(self, wish: bool) -> bool:
        self.asked += 1
        return wish or self.asked == self._at


def make_trainer(path: Path, images: Squares, **options: Any) -> Trainer:
    torch.manual_seed(0)
    model = make_detector(tiny_spec(body_width=8, fpn_channels=8), representation_size=16)
    options = {"habits": Habits(validate_every=2, save_every=100), "data": {}} | options
    processes = options.pop("processes", Processes(device=torch.device("cpu")))
    return Trainer(model, images, RECIPE, RunFolder(path), processes, **options)


def read_rows(path: Path, name: str) -> list[list[str]]:
    with (path / name).open(newline="") as file:
        return [row[:2] for row in csv.reader(file)]


def assert_same_weights(path: Path, other: Path) -> None:
    ours, theirs = (torch.load(folder / "last.pth", weights_only=True) for folder in (path, other))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_a_run_goes_on_once_its_image_is_mended(run_path: Path, images: Damaged, tmp_path: Path) -> None:
    assert make_trainer(tmp_path / "well", images).run()
    images.damaged = list(BatchOrder(images.shapes, RECIPE))[3][0].image
    trainer = make_trainer(run_path, images)
    with pytest.raises(ImageError, match=r"\.png is damaged; stopped after step 3, the same command goes on once"):
        trainer.run()
    trainer.folder.close()
    images.damaged = None
    trainer = make_trainer(run_path, images)
    assert trainer.step == 3
    assert trainer.run()
    assert_same_weights(run_path, tmp_path / "well")


@pytest.mark.parametrize("step", [2, 4])
def test_a_score_that_failed_is_taken_when_the_run_goes_on(
    step: int, run_path: Path, images: Damaged, tmp_path: Path
) -> None:
    """At the last step too, after which there is no other."""
    assert make_trainer(tmp_path / "well", images, validation=Scores()).run()
    scores = Scores()
    trainer = make_trainer(run_path, images, validation=scores)

    def damage(progress: object) -> None:
        scores.failure = ImageError("9.png is damaged") if trainer.step == step - 1 else None

    with pytest.raises(ImageError, match=f"9.png is damaged; stopped after step {step}"):
        trainer.run(damage)
    trainer.folder.close()
    scores.failure = None
    trainer = make_trainer(run_path, images, validation=scores)
    assert trainer.step == step
    assert trainer.run()
    assert_same_weights(run_path, tmp_path / "well")
    assert read_rows(run_path, "scores.csv") == [["step", "AP"], ["2", "0.1"], ["4", "0.2"]]
    assert (run_path / "best.pth").read_bytes() == (tmp_path / "well" / "best.pth").read_bytes()
    assert [step for step, _ in read_rows(run_path, "log.csv")] == ["step", "1", "2", "3", "4"]


def test_a_model_that_gives_nan_is_not_saved(run_path: Path, images: Damaged) -> None:
    scores = Scores()
    scores.failure = NonFiniteError("the network gives NaN")
    with pytest.raises(NonFiniteError, match=r"gives NaN$"):
        make_trainer(run_path, images, validation=scores).run()
    assert not (run_path / "state.pt").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_readers_in_other_processes_say_the_same(workers: int, images: Damaged) -> None:
    def read_all(batches: Iterator[Any]) -> None:
        with pytest.raises(ImageError, match=r"^\d+\.png is damaged$"):
            list(batches)

    images.damaged = 5
    read_all(load_batches(images, tiny_spec(), Recipe(steps=20, batch_size=2), workers=workers))
    read_all(load_mask_batches(DamagedScenes(1, 3), tiny_mask_spec(), Recipe(steps=1, batch_size=2), workers=workers))


def test_a_reader_that_is_killed_ends_with_a_sentence(run_path: Path) -> None:
    deadly = make_trainer(run_path, Deadly(seed=1, count=8), habits=Habits(workers=2))
    with pytest.raises(FpnEngineError, match=r"ahead was killed, .*; fewer --workers need less"):
        deadly.run()


@pytest.mark.parametrize("said", ["DataLoader worker (pid 3) is killed by signal: Killed.", "something else"])
def test_only_its_error_is_named_amid_an_update(
    said: str, run_path: Path, images: Damaged, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError(said)

    trainer = make_trainer(run_path, images)
    monkeypatch.setattr(trainer, "_update", fail)
    with pytest.raises(RuntimeError if said == "something else" else FpnEngineError) as raised:
        trainer.run()
    assert str(raised.value).endswith(said if said == "something else" else "goes on from the last saved state")
    assert not (run_path / "state.pt").exists()


@pytest.mark.parametrize(
    ("at", "sentence"),
    [
        (4, "another process cannot read its images and says why; stopped after step 1"),
        (2, "another process's loss became NaN or infinite at step 1; a lower --learning-rate"),
        (6, "the first process cannot score the model and says why; stopped after step 2"),
    ],
)
def test_no_process_waits_for_one_that_failed(at: int, sentence: str, run_path: Path, images: Damaged) -> None:
    """Each asks the others before it goes on; it would wait for hours in the next sum over all of them."""
    processes = Second(at)
    trainer = make_trainer(run_path, images, validation=Scores(), processes=processes)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    with pytest.raises(FpnEngineError, match=f"^{sentence}"):
        trainer.run()
    assert processes.asked == at
    if at == 2:
        assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.named_parameters())
