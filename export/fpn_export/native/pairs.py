"""Q/DQ pairs lowered: values that are rounded to 8 bits, and the weights that are stored in them."""

from __future__ import annotations

import numpy as np

from fpn_engine.backends.native.quantized import Dequantize, Quantize
from fpn_export.native.graph import Node
from fpn_export.native.lowering import Handler, Lowering


def lower_quantize(at: Lowering, node: Node) -> None:
    """One step and zero point 0 in int8: what ``fpn-engine quantize`` writes, and TensorRT takes."""
    x, scale, zero = at.value(node), at.required(node, 1), at.constant(node, 2)
    if scale.size != 1 or zero is None or zero.dtype != np.int8 or zero.any():
        raise at.refuse(node, "to anything but int8 of one scale and zero point 0")
    at.emit(Quantize(inputs=(x.name,), output=node.outputs[0], step=float(scale.reshape(()))), node, x)


def lower_dequantize(at: Lowering, node: Node) -> None:
    x = at.value(node)
    at.emit(Dequantize(inputs=(x.name,), output=node.outputs[0]), node, x)


PAIRS: dict[str, Handler] = {"DequantizeLinear": lower_dequantize, "QuantizeLinear": lower_quantize}
