"""Plans of quantised models: what they are built for, what they give, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto

from fpn_engine.engine import Engine
from fpn_engine.errors import BackendError, ModelError
from fpn_engine.plan import read_plan
from fpn_engine.sources import list_images
from fpn_export.build import build_plan
from fpn_export.quantization.calibration import make_engine
from fpn_export.quantization.quantize import (
    quantize_model,
)
from fpn_export.quantization.report import Report
from tests.contest import settle_contest
from tests.export.quantization.conftest import QUICK, SPEC


def test_fp8_end_to_end(model: ModelProto, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = dataclasses.replace(QUICK, precision="fp8", sensitivity=0)
    made, report = quantize_model(model, SPEC, list(list_images([photographs])), options)
    assert [row.why_float for row in report.float_layers] == ["not for fp8"]
    assert 0.1 < report.score < 1.0
    monkeypatch.setenv("FPN_ENGINE_CACHE", str(tmp_path / "cache"))
    onnx.save(made, str(tmp_path / "model.onnx"))
    with pytest.raises(ModelError, match="add --backend tensorrt"):
        build_plan(tmp_path / "model.onnx", tmp_path / "model.plan")


def test_the_plan_on_onnxruntime_gives_what_was_scored(
    quantized: tuple[ModelProto, Report], photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FPN_ENGINE_CACHE", str(tmp_path / "cache"))
    settle_contest(monkeypatch, "onnxruntime")
    onnx.save(quantized[0], str(tmp_path / "model.int8.onnx"))
    built = build_plan(tmp_path / "model.int8.onnx", tmp_path / "model.plan")
    assert (built.manifest.backend, built.manifest.precision) == ("onnxruntime", "int8")
    assert build_plan(tmp_path / "model.int8.onnx", tmp_path / "model.plan").cached
    path = next(list_images([photographs]))
    (ours,) = Engine.from_plan(read_plan(tmp_path / "model.plan"))(path)
    (theirs,) = make_engine(quantized[0], SPEC)(path)
    np.testing.assert_allclose(ours.boxes, theirs.boxes, atol=1e-2)
    assert ours.labels.tolist() == theirs.labels.tolist()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"precision": "int8"}, "not quantised.*fpn-engine quantize"),
        ({"precision": "fp8"}, "TensorRT only"),
        ({"precision": "int4"}, "no precision 'int4'"),
    ],
)
def test_a_float_model_is_not_built_in_8_bits(
    model: ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, str], sentence: str
) -> None:
    monkeypatch.setenv("FPN_ENGINE_CACHE", str(tmp_path / "cache"))
    onnx.save(model, str(tmp_path / "model.onnx"))
    with pytest.raises(Exception, match=sentence):
        build_plan(tmp_path / "model.onnx", tmp_path / "model.plan", **options)
    assert not (tmp_path / "model.plan").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"precision": "fp32"}, "does not go with fp32"),
        ({"precision": "bf16"}, "does not go with bf16"),
    ],
)
def test_a_quantised_model_is_built_as_it_is(
    quantized: tuple[ModelProto, Report],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, str],
    sentence: str,
) -> None:
    monkeypatch.setenv("FPN_ENGINE_CACHE", str(tmp_path / "cache"))
    onnx.save(quantized[0], str(tmp_path / "model.onnx"))
    with pytest.raises(ModelError, match=sentence):
        build_plan(tmp_path / "model.onnx", tmp_path / "model.plan", **options)


@pytest.mark.parametrize("winner", ["onnxruntime", "native"])
def test_the_faster_backend_is_taken(
    quantized: tuple[ModelProto, Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, winner: str
) -> None:
    monkeypatch.setenv("FPN_ENGINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("fpn_engine.backends.native.loading.has_int8_products", lambda: True)
    monkeypatch.setattr("fpn_export.build.open_trunks", lambda *given: {})  # a contest runs them
    settle_contest(monkeypatch, winner)
    onnx.save(quantized[0], str(tmp_path / "model.onnx"))
    built = build_plan(tmp_path / "model.onnx", tmp_path / "model.plan")
    assert (built.manifest.backend, built.manifest.precision) == (winner, "int8")


def test_without_int8_products_onnxruntime_is_taken(
    quantized: tuple[ModelProto, Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FPN_ENGINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("fpn_engine.backends.native.loading.has_int8_products", lambda: False)
    onnx.save(quantized[0], str(tmp_path / "model.onnx"))
    notes: list[str] = []
    built = build_plan(tmp_path / "model.onnx", tmp_path / "model.plan", on_note=notes.append)
    assert built.manifest.backend == "onnxruntime"
    assert "no VNNI" in notes[0]
    with pytest.raises(BackendError, match=r"no VNNI.*build with --backend onnxruntime"):
        build_plan(tmp_path / "model.onnx", tmp_path / "other.plan", backend="native")
