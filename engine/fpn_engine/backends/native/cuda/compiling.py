"""Compiling ahead: Triton's kernels of all tactics that are to be measured, on all cores.

One after another they would take most of the time of tuning.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from fpn_engine.backends.native.cpu import DTYPES
from fpn_engine.backends.native.cpu_convolution import Run
from fpn_engine.backends.native.cuda.gpu import Gpu
from fpn_engine.backends.native.cuda.tactics import Tactic, candidates
from fpn_engine.backends.native.cuda.work import Work
from fpn_kernels.triton.launching import compiling

MakeRun = Callable[[Tactic, Work, dict[str, Tensor]], Run]


def compile_ahead(
    works: Iterable[Work],
    gpu: Gpu,
    level: str,
    device: torch.device,
    make_run: MakeRun,
    *,
    is_over: Callable[[], bool] = lambda: False,
    threads: int | None = None,
) -> None:
    """Compile what :func:`candidates` gives for each piece of work, for ``device``; memory is not touched.

    What does not compile is left for whoever measures, and says so.

    Args:
        make_run: makes the function of a tactic.
        is_over: whether to begin nothing more.
        threads: None takes one for each core.
    """
    jobs = [(work, tactic) for work in works for tactic in candidates(work, gpu, level) if tactic.tile is not None]

    def compile_one(job: tuple[Work, Tactic]) -> None:
        if is_over():
            return
        work, tactic = job
        with torch.inference_mode(), compiling():
            if device.type == "cuda":
                torch.cuda.set_device(device)  # of this thread
            given = {name: absent(shape, work.dtype) for name, shape in work.operands().items()}
            try:
                run = make_run(tactic, work, given)
                run([given[name] for name in work.op().inputs], absent(work.out, work.out_dtype))
            except Exception:  # compilers have no common one
                return

    with ThreadPoolExecutor(threads or os.cpu_count() or 1) as pool:
        list(pool.map(compile_one, jobs))


def absent(shape: tuple[int, ...], dtype: str) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=DTYPES[dtype], device="meta")
