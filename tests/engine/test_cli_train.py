"""``fpn-engine train`` and ``fpn-engine scenes`` as people run them."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from fpn_export.checkpoint import load_checkpoint
from fpn_export.scenes import write_coco
from fpn_export.training.alternating import STEPS
from tests.engine.conftest import Run
from tests.engine.voc_files import write_object, write_xml
from tests.export.training.squares import write_squares
from tests.two_processes import run_in_two

TINY = (
    "--arch resnet18 --fpn-channels 16 --representation-size 32 --min-size 96 --max-size 96 --batch 2 --warmup 1 "
    "--learning-rate 0.005 --clip-norm 1 --device cpu --set body_width=8 --set rpn_pre_nms_top_n_test=50 "
    "--set rpn_post_nms_top_n_test=50 --set anchor_sizes=[[8],[16],[32],[64],[128]] "
    "--recipe anchors_per_image=16 --recipe rois_per_image=16 --recipe proposals_per_image=50"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_squares(tmp_path_factory.mktemp("squares"), seed=1, count=6)


def options(data: Path, output: Path, *more: str) -> list[str]:
    given = ["train", "--annotations", str(data), "--images", str(data.parent / "images"), "-o", str(output)]
    return [*given, *TINY.split(), *more]


def steps_logged(output: Path) -> list[int]:
    path = output / "log.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [int(row["step"]) for row in csv.DictReader(file)]


def test_training_ends_with_a_checkpoint_that_exports(data: Path, run: Run, tmp_path: Path) -> None:
    output = tmp_path / "run"
    done = run(*options(data, output, "--steps", "3", "--val-annotations", str(data)))
    assert (done.code, done.out) == (0, "")
    assert "step 3: AP " in done.err
    assert f"next: fpn-engine export {output / 'best.pth'}" in done.err
    assert steps_logged(output) == [1, 2, 3]
    exported = run("export", str(output / "best.pth"))
    assert exported.code == 0
    assert "assumed" not in exported.err


def test_epochs_count_images_with_objects(data: Path, run: Run, tmp_path: Path) -> None:
    assert run(*options(data, tmp_path / "run", "--epochs", "1")).code == 0
    assert steps_logged(tmp_path / "run") == [1, 2, 3]


def test_a_system_of_the_paper_by_name(data: Path, run: Run, tmp_path: Path) -> None:
    assert run(*options(data, tmp_path / "run", "--steps", "1", "--system", "c5", "--model", "rpn")).code == 0
    spec = load_checkpoint(tmp_path / "run" / "best.pth").spec
    assert (spec.model, spec.pyramid, spec.levels) == ("rpn", "none", (5,))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--recipe", "learning_rat=1"], "unknown key 'learning_rat' in the recipe"),
        (["--set", "model=rpn"], "--set model=rpn and --model faster_rcnn are at odds"),
        (["--set", "box_detections_per_img=5", "--model", "rpn"], "box_detections_per_img follows from --model rpn"),
        (["--recipe", "steps=soon"], "steps in the recipe has a value of the wrong form"),
        (["--recipe", "freeze_norm=False"], "freeze_norm in the recipe has a value of the wrong form"),
        (["--recipe", "scales=[1]"], "scales in the recipe has a value of the wrong form: [1] is not two numbers"),
        (["--recipe", "batch_size=abc"], "batch_size in the recipe has a value of the wrong form"),
        (["--device", "mps"], "cannot train on mps"),
        (["--set", "body_widht=8"], "unknown key 'body_widht'"),
        (["--system", "retina"], "unknown system 'retina'"),
        (["--init", "nothing.pth"], "nothing.pth does not exist"),
        (["--schedule", "linear"], "schedule must be one of step, cosine"),
        (["--arch", "vgg16"], "arch must be one of"),
    ],
)
def test_nonsense_ends_with_a_sentence(data: Path, run: Run, tmp_path: Path, more: list[str], message: str) -> None:
    done = run(*options(data, tmp_path / "run", "--steps", "1", *more))
    assert done.code == 1
    assert message in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize("arch", [[], ["--arch", "fpn-masks"]])
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--epochs", "inf"], "inf epochs are no finite number of updates"),
        (["--recipe", "batch_size=abc"], "batch_size in the recipe has a value of the wrong form"),
        (["--recipe", "steps=2.5"], "steps in the recipe has a value of the wrong form"),
    ],
)
def test_lengths_of_nonsense_end_with_a_sentence(
    arch: list[str], more: list[str], message: str, run: Run, tmp_path: Path
) -> None:
    data = write_coco(tmp_path / "scenes", seed=3, count=2, size=(96, 128))
    images = str(data.parent / "images")
    done = run("train", "--annotations", str(data), "--images", images, "-o", str(tmp_path / "run"), *arch, *more)
    assert done.code == 1
    assert message in done.err


def test_images_to_score_masks_on_are_looked_for_before_training(run: Run, tmp_path: Path) -> None:
    data = write_coco(tmp_path / "scenes", seed=3, count=2, size=(96, 128))
    given = ["--arch", "fpn-masks", "--annotations", str(data), "--images", str(data.parent / "images")]
    done = run(
        "train", *given, "--val-annotations", str(data), "--val-images", str(tmp_path), "-o", str(tmp_path / "run")
    )
    assert done.code == 1
    assert "2 of 2 annotated images are not in" in done.err
    assert "check --val-images" in done.err
    assert not (tmp_path / "run").exists()
    empty = tmp_path / "empty.json"
    empty.write_text(json.dumps(json.loads(data.read_text()) | {"annotations": []}))
    done = run("train", *given, "--val-annotations", str(empty), "-o", str(tmp_path / "run"))
    assert (done.code, "empty.json has no object to score on" in done.err) == (1, True)
    done = run("train", *given, "--system", "dual", "--set", "heads=[]", "-o", str(tmp_path / "run"))
    assert (done.code, "heads follows from --system" in done.err) == (2, True)


def test_annotations_of_different_classes_are_refused(data: Path, run: Run, tmp_path: Path) -> None:
    document = json.loads(data.read_text())
    document["categories"][0]["name"] = "crimson"
    other = tmp_path / "other.json"
    other.write_text(json.dumps(document))
    done = run(*options(data, tmp_path / "run", "--annotations", str(other)))
    assert done.code == 1
    assert "different categories" in done.err


def test_each_annotations_have_images_of_their_own(run: Run, tmp_path: Path) -> None:
    """Two VOC folders know theirs, two COCO files are given theirs."""
    voc = [tmp_path / name for name in ("VOC2007", "VOC2012")]
    coco = [write_squares(tmp_path / name, seed=seed, count=count) for name, seed, count in (("a", 1, 2), ("b", 2, 4))]
    for folder, name in zip(voc, ("a", "b"), strict=True):
        write_xml(folder / "Annotations", name, write_object("cat", (3, 3, 40, 40)))
        (folder / "JPEGImages").mkdir()
        Image.new("RGB", (80, 60)).save(folder / "JPEGImages" / f"{name}.jpg")
    for number, given in enumerate(
        (
            [word for folder in voc for word in ("--annotations", str(folder))],
            [word for path in coco for word in ("--annotations", str(path), "--images", str(path.parent / "images"))],
        )
    ):
        done = run("train", *given, "-o", str(tmp_path / f"run{number}"), *TINY.split(), "--steps", "1")
        assert done.code == 0, done.err
    three = ["--images", "a", "--images", "b", "--images", "c"]
    refused = run("train", *given, *three, "-o", str(tmp_path / "none"))
    assert refused.code == 2
    assert "one for each --annotations" in refused.err


def start(data: Path, output: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fpn_engine", *options(data, output, *more)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def test_ctrl_c_ends_after_the_step_at_hand_and_the_same_command_goes_on(data: Path, run: Run, tmp_path: Path) -> None:
    output, length = tmp_path / "run", ["--steps", "400", "--save-every", "1000"]
    process = start(data, output, *length)
    deadline = time.monotonic() + 120
    while len(steps_logged(output)) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    done = steps_logged(output)
    assert process.returncode == 130
    assert "stopping after this step" in err
    assert f"stopped after step {done[-1]} of 400; the same command goes on from there" in err
    assert "Traceback" not in err
    process = start(data, output, *length)
    while len(steps_logged(output)) <= len(done) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert f"going on after step {done[-1]} of 400" in err
    assert steps_logged(output) == list(range(1, len(steps_logged(output)) + 1))


@pytest.mark.parametrize("schedule", [[], ["--alternating"]], ids=["joint", "alternating"])
def test_two_processes_train_one_model(schedule: list[str], data: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    done = run_in_two([*options(data, output, "--steps", "3", "--val-annotations", str(data)), *schedule])
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("trained 3 steps") == 1
    logs = [output / step.name for step in STEPS] if schedule else [output]
    assert [steps_logged(folder) for folder in logs] == [[1, 2, 3]] * len(logs)
    assert all(tensor.isfinite().all() for tensor in torch.load(output / "last.pth", weights_only=True).values())


def test_scenes_are_the_same_from_the_same_seed(run: Run, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        done = run("scenes", str(tmp_path / folder), "--count", "2", "--seed", "3", "--height", "96", "--width", "128")
        assert (done.code, done.out) == (0, "")
        assert "2 scenes of seed 3" in done.err
    for name in ("annotations.json", "images/000000.png", "images/000001.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
