"""int8 on the native backend: whole detectors beside ONNX Runtime's int8 of the same Q/DQ file, and beside float32."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import ModelProto
from PIL import Image

from fpn_engine.annotations import CocoGroundTruth, load_annotations
from fpn_engine.backends.loading import load_parts
from fpn_engine.backends.native import NativeTrunk
from fpn_engine.backends.native.cpu_quantized import has_int8_products
from fpn_engine.backends.native.executor import CpuExecutor
from fpn_engine.backends.native.packing import unpack_part
from fpn_engine.engine import Engine
from fpn_engine.plan import Plan
from fpn_engine.spec import ModelSpec
from fpn_export.quantization.calibration import calibrate
from fpn_export.quantization.layers import Network
from fpn_export.quantization.pairs import insert_pairs
from fpn_export.quantization.ranges import RANGES
from tests.export.random_system import make_images
from tests.parity.subject import Subject, build_model
from tests.parity.test_native import AP_POINTS, detect_all, flat
from tests.parity.test_photographs import score
from tests.parity.test_systems import SYSTEMS, pictures, subject_of
from tests.parity.torchvision_oracle import Found, Pixels, match
from tests.threads import one_thread

__all__ = ["one_thread"]

pytestmark = pytest.mark.skipif(not has_int8_products(), reason="this processor or torch has no int8 products")
WITH_RPN = [name for name, (model, _) in SYSTEMS.items() if model != "fast_rcnn"]
AS_GOOD = 1.15  # times the error of ONNX Runtime's int8, which rounds operands of additions once more


def quantize(model: ModelProto, spec: ModelSpec, paths: list[Path]) -> ModelProto:
    """All layers, ranges by percentile."""
    every = Network(model).layers
    seen = calibrate(model, spec, every, paths)
    ranges = {name: RANGES["percentile"](histogram, "int8") for name, histogram in seen.histograms.items()}
    return insert_pairs(model, {layer.name for layer in every}, ranges)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    paths = []
    for number, pixels in enumerate(pictures()):
        paths.append(folder / f"{number}.png")
        Image.fromarray(pixels).save(paths[-1])
    return paths


@cache
def plans_of(system: str, files: tuple[Path, ...]) -> dict[str, Plan]:
    subject = subject_of(system)
    made = quantize(subject.onnx_model, subject.spec, list(files))
    return {backend: build_model(made, backend, "int8") for backend in ("native", "onnxruntime")}


def norm_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("system", WITH_RPN)
def test_every_system(system: str, files: list[Path]) -> None:
    """As near to float32 as ONNX Runtime's integers are, map by map; also with everything in the arena."""
    subject, plans = subject_of(system), plans_of(system, tuple(files))
    assert plans["native"].manifest.runtime == "native int8 on the CPU"
    program, weights = unpack_part("trunk", plans["native"].parts)
    assert {tensor.dtype for name, tensor in weights.items() if name.endswith(":int8")} == {torch.int8}
    (ours, _), (theirs, _), (exact, _) = (load_parts(plan) for plan in (*plans.values(), subject.plan))
    images = make_images()
    found, other, expected = (flat(trunk(images)) for trunk in (ours, theirs, exact))
    errors = np.array([[norm_error(a, c), norm_error(b, c)] for a, b, c in zip(found, other, expected, strict=True)])
    assert (errors > 0).all(), "something was rounded"
    assert (errors[:, 0] <= AS_GOOD * errors[:, 1]).mean() > 0.8
    assert errors[:, 0].mean() <= AS_GOOD * errors[:, 1].mean()
    proof = NativeTrunk(program, weights, subject.spec)
    proof.executor = CpuExecutor(program, weights, all_in_arena=True)
    assert all(torch.equal(a, b) for a, b in zip(flat(proof(images)), found, strict=True))


@pytest.mark.parametrize("system", [name for name in WITH_RPN if SYSTEMS[name][0] == "faster_rcnn"])
def test_most_of_the_same_is_found(system: str, files: list[Path]) -> None:
    subject, plans = subject_of(system), plans_of(system, tuple(files))
    for batch_size in (1, 3):
        ours = subject.engine(batch_size=batch_size, plan=plans["native"])(pictures())
        theirs = subject.engine(batch_size=batch_size, plan=plans["onnxruntime"])(pictures())
        for a, b in zip(ours, theirs, strict=True):
            pairs = match(Found.of(a), Found.of(b), corner_tolerance=4.0, score_tolerance=0.1)[0]
            assert len(pairs) >= 0.6 * len(b) > 0


def test_an_image_alone_is_what_it_is_in_a_batch(files: list[Path]) -> None:
    engine = Engine.from_plan(plans_of("finest", tuple(files))["native"], batch_size=3)
    together, alone = engine(pictures()), [engine(picture)[0] for picture in pictures()]
    for a, b in zip(together, alone, strict=True):
        assert len(a) > 0
        np.testing.assert_allclose(a.boxes, b.boxes, atol=1e-3)
        np.testing.assert_allclose(a.scores, b.scores, atol=1e-4)


@pytest.mark.shared
@pytest.mark.timeout(900)
def test_the_average_precision_is_kept(
    bccd: Subject, photographs: dict[int, Pixels], bccd_truth: CocoGroundTruth, shared_dir: Path
) -> None:
    """On all test photographs; the plan is a quarter as large.

    Calibrated on every training photograph: 64 of them move AP by some tenths of a point, in ONNX Runtime too.
    """
    assert len(photographs) == 72
    data = shared_dir / "data" / "bccd"
    train = load_annotations(data / "instances_train.json").images
    made = quantize(bccd.onnx_model, bccd.spec, [data / "images" / image.file_name for image in train])
    plan = build_model(made, "native", "int8")
    sizes = [sum(part.size for part in each.manifest.parts.values()) for each in (plan, bccd.native_plan)]
    assert sizes[0] < 0.27 * sizes[1]
    ours, theirs = (
        score(detect_all(engine, photographs), bccd, bccd_truth)
        for engine in (bccd.engine(plan=plan), bccd.engine(plan=bccd.native_plan))
    )
    assert theirs.AP > 0.5
    assert pytest.approx(theirs.AP, abs=AP_POINTS) == ours.AP
