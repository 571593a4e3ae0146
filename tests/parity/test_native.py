"""The native backend: whole detectors at fp32 answer as ONNX Runtime's plans do, and bf16 keeps the precision."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from fpn_engine.annotations import CocoGroundTruth
from fpn_engine.backends import Trunk, TrunkOutput
from fpn_engine.backends.loading import load_parts
from fpn_engine.backends.native import NativeTrunk
from fpn_engine.backends.native.cpu_convolution import has_bfloat16
from fpn_engine.backends.native.executor import CpuExecutor
from fpn_engine.backends.native.parts import unpack_part
from fpn_engine.detections import Detections
from fpn_engine.engine import Engine
from fpn_engine.plan import Plan
from tests.export.models import relative_error
from tests.export.random_system import make_images
from tests.parity.random_detector import make_picture
from tests.parity.subject import Subject, random_subject
from tests.parity.test_photographs import score
from tests.parity.test_systems import SYSTEMS, boxes_for, pictures, subject_of
from tests.parity.torchvision_oracle import Found, Pixels, match
from tests.threads import one_thread

__all__ = ["one_thread"]

SCORE, CORNER = 1e-4, 1e-2  # pixels
FEATURES, LOGITS = 2.0**-5, 2.0**-5  # bf16, of the largest magnitude: 20 to 100 layers that each round to 2^-9
ENOUGH_CELLS = 32  # heads that were scaled by what they answer on fewer cells magnify every difference
AP_POINTS = 0.003
needs_bfloat16 = pytest.mark.skipif(not has_bfloat16(), reason="this processor does not convolve in bfloat16")


@cache
def bf16_plan(system: str) -> Plan:
    return subject_of(system).build("native", "bf16")


def assert_same_detections(ours: list[Detections], theirs: list[Detections]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert len(a) == len(b) > 0
        assert len(match(Found.of(a), Found.of(b), corner_tolerance=CORNER, score_tolerance=SCORE)[0]) == len(a)


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_system(system: str) -> None:
    subject = subject_of(system)
    given = None if subject.spec.has_rpn else boxes_for(pictures())
    assert subject.native_plan.manifest.backend == "native"
    for batch_size in (1, 3):
        engines = [subject.engine(batch_size=batch_size, plan=plan) for plan in (subject.native_plan, subject.plan)]
        ours, theirs = (engine(pictures(), proposals=given) for engine in engines)
        assert_same_detections(ours, theirs)


def test_batches_of_mixed_sizes_in_any_order() -> None:
    """Sizes that grow and shrink share one arena."""
    subject = random_subject("resnet18")
    images = [make_picture(h, w, seed=h) for h, w in [(120, 160), (60, 60), (300, 100), (97, 131), (160, 120)]]
    engine, theirs = subject.engine(batch_size=2, plan=subject.native_plan), subject.engine(batch_size=2)
    expected = theirs(images)
    assert_same_detections(engine(images), expected)
    assert_same_detections(engine(images[::-1]), expected[::-1])


def trunks(subject: Subject, plan: Plan) -> tuple[NativeTrunk, Trunk]:
    ours, _ = load_parts(plan)
    theirs, _ = load_parts(subject.plan)
    assert isinstance(ours, NativeTrunk)
    return ours, theirs


def flat(out: TrunkOutput) -> list[Tensor]:
    return [*out.features, *out.objectness, *out.deltas]


@pytest.mark.parametrize("system", SYSTEMS)
def test_trunk(system: str) -> None:
    """Map by map, also with everything in the arena, as on a device."""
    subject = subject_of(system)
    ours, theirs = trunks(subject, subject.native_plan)
    images = make_images()
    expected = flat(theirs(images))
    program, weights = unpack_part("trunk", subject.native_plan.parts)
    proof = NativeTrunk(program, weights, subject.spec)
    proof.executor = CpuExecutor(program, weights, all_in_arena=True)
    for trunk in (ours, proof):
        first = flat(trunk(images))
        for actual, wanted in zip(first, expected, strict=True):
            assert relative_error(actual, wanted) < 1e-4
        kept = [tensor.clone() for tensor in first]
        trunk(make_images() + 1)
        assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True)), "outputs are the caller's to keep"


def test_memory_is_used_again() -> None:
    subject = random_subject("resnet50")
    program, weights = unpack_part("trunk", subject.native_plan.parts)
    everything = CpuExecutor(program, weights, all_in_arena=True).plan((1, 256, 256, 3))
    assert everything.live_bytes <= everything.arena_bytes <= 1.1 * everything.live_bytes
    assert everything.arena_bytes < 0.25 * everything.total_bytes
    assert len(everything.in_place) >= 16, "every residual block of R50 adds in place"
    assert len(program.ops) <= 53 + 1 + 4 + 4 + 1 + 5 * 4, "stem and blocks, two pools, laterals, outputs, RPN"


@needs_bfloat16
@pytest.mark.parametrize("system", SYSTEMS)
def test_bf16_trunk(system: str) -> None:
    subject = subject_of(system)
    ours, theirs = trunks(subject, bf16_plan(system))
    out, expected = ours(make_images()), theirs(make_images())
    assert {t.dtype for t in out.features} <= {torch.bfloat16}
    assert {t.dtype for t in (*out.objectness, *out.deltas)} <= {torch.float32}
    for actual, wanted in zip(out.features, expected.features, strict=True):
        assert 0 < relative_error(actual.float(), wanted) < FEATURES
    for actual, wanted in zip((*out.objectness, *out.deltas), (*expected.objectness, *expected.deltas), strict=True):
        if wanted[:, 0].numel() >= ENOUGH_CELLS:
            assert 0 < relative_error(actual, wanted) < LOGITS


@needs_bfloat16
@pytest.mark.parametrize("system", SYSTEMS)
def test_bf16_finds_most_of_the_same(system: str) -> None:
    subject = subject_of(system)
    given = None if subject.spec.has_rpn else boxes_for(pictures())
    ours = subject.engine(batch_size=3, plan=bf16_plan(system))(pictures(), proposals=given)
    theirs = subject.engine(batch_size=3)(pictures(), proposals=given)
    for a, b in zip(ours, theirs, strict=True):
        pairs = match(Found.of(a), Found.of(b), corner_tolerance=4.0, score_tolerance=0.1)[0]
        assert len(pairs) >= 0.6 * len(b)


@needs_bfloat16
def test_bf16_plan_is_half_as_large() -> None:
    subject = subject_of("finest")
    half, whole = (plan.manifest.parts["trunk.safetensors"].size for plan in (bf16_plan("finest"), subject.native_plan))
    assert half < 0.6 * whole


def detect_all(engine: Engine, photographs: dict[int, Pixels]) -> dict[int, Found]:
    return {image_id: Found.of(engine(image)[0]) for image_id, image in photographs.items()}


@pytest.fixture(scope="module")
def expected(bccd: Subject, photographs: dict[int, Pixels]) -> dict[int, Found]:
    return detect_all(bccd.engine(), photographs)


@pytest.mark.shared
def test_photographs(bccd: Subject, photographs: dict[int, Pixels], expected: dict[int, Found]) -> None:
    ours = detect_all(bccd.engine(plan=bccd.native_plan), photographs)
    found = lost = 0
    for image_id, theirs in expected.items():
        pairs = match(ours[image_id], theirs, corner_tolerance=CORNER, score_tolerance=SCORE)[0]
        found += len(theirs.scores)
        lost += max(len(theirs.scores), len(ours[image_id].scores)) - len(pairs)
    assert found > 1000
    assert lost <= 2, "ties aside"


@pytest.mark.shared
@needs_bfloat16
def test_bf16_keeps_the_average_precision(
    bccd: Subject, photographs: dict[int, Pixels], expected: dict[int, Found], bccd_truth: CocoGroundTruth
) -> None:
    assert len(photographs) == 72
    answers = detect_all(bccd.engine(plan=bccd.build("native", "bf16")), photographs)
    ours, theirs = (score(found, bccd, bccd_truth) for found in (answers, expected))
    assert theirs.AP > 0.5
    assert pytest.approx(theirs.AP, abs=AP_POINTS) == ours.AP
