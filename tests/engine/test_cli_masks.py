"""Mask proposals through the command line: scenes to a checkpoint, an ONNX file, a plan, masks and a score."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from fpn_engine.engine import Engine
from fpn_engine.masks.run_lengths import decode_masks
from fpn_engine.plan import read_plan
from fpn_export import bundled as bundled_module
from fpn_export.masks.onnx_export import export_mask_onnx
from tests.engine.conftest import Ran, Run
from tests.export.masks.tiny import tiny_model
from tests.two_processes import run_in_two

TINY = (
    "--arch fpn-masks --set arch=resnet18 --set body_width=8 --fpn-channels 16 --set hidden_channels=24 "
    "--set masks_per_img=40 --min-size 96 --max-size 128 --batch 2 --warmup 1 --learning-rate 0.01 --device cpu "
    "--recipe anchors_per_image=16"
)


class Trained(NamedTuple):
    """Scenes on disk, and a model."""

    annotations: Path
    images: Path
    checkpoint: Path
    onnx: Path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from fpn_export.scenes import write_coco

    return write_coco(tmp_path_factory.mktemp("scenes"), seed=3, count=3, size=(96, 128))


def train(run: Run, data: Path, output: Path, *more: str) -> Ran:
    given = ["train", "--annotations", str(data), "--images", str(data.parent / "images"), "-o", str(output)]
    return run(*given, *TINY.split(), *more)


@pytest.fixture(scope="module")
def made(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A model of fresh weights as files, for those who do not ask how it came to be."""
    folder = tmp_path_factory.mktemp("masks")
    checkpoint, onnx = folder / "masks.pth", folder / "masks.onnx"
    model = tiny_model(masks_per_img=40)
    torch.save(model.state_dict(), checkpoint)
    checkpoint.with_suffix(".json").write_text(json.dumps({"spec": model.spec.to_dict(), "about": {}}))
    onnx.write_bytes(export_mask_onnx(model).SerializeToString())
    return Trained(data, data.parent / "images", checkpoint, onnx)


@pytest.fixture
def trained(made: Trained, workplace: Path) -> Trained:
    """The same in the current folder."""
    for file in (made.checkpoint, made.checkpoint.with_suffix(".json"), made.onnx):
        shutil.copy(file, workplace)
    return made._replace(checkpoint=workplace / "masks.pth", onnx=workplace / "masks.onnx")


def test_training_ends_with_a_checkpoint_that_exports(data: Path, run: Run, workplace: Path) -> None:
    output = workplace / "run"
    done = train(run, data, output, "--steps", "2", "--val-annotations", str(data))
    assert (done.code, done.out) == (0, ""), done.err
    assert "step 2: AR1000 " in done.err
    assert f"next: fpn-engine export {output / 'best.pth'}" in done.err
    exported = run("export", str(output / "best.pth"), "-o", "masks.onnx")
    assert exported.code == 0, exported.err
    assert "masks of 14 x 14 by 5x5 and 7x7 windows" in exported.err
    spec = json.loads(run("info", "masks.onnx", "--json").out)["spec"]
    assert (spec["fpn_channels"], spec["masks_per_img"], len(spec["heads"])) == (16, 40, 2)
    again = train(run, data, workplace / "again", "--steps", "1", "--init", str(output / "best.pth"))
    assert again.code == 0, again.err


def test_two_processes_train_though_levels_are_missed(data: Path, tmp_path: Path) -> None:
    """Of eight places an image some level gets none, and its weights no gradient."""
    given = ["train", "--annotations", str(data), "--images", str(data.parent / "images"), "-o", str(tmp_path / "run")]
    done = run_in_two([*given, *TINY.split(), "--steps", "6", "--recipe", "anchors_per_image=8"])
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("trained 6 steps") == 1


