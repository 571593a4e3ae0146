"""The loop: it learns, it can be stopped, killed and taken up, and it says what is wrong."""

from __future__ import annotations

import csv
import dataclasses
import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from fpn_engine.engine import Engine
from fpn_engine.errors import CheckpointError, NonFiniteError
from fpn_engine.evaluation import DetectionScore, score_detections
from fpn_engine.results import coco_results
from fpn_export.checkpoint import load_checkpoint
from fpn_export.detector import FpnDetector, make_detector
from fpn_export.training.processes import Processes
from fpn_export.training.recipe import Recipe
from fpn_export.training.run_folder import RunFolder
from fpn_export.training.trainer import Habits, Progress, Trainer
from tests.export.training.squares import Squares, tiny_spec

SHORT = Recipe(
    steps=12,
    batch_size=2,
    learning_rate=0.01,
    warmup_steps=3,
    scales=(0.8, 1.2),
    anchors_per_image=32,
    rois_per_image=32,
    proposals_per_image=100,
)


def make_trainer(path: Path, squares: Squares, recipe: Recipe = SHORT, **options: Any) -> Trainer:
    torch.manual_seed(0)
    model = make_detector(tiny_spec(), representation_size=64)
    folder = RunFolder(path)
    options = {"habits": Habits(save_every=5), "data": {}} | options
    return Trainer(model, squares, recipe, folder, Processes(device=torch.device("cpu")), **options)


def score(model: FpnDetector, squares: Squares) -> DetectionScore:
    engine = Engine(model.pipeline)
    results = []
    for index in range(len(squares)):
        results += coco_results(engine(squares[index].pixels)[0], index + 1)
    return score_detections(squares.truth, results)


def test_a_minute_of_training_finds_most_objects(run_path: Path, squares: Squares) -> None:
    recipe = Recipe(
        steps=400,
        batch_size=4,
        learning_rate=0.02,
        schedule="cosine",
        warmup_steps=20,
        clip_norm=2.0,
        anchors_per_image=64,
        rois_per_image=64,
        proposals_per_image=200,
    )
    fresh = Squares(seed=2, count=60)
    trainer = make_trainer(run_path, squares, recipe)
    untrained = make_detector(tiny_spec(), representation_size=64).eval()
    assert trainer.run()
    loaded = load_checkpoint(run_path / "last.pth")
    assert loaded.spec.categories == tiny_spec().categories
    assert score(untrained, fresh).AP < 0.05
    assert score(loaded.model, fresh).AP >= 0.5


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path / "last.pth", weights_only=True)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, squares: Squares) -> Path:
    path = tmp_path_factory.mktemp("uninterrupted")
    assert make_trainer(path, squares).run()
    return path


def read_log(path: Path) -> list[list[str]]:
    """Without the seconds, which nobody repeats."""
    with (path / "log.csv").open(newline="") as file:
        return [row[:-1] for row in csv.reader(file)]


def test_a_stopped_run_ends_as_one_that_was_not(run_path: Path, squares: Squares, uninterrupted: Path) -> None:
    first = make_trainer(run_path, squares)
    seen: list[int] = []
    assert not first.run(lambda progress: seen.append(progress.step), lambda: len(seen) == 7)
    assert not (run_path / "last.pth").exists()
    first.folder.close()
    second = make_trainer(run_path, squares)
    assert second.step == 7
    assert second.run(lambda progress: seen.append(progress.step))
    assert seen == list(range(1, 13))
    assert_same_run(run_path, uninterrupted)


def test_box_losses_count_by_their_weight(run_path: Path, squares: Squares) -> None:
    assert make_trainer(run_path, squares, dataclasses.replace(SHORT, steps=2, box_weight=3.0)).run()
    names, *rows = read_log(run_path)
    for row in rows:
        parts = {name: float(value) for name, value in zip(names, row, strict=True)}
        box, classification = (sum(v for k, v in parts.items() if k.endswith(e)) for e in ("_box", "_classification"))
        assert box > 0
        assert parts["loss"] == pytest.approx(classification + 3 * box, rel=1e-4)


def train_until_killed(path: Path, squares: Squares) -> None:
    def die(progress: Progress) -> None:
        if progress.step == 8:
            os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    make_trainer(path, squares).run(die)


def test_a_killed_run_ends_as_one_that_was_not(run_path: Path, squares: Squares, uninterrupted: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=train_until_killed, args=(run_path, squares))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert len(read_log(run_path)) == 1 + 8
    trainer = make_trainer(run_path, squares)
    assert trainer.step == 5  # the last saved state
    assert trainer.run()
    assert_same_run(run_path, uninterrupted)


def assert_same_run(path: Path, other: Path) -> None:
    assert read_log(path) == read_log(other)
    for name, tensor in weights_of(other).items():
        assert torch.equal(weights_of(path)[name], tensor), name


