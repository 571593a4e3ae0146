"""Operators: the ONNX operators that the native backend has, and any convolutional network made of them."""

from __future__ import annotations

from onnx import ModelProto

from fpn_export.native.graph import Graph
from fpn_export.native.layers import LAYERS
from fpn_export.native.lowering import Lowering
from fpn_export.native.network import Network
from fpn_export.native.pairs import PAIRS
from fpn_export.native.reshaping import RESHAPING

OPERATORS = LAYERS | RESHAPING | PAIRS


def lower(model: ModelProto) -> Network:
    """The network of an ONNX model of one float32 input, (N, C, H, W) or (R, F).

    Every 4-dimensional output is (N, H, W, C), whatever its order in ONNX.
    Raises: ModelError that names the operator which the native backend does not have, and the backend that has it.
    """
    return Lowering(Graph(model), OPERATORS).network()
