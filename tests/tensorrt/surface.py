"""The surface of TensorRT's real bindings: every class, method, signature, property and enum member, as data.

Run as ``python surface.py BINDINGS STAND_INS``, in a process of its own since one process can import one version only;
prints JSON. ``read_surface`` runs it.
"""

from __future__ import annotations

import ctypes
import importlib
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

PREFIX = re.compile(r"\btensorrt_bindings\.tensorrt\.|\bnvonnxparser::I?")
OPEN, CLOSE = "([{<", ")]}>"


def read_surface(bindings: Path, stand_ins: Path) -> dict[str, Any]:
    """``version``; ``enums``: name to members; ``classes``: name to bases, methods and properties.

    A method is a list of overloads, each a list of [name, type, has a default] without self, and its return type. A
    property is [type it gives, type it takes or None]. Types are as the bindings write them.
    """
    command = [sys.executable, "-P", __file__, str(bindings), str(stand_ins)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    surface: dict[str, Any] = json.loads(done.stdout)
    return surface


def describe(module: Any) -> dict[str, Any]:
    enums: dict[str, dict[str, int]] = {}
    classes: dict[str, Any] = {}
    for name, value in vars(module).items():
        if isinstance(value, type):
            _describe_class(name, value, enums, classes)
    return {"version": module.__version__, "enums": enums, "classes": classes}


def _describe_class(name: str, cls: type, enums: dict[str, dict[str, int]], classes: dict[str, Any]) -> None:
    if hasattr(cls, "__members__"):
        enums[name] = {member: int(value) for member, value in cls.__members__.items()}
        return
    methods: dict[str, Any] = {}
    properties: dict[str, Any] = {}
    for member in dir(cls):
        value = inspect.getattr_static(cls, member)
        if isinstance(value, type) and member != "__class__":
            _describe_class(f"{name}.{member}", value, enums, classes)
        elif isinstance(value, property):
            properties[member] = [_returned(value.fget), _taken(value.fset)]
        elif callable(value) and (overloads := _overloads(member, value.__doc__ or "")):
            methods[member] = overloads
    bases = [base.__name__ for base in cls.__mro__[1:] if base.__module__.startswith("tensorrt")]
    classes[name] = {"bases": bases, "methods": methods, "properties": properties}


def _overloads(name: str, text: str) -> list[list[Any]]:
    """Every line of a docstring that is a signature of ``name``."""
    found = []
    for line in text.splitlines():
        match = re.match(rf"(?:\d+\. )?{re.escape(name)}\((.*)\) -> (.+)$", line.strip())
        if match and "*args" not in match[1]:
            found.append([_parameters(match[1]), _clean(match[2])])
    return found


def _parameters(text: str) -> list[list[Any]]:
    """[name, type, has a default] of each parameter but self."""
    parts, depth, start = [], 0, 0
    for index, character in enumerate(text):
        depth += (character in OPEN) - (character in CLOSE and text[index - 1] != "-")
        if character == "," and depth == 0:
            parts.append(text[start:index])
            start = index + 1
    parts.append(text[start:])
    found = []
    for part in parts:
        name, _, rest = part.strip().partition(":")
        kind, equals, _ = rest.partition(" = ")
        if name and name != "self":
            found.append([name, _clean(kind.strip()), bool(equals)])
    return found


def _returned(getter: Any) -> str:
    text = (getter.__doc__ or "") if getter else ""
    return _clean(text.partition("->")[2].strip().splitlines()[0]) if "->" in text else "object"


def _taken(setter: Any) -> str | None:
    if setter is None:
        return None
    match = re.search(r"\((.*)\) -> None", setter.__doc__ or "")
    parameters = _parameters(match[1]) if match else []
    return str(parameters[-1][1]) if parameters else "object"


def _clean(kind: str) -> str:
    return PREFIX.sub("", kind)


if __name__ == "__main__":
    folder, libraries = sys.argv[1:]
    loaded = [ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL) for path in sorted(Path(libraries).glob("lib*.so.*"))]
    sys.path.insert(0, folder)
    json.dump(describe(importlib.import_module("tensorrt_bindings")), sys.stdout)
