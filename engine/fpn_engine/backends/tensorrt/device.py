"""The CUDA device and its streams as the runtime needs them; tests put the CPU in its place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from fpn_engine.backends.tensorrt.target import Gpu
from fpn_engine.errors import BackendError


class CudaDevice:
    """One CUDA device, by default the current one.

    Raises: BackendError where there is none.
    """

    def __init__(self, index: int | None = None) -> None:
        if not torch.cuda.is_available():
            raise BackendError("the tensorrt backend needs a CUDA device and there is none; see: fpn-engine doctor")
        self.device = torch.device("cuda", torch.cuda.current_device() if index is None else index)
        properties = torch.cuda.get_device_properties(self.device)
        self.gpu = Gpu(name=properties.name, capability=(properties.major, properties.minor))
        self._own = torch.cuda.Stream(self.device)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def guard(self) -> contextlib.AbstractContextManager[object]:
        """Makes it the current device for a while, which is what TensorRT's objects are made for."""
        return torch.cuda.device(self.device)

    @property
    def is_capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    @contextlib.contextmanager
    def stream(self) -> Iterator[int]:
        """The handle of the current stream; of one of its own, in order with it, where that is the default stream.

        TensorRT waits for the whole device when it is given the default stream.
        """
        current = torch.cuda.current_stream(self.device)
        if current != torch.cuda.default_stream(self.device):
            yield current.cuda_stream
            return
        self._own.wait_stream(current)
        yield self._own.cuda_stream
        current.wait_stream(self._own)
