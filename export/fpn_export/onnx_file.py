"""Reading an ONNX detector from disk: nothing in the file is trusted before it is checked."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx import GraphProto, ModelProto, TensorProto

from fpn_engine.errors import ModelError, SpecError
from fpn_engine.masks.spec import AnySpec, MaskSpec, read_spec_json
from fpn_engine.spec import ModelSpec
from fpn_export.onnx_network import SPEC_KEY

# Control flow and custom operators have no place in a detector, and a crafted graph of them can crash a runtime.
REFUSED_OPERATORS = frozenset({"If", "Loop", "Scan"})
MAX_NODES = 100_000
MAX_BYTES = 1 << 31  # protobuf's own limit
MAX_PER_BYTE = 8  # elements: no type is smaller than a bit


def read_onnx(path: Path) -> tuple[ModelProto, ModelSpec]:
    """Load a detector that ``fpn-engine export`` wrote, with its spec.

    Raises: ModelError, one sentence with the file and the remedy, for a missing, damaged or foreign file.
    """
    model, spec = read_any_onnx(path)
    if isinstance(spec, MaskSpec):
        raise ModelError(f"{path} is a mask-proposal model; give one of a detector")
    return model, spec


def read_bytes(path: Path) -> bytes:
    """The file as it is. Raises ModelError if it is missing, unreadable, not a regular file or above 2 GiB."""
    try:
        if path.exists() and not path.is_file():
            raise ModelError(f"{path} is not a file; give one that fpn-engine export wrote")
        if path.stat().st_size >= MAX_BYTES:
            raise ModelError(f"{path} is too large for an ONNX file (2 GiB); give one that fpn-engine export wrote")
        return path.read_bytes()
    except FileNotFoundError:
        raise ModelError(f"there is no file {path}; write one with: fpn-engine export checkpoint.pth") from None
    except OSError as error:
        reason = error.strerror or error
        raise ModelError(f"cannot read {path}: {reason}; give a file that fpn-engine export wrote") from None


def read_any_onnx(path: Path) -> tuple[ModelProto, AnySpec]:
    """:func:`read_onnx` of a detector or a mask-proposal model."""
    return parse_onnx(path, read_bytes(path))


def parse_onnx(path: Path, data: bytes) -> tuple[ModelProto, AnySpec]:
    """:func:`read_any_onnx` on bytes that were read from ``path``."""
    if not data:
        raise ModelError(f"{path} is empty; write it again with: fpn-engine export checkpoint.pth")
    try:
        model = ModelProto.FromString(data)
    except DecodeError:
        raise ModelError(
            f"{path} is not an ONNX file or is damaged; write one with: fpn-engine export checkpoint.pth"
        ) from None
    spec = _read_spec(path, model)
    _refuse_unsafe(path, model)
    try:
        onnx.checker.check_model(model)
    except Exception as error:  # the checker raises its own and protobuf's exceptions
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"{path} does not pass the ONNX checker ({reason}); export it again") from None
    return model, spec


def _read_spec(path: Path, model: ModelProto) -> AnySpec:
    texts = [prop.value for prop in model.metadata_props if prop.key == SPEC_KEY]
    if not texts:
        raise ModelError(
            f"{path} is not an fpn-engine model (no {SPEC_KEY} in its metadata); "
            "export your checkpoint with: fpn-engine export checkpoint.pth"
        )
    try:
        return read_spec_json(texts[0])
    except SpecError as error:
        raise ModelError(f"{path}: {error}; export it again with this version") from None


def _refuse_unsafe(path: Path, model: ModelProto) -> None:
    if model.functions:
        raise ModelError(f"{path} defines functions of its own, which fpn-engine does not run; export it again")
    if len(model.graph.node) > MAX_NODES:
        raise ModelError(f"{path} has {len(model.graph.node)} nodes, more than any detector has; export it again")
    for node in model.graph.node:
        if node.domain not in ("", "ai.onnx") or node.op_type in REFUSED_OPERATORS:
            name = f"{node.domain}.{node.op_type}".lstrip(".")
            raise ModelError(f"{path} has the operator {name}, which is not part of a detector; export it again")
        if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
            raise ModelError(f"{path} has a graph inside its operator {node.op_type}; export it again")
        if any(attribute.HasField("sparse_tensor") or attribute.sparse_tensors for attribute in node.attribute):
            raise _sparse(path)
    if model.graph.sparse_initializer:
        raise _sparse(path)
    for tensor in _tensors(model.graph):
        if tensor.data_location == TensorProto.EXTERNAL or tensor.external_data:
            raise ModelError(
                f"{path} keeps the data of {tensor.name or 'a constant'} in another file, but fpn-engine reads "
                "self-contained files only; export it again"
            )
        if min(tensor.dims, default=1) < 0 or math.prod(tensor.dims) > MAX_PER_BYTE * tensor.ByteSize():
            raise ModelError(
                f"{path} is damaged: {tensor.name or 'a constant'} declares more numbers than it holds; export it again"
            )


def _sparse(path: Path) -> ModelError:
    return ModelError(f"{path} has sparse tensors, which are not part of a detector; export it again")


def _tensors(graph: GraphProto) -> Iterator[TensorProto]:
    """Every tensor stored in a graph without graphs inside: initializers and the constants in attributes."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield from attribute.tensors
            if attribute.HasField("t"):
                yield attribute.t
