"""Which backend a build takes: by contest, by request, and what does not go together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from onnx import ModelProto, helper
from torch import Tensor

from fpn_engine.backends import TrunkOutput
from fpn_engine.errors import BackendError, ModelError
from fpn_engine.plan import read_plan
from fpn_engine.spec import ModelSpec, numbered_categories
from fpn_export import build as build_module
from fpn_export.build import build_key, build_plan
from fpn_export.contest import FEWEST_ROUNDS, MOST_ROUNDS, contest_size, hold_contest
from tests.contest import CHOICE, settle_contest
from tests.threads import one_thread

__all__ = ["one_thread"]

SMALL = ModelSpec(categories=numbered_categories(1), min_size=64, max_size=96)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stand_in: ModelProto) -> Path:
    monkeypatch.setenv("FPN_ENGINE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "model.onnx"
    path.write_bytes(stand_in.SerializeToString())
    return path


class Clock:
    """A clock that stands still but while a runner runs."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Runner:
    """A trunk whose runs take the given seconds in turn, the last for ever."""

    def __init__(self, clock: Clock, *seconds: float) -> None:
        self.clock, self.seconds, self.shapes = clock, list(seconds), []  # type: ignore[var-annotated]

    def __call__(self, images: Tensor, /) -> TrunkOutput:
        self.shapes.append(tuple(images.shape))
        self.clock.now += self.seconds.pop(0) if len(self.seconds) > 1 else self.seconds[0]
        return TrunkOutput((), (), ())


def test_the_shortest_run_wins_after_a_warm_up() -> None:
    clock = Clock()
    noisy = Runner(clock, 0.001, 0.9, 0.1, 0.9)  # its shortest that counts is 0.1
    steady = Runner(clock, 5.0, 0.2)
    verdict = hold_contest({"steady": steady, "noisy": noisy}, SMALL, clock)
    assert verdict.backend == "noisy"
    assert verdict.reason == "taking noisy: the trunk at 32x32 took steady 200.0 ms, noisy 100.0 ms"
    assert set(noisy.shapes) == {(1, 3, 32, 32)}


@pytest.mark.parametrize(("seconds", "rounds"), [(0.001, MOST_ROUNDS), (10.0, FEWEST_ROUNDS), (0.3, 4)])
def test_slow_trunks_run_less_often(seconds: float, rounds: int) -> None:
    clock = Clock()
    runner = Runner(clock, seconds)
    hold_contest({"a": runner, "b": Runner(clock, seconds)}, SMALL, clock)
    assert len(runner.shapes) == 1 + rounds


def test_size() -> None:
    assert contest_size(ModelSpec(categories=numbered_categories(1))) == (384, 544)
    assert contest_size(ModelSpec(categories=numbered_categories(1), min_size=20, max_size=20)) == (32, 32)


@pytest.mark.parametrize("winner", ["onnxruntime", "native"])
def test_the_winner_is_built(model: Path, winner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settle_contest(monkeypatch, winner)
    notes: list[str] = []
    plan = model.with_suffix(".plan")
    built = build_plan(model, plan, on_note=notes.append)
    assert (built.manifest.backend, notes) == (winner, [CHOICE.replace("onnxruntime", winner)])
    assert set(built.manifest.versions) == {"fpn-engine", "torch" if winner == "native" else "onnxruntime"}
    assert build_plan(model, plan, on_note=notes.append).cached
    assert len(notes) == 1, "a plan that is up to date is not timed again"
    assert not build_plan(model, plan, backend=winner).cached, "another request is another build"
    assert read_plan(plan).parts == build_parts(model, winner)


def build_parts(model: Path, backend: str) -> dict[str, bytes]:
    return read_plan(build_plan(model, model.with_name("other.plan"), backend=backend, force=True).path).parts


def test_a_real_contest_names_both(model: Path) -> None:
    notes: list[str] = []
    built = build_plan(model, model.with_suffix(".plan"), on_note=notes.append)
    (line,) = notes
    assert line.startswith(f"taking {built.manifest.backend}: the trunk at 384x544 took onnxruntime ")
    assert ", native " in line


def spoil(model: Path, stand_in: ModelProto) -> None:
    """Put an operator in that the native backend does not have."""
    spoilt = ModelProto()
    spoilt.CopyFrom(stand_in)
    for node in spoilt.graph.node:
        if node.output[0] == "p2":
            node.output[0] = "before"
    spoilt.graph.node.insert(1, helper.make_node("Softsign", ["before"], ["p2"], name="odd"))
    model.write_bytes(spoilt.SerializeToString())


def test_a_missing_operator_leaves_onnxruntime(model: Path, stand_in: ModelProto) -> None:
    spoil(model, stand_in)
    notes: list[str] = []
    built = build_plan(model, model.with_suffix(".plan"), on_note=notes.append)
    assert built.manifest.backend == "onnxruntime"
    assert notes[0].startswith(f"taking onnxruntime: {model}: the native backend does not have the operator Softsign")
    with pytest.raises(ModelError, match=r"operator Softsign \(odd\); build with --backend onnxruntime, which runs it"):
        build_plan(model, model.with_suffix(".plan"), backend="native")


@pytest.mark.parametrize(
    ("backend", "precision", "message"),
    [
        ("tensorflow", "fp32", "there is no backend 'tensorflow'; take one of auto, onnxruntime, native"),
        ("auto", "fp64", "there is no precision 'fp64'; take one of fp32, fp16, bf16"),
        ("onnxruntime", "bf16", "the onnxruntime backend does not run bf16; take --backend native or fp32"),
    ],
)
def test_what_does_not_go_together(model: Path, backend: str, precision: str, message: str) -> None:
    with pytest.raises(BackendError, match=message):
        build_plan(model, model.with_suffix(".plan"), backend=backend, precision=precision)
    assert not model.with_suffix(".plan").exists()


def test_bf16_needs_a_processor_that_has_it(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_module, "has_bfloat16", lambda: False)
    with pytest.raises(BackendError, match="cannot convolve in bf16; build with --precision fp32"):
        build_plan(model, model.with_suffix(".plan"), precision="bf16")


def test_the_key_tells_options_and_versions_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    options = [("auto", "fp32"), ("onnxruntime", "fp32"), ("native", "fp32"), ("native", "bf16"), ("auto", "bf16")]
    keys = {build_key("digest", *option) for option in options}
    assert len(keys) == len(options)
    monkeypatch.setattr(torch, "__version__", "99.0")
    changed = {build_key("digest", *option) for option in options}
    assert len(changed - keys) == 4, "a plan for onnxruntime does not depend on torch"
