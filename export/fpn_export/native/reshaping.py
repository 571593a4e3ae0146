"""ONNX operators that move numbers: upsampling, flattening, transposition, and those that do nothing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fpn_engine.backends.native.ops import Flatten, Unflatten, Upsample
from fpn_export.native.graph import Node
from fpn_export.native.lowering import Handler, Lowering

TO_NHWC, TO_NCHW = [0, 2, 3, 1], [0, 3, 1, 2]
TRIED_SIDE = 64  # cells of a map on which a rule of nearest neighbours is tried; all rules repeat with the scale


def lower_resize(at: Lowering, node: Node) -> None:
    """Upsampling by whole numbers that repeats each cell, by whichever of ONNX's rules it is written."""
    x = at.map(node)
    if node.get("mode", "nearest") != "nearest":
        raise at.refuse(node, f"of mode {node.get('mode', '')}")
    scales = _scales(at, node)
    n, c, h, w = (round(scale) for scale in scales)
    if (n, c) != (1, 1) or min(h, w) < 1 or not np.allclose(scales, (n, c, h, w)):
        raise at.refuse(node, f"by {', '.join(f'{scale:g}' for scale in scales)}")
    if not all(_repeats(node, scale) for scale in (h, w)):
        raise at.refuse(node, "by a rule that does not repeat each cell")
    if (h, w) == (1, 1):
        at.bind(node, x)
    else:
        at.emit(Upsample(inputs=(x.name,), output=node.outputs[0], factor=(h, w)), node, x, single=False)


def _scales(at: Lowering, node: Node) -> Sequence[float]:
    """Constant scales, or those that the sizes come to at every size of the input."""
    index = 2 if len(node.inputs) > 2 else 1  # Upsample, and Resize before opset 11, have no region in between
    name = node.input(index)
    if name in at.graph.constants and at.graph.constants[name].size == 4:
        return [float(scale) for scale in at.graph.constants[name]]
    found = set()
    for shapes in at.graph.shapes:
        before, after = shapes[node.input(0)], shapes[node.outputs[0]]
        found.add(tuple(b / a for a, b in zip(before, after, strict=True)))
    if len(found) != 1:
        raise at.refuse(node, "to a size that is not the same multiple of every input's")
    return found.pop()


def _repeats(node: Node, scale: int) -> bool:
    """Whether output cell i is input cell i // scale."""
    i = np.arange(TRIED_SIDE * scale, dtype=np.float64)
    match node.get("coordinate_transformation_mode", "half_pixel") if node.kind == "Resize" else "asymmetric":
        case "asymmetric":
            x = i / scale
        case "half_pixel" | "pytorch_half_pixel":
            x = (i + 0.5) / scale - 0.5
        case "tf_half_pixel_for_nn":
            x = (i + 0.5) / scale
        case _:
            return False
    mode = node.get("nearest_mode", "round_prefer_floor") if node.kind == "Resize" else "floor"
    rounded = {
        "floor": np.floor(x),
        "ceil": np.ceil(x),
        "round_prefer_floor": np.ceil(x - 0.5),
        "round_prefer_ceil": np.floor(x + 0.5),
    }.get(mode)
    return rounded is not None and np.array_equal(rounded.clip(0, TRIED_SIDE - 1), i // scale)


def lower_flatten(at: Lowering, node: Node) -> None:
    """(N, C, H, W) or rows to rows."""
    if node.kind == "Flatten" and node.get("axis", 1) not in (1, -3):
        raise at.refuse(node, f"at axis {node.get('axis', 1)}")
    x = at.value(node)
    if x.layout == "rows":
        at.bind(node, x)
        return
    if x.layout == "nhwc":
        raise at.refuse(node, "of a transposed map")
    cells = {shapes[node.input(0)][2:] for shapes in at.graph.shapes} if not x.single else {(1, 1)}
    if len(cells) != 1:
        raise at.refuse(node, "of a map whose size changes with the input's")
    ((h, w),) = cells
    op = Flatten(inputs=(x.name,), output=node.outputs[0])
    chw = None if (h, w) == (1, 1) else (x.channels, h, w)
    at.emit(op, node, x, layout="rows", single=False, channels=x.channels * h * w, chw=chw)


def lower_reshape(at: Lowering, node: Node) -> None:
    """Maps to rows; rows to maps of one cell, or to (R, H, W, C)."""
    x = at.value(node)
    shapes = [(found[node.input(0)], found[node.outputs[0]]) for found in at.graph.shapes]
    before, after = shapes[0]
    if all(a == b for a, b in shapes):
        at.bind(node, x)
    elif all(len(b) == 2 and a[0] == b[0] for a, b in shapes):
        lower_flatten(at, node)
    elif x.layout == "rows" and not x.chw and len(after) == 4 and all((a[0], *after[1:]) == b for a, b in shapes):
        _unflatten(at, node, after)
    else:
        raise at.refuse(node, f"from {before} to {after}")


def _unflatten(at: Lowering, node: Node, after: Sequence[int]) -> None:
    x, name = at.value(node), node.outputs[0]
    if tuple(after[2:]) == (1, 1):
        at.emit(Unflatten(inputs=(x.name,), output=name, height=1, width=1), node, x, layout="nchw", single=True)
        return
    op = Unflatten(inputs=(x.name,), output=name, height=after[1], width=after[2])
    at.emit(op, node, x, layout="nhwc", channels=after[3])


def lower_transpose(at: Lowering, node: Node) -> None:
    """Between (N, C, H, W) and (N, H, W, C), which in the program is nothing."""
    x = at.value(node)
    order = list(node.get("perm", ()))
    layouts = {("nchw", tuple(TO_NHWC)): "nhwc", ("nhwc", tuple(TO_NCHW)): "nchw"}
    if order == list(range(len(order))) and order:
        at.bind(node, x)
    elif layout := layouts.get((x.layout, tuple(order))):
        at.bind(node, type(x)(x.name, x.channels, layout, x.single))
    else:
        raise at.refuse(node, f"by {order}")


def lower_squeeze(at: Lowering, node: Node) -> None:
    """H and W of a map of one cell away."""
    x = at.map(node)
    axes = node.attributes.get("axes")
    if axes is None and (given := at.constant(node, 1)) is not None:
        axes = given.tolist()
    if not x.single or axes is None or sorted(axis % 4 for axis in axes) != [2, 3]:
        raise at.refuse(node, "of anything but the sides of a map of one cell")
    at.emit(Flatten(inputs=(x.name,), output=node.outputs[0]), node, x, layout="rows", single=False)


def lower_identity(at: Lowering, node: Node) -> None:
    if node.kind == "Cast" and node.get("to", 1) != 1:
        raise at.refuse(node, "to another type")
    at.bind(node, at.value(node))


RESHAPING: dict[str, Handler] = {
    "Cast": lower_identity,
    "Dropout": lower_identity,
    "Flatten": lower_flatten,
    "Identity": lower_identity,
    "Reshape": lower_reshape,
    "Resize": lower_resize,
    "Squeeze": lower_squeeze,
    "Transpose": lower_transpose,
    "Upsample": lower_resize,
}
