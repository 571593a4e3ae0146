"""The end-to-end ONNX file: what it promises to whoever runs it with ONNX Runtime alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import ModelProto, numpy_helper
from torch import Tensor

from fpn_engine.pipeline import Pipeline
from fpn_engine.spec import ModelSpec
from fpn_engine.tasks import NON_FINITE, OK, PaddedDetections, Thresholds
from fpn_export.onnx_cut import cut_head, cut_trunk
from fpn_export.onnx_export import OVERRIDABLE, trunk_outputs
from fpn_export.onnx_network import SPEC_KEY, VERSION_KEY
from tests.parity.random_detector import make_picture
from tests.parity.subject import OUTPUTS, Arrays, Subject, open_session, preprocess_together, random_subject, run_onnx
from tests.parity.torchvision_oracle import Found, match

STABLE_NAMES = [
    *(f"c{stage}" for stage in range(2, 6)),
    *(f"p{level}" for level in range(2, 7)),
    *(f"{kind}_p{level}" for kind in ("objectness", "deltas") for level in range(2, 7)),
    *("roi_features", "class_logits", "box_deltas"),
]


@pytest.fixture(scope="module")
def subject() -> Subject:
    return random_subject("resnet18")


@pytest.fixture(scope="module")
def model(subject: Subject) -> ModelProto:
    return subject.onnx_model


def make_batch(n: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Pictures padded on the right and bottom, by another number of pixels each."""
    images = torch.zeros(n, 3, height, width)
    sizes = [(height - 2 * i, width - 3 * i) for i in range(n)]
    for i, (h, w) in enumerate(sizes):
        picture = torch.from_numpy(make_picture(h, w, seed=i)).permute(2, 0, 1)
        images[i, :, :h, :w] = (picture / 255 - 0.45) / 0.225
    return images, torch.tensor(sizes)


def run_module(
    subject: Subject, images: Tensor, sizes: Tensor, spec: ModelSpec | None = None, **thresholds: Any
) -> PaddedDetections:
    """What the PyTorch detector finds."""
    spec = spec or subject.spec
    with torch.inference_mode():
        pipeline = Pipeline(spec, subject.model.trunk, subject.model.head)
        return pipeline(images, sizes, Thresholds.of(spec).override(**thresholds))


def found_by(outputs: Arrays, row: int) -> Found:
    n = int(outputs["counts"][row])
    for name in ("boxes", "scores", "labels"):
        assert not outputs[name][row, n:].any(), "empty slots are zeros"
    return Found(outputs["boxes"][row, :n], outputs["scores"][row, :n], outputs["labels"][row, :n])


def assert_same(actual: Arrays, expected: PaddedDetections) -> None:
    """The same detections by descending score, where scores that differ by rounding alone may change places."""
    arrays = {name: value.numpy() for name, value in expected._asdict().items()}
    for name, value in arrays.items():
        assert (actual[name].shape, actual[name].dtype) == (value.shape, value.dtype), name
    np.testing.assert_array_equal(actual["counts"], arrays["counts"])
    np.testing.assert_array_equal(actual["status"], arrays["status"])
    np.testing.assert_allclose(actual["scores"], arrays["scores"], rtol=0, atol=1e-4)
    for row, count in enumerate(arrays["counts"]):
        ours, theirs = found_by(actual, row), found_by(arrays, row)
        assert len(match(ours, theirs, corner_tolerance=1e-2, score_tolerance=1e-4)[0]) == count
        assert (np.diff(ours.scores) <= 0).all()


def test_versions_and_metadata(model: ModelProto, subject: Subject) -> None:
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 20)]
    assert model.ir_version == 10
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert set(metadata) == {SPEC_KEY, VERSION_KEY}
    assert ModelSpec.from_json(metadata[SPEC_KEY]) == subject.spec


def test_the_checker_passes(model: ModelProto) -> None:
    onnx.checker.check_model(model, full_check=True)


def test_only_standard_operators_without_control_flow(model: ModelProto) -> None:
    assert {node.domain for node in model.graph.node} == {""}
    assert not {node.op_type for node in model.graph.node} & {"If", "Loop", "Scan"}
    assert not model.functions
    assert not any(attribute.HasField("g") for node in model.graph.node for attribute in node.attribute)


