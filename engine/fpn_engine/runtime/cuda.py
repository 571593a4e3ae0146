"""CUDA: streams, pinned memory and graphs of one device, as the runtime uses them."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from fpn_engine import beside
from fpn_engine.errors import BackendError, DeviceMemoryError
from fpn_engine.runtime.captured import CapturedRunner
from fpn_engine.runtime.gate import Gate
from fpn_engine.runtime.runner import AnyPipeline

StreamT = TypeVar("StreamT")
# A capture begins by waiting for the whole device, and no other may be under way then; nor may memory be given back.
_ONE_CAPTURE = threading.Lock()
# Decoders are libraries that make and free memory as they run; none is at it while something is captured.
DECODING = Gate()
# As what a lack of memory is reported, also inside libraries: torch passes over cuDNN's kernels that have no room.
_LACKS = ("out of memory", "STATUS_ALLOC_FAILED", "unable to find an engine")
_STREAMS = 32  # that torch hands out in turn
_in_use: weakref.WeakSet[CudaTransport] = weakref.WeakSet()


class CudaTransport:
    """Three streams of a CUDA device: for computing, for what may run beside it, for uploads.

    See :class:`fpn_engine.runtime.transport.Transport`.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with explaining(device), torch.cuda.device(device), _ONE_CAPTURE:
            taken = [stream for other in _in_use for stream in other.streams]
            self.stream = find_free_stream(taken, torch.cuda.Stream)
            self._uploads = find_free_stream([*taken, self.stream], torch.cuda.Stream)
            self._beside = find_free_stream(taken, partial(torch.cuda.Stream, priority=beside.PRIORITY))
            _in_use.add(self)

    @property
    def streams(self) -> tuple[torch.cuda.Stream, ...]:
        return self.stream, self._beside, self._uploads

    @contextmanager
    def computing(self) -> Iterator[None]:
        with (
            explaining(self.device),
            torch.cuda.device(self.device),
            torch.cuda.stream(self.stream),
            beside.using(self._beside),
        ):
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

    def place(self, image: Tensor, target: Tensor) -> None:
        image.record_stream(self._uploads)  # whoever decoded it may get its memory back only after this
        with torch.cuda.stream(self._uploads):
            target.copy_(image, non_blocking=True)

    def copy(self, source: Tensor, target: Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def launch(self, run: Callable[[], Tensor]) -> Tensor:
        return run()

    def download(self, source: Tensor, target: Tensor) -> CudaEvent:
        target.copy_(source, non_blocking=True)
        return CudaEvent(self.device)

    def keep(self, source: Tensor) -> tuple[Tensor, CudaEvent]:
        return source.clone(), CudaEvent(self.device)

    def hand_over(self, kept: Tensor) -> None:
        kept.record_stream(torch.cuda.current_stream(self.device))

    def release(self) -> None:
        with _ONE_CAPTURE:
            torch.cuda.empty_cache()


def find_free_stream(taken: Sequence[StreamT], make: Callable[[], StreamT]) -> StreamT:
    """One that is not ``taken`` if there is one: what another thread gives to a stream is captured with it."""
    stream = make()
    for _ in range(_STREAMS - 1):
        if stream not in taken:
            break
        stream = make()
    return stream


class CudaEvent:
    """All that was given to the current stream so far."""

    def __init__(self, device: torch.device) -> None:
        self.event = torch.cuda.Event()
        self.event.record()
        self._device = device

    def synchronize(self) -> None:
        with explaining(self._device):
            self.event.synchronize()


class CudaCapture:
    """Records CUDA graphs from one memory pool; see :class:`fpn_engine.runtime.graphs.Capture`.

    ``nbytes`` is what is less on the device afterwards beyond what torch took, so that other programs blur it.
    """

    def __init__(self, pipeline: AnyPipeline, transport: CudaTransport) -> None:
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
        with _ONE_CAPTURE, DECODING.alone():
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # the capture does the same; before it, so that what it frees is not counted
            free, reserved = torch.cuda.mem_get_info()[0], torch.cuda.memory_reserved()
            # thread_local: other threads go on allocating and launching, on streams of their own.
            with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                output = run()
            taken = free - torch.cuda.mem_get_info()[0]
            grown = max(0, torch.cuda.memory_reserved() - reserved)
        self.pool_bytes = self._measure_pool(grown)
        return CudaGraph(graph, stream, output, max(0, taken - grown), self._pipeline)

    def _measure_pool(self, grown: int) -> int:
        """The pool's size; where the allocator does not tell, by how much all of its memory has ``grown``.

        That would count what other threads took meanwhile, and graphs would be given up for it.
        """
        if torch.cuda.get_allocator_backend() != "native":
            return self.pool_bytes + grown
        segments = torch.cuda.memory_snapshot()
        return sum(segment["total_size"] for segment in segments if segment["segment_pool_id"] == self._pool)


class CudaGraph:
    """A graph, and what it reads and writes that is not of its pool: the buffers that the pipeline's parts had then.

    A part that replaces its buffers, as for a larger image, would free memory that the graph still uses.
    """

    def __init__(
        self, graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, output: Tensor, nbytes: int, pipeline: AnyPipeline
    ) -> None:
        self.output = output
        self.nbytes = nbytes
        self._graph = graph
        self._stream = stream
        self._held = [list(getattr(part, "buffers", ())) for part in pipeline.parts]

    def replay(self) -> None:
        self._graph.replay()

    def drop(self) -> None:
        self._stream.synchronize()  # a replay may be under way
        self._graph.reset()


def make_cuda_runner(
    pipeline: AnyPipeline, *, batch_size: int, graph_memory: int | None = None, lanes: int = 1
) -> CapturedRunner:
    """A runner for a pipeline on a CUDA device.

    Args: graph_memory: bytes; None takes half of what is free, shared by ``lanes``.
    """
    device = pipeline.device
    transport = CudaTransport(device)
    with explaining(device), torch.cuda.device(device):
        free = torch.cuda.mem_get_info()[0]
        capture = CudaCapture(pipeline, transport)
    limit = free // 2 // lanes if graph_memory is None else graph_memory // lanes
    return CapturedRunner(pipeline, transport, capture, batch_size=batch_size, graph_memory=limit)


@contextmanager
def explaining(device: torch.device) -> Iterator[None]:
    """CUDA's errors as ours. After any but a lack of memory the process cannot use the device any more."""
    try:
        yield
    except RuntimeError as error:  # of torch and of Triton, which share no narrower class
        message = str(error)
        if _is_lack_of_memory(error):
            raise DeviceMemoryError(f"{device} has too little free memory for this") from error
        if any(kind in message for kind in ("CUDA error", "[CUDA]", "cuDNN error")):
            reason = message.splitlines()[0]
            raise BackendError(f"{device} stopped working ({reason}); start the program again") from error
        raise


def _is_lack_of_memory(error: BaseException | None) -> bool:
    """Whether that is what happened first; a capture that it breaks off then fails with another error."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError) or any(lack in str(error) for lack in _LACKS):
            return True
        error = error.__context__
    return False
