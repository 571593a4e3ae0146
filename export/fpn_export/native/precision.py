"""Precision: the number type of each operation, and the tensors in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from fpn_engine.backends.native.cpu import DTYPES
from fpn_engine.backends.native.ops import BFLOAT16, FLOAT32, STORED, Cast, Concat, Conv, Linear, Op, Slice, WindowScore
from fpn_engine.backends.native.program import Program
from fpn_export.native.integers import use_integers
from fpn_export.native.network import Array, Network

Lowered = tuple[Program, dict[str, Tensor]]


def in_float32(network: Network) -> Lowered:
    """The program and its tensors as they are."""
    return network.program(), {name: torch.from_numpy(array) for name, array in network.weights.items()}


def in_bfloat16(network: Network, float32: Collection[str]) -> Lowered:
    """bfloat16 throughout, but for the layers that make the outputs ``float32``.

    Those run in float32 on what came before: scores and deltas are ranked and decoded, and rounding them to 8 bits
    would make ties of what differs. They are the smallest layers of a detector.
    """
    exact = _makers(network, float32)
    casts: dict[str, str] = {}
    ops: list[Op] = []
    outputs = list(network.outputs)
    for op in network.ops:
        if op.output in exact:
            for source in op.inputs:
                if source not in casts:
                    casts[source] = f"{source}:{FLOAT32}"
                    ops.append(Cast(inputs=(source,), output=casts[source], dtype=FLOAT32))
            op = dataclasses.replace(op, inputs=tuple(casts[source] for source in op.inputs))
        ops.append(op)
    _cast_others(ops, outputs, exact, float32)
    program = Program(input=network.input, input_dtype=BFLOAT16, ops=tuple(ops), outputs=tuple(outputs))
    return _convert(program, network.weights)


def in_int8(network: Network) -> Lowered:
    """What a quantised model says: layers between pairs in 8 bits, weights as int8, the rest in float32."""
    return in_float32(use_integers(network))


def in_half(network: Network, dtype: str, float32: Collection[str]) -> Lowered:
    """``dtype``, of 16 bits, throughout; the outputs ``float32`` are the unrounded sums of the layers that make them.

    As tensor cores have it: they multiply halves and add in float32. So no value is stored in float32 but these.
    """
    exact = _makers(network, float32)
    ops: list[Op] = []
    for op in network.ops:
        if op.output in exact:
            assert isinstance(op, (Conv, Linear))
            op = dataclasses.replace(op, dtype=FLOAT32)
        ops.append(op)
    outputs = list(network.outputs)
    _cast_others(ops, outputs, exact, float32)
    program = Program(input=network.input, input_dtype=dtype, ops=tuple(ops), outputs=tuple(outputs))
    return _convert(program, network.weights)


def _cast_others(ops: list[Op], outputs: list[str], exact: Collection[str], float32: Collection[str]) -> None:
    """Cast those of ``float32`` that no layer of ``exact`` makes."""
    joined = {op.output for op in ops if isinstance(op, (Slice, Concat)) and all(name in exact for name in op.inputs)}
    for name in sorted(set(float32) - {*exact} - joined):
        ops.append(Cast(inputs=(name,), output=f"{name}:{FLOAT32}", dtype=FLOAT32))
        outputs[outputs.index(name)] = f"{name}:{FLOAT32}"


def _makers(network: Network, names: Collection[str]) -> set[str]:
    """The layers of one input, without residual, that make ``names``, or what those are slices or joins of."""
    makers = network.makers()
    found: set[str] = set()
    for name in names:
        op = network.ops[makers[name]]
        made_of = op.inputs if isinstance(op, (Slice, Concat)) else (name,)
        if all(source in makers and _ends(network, network.ops[makers[source]], names) for source in made_of):
            found.update(made_of)
    return found


def _ends(network: Network, op: Op, names: Collection[str]) -> bool:
    """Whether nothing but the makers of ``names`` reads what a layer of one input, without residual, makes."""
    readers = {other.output for other in network.ops if op.output in other.inputs} - set(names)
    alone = isinstance(op, WindowScore) or (isinstance(op, (Conv, Linear)) and len(op.inputs) == 1)
    return alone and not readers


def _convert(program: Program, arrays: dict[str, Array]) -> Lowered:
    """Each tensor in the number type of its reader; one that is read in two types is stored in both."""
    dtypes = program.dtypes()
    weights: dict[str, Tensor] = {}
    ops = []
    for op in program.ops:
        dtype = dtypes[op.inputs[0]]
        renamed: dict[str, Any] = {}
        for field in STORED:
            if name := getattr(op, field, None):
                renamed[field] = key = name if dtype == program.input_dtype else f"{name}:{dtype}"
                if key not in weights:
                    weights[key] = torch.from_numpy(arrays[name]).to(DTYPES[dtype])
        ops.append(dataclasses.replace(op, **renamed))
    return dataclasses.replace(program, ops=tuple(ops)), weights
