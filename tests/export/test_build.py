"""Builds: what they write, and what is left when they are repeated, doubled, interrupted and killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
import zipfile
from collections.abc import Callable
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import ModelProto, TensorProto, helper

import fpn_engine
from fpn_engine.backends.ort import open_session
from fpn_engine.errors import FpnEngineError
from fpn_engine.plan import MANIFEST, read_plan
from fpn_export.build import build_plan
from fpn_export.detector import FasterRCNN
from fpn_export.onnx_export import export_onnx
from fpn_export.onnx_network import SPEC_KEY
from tests.export.conftest import SPEC

STEPS = ["read", "cut", *(f"optimise {part}" for part in ("trunk", "head", "rois", "detections")), "write"]
PATIENCE = 60.0  # seconds for a process to get somewhere


@pytest.fixture(scope="session")
def exported() -> ModelProto:
    """A real detector: what comes out matters."""
    torch.manual_seed(0)
    return export_onnx(FasterRCNN(SPEC, representation_size=32).eval(), SPEC)


@pytest.fixture(scope="session")
def processes() -> ForkServerContext:
    """Fresh processes that have imported what a build needs already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fpn_export.build"])
    return context


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for model and plan; the cache is beside it."""
    monkeypatch.setenv("FPN_ENGINE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "folder").mkdir()
    return tmp_path / "folder"


@pytest.fixture
def model(folder: Path, stand_in: ModelProto) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(stand_in.SerializeToString())
    return path


@pytest.fixture
def real_model(folder: Path, exported: ModelProto) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(exported.SerializeToString())
    return path


@pytest.fixture
def plan(folder: Path) -> Path:
    return folder / "model.plan"


def build_here(model: Path, plan: Path, **options: Any) -> tuple[bool, list[str]]:
    """Build and say whether the plan was kept, and the steps."""
    steps: list[str] = []
    built = build_plan(model, plan, on_progress=steps.append, **{"backend": "onnxruntime", **options})
    assert built.path == plan
    assert built.manifest == read_plan(plan).manifest
    return built.cached, steps


def assert_tidy(folder: Path) -> None:
    """Nothing but the model and the plan, and nothing but locks in the cache."""
    assert sorted(path.name for path in folder.iterdir()) == ["model.onnx", "model.plan"]
    assert {path.suffix for path in (folder.parent / "cache" / "builds").iterdir()} == {".lock"}


def test_plan_of_an_export(folder: Path, real_model: Path, plan: Path) -> None:
    assert build_here(real_model, plan) == (False, STEPS)
    read = read_plan(plan)
    assert (read.manifest.spec, read.manifest.source, read.manifest.backend) == (SPEC, "model.onnx", "onnxruntime")
    trunk, head = (open_session(read.parts[name]) for name in ("trunk.onnx", "head.onnx"))
    assert [value.name for value in trunk.get_inputs()] == ["image"]
    assert [value.name for value in head.get_outputs()] == ["class_logits", "box_deltas"]
    before = plan.read_bytes()
    assert build_here(real_model, plan, force=True) == (False, STEPS)
    assert plan.read_bytes() == before, "the same build gives the same bytes"
    assert build_here(real_model, plan) == (True, ["read"])
    assert_tidy(folder)


def test_same_input_is_kept(folder: Path, model: Path, plan: Path) -> None:
    build_here(model, plan)
    written = plan.stat()
    assert build_here(model, plan) == (True, ["read"])
    moved = model.rename(folder / "other.onnx")  # what counts is the content
    assert build_here(moved, plan) == (True, ["read"])
    moved.rename(model)
    assert (plan.stat().st_ino, plan.stat().st_mtime_ns) == (written.st_ino, written.st_mtime_ns)
    before = plan.read_bytes()
    assert build_here(model, plan, force=True) == (False, STEPS)
    assert plan.stat().st_ino != written.st_ino
    assert plan.read_bytes() == before, "the same build gives the same bytes"
    assert_tidy(folder)


def test_changed_input_or_version_is_built_again(
    model: Path, plan: Path, stand_in: ModelProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_here(model, plan)
    changed = ModelProto()
    changed.CopyFrom(stand_in)
    changed.doc_string = "changed"
    model.write_bytes(changed.SerializeToString())
    assert build_here(model, plan)[0] is False
    assert build_here(model, plan)[0] is True
    monkeypatch.setattr(fpn_engine, "__version__", "99.0")
    assert build_here(model, plan)[0] is False


@pytest.mark.parametrize("damage", ["flip", "truncate", "text", "other format"])
def test_damaged_plan_is_built_again(folder: Path, model: Path, plan: Path, damage: str) -> None:
    build_here(model, plan)
    good = plan.read_bytes()
    if damage == "flip":
        changed = bytearray(good)
        changed[len(good) // 2] ^= 1
        plan.write_bytes(changed)
    elif damage == "truncate":
        plan.write_bytes(good[:-1])
    elif damage == "text":
        plan.write_text("not a plan")
    else:
        with zipfile.ZipFile(plan, "w") as archive:
            archive.writestr(MANIFEST, json.dumps({"format_version": 99}))
    assert build_here(model, plan)[0] is False
    assert plan.read_bytes() == good
    assert_tidy(folder)


def refuse(model: Path, plan: Path, *words: str) -> None:
    with pytest.raises(FpnEngineError) as caught:
        build_plan(model, plan, backend="onnxruntime")
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_what_cannot_be_built(folder: Path, model: Path, plan: Path, stand_in: ModelProto) -> None:
    refuse(folder / "no.onnx", plan, "there is no file", "fpn-engine export checkpoint.pth")
    refuse(model, folder, "it is a folder")
    refuse(model, folder / "." / "model.onnx", "would replace the model", "-o")
    (folder / "link.plan").symlink_to(model)
    refuse(model, folder / "link.plan", "would replace the model")
    (folder / "link.plan").unlink()
    refuse(model, model / "model.plan", "cannot write", "give a place that is writable")
    assert model.read_bytes() == stand_in.SerializeToString()
    assert list(folder.iterdir()) == [model]


def test_model_without_the_tensors_to_cut_at(folder: Path, plan: Path) -> None:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in ("image", "p2"))
    graph = helper.make_graph([helper.make_node("Relu", ["image"], ["p2"])], "tiny", [x], [y])
    tiny = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    helper.set_model_props(tiny, {SPEC_KEY: SPEC.to_json()})
    path = folder / "tiny.onnx"
    onnx.save(tiny, path)
    refuse(path, plan, f"cannot cut {path}", "has no tensor p3", "export it again")
    assert not plan.exists()


def test_model_that_onnxruntime_refuses(folder: Path, model: Path, plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("[ONNXRuntimeError] : 1 : FAIL\nat a line of its source")

    monkeypatch.setattr(ort, "InferenceSession", refused)
    refuse(model, plan, f"cannot optimise {model}", "([ONNXRuntimeError] : 1 : FAIL)", "export it again")
    monkeypatch.undo()
    assert list(folder.iterdir()) == [model]


def test_cache_folder_that_cannot_be_written(
    folder: Path, model: Path, plan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = folder.parent / "blocked"
    blocked.mkdir()
    (blocked / "builds").write_text("a file where a folder should be")
    for cache in (model / "cache", blocked):
        monkeypatch.setenv("FPN_ENGINE_CACHE", str(cache))
        refuse(model, plan, "cannot use the cache folder", "set FPN_ENGINE_CACHE to a folder that is writable")
    assert not plan.exists()


def test_what_killed_builds_left_is_removed(folder: Path, model: Path, plan: Path) -> None:
    build_here(model, plan, force=True)
    (folder / ".model.plan.123.tmp").write_text("half")
    neighbour = folder / ".other.plan.123.tmp"
    neighbour.touch()
    (work,) = (path.with_suffix("") for path in (folder.parent / "cache" / "builds").glob("*.lock"))
    work.mkdir()
    (work / "trunk.onnx").write_text("half")
    assert build_here(model, plan)[0] is True
    neighbour.unlink()
    assert_tidy(folder)


def _build_in_process(model: Path, plan: Path, cache: Path, log: Path, act: Callable[[str], None]) -> None:
    """Runs in a child: ``log`` gets each step as it begins, then "kept", "built" or "interrupted"."""
    os.environ["FPN_ENGINE_CACHE"] = str(cache)

    def step(name: str) -> None:
        with log.open("a") as stream:
            stream.write(name + "\n")
        act(name)

    try:
        built = build_plan(model, plan, backend="onnxruntime", force="force" in log.name, on_progress=step)
        step("kept" if built.cached else "built")
    except KeyboardInterrupt:
        step("interrupted")


class KillAt:
    """Sends this process a signal at a step; "half written" is within the last one."""

    def __init__(self, number: int, step: str) -> None:
        self.number, self.step = number, step

    def __call__(self, step: str) -> None:
        if step == self.step:
            os.kill(os.getpid(), self.number)
        if step == "write" and self.step == "half written":
            writestr = zipfile.ZipFile.writestr

            def half(archive: zipfile.ZipFile, info: zipfile.ZipInfo, data: bytes) -> None:
                writestr(archive, info, data)
                if info.filename == "trunk.onnx":
                    os.kill(os.getpid(), self.number)

            zipfile.ZipFile.writestr = half  # type: ignore[method-assign,assignment]


class WaitAt:
    """Stops at a step until a file appears."""

    def __init__(self, step: str, until: Path) -> None:
        self.step, self.until = step, until

    def __call__(self, step: str) -> None:
        while step == self.step and not self.until.exists():
            time.sleep(0.01)


def do_nothing(step: str) -> None:
    """Just build."""


def start(
    processes: ForkServerContext, model: Path, plan: Path, name: str, act: Callable[[str], None]
) -> tuple[ForkServerProcess, Path]:
    top = plan.parent.parent
    log = top / f"{name}.log"
    process = processes.Process(target=_build_in_process, args=(model, plan, top / "cache", log, act), daemon=True)
    process.start()
    return process, log


def steps_of(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


def wait_for(process: ForkServerProcess, log: Path, step: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while step not in steps_of(log):
        alive = process.is_alive() and time.monotonic() < deadline
        assert alive or step in steps_of(log), f"{log.name} never came to {step}: {steps_of(log)}"
        time.sleep(0.01)


def finish(process: ForkServerProcess) -> int | None:
    process.join(PATIENCE)
    assert process.exitcode is not None, "a build hangs"
    return process.exitcode


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["SIGINT", "SIGKILL"])
@pytest.mark.parametrize("step", [*STEPS, "half written"])
def test_interrupted_build_leaves_the_old_plan(
    processes: ForkServerContext, folder: Path, model: Path, plan: Path, step: str, number: int
) -> None:
    plan.write_text("the old plan")
    process, log = start(processes, model, plan, "force", KillAt(number, step))
    assert finish(process) == (-number if number == signal.SIGKILL else 0)
    assert plan.read_text() == "the old plan"
    if number == signal.SIGINT:
        assert steps_of(log)[-1] == "interrupted"
        assert_tidy(folder)
    elif step == "half written":
        assert len(list(folder.iterdir())) == 3, "the test has to leave something to tidy up"


@pytest.mark.parametrize(("which", "attempts"), [("model", 25), ("real_model", 2)])
def test_killed_at_any_moment(
    processes: ForkServerContext, folder: Path, plan: Path, which: str, attempts: int, request: pytest.FixtureRequest
) -> None:
    """SIGKILL at random moments, one build after another on what the last one left; then one that ends well."""
    generator = random.Random(0)
    model = request.getfixturevalue(which)
    begin = time.perf_counter()
    build_here(model, plan)
    seconds, good = time.perf_counter() - begin, plan.read_bytes()
    for attempt in range(attempts):
        if attempt % 2:
            plan.unlink(missing_ok=True)
        had_one = plan.exists()
        process, log = start(processes, model, plan, f"force {attempt}", do_nothing)
        wait_for(process, log, "read")
        time.sleep(generator.uniform(0, seconds))
        process.kill()
        finish(process)
        assert plan.exists() or not had_one
        assert not plan.exists() or plan.read_bytes() == good
    assert build_here(model, plan, force=True) == (False, STEPS)
    assert plan.read_bytes() == good
    assert_tidy(folder)


def test_two_builds_at_once(processes: ForkServerContext, folder: Path, model: Path, plan: Path) -> None:
    """One works, the other waits and takes the result."""
    go = folder.parent / "go"
    first, first_log = start(processes, model, plan, "first", WaitAt("optimise trunk", go))
    wait_for(first, first_log, "optimise trunk")
    second, second_log = start(processes, model, plan, "second", do_nothing)
    wait_for(second, second_log, "wait for another build of this plan")
    go.touch()
    assert (finish(first), finish(second)) == (0, 0)
    assert steps_of(first_log) == [*STEPS, "built"]
    assert steps_of(second_log) == ["wait for another build of this plan", "read", "kept"]
    assert_tidy(folder)


def test_killed_holder_does_not_block(processes: ForkServerContext, folder: Path, model: Path, plan: Path) -> None:
    first, first_log = start(processes, model, plan, "first", WaitAt("optimise head", folder / "never"))
    wait_for(first, first_log, "optimise head")
    second, second_log = start(processes, model, plan, "second", do_nothing)
    wait_for(second, second_log, "wait for another build of this plan")
    first.kill()
    finish(first)
    assert finish(second) == 0
    assert steps_of(second_log)[1:] == [*STEPS, "built"]
    assert_tidy(folder)


def test_builds_of_different_plans_do_not_wait(
    processes: ForkServerContext, folder: Path, model: Path, plan: Path
) -> None:
    first, log = start(processes, model, folder / "other.plan", "first", WaitAt("cut", folder / "never"))
    wait_for(first, log, "cut")
    assert build_here(model, plan) == (False, STEPS)
    first.kill()
    finish(first)
