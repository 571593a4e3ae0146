"""Plans for CUDA: built for a GPU that is not here, tuned at first load, and what is said where there is none."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fpn_engine.backends.native.cuda import loading
from fpn_engine.backends.native.cuda.choices import TunedTactics
from fpn_engine.backends.native.cuda.gpu import Gpu
from fpn_engine.backends.native.cuda.tactics import CUDNN_EPILOGUE, Tactic
from fpn_engine.backends.native.cuda.timing_cache import Timed
from fpn_engine.backends.native.cuda.tuning import Tuning
from fpn_engine.backends.native.cuda.work import Work
from fpn_engine.backends.native.loading import load_native
from fpn_engine.backends.native.ops import FLOAT16, FLOAT32, Cast
from fpn_engine.backends.native.packing import TACTICS, unpack_part
from fpn_engine.engine import Engine
from fpn_engine.errors import BackendError, PlanError
from fpn_engine.plan import Plan, read_plan
from fpn_export.build import build_plan
from fpn_export.native.tactics import TuneFor
from tests.engine.conftest import SPEC, Tiny, make_picture
from tests.engine.native.cuda.works import H200

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
SHAPES = ((1, 64, 96), (2, 96, 64))


def build(tiny: Tiny, folder: Path, **options: Any) -> Plan:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FPN_ENGINE_CACHE", str(folder / "cache"))
        return read_plan(build_plan(tiny.model, folder / "cuda.plan", **options).path)


@pytest.fixture(scope="module")
def plan(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    tune_for = TuneFor(target="sm_90", level="full", shapes=SHAPES)
    return build(tiny, tmp_path_factory.mktemp("cuda"), precision="fp16", tune_for=tune_for)


def test_a_plan_for_another_machine(plan: Plan) -> None:
    manifest = plan.manifest
    assert (manifest.backend, manifest.precision, manifest.device) == ("native", "fp16", "cuda")
    assert manifest.runtime == "native fp16 on the CUDA"
    assert manifest.versions["compute capability"] == "9.0"
    assert "gpu" not in manifest.versions
    tuned = TunedTactics.read(plan.parts[TACTICS])
    assert tuned == TunedTactics(gpu="", level="full", shapes=SHAPES)


def test_nothing_is_stored_in_float32_but_the_answers(plan: Plan) -> None:
    program, weights = unpack_part("trunk", plan.parts)
    dtypes = program.dtypes()
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert not any(isinstance(op, Cast) for op in program.ops)
    features = len(program.outputs) - 2 * len(SPEC.levels)
    assert {dtypes[name] for name in program.outputs[:features]} == {FLOAT16}
    assert {dtypes[name] for name in program.outputs[features:]} == {FLOAT32}


class FakeTune:
    """Finds cuDNN's convolution the best for everything, and counts."""

    def __init__(self) -> None:
        self.works: list[Work] = []

    def __call__(self, works: list[Work], tuned: TunedTactics) -> Tuning:
        self.works += works
        best = Timed(Tactic(CUDNN_EPILOGUE), 1.0, tuned.level)
        return Tuning({work.key: best for work in works if work.is_convolution}, measured=len(works))


def test_the_first_load_measures(plan: Plan) -> None:
    tune = FakeTune()
    choices = loading.settle(plan, H200, tune)
    assert {work.x[0] for work in tune.works if work.is_convolution} == {1, 2}
    assert {work.rows for work in tune.works if not work.is_convolution} == {40, 80}
    assert len({work.key for work in tune.works}) == len(tune.works) > 20
    assert all(choices.pick(work).name == CUDNN_EPILOGUE for work in tune.works if work.is_convolution)


def with_tactics(plan: Plan, data: bytes) -> Plan:
    return Plan(plan.manifest, plan.parts | {TACTICS: data})


def test_what_was_measured_on_this_gpu_is_taken(plan: Plan) -> None:
    works = loading.find_work(plan.parts, SPEC, TunedTactics.read(plan.parts[TACTICS]))
    known = {work.key: Tactic(CUDNN_EPILOGUE) for work in works if work.is_convolution}
    measured = with_tactics(plan, TunedTactics(gpu=H200.name, shapes=SHAPES, tactics=known).to_json())
    tune = FakeTune()
    assert loading.settle(measured, H200, tune).known == known
    assert tune.works == []
    loading.settle(measured, dataclasses.replace(H200, name="NVIDIA H100"), tune)
    assert len(tune.works) == len(works)


