"""ONNX Runtime on torch tensors where they lie: bound by address, so that nothing is copied."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fpn_engine.errors import BackendError

TYPES = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16}
NUMPY = {torch.float32: np.float32, torch.float16: np.float16}  # which is what a binding takes
NO_WAITING = ("disable_synchronize_execution_providers", "1")  # a run ends when its work is given to the stream


class Place(Protocol):
    """Where a session runs.

    Attributes:
        device: where its tensors are. known_as: what ONNX Runtime calls that, kind and number.
        handle: of the session's own stream; 0 is none.
    """

    device: torch.device
    known_as: tuple[str, int]
    handle: int

    def running(self) -> contextlib.AbstractContextManager[None]:
        """A run inside comes after what the caller's stream was given before, and before what it is given later."""
        ...


class CpuPlace:
    """Host memory, where a run is over when it returns."""

    device = torch.device("cpu")
    known_as = ("cpu", 0)
    handle = 0

    def running(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


class CudaPlace:
    """A CUDA device and a stream of the sessions' own, in order with the caller's current one.

    A session keeps the stream that it was made with, while the engine makes its own later, and stream 0 counts as none:
    so that the two wait for each other by events, and the host for neither.
    """

    def __init__(self, device: torch.device) -> None:
        number = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", number)
        self.known_as = ("cuda", number)
        self._stream = torch.cuda.Stream(self.device)
        self.handle = self._stream.cuda_stream

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.device(self.device):
                yield
        finally:  # also for what failed half-way: memory that it may still write is the current stream's to reuse
            current.wait_stream(self._stream)


class BoundSession:
    """A session of one input that reads and writes tensors on ``place``. Several threads may call it.

    Raises: BackendError for an input or output of another number type than float32 and float16.
    """

    def __init__(self, session: Any, place: Place) -> None:
        import onnxruntime as ort

        self._session, self._place = session, place
        values = [*session.get_inputs(), *session.get_outputs()]
        if odd := [value for value in values if value.type not in TYPES]:
            raise BackendError(f"the model's {odd[0].name} is a {odd[0].type}; build the plan again")
        self._types = {value.name: TYPES[value.type] for value in values}
        self._input = session.get_inputs()[0].name
        self.outputs: list[str] = [value.name for value in session.get_outputs()]
        self._options = ort.RunOptions()
        self._options.add_run_config_entry(*NO_WAITING)

    def __call__(self, value: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """The outputs by name, in tensors of their own.

        Args: value: the input, on the session's device; cast and made dense if it is not. shapes: of the outputs.
        Raises: BackendError if ONNX Runtime fails.
        """
        device = self._place.device
        value = value.to(device, self._types[self._input]).contiguous()
        outputs = {name: torch.empty(shapes[name], dtype=self._types[name], device=device) for name in self.outputs}
        if not value.numel():
            return outputs
        binding = self._session.io_binding()
        binding.bind_input(self._input, *self._describe(value))
        for name, tensor in outputs.items():
            binding.bind_output(name, *self._describe(tensor))
        with self._place.running():
            try:
                self._session.run_with_iobinding(binding, self._options)
            except Exception as error:  # ONNX Runtime's own exceptions share no public base
                raise BackendError(f"ONNX Runtime failed while running the model: {error}") from None
        return outputs

    def _describe(self, tensor: Tensor) -> tuple[str, int, Any, tuple[int, ...], int]:
        """What a binding asks for: device, its number, number type, shape and address."""
        return *self._place.known_as, NUMPY[tensor.dtype], tuple(tensor.shape), tensor.data_ptr()
