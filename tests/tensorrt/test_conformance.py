"""Our code against the real API of TensorRT 10 and 11: what it names exists, what it calls takes what it gives.

``surface`` is read from the real bindings, ``trt`` refuses everything that they do not have.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fpn_engine.backends.ort import OrtHead, OrtTrunk
from fpn_engine.backends.tensorrt import load_tensorrt
from fpn_engine.backends.tensorrt.bindings import load_bindings
from fpn_engine.pipeline import Pipeline, Thresholds
from fpn_engine.plan import Plan
from fpn_export.tensorrt.builder import BuildOptions
from fpn_export.tensorrt.profiles import Batches
from fpn_export.tensorrt.typed_graph import PRECISIONS, type_graph
from tests.export.random_system import SIZE, make_images
from tests.tensorrt.conftest import Networks
from tests.tensorrt.double import STREAM, CpuDevice
from tests.tensorrt.emulation import emulate_bf16
from tests.tensorrt.ort_run import open_session, run
from tests.tensorrt.plans import build_small, quantize_parts
from tests.tensorrt.strict import StrictModule

ROOT = Path(__file__).parents[2]
SOURCES = [
    *sorted((ROOT / "engine" / "fpn_engine" / "backends" / "tensorrt").glob("*.py")),
    *sorted((ROOT / "export" / "fpn_export" / "tensorrt").glob("*.py")),
]
LOGGER = ["ILogger()"]
BEGIN = [
    "Builder(logger=<Logger>)",
    "Builder.create_network(flags=STRONGLY_TYPED)",
    "OnnxParser(network=<INetworkDefinition>, logger=<Logger>)",
    "OnnxParser.parse(model=<N bytes>)",
    "Builder.create_builder_config()",
    "IBuilderConfig.builder_optimization_level = 3",
]
EXACT = ["IBuilderConfig.clear_flag(flag=TF32)"]
INPUT = ["INetworkDefinition.get_input(index=0)"]
END = [
    "IProgressMonitor()",
    "IBuilderConfig.progress_monitor = <Monitor>",
    "IBuilderConfig.create_timing_cache(serialized_timing_cache=CACHE)",
    "IBuilderConfig.set_timing_cache(cache=<ITimingCache>, ignore_mismatch=False)",
    "Builder.build_serialized_network(network=<INetworkDefinition>, config=<IBuilderConfig>)",
    "ITimingCache.serialize()",
]


def profile(name: str, low: tuple[int, ...], best: tuple[int, ...], high: tuple[int, ...]) -> list[str]:
    return [
        "Builder.create_optimization_profile()",
        f"IOptimizationProfile.set_shape(input={name!r}, min={low}, opt={best}, max={high})",
        "IBuilderConfig.add_optimization_profile(profile=<IOptimizationProfile>)",
    ]


LYING = profile("image", (1, 3, 32, 64), (1, 3, 64, 96), (8, 3, 64, 128))
UPRIGHT = profile("image", (1, 3, 64, 32), (1, 3, 96, 64), (8, 3, 128, 64))
ROIS = profile("roi_rows", (1, 784), (60, 784), (480, 784))


def normal(trt: StrictModule) -> list[str]:
    """The calls so far without sizes and addresses; the flags of a network by name, since their numbers changed."""
    strong = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    lines = [re.sub(r"<\d+ bytes>", "<N bytes>", line) for line in trt.calls]
    lines = [re.sub(r"memory=[1-9]\d*", "memory=ADDRESS", line) for line in lines]
    lines = [re.sub(r"timing_cache=<.*>", "timing_cache=CACHE", line) for line in lines]
    return [line.replace(f"create_network(flags={strong})", "create_network(flags=STRONGLY_TYPED)") for line in lines]


def named_by(tree: ast.AST) -> Iterator[str]:
    """Every chain of attributes of ``trt``: "DataType.FLOAT" of trt.DataType.FLOAT, of bindings.trt.DataType.FLOAT."""
    for node in ast.walk(tree):
        names = []
        while isinstance(node, ast.Attribute) and node.attr != "trt":
            names.append(node.attr)
            node = node.value
        is_module = isinstance(node, ast.Attribute) or (isinstance(node, ast.Name) and node.id == "trt")
        if names and is_module:
            yield ".".join(reversed(names))


def exists(surface: dict[str, Any], chain: str) -> bool:
    """An enum, one of its members, or a class."""
    outer, _, inner = chain.rpartition(".")
    return (
        chain == "__version__"
        or chain in surface["enums"]
        or chain in surface["classes"]
        or inner in surface["enums"].get(outer, ())
        or inner in surface["classes"].get(outer, {"methods": ()})["methods"]
    )


def test_every_name_exists(surface: dict[str, Any]) -> None:
    chains = {chain for path in SOURCES for chain in named_by(ast.parse(path.read_text()))}
    assert {"Builder", "Runtime", "DataType.BF16", "BuilderFlag.TF32", "ILogger.Severity.ERROR"} <= chains
    assert len(chains) > 25
    assert sorted(chain for chain in chains if not exists(surface, chain)) == []


@pytest.mark.parametrize("chain", ["BuilderFlag.FP17", "Buildr", "ILogger.Severity.WARN", "OnnxParser.supports"])
def test_a_wrong_name_would_be_seen(surface: dict[str, Any], chain: str) -> None:
    assert not exists(surface, chain)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_build_calls(trt: StrictModule, small: Networks, precision: str) -> None:
    """The same calls, in the same order, for every precision and both generations: the graph alone says which it is."""
    build_small(small, precision)
    exact = EXACT if precision == "fp32" else []
    trunk = [*BEGIN, *exact, *INPUT, *LYING, *UPRIGHT, *END]
    head = [*BEGIN, *exact, *INPUT, *ROIS, *END]
    assert normal(trt) == [*LOGGER, *trunk, *head]


def test_build_calls_with_every_option(trt: StrictModule, small: Networks) -> None:
    options = BuildOptions(
        batches=Batches(best=2, most=4),
        sizes=((64, 96),),
        optimization_level=5,
        version_compatible=True,
        hardware="ampere_plus",
    )
    build_small(small, "fp16", options)
    begin = [*BEGIN[:-1], "IBuilderConfig.builder_optimization_level = 5"]
    compatible = [
        "IBuilderConfig.set_flag(flag=VERSION_COMPATIBLE)",
        "IBuilderConfig.set_flag(flag=EXCLUDE_LEAN_RUNTIME)",
        "IBuilderConfig.hardware_compatibility_level = AMPERE_PLUS",
    ]
    images = profile("image", (1, 3, 64, 96), (2, 3, 64, 96), (4, 3, 64, 96))
    rois = profile("roi_rows", (1, 784), (120, 784), (240, 784))
    expected = [*LOGGER]
    for shapes in (images, rois):
        expected += [*begin, *compatible, *INPUT, *shapes, *END]
    assert normal(trt) == expected


@pytest.mark.parametrize("precision", PRECISIONS)
def test_runtime_calls(trt: StrictModule, small: Networks, precision: str) -> None:
    plan = build_small(small, precision)
    trt.calls.clear()
    trunk, head = load_tensorrt(plan, CpuDevice())
    loading = [line for line in normal(trt) if not line.startswith("ICudaEngine.get_tensor_")]
    assert (
        loading
        == [
            "Runtime(logger=<Logger>)",
            "Runtime.engine_host_code_allowed = False",
            "Runtime.deserialize_cuda_engine(serialized_engine=<N bytes>)",
        ]
        * 2
    )
    trt.calls.clear()
    assert head is not None
    channels, size = small.spec.feature_channels, small.spec.box_roi_pool.output_size
    for _ in range(2):
        head(torch.zeros(3, channels, size, size))
    results = ("box_deltas", "class_logits")
    run_once = [
        *(f"IExecutionContext.set_tensor_address(name={name!r}, memory=ADDRESS)" for name in ("roi_rows", *results)),
        f"IExecutionContext.execute_async_v3(stream_handle={STREAM})",
    ]
    assert normal(trt) == [
        "ICudaEngine.create_execution_context(strategy=USER_MANAGED)",
        f"IExecutionContext.set_optimization_profile_async(profile_index=0, stream_handle={STREAM})",
        "IExecutionContext.set_input_shape(name='roi_rows', shape=(3, 784))",
        "IExecutionContext.set_device_memory(memory=ADDRESS, size=4096)",
        *(f"IExecutionContext.get_tensor_shape(name={name!r})" for name in results),
        *run_once,
        *run_once,  # nothing is made anew for a shape that was there before
    ]
    trunk(make_images())
    assert "IExecutionContext.set_input_shape(name='image', shape=(2, 3, 64, 96))" in normal(trt)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_parts_give_what_the_graph_gives(trt: StrictModule, small: Networks, precision: str) -> None:
    """Layouts, names, order and types survive the way through addresses and streams, whatever order TensorRT keeps."""
    trunk, head = load_tensorrt(build_small(small, precision), CpuDevice())
    images = make_images()
    networks = {name: type_graph(part, precision) for name, part in quantize_parts(small, precision).items()}
    expected = run(open_session(emulate_bf16(networks["trunk"])), images.numpy())
    out = trunk(images)
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision, torch.float32)
    assert {value.dtype for value in out.features} == {half}
    assert {value.dtype for value in (*out.objectness, *out.deltas)} == {torch.float32}
    for prefix, values in (("", out.features), ("objectness_", out.objectness), ("deltas_", out.deltas)):
        assert len(values) == (4 if prefix == "" else 5)
        for value, level in zip(values, small.spec.level_names, strict=False):
            np.testing.assert_array_equal(
                value.permute(0, 2, 3, 1).float().numpy(), expected[f"{prefix}{level}_nhwc"].astype(np.float32)
            )
    rois = torch.randn(5, 16, 7, 7, generator=torch.Generator().manual_seed(0)).to(half)
    assert head is not None
    rows = rois.permute(0, 2, 3, 1).flatten(1).float().numpy()
    wanted = run(open_session(emulate_bf16(networks["head"])), rows)
    for value, name in zip(head(rois), ("class_logits", "box_deltas"), strict=True):
        assert value.dtype == torch.float32
        np.testing.assert_array_equal(value.numpy(), wanted[name])


def test_the_pipeline_finds_what_it_finds_with_onnxruntime(trt: StrictModule, small: Networks) -> None:
    trunk, head = load_tensorrt(build_small(small, "fp32"), CpuDevice())
    ort_parts = {name: part.SerializeToString() for name, part in small.parts.items()}
    sizes = torch.tensor([SIZE, SIZE])
    thresholds = Thresholds.of(small.spec)
    found = Pipeline(small.spec, trunk, head)(make_images(), sizes, thresholds)
    expected = Pipeline(small.spec, OrtTrunk(ort_parts["trunk"], small.spec, 1), OrtHead(ort_parts["head"], 1))(
        make_images(), sizes, thresholds
    )
    assert found.counts.tolist() == expected.counts.tolist()
    assert min(found.counts.tolist()) > 5
    torch.testing.assert_close(found.boxes, expected.boxes, atol=1e-3, rtol=0)
    torch.testing.assert_close(found.scores, expected.scores, atol=1e-4, rtol=0)


GONE_IN_11 = {
    "a precision flag": lambda trt: trt.BuilderFlag.FP16,
    "explicit batch": lambda trt: trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH,
    "fast fp16": lambda trt: trt.make("Builder").platform_has_fast_fp16,
    "supports_model": lambda trt: trt.make("OnnxParser").supports_model(b""),
    "device_memory_size": lambda trt: trt.make("ICudaEngine").device_memory_size,
    "without memory": lambda trt: trt.make("ICudaEngine").create_execution_context_without_device_memory(),
}


@pytest.mark.parametrize("use", GONE_IN_11.values(), ids=GONE_IN_11)
def test_the_double_has_no_more_than_the_generation(trt: StrictModule, use: Any) -> None:
    if trt.__version__.startswith("11"):
        with pytest.raises(AttributeError):
            use(trt)
    else:
        use(trt)


WRONG = {
    "keyword": (TypeError, lambda trt, logger: trt.Builder(log=logger)),
    "count": (TypeError, lambda trt, logger: trt.Builder(logger).create_network(1, 2)),
    "type": (TypeError, lambda trt, logger: trt.Builder(logger).create_network("1")),
    "missing": (TypeError, lambda trt, logger: trt.make("IExecutionContext").set_device_memory(1)),
    "method": (AttributeError, lambda trt, logger: trt.Builder(logger).build_engine()),
    "constructor": (TypeError, lambda trt, logger: trt.IBuilderConfig()),
    "property": (AttributeError, lambda trt, logger: setattr(trt.Builder(logger), "max_batch_size", 1)),
    "read only": (AttributeError, lambda trt, logger: setattr(trt.make("ICudaEngine"), "num_layers", 1)),
    "property's type": (TypeError, lambda trt, logger: setattr(trt.make("IBuilderConfig"), "progress_monitor", 3)),
    "base not initialised": (TypeError, lambda trt, logger: trt.Builder(logger.__class__.__new__(type(logger)))),
}


@pytest.mark.parametrize(("error", "use"), WRONG.values(), ids=WRONG)
def test_the_double_refuses_what_does_not_exist(trt: StrictModule, error: Any, use: Any) -> None:
    logger = load_bindings().logger
    trt.Builder(logger)
    with pytest.raises(error):
        use(trt, logger)


def test_plans_hold_what_they_need(trt: StrictModule, small: Networks) -> None:
    plan: Plan = build_small(small, "fp32")
    assert sorted(plan.parts) == ["head.engine", "tensorrt.json", "trunk.engine"]
