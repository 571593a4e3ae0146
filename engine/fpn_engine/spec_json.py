"""Specifications as JSON: what those of detectors and of mask proposals have in common."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Self

from fpn_engine.errors import SpecError


@dataclass(frozen=True, slots=True, kw_only=True)
class JsonSpec:
    """A dataclass that is stored as a JSON object; one with fields says how :meth:`from_values` converts them."""

    def to_dict(self) -> dict[str, Any]:
        """The spec as JSON-ready values; :meth:`from_dict` gives it back unchanged."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Self:
        return cls.from_dict(parse_spec_json(text))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build a spec from JSON values. Raises SpecError for unknown keys and wrong types."""
        if not isinstance(values, Mapping):
            raise SpecError(f"a model specification is a JSON object, not {type(values).__name__}")
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise SpecError(f"unknown key {unknown[0]!r} in the model specification; known keys: {', '.join(known)}")
        return cls.from_values(values)

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Self:
        """Build a spec from JSON values of known keys. Raises SpecError for wrong types."""
        raise NotImplementedError


def parse_spec_json(text: str) -> Any:
    """The values in a JSON text. Raises SpecError for what is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SpecError(f"the model specification is not valid JSON: {error}") from None


def convert_value(name: str, convert: Any, value: Any, whose: str = "the model specification") -> Any:
    """``convert(value)``, whose errors name the field of ``whose`` as SpecErrors."""
    try:
        return convert(value)
    except SpecError:
        raise
    except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
        raise SpecError(f"{name} in {whose} has a value of the wrong form: {error}") from None


def whole_number(value: Any) -> int:
    """Raises ValueError for anything else, a fraction, a truth value and a text included."""
    if isinstance(value, bool) or not isinstance(value, (Integral, float)) or value % 1:  # of infinity that is NaN
        raise ValueError(f"{value!r} is not a whole number")
    return int(value)


def finite_number(value: Any) -> float:
    """Raises ValueError for anything else, a truth value and a text included."""
    if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{value!r} is not a finite number")
    return float(value)


def truth_value(value: Any) -> bool:
    """Raises ValueError for anything but true and false."""
    if not isinstance(value, bool):
        raise ValueError(f"{value!r} is not true or false")
    return value
