"""The builder's own matters: what it says when it fails, progress, the timing cache, and the shapes to build for."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from onnx import helper

from fpn_engine.backends.tensorrt.target import Gpu
from fpn_engine.errors import BackendError, ModelError
from fpn_engine.resizing import padded_size, resized_size
from fpn_engine.spec import ModelSpec, numbered_categories
from fpn_export.tensorrt.builder import BuildOptions
from fpn_export.tensorrt.parts import make_tensorrt_parts
from fpn_export.tensorrt.profiles import Batches, image_profiles, roi_profile
from fpn_export.tensorrt.progress import Phases
from fpn_export.tensorrt.timing_cache import TimingCache
from tests.tensorrt.conftest import Networks
from tests.tensorrt.double import CpuDevice
from tests.tensorrt.plans import build_small
from tests.tensorrt.strict import StrictModule

SPEC = ModelSpec(categories=numbered_categories(2))


def test_profiles_hold_every_size_that_the_model_sees() -> None:
    profiles = image_profiles(SPEC, Batches())
    assert profiles[0] == ((1, 3, 32, 800), (1, 3, 800, 1088), (8, 3, 800, 1344))
    for height in (1, 30, 300, 480, 640, 1000, 4000):
        for width in (1, 45, 480, 500, 640, 900, 8000):
            resized = resized_size(height, width, SPEC.min_size, SPEC.max_size)
            shape = (1, 3, *padded_size(resized, SPEC.size_divisor))
            fits = [
                all(low <= side <= high for low, side, high in zip(profile.low, shape, profile.high, strict=True))
                for profile in profiles
            ]
            assert any(fits), (height, width, shape)


def test_profiles_of_given_sizes_only() -> None:
    batches = Batches(best=2, most=4)
    assert image_profiles(SPEC, batches, ((800, 1088),)) == [((1, 3, 800, 1088), (2, 3, 800, 1088), (4, 3, 800, 1088))]
    with pytest.raises(BackendError, match="800x1080 is not padded; take multiples of 32"):
        image_profiles(SPEC, batches, ((800, 1080),))


def test_rois_of_a_batch() -> None:
    assert roi_profile(SPEC, Batches(best=1, most=4)) == ((1, 12544), (1000, 12544), (4000, 12544))
    given = dataclasses.replace(SPEC, model="fast_rcnn")
    assert roi_profile(given, Batches(most=1)).high == (2000, 12544)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Batches(best=4, most=2), "a batch of 4 to 2 images is none"),
        (lambda: BuildOptions(optimization_level=6), "is 0 to 5, not 6"),
        (lambda: BuildOptions(hardware="all"), "no hardware compatibility 'all'"),  # type: ignore[arg-type]
    ],
)
def test_wrong_options(make: Any, message: str) -> None:
    with pytest.raises(BackendError, match=message):
        make()


def test_what_the_parser_refuses_is_named(trt: StrictModule, small: Networks) -> None:
    head = type(small.parts["head"]).FromString(small.parts["head"].SerializeToString())
    first = head.graph.node[0]
    head.graph.node.append(helper.make_node("NonZero", [first.output[0]], ["found"], name="odd"))
    with pytest.raises(ModelError, match="cannot take the network: NonZero odd: No importer registered for NonZero"):
        make_tensorrt_parts(
            Path("m.onnx"), {"head": head}, small.spec, "fp32", BuildOptions(), lambda step: None, CpuDevice()
        )


def test_errors_name_the_file(trt: StrictModule, small: Networks) -> None:
    arguments = (small.parts, small.spec, "int8", BuildOptions(), lambda step: None, CpuDevice())
    with pytest.raises(ModelError, match=r"^model\.onnx: the model is not quantised"):
        make_tensorrt_parts(Path("model.onnx"), *arguments)
    with pytest.raises(BackendError, match="TensorRT builds no int4; take one of fp32, fp16, bf16, int8, fp8"):
        make_tensorrt_parts(Path("model.onnx"), *arguments[:2], "int4", *arguments[3:])


def test_ctrl_c_stops_the_build_and_keeps_the_timing_cache_as_it_was(trt: StrictModule, small: Networks) -> None:
    def interrupt(step: str) -> None:
        if "25 %" in step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_tensorrt_parts(Path("m.onnx"), small.parts, small.spec, "fp32", BuildOptions(), interrupt, CpuDevice())
    assert "ITimingCache.serialize()" not in trt.calls


def test_no_engine(trt: StrictModule, small: Networks) -> None:
    trt._behaviours = {**trt._behaviours, "Builder.build_serialized_network": lambda *args, **keywords: None}
    with pytest.raises(BackendError, match="builds no engine: it gives no reason"):
        build_small(small, "fp32")


def test_the_second_build_begins_with_what_the_first_measured(
    trt: StrictModule, small: Networks, cache_of_its_own: Path
) -> None:
    build_small(small, "fp32")
    (path,) = (cache_of_its_own / "tensorrt").glob("*.cache")
    assert path.name == f"timing-{trt.__version__}-NVIDIA-H200-sm90.cache"
    assert path.read_bytes() == b"timed" * 2
    trt.calls.clear()
    build_small(small, "fp32")
    assert "IBuilderConfig.create_timing_cache(serialized_timing_cache=<10 bytes>)" in trt.calls
    path.write_bytes(b"of another version")
    trt.calls.clear()
    build_small(small, "fp32")
    assert path.read_bytes() == b"timed" * 2
    made = [line for line in trt.calls if "create_timing_cache" in line]
    assert made[:2] == [
        "IBuilderConfig.create_timing_cache(serialized_timing_cache=<18 bytes>)",
        "IBuilderConfig.create_timing_cache(serialized_timing_cache=<nothing>)",
    ]


def test_a_build_does_without_a_cache_folder(
    trt: StrictModule, small: Networks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FPN_ENGINE_CACHE", str(tmp_path / "file" / "cache"))
    build_small(small, "fp32")
    assert TimingCache("11", Gpu(name="x", capability=(9, 0))).path is None


def test_progress_never_goes_back() -> None:
    said: list[str] = []
    phases = Phases(said.append)
    phases.start("Build", None, 2)
    phases.start("Time", "Build", 4)
    assert all(phases.complete("Time", step) for step in range(4))
    phases.finish("Time")
    assert phases.complete("Build", 0)
    assert phases.complete("Build", 1)
    phases.finish("Build")
    phases.finish("Build")
    percents = [int(line.split()[1]) for line in said]
    assert percents == sorted(percents)
    assert percents[0] == 0
    assert {12, 50, 100} <= set(percents)
