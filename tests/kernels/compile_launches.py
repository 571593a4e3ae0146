"""Every launcher on one element of everything, with a driver that compiles and launches nothing.

    python -m tests.kernels.compile_launches

prints the name of each kernel. Unlike ``fpn_kernels.aot`` it goes the way of a launch on a GPU: Triton itself finds the
types of the arguments, makes constants of ones, and reads tuples. Must not be interpreted: TRITON_INTERPRET unset.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fpn_kernels.triton import (
    candidates,
    decode,
    finiteness,
    kept,
    nms,
    nms_chunks,
    preprocess,
    roi_align,
    roi_pool,
    selection,
    topdown,
    windows,
)

ONE, SIZE = torch.ones(1, dtype=torch.int64), torch.ones(1, 2, dtype=torch.int64)
FORM = ((4.0,), 2, 4, 224.0)


class NoDevice:
    """A driver of a device that compiles for compute capability 9.0."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def compile_only(kernel: JITFunction, grid: tuple[int, ...]) -> Callable[..., Any]:
    def compile_it(*arguments: Any, **constants: Any) -> None:
        assert kernel.run(*arguments, grid=grid, warmup=True, **constants).asm["cubin"]
        print(kernel.__name__)

    return compile_it


def launch_all() -> None:
    level, deltas, box, roi = (torch.zeros(shape) for shape in ((1, 1, 1, 1), (1, 4, 1, 1), (1, 1, 4), (1, 5)))
    score = torch.zeros(1, 1)
    preprocess.launch_preprocess(
        torch.zeros(3, dtype=torch.uint8), 0 * ONE, SIZE, SIZE, (1, 1), (0.0,) * 3, (1.0,) * 3, False, True, torch.half
    )
    topdown.launch_topdown_merge(level, level)
    topdown.launch_lateral_merge(level, score, None, level)
    with mock.patch.multiple(selection, LISTED=2):
        selection.launch_select_topk([level.expand(1, 1, 1, 3)], 1)
    decode.launch_decode_proposals(score, SIZE[:, :1] - 1, [deltas], box, (1, 1), SIZE, 1, 1.0, 0.0)
    nms.launch_padded_nms(box, score, SIZE[:, :1], 0.5, 1)
    with mock.patch.multiple(nms_chunks, BLOCK=32, CHUNK=32):
        nms_chunks.launch_in_chunks(
            *(part.expand(1, 33, *part.shape[2:]) for part in (box, score, SIZE[:, :1])), 0.5, 1
        )
    candidates.launch_select_candidates(
        torch.zeros(1, 2), torch.zeros(1, 8), box, ONE, SIZE, 0.0, 1.0, (1.0, 1.0, 1.0, 1.0), 1
    )
    kept.launch_take_proposals(SIZE[:, :1] - 1, box, score)
    kept.launch_take_detections(SIZE[:, :1] - 1, box, score, SIZE[:, :1])
    finiteness.launch_find_nonfinite([level, level.half().expand(1, 1, 1, 2), level.expand(1, 1, 1, 2)], None)
    roi_align.launch_multilevel_roi_align([level], roi, None, 1, FORM[0], 1, True, *FORM[1:])
    roi_align.launch_multilevel_roi_align_backward(level, [1, 1, 1], roi, ONE, FORM[0], 0, False, *FORM[1:])
    roi_pool.launch_multilevel_roi_pool([level], roi, None, 1, *FORM)
    roi_pool.launch_multilevel_roi_pool_backward(level, [level], roi, ONE, *FORM)
    place = SIZE.repeat(1, 2)
    windows.launch_gather_windows([level], place, 1)
    windows.launch_gather_windows_backward(level, [1, 1, 1], place)
    windows.launch_window_linear([level], place, score, None, 1, False)


if __name__ == "__main__":
    driver.set_active(NoDevice())
    with mock.patch.object(JITFunction, "__getitem__", compile_only):
        launch_all()
