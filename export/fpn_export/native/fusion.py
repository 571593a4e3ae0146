"""Fusion: fewer and larger operations that compute the same.

An affine map (batch normalisation) goes into the weights before it, an activation into the operation before it, an
addition into one of its convolutions, an upsampling into the addition, and sibling layers of one input into one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from fpn_engine.backends.native.ops import (
    NONE,
    UNIT,
    Activate,
    Add,
    Affine,
    Conv,
    Linear,
    Op,
    Slice,
    Upsample,
)
from fpn_export.native.network import Array, Network

_WEIGHTED = (Conv, Linear)
_ACTIVATED = (Conv, Linear, Add, Affine)


def fuse(network: Network) -> Network:
    """Change ``network`` in place by all fusions; returns it."""
    for step in (fold_affines, fuse_activations, fuse_upsamplings, fuse_residuals, merge_siblings):
        step(network)
    return network


def fold_affines(network: Network) -> None:
    """conv(x) * scale + shift as one convolution of other weights; fully connected layers too."""

    def fold(first: Op, second: Op) -> Op | None:
        plain = isinstance(first, _WEIGHTED) and first.activation == NONE and len(first.inputs) == 1
        if not plain or not isinstance(second, Affine):
            return None
        assert isinstance(first, _WEIGHTED)
        scale, shift = (network.weights[name].astype(np.float64) for name in (second.scale, second.shift))
        weight = network.weights[first.weight]
        if len(scale) != len(weight):
            return None
        bias = 0.0 if first.bias is None else network.weights[first.bias].astype(np.float64)
        name = f"{first.weight}*{second.scale}"
        return dataclasses.replace(
            first,
            output=second.output,
            weight=network.add_weight(name, weight * scale.reshape(-1, *[1] * (weight.ndim - 1))),
            bias=network.add_weight(f"{name}+{first.bias or ''}+{second.shift}", bias * scale + shift),
            activation=second.activation,
        )

    _join_pairs(network, fold)


def fuse_activations(network: Network) -> None:
    """An activation becomes part of the operation whose result it alone reads."""

    def join(first: Op, second: Op) -> Op | None:
        if isinstance(second, Activate) and isinstance(first, _ACTIVATED) and first.activation == NONE:
            return dataclasses.replace(first, output=second.output, activation=second.activation)
        return None

    _join_pairs(network, join)


def _join_pairs(network: Network, join: Callable[[Op, Op], Op | None]) -> None:
    """Replace two operations, of which the second alone reads what the first makes, by what ``join`` makes of them."""
    readers = network.count_readers()
    made: dict[str, int] = {}
    ops: list[Op | None] = []
    for op in network.ops:
        before = made.get(op.inputs[0]) if len(op.inputs) == 1 and readers[op.inputs[0]] == 1 else None
        first = None if before is None else ops[before]
        if first is not None and before is not None and (joined := join(first, op)):
            ops[before] = joined
            made[op.output] = before
        else:
            made[op.output] = len(ops)
            ops.append(op)
    network.replace([op for op in ops if op])


def fuse_upsamplings(network: Network) -> None:
    """fine + up(coarse) as one addition: the top-down step (Lin et al. 2017, fig. 3)."""
    readers, makers = network.count_readers(), network.makers()
    ops: list[Op | None] = list(network.ops)
    for i, op in enumerate(network.ops):
        if not isinstance(op, Add) or op.upsample != UNIT:
            continue
        for number in (1, 0):
            maker = makers.get(op.inputs[number])
            coarse = None if maker is None else ops[maker]
            if maker is not None and isinstance(coarse, Upsample) and readers[coarse.output] == 1:
                inputs = (op.inputs[1 - number], coarse.inputs[0])
                ops[i] = dataclasses.replace(op, inputs=inputs, upsample=coarse.factor)
                ops[maker] = None
                break
    network.replace([op for op in ops if op])


def fuse_residuals(network: Network) -> None:
    """conv(x) + residual as one operation in the place of the addition."""
    readers, makers, shapes = network.count_readers(), network.makers(), network.shapes()
    ops: list[Op | None] = list(network.ops)
    for i, op in enumerate(network.ops):
        if not isinstance(op, Add) or (op.upsample == UNIT and shapes[op.inputs[0]] != shapes[op.inputs[1]]):
            continue
        # Of two convolutions the later one, so that the other's result is there; never the operand that is upsampled.
        numbers = [0] if op.upsample != UNIT else sorted((0, 1), key=lambda n: -makers.get(op.inputs[n], -1))
        for number in numbers:
            maker = makers.get(op.inputs[number])
            conv = None if maker is None else ops[maker]
            if maker is None or not isinstance(conv, Conv) or readers[conv.output] != 1:
                continue
            if conv.activation == NONE and len(conv.inputs) == 1:
                ops[maker] = None
                inputs = (conv.inputs[0], op.inputs[1 - number])
                ops[i] = dataclasses.replace(
                    conv, inputs=inputs, output=op.output, upsample=op.upsample, activation=op.activation
                )
                break
    network.replace([op for op in ops if op])


def merge_siblings(network: Network) -> None:
    """Layers of one input whose results are outputs alone, as one layer and slices of its result.

    The RPN's two 1x1 convolutions (sec. 4.1) read a level once, and the classifier and the box regression one matrix.
    """
    readers = network.count_readers()
    families: dict[Op, list[int]] = {}
    for i, op in enumerate(network.ops):
        last = readers[op.output] == 1 and op.output in network.outputs
        small = isinstance(op, Linear) or (isinstance(op, Conv) and _is_pointwise(op, network.weights[op.weight]))
        if last and small and len(op.inputs) == 1:
            assert isinstance(op, _WEIGHTED)
            key = dataclasses.replace(op, output="", weight="", bias=None)
            families.setdefault(key, []).append(i)
    merged: dict[int, list[Op]] = {}
    for members in families.values():
        if len(members) > 1:
            merged |= {i: [] for i in members} | {members[-1]: _merge(network, [network.ops[i] for i in members])}
    network.replace([new for i, op in enumerate(network.ops) for new in merged.get(i, [op])])


def _is_pointwise(op: Conv, weight: Array) -> bool:
    return weight.shape[1:3] == (1, 1) and op.groups == 1


def _merge(network: Network, siblings: list[Op]) -> list[Op]:
    layers = [op for op in siblings if isinstance(op, _WEIGHTED)]
    arrays = [network.weights[op.weight] for op in layers]
    output = "+".join(op.output for op in layers)
    weight = network.add_weight("+".join(op.weight for op in layers), np.concatenate(arrays))
    bias = None
    if any(op.bias for op in layers):
        vectors = [
            network.weights[op.bias] if op.bias else np.zeros(len(a)) for op, a in zip(layers, arrays, strict=True)
        ]
        bias = network.add_weight("+".join(op.bias or f"0 of {op.weight}" for op in layers), np.concatenate(vectors))
    ops: list[Op] = [dataclasses.replace(layers[0], output=output, weight=weight, bias=bias)]
    start = 0
    for op, array in zip(layers, arrays, strict=True):
        ops.append(Slice(inputs=(output,), output=op.output, start=start, stop=start + len(array)))
        start += len(array)
    return ops
