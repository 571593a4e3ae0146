"""Mask proposals on the native backend: what a plan holds, on which device, and damaged parts."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from onnx import ModelProto

from fpn_engine.backends.native import masks
from fpn_engine.backends.native.cpu_convolution import has_bfloat16, has_fused_convolution
from fpn_engine.backends.native.level_scores import LevelScores, split_scores
from fpn_engine.backends.native.masks import NativeMaskAnswer, NativeMaskTrunk, load_native_masks, make_native_masks
from fpn_engine.backends.native.ops import FLOAT16, FLOAT32, Cast, WindowScore
from fpn_engine.backends.native.packing import pack_part, unpack_part
from fpn_engine.errors import BackendError, PlanError
from fpn_engine.masks import screening
from fpn_engine.masks.pipeline import MaskPipeline, MaskTrunkOutput
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


@pytest.fixture
def screened(model: FpnMasks, networks: dict[str, ModelProto], monkeypatch: pytest.MonkeyPatch) -> MaskPipeline:
    """The plan with rough scores, for however small an image."""
    if not (has_fused_convolution() and has_bfloat16()):
        pytest.skip("this processor or torch does not convolve in bfloat16")
    monkeypatch.setattr(masks, "LEAST_PLACES", 0)
    parts = make_plan(model, networks, "fp32").parts
    return MaskPipeline(model.spec, *make_native_masks(parts, model.spec, threads=1, screens=True))


@torch.no_grad()
def test_rough_scores_choose_the_same_masks(model: FpnMasks, screened: MaskPipeline) -> None:
    images = random_images(2, 160, 224)
    out, expected = screened.trunk(images), model.trunk(images).scores
    assert out.exact is not None
    for rough, exact, right in zip(out.scores, out.exact(), expected, strict=True):
        assert 1e-4 < float((rough - right).abs().max()) < 0.3
        torch.testing.assert_close(exact, right, rtol=0, atol=1e-4)
    assert screening.decide(out.features, out.scores, 300, screened.answer) is not None  # type: ignore[arg-type]
    found, right_masks = screened(images, 300), model.pipeline(images, 300)
    torch.testing.assert_close(found.scores, right_masks.scores, rtol=0, atol=1e-5)
    assert_same_masks(found.regions, found.masks, right_masks, (160, 224))
    assert found.status.tolist() == [0, 0]


def test_scores_that_are_too_rough_are_made_again(
    model: FpnMasks, screened: MaskPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = torch.Generator().manual_seed(0)

    def spoil(self: LevelScores, levels: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return tuple(score + torch.randn(score.shape, generator=noise) for score in self.exact(levels))

    monkeypatch.setattr(LevelScores, "rough", spoil)
    images = random_images(2, 160, 224)
    torch.testing.assert_close(screened(images, 300).scores, model.pipeline(images, 300).scores, rtol=0, atol=1e-5)


def test_nan_shows_through_rough_scores(screened: MaskPipeline) -> None:
    levels = tuple(level.clone() for level in screened.trunk(random_images()).features)
    levels[0][1, 3, 7, 7] = torch.nan
    scores = screened.trunk._screened  # type: ignore[attr-defined]
    out = MaskTrunkOutput(levels, scores.rough(levels), partial(scores.exact, levels))
    assert (screened.propose(out).status != 0).tolist() == [False, True]


def test_small_images_are_scored_exactly_at_once(model: FpnMasks, networks: dict[str, ModelProto]) -> None:
    trunk, _ = make_native_masks(make_plan(model, networks, "fp32").parts, model.spec, screens=True)
    out = trunk(random_images())
    assert out.exact is None
    with torch.no_grad():
        expected = model.trunk(random_images()).scores
    for ours, theirs in zip(out.scores, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_only_what_reads_the_levels_is_screened(model: FpnMasks, networks: dict[str, ModelProto]) -> None:
    program, weights = unpack_part("trunk", make_plan(model, networks, "bf16").parts)
    short, scores = split_scores(program, weights, 5)
    assert [op.output for op in scores] == list(program.outputs[5:])
    assert short.outputs == program.outputs[:5]
    kinds = Counter(op.KIND for op in program.ops) - Counter(op.KIND for op in short.ops)
    assert kinds == {"window_score": 2, "cast": 5}
    swapped = [dataclasses.replace(op, inputs=op.inputs[::-1]) if op in scores else op for op in program.ops]
    assert split_scores(dataclasses.replace(program, ops=tuple(swapped)), weights, 5)[1] == []
    broken = weights | {scores[0].scale: weights[scores[0].scale] * torch.nan}
    assert split_scores(program, broken, 5)[1] == []


def test_spectra_are_for_the_cpu(model: FpnMasks, networks: dict[str, ModelProto]) -> None:
    """A plan for CUDA has score maps, as tensor cores make them, in number types that it can compute in."""
    cpu, _ = unpack_part("trunk", make_plan(model, networks, "fp32").parts)
    assert sum(isinstance(op, WindowScore) for op in cpu.ops) == 2
    plan = make_plan(model, networks, "fp16", "cuda")
    cuda, weights = unpack_part("trunk", plan.parts)
    assert not any(isinstance(op, WindowScore) for op in cuda.ops)
    dtypes = cuda.dtypes()
    assert [dtypes[name] for name in cuda.outputs] == [FLOAT16] * 5 + [FLOAT32] * 5
    assert not any(isinstance(op, Cast) for op in cuda.ops)  # the sums themselves, not what rounding left of them
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


def test_the_device_is_not_taken_for_the_plan(
    model: FpnMasks, networks: dict[str, ModelProto], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lack(plan: Plan) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("fpn_engine.backends.native.masks.check_native", lambda manifest: None)
    monkeypatch.setattr("fpn_engine.backends.native.cuda.loading.prepare", lack)
    plan = make_plan(model, networks, "fp32")
    with pytest.raises(BackendError, match=r"^the CUDA device failed while the plan was loaded: CUDA out of memory$"):
        load_native_masks(Plan(dataclasses.replace(plan.manifest, device="cuda"), plan.parts))


def test_an_answer_without_places(model: FpnMasks, networks: dict[str, ModelProto]) -> None:
    plan = make_plan(model, networks, "fp32")
    answer = NativeMaskAnswer([unpack_part(name, plan.parts) for name in model.spec.head_names], model.spec)
    with torch.no_grad():
        levels = model.trunk(random_images()).features
    assert answer(0, levels, torch.zeros(0, 4, dtype=torch.int64)).shape == (0, 14, 14)
