"""Cached plans of named models: made once, found again, made anew when something is amiss."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from onnx import ModelProto

import fpn_engine
from fpn_engine.errors import CheckpointError
from fpn_engine.locks import alone_on
from fpn_engine.plan import read_plan, rebuild_hint
from fpn_export import cached_plan
from fpn_export.bundled import hash_bundled
from fpn_export.cached_plan import FOLDER, find_cached, make_cached
from tests.contest import settle_contest
from tests.export.conftest import SPEC

PATIENCE = 60.0
CHECKPOINT = Path("model.pth")
OPTIMISED = ("trunk", "head", "rois", "detections")
BUILD = ["cut", *(f"optimise {part}" for part in OPTIMISED), "lower trunk", "lower head", "time", "write"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stand_in: ModelProto) -> Path:
    """Where the plans are; checkpoints are exported in no time."""

    def load(path: Path) -> Any:
        if path != CHECKPOINT:
            raise CheckpointError(f"{path} does not exist")
        return SimpleNamespace(model=None, spec=SPEC)

    monkeypatch.setenv("FPN_ENGINE_CACHE", str(tmp_path / "cache"))
    settle_contest(monkeypatch)
    monkeypatch.setattr(cached_plan, "load_any", load)
    monkeypatch.setattr(cached_plan, "export_any", lambda loaded, on_progress: stand_in)
    return tmp_path / "cache" / "plans"


def make(**options: Any) -> tuple[Path, list[str]]:
    """The plan and the steps that it took."""
    steps: list[str] = []
    return make_cached("demo", "abc", CHECKPOINT, on_progress=steps.append, **options), steps


def test_a_plan_is_made_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_cached("demo", "abc") is None
    plan, steps = make()
    assert steps == ["read", "read", *BUILD]
    assert sorted(path.name for path in folder.iterdir() if path.suffix != ".lock") == [plan.name]
    assert find_cached("demo", "abc") == plan
    assert make() == (plan, [])
    assert make(force=True) == (plan, ["read", "read", *BUILD])
    manifest = read_plan(plan).manifest
    assert manifest.spec == SPEC
    assert rebuild_hint(manifest) == "build it again with: fpn-engine build --model demo"
    assert find_cached("demo", "abcd") is None
    assert find_cached("coco", "abc") is None
    monkeypatch.setattr(fpn_engine, "__version__", "9.9")
    assert find_cached("demo", "abc") is None


def test_a_damaged_plan_is_made_anew(folder: Path) -> None:
    plan, _ = make()
    good = plan.read_bytes()
    plan.write_bytes(good[:-1])
    assert find_cached("demo", "abc") is None
    assert make()[1] == ["read", "read", *BUILD]
    assert plan.read_bytes() == good


def test_the_second_process_takes_what_the_first_made(folder: Path) -> None:
    plan, _ = make()
    aside = plan.rename(folder / "aside")
    steps: list[str] = []
    waits = threading.Event()

    def step(name: str) -> None:
        steps.append(name)
        waits.set()

    thread = threading.Thread(target=make_cached, args=("demo", "abc", CHECKPOINT), kwargs={"on_progress": step})
    with alone_on(plan, FOLDER):
        thread.start()
        assert waits.wait(PATIENCE)
        aside.rename(plan)
    thread.join(PATIENCE)
    assert steps == ["wait for another process that builds it"]


def test_what_fails_or_is_interrupted_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(CheckpointError):
        make_cached("demo", "abc", Path("missing.pth"))
    for name in ("build_plan", "export_any"):
        monkeypatch.setattr(cached_plan, name, interrupt)
        with pytest.raises(KeyboardInterrupt):
            make()
    assert [path.suffix for path in folder.iterdir()] == [".lock"]


def test_a_broken_installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fpn_export.bundled.CHECKPOINT", tmp_path / "demo.safetensors")
    with pytest.raises(CheckpointError, match=r"demo\.safetensors: No such file or directory\); install fpn-engine"):
        hash_bundled()
