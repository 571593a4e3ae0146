"""Mask proposals on a real GPU: captured, the same as on the CPU, and no wait between image and result."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch

from fpn_engine.engine import Engine
from fpn_engine.runtime.captured import CapturedRunner
from fpn_engine.runtime.cuda import make_cuda_runner
from fpn_engine.runtime.runner import EagerRunner
from fpn_engine.runtime.staging import SLOTS
from fpn_engine.tasks import PaddedMasks
from fpn_export.masks.model import FpnMasks
from tests.engine.conftest import make_picture
from tests.engine.runtime.test_captured_masks import make_masks_group
from tests.engine.runtime.test_gpu import exchange_tf32, no_waiting
from tests.export.masks.tiny import tiny_model

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def on_cpu() -> FpnMasks:
    return tiny_model(masks_per_img=20)


@pytest.fixture(scope="module")
def on_gpu(on_cpu: FpnMasks) -> Iterator[FpnMasks]:
    allowed = exchange_tf32(False)
    yield copy.deepcopy(on_cpu).cuda()
    exchange_tf32(allowed)


def test_captured_masks_are_those_of_the_cpu(on_cpu: FpnMasks, on_gpu: FpnMasks) -> None:
    engine = Engine(on_gpu.pipeline)
    assert isinstance(engine._runner, CapturedRunner)
    pictures = [make_picture(96, 128, seed) for seed in range(3)]
    expected = Engine(on_cpu.pipeline)(pictures)
    for _ in range(3):  # as they are, captured, replayed
        for ours, right in zip(engine(pictures), expected, strict=True):
            assert ours.masks is not None
            assert right.masks is not None
            assert abs(ours.scores - right.scores).max() < 1e-3
            assert (ours.masks != right.masks).mean() < 0.01


def test_nothing_waits_between_image_and_masks(on_gpu: FpnMasks) -> None:
    runner = make_cuda_runner(on_gpu.pipeline, batch_size=2)
    groups = [make_masks_group(on_gpu, [(96, 128), (96, 121 + seed)], seed) for seed in range(SLOTS)]
    runner.warm(*groups[0])
    with no_waiting():
        pending = [runner.submit(*group) for group in groups]
    eager = EagerRunner(on_gpu.pipeline)
    for each, group in zip(pending, groups, strict=True):
        found, right = each.wait(), eager.submit(*group).wait()
        assert isinstance(found, PaddedMasks)
        assert found.masks.device.type == "cuda"
        torch.testing.assert_close(found.scores, right.scores, rtol=0, atol=1e-4)
