"""Triton tactics of small layers and of a single number, with a driver that compiles and launches nothing.

    python -m tests.engine.native.cuda.compile_works

goes the way of a launch on a GPU, where Triton itself finds the types of the arguments; prints how many kernels it
compiled. Must not be interpreted: TRITON_INTERPRET unset.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fpn_engine.backends.native.cpu import DTYPES
from fpn_engine.backends.native.cuda.compiling import compile_ahead
from fpn_engine.backends.native.cuda.runs import Weights, make_tactic_run
from fpn_engine.backends.native.cuda.tactics import CUDNN_EPILOGUE, Tactic, candidates, choose
from fpn_engine.backends.native.cuda.work import Work
from fpn_engine.backends.native.ops import FLOAT32
from fpn_kernels.triton.max_pool import launch_max_pool
from tests.engine.native.cuda.works import H200, SMALL, conv, linear
from tests.kernels.compile_launches import NoDevice

ONES = {
    "one": conv(1, 1, 1, 1, dtype=FLOAT32, has_residual=True),
    "one half": conv(1, 1, 1, 1, 3),
    "one row": linear(1, 1, 1),
}
AHEAD = ("lateral", "rows", "stem")
compiled: set[Any] = set()


def compile_only(kernel: JITFunction, grid: tuple[int, ...]) -> Callable[..., Any]:
    def compile_it(*arguments: Any, **constants: Any) -> None:
        made = kernel.run(*arguments, grid=grid, warmup=True, **constants)
        assert made.asm["cubin"]
        assert made.metadata.shared <= H200.shared_bytes
        compiled.add(made.hash)

    return compile_it


def tactics_of(name: str, work: Work) -> list[Tactic]:
    if name in SMALL:
        return [tactic for tactic in candidates(work, H200, "quick") if not tactic.makes_its_output][:2]
    return [choose(work, H200)]


def compile_work(tactic: Tactic, work: Work) -> None:
    dtype = DTYPES[work.dtype]
    given = {name: torch.zeros(shape, dtype=dtype) for name, shape in work.operands().items()}
    run = make_tactic_run(tactic, work.op(), work, Weights(given), H200.processors)
    run([given[name] for name in work.op().inputs], torch.empty(work.out, dtype=DTYPES[work.out_dtype]))


def compile_all() -> None:
    for name, work in (ONES | SMALL).items():
        for tactic in tactics_of(name, work):
            if tactic.tile or tactic.name == CUDNN_EPILOGUE:
                compile_work(tactic, work)
    for c in (1, 64):
        launch_max_pool(torch.empty(1, 4, 4, c), torch.empty(1, 2, 2, c), (3, 3), (2, 2), (1, 1))


def compile_ahead_of_time() -> None:
    """What is compiled ahead, by several threads, of tensors without memory, is what is asked for afterwards."""
    works = [work for name, work in SMALL.items() if name in AHEAD]
    make = lambda tactic, work, given: make_tactic_run(tactic, work.op(), work, Weights(given), H200.processors)  # noqa: E731
    compile_ahead(works, H200, "quick", torch.device("cpu"), make, threads=3)
    with mock.patch.object(JITFunction, "_do_compile", side_effect=AssertionError("compiled anew")):
        for work in works:
            for tactic in candidates(work, H200, "quick"):
                if tactic.tile is not None:
                    compile_work(tactic, work)


if __name__ == "__main__":
    driver.set_active(NoDevice())
    with mock.patch.object(JITFunction, "__getitem__", compile_only):
        compile_ahead_of_time()
        compile_all()
    print(len(compiled))
