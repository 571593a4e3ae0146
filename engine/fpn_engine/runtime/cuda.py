"""CUDA: streams, pinned memory and graphs of one device, as the runtime uses them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fpn_engine.errors import BackendError, DeviceMemoryError
from fpn_engine.pipeline import Pipeline
from fpn_engine.runtime.captured import CapturedRunner

# A capture begins by waiting for the whole device, and no other may be under way then; nor may memory be given back.
_ONE_CAPTURE = threading.Lock()


class CudaTransport:
    """Two streams of a CUDA device; see :class:`fpn_engine.runtime.transport.Transport`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with _explaining(device), torch.cuda.device(device):
            self.stream = torch.cuda.Stream()
            self._uploads = torch.cuda.Stream()

    @contextmanager
    def computing(self) -> Iterator[None]:
        with _explaining(self.device), torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            yield

    def host_buffer(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def device_buffer(self, size: int) -> Tensor:
        buffer = torch.empty(size, dtype=torch.uint8, device=self.device)
        self._uploads.wait_stream(self.stream)  # which may still use what lay there before
        return buffer

    def upload(self, source: Tensor, target: Tensor) -> CudaEvent:
        with torch.cuda.stream(self._uploads):
            target.copy_(source, non_blocking=True)
            uploaded = CudaEvent(self.device)
        self.stream.wait_event(uploaded.event)
        return uploaded

    def copy(self, source: Tensor, target: Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def launch(self, run: Callable[[], Tensor]) -> Tensor:
        return run()

    def download(self, source: Tensor, target: Tensor) -> CudaEvent:
        target.copy_(source, non_blocking=True)
        return CudaEvent(self.device)

    def release(self) -> None:
        with _ONE_CAPTURE:
            torch.cuda.empty_cache()


class CudaEvent:
    """All that was given to the current stream so far."""

    def __init__(self, device: torch.device) -> None:
        self.event = torch.cuda.Event()
        self.event.record()
        self._device = device

    def synchronize(self) -> None:
        with _explaining(self._device):
            self.event.synchronize()


class CudaCapture:
    """Records CUDA graphs from one memory pool; see :class:`fpn_engine.runtime.graphs.Capture`.

    Memory is taken as the difference in what is free on the device, so that other programs blur ``nbytes``.
    """

    def __init__(self, pipeline: Pipeline, transport: CudaTransport) -> None:
        self._pipeline = pipeline
        self._transport = transport
        self.renew()

    def renew(self) -> None:
        self.pool_bytes = 0
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Tensor]) -> CudaGraph:
        stream = self._transport.stream
        graph = torch.cuda.CUDAGraph()
        run()  # in this thread: cuDNN's and cuBLAS's handles are a thread's own, and cannot be made during a capture
        with _ONE_CAPTURE:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # the capture does the same; before it, so that what it frees is not counted
            free, reserved = torch.cuda.mem_get_info()[0], torch.cuda.memory_reserved()
            # thread_local: other threads go on allocating and launching, on streams of their own.
            with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                output = run()
            taken = free - torch.cuda.mem_get_info()[0]
            grown = max(0, torch.cuda.memory_reserved() - reserved)
        self.pool_bytes += grown
        return CudaGraph(graph, stream, output, max(0, taken - grown), self._pipeline)


class CudaGraph:
    """A graph, and what it reads and writes that is not of its pool: the buffers that the pipeline's parts had then.

    A part that replaces its buffers, as for a larger image, would free memory that the graph still uses.
    """

    def __init__(
        self, graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, output: Tensor, nbytes: int, pipeline: Pipeline
    ) -> None:
        self.output = output
        self.nbytes = nbytes
        self._graph = graph
        self._stream = stream
        self._held = [list(getattr(part, "buffers", ())) for part in (pipeline.trunk, pipeline.head)]

    def replay(self) -> None:
        self._graph.replay()

    def drop(self) -> None:
        self._stream.synchronize()  # a replay may be under way
        self._graph.reset()


def make_cuda_runner(
    pipeline: Pipeline, *, batch_size: int, graph_memory: int | None = None, lanes: int = 1
) -> CapturedRunner:
    """A runner for a pipeline on a CUDA device.

    Args: graph_memory: bytes; None takes half of what is free, shared by ``lanes``.
    """
    device = pipeline.device
    transport = CudaTransport(device)
    with _explaining(device), torch.cuda.device(device):
        free = torch.cuda.mem_get_info()[0]
        capture = CudaCapture(pipeline, transport)
    limit = free // 2 // lanes if graph_memory is None else graph_memory // lanes
    return CapturedRunner(pipeline, transport, capture, batch_size=batch_size, graph_memory=limit)


@contextmanager
def _explaining(device: torch.device) -> Iterator[None]:
    """CUDA's errors as ours. After any but a lack of memory the process cannot use the device any more."""
    try:
        yield
    except RuntimeError as error:  # of torch and of Triton, which share no narrower class
        message = str(error)
        if _is_lack_of_memory(error):
            raise DeviceMemoryError(f"{device} has too little free memory for this") from error
        if "CUDA error" in message or "[CUDA]" in message:
            reason = message.splitlines()[0]
            raise BackendError(f"{device} stopped working ({reason}); start the program again") from error
        raise


def _is_lack_of_memory(error: BaseException | None) -> bool:
    """Whether that is what happened first; a capture that it breaks off then fails with another error."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):
            return True
        error = error.__context__
    return False
