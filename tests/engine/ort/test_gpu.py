"""ONNX Runtime's providers on a real GPU, beside the plan for the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fpn_engine.backends.ort_cuda import load_ort_cuda
from fpn_engine.backends.ort_providers import why_not_loaded
from fpn_engine.engine import Engine
from tests.engine.conftest import Tiny, make_picture
from tests.engine.ort.test_cuda import build

pytestmark = pytest.mark.gpu
BOUNDS = {"fp32": 1e-4, "fp16": 2.0**-7}  # of the largest magnitude


@pytest.fixture(params=["cuda", "tensorrt"])
def provider(request: pytest.FixtureRequest) -> str:
    if reason := why_not_loaded(request.param):
        pytest.skip(f"ONNX Runtime cannot load its {request.param} provider: {reason}")
    name: str = request.param
    return name


@pytest.mark.parametrize("precision", BOUNDS)
def test_trunk_and_head(
    precision: str, provider: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FPN_ENGINE_CACHE", str(tmp_path / "kept"))
    trunk, head = load_ort_cuda(build(tiny, tmp_path, precision, provider=provider))
    expected_trunk, expected_head = load_cpu(tiny)
    for n, height, width in ((1, 64, 96), (2, 96, 64)):
        images = torch.randn(n, 3, height, width)
        for ours, theirs in zip(trunk(images.cuda()), expected_trunk(images), strict=True):
            for actual, wanted in zip(ours, theirs, strict=False):
                error = (actual.float().cpu() - wanted).abs().max() / wanted.abs().max()
                assert error < BOUNDS[precision]
    assert head is not None
    assert expected_head is not None
    features = torch.randn(40, 16, 7, 7)
    for actual, wanted in zip(head(features.cuda()), expected_head(features), strict=True):
        assert (actual.cpu() - wanted).abs().max() / wanted.abs().max() < BOUNDS[precision]


def load_cpu(tiny: Tiny):  # type: ignore[no-untyped-def]
    from fpn_engine.backends.loading import load_parts
    from fpn_engine.plan import read_plan

    return load_parts(read_plan(tiny.plan))


def test_other_streams_see_it_in_order(tiny: Tiny, tmp_path: Path) -> None:
    """What is given to the caller's stream before and after a run is before and after it."""
    trunk, _ = load_ort_cuda(build(tiny, tmp_path))
    images = torch.randn(1, 3, 64, 96, device="cuda")
    expected = [tensor.clone() for tensor in trunk(images).features]
    torch.cuda.synchronize()
    for _ in range(20):
        with torch.cuda.stream(torch.cuda.Stream()):
            late = torch.zeros_like(images)
            torch.cuda._sleep(10_000_000)
            late.copy_(images)
            found = [tensor.clone() for tensor in trunk(late).features]
            late.zero_()
        torch.cuda.synchronize()
        for actual, wanted in zip(found, expected, strict=True):
            assert torch.equal(actual, wanted)


def test_detections(provider: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FPN_ENGINE_CACHE", str(tmp_path / "kept"))
    pictures = [make_picture(60, 80), make_picture(90, 50), make_picture(60, 80, 1)]
    engine = Engine.from_plan(build(tiny, tmp_path, provider=provider), batch_size=2)
    for found, expected in zip(engine(pictures), Engine.load(tiny.plan)(pictures), strict=True):
        assert len(found) == len(expected)
        np.testing.assert_allclose(found.scores, expected.scores, atol=1e-3)
