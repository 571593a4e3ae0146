"""ONNX export of mask proposals: image to regions, scores and masks, sparse (Lin et al. 2017, sec. 6, appendix A)."""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np
from onnx import ModelProto, TensorProto, helper
from torch import Tensor, nn

from fpn_engine.masks.spec import MaskSpec
from fpn_export.batch_norm import fold_batch_norm
from fpn_export.masks.model import FpnMasks
from fpn_export.onnx_boxes import best, pick
from fpn_export.onnx_graph import OnnxGraph, tensor_info
from fpn_export.onnx_network import SPEC_KEY, export_trunk, finish


class _TrunkModule(nn.Module):
    """Levels and scores everywhere, as outputs with names."""

    def __init__(self, model: FpnMasks) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        out = self.model.trunk(image)
        return (*out.features, *out.scores)


def export_mask_onnx(model: FpnMasks, *, on_progress: Callable[[str], None] = lambda step: None) -> ModelProto:
    """Export a mask-proposal model as one self-contained ONNX file: opset 20, IR 10.

    Input: ``image`` (N, 3, H, W) float32, normalised and padded to multiples of 32. Outputs, with K the lesser of
    masks_per_img and the number of locations and heads: ``regions`` (N, K, 4) float32 in pixels of the resized image,
    ``scores`` (N, K) float32, descending, ``masks`` (N, K, S, S) float32 logits and ``status`` (N,) int64 (0 ok,
    1 non-finite). ``masks_per_img`` (1,) int64 is an optional input too. The MLPs run at the winners alone. The spec is
    in ``metadata_props`` under ``fpn_engine.spec``. The trunk's tensors are ``p2``.. and ``scores_p2``...

    Raises: ModelError if the file does not pass ONNX's checker.
    """
    spec, folded = model.spec, fold_batch_norm(model)
    on_progress("trunk")
    trunk = export_mask_trunk(folded)
    on_progress("winners and masks")
    g = OnnxGraph("mask_")
    _add_winners(g, spec)
    _add_masks(g, folded, {tensor.name for tensor in trunk.graph.initializer})
    _add_status(g, spec)
    limit = next(tensor for tensor in g.initializers if tensor.name == "masks_per_img")
    graph = helper.make_graph(
        [*trunk.graph.node, *g.nodes],
        "fpn_masks",
        [
            tensor_info("image", TensorProto.FLOAT, ("batch", 3, "height", "width")),
            tensor_info("masks_per_img", limit.data_type, tuple(limit.dims)),
        ],
        [
            tensor_info("regions", TensorProto.FLOAT, ("batch", "proposals", 4)),
            tensor_info("scores", TensorProto.FLOAT, ("batch", "proposals")),
            tensor_info("masks", TensorProto.FLOAT, ("batch", "proposals", spec.mask_size, spec.mask_size)),
            tensor_info("status", TensorProto.INT64, ("batch",)),
        ],
        [*trunk.graph.initializer, *g.initializers],
    )
    return finish(graph, {SPEC_KEY: spec.to_json()})


def export_mask_trunk(model: FpnMasks) -> ModelProto:
    """``image`` to the levels ``p2``.. and the logits ``scores_p2``.., (N, A, H, W) each; batch norms folded before."""
    names = [*model.spec.level_names, *(f"scores_{level}" for level in model.spec.level_names)]
    return export_trunk(_TrunkModule(model), names)


def _add_winners(g: OnnxGraph, spec: MaskSpec) -> None:
    """``scores`` and ``regions``; and, (N, K) int64 each, winner_head, winner_level, winner_y and winner_x."""
    limit = g.const([spec.masks_per_img], np.int64, "masks_per_img")
    count = g.int64(len(spec.heads))
    columns: dict[str, list[str]] = {name: [] for name in ("logits", "head", "level", "y", "x")}
    for number, level in enumerate(spec.level_names):
        rows = g.op("Reshape", g.op("Transpose", f"scores_{level}", perm=[0, 2, 3, 1]), g.int64(0, -1))
        top, index = best(g, rows, limit)
        cell, width = g.op("Div", index, count), g.dim(level, 3)
        parts = (
            top,
            g.op("Mod", index, count),
            g.op("Expand", g.int64(number), g.op("Shape", index)),
            g.op("Div", cell, width),
            g.op("Mod", cell, width),
        )
        for column, part in zip(columns.values(), parts, strict=True):
            column.append(part)
    joined = {name: g.op("Concat", *parts, axis=1) for name, parts in columns.items()}
    top, index = best(g, joined.pop("logits"), limit)
    g.op("Sigmoid", top, name="scores")
    head, level, y, x = (pick(g, part, index, name=f"winner_{name}") for name, part in joined.items())
    sizes = [[spec.region_size(one, level) / 2 for one in spec.heads] for level in spec.levels]
    place = g.op("Concat", *(g.op("Unsqueeze", part, g.int64(2)) for part in (level, head)), axis=2)
    half = g.op("Unsqueeze", g.op("GatherND", g.const(sizes, np.float32), place), g.int64(2))
    stride = g.op("Gather", g.const(spec.strides, np.int64), level, axis=0)
    sides = (g.op("Unsqueeze", g.op("Mul", part, stride), g.int64(2)) for part in (x, y))
    centre = g.cast(g.op("Concat", *sides, axis=2), TensorProto.FLOAT)
    g.op("Concat", g.op("Sub", centre, half), g.op("Add", centre, half), axis=2, name="regions")


