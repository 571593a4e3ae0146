"""The clock that tactics are measured by on CUDA."""

from __future__ import annotations

from collections.abc import Callable

import torch

FLUSHED_BYTES = 1 << 30  # several times the largest L2; writing it takes longer than queueing what is measured


class CudaClock:
    """Microseconds of a call between two events, behind a write that leaves nothing of the operands in the L2.

    The write keeps the device busy until the call is queued, so that the host's share does not count.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._flushed = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=device)

    def __call__(self, run: Callable[[], object]) -> float:
        with torch.cuda.device(self._device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flushed.fill_(0)
            start.record()
            run()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) * 1e3
