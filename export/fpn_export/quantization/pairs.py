"""Q/DQ pairs: a float graph to one that says where its numbers are rounded to 8 bits (symmetric, zero point 0).

x~ = s * clamp(round(x / s), -128, 127) with s = range / 127; of fp8 (E4M3) s = range / 448. Weights have a scale for
each output channel and are stored in 8 bits. Biases stay float32, as TensorRT takes them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from fpn_export.quantization.eight_bits import DTYPES, FP8, NARROWEST, find_scale, to_steps
from fpn_export.quantization.layers import Layer, Network

EXACT, QUANTIZED, DEQUANTIZED = ".exact", ".quantized", ".dequantized"  # names before, within and behind a pair
FP8_CHANNELS, FP8_WINDOW = 16, 32  # TensorRT's fp8 layers: channels in sixteens, windows of at most so many cells
# Values that other parts of the file make or read: they stay as they are, and their readers get the pair.
BOUNDARIES = frozenset({"image", "roi_features"})


def quantize_weight(array: NDArray[np.float32], precision: str) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """A weight (O, ...) in 8 bits, and the scale (O,) of each output channel."""
    scale = find_scale(np.abs(array).reshape(len(array), -1).max(axis=1), precision)
    return to_steps(array, scale.reshape(-1, *[1] * (array.ndim - 1)), precision), scale


def relative_error(array: NDArray[Any], steps: NDArray[Any], scale: NDArray[Any]) -> float:
    """|x~ - x| / |x| of a quantised weight."""
    made = steps.astype(np.float32) * scale.reshape(-1, *[1] * (array.ndim - 1))
    return float(np.linalg.norm(made - array) / max(float(np.linalg.norm(array)), NARROWEST))


def takes_precision(network: Network, layer: Layer, precision: str) -> bool:
    """Whether TensorRT has the layer in ``precision``."""
    dims = network.weights[layer.weight].dims
    wide = all(channels % FP8_CHANNELS == 0 for channels in dims[:2])
    return precision != FP8 or (wide and math.prod(dims[2:]) <= FP8_WINDOW)


def insert_pairs(
    model: ModelProto, layers: Collection[str], ranges: Mapping[str, float], precision: str = "int8"
) -> ModelProto:
    """A copy in which the layers of these names are quantised.

    A value keeps its name behind its pair, so that all who read it, another part of a cut model too, read the same
    rounded numbers. Other layers stay as they are.

    Args: ranges: the largest magnitude of each value that :meth:`Network.points` names.
    """
    copy = ModelProto()
    copy.CopyFrom(model)
    network = Network(copy)
    chosen = [layer for layer in network.layers if layer.name in layers]
    writer = _Writer(copy, precision)
    points = network.points(chosen)
    sources = network.sources(points)
    for point in points:
        writer.scale(point, ranges[sources[point]])
    for layer in chosen:
        writer.add_weight(layer.weight, network.weight(layer))
    writer.rewrite({id(node) for layer in chosen for node in layer.nodes})
    return copy


class _Writer:
    def __init__(self, model: ModelProto, precision: str) -> None:
        self._graph = model.graph
        self._precision = precision
        self._zero = "zero_point"
        self._tensors: dict[str, TensorProto] = {tensor.name: tensor for tensor in model.graph.initializer}
        self._constant(self._zero, np.zeros((), DTYPES[precision]))
        self._scaled: dict[str, str] = {}
        self._weights: dict[str, NodeProto] = {}

    def scale(self, value: str, largest: float) -> None:
        self._scaled[value] = self._constant(f"{value}.scale", find_scale(largest, self._precision))

    def add_weight(self, name: str, array: NDArray[np.float32]) -> None:
        steps, scale = quantize_weight(array, self._precision)
        names = [
            self._constant(f"{name}{QUANTIZED}", steps),
            self._constant(f"{name}.scale", scale),
            self._constant(f"{name}.zero_point", np.zeros(len(scale), DTYPES[self._precision])),
        ]
        output = f"{name}{DEQUANTIZED}"
        self._weights[name] = helper.make_node("DequantizeLinear", names, [output], name=output, axis=0)

    def rewrite(self, quantized: set[int]) -> None:
        """Put the pairs behind what makes the values, and the weights before the first that reads them."""
        renamed = {value: f"{value}{DEQUANTIZED}" for value in self._scaled if value in BOUNDARIES}
        given = {value.name for value in self._graph.input}
        nodes = [node for value in renamed if value in given for node in self._pair(value, value, renamed[value])]
        placed: set[str] = set()
        for node in self._graph.node:
            for index, name in enumerate(node.input):
                node.input[index] = renamed.get(name, name)
            if id(node) in quantized:
                weight = self._weights[node.input[1]]
                if weight.name not in placed:
                    placed.add(weight.name)
                    nodes.append(weight)
                node.input[1] = weight.output[0]
            behind = []
            for index, name in enumerate(node.output):
                if name in renamed:
                    behind += self._pair(name, name, renamed[name])
                elif name in self._scaled:
                    node.output[index] = f"{name}{EXACT}"
                    behind += self._pair(name, f"{name}{EXACT}", name)
            nodes += [node, *behind]
        used = {name for node in nodes for name in node.input}
        kept = [tensor for name, tensor in self._tensors.items() if name in used]
        # Copies first: what stands in a field goes when the field is emptied.
        copies = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
        tensors = [TensorProto.FromString(tensor.SerializeToString()) for tensor in kept]
        for field, values in (("node", copies), ("initializer", tensors), ("value_info", [])):
            del getattr(self._graph, field)[:]
            getattr(self._graph, field).extend(values)

    def _pair(self, value: str, exact: str, made: str) -> list[NodeProto]:
        inner, scale = f"{value}{QUANTIZED}", self._scaled[value]
        return [
            helper.make_node("QuantizeLinear", [exact, scale, self._zero], [inner], name=inner),
            helper.make_node("DequantizeLinear", [inner, scale, self._zero], [made], name=f"{value}{DEQUANTIZED}"),
        ]

    def _constant(self, name: str, array: NDArray[np.generic]) -> str:
        self._tensors[name] = numpy_helper.from_array(np.asarray(array), name)
        return name
