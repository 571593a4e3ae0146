"""Where a plan runs, and what is said where it cannot."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fpn_engine.devices import choose_device
from fpn_engine.errors import BackendError, PlanError
from fpn_engine.plan import Manifest
from tests.engine.conftest import SPEC

ON_CPU = Manifest(
    spec=SPEC, backend="native", precision="fp16", device="cpu", versions={}, build_key="", source="model.onnx"
)
ON_CUDA = dataclasses.replace(ON_CPU, device="cuda")
INT8 = dataclasses.replace(ON_CPU, precision="int8")
ENGINE = dataclasses.replace(INT8, backend="tensorrt", device="cuda")
BUILD = "build it again with: fpn-engine build model.onnx"


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("manifest", "name", "device"),
    [
        (ON_CPU, None, "cpu"),
        (ON_CPU, "cpu", "cpu"),
        (ON_CUDA, None, "cuda:0"),
        (ON_CUDA, "cuda", "cuda:0"),
        (ON_CUDA, "cuda:1", "cuda:1"),
    ],
)
def test_the_device_of_a_plan(manifest: Manifest, name: str | None, device: str) -> None:
    assert choose_device(manifest, name) == torch.device(device)


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("manifest", "name", "error", "message"),
    [
        (ON_CPU, "cuda:1", PlanError, f"on cpu, not on cuda:1; {BUILD} --precision fp16 --device cuda$"),
        (INT8, "cuda", PlanError, f"on cpu, not on cuda; {BUILD} --backend tensorrt --precision int8$"),
        (ON_CUDA, "cpu", PlanError, f"on cuda, not on cpu; {BUILD} --backend native$"),
        (ENGINE, "cpu", PlanError, f"tensorrt int8 on cuda, not on cpu; {BUILD}$"),
        (ON_CUDA, "cuda:2", BackendError, "there is no cuda:2 here; the last CUDA device is cuda:1"),
        (ON_CUDA, "gpu", BackendError, "there is no device 'gpu'; use cpu, cuda, or cuda:1"),
        (ON_CUDA, "cuda:x", BackendError, "there is no device 'cuda:x'"),
        (ON_CPU, "cpu:0", BackendError, "there is no device 'cpu:0'"),
    ],
)
def test_another_device(manifest: Manifest, name: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        choose_device(manifest, name)


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in (None, "cuda", "cuda:1"):
        with pytest.raises(
            PlanError, match="native fp16 on cuda, and PyTorch finds no CUDA device here, as fpn-engine"
        ):
            choose_device(ON_CUDA, name)
