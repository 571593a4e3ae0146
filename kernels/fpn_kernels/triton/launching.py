"""Launching a kernel, or compiling it alone: what is to be measured can so be compiled on all cores before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_is_compiling: ContextVar[bool] = ContextVar("compiling", default=False)


@contextmanager
def compiling() -> Iterator[None]:
    """Inside, and in this thread alone, :func:`launch` compiles and launches nothing; tensors may be on "meta"."""
    token = _is_compiling.set(True)
    try:
        yield
    finally:
        _is_compiling.reset(token)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """``kernel[grid](*arguments, **constants)``."""
    if _is_compiling.get():
        kernel.warmup(*arguments, grid=grid, **constants)
    else:
        kernel[grid](*arguments, **constants)
