"""From an ONNX file to a TensorRT plan and its detections, through ``build`` as a user has it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from typer.testing import CliRunner

import fpn_engine.backends.tensorrt.parts as runtime_parts
import fpn_export.tensorrt.builder as builder_module
import fpn_export.tensorrt.parts as build_parts
from fpn_engine.backends.loading import load_parts
from fpn_engine.backends.tensorrt.bindings import load_bindings
from fpn_engine.cli.app import app
from fpn_engine.errors import BackendError, ModelError
from fpn_engine.plan import read_plan, rebuild_hint
from fpn_export.build import build_plan
from fpn_export.tensorrt.builder import BuildOptions
from tests.export.random_system import make_images
from tests.tensorrt.conftest import Networks
from tests.tensorrt.double import CpuDevice
from tests.tensorrt.quantization import quantize
from tests.tensorrt.strict import StrictModule


@pytest.fixture
def model(small: Networks, tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    onnx.save(small.model, str(path))
    return path


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (runtime_parts, build_parts, builder_module):
        monkeypatch.setattr(module, "CudaDevice", CpuDevice)


def test_build_and_load(trt: StrictModule, on_the_cpu: None, small: Networks, model: Path) -> None:
    path = model.with_suffix(".plan")
    steps: list[str] = []
    built = build_plan(model, path, backend="tensorrt", precision="fp16", on_progress=steps.append)
    assert "build head: Building engine 100 %" in steps
    manifest = built.manifest
    assert (manifest.backend, manifest.precision, manifest.device) == ("tensorrt", "fp16", "cuda")
    assert manifest.runtime == "tensorrt fp16 on the CUDA"
    assert manifest.versions["tensorrt"] == trt.__version__
    assert manifest.versions["gpu"] == "NVIDIA H200"
    assert manifest.versions["compute capability"] == "9.0"
    assert manifest.versions["hardware compatibility"] == "none"
    assert "onnxruntime" not in manifest.versions
    assert rebuild_hint(manifest).endswith("fpn-engine build model.onnx --backend tensorrt --precision fp16")
    trunk, head = load_parts(read_plan(path))
    assert head is not None
    assert trunk(make_images()).features[0].dtype == torch.float16


def test_a_plan_is_built_anew_for_other_options_only(
    trt: StrictModule, on_the_cpu: None, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = model.with_suffix(".plan")

    def build(**options: Any) -> bool:
        return build_plan(model, path, backend="tensorrt", tune_for=BuildOptions(**options)).cached

    assert not build()
    assert build()
    assert not build(optimization_level=2)
    assert build(optimization_level=2)
    assert not build(optimization_level=2, sizes=((64, 96),))
    trt.__version__ = "11.99.0.1"
    load_bindings.cache_clear()
    assert not build(optimization_level=2, sizes=((64, 96),))


def test_options_of_the_command(trt: StrictModule, on_the_cpu: None, model: Path) -> None:
    options = "--backend tensorrt --precision fp32 --optimization-level 1 --max-batch 4 --tune-for 2x64x96"
    compatible = ["--hardware", "ampere_plus", "--version-compatible"]
    done = CliRunner().invoke(app, ["build", str(model), *options.split(), *compatible])
    assert done.exit_code == 0, done.output
    assert "IBuilderConfig.builder_optimization_level = 1" in trt.calls
    shapes = "min=(1, 3, 64, 96), opt=(2, 3, 64, 96), max=(4, 3, 64, 96)"
    assert f"IOptimizationProfile.set_shape(input='image', {shapes})" in trt.calls
    assert "IBuilderConfig.hardware_compatibility_level = AMPERE_PLUS" in trt.calls
    manifest = read_plan(model.with_suffix(".plan")).manifest
    assert manifest.precision == "fp32"
    assert manifest.versions["hardware compatibility"] == "ampere_plus, any version"


def test_fp16_unless_said_otherwise(trt: StrictModule, on_the_cpu: None, model: Path) -> None:
    done = CliRunner().invoke(app, ["build", str(model), "--backend", "tensorrt"])
    assert done.exit_code == 0, done.output
    assert read_plan(model.with_suffix(".plan")).manifest.precision == "fp16"


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_and_a_quantised_model_as_it_is(
    trt: StrictModule, on_the_cpu: None, small: Networks, model: Path, precision: str
) -> None:
    onnx.save(quantize(small.model, precision), str(model))
    done = CliRunner().invoke(app, ["build", str(model), "--backend", "tensorrt"])
    assert done.exit_code == 0, done.output
    assert read_plan(model.with_suffix(".plan")).manifest.precision == precision


WRONG = {
    "a target": (["--target", "sm_90"], "the others compile on the GPU"),
    "native's": (["--backend", "native", "--max-batch", "2"], "--backend tensorrt"),
    "level": (["--optimization-level", "9"], "--optimization-level"),
}


@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=WRONG)
def test_options_that_do_not_go_together(model: Path, options: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["build", str(model), "--backend", "tensorrt", *options], env={"COLUMNS": "200"})
    assert done.exit_code != 0
    assert message in done.output + str(done.exception)
    assert not model.with_suffix(".plan").exists()


def test_without_tensorrt(on_the_cpu: None, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_bindings", None)
    load_bindings.cache_clear()
    with pytest.raises(BackendError, match="TensorRT is not installed; install it with"):
        build_plan(model, model.with_suffix(".plan"), backend="tensorrt")
    for backend in ("native", "onnxruntime", "auto"):
        with pytest.raises(BackendError, match="fp8 runs on TensorRT only; add --backend tensorrt"):
            build_plan(model, model.with_suffix(".plan"), backend=backend, precision="fp8")
        with pytest.raises(ModelError, match="the model is not quantised, which --precision int8 needs"):
            build_plan(model, model.with_suffix(".plan"), backend=backend, precision="int8")
