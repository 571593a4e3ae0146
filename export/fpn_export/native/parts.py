"""The parts of a native plan: trunk and head as fused operations and their tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from onnx import ModelProto

from fpn_engine.backends.native.parts import pack_part
from fpn_engine.errors import ModelError
from fpn_engine.spec import ModelSpec
from fpn_export.native.fusion import fuse
from fpn_export.native.lowering import lower
from fpn_export.native.precision import in_bfloat16, in_float32


def make_native_parts(
    path: Path,
    networks: Mapping[str, ModelProto],
    spec: ModelSpec,
    precision: str,
    on_progress: Callable[[str], None],
) -> dict[str, bytes]:
    """Lower trunk and head, which were cut out of ``path``, to ``precision`` "fp32" or "bf16".

    In bf16 all runs in bfloat16 but the last layers: objectness, deltas and class logits are float32.
    Raises: ModelError for an operator that the native backend does not have.
    """
    parts: dict[str, bytes] = {}
    for name, network in networks.items():
        on_progress(f"lower {name}")
        try:
            lowered = fuse(lower(network))
        except ModelError as error:
            raise ModelError(f"{path}: {error}") from None
        if precision == "bf16":
            features = len(lowered.outputs) - 2 * len(spec.levels) * spec.has_rpn if name == "trunk" else 0
            parts |= pack_part(name, *in_bfloat16(lowered, lowered.outputs[features:]))
        else:
            parts |= pack_part(name, *in_float32(lowered))
    return parts
