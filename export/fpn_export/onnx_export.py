"""ONNX export: one standard end-to-end file that ONNX Runtime runs by itself (Lin et al. 2017, sec. 4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from onnx import ModelProto, TensorProto, helper
from torch import Tensor, nn

from fpn_engine.errors import ModelError
from fpn_engine.spec import FINEST_STAGE, ModelSpec
from fpn_export.batch_norm import fold_batch_norm
from fpn_export.detector import DETECTORS, FpnDetector
from fpn_export.onnx_detections import add_detections, add_proposal_detections, add_status
from fpn_export.onnx_graph import OnnxGraph, tensor_info
from fpn_export.onnx_network import SPEC_KEY, export_part, export_trunk, finish, rename
from fpn_export.onnx_proposals import add_proposals, box_limits
from fpn_export.onnx_roi_features import add_roi_features, mark_given, mark_proposed

OVERRIDABLE = ("rpn_nms_thresh", "rpn_score_thresh", "box_score_thresh", "box_nms_thresh", "box_detections_per_img")


class _TrunkModule(nn.Module):
    """The trunk with every named tensor as an output."""

    def __init__(self, model: FpnDetector) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        stages, levels = self.model.pyramid(image)
        objectness, deltas = self.model.answer(levels)
        named = levels if self.model.spec.pyramid != "none" else ()  # the one level is a stage
        return (*stages, *named, *objectness, *deltas)


class _HeadModule(nn.Module):
    def __init__(self, model: FpnDetector) -> None:
        super().__init__()
        self.model = model

    def forward(self, roi_features: Tensor) -> tuple[Tensor, Tensor]:
        return self.model.head(roi_features)


def trunk_outputs(spec: ModelSpec) -> list[str]:
    """Names of the trunk's tensors in the file: c2..c5, p2.., objectness_p2.., deltas_p2..."""
    names = [f"c{stage}" for stage in range(FINEST_STAGE, spec.coarsest_stage + 1)]
    names += [level for level in spec.level_names if level not in names]
    kinds = ("objectness", "deltas") if spec.has_rpn else ()
    return names + [f"{kind}_{level}" for kind in kinds for level in spec.level_names]


def export_onnx(
    model: FpnDetector, spec: ModelSpec, *, on_progress: Callable[[str], None] = lambda step: None
) -> ModelProto:
    """Export a detector as one self-contained ONNX model: opset 20, IR 10.

    Inputs: ``image`` (N, 3, H, W) float32, normalised and padded to multiples of 32; ``image_sizes`` (N, 2) int64,
    resized height and width before padding. A Fast R-CNN takes ``proposals`` too, (N, R, 4) float32 in pixels of the
    resized image with R at least 1, and ``proposal_counts`` (N,) int64, how many are real. Outputs, with
    D = box_detections_per_img: ``boxes`` (N, D, 4) float32 in pixels of the resized image, ``scores`` (N, D) float32,
    ``labels`` (N, D) int64 from 1, ``counts`` (N,) int64 and ``status`` (N,) int64 (0 ok, 1 non-finite). The
    initializers in ``OVERRIDABLE`` that it has are optional inputs too. The spec is in ``metadata_props`` under
    ``fpn_engine.spec``.

    Raises: ModelError for a model of another kind than ``spec.model``, or if the file does not pass ONNX's checker.
    """
    if not isinstance(model, DETECTORS[spec.model]):
        raise ModelError(f"the model is a {type(model).__name__}, but its specification says {spec.model}")
    folded = fold_batch_norm(model)
    on_progress("trunk")
    parts = [export_trunk(_TrunkModule(folded), trunk_outputs(spec))]
    if spec.has_box_head:
        on_progress("box head")
        size = spec.box_roi_pool.output_size
        head = export_part(
            _HeadModule(folded),
            torch.zeros(2, spec.feature_channels, size, size),
            "roi_features",
            ["class_logits", "box_deltas"],
            {"roi_features": {0: torch.export.Dim("rois")}},
        )
        parts.append(rename(head, "head/"))
    on_progress("proposals and detections")
    return _join(parts, spec)


def _join(parts: Sequence[ModelProto], spec: ModelSpec) -> ModelProto:
    """Trunk and box head, as far as they are there, with all that lies between them and behind."""
    first, second = OnnxGraph("proposal_"), OnnxGraph("detection_")
    limits = box_limits(first, "image_sizes")
    if spec.has_rpn:
        add_proposals(first, spec, limits)
    if spec.has_box_head:
        add_roi_features(first, spec, mark_proposed(first) if spec.has_rpn else mark_given(first))
        add_detections(second, spec, limits)
    else:
        add_proposal_detections(second, spec)
    add_status(second, spec)

    inputs = [
        tensor_info("image", TensorProto.FLOAT, ("batch", 3, "height", "width")),
        tensor_info("image_sizes", TensorProto.INT64, ("batch", 2)),
    ]
    if not spec.has_rpn:
        inputs.append(tensor_info("proposals", TensorProto.FLOAT, ("batch", "num_proposals", 4)))
        inputs.append(tensor_info("proposal_counts", TensorProto.INT64, ("batch",)))
    d = "detections"
    outputs = [
        tensor_info("boxes", TensorProto.FLOAT, ("batch", d, 4)),
        tensor_info("scores", TensorProto.FLOAT, ("batch", d)),
        tensor_info("labels", TensorProto.INT64, ("batch", d)),
        tensor_info("counts", TensorProto.INT64, ("batch",)),
        tensor_info("status", TensorProto.INT64, ("batch",)),
    ]
    neural = [tensor for part in parts for tensor in part.graph.initializer]
    initializers = [*neural, *first.initializers, *second.initializers]
    overridable = {t.name: t for t in initializers if t.name in OVERRIDABLE}
    inputs += [tensor_info(name, t.data_type, tuple(t.dims)) for name, t in overridable.items()]
    graph = helper.make_graph(
        [*parts[0].graph.node, *first.nodes, *(node for part in parts[1:] for node in part.graph.node), *second.nodes],
        "fpn_detector",
        inputs,
        outputs,
        initializers,
    )
    return finish(graph, {SPEC_KEY: spec.to_json()})
