"""The networks of a model's end-to-end file, cut out: what a backend compiles."""

from __future__ import annotations

from onnx import ModelProto

from fpn_engine.masks.spec import AnySpec, MaskSpec
from fpn_export.masks.onnx_cut import cut_masks
from fpn_export.onnx_cut import cut_head, cut_trunk


def cut_networks(model: ModelProto, spec: AnySpec) -> dict[str, ModelProto]:
    """The trunk, and what lies behind it by the names of ``spec.head_names``.

    Raises: ModelError if a tensor is missing.
    """
    if isinstance(spec, MaskSpec):
        return cut_masks(model, spec)
    trunk = {"trunk": cut_trunk(model, spec)}
    return trunk | {"head": cut_head(model, spec)} if spec.has_box_head else trunk
