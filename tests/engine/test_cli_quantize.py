"""``fpn-engine quantize``, and what the other commands make of the file that it writes."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest

from fpn_engine.backends.native.cpu_quantized import has_int8_products
from tests.engine.conftest import Run, Tiny, save_picture

QUICK = ("--sensitivity", 1, "--score", 1)


@pytest.fixture
def photographs(workplace: Path) -> Path:
    for seed in range(3):
        save_picture(workplace / "photographs" / f"{seed}.png", seed=seed)
    return workplace / "photographs"


def test_from_float_to_detections(run: Run, tiny: Tiny, photographs: Path, workplace: Path) -> None:
    target = workplace / "small.int8.onnx"
    done = run("quantize", tiny.model, "--images", photographs, "-o", target, *QUICK)
    assert done.code == 0, done.err
    assert done.out == ""
    assert "31 of 31 layers in int8, agreement 100.00 -> " in done.err
    assert "next: fpn-engine build" in done.err
    assert target.stat().st_size < 0.3 * tiny.model.stat().st_size
    report = json.loads((workplace / "small.int8.json").read_text())
    assert len(report["layers"]) == 31
    assert (workplace / "small.int8.svg").read_text().startswith("<svg")
    assert "small.int8.svg" in (workplace / "small.int8.md").read_text()

    for backend in ("onnxruntime", "native") if has_int8_products() else ("onnxruntime",):
        built = run("build", target, "--backend", backend)
        assert f"{backend} int8 on the CPU" in built.err
        assert "int8 against that of the file on a drawn scene at half size" in built.err
        assert "; as quantised: 31 of 31 layers in int8, agreement 100.00 -> " in built.err
        facts = json.loads(run("info", "small.int8.plan", "--json").out)
        assert (facts["backend"], facts["precision"]) == (backend, "int8")
        assert (workplace / "small.int8.plan").stat().st_size < 0.3 * tiny.model.stat().st_size
        found = json.loads(run("infer", photographs / "0.png", "--plan", "small.int8.plan", "--json").out)
        assert found[0]["detections"]
        verified = run("verify", target, "small.int8.plan", "--images", photographs)
        assert "given the same input every stage agrees" in verified.out  # random weights find the same nowhere


@pytest.mark.parametrize(
    "options",
    [
        ("--backend", "native", "--target", "sm_90"),
        ("--backend", "native", "--target", "sm_90", "--precision", "int8"),
        ("--backend", "onnxruntime", "--device", "cuda"),
        ("--backend", "onnxruntime", "--device", "cuda", "--precision", "int8"),
    ],
)
def test_a_quantised_model_on_cuda(run: Run, tiny: Tiny, photographs: Path, options: tuple[str, ...]) -> None:
    run("quantize", tiny.model, "--images", photographs, "-o", "a.onnx", *QUICK, "--sensitivity", 0)
    done = run("build", "a.onnx", *options)
    assert done.code == 1
    assert "int8 runs on the CPU, or on an NVIDIA GPU with --backend tensorrt" in done.err


def test_annotations_choose_the_images_and_give_ap(run: Run, tiny: Tiny, photographs: Path, workplace: Path) -> None:
    truth = {
        "images": [{"id": n, "file_name": f"{n}.png", "height": 60, "width": 80} for n in (0, 1, 7)],
        "categories": [{"id": 1, "name": "cat"}, {"id": 3, "name": "dog"}, {"id": 7, "name": "bird"}],
        "annotations": [{"id": 1, "image_id": 0, "category_id": 3, "bbox": [32, 0, 11, 18]}],
    }
    (workplace / "truth.json").write_text(json.dumps(truth))
    options = ("--images", photographs, "--annotations", "truth.json", "--sensitivity", 0, "--tolerance", 100)
    done = run("quantize", tiny.model, *options, "-o", "a.onnx")
    assert done.code == 0, done.err
    assert "1 of 3 annotated images are not in" in done.err
    assert json.loads((workplace / "a.json").read_text())["metric"] == "AP"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--images", "nowhere"), "there is no folder nowhere"),
        (("--images", "empty"), "holds no image"),
        (("--images", "photographs", "--keep-float", "conv9"), "there is no layer 'conv9'"),
        (("--images", "photographs", "-o", "copy.onnx"), "would replace copy.onnx"),
        (("--images", "bad"), "none of the images can be read"),
        (("--images", "photographs", "--precision", "fp8", "--ranges", "entropy"), "take --ranges mse"),
        (("--images", "photographs", "--annotations", "none.json"), "cannot read the annotations"),
    ],
)
def test_one_sentence_and_nothing_written(
    run: Run, tiny: Tiny, photographs: Path, workplace: Path, options: tuple[str, ...], sentence: str
) -> None:
    (workplace / "empty").mkdir()
    (workplace / "bad").mkdir()
    (workplace / "bad" / "x.jpg").write_bytes(b"text")
    (workplace / "copy.onnx").write_bytes(tiny.model.read_bytes())
    done = run("quantize", "copy.onnx", *options, *QUICK)
    assert done.code == 1
    assert sentence in done.err.splitlines()[-1]
    assert "Traceback" not in done.err
    assert not list(workplace.glob("*.int8.*"))
    assert (workplace / "copy.onnx").read_bytes() == tiny.model.read_bytes()


def test_foreign_files_are_refused(run: Run, tiny: Tiny, photographs: Path, workplace: Path) -> None:
    model = onnx.load(str(tiny.model))
    del model.metadata_props[:]
    onnx.save(model, str(workplace / "foreign.onnx"))
    done = run("quantize", "foreign.onnx", "--images", photographs)
    assert done.code == 1
    assert "is not an fpn-engine model" in done.err


def test_a_float_model_is_sent_here(run: Run, tiny: Tiny) -> None:
    done = run("build", tiny.model, "-o", "x.plan", "--precision", "int8")
    assert done.code == 1
    assert "fpn-engine quantize model.onnx --images DIR" in done.err