def test_batch_norm_is_folded(model: ModelProto) -> None:
    operators = [node.op_type for node in model.graph.node]
    assert "BatchNormalization" not in operators
    assert operators.count("RoiAlign") == 4


def test_stable_names(model: ModelProto, subject: Subject) -> None:
    produced = [name for node in model.graph.node for name in node.output]
    assert len(set(produced)) == len(produced)
    assert set(STABLE_NAMES) <= set(produced)
    assert [name for name in STABLE_NAMES if name in trunk_outputs(subject.spec)] == trunk_outputs(subject.spec)
    parameters = {tensor.name for tensor in model.graph.initializer}
    assert {"backbone.body.conv1.weight", "roi_heads.box_predictor.cls_score.weight"} <= parameters


def test_nothing_about_the_machine_that_wrote_it(model: ModelProto) -> None:
    without_weights = ModelProto.FromString(model.SerializeToString())
    for tensor in without_weights.graph.initializer:
        tensor.ClearField("raw_data")  # any few letters are among millions of random bytes
    data = without_weights.SerializeToString()
    for trace in (b"site-packages", b"stack_trace", b"Traceback", b".py", b"pkg.torch", b"torch.nn", b"/home/"):
        assert trace not in data, trace
    for folder in (Path.cwd(), Path.home(), Path(torch.__file__).parent, Path(__file__).parents[2]):
        assert len(folder.parts) < 2 or str(folder).encode() not in data, folder
    assert not any(node.doc_string or node.metadata_props for node in model.graph.node)
    assert not any(value.doc_string or value.metadata_props for value in model.graph.value_info)


def test_inputs_and_outputs(subject: Subject) -> None:
    session = subject.session
    assert {i.name: (i.type, i.shape) for i in session.get_inputs()} == {
        "image": ("tensor(float)", ["batch", 3, "height", "width"]),
        "image_sizes": ("tensor(int64)", ["batch", 2]),
    }
    assert {o.name: (o.type, o.shape) for o in session.get_outputs()} == {
        "boxes": ("tensor(float)", ["batch", "detections", 4]),
        "scores": ("tensor(float)", ["batch", "detections"]),
        "labels": ("tensor(int64)", ["batch", "detections"]),
        "counts": ("tensor(int64)", ["batch"]),
        "status": ("tensor(int64)", ["batch"]),
    }
    assert {i.name for i in session.get_overridable_initializers()} == set(OVERRIDABLE)


@pytest.mark.parametrize(
    ("n", "size"),
    [(1, (32, 32)), (4, (32, 32)), (2, (64, 160)), (3, (224, 96)), (4, (160, 160)), (1, (96, 288))],
)
def test_any_batch_of_any_size(subject: Subject, n: int, size: tuple[int, int]) -> None:
    images, sizes = make_batch(n, *size)
    actual = run_onnx(subject.session, images, sizes.tolist())
    expected = run_module(subject, images, sizes)
    assert expected.counts[0] > 0
    assert_same(actual, expected)


def test_more_detections_than_candidates_are_padded(subject: Subject) -> None:
    """On 32 x 32 pixels there are at most 258 anchors, and 5 classes each: D = 2000 cannot be filled."""
    images, sizes = make_batch(2, 32, 32)
    thresholds = {"box_detections_per_img": 2000, "box_score_thresh": 0.0, "box_nms_thresh": 1.0}
    actual = run_onnx(subject.session, images, sizes.tolist(), **thresholds)
    assert actual["boxes"].shape == (2, 2000, 4)
    expected = run_module(subject, images, sizes, **thresholds)
    assert 100 < expected.counts.max() < 258 * 5
    assert_same(actual, expected)


def test_nothing_above_the_threshold(subject: Subject) -> None:
    images, sizes = make_batch(2, 64, 96)
    actual = run_onnx(subject.session, images, sizes.tolist(), box_score_thresh=1.0)
    assert actual["boxes"].shape == (2, 100, 4)
    assert actual["counts"].tolist() == [0, 0]
    assert actual["status"].tolist() == [OK, OK]
    assert not any(actual[name].any() for name in OUTPUTS)


