"""What of the CUDA transport needs no GPU: which streams it takes, and what becomes of errors."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fpn_engine.errors import BackendError, DeviceMemoryError
from fpn_engine.runtime.cuda import DECODING, CudaCapture, explaining, find_free_stream

DEVICE = torch.device("cuda", 0)


def in_turn() -> Iterator[int]:
    """As torch hands out streams."""
    return itertools.cycle(range(32))


def test_no_two_share_a_stream() -> None:
    streams = in_turn()
    taken: list[int] = []
    for _ in range(5):
        taken.append(find_free_stream(taken, lambda: next(streams)))
        for _ in range(31):  # that others ask for meanwhile: the same one is next
            next(streams)
    assert len(set(taken)) == 5


def test_more_streams_than_there_are() -> None:
    streams = in_turn()
    assert find_free_stream(range(32), lambda: next(streams)) in range(32)


class FakeCuda:
    """What a capture asks of torch.cuda, with another thread that allocates meanwhile."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
        self.log: list[str] = []
        self.reserved = 1000
        fakes: dict[str, Any] = {
            "CUDAGraph": lambda: None,
            "graph": self.graph,
            "graph_pool_handle": lambda: (0, 7),
            "synchronize": lambda: self.log.append("synchronize"),
            "empty_cache": lambda: self.log.append("empty_cache"),
            "mem_get_info": lambda: (10_000 - self.reserved - 5 * self.log.count("end"), 10_000),
            "memory_reserved": lambda: self.reserved,
            "memory_snapshot": lambda: [
                {"segment_pool_id": (0, 0), "total_size": 4000},
                {"segment_pool_id": (0, 7), "total_size": 20},
                {"segment_pool_id": (0, 7), "total_size": 10},
            ],
            "get_allocator_backend": lambda: backend,
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    @contextmanager
    def graph(self, graph: Any, *, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        assert (pool, stream, capture_error_mode) == ((0, 7), "a stream", "thread_local")
        assert DECODING._alone == 1, "a decoder could break the capture"
        self.log.append("begin")
        yield
        self.reserved += 3000
        self.log.append("end")


@pytest.mark.parametrize(("backend", "size"), [("native", 30), ("cudaMallocAsync", 3000)])
def test_the_pool_is_what_it_holds(monkeypatch: pytest.MonkeyPatch, backend: str, size: int) -> None:
    """And it is run once more before it is recorded, in the thread that records."""
    cuda = FakeCuda(monkeypatch, backend)
    nothing = SimpleNamespace(parts=())
    capture = CudaCapture(nothing, SimpleNamespace(stream="a stream"))  # type: ignore[arg-type]

    def run() -> Tensor:
        cuda.log.append("run")
        return torch.ones(1)

    graph = capture(run)
    assert cuda.log == ["run", "synchronize", "empty_cache", "begin", "run", "end"]
    assert (capture.pool_bytes, graph.nbytes) == (size, 5)


@pytest.mark.parametrize(
    "message",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "CUDA error: out of memory",
        "Triton Error [CUDA]: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "GET was unable to find an engine to execute this computation",
    ],
)
def test_a_lack_of_memory(message: str) -> None:
    with pytest.raises(DeviceMemoryError, match="cuda:0 has too little free memory for this"), explaining(DEVICE):
        raise RuntimeError(message)


def test_a_capture_that_a_lack_of_memory_broke_off() -> None:
    @contextmanager
    def capturing() -> Iterator[None]:
        try:
            yield
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    with pytest.raises(DeviceMemoryError), explaining(DEVICE), capturing():
        raise torch.OutOfMemoryError("no room")


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: an illegal memory access was encountered",
        "Triton Error [CUDA]: misaligned address",
        "cuDNN error: X",
    ],
)
def test_a_device_that_stopped(message: str) -> None:
    with (
        pytest.raises(BackendError, match=r"^cuda:0 stopped working .*; start the program again$"),
        explaining(DEVICE),
    ):
        raise RuntimeError(f"{message}\nsearch for it")


def test_other_errors_are_left() -> None:
    with pytest.raises(RuntimeError, match="a bug"), explaining(DEVICE):
        raise RuntimeError("a bug")
