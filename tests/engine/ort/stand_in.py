"""ONNX Runtime as it would be on a GPU: sessions that record what they are asked and compute on the CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import onnxruntime as ort
import pytest
import torch

RealSession = ort.InferenceSession
HANDLE = 0xBEEF  # of the stand-in's stream
DEVICE = 2  # its number


class Bound(NamedTuple):
    """One call of bind_input or bind_output."""

    name: str
    device: str
    number: int
    shape: tuple[int, ...]
    address: int


class RecordingBinding:
    """Binds to the CPU what is to be bound to CUDA."""

    def __init__(self, session: RecordingSession) -> None:
        self.real = session.real.io_binding()
        self.inputs: list[Bound] = []
        self.outputs: list[Bound] = []
        session.bindings.append(self)

    def bind_input(self, name: str, device: str, number: int, kind: Any, shape: tuple[int, ...], address: int) -> None:
        self.inputs.append(Bound(name, device, number, shape, address))
        self.real.bind_input(name, "cpu", 0, kind, shape, address)

    def bind_output(self, name: str, device: str, number: int, kind: Any, shape: tuple[int, ...], address: int) -> None:
        self.outputs.append(Bound(name, device, number, shape, address))
        self.real.bind_output(name, "cpu", 0, kind, shape, address)


class RecordingSession:
    """In the place of ``onnxruntime.InferenceSession``.

    Attributes: made: all of them. loses: providers that are left out without a word, as ONNX Runtime does.
    """

    made: list[RecordingSession]
    loses: tuple[str, ...] = ()

    def __init__(self, model: bytes, options: Any, providers: Any, enable_fallback: int = 1) -> None:
        self.providers, self.options, self.enable_fallback = list(providers), options, enable_fallback
        plain = ort.SessionOptions()
        plain.log_severity_level = 3
        self.real = RealSession(model, plain, providers=["CPUExecutionProvider"])
        self.bindings: list[RecordingBinding] = []
        self.running: list[str] = []
        self.waits = True
        type(self).made.append(self)

    def get_providers(self) -> list[str]:
        kept = [name for name, _ in self.providers if name not in self.loses]
        return [*kept, "CPUExecutionProvider"]

    def get_inputs(self) -> Any:
        return self.real.get_inputs()

    def get_outputs(self) -> Any:
        return self.real.get_outputs()

    def io_binding(self) -> RecordingBinding:
        return RecordingBinding(self)

    def run_with_iobinding(self, binding: RecordingBinding, options: Any) -> None:
        self.running.append(StandInPlace.state)
        self.waits = options.get_run_config_entry("disable_synchronize_execution_providers") != "1"
        self.real.run_with_iobinding(binding.real)

    def run(self, *arguments: Any) -> None:
        raise AssertionError("a plain run copies")


class StandInPlace:
    """A GPU's place whose memory is the host's."""

    state = "outside"
    handle = HANDLE
    device = torch.device("cpu")
    known_as = ("cuda", DEVICE)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        StandInPlace.state = "in order"
        try:
            yield
        finally:
            StandInPlace.state = "outside"


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> type[RecordingSession]:
    """Every session of this test is a recording one, and every provider can be loaded."""

    class Recording(RecordingSession):
        made: list[RecordingSession] = []  # noqa: RUF012

    monkeypatch.setattr(ort, "InferenceSession", Recording)
    monkeypatch.setattr("fpn_engine.backends.ort_providers.check_provider", lambda provider: None)
    return Recording