def _add_masks(g: OnnxGraph, model: FpnMasks, there: Collection[str]) -> None:
    """``masks``, each winner's by its own head: windows gathered from one table of all levels, then two products.

    ``there``: names of the trunk's parameters; the exporter leaves out biases that are all zero.
    """
    spec, parameters = model.spec, dict(model.named_parameters())

    def parameter(name: str) -> str:
        return name if name in there else g.const(parameters[name].detach().numpy(), name=name)

    reach = max(head.kernel for head in spec.heads) // 2
    border = g.int64(0, 0, reach, reach, 0, 0, reach, reach)
    tables, pitches, starts, start = [], [], [], g.int64(0)
    for level in spec.level_names:
        padded = g.op("Transpose", g.op("Pad", level, border), perm=[0, 2, 3, 1])
        tables.append(g.op("Reshape", padded, g.const([0, -1, spec.fpn_channels], np.int64)))
        pitches.append(g.dim(padded, 2))
        starts.append(start)
        start = g.op("Add", start, g.dim(tables[-1], 1))
    table = g.op("Reshape", g.op("Concat", *tables, axis=1), g.int64(-1, spec.fpn_channels))
    pitch = g.op("Gather", g.op("Concat", *pitches, axis=0), "winner_level", axis=0)
    first = g.op("Gather", g.op("Concat", *starts, axis=0), "winner_level", axis=0)
    image = g.op("Range", g.const(0, np.int64), g.op("Squeeze", g.dim("image", 0), g.int64(0)), g.const(1, np.int64))
    image = g.op("Mul", g.op("Unsqueeze", image, g.int64(1)), start)
    # The window's first row in the table; borders as wide as the largest window reaches are part of it.
    cell = g.op("Add", g.op("Add", image, first), g.op("Add", g.op("Mul", "winner_y", pitch), "winner_x"))
    cell, pitch, head = (g.op("Reshape", part, g.int64(-1)) for part in (cell, pitch, "winner_head"))
    cells = spec.mask_size**2
    masks = g.op("Expand", g.float32(0.0), g.op("Concat", g.dim(cell, 0), g.int64(cells), axis=0))
    for number, one in enumerate(spec.heads):
        own = g.op("Squeeze", g.op("NonZero", g.op("Equal", head, g.int64(number))), g.int64(0))
        steps = np.arange(one.kernel) + reach - one.kernel // 2
        down = g.op(
            "Mul", g.op("Unsqueeze", g.op("Gather", pitch, own, axis=0), g.int64(1)), g.const([steps], np.int64)
        )
        rows = g.op("Add", g.op("Unsqueeze", g.op("Gather", cell, own, axis=0), g.int64(1)), down)
        index = g.op("Add", g.op("Unsqueeze", rows, g.int64(2)), g.const(steps[None, None], np.int64))
        depth = one.kernel**2 * spec.fpn_channels
        windows = g.op("Reshape", g.op("Gather", table, index, axis=0), g.int64(0, depth), name=f"window_rows_{number}")
        prefix = f"mask_heads.{number}"
        # The convolution's own weights, in the order of a window; a runtime turns them once.
        turned = g.op("Transpose", parameter(f"{prefix}.conv.weight"), perm=[2, 3, 1, 0])
        weight = g.op("Reshape", turned, g.int64(depth, spec.hidden_channels))
        hidden = g.op("Relu", g.op("Gemm", windows, weight, parameter(f"{prefix}.conv.bias")))
        last = g.op("Flatten", parameter(f"{prefix}.mask.weight"))
        answered = g.op("Gemm", hidden, last, parameter(f"{prefix}.mask.bias"), transB=1, name=f"window_masks_{number}")
        masks = g.op("ScatterND", masks, g.op("Unsqueeze", own, g.int64(1)), answered)
    shape = g.op("Concat", g.op("Shape", "winner_y"), g.int64(spec.mask_size, spec.mask_size), axis=0)
    g.op("Reshape", masks, shape, name="masks")


def _add_status(g: OnnxGraph, spec: MaskSpec) -> None:
    """``status`` (N,): 1 where a score map, the image or a mask holds NaN or infinity, as ``add_status`` tells it."""
    maps = ["image", *(f"scores_{level}" for level in spec.level_names), "masks"]
    sums = [g.op("ReduceSum", value, g.int64(1, 2, 3), keepdims=0) for value in maps]
    total = g.op("Sum", *(g.op("Sub", value, value) for value in sums))
    g.op("Cast", g.op("IsNaN", total), to=TensorProto.INT64, name="status")