@pytest.mark.parametrize("n", [1, 3])
def test_no_proposals(subject: Subject, n: int) -> None:
    """Nothing passes the RPN's threshold, so that RoIAlign and the head get no RoI at all."""
    images, sizes = make_batch(n, 64, 96)
    actual = run_onnx(subject.session, images, sizes.tolist(), rpn_score_thresh=1.0)
    assert actual["boxes"].shape == (n, 100, 4)
    assert not any(actual[name].any() for name in OUTPUTS)


def test_proposals_in_one_image_only(subject: Subject) -> None:
    images, sizes = make_batch(3, 64, 96)
    with torch.inference_mode():
        proposals = subject.model.pipeline.propose(subject.model.trunk(images), (64, 96), sizes)
    second, first = proposals.scores[:, 0].sort().values[-2:].tolist()
    threshold = (first + second) / 2
    actual = run_onnx(subject.session, images, sizes.tolist(), rpn_score_thresh=threshold, box_score_thresh=0.0)
    assert sorted((actual["counts"] > 0).tolist()) == [False, False, True]
    spec = dataclasses.replace(subject.spec, rpn_score_thresh=threshold)
    assert_same(actual, run_module(subject, images, sizes, spec, box_score_thresh=0.0))


@pytest.mark.parametrize(
    "changes",
    [
        {"box_score_thresh": 0.5},
        {"box_score_thresh": 0.0, "box_detections_per_img": 1000},
        {"box_nms_thresh": 0.2},
        {"box_nms_thresh": 1.0},
        {"box_nms_thresh": 0.0},
        {"box_detections_per_img": 7},
        {"box_detections_per_img": 250},
        {"rpn_nms_thresh": 0.3},
        {"rpn_score_thresh": 0.95},
        {"box_score_thresh": 0.3, "box_nms_thresh": 0.3, "box_detections_per_img": 20},
    ],
    ids=str,
)
def test_thresholds_override(subject: Subject, changes: dict[str, Any]) -> None:
    """Each changes the result, exactly as it does in the pipeline."""
    images, sizes = make_batch(2, 96, 128)
    before = run_onnx(subject.session, images, sizes.tolist())
    actual = run_onnx(subject.session, images, sizes.tolist(), **changes)
    expected = run_module(subject, images, sizes, dataclasses.replace(subject.spec, **changes))
    assert_same(actual, expected)
    assert not np.array_equal(actual["boxes"], before["boxes"])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("bad", [0, 1, 2])
def test_an_image_that_is_not_finite(subject: Subject, value: float, bad: int) -> None:
    """Its status says so; the other images of the batch do not notice."""
    images, sizes = make_batch(3, 64, 96)
    expected = run_onnx(subject.session, images, sizes.tolist())
    images[bad, 1, 30, 40] = value
    actual = run_onnx(subject.session, images, sizes.tolist())
    assert actual["status"].tolist() == [NON_FINITE if i == bad else OK for i in range(3)]
    others = [i for i in range(3) if i != bad]
    for name in OUTPUTS:
        np.testing.assert_allclose(actual[name][others], expected[name][others], rtol=0, atol=1e-3, err_msg=name)
    module = run_module(subject, images, sizes)
    assert module.status.tolist() == actual["status"].tolist()


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(
    "weight",
    [
        "backbone.body.layer3.0.conv1.weight",
        "backbone.fpn.layer_blocks.0.0.weight",
        "rpn.head.cls_logits.bias",
        "rpn.head.bbox_pred.bias",
        "roi_heads.box_head.fc7.weight",
        "roi_heads.box_predictor.cls_score.bias",
        "roi_heads.box_predictor.bbox_pred.bias",
    ],
)
def test_a_weight_that_is_not_finite(model: ModelProto, weight: str, value: float) -> None:
    broken = ModelProto.FromString(model.SerializeToString())
    (tensor,) = (t for t in broken.graph.initializer if t.name == weight)
    array = numpy_helper.to_array(tensor).copy()
    array.reshape(-1)[0] = value
    tensor.CopyFrom(numpy_helper.from_array(array, weight))
    images, sizes = make_batch(2, 64, 96)
    assert run_onnx(open_session(broken), images, sizes.tolist())["status"].tolist() == [NON_FINITE, NON_FINITE]


