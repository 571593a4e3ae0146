"""Mask proposals on the double of TensorRT: the plan's parts, and the masks of PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from onnx import ModelProto

from fpn_engine.backends.tensorrt.masks import load_tensorrt_masks
from fpn_engine.masks.pipeline import MaskPipeline
from fpn_engine.masks.spec import MaskSpec
from fpn_export.masks.model import FpnMasks
from fpn_export.masks.onnx_export import export_mask_onnx
from fpn_export.networks import cut_networks
from fpn_export.tensorrt.builder import BuildOptions
from tests.export.masks.tiny import random_images, tiny_model
from tests.tensorrt.double import CpuDevice
from tests.tensorrt.plans import build_small
from tests.tensorrt.strict import StrictModule

SIZE = (96, 128)


class MaskNetworks(NamedTuple):
    """A small model and what its file is cut into, as :func:`build_small` takes them."""

    model: FpnMasks
    spec: MaskSpec
    parts: dict[str, ModelProto]


@pytest.fixture(scope="module")
def masks() -> MaskNetworks:
    model = tiny_model()
    return MaskNetworks(model, model.spec, cut_networks(export_mask_onnx(model), model.spec))


def test_gives_the_masks_of_pytorch(trt: StrictModule, masks: MaskNetworks) -> None:
    plan = build_small(masks, "fp32", BuildOptions(sizes=(SIZE,)))
    assert sorted(plan.parts) == ["head0.engine", "head1.engine", "tensorrt.json", "trunk.engine"]
    pipeline = MaskPipeline(masks.spec, *load_tensorrt_masks(plan, CpuDevice()), fixed_shapes=True)
    found, expected = pipeline(random_images()), masks.model.pipeline(random_images())
    torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.regions, expected.regions)
    torch.testing.assert_close(found.masks, expected.masks, rtol=0, atol=1e-4)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_scores_and_masks_leave_in_float32(trt: StrictModule, masks: MaskNetworks, precision: str) -> None:
    """Ranked scores of 8 or 11 bits would be tied where they differ."""
    trunk, answer = load_tensorrt_masks(build_small(masks, precision, BuildOptions(sizes=(SIZE,))), CpuDevice())
    out = trunk(random_images())
    half = torch.float16 if precision == "fp16" else torch.bfloat16
    assert {level.dtype for level in out.features} == {half}
    assert {level.dtype for level in out.scores} == {torch.float32}
    places = torch.tensor([[0, 0, 3, 4], [1, 1, 2, 2]])
    answered = answer(1, out.features, places)
    assert answered.dtype == torch.float32
    with torch.no_grad():
        expected = masks.model.answer(1, masks.model.trunk(random_images()).features, places)
    torch.testing.assert_close(answered, expected, rtol=0, atol=0.02 * float(expected.abs().max()) + 0.1)