def change(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda values: values.update({name: value})


@pytest.mark.parametrize(
    ("alter", "said"),
    [
        (change("extra", 1), "has not the keys"),
        (change("format_version", 2), "has not the keys"),
        (change("level", "some"), "wrong value"),
        (change("gpu", 1), "wrong value"),
        (change("tactics", []), "wrong value"),
        (change("shapes", []), "wrong shapes"),
        (change("shapes", [[1, 2]]), "wrong shapes"),
        (change("shapes", [[1, 0, 32]]), "wrong shapes"),
        (change("tactics", {"1x2 linear": "magic"}), "there is no tactic 'magic'"),
        (change("tactics", {"1x2 linear": 5}), "there is no tactic 5"),
        (change("tactics", {"what": "cublas"}), "'what' names no work"),
    ],
)
def test_damaged_tactics(plan: Plan, alter: Callable[[dict[str, Any]], None], said: str) -> None:
    values = json.loads(plan.parts[TACTICS])
    alter(values)
    with pytest.raises(ValueError, match=said):
        TunedTactics.read(json.dumps(values).encode())
    for data in (b"", b"\xff", b"[" * 100_000):
        with pytest.raises(ValueError, match=r"not JSON|not the keys"):
            TunedTactics.read(data)


@no_gpu
def test_no_gpu_is_said_in_one_sentence(plan: Plan, tiny: Tiny, tmp_path: Path) -> None:
    for load in (load_native, Engine.from_plan):
        with pytest.raises(PlanError) as caught:
            load(plan)
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith(
            "the plan is for native fp16 on cuda, and PyTorch finds no CUDA device here"
        )
        assert str(caught.value).endswith("build it again with: fpn-engine build tiny.onnx --backend native")
    with pytest.raises(BackendError, match="PyTorch finds no CUDA device here"):
        build(tiny, tmp_path, tune_for=TuneFor())


def test_an_old_gpu(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    with pytest.raises(PlanError, match=r"Tesla T4 has compute capability 7.5, below 8.0; build it again with"):
        load_native(plan)


def test_what_does_not_go_together(tiny: Tiny, tmp_path: Path) -> None:
    target = TuneFor(target="sm_90")
    with pytest.raises(BackendError, match="onnxruntime backend is not built for CUDA this way"):
        build(tiny, tmp_path, backend="onnxruntime", tune_for=target)
    with pytest.raises(BackendError, match="there is no target 'sm_70'"):
        build(tiny, tmp_path, tune_for=TuneFor(target="sm_70"))
    with pytest.raises(BackendError, match="nothing to tune for 1x100x64; sides are multiples of 32"):
        build(tiny, tmp_path, tune_for=TuneFor(target="sm_90", shapes=((1, 100, 64),)))
    assert not (tmp_path / "cuda.plan").exists()


def test_the_plan_is_up_to_date_only_for_its_gpu(tiny: Tiny, tmp_path: Path) -> None:
    def is_cached(target: str) -> bool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FPN_ENGINE_CACHE", str(tmp_path / "cache"))
            return build_plan(tiny.model, tmp_path / "a.plan", tune_for=TuneFor(target=target)).cached

    assert [is_cached(target) for target in ("sm_90", "sm_90", "sm_89", "sm_89")] == [False, True, False, True]


def test_float16_on_the_cpu(tiny: Tiny, tmp_path: Path, engine: Engine) -> None:
    """Slow, but the numbers of a GPU."""
    plan = build(tiny, tmp_path, precision="fp16")
    assert (plan.manifest.backend, plan.manifest.device) == ("native", "cpu")
    pictures = [make_picture(60, 80), make_picture(90, 50)]
    for ours, theirs in zip(Engine.from_plan(plan)(pictures), engine(pictures), strict=True):
        assert abs(len(ours) - len(theirs)) <= 2
        assert abs(float(ours.scores[0]) - float(theirs.scores[0])) < 0.02


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_built_and_run_here(
    tiny: Tiny, tmp_path: Path, engine: Engine, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured at build, loaded without measuring, and the same detections as on the CPU."""
    plan = build(tiny, tmp_path, precision=precision, tune_for=TuneFor(shapes=((1, 64, 96),), seconds=60))
    gpu = Gpu.of_device(torch.device("cuda", 0))
    assert plan.manifest.versions["gpu"] == gpu.name
    assert TunedTactics.read(plan.parts[TACTICS]).gpu == gpu.name
    monkeypatch.setattr(loading, "tune_here", lambda *_: pytest.fail("it was measured already"))
    pictures = [make_picture(60, 80), make_picture(90, 50)]
    tolerance = 1e-3 if precision == "fp32" else 0.1
    for ours, theirs in zip(Engine.from_plan(plan)(pictures), engine(pictures), strict=True):
        assert abs(len(ours) - len(theirs)) <= (0 if precision == "fp32" else 5)
        assert abs(float(ours.scores[0]) - float(theirs.scores[0])) < tolerance


@pytest.mark.gpu
def test_tuned_at_the_first_load_once(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FPN_ENGINE_CACHE", str(tmp_path))
    untuned = with_tactics(plan, TunedTactics(shapes=((1, 64, 96),)).to_json())
    assert len(Engine.from_plan(untuned)(make_picture(60, 80))) == 1
    (path,) = (tmp_path / "tactics").iterdir()
    before = path.read_bytes()
    assert len(Engine.from_plan(untuned)(make_picture(60, 80))) == 1
    assert path.read_bytes() == before
