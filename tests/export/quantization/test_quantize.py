"""Quantising from end to end: on a small detector, on hostile input, and on the blood cells."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, numpy_helper
from PIL import Image

from fpn_engine.annotations import load_annotations
from fpn_engine.errors import ImageError, ModelError, OptionError
from fpn_engine.ground_truth import AnnotatedImage, CocoGroundTruth
from fpn_engine.sources import list_images
from fpn_export.checkpoint import load_checkpoint
from fpn_export.onnx_export import export_onnx
from fpn_export.quantization import calibration
from fpn_export.quantization.calibration import calibrate, make_engine
from fpn_export.quantization.chart import draw
from fpn_export.quantization.layers import Network
from fpn_export.quantization.pairs import insert_pairs
from fpn_export.quantization.quantize import (
    METADATA_KEY,
    quantize_model,
    read_measured,
    split_images,
)
from fpn_export.quantization.ranges import RANGES
from fpn_export.quantization.report import LayerRow, Report
from fpn_export.quantization.scoring import score_agreement, score_ap
from fpn_export.quantization.sensitivity import Sensitivity
from tests.export.quantization.conftest import QUICK, SPEC

AP_POINTS = 0.3  # of fp32, the bound that int8 has to keep


def test_a_model_is_quantised(quantized: tuple[ModelProto, Report], model: ModelProto, layers: list[str]) -> None:
    made, report = quantized
    onnx.checker.check_model(made, full_check=True)
    assert [row.name for row in report.layers] == layers
    assert all(row.quantized and row.alone is not None and row.alone > 0 for row in report.layers)
    assert all(0 < row.weight_error < 0.02 for row in report.layers)
    assert (report.calibrated_on, report.scored_on, report.held_out) == (3, 2, True)
    assert report.metric == "agreement"
    assert report.score_float == pytest.approx(1.0)
    assert 0.3 < report.score < 1.0
    facts = json.loads(next(prop.value for prop in made.metadata_props if prop.key == METADATA_KEY))
    assert facts["calibrated_on"] == 3
    assert not any(node.op_type == "QuantizeLinear" for node in model.graph.node)  # the given one is as it was


def test_the_report_reads(quantized: tuple[ModelProto, Report]) -> None:
    _, report = quantized
    page = report.to_markdown("small.int8.onnx", "small.int8.svg")
    assert "| `backbone.body.conv1` |" in page
    assert "agreement 100.00 -> " in page
    assert json.loads(report.to_json())["layers"][0]["name"] == "backbone.body.conv1"
    picture = draw(report)
    assert picture.count("<rect") == 1 + len(report.layers)
    assert "nan" not in picture


def test_layers_kept_by_hand(model: ModelProto, photographs: Path) -> None:
    options = dataclasses.replace(QUICK, sensitivity=0, keep_float=("backbone.body.*", "roi_heads.box_head.fc6"))
    made, report = quantize_model(model, SPEC, list(list_images([photographs])), options)
    kept = {row.name for row in report.float_layers}
    assert {row.why_float for row in report.float_layers} == {"asked for"}
    assert len(kept) == 20 + 1
    stored = {tensor.name for tensor in made.graph.initializer}
    assert "backbone.body.conv1.weight" in stored
    assert "roi_heads.box_head.fc7.weight.quantized" in stored
    assert "Without sensitivity" in report.to_markdown("x", "y")


def test_the_worst_layers_stay_float_until_the_score_holds(model: ModelProto, photographs: Path) -> None:
    """Layers are taken back from the worst on, and no more than are needed."""
    paths = list(list_images([photographs]))
    _, loose = quantize_model(model, SPEC, paths, QUICK)
    lost = 100 * (loose.score_float - loose.score_all)
    assert lost > 0.5, "there is nothing to win back"
    options = dataclasses.replace(QUICK, tolerance=lost / 2)
    _, report = quantize_model(model, SPEC, paths, options)
    assert 100 * (report.score_float - report.score) <= lost / 2
    kept = [row for row in report.float_layers if row.why_float == "costs too much"]
    assert 0 < len(kept) < len(report.layers)
    worst = sorted(report.layers, key=lambda row: -(row.alone or 0.0))[: len(kept)]
    assert {row.name for row in kept} == {row.name for row in worst}


@pytest.mark.parametrize("annotated", [True, False])
def test_where_there_is_nothing_to_find_no_score_is_made_up(
    model: ModelProto, photographs: Path, monkeypatch: pytest.MonkeyPatch, annotated: bool
) -> None:
    """Neither is every layer tried, nor a NaN written, which is not JSON."""
    monkeypatch.setattr("fpn_export.quantization.scoring.CERTAIN", 1.1)
    paths = list(list_images([photographs]))
    images = tuple(AnnotatedImage(id=n, file_name=path.name, height=60, width=80) for n, path in enumerate(paths))
    truth = CocoGroundTruth(images=images, categories=SPEC.categories, annotations=())
    notes: list[str] = []
    options = dataclasses.replace(QUICK, tolerance=0.3)
    _, report = quantize_model(model, SPEC, paths, options, truth=truth if annotated else None, on_note=notes.append)
    assert not report.float_layers
    assert json.loads(report.to_json(), parse_constant=pytest.fail)["score_float"] is None
    assert "not measured: nothing to find on 2 images" in report.summary()
    said = "nothing is annotated on the 2 images" if annotated else "scores nothing 0.5 or more on the 2 images"
    assert len(notes) == 1
    assert said in notes[0]
    assert "nan" not in report.to_markdown("x", "y")


def test_sensitivity_finds_the_layer_that_suffers(model: ModelProto, photographs: Path) -> None:
    """A range far too narrow for one value costs most where that value is read."""
    every = Network(model).layers
    paths = list(list_images([photographs]))[:2]
    seen = calibrate(model, SPEC, every, paths)
    ranges = {name: RANGES["max"](histogram, "int8") for name, histogram in seen.histograms.items()}
    sensitivity = Sensitivity(model, SPEC, paths[:1], lambda line: None)
    few = [layer for layer in every if layer.name.startswith(("backbone.body.layer2.0.conv", "roi_heads"))]
    alone = sensitivity.measure_alone(few, ranges, "int8", lambda: None)
    victim = "backbone.body.layer2.0.conv2"
    assert max(alone.values()) < 0.2
    narrow = ranges | {next(layer for layer in few if layer.name == victim).inputs[0]: 1e-3}
    broken = sensitivity.measure_alone(few, narrow, "int8", lambda: None)
    assert broken[victim] > 5 * alone[victim]
    gathered = sensitivity.measure_gathered({layer.name for layer in every}, ranges, "int8")
    assert gathered["backbone.fpn.layer_blocks.0.0"] > gathered["backbone.body.conv1"] > 0


def test_the_head_may_be_given_its_rois_in_portions(
    model: ModelProto, photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every, paths = Network(model).layers, list(list_images([photographs]))[:2]
    whole = calibrate(model, SPEC, every, paths)
    monkeypatch.setattr(calibration, "MOST_NUMBERS", 7 * 16 * 49 + 1)  # seven RoIs
    portions = calibrate(model, SPEC, every, paths)
    for name, histogram in whole.histograms.items():
        assert portions.histograms[name].largest == pytest.approx(histogram.largest, rel=1e-5)


def test_calibration_sees_what_the_model_sees(model: ModelProto, photographs: Path) -> None:
    """The image is normalised: its range is that of (x / 255 - mean) / std."""
    seen = calibrate(model, SPEC, Network(model).layers, list(list_images([photographs])))
    largest = max((1 - mean) / std for mean, std in zip(SPEC.image_mean, SPEC.image_std, strict=True))
    assert 0.9 * largest < seen.histograms["image"].largest <= largest + 1e-4
    assert len(seen.images) == 6
    assert all(histogram.count for histogram in seen.histograms.values())


def test_the_file_says_what_it_cost(quantized: tuple[ModelProto, Report], model: ModelProto) -> None:
    assert read_measured(quantized[0]) == quantized[1].summary()
    assert read_measured(model) == ""
    for text in ("no JSON", "[]", '{"measured": 3}', '{"measured": "two\\nlines"}'):
        foreign = ModelProto()
        foreign.CopyFrom(model)
        foreign.metadata_props.add(key=METADATA_KEY, value=text)
        assert read_measured(foreign) == ""


def test_twice_is_refused(quantized: tuple[ModelProto, Report], photographs: Path) -> None:
    with pytest.raises(ModelError, match="quantised already"):
        quantize_model(quantized[0], SPEC, list(list_images([photographs])), QUICK)


def test_given_proposals_are_refused(model: ModelProto, photographs: Path) -> None:
    spec = dataclasses.replace(SPEC, model="fast_rcnn")
    with pytest.raises(ModelError, match="takes its proposals from another model"):
        quantize_model(model, spec, list(list_images([photographs])), QUICK)


def test_an_unknown_layer_is_refused_before_any_work(model: ModelProto, photographs: Path) -> None:
    options = dataclasses.replace(QUICK, keep_float=("backbone.body.conv7",))
    with pytest.raises(OptionError, match=r"no layer 'backbone\.body\.conv7'"):
        quantize_model(model, SPEC, [], options)


def test_no_layer_left_is_refused(model: ModelProto) -> None:
    with pytest.raises(OptionError, match="no layer is left"):
        quantize_model(model, SPEC, [], dataclasses.replace(QUICK, keep_float=("*",)))


def test_bad_images_are_left_out(model: ModelProto, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no picture")
    Image.fromarray(np.full((40, 40, 3), 90, np.uint8)).save(tmp_path / "good.png")
    notes: list[str] = []
    seen = calibrate(
        model, SPEC, Network(model).layers, [tmp_path / "bad.png", tmp_path / "good.png"], on_note=notes.append
    )
    assert seen.images == ["good.png"]
    (line,) = notes
    assert "bad.png" in line


def test_bad_images_alone_are_an_error(model: ModelProto, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(ImageError, match="none of the images can be read"):
        calibrate(model, SPEC, Network(model).layers, [tmp_path / "bad.png"])


def test_activations_that_are_not_finite_are_named(model: ModelProto, photographs: Path) -> None:
    broken = ModelProto.FromString(model.SerializeToString())
    tensor = next(t for t in broken.graph.initializer if t.name == "backbone.body.layer3.0.conv1.weight")
    array = numpy_helper.to_array(tensor) * np.float32(1e38)
    tensor.CopyFrom(numpy_helper.from_array(np.clip(array, -3e38, 3e38), tensor.name))
    with pytest.raises(ModelError, match=r"NaN or infinity in \S+"):
        calibrate(broken, SPEC, Network(broken).layers, list(list_images([photographs])))


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "int4"},
        {"ranges": "median"},
        {"calibrate": 0},
        {"tolerance": -1},
        {"precision": "fp8", "ranges": "entropy"},
    ],
)
def test_options_are_checked(changes: dict[str, object]) -> None:
    with pytest.raises(OptionError):
        dataclasses.replace(QUICK, **changes)  # type: ignore[arg-type]


def test_images_that_calibrate_are_not_scored() -> None:
    paths = [Path(f"{i}.png") for i in range(20)]
    calibrating, scoring = split_images(paths, 8, 100)
    assert len(calibrating) == 8
    assert len(scoring) == 12
    assert not set(calibrating) & set(scoring)
    assert calibrating[0] == paths[0]
    assert calibrating[-1] >= paths[15]  # spread over all of them
    few = split_images(paths[:4], 64, 100)
    assert [len(each) for each in few] == [3, 1]
    assert split_images(paths[:1], 64, 100) == ([paths[0]], [paths[0]])


def test_agreement_falls_with_what_is_lost(model: ModelProto, photographs: Path) -> None:
    engine = make_engine(model, SPEC)
    exact = {str(path): engine(path)[0] for path in list_images([photographs])}
    assert score_agreement(exact, exact) == pytest.approx(1.0)
    halved = {path: found.best(max(1, len(found) // 4)) for path, found in exact.items()}
    assert score_agreement(halved, exact) < 0.9


def test_the_chart_names_layers_that_fell_back() -> None:
    row = LayerRow(
        name="a<b",
        parameters=3,
        quantized=False,
        why_float="costs too much",
        weight_error=0.01,
        alone=0.5,
        gathered_all=0.6,
        gathered=0.2,
    )
    report = Report(
        precision="int8",
        ranges="mse",
        calibrated_on=1,
        scored_on=1,
        held_out=True,
        sensitivity_on=1,
        metric="AP",
        tolerance=0.3,
        score_float=0.5,
        score_all=0.4,
        score=0.499,
        layers=[row],
    )
    assert "a&lt;b (float)" in draw(report)
    assert "float: costs too much" in report.to_markdown("t", "c")
    assert report.summary() == "0 of 1 layers in int8, AP 50.00 -> 49.90 on 1 images"


def some(truth: CocoGroundTruth, number: int) -> CocoGroundTruth:
    images = truth.images[:number]
    ids = {image.id for image in images}
    return dataclasses.replace(
        truth, images=images, annotations=tuple(a for a in truth.annotations if a.image_id in ids)
    )


@pytest.mark.shared
def test_blood_cells_keep_their_ap(shared_dir: Path) -> None:
    """Few images to calibrate and to score on, for time's sake; all 72 are in benchmarks.quantization."""
    loaded = load_checkpoint(shared_dir / "checkpoints" / "bccd_r18_fpn.pth")
    model, data = export_onnx(loaded.model, loaded.spec), shared_dir / "data" / "bccd"
    train = load_annotations(data / "instances_train.json")
    every = Network(model).layers
    seen = calibrate(model, loaded.spec, every, [data / "images" / i.file_name for i in train.images[:8]])
    ranges = {name: RANGES["percentile"](histogram, "int8") for name, histogram in seen.histograms.items()}
    made = insert_pairs(model, {layer.name for layer in every}, ranges)
    assert made.ByteSize() < 0.27 * model.ByteSize()
    truth = some(load_annotations(data / "instances_test.json"), 16)
    paths = [data / "images" / image.file_name for image in truth.images]
    scores = []
    for each in (model, made):
        engine = make_engine(each, loaded.spec)
        scores.append(score_ap({str(path): engine(path)[0] for path in paths}, truth))
    assert scores[0] > 0.4
    # Sixteen images are fewer than the bound is for; on all 72 it is AP_POINTS, see docs/quantization.md.
    assert 100 * abs(scores[1] - scores[0]) < 3 * AP_POINTS
