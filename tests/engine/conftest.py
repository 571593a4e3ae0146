"""A detector that is exported and built in seconds, and the command line run in this process."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from PIL import Image
from safetensors.torch import save_file

from fpn_engine.cli import main
from fpn_engine.engine import Engine
from fpn_engine.spec import Category, ModelSpec
from fpn_export import bundled as bundled_module
from fpn_export.build import build_plan
from fpn_export.cached_plan import make_cached
from fpn_export.detector import FasterRCNN
from fpn_export.onnx_export import export_onnx
from tests.contest import settle_contest
from tests.threads import one_thread

__all__ = ["one_thread"]

Pixels = NDArray[np.uint8]

SPEC = ModelSpec(
    categories=(Category(id=1, name="cat"), Category(id=3, name="dog"), Category(id=7, name="bird")),
    arch="resnet18",
    fpn_channels=16,
    min_size=64,
    max_size=96,
    anchor_sizes=((8.0,), (16.0,), (32.0,), (48.0,), (64.0,)),
    rpn_pre_nms_top_n_test=60,
    rpn_post_nms_top_n_test=40,
    box_detections_per_img=20,
)
LOGIT_SCALE = 30.0  # random weights say nothing; this much louder, scores spread from 0.05 to 0.95


class Tiny(NamedTuple):
    """The files of a small detector with random weights."""

    checkpoint: Path
    model: Path
    plan: Path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder = tmp_path_factory.mktemp("tiny")
    files = Tiny(folder / "tiny.pth", folder / "tiny.onnx", folder / "tiny.plan")
    torch.manual_seed(0)
    detector = FasterRCNN(SPEC, representation_size=32).eval()
    state = detector.state_dict()
    state["roi_heads.box_predictor.cls_score.weight"] *= LOGIT_SCALE
    torch.save(state, files.checkpoint)
    files.checkpoint.with_suffix(".json").write_text(json.dumps({"spec": SPEC.to_dict()}))
    onnx.save(export_onnx(detector, SPEC), str(files.model))
    build(files.model, files.plan)
    return files


@pytest.fixture(scope="session")
def broken_plan(tiny: Tiny) -> Path:
    """The same detector with NaN in its RPN."""
    model = onnx.load(str(tiny.model))
    (weight,) = (tensor for tensor in model.graph.initializer if tensor.name == "rpn.head.bbox_pred.weight")
    weight.CopyFrom(numpy_helper.from_array(np.full(tuple(weight.dims), np.nan, np.float32), weight.name))
    onnx.save(model, str(tiny.model.with_name("broken.onnx")))
    build(tiny.model.with_name("broken.onnx"), tiny.model.with_name("broken.plan"))
    return tiny.model.with_name("broken.plan")


@pytest.fixture(scope="session")
def engine(tiny: Tiny) -> Engine:
    return Engine.load(tiny.plan)


class Bundled(NamedTuple):
    """The tiny detector as a bundled model: its checkpoint, and the plan that first use leaves in the cache."""

    checkpoint: Path
    plan: Path


@pytest.fixture(scope="session")
def stand_in(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Bundled:
    folder = tmp_path_factory.mktemp("bundled")
    checkpoint = folder / "models" / "demo.safetensors"
    checkpoint.parent.mkdir()
    state = torch.load(tiny.checkpoint, weights_only=True)
    halves = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    save_file(halves, checkpoint)
    checkpoint.with_suffix(".json").write_text(json.dumps({"spec": SPEC.to_dict()}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FPN_ENGINE_CACHE", str(folder / "cache"))
        patch.setattr(bundled_module, "CHECKPOINT", checkpoint)
        export_at_once(patch, tiny)
        settle_contest(patch)
        return Bundled(checkpoint, make_cached("demo", bundled_module.hash_bundled(), checkpoint))


def export_at_once(patch: pytest.MonkeyPatch, tiny: Tiny) -> list[ModelSpec]:
    """Let named models be exported as the tiny one was, which saves seconds; returns the specs they are given."""
    specs: list[ModelSpec] = []

    def export(model: object, spec: ModelSpec, **options: object) -> onnx.ModelProto:
        specs.append(spec)
        return onnx.load(str(tiny.model))

    patch.setattr("fpn_export.any_model.export_onnx", export)
    return specs


@pytest.fixture
def bundled(stand_in: Bundled, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Bundled:
    """The stand-in in the place of the bundled model, after its first use."""
    monkeypatch.setattr(bundled_module, "CHECKPOINT", stand_in.checkpoint)
    plan = workplace.parent / "cache" / "plans" / stand_in.plan.name
    plan.parent.mkdir(parents=True)
    os.link(stand_in.plan, plan)
    return Bundled(stand_in.checkpoint, plan)


def build(model: Path, plan: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FPN_ENGINE_CACHE", str(model.parent / "cache"))
        build_plan(model, plan, backend="onnxruntime")


def make_picture(height: int, width: int, seed: int = 0) -> Pixels:
    """Coloured squares."""
    cells = np.random.default_rng(seed).integers(0, 256, (-(-height // 8), -(-width // 8), 3), dtype=np.uint8)
    return np.ascontiguousarray(cells.repeat(8, axis=0).repeat(8, axis=1)[:height, :width])


def save_picture(path: Path, height: int = 60, width: int = 80, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(make_picture(height, width, seed)).save(path)
    return path


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, and nothing remembered from earlier runs."""
    folder = tmp_path / "workplace"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("FPN_ENGINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of processes that a test starts, as of this one
    settle_contest(monkeypatch)
    for variable in ("FPN_ENGINE_PLAN", "FPN_ENGINE_DEBUG", "COLUMNS", "FORCE_COLOR"):
        monkeypatch.delenv(variable, raising=False)
    return folder


class Ran(NamedTuple):
    """Exit code and output of a command."""

    code: int
    out: str
    err: str


Run = Callable[..., Ran]


@pytest.fixture
def run(workplace: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """``run("infer", path)`` as the command does it, in this process."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.getsignal(number) for number in numbers]
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")  # so that it is as before afterwards

    def command(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["fpn-engine", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        return Ran(int(end.value.code or 0), *capfd.readouterr())

    yield command
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)
