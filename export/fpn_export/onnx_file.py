"""Reading an ONNX detector from disk: nothing in the file is trusted before it is checked."""

from __future__ import annotations

from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx import ModelProto, TensorProto

from fpn_engine.errors import ModelError, SpecError
from fpn_engine.spec import ModelSpec
from fpn_export.onnx_export import SPEC_KEY

# Control flow and custom operators have no place in a detector, and a crafted graph of them can crash a runtime.
REFUSED_OPERATORS = frozenset({"If", "Loop", "Scan"})
MAX_NODES = 100_000


def read_onnx(path: Path) -> tuple[ModelProto, ModelSpec]:
    """Load a model that ``fpn-engine export`` wrote, with its spec.

    Raises: ModelError, one sentence with the file and the remedy, for a missing, damaged or foreign file.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from None
    try:
        model = ModelProto.FromString(data)
    except DecodeError:
        raise ModelError(f"{path} is not an ONNX file or is damaged; write one with: fpn-engine export") from None
    spec = _read_spec(path, model)
    _refuse_unsafe(path, model)
    try:
        onnx.checker.check_model(model)
    except Exception as error:  # the checker raises its own and protobuf's exceptions
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"{path} does not pass the ONNX checker ({reason}); export it again") from None
    return model, spec


def _read_spec(path: Path, model: ModelProto) -> ModelSpec:
    texts = [prop.value for prop in model.metadata_props if prop.key == SPEC_KEY]
    if not texts:
        raise ModelError(
            f"{path} is not an fpn-engine model (no {SPEC_KEY} in its metadata); "
            "export your checkpoint with: fpn-engine export checkpoint.pth"
        )
    try:
        return ModelSpec.from_json(texts[0])
    except SpecError as error:
        raise ModelError(f"{path}: {error}; export it again with this version") from None


def _refuse_unsafe(path: Path, model: ModelProto) -> None:
    if model.functions:
        raise ModelError(f"{path} defines functions of its own, which fpn-engine does not run; export it again")
    if len(model.graph.node) > MAX_NODES:
        raise ModelError(f"{path} has {len(model.graph.node)} nodes, more than any detector needs ({MAX_NODES})")
    for node in model.graph.node:
        if node.domain not in ("", "ai.onnx") or node.op_type in REFUSED_OPERATORS:
            name = f"{node.domain}.{node.op_type}".lstrip(".")
            raise ModelError(f"{path} has the operator {name}, which is not part of a detector; export it again")
    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL or tensor.external_data:
            raise ModelError(f"{path} keeps {tensor.name} in another file; fpn-engine reads self-contained files only")