def test_saved_and_loaded_it_stands_alone(model: ModelProto, subject: Subject, tmp_path: Path) -> None:
    path = tmp_path / "detector.onnx"
    onnx.save(model, path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["detector.onnx"]
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    batch, sizes = preprocess_together([make_picture(120, 160)], subject.spec)
    for name, value in run_onnx(session, batch, sizes.tolist()).items():
        assert value.shape[0] == 1, name


def cut_session(part: ModelProto) -> ort.InferenceSession:
    onnx.checker.check_model(part, full_check=True)
    return open_session(part)


def test_cut_trunk(model: ModelProto, subject: Subject) -> None:
    """The RoI levels, objectness and deltas, in NHWC."""
    images, _ = make_batch(2, 64, 96)
    names = [name for name in STABLE_NAMES if name.startswith(("p", "objectness", "deltas")) and name != "p6"]
    session = cut_session(cut_trunk(model, subject.spec))
    assert [output.name for output in session.get_outputs()] == [f"{name}_nhwc" for name in names]
    with torch.inference_mode():
        out = subject.model.trunk(images)
    expected = [*out.features[:4], *out.objectness, *out.deltas]
    for actual, ours in zip(session.run(None, {"image": images.numpy()}), expected, strict=True):
        np.testing.assert_allclose(actual, ours.permute(0, 2, 3, 1).numpy(), rtol=0, atol=1e-3)


def relu_in_front(head: ModelProto) -> None:
    """Features go through one more layer before they are flattened."""
    (user,) = (node for node in head.graph.node if "roi_features" in node.input)
    user.input[0] = "head/rectified"
    place = list(head.graph.node).index(user)
    head.graph.node.insert(place, onnx.helper.make_node("Relu", ["roi_features"], ["head/rectified"]))


def matmul_first(head: ModelProto) -> None:
    """The first layer as MatMul and Add, as other exporters write it."""
    (flatten,) = (node for node in head.graph.node if "roi_features" in node.input)
    (gemm,) = (node for node in head.graph.node if flatten.output[0] in node.input)
    features, weight, bias = gemm.input
    place = list(head.graph.node).index(gemm)
    nodes = [
        onnx.helper.make_node("Transpose", [weight], ["head/turned"], perm=[1, 0]),
        onnx.helper.make_node("MatMul", [features, "head/turned"], ["head/product"]),
        onnx.helper.make_node("Add", ["head/product", bias], list(gemm.output)),
    ]
    head.graph.node.remove(gemm)
    for node in reversed(nodes):
        head.graph.node.insert(place, node)


@pytest.mark.parametrize("rois", [0, 1, 13])
@pytest.mark.parametrize("change", [None, relu_in_front, matmul_first])
def test_cut_head(model: ModelProto, subject: Subject, change: Any, rois: int) -> None:
    """Rows in NHWC order; a head that does not begin with Flatten and Gemm gets a transpose in front."""
    changed = ModelProto.FromString(model.SerializeToString())
    if change:
        change(changed)
    head = cut_head(changed, subject.spec)
    transposes = [node for node in head.graph.node if node.input[0] == "roi_rows_nhwc"]
    assert len(transposes) == (0 if change is None else 1)
    features = torch.randn(rois, 64, 7, 7, generator=torch.Generator().manual_seed(3))
    rows = features.permute(0, 2, 3, 1).reshape(rois, 49 * 64)
    logits, deltas = cut_session(head).run(["class_logits", "box_deltas"], {"roi_rows": rows.numpy()})
    with torch.inference_mode():
        expected = subject.model.head(features.relu() if change is relu_in_front else features)
    np.testing.assert_allclose(logits, expected[0].numpy(), rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(deltas, expected[1].numpy(), rtol=1e-4, atol=1e-3)
