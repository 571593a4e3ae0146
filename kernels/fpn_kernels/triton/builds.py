"""Builds: what a kernel is compiled with, without a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """One specialisation of a kernel, as its launcher uses it on real shapes.

    Attributes:
        kernel: the ``triton.jit`` function. variant: what sets this build apart from others of it.
        signature: the type of each argument that is not a constant, such as "*fp32" or "i32", in order; of a tuple,
            its elements' types.
        constants: the value of each ``tl.constexpr``.
        num_warps, num_stages: as launched. divisible: arguments that are known to be multiples of 16.
    """

    kernel: Any
    variant: str = ""
    signature: Mapping[str, str | tuple[str, ...]]
    constants: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    divisible: tuple[str, ...] = ()
