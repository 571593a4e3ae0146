"""Packing: the files of a native plan, operations as JSON and tensors as safetensors."""

from __future__ import annotations

from collections.abc import Mapping

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from fpn_engine.backends.native.cpu import DTYPES
from fpn_engine.backends.native.program import Program, read_program
from fpn_engine.masks.spec import AnySpec

TACTICS = "tactics.json"  # the part of a CUDA plan beside trunk and head


def part_names(spec: AnySpec, device: str = "cpu") -> list[str]:
    """The files of a native plan."""
    names = [f"{part}.{kind}" for part in ("trunk", *spec.head_names) for kind in ("json", "safetensors")]
    return [*names, TACTICS] if device == "cuda" else names


def pack_part(name: str, program: Program, weights: Mapping[str, Tensor]) -> dict[str, bytes]:
    """The two files of a part: the program and its tensors."""
    tensors = {key: weights[key].contiguous() for key in program.weights()}
    return {f"{name}.json": program.to_json().encode(), f"{name}.safetensors": safetensors.torch.save(tensors)}


def unpack_part(name: str, parts: Mapping[str, bytes]) -> tuple[Program, dict[str, Tensor]]:
    """What :func:`pack_part` packed. Raises ValueError that says what is wrong."""
    try:
        weights = safetensors.torch.load(parts[f"{name}.safetensors"])
    except (SafetensorError, ValueError, KeyError, RuntimeError, OverflowError):
        raise ValueError(f"{name}.safetensors is no safetensors file") from None
    try:
        program = read_program(parts[f"{name}.json"], {key: tuple(tensor.shape) for key, tensor in weights.items()})
        _check_dtypes(program, weights)
    except ValueError as error:
        raise ValueError(f"{name}.json: {error}") from None
    return program, weights


def _check_dtypes(program: Program, weights: Mapping[str, Tensor]) -> None:
    """A tensor has the number type that the operations which read it ask for."""
    dtypes = program.dtypes()
    for op in program.ops:
        for key, dtype in op.tensor_dtypes(dtypes[op.inputs[0]]).items():
            if weights[key].dtype != DTYPES[dtype]:
                raise ValueError(f"{op.KIND} {op.output} has a tensor {key} of another number type")
