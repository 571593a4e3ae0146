"""Processes of a data-parallel run, as torchrun starts them: one per GPU, each with its share of every batch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from fpn_engine.errors import FpnEngineError


@dataclass(frozen=True, slots=True, kw_only=True)
class Processes:
    """This process's ``rank`` of ``world_size``, and the device it trains on."""

    rank: int = 0
    world_size: int = 1
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world_size > 1:
            dist.barrier()

    def agree(self, wish: bool) -> bool:
        """Whether any process has the wish; all of them ask, and get the same answer."""
        if self.world_size == 1:
            return wish
        any_wish = torch.tensor(float(wish), device=self.device)
        dist.all_reduce(any_wish)
        return bool(any_wish > 0)


def join_processes(device: str | None = None) -> Processes:
    """Join the others that torchrun started, or stand alone; the device is CUDA where there is one.

    Raises: FpnEngineError for a device that is not there.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        chosen = None
    if chosen is None or chosen.type not in ("cpu", "cuda"):
        raise FpnEngineError(f"cannot train on {device}; --device is cpu or cuda")
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise FpnEngineError("there is no CUDA device here; train with --device cpu, fpn-engine doctor says more")
        local = int(os.environ.get("LOCAL_RANK", chosen.index or 0))
        if local >= torch.cuda.device_count():
            raise FpnEngineError(f"there are {torch.cuda.device_count()} GPUs; start at most as many processes")
        chosen = torch.device("cuda", local)
        torch.cuda.set_device(chosen)
    if world_size > 1:
        # The others wait while the first one scores the model.
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=timedelta(hours=6))
    return Processes(rank=rank, world_size=world_size, device=chosen)


def leave_processes(processes: Processes) -> None:
    """End what :func:`join_processes` began."""
    if processes.world_size > 1 and dist.is_initialized():
        dist.destroy_process_group()
