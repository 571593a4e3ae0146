"""A program: the operations of a trunk or box head in order, as JSON, read with suspicion."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from fpn_engine.backends.native.ops import DTYPES, FLOAT32, OPS, UINT8, Activation, Op, Slice
from fpn_engine.backends.native.quantized import QUANTIZED_OPS
from fpn_engine.backends.native.shapes import infer_dtypes, infer_steps

FORMAT_VERSION = 1
MAX_OPS = 10_000
MAX_INTEGER = 1 << 16  # no kernel, stride, group or scale of a detector is larger
# Where zero means something; elsewhere the smallest integer is 1.
_FROM_ZERO = frozenset({"padding", "start"})
_KEYS = {"format_version", "input", "input_dtype", "ops", "outputs"}
_KINDS = {kind.KIND: kind for kind in (*OPS, *QUANTIZED_OPS)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """What to do with ``input``, (N, H, W, C) or (R, F) of ``input_dtype``, to make ``outputs``.

    Raises: ValueError if a name is made twice or read before it is made, an output is missing or is the input, number
        types are mixed, a slice is read by another operation, or an output is of 8 bits.
    """

    input: str
    input_dtype: str = FLOAT32
    ops: tuple[Op, ...]
    outputs: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.input_dtype not in DTYPES:
            raise ValueError(f"a number type is one of {', '.join(DTYPES)}, not {self.input_dtype!r}")
        made = {self.input}
        sliced = {op.output for op in self.ops if isinstance(op, Slice)}
        for op in self.ops:
            for name in op.inputs:
                if name not in made:
                    raise ValueError(f"{op.KIND} {op.output} reads {name}, which is not made before it")
                if name in sliced:
                    raise ValueError(f"{op.KIND} {op.output} reads the slice {name}")
            if op.output in made:
                raise ValueError(f"{op.output} is made twice")
            made.add(op.output)
        for name in self.outputs:
            if name not in made or name == self.input:
                raise ValueError(f"the output {name} is not made")
        if not self.outputs or len(set(self.outputs)) != len(self.outputs):
            raise ValueError("the outputs must be at least one, and distinct")
        dtypes = self.dtypes()
        if eight_bits := [name for name in self.outputs if dtypes[name] == UINT8]:
            raise ValueError(f"the output {eight_bits[0]} is of 8 bits, which nobody outside reads")

    def dtypes(self) -> dict[str, str]:
        """The number type of every value."""
        return infer_dtypes(self.ops, {self.input: self.input_dtype})

    def steps(self) -> dict[str, float]:
        """The step of every value of 8 bits."""
        return infer_steps(self.ops)

    def weights(self) -> list[str]:
        """Names of the stored tensors, each once, in order of use."""
        return list(dict.fromkeys(name for op in self.ops for name in op.weights))

    def to_json(self) -> str:
        ops = [{"kind": op.KIND, **_without_defaults(op)} for op in self.ops]
        return json.dumps(
            {
                "format_version": FORMAT_VERSION,
                "input": self.input,
                "input_dtype": self.input_dtype,
                "ops": ops,
                "outputs": self.outputs,
            },
            indent=1,
        )


def read_program(data: bytes, weights: Mapping[str, Sequence[int]]) -> Program:
    """The program that :meth:`Program.to_json` wrote.

    Args: weights: shapes of the stored tensors, every one of which must be used.
    Raises: ValueError that says what is wrong.
    """
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        raise ValueError("it is not JSON") from None
    if not isinstance(values, dict) or set(values) != _KEYS:
        raise ValueError("it has not the keys of a program")
    if values["format_version"] != FORMAT_VERSION:
        raise ValueError(f"its format is {values['format_version']!r}, not {FORMAT_VERSION}")
    listed = values["ops"]
    if not isinstance(listed, list) or len(listed) > MAX_OPS:
        raise ValueError(f"its ops are no list of at most {MAX_OPS}")
    program = Program(
        input=_read(str, values["input"], "input"),
        input_dtype=_read(str, values["input_dtype"], "input_dtype"),
        ops=tuple(_read_op(op) for op in listed),
        outputs=_read(tuple[str, ...], values["outputs"], "outputs"),
    )
    used = set(program.weights())
    if odd := sorted(used ^ set(weights)):
        raise ValueError(f"the tensor {odd[0]} is {'missing' if odd[0] in used else 'not used'}")
    return program


def _without_defaults(value: Any) -> dict[str, Any]:
    """The fields of a dataclass that are not as they are anyway."""
    found = {}
    for field in dataclasses.fields(value):
        content = getattr(value, field.name)
        if content != field.default:
            found[field.name] = _without_defaults(content) if dataclasses.is_dataclass(content) else content
    return found


def _read_op(values: Any) -> Op:
    if not isinstance(values, dict) or not isinstance(values.get("kind"), str) or values["kind"] not in _KINDS:
        kind = values.get("kind") if isinstance(values, dict) else values
        raise ValueError(f"there is no operation {str(kind)[:50]!r}")
    kind = _KINDS[values["kind"]]
    return typing.cast(Op, _read_fields(kind, {k: v for k, v in values.items() if k != "kind"}, kind.KIND))


@cache
def _fields(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _read_fields(kind: Any, values: Mapping[str, Any], where: str) -> Any:
    known = _fields(kind)
    if unknown := sorted(set(values) - set(known)):
        raise ValueError(f"{where} has no {unknown[0][:50]!r}")
    try:
        return kind(**{name: _read(known[name], value, f"{where}.{name}") for name, value in values.items()})
    except TypeError:
        raise ValueError(f"{where} is incomplete") from None


def _read(kind: Any, value: Any, where: str) -> Any:
    """``value`` as a field of type ``kind``; ``where`` is its name for messages."""
    if isinstance(kind, types.UnionType):  # str | None
        return None if value is None else _read(str, value, where)
    if typing.get_origin(kind) is tuple:
        return _read_tuple(typing.get_args(kind), value, where)
    if kind is Activation:
        if not isinstance(value, dict):
            raise ValueError(f"{where} is {value!r}")
        return _read_fields(Activation, value, where)
    if kind is float:
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ValueError(f"{where} is {value!r}")
        return float(value)
    if type(value) is not kind or (kind is str and not value):
        raise ValueError(f"{where} is {str(value)[:50]!r}")
    if kind is int and not int(where.rpartition(".")[2] not in _FROM_ZERO) <= value <= MAX_INTEGER:
        raise ValueError(f"{where} is {value}")
    return value


def _read_tuple(kinds: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise ValueError(f"{where} is no list")
    if kinds[-1] is Ellipsis:
        return tuple(_read(kinds[0], item, where) for item in value)
    if len(value) != len(kinds):
        raise ValueError(f"{where} has {len(value)} numbers")
    return tuple(_read(kind, item, where) for kind, item in zip(kinds, value, strict=True))
