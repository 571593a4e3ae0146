"""The parts of a native plan: trunk and head as fused operations and their tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from onnx import ModelProto

from fpn_engine.backends.native.ops import BFLOAT16, FLOAT16
from fpn_engine.backends.native.packing import pack_part
from fpn_engine.errors import ModelError
from fpn_engine.masks.spec import AnySpec, MaskSpec
from fpn_export.native.fusion import fuse
from fpn_export.native.operators import lower
from fpn_export.native.precision import in_bfloat16, in_float32, in_half, in_int8
from fpn_export.native.window_scores import join_window_scores


def make_native_parts(
    path: Path,
    networks: Mapping[str, ModelProto],
    spec: AnySpec,
    precision: str,
    on_progress: Callable[[str], None],
    device: str = "cpu",
) -> dict[str, bytes]:
    """Lower trunk and head, which were cut out of ``path``, to ``precision`` "fp32", "fp16", "bf16" or,
    of a quantised model on a CPU, "int8".

    In 16 bits objectness, deltas, class logits and box deltas are float32: on a CPU the last layers run in it, on
    ``device`` "cuda", and at fp16, they leave their float32 sums unrounded. So are the scores of mask proposals.
    Raises: ModelError for an operator that the native backend does not have.
    """
    parts: dict[str, bytes] = {}
    for name, network in networks.items():
        on_progress(f"lower {name}")
        try:
            lowered = fuse(lower(network))
        except ModelError as error:
            raise ModelError(f"{path}: {error}") from None
        if isinstance(spec, MaskSpec) and name != "trunk":  # the windows' two layers: small, and not run by an executor
            is_half = device == "cuda" and precision != "fp32"
            dtype = FLOAT16 if precision == "fp16" else BFLOAT16
            parts |= pack_part(name, *(in_half(lowered, dtype, ()) if is_half else in_float32(lowered)))
            continue
        if isinstance(spec, MaskSpec):
            features = len(spec.levels)
            if device == "cpu" and precision != "fp16":
                join_window_scores(lowered, lowered.outputs[features:])
        else:
            features = len(lowered.outputs) - 2 * len(spec.levels) * spec.has_rpn if name == "trunk" else 0
        exact = lowered.outputs[features:]
        if precision == "fp32":
            parts |= pack_part(name, *in_float32(lowered))
        elif precision == "int8":
            parts |= pack_part(name, *in_int8(lowered))
        elif precision == "bf16" and device == "cpu":
            parts |= pack_part(name, *in_bfloat16(lowered, exact))
        else:
            parts |= pack_part(name, *in_half(lowered, FLOAT16 if precision == "fp16" else BFLOAT16, exact))
    return parts
