"""``verify`` on the command line, and the line that a build of lower precision prints."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image

from tests.engine.conftest import Run, Tiny, save_picture
from tests.engine.dataset import annotate


@pytest.fixture
def images(workplace: Path) -> Path:
    for number, shape in enumerate([(60, 80), (90, 50)]):
        save_picture(workplace / "images" / f"{number}.png", *shape, seed=number)
    return workplace / "images"


@pytest.fixture
def faulty(tiny: Tiny, workplace: Path) -> Path:
    """The ONNX file with another weight in the lateral of P4."""
    model = onnx.load(str(tiny.model))
    (tensor,) = (t for t in model.graph.initializer if t.name == "backbone.fpn.inner_blocks.2.0.weight")
    weight = numpy_helper.to_array(tensor).copy()
    weight.flat[0] += 1
    tensor.CopyFrom(numpy_helper.from_array(weight, tensor.name))
    onnx.save(model, "faulty.onnx")
    return workplace / "faulty.onnx"


def test_they_agree(tiny: Tiny, images: Path, run: Run) -> None:
    ran = run("verify", tiny.checkpoint, tiny.plan, "--images", images)
    assert ran.code == 0
    assert ran.err == ""
    lines = [line.rstrip() for line in ran.out.splitlines()]
    assert "A           tiny.pth: PyTorch fp32 on the CPU" in lines
    assert "B           tiny.plan: onnxruntime fp32 on the CPU" in lines
    assert lines[-1].startswith("agree: given the same input every stage agrees, the trunk to ")
    assert "have a twin" in lines[-1]


def test_they_disagree(tiny: Tiny, images: Path, faulty: Path, run: Run) -> None:
    ran = run("verify", tiny.model, faulty, "--images", images, "--json")
    assert ran.code == 5
    found = json.loads(ran.out)
    assert found["agree"] is False
    assert found["first stage that departs"]["stage"] == "pyramid"
    assert found["first stage that departs"]["level"] == "p4"
    assert "the first stage that departs is the pyramid, image " in found["verdict"]


def test_the_page(tiny: Tiny, images: Path, faulty: Path, run: Run) -> None:
    ran = run("verify", tiny.model, faulty, "--images", images, "--save", "out", "--limit", 1)
    assert ran.code == 5
    assert ran.err.splitlines() == ["wrote out/verify.html", "wrote out/worst.png", "wrote out/verify.json"]
    page = Path("out/verify.html").read_text()
    assert "<h1>They disagree</h1>" in page
    assert 'class="missed"><td>pyramid</td>' in page
    with Image.open("out/worst.png") as picture:
        assert picture.size == (2 * 80 + 8, 60 + 28)
    assert json.loads(Path("out/verify.json").read_text())["images"] == 1


def test_average_precision(tiny: Tiny, images: Path, workplace: Path, run: Run) -> None:
    truth = {
        f"{number}.png": (np.array(Image.open(images / f"{number}.png")), [(1, [5.0, 5.0, 40.0, 40.0])])
        for number in (0, 1)
    }
    annotate(workplace / "truth.json", truth)
    ran = run("verify", tiny.checkpoint, tiny.plan, "--images", images, "--annotations", "truth.json", "--json")
    assert ran.code == 0
    found = json.loads(ran.out)["AP"]
    assert found["a"]["AP"] == found["b"]["AP"]
    assert found["difference"] == 0
    assert run("verify", tiny.model, tiny.plan, "--images", workplace, "--annotations", "truth.json").code == 1


def test_differences_are_named_first(tiny: Tiny, images: Path, run: Run) -> None:
    ran = run("verify", tiny.checkpoint, tiny.model, "--images", images, "--score", 0.9, "--min-size", 32)
    assert ran.code == 5
    first = "the specifications differ, A against B: min_size 32 against 64, box_score_thresh 0.9 against 0.05"
    assert ran.err.splitlines()[0] == first
    assert "the first stage that departs is the preprocessed image" in ran.out


def test_a_broken_image(tiny: Tiny, images: Path, run: Run) -> None:
    (images / "bad.png").write_bytes(b"no picture")
    ran = run("verify", tiny.model, tiny.plan, "--images", images)
    assert ran.code == 3
    assert "bad.png" in ran.err
    assert len(ran.err.splitlines()) == 1
    assert "2, 1 left out that cannot be read" in ran.out
    for name in ("0.png", "1.png"):
        (images / name).write_bytes(b"nor this")
    ran = run("verify", tiny.model, tiny.plan, "--images", images)
    assert (ran.code, ran.out) == (4, "")


def test_one_sentence_for_what_is_wrong(tiny: Tiny, images: Path, workplace: Path, run: Run) -> None:
    (workplace / "empty").mkdir()
    (workplace / "x.onnx").write_bytes(b"nothing")
    (workplace / "x.txt").write_text("nothing")
    for arguments, message in (
        ((tiny.model, tiny.plan, "--images", "empty"), "holds no image"),
        ((tiny.model, tiny.plan, "--images", "nowhere"), "there is no folder nowhere"),
        ((tiny.model, "nowhere.plan", "--images", images), "nowhere.plan"),
        ((tiny.model, "x.onnx", "--images", images), "x.onnx"),
        ((tiny.model, "x.txt", "--images", images), "is no checkpoint"),
        ((tiny.model, "empty", "--images", images), "is not a file"),
    ):
        ran = run("verify", *arguments)
        assert (ran.code, ran.out) == (1, ""), message
        assert message in ran.err
        assert len(ran.err.strip().splitlines()) == 1
    assert run("verify", tiny.model, tiny.plan).code == 2


def test_a_build_of_lower_precision_says_how_close_it_is(tiny: Tiny, images: Path, workplace: Path, run: Run) -> None:
    (workplace / "model.onnx").symlink_to(tiny.model)
    line = run("build", "model.onnx", "--precision", "fp16").err.splitlines()[1]
    assert line.startswith("fp16 against fp32 on a drawn scene at half size: trunk within ")
    assert "box head within " in line
    assert "DEPARTS" not in line
    line = run("build", "model.onnx", "--precision", "fp16", "--force", "--images", images).err.splitlines()[1]
    assert line.startswith(f"fp16 against fp32 on 2 images of {images}: trunk within ")
    assert "against fp32" not in run("build", "model.onnx", "--precision", "fp16").err, "up to date"
    assert "against fp32" not in run("build", "model.onnx", "--backend", "onnxruntime").err


def test_a_plan_that_does_not_run_here_is_not_compared(tiny: Tiny, workplace: Path, run: Run) -> None:
    (workplace / "model.onnx").symlink_to(tiny.model)
    lines = run("build", "model.onnx", "--backend", "onnxruntime", "--device", "cuda", "-o", "c.plan").err.splitlines()
    assert lines[0].startswith("c.plan: onnxruntime fp16 on the CUDA, ")
    if lines[1].startswith("fp16 was not compared, since "):
        assert lines[1].endswith("; where it runs: fpn-engine verify model.onnx c.plan --images DIR")
    else:
        assert lines[1].startswith("fp16 against fp32 on a drawn scene")


def test_providers_on_the_command_line(tiny: Tiny, workplace: Path, run: Run) -> None:
    (workplace / "model.onnx").symlink_to(tiny.model)
    cuda = ("build", "model.onnx", "--backend", "onnxruntime", "--device", "cuda")
    assert run("build", "model.onnx", "--provider", "cuda").code == 2
    assert run(*cuda, "--tune-for", "1x64x96").code == 2
    assert run(*cuda, "--optimization-level", 2).code == 2
    assert run(*cuda, "--tactics", "full").code == 2
    ran = run(*cuda, "--precision", "bf16")
    assert (ran.code, len(ran.err.strip().splitlines())) == (1, 1)
    assert "the onnxruntime backend does not run bf16 on CUDA; take --precision fp16 or fp32" in ran.err
    assert run(*cuda, "--provider", "tensorrt", "--tune-for", "2x64x96", "--precision", "fp32").code == 0
    assert "provider tensorrt" in run("info", "model.plan").out
    save_picture(workplace / "a.png")
    ran = run("infer", "a.png", "--plan", "model.plan")
    assert "PyTorch finds no CUDA device here" in ran.err or ran.code == 0


def test_options_of_a_checkpoint_go_with_one(tiny: Tiny, images: Path, run: Run) -> None:
    for options in (("--classes", "a,b,c"), ("--min-size", 100)):
        done = run("verify", tiny.model, tiny.plan, "--images", images, *options)
        assert done.code == 2
        assert "is of a checkpoint, which neither is" in " ".join(done.err.replace("│", "").split())
