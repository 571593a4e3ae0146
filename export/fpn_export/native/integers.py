"""Layers between Q/DQ pairs as operations on 8 bits.

Rounding is monotonous and keeps 0, so that Q(relu(x)) = relu(Q(x)) and Q(max(x)) = max(Q(x)): a pair stands in front of
what only moves numbers. A convolution whose rounded result is only added to something takes the addition into itself,
before its sums are rounded: one rounding less than the file has. What does not fit stays float between its pairs.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from fpn_engine.backends.native.ops import NONE, UNIT, Add, Conv, Flatten, Linear, MaxPool, Op, Unflatten, Upsample
from fpn_engine.backends.native.quantized import (
    FUSED_ACTIVATIONS,
    Dequantize,
    Quantize,
    QuantizedConv,
    QuantizedLinear,
)
from fpn_engine.backends.native.shapes import infer_steps
from fpn_export.native.network import Network

_GEOMETRY = ("stride", "padding", "dilation", "groups")
_MOVES = (MaxPool, Upsample, Flatten, Unflatten)


def use_integers(network: Network) -> Network:
    """Change ``network``, fused, in place; returns it."""
    for step in (move_quantizations, drop_round_trips, quantize_layers, fuse_additions, drop_unused):
        step(network)
    return network


def move_quantizations(network: Network) -> None:
    """Q(move(x)) as move(Q(x)), from the last to the first, so that a pair goes through several."""
    readers, makers = network.count_readers(), network.makers()
    ops = list(network.ops)
    for i in reversed(range(len(ops))):
        op = ops[i]
        before = makers.get(op.inputs[0])
        if not isinstance(op, Quantize) or before is None or readers[op.inputs[0]] != 1:
            continue
        move = ops[before]
        if isinstance(move, _MOVES):
            ops[before] = dataclasses.replace(op, inputs=move.inputs, output=move.output)
            ops[i] = dataclasses.replace(move, inputs=(move.output,), output=op.output)
    network.replace(ops)


def drop_round_trips(network: Network) -> None:
    """Q(DQ(q)) of one step is q."""
    steps, sources = infer_steps(network.ops), _sources(network)
    same: dict[str, str] = {}
    ops: list[Op] = []
    for op in network.ops:
        op = dataclasses.replace(op, inputs=tuple(same.get(name, name) for name in op.inputs))
        source = sources.get(op.inputs[0])
        if isinstance(op, Quantize) and source is not None and steps[source] == op.step:
            same[op.output] = same.get(source, source)
        else:
            ops.append(op)
    network.replace(ops)


def quantize_layers(network: Network) -> None:
    """Q(layer(DQ(q))) with a weight in 8 bits as one operation."""
    sources, targets = _sources(network), _targets(network)
    ops: list[Op | None] = list(network.ops)
    for i, op in enumerate(network.ops):
        target = targets.get(op.output)
        if not isinstance(op, (Conv, Linear)) or len(op.inputs) != 1 or target is None:
            continue
        source, bits = sources.get(op.inputs[0]), network.eight_bits.get(op.weight)
        if source is None or bits is None or op.activation.kind not in FUSED_ACTIVATIONS:
            continue
        rounding = network.ops[target]
        assert isinstance(rounding, Quantize)
        shared: dict[str, Any] = {
            "inputs": (source,),
            "output": rounding.output,
            "weight": network.add_weight(f"{op.weight}:int8", bits.values),
            "scale": network.add_weight(f"{op.weight}:scale", bits.scale),
            "bias": op.bias,
            "step": rounding.step,
            "activation": op.activation,
        }
        if isinstance(op, Conv):
            geometry: dict[str, Any] = {name: getattr(op, name) for name in _GEOMETRY}
            ops[i] = QuantizedConv(**shared, **geometry)
        else:
            ops[i] = QuantizedLinear(**shared)
        ops[target] = None
    network.replace([op for op in ops if op])


def fuse_additions(network: Network) -> None:
    """Q(DQ(conv) + DQ(q)) as the convolution with a residual."""
    readers, makers, shapes = network.count_readers(), network.makers(), network.shapes()
    sources, targets = _sources(network), _targets(network)
    ops: list[Op | None] = list(network.ops)
    for i, op in enumerate(network.ops):
        target = targets.get(op.output)
        if not isinstance(op, Add) or target is None or op.activation.kind not in FUSED_ACTIVATIONS:
            continue
        if op.upsample == UNIT and shapes[op.inputs[0]] != shapes[op.inputs[1]]:
            continue
        given = [sources.get(name) for name in op.inputs]
        # Of two convolutions the later one; never the operand that is upsampled.
        numbers = [0] if op.upsample != UNIT else sorted((0, 1), key=lambda n: -makers.get(given[n] or "", -1))
        for number in numbers:
            name, other = given[number], given[1 - number]
            maker = makers.get(name or "")
            conv = None if maker is None else ops[maker]
            if name is None or other is None or maker is None or not isinstance(conv, QuantizedConv):
                continue
            alone = readers[name] == readers[op.inputs[number]] == 1
            if alone and len(conv.inputs) == 1 and conv.activation == NONE and name != other:
                rounding = network.ops[target]
                assert isinstance(rounding, Quantize)
                ops[maker] = ops[target] = None
                ops[i] = dataclasses.replace(
                    conv,
                    inputs=(conv.inputs[0], other),
                    output=rounding.output,
                    step=rounding.step,
                    upsample=op.upsample,
                    activation=op.activation,
                )
                break
    network.replace([op for op in ops if op])


def drop_unused(network: Network) -> None:
    """Without what nobody reads."""
    needed, kept = set(network.outputs), []
    for op in reversed(network.ops):
        if op.output in needed:
            needed.update(op.inputs)
            kept.append(op)
    network.replace(kept[::-1])


def _sources(network: Network) -> dict[str, str]:
    """For each dequantised value the one in 8 bits."""
    return {op.output: op.inputs[0] for op in network.ops if isinstance(op, Dequantize)}


def _targets(network: Network) -> dict[str, int]:
    """For each value that only a Q reads, the index of that."""
    readers = network.count_readers()
    found = {op.inputs[0]: i for i, op in enumerate(network.ops) if isinstance(op, Quantize)}
    return {name: i for name, i in found.items() if readers[name] == 1}
