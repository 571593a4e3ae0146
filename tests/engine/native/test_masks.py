"""Mask proposals on the native backend: what a plan holds, on which device, and damaged parts."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from onnx import ModelProto

from fpn_engine.backends.native.masks import NativeMaskAnswer, NativeMaskTrunk, load_native_masks
from fpn_engine.backends.native.ops import FLOAT16, FLOAT32, WindowScore
from fpn_engine.backends.native.packing import pack_part, unpack_part
from fpn_engine.errors import PlanError
from fpn_engine.masks.pipeline import MaskPipeline
from fpn_engine.plan import Manifest, Part, Plan
from fpn_export.masks.model import FpnMasks
from fpn_export.masks.onnx_export import export_mask_onnx
from fpn_export.native.parts import make_native_parts
from fpn_export.networks import cut_networks
from tests.export.masks.alike import assert_same_masks
from tests.export.masks.tiny import random_images, tiny_model


@pytest.fixture(scope="module")
def model() -> FpnMasks:
    return tiny_model()


@pytest.fixture(scope="module")
def networks(model: FpnMasks) -> dict[str, ModelProto]:
    return cut_networks(export_mask_onnx(model), model.spec)


def make_plan(model: FpnMasks, networks: dict[str, ModelProto], precision: str, device: str = "cpu") -> Plan:
    parts = make_native_parts(Path("m.onnx"), networks, model.spec, precision, lambda step: None, device)
    manifest = Manifest(
        spec=model.spec,
        backend="native",
        precision=precision,
        device=device,
        versions={},
        build_key="",
        source="m.onnx",
        parts={name: Part(sha256="", size=len(data)) for name, data in parts.items()},
    )
    return Plan(manifest, parts)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 0.3), ("fp16", 0.05)])
def test_scores_everywhere_are_pytorchs(
    model: FpnMasks, networks: dict[str, ModelProto], precision: str, tolerance: float
) -> None:
    trunk, answer = load_native_masks(make_plan(model, networks, precision), threads=1)
    out = trunk(random_images())
    with torch.no_grad():
        expected = model.trunk(random_images())
    for ours, theirs in zip(out.scores, expected.scores, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)
    found = MaskPipeline(model.spec, trunk, answer)(random_images())
    assert found.status.tolist() == [0, 0]
    if precision == "fp32":
        torch.testing.assert_close(found.masks, model.pipeline(random_images()).masks, rtol=0, atol=1e-4)


def test_each_of_a_thousand_masks_is_pytorchs(model: FpnMasks, networks: dict[str, ModelProto]) -> None:
    images = random_images(2, 160, 224)
    plan = make_plan(model, networks, "fp32")
    found = MaskPipeline(model.spec, *load_native_masks(plan, threads=1))(images, 1000)
    expected = model.pipeline(images, 1000)
    assert found.masks.shape[1] == 1000
    torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=1e-5)
    assert_same_masks(found.regions, found.masks, expected, (160, 224))


def test_spectra_are_for_the_cpu(model: FpnMasks, networks: dict[str, ModelProto]) -> None:
    """A plan for CUDA has score maps, as tensor cores make them, in number types that it can compute in."""
    cpu, _ = unpack_part("trunk", make_plan(model, networks, "fp32").parts)
    assert sum(isinstance(op, WindowScore) for op in cpu.ops) == 2
    plan = make_plan(model, networks, "fp16", "cuda")
    cuda, weights = unpack_part("trunk", plan.parts)
    assert not any(isinstance(op, WindowScore) for op in cuda.ops)
    dtypes = cuda.dtypes()
    assert [dtypes[name] for name in cuda.outputs] == [FLOAT16] * 5 + [FLOAT32] * 5
    scores = NativeMaskTrunk(cuda, weights, model.spec, threads=1)(random_images()).scores
    with torch.no_grad():
        expected = model.trunk(random_images()).scores
    for ours, theirs in zip(scores, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0.05)
    head, head_weights = unpack_part("head0", plan.parts)
    assert head.input_dtype == FLOAT16
    assert {tensor.dtype for tensor in head_weights.values()} == {torch.float16}


def test_damaged_parts_are_told(model: FpnMasks, networks: dict[str, ModelProto]) -> None:
    plan = make_plan(model, networks, "fp32")
    swapped = plan.parts | {f"head0.{kind}": plan.parts[f"head1.{kind}"] for kind in ("json", "safetensors")}
    with pytest.raises(PlanError, match="the plan is damaged"):
        load_native_masks(Plan(plan.manifest, swapped))
    program, weights = unpack_part("head0", plan.parts)
    deeper = dataclasses.replace(program, ops=program.ops[:1], outputs=(program.ops[0].output,))
    kept = {name: weights[name] for name in deeper.weights()}
    with pytest.raises(PlanError, match="the plan is damaged"):
        load_native_masks(Plan(plan.manifest, plan.parts | pack_part("head0", deeper, kept)))


def test_an_answer_without_places(model: FpnMasks, networks: dict[str, ModelProto]) -> None:
    plan = make_plan(model, networks, "fp32")
    answer = NativeMaskAnswer([unpack_part(name, plan.parts) for name in model.spec.head_names], model.spec)
    with torch.no_grad():
        levels = model.trunk(random_images()).features
    assert answer(0, levels, torch.zeros(0, 4, dtype=torch.int64)).shape == (0, 14, 14)