def test_the_whole_line(trained: Trained, run: Run, workplace: Path) -> None:
    built = run("build", trained.onnx, "--backend", "native")
    assert built.code == 0, built.err
    plan = workplace / "masks.plan"

    found = run("infer", trained.images, "--plan", plan, "--json", "--save", "painted", "--score", "0")
    assert found.code == 0, found.err
    results = json.loads(found.out)
    assert [len(one["detections"]) for one in results] == [40] * 3
    first = results[0]["detections"][0]
    assert (first["category_id"], first["name"]) == (1, "object")
    (mask,) = decode_masks([first["mask"]], (96, 128))
    rows, columns = np.nonzero(mask)
    expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] if mask.any() else [0, 0, 0, 0]
    assert first["box"] == expected
    picture = np.asarray(Image.open(workplace / "painted" / "000000.png"))
    assert picture.shape == (96, 128, 3)
    assert (picture != np.asarray(Image.open(trained.images / "000000.png"))).any()

    few = run("infer", trained.images / "000001.png", "--plan", plan, "--format", "coco", "--max-detections", 7)
    coco = json.loads(few.out)
    assert len(coco) == 7
    assert coco[0]["segmentation"] == results[1]["detections"][0]["mask"]

    scored = run("eval", "--annotations", trained.annotations, "--images", trained.images, "--plan", plan, "--json")
    assert scored.code == 0, scored.err
    assert set(json.loads(scored.out)) >= {"AR10", "AR100", "AR1000", "AR1000s", "AR1000m", "AR1000l"}
    assert 0 <= json.loads(scored.out)["AR1000"] <= 1
    table = run("eval", "--annotations", trained.annotations, "--images", trained.images, "--plan", plan)
    assert "AR1k" in table.out

    for file, kind in ((trained.checkpoint, "checkpoint"), (trained.onnx, "ONNX model"), (plan, "plan")):
        told = run("info", file)
        assert told.code == 0, told.err
        assert kind in told.out
        assert "masks of 14 x 14 by 5x5 and 7x7 windows" in " ".join(told.out.split())
        assert json.loads(run("info", file, "--json").out)["spec"]["model"] == "fpn_masks"


def test_backends_give_the_same_masks(trained: Trained, run: Run, workplace: Path) -> None:
    picture = trained.images / "000002.png"
    found = {}
    for backend in ("onnxruntime", "native"):
        assert run("build", trained.onnx, "--backend", backend, "-o", f"{backend}.plan").code == 0
        assert read_plan(workplace / f"{backend}.plan").manifest.backend == backend
        (found[backend],) = Engine.load(workplace / f"{backend}.plan")(picture)
    ours, theirs = found.values()
    np.testing.assert_allclose(ours.scores, theirs.scores, atol=1e-4)
    assert ours.masks is not None
    assert theirs.masks is not None
    for a, b in zip(ours.masks, theirs.masks, strict=True):
        assert np.count_nonzero(a & b) >= 0.99 * np.count_nonzero(a | b)


def test_a_named_model_of_masks(trained: Trained, run: Run, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``--model scene-masks`` on a stand-in for the file that comes along, bundled as that is."""
    from benchmarks.bundle import bundle

    folder = workplace / "models"
    folder.mkdir()
    bundle(trained.checkpoint, folder / "scene-masks.safetensors")
    monkeypatch.setattr(bundled_module, "CHECKPOINT", folder / "demo.safetensors")
    found = run("infer", trained.images / "000000.png", "--model", "scene-masks", "--json", "--max-detections", 3)
    assert found.code == 0, found.err
    assert len(json.loads(found.out)[0]["detections"]) == 3


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("infer {picture} --plan {plan} --nms 0.5", "no NMS"),
        ("infer {picture} --plan {plan} --proposals none.json", "finds its own proposals"),
        ("eval --annotations {data} --images {images} --plan {plan} --recall", "of an RPN"),
        ("quantize {onnx} --images {images}", "is a mask-proposal model"),
        ("verify {onnx} {plan} --images {images}", "mask-proposal model"),
        ("build {onnx} --backend onnxruntime --device cuda", "--backend native or tensorrt"),
    ],
)
def test_what_masks_have_not_is_told(command: str, sentence: str, trained: Trained, run: Run, workplace: Path) -> None:
    assert run("build", trained.onnx, "--backend", "onnxruntime").code == 0
    places = {
        "picture": trained.images / "000000.png",
        "images": trained.images,
        "data": trained.annotations,
        "onnx": trained.onnx,
        "plan": workplace / "masks.plan",
    }
    ran = run(*command.format(**places).split())
    assert ran.code in (1, 2)
    assert sentence in " ".join(ran.err.replace("│", " ").split())
    assert "Traceback" not in ran.err


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--model", "rpn"], "is of detectors"),
        (["--system", "c4"], "unknown variant 'c4'"),
        (["--set", "pooling=1"], "unknown key 'pooling'"),
    ],
)
def test_training_refuses_what_is_of_detectors(
    more: list[str], sentence: str, data: Path, run: Run, workplace: Path
) -> None:
    done = train(run, data, workplace / "run", *more)
    assert done.code in (1, 2)
    assert sentence in " ".join(done.err.replace("│", " ").split())
