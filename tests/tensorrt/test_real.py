"""TensorRT itself on a GPU: engines of every precision beside the fp32 network on the CPU.

Nothing here has a double: where TensorRT or a GPU is missing the tests are skipped and say so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fpn_engine.backends.ort import OrtHead, OrtTrunk
from fpn_engine.backends.tensorrt import load_tensorrt
from fpn_engine.backends.tensorrt.device import CudaDevice
from fpn_engine.backends.tensorrt.target import HARDWARE, Hardware
from fpn_engine.errors import PlanError
from fpn_engine.pipeline import Pipeline, Thresholds
from fpn_export.tensorrt.builder import BuildOptions
from fpn_export.tensorrt.profiles import Batches
from tests.export.random_system import SIZE, make_images
from tests.tensorrt.conftest import Networks
from tests.tensorrt.ort_run import open_session, run
from tests.tensorrt.plans import build_small, quantize_parts

pytestmark = pytest.mark.tensorrt

# Largest difference as a part of the largest value, from float32 on the CPU.
TOLERANCE = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 6e-2}
# Of int8 and fp8, from the same quantised graph in ONNX Runtime: sums are rounded at other places.
QUANTIZED_TOLERANCE = 0.1
OLDEST = {"bf16": (8, 0), "fp8": (8, 9)}  # compute capabilities with the type
FAST = BuildOptions(batches=Batches(most=2), optimization_level=1)


@pytest.fixture(scope="module")
def load(small: Networks) -> Callable[..., Any]:
    """Trunk and head at a precision, built once."""
    made: dict[str, Any] = {}

    def make(precision: str) -> Any:
        device = CudaDevice()
        if device.gpu.capability < OLDEST.get(precision, (0, 0)):
            pytest.skip(f"the {device.gpu} has no {precision}")
        if precision not in made:
            made[precision] = load_tensorrt(build_small(small, precision, FAST, device))
        return made[precision]

    return make


def difference(value: Tensor, expected: np.ndarray) -> float:
    found = value.detach().float().cpu().numpy()
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8", "fp8"])
def test_trunk_and_head(small: Networks, load: Callable[..., Any], precision: str) -> None:
    trunk, head = load(precision)
    parts = quantize_parts(small, precision)
    tolerance = TOLERANCE.get(precision, QUANTIZED_TOLERANCE)
    images = make_images()
    expected = run(open_session(parts["trunk"]), images.numpy())
    out = trunk(images.cuda())
    for prefix, values in (("", out.features), ("objectness_", out.objectness), ("deltas_", out.deltas)):
        for value, level in zip(values, small.spec.level_names, strict=False):
            name = f"{prefix}{level}_nhwc"
            assert difference(value.permute(0, 2, 3, 1), expected[name]) < tolerance, name
    rois = torch.randn(70, 16, 7, 7, generator=torch.Generator().manual_seed(0))
    wanted = run(open_session(parts["head"]), rois.permute(0, 2, 3, 1).flatten(1).numpy())
    for value, name in zip(head(rois.cuda()), ("class_logits", "box_deltas"), strict=True):
        assert difference(value, wanted[name]) < tolerance, name


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_inside_a_cuda_graph(load: Callable[..., Any], precision: str) -> None:
    trunk, _ = load(precision)
    images, others = make_images().cuda(), make_images().flip(3).cuda().contiguous()
    eager = [tuple(value.clone() for value in trunk(each).deltas) for each in (images, others)]
    given = images.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        trunk(given)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = trunk(given)
    trunk(make_images(1, (64, 64)).cuda())  # another shape in between does the graph no harm
    for each, expected in zip((images, others), eager, strict=True):
        given.copy_(each)
        graph.replay()
        torch.cuda.synchronize()
        for value, wanted in zip(captured.deltas, expected, strict=True):
            torch.testing.assert_close(value, wanted, atol=0, rtol=0)


def test_batches_larger_than_the_plan(load: Callable[..., Any]) -> None:
    trunk, _ = load("fp32")
    images = make_images(5).cuda()
    out = trunk(images)
    for index in range(5):
        alone = trunk(images[index : index + 1])
        for value, wanted in zip(out.objectness, alone.objectness, strict=True):
            torch.testing.assert_close(value[index : index + 1], wanted, atol=1e-4, rtol=1e-4)


def test_the_same_detections_as_the_fp32_plan_of_the_cpu(small: Networks, load: Callable[..., Any]) -> None:
    thresholds = Thresholds.of(small.spec)
    sizes = torch.tensor([SIZE, SIZE])
    ort_parts = {name: part.SerializeToString() for name, part in small.parts.items()}
    cpu = Pipeline(small.spec, OrtTrunk(ort_parts["trunk"], small.spec, 1), OrtHead(ort_parts["head"], 1))
    expected = cpu(make_images(), sizes, thresholds)
    found = Pipeline(small.spec, *load("fp32"), device="cuda")(make_images().cuda(), sizes.cuda(), thresholds)
    for image in range(2):
        n = int(expected.counts[image])
        distance = (found.boxes[image].cpu()[:, None] - expected.boxes[image, None, :n]).abs().amax(dim=2)
        # A score or an IoU within rounding of its threshold may fall on either side.
        assert (distance.amin(dim=0) < 1e-2).float().mean() > 0.95
        assert abs(int(found.counts[image]) - n) <= 2


@pytest.mark.parametrize("hardware", HARDWARE)
@pytest.mark.parametrize("version_compatible", [False, True])
def test_compatible_engines_run(small: Networks, hardware: Hardware, version_compatible: bool) -> None:
    options = dataclasses.replace(FAST, hardware=hardware, version_compatible=version_compatible)
    trunk, _ = load_tensorrt(build_small(small, "fp16", options, CudaDevice()))
    assert torch.isfinite(trunk(make_images().cuda()).objectness[0]).all()


def test_the_timing_cache_is_kept(small: Networks, cache_of_its_own: Path) -> None:
    build_small(small, "fp16", FAST, CudaDevice())
    (path,) = (cache_of_its_own / "tensorrt").glob("*.cache")
    assert path.stat().st_size > 0
    build_small(small, "fp16", FAST, CudaDevice())


def test_a_damaged_engine_is_refused(small: Networks) -> None:
    plan = build_small(small, "fp16", FAST, CudaDevice())
    damaged = plan.parts | {"head.engine": b"x" * 1000}
    with pytest.raises(PlanError, match="cannot read the engine"):
        load_tensorrt(dataclasses.replace(plan, parts=damaged))
