"""ONNX files from anywhere: ours are read, everything else gets one sentence."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

import fpn_export.onnx_file as onnx_file
from fpn_engine.errors import ModelError
from fpn_engine.spec import Category, ModelSpec
from fpn_export.onnx_file import read_onnx
from fpn_export.onnx_network import IR_VERSION, OPSET, SPEC_KEY

SPEC = ModelSpec(categories=(Category(id=3, name="cell"),), arch="resnet18")


def make_model(spec: str | None = None) -> ModelProto:
    """y = x + offset, with our metadata."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in ("x", "y"))
    offset = numpy_helper.from_array(np.arange(4, dtype=np.float32), "offset")
    node = helper.make_node("Add", ["x", "offset"], ["y"])
    graph = helper.make_graph([node], "tiny", [x], [y], [offset])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    helper.set_model_props(model, {SPEC_KEY: SPEC.to_json() if spec is None else spec})
    return model


def refuse(path: Path, *words: str) -> None:
    """``path`` gets one sentence that names it and says what to do."""
    with pytest.raises(ModelError) as caught:
        read_onnx(path)
    sentence = str(caught.value)
    assert str(path) in sentence
    assert "\n" not in sentence
    assert any(remedy in sentence for remedy in ("export it again", "fpn-engine export")), sentence
    for word in words:
        assert word in sentence


def save(path: Path, model: ModelProto) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


def test_ours_is_read(tmp_path: Path) -> None:
    path = save(tmp_path / "model.onnx", make_model())
    model, spec = read_onnx(path)
    assert spec == SPEC
    assert model == make_model()


def test_what_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    refuse(path, "there is no file", "fpn-engine export checkpoint.pth")
    refuse(tmp_path, "is not a file")
    os.mkfifo(tmp_path / "pipe")
    refuse(tmp_path / "pipe", "is not a file")
    path.write_bytes(b"")
    refuse(path, "is empty")
    refuse(path / "below")
    for data in (b"hello, this is a text\n", b'{"json": true}', bytes(range(256)) * 40, b"\xff" * 100):
        path.write_bytes(data)
        refuse(path)


def test_truncated(tmp_path: Path) -> None:
    path, data = tmp_path / "model.onnx", make_model().SerializeToString()
    for length in [*range(0, len(data), 7), len(data) - 1]:
        path.write_bytes(data[:length])
        refuse(path)


def test_flipped_bits_are_read_or_refused(tmp_path: Path) -> None:
    path, data = tmp_path / "model.onnx", make_model().SerializeToString()
    generator = np.random.default_rng(0)
    for position in generator.integers(len(data), size=500):
        changed = bytearray(data)
        changed[position] ^= 1 << generator.integers(8)
        path.write_bytes(changed)
        try:
            read_onnx(path)
        except ModelError as error:
            assert str(path) in str(error)  # noqa: PT017


def test_too_large_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    with path.open("wb") as stream:
        stream.truncate(1 << 42)  # a hole: takes no space
    refuse(path, "too large")


def test_foreign_model(tmp_path: Path) -> None:
    model = make_model()
    del model.metadata_props[:]
    refuse(save(tmp_path / "yolo.onnx", model), "is not an fpn-engine model", "fpn-engine export checkpoint.pth")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "JSON object"),
        ('{"categories": [[1, "a"]], "speed": 9}', "unknown key 'speed'"),
        ('{"categories": [[1, "a"]], "min_size": Infinity}', "wrong form"),
        ('{"categories": [[]]}', "wrong form"),
        ('{"categories": [[1, "a"]], "levels": [2, 1000000000000]}', "consecutive"),
        ('{"categories": [[1, "a"]], "arch": "vgg16"}', "arch must be one of"),
    ],
)
def test_spec_that_does_not_hold(tmp_path: Path, spec: str, words: str) -> None:
    refuse(save(tmp_path / "model.onnx", make_model(spec)), words)


def add_node(model: ModelProto, op_type: str, domain: str = "") -> None:
    model.graph.node.append(helper.make_node(op_type, ["x"], [f"out_{op_type}"], domain=domain))


def add_subgraph(model: ModelProto) -> None:
    body = helper.make_graph([], "body", [], [])
    model.graph.node.append(helper.make_node("SequenceMap", ["x"], ["z"], body=body))


def add_function(model: ModelProto) -> None:
    ops = [helper.make_opsetid("", OPSET)]
    function = helper.make_function("local", "F", ["a"], ["b"], [helper.make_node("Relu", ["a"], ["b"])], ops)
    model.functions.append(function)


def add_sparse_initializer(model: ModelProto) -> None:
    values = numpy_helper.from_array(np.ones(1, np.float32), "sparse")
    indices = numpy_helper.from_array(np.zeros(1, np.int64), "indices")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [1 << 42]))


def add_many_nodes(model: ModelProto) -> None:
    model.graph.node.extend([helper.make_node("Relu", ["x"], [""])] * (onnx_file.MAX_NODES + 1))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda model: add_node(model, "Loop"), "has the operator Loop"),
        (lambda model: add_node(model, "If"), "has the operator If"),
        (lambda model: add_node(model, "Scan", "ai.onnx"), "has the operator ai.onnx.Scan"),
        (lambda model: add_node(model, "Attack", "com.microsoft"), "has the operator com.microsoft.Attack"),
        (add_subgraph, "has a graph inside its operator SequenceMap"),
        (add_function, "defines functions of its own"),
        (add_sparse_initializer, "has sparse tensors"),
        (add_many_nodes, "nodes, more than any detector has"),
    ],
)
def test_operators_that_no_detector_has(tmp_path: Path, change: Callable[[ModelProto], None], words: str) -> None:
    model = make_model()
    change(model)
    refuse(save(tmp_path / "model.onnx", model), words)


def as_constant(model: ModelProto) -> TensorProto:
    """Move the initializer into a Constant node, where it is easily overlooked."""
    node = helper.make_node("Constant", [], ["offset"], value=model.graph.initializer[0])
    del model.graph.initializer[:]
    model.graph.node.insert(0, node)
    return model.graph.node[0].attribute[0].t


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("location", ["weights.bin", "../weights.bin", "/etc/hostname", "link.bin", ""])
def test_external_data(tmp_path: Path, location: str, constant: bool) -> None:
    (tmp_path / "weights.bin").write_bytes(bytes(16))
    (tmp_path / "link.bin").symlink_to("weights.bin")
    model = make_model()
    tensor = as_constant(model) if constant else model.graph.initializer[0]
    onnx.external_data_helper.set_external_data(tensor, location)
    tensor.ClearField("raw_data")
    refuse(save(tmp_path / "model.onnx", model), "keeps the data of offset in another file")


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("dims", [[1 << 40], [1 << 62, 1 << 62], [-1], [4, -4]])
def test_declared_sizes(tmp_path: Path, dims: list[int], constant: bool) -> None:
    """A tensor that declares 4 TB and brings 16 bytes."""
    model = make_model()
    tensor = as_constant(model) if constant else model.graph.initializer[0]
    tensor.dims[:] = dims
    refuse(save(tmp_path / "model.onnx", model), "offset declares more numbers than it holds")


def test_scalar_constant_is_fine(tmp_path: Path) -> None:
    model = make_model()
    as_constant(model).CopyFrom(numpy_helper.from_array(np.float32(2), "offset"))
    read_onnx(save(tmp_path / "model.onnx", model))


def test_checker_violation(tmp_path: Path) -> None:
    model = make_model()
    model.graph.node[0].input[1] = "nowhere"
    refuse(save(tmp_path / "model.onnx", model), "does not pass the ONNX checker", "nowhere")
