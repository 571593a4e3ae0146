"""A module ``tensorrt`` made of the real one's surface: it refuses whatever the real one has not, and notes every call.

Classes do nothing by themselves; ``behaviours`` says what a method or property gives, by "Class.member".
"""

from __future__ import annotations

import enum
import importlib.machinery
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Behaviours = Mapping[str, Callable[..., Any]]
PLAIN: dict[str, Any] = {"bool": False, "int": 0, "str": "", "None": None, "object": None}


class StrictEnum(enum.Enum):
    """As pybind11 makes them: not an int, but one can be had of it."""

    def __int__(self) -> int:
        return int(self.value)

    __index__ = __int__


class StrictModule(types.ModuleType):
    """Attributes: calls: every call and every property that was set, in order, as text."""

    def __init__(self, surface: Mapping[str, Any], behaviours: Behaviours) -> None:
        super().__init__("tensorrt")
        self.__spec__ = importlib.machinery.ModuleSpec("tensorrt", None)  # torch asks every module for one
        self.__version__ = surface["version"]
        self.calls: list[str] = []
        self._behaviours = behaviours
        self._kinds: dict[str, type] = {}
        for name, members in surface["enums"].items():
            self._kinds[name] = StrictEnum(name.replace(".", "_"), members)
        waiting = dict(surface["classes"])
        while waiting:
            for name, described in list(waiting.items()):
                if not any(base in waiting for base in described["bases"]):
                    self._kinds[name] = self._make_class(name, described)
                    del waiting[name]
        for name, kind in self._kinds.items():
            outer, _, inner = name.rpartition(".")
            setattr(self._kinds[outer] if outer else self, inner, kind)

    def make(self, name: str, /, **state: Any) -> Any:
        """An object as TensorRT itself hands it out; ``state`` is for the behaviours, not for our code."""
        kind = self._kinds[name]
        made = kind.__new__(kind)
        object.__setattr__(made, "_ready", True)
        object.__setattr__(made, "_state", dict(state))
        return made

    def note(self, line: str) -> None:
        self.calls.append(line)

    def _make_class(self, name: str, described: Mapping[str, Any]) -> type:
        bases = tuple(self._kinds[base] for base in described["bases"] if base in self._kinds)[:1] or (object,)
        body: dict[str, Any] = {"__setattr__": self._setter(name, described["properties"])}
        for member, (gives, _) in described["properties"].items():
            body[member] = property(self._getter(name, member, gives))
        for member, overloads in described["methods"].items():
            if member == "__init__" or not member.startswith("__"):
                body[member] = self._method(name, member, overloads)
        if "__init__" not in described["methods"]:
            body["__init__"] = _refuse_making
        return type(name, bases, body)

    def _getter(self, name: str, member: str, gives: str) -> Callable[[Any], Any]:
        def get(this: Any) -> Any:
            if behave := self._behaviours.get(f"{name}.{member}"):
                return behave(self, this)
            return this.__dict__.get("=" + member, PLAIN.get(gives))

        return get

    def _setter(self, name: str, properties: Mapping[str, Any]) -> Callable[[Any, str, Any], None]:
        def set_(this: Any, member: str, value: Any) -> None:
            if member in properties:
                takes = properties[member][1]
                if takes is None:
                    raise AttributeError(f"{name}.{member} can be read only")
                if not self._takes(takes, value):
                    raise TypeError(f"{name}.{member} takes {takes}, not {value!r}")
                self.note(f"{name}.{member} = {_show(value)}")
                this.__dict__["=" + member] = value
            elif type(this) in self._kinds.values():
                raise AttributeError(f"{name} has no attribute {member}")
            else:  # a class of ours that derives from TensorRT's
                object.__setattr__(this, member, value)

        return set_

    def _method(self, name: str, member: str, overloads: Sequence[Any]) -> Callable[..., Any]:
        def call(this: Any, *args: Any, **keywords: Any) -> Any:
            gives, given = self._choose(f"{name}.{member}", overloads, args, keywords)
            if member == "__init__":
                object.__setattr__(this, "_ready", True)
                object.__setattr__(this, "_state", {})
            shown = ", ".join(f"{each}={_show(value)}" for each, value in given.items())
            self.note(f"{name}({shown})" if member == "__init__" else f"{name}.{member}({shown})")
            if behave := self._behaviours.get(f"{name}.{member}"):
                return behave(self, this, **given)
            return self.make(gives) if gives in self._kinds else PLAIN.get(gives)

        return call

    def _choose(
        self, what: str, overloads: Sequence[Any], args: tuple[Any, ...], keywords: Mapping[str, Any]
    ) -> tuple[str, dict[str, Any]]:
        """The overload that takes these arguments: what it returns, and they by name."""
        for parameters, gives in overloads:
            names = [name for name, *_ in parameters]
            given = {**dict(zip(names, args, strict=False)), **keywords}
            missing = [name for name, _, default in parameters if not default and name not in given]
            if len(args) > len(names) or len(given) != len(args) + len(keywords) or missing or set(given) - set(names):
                continue
            if all(self._takes(kind, given[name]) for name, kind, _ in parameters if name in given):
                return gives, given
        raise TypeError(f"{what} does not take {args} {dict(keywords)}; it has {overloads}")

    def _takes(self, kind: str, value: Any) -> bool:
        if kind in ("typing.SupportsInt", "int"):
            return not isinstance(value, (str, float)) and hasattr(value, "__int__")
        if kind in ("typing_extensions.Buffer", "buffer"):
            return isinstance(value, (bytes, bytearray, memoryview))
        if kind == "Dims":
            return isinstance(value, (tuple, list)) and all(isinstance(side, int) for side in value)
        if kind in self._kinds:
            return isinstance(value, self._kinds[kind]) and bool(getattr(value, "_ready", isinstance(value, enum.Enum)))
        plain: dict[str, Any] = {"str": str, "bool": bool, "tuple": tuple, "list": list, "object": object}
        return isinstance(value, plain[kind])


def _refuse_making(this: Any, *args: Any, **keywords: Any) -> None:
    raise TypeError(f"{type(this).__name__}: no constructor defined")


def _show(value: Any) -> str:
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, (bytes, bytearray, memoryview)):
        return f"<{len(value)} bytes>" if len(value) else "<nothing>"
    return repr(value) if isinstance(value, (int, str, tuple, list)) else f"<{type(value).__name__}>"