def test_a_model_is_the_same_file_whoever_writes_it(
    run_path: Path, squares: Squares, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or alternating training could not go on in another process: a step knows the file that it began from."""
    trainer = make_trainer(run_path, squares)
    written = []
    for process in (11, 22):
        monkeypatch.setattr("os.getpid", lambda number=process: number)
        written.append(trainer.folder.save_model("last", trainer.model, {}).read_bytes())
    assert written[0] == written[1]


def test_the_seed_decides(run_path: Path, squares: Squares, uninterrupted: Path) -> None:
    other = Recipe.from_dict(SHORT.to_dict() | {"seed": 1})
    assert make_trainer(run_path, squares, other).run()
    assert any(
        not torch.equal(weights_of(run_path)[name], tensor) for name, tensor in weights_of(uninterrupted).items()
    )


def test_another_recipe_does_not_take_a_run_up(run_path: Path, squares: Squares) -> None:
    trainer = make_trainer(run_path, squares)
    trainer.run(should_stop=lambda: True)
    trainer.folder.close()
    other = Recipe.from_dict(SHORT.to_dict() | {"learning_rate": 0.5})
    with pytest.raises(CheckpointError, match=r"recipe\.learning_rate was 0\.01, is 0\.5.*--restart"):
        make_trainer(run_path, squares, other)


def test_two_runs_do_not_share_a_folder(run_path: Path, squares: Squares) -> None:
    trainer = make_trainer(run_path, squares)
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        message = pool.apply(try_folder, (run_path,))
    assert "another run is training" in message
    trainer.folder.close()


def try_folder(path: Path) -> str:
    try:
        RunFolder(path)
    except CheckpointError as error:
        return str(error)
    return "opened"


def test_a_damaged_state_is_said(run_path: Path, squares: Squares) -> None:
    trainer = make_trainer(run_path, squares)
    trainer.run(should_stop=lambda: True)
    trainer.folder.close()
    state = run_path / "state.pt"
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"state\.pt cannot be read.*--restart"):
        make_trainer(run_path, squares)


def test_a_loss_that_explodes_ends_the_run_with_a_sentence(run_path: Path, squares: Squares) -> None:
    trainer = make_trainer(run_path, squares, Recipe.from_dict(SHORT.to_dict() | {"learning_rate": 1e9}))
    with pytest.raises(NonFiniteError, match=r"the loss became .* at step \d+; a lower --learning-rate"):
        trainer.run()
    assert not (run_path / "last.pth").exists()


def test_the_best_model_is_kept_by_its_score(run_path: Path, squares: Squares) -> None:
    figures = iter([0.1, 0.3, 0.2])
    scored: list[dict[str, torch.Tensor]] = []

    def validation(model: FpnDetector) -> DetectionScore:
        assert not model.training
        scored.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        names = ("AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
        return DetectionScore(AP=next(figures), **dict.fromkeys(names, 0.0), per_class={})

    trainer = make_trainer(run_path, squares, validation=validation, habits=Habits(validate_every=4, save_every=100))
    assert trainer.run()
    assert trainer.best == 0.3
    best = torch.load(run_path / "best.pth", weights_only=True)
    assert all(torch.equal(best[name], tensor) for name, tensor in scored[1].items())
    about = json.loads((run_path / "best.json").read_text())["about"]
    assert (about["step"], about["validation"]) == (8, {"AP": 0.3})
    with (run_path / "scores.csv").open(newline="") as file:
        assert [(row["step"], row["AP"]) for row in csv.DictReader(file)] == [("4", "0.1"), ("8", "0.3"), ("12", "0.2")]


def test_frozen_parts_do_not_change(run_path: Path, squares: Squares) -> None:
    recipe = Recipe.from_dict(SHORT.to_dict() | {"freeze_norm": True, "frozen_stages": 2, "weight_decay": 0.1})
    trainer = make_trainer(run_path, squares, recipe)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    assert trainer.run()
    changed = {name for name, tensor in trainer.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert not any("bn" in name or "downsample.1" in name for name in changed)
    assert not any(name.startswith(("backbone.body.conv1", "backbone.body.layer1")) for name in changed)
    assert "backbone.body.layer2.0.conv1.weight" in changed
    assert "rpn.head.cls_logits.weight" in changed


def test_bf16_begins_like_fp32(run_path: Path, squares: Squares, uninterrupted: Path) -> None:
    """Later on a rounding draws other RoIs."""
    assert make_trainer(run_path, squares, Recipe.from_dict(SHORT.to_dict() | {"precision": "bf16"})).run()
    columns = read_log(uninterrupted)[0]
    loss = columns.index("loss")
    ours, theirs = ([float(row[loss]) for row in read_log(path)[1:3]] for path in (run_path, uninterrupted))
    assert ours != theirs
    assert ours == pytest.approx(theirs, rel=0.02)
