"""``fpn-engine bench``: what it says of a plan's speed, and that the stages it names are the pipeline's."""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
from PIL import Image

from fpn_engine.engine import Engine
from fpn_engine.profiling import WHOLE, time_engine, time_stages
from fpn_engine.ruler import Spread
from fpn_engine.stages import BOX_HEAD, POOLING, PREPROCESS, STAGES, TRUNK, stage, watching
from tests.engine.conftest import Run, Tiny, make_picture


def test_figures_for_machines(tiny: Tiny, run: Run, tmp_path: Path) -> None:
    for number in range(3):
        Image.fromarray(make_picture(60 + number, 80, number)).save(tmp_path / f"{number}.png")
    done = run(
        "bench", str(tiny.plan), "--images", str(tmp_path), "--batch", "2", "--rounds", "4", "--profile", "--json"
    )
    assert done.code == 0, done.err
    facts = json.loads(done.out)
    assert facts["pictures"] == f"3 of {tmp_path}"
    assert facts["milliseconds"]["rounds"] == 4
    assert 0 < facts["milliseconds"]["p20"] <= facts["milliseconds"]["median"] <= facts["milliseconds"]["p80"]
    assert facts["images per second"] == pytest.approx(2e3 / facts["milliseconds"]["median"], rel=1e-2)
    stages = facts["stages, milliseconds"]
    assert list(stages) == [*STAGES, WHOLE]
    assert 0 < sum(stages[name] for name in STAGES) <= 1.5 * stages[WHOLE]
    assert facts["machine"]["packages"]["torch"]
    assert not {"floors, milliseconds", "peaks"} & facts.keys(), "the operations of this plan are not known"


def test_floors_of_a_native_plan(tiny: Tiny, run: Run, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fpn_engine.roofline.SIDE", {"cpu": 256})
    monkeypatch.setattr("fpn_engine.roofline.COPIED", {"cpu": 1 << 20})
    assert run("build", tiny.model, "--backend", "native", "-o", "native.plan").code == 0
    facts = json.loads(run("bench", "native.plan", "--rounds", "2", "--profile", "--json").out)
    floors = facts["floors, milliseconds"]
    assert list(floors) == [PREPROCESS, TRUNK, POOLING, BOX_HEAD]
    assert all(0 < floor < facts["stages, milliseconds"][name] for name, floor in floors.items())
    assert facts["peaks"]["TFLOP_per_s"] > 0
    table = run("bench", "native.plan", "--rounds", "2", "--profile").out
    assert "of floor" in table
    assert "TFLOP/s" in table


def test_a_table_for_people_and_a_trace(tiny: Tiny, run: Run, tmp_path: Path) -> None:
    trace = tmp_path / "traces" / "call.json"
    done = run("bench", str(tiny.plan), "--rounds", "2", "--profile", "--trace", str(trace))
    assert done.code == 0, done.err
    assert "images a second" in done.out
    assert "drawn scenes" in done.out
    for name in (*STAGES, "everything else"):
        assert name in done.out
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert names >= set(STAGES)


def test_pictures_that_cannot_be_read(tiny: Tiny, run: Run, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    done = run("bench", str(tiny.plan), "--images", str(tmp_path))
    assert done.code == 1
    assert f"no picture in {tmp_path} can be read" in done.err


def test_a_plan_that_is_not_there(run: Run) -> None:
    done = run("bench", "missing.plan")
    assert done.code == 1
    assert "missing.plan" in done.err


def test_rounds_fill_the_time_unless_they_are_counted(engine: Engine) -> None:
    images = [[make_picture(60, 80, 0)]]
    assert time_engine(engine, images, rounds=2).rounds == 2
    assert time_engine(engine, images, seconds=0.0).rounds == 5
    began = time.perf_counter()
    spread = time_engine(engine, images, seconds=1.0)
    assert time.perf_counter() - began > 1.0
    assert spread.rounds > 5


def test_a_spread_is_in_milliseconds() -> None:
    spread = Spread.of([0.001 * number for number in range(1, 12)])
    assert (spread.p20, spread.median, spread.p80, spread.rounds) == pytest.approx((3, 6, 9, 11))


def test_a_slow_stage_is_seen(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    image = [make_picture(60, 80, 0)]
    before = time_stages(engine, image)
    pipeline = engine._runner._pipeline  # type: ignore[attr-defined]
    trunk = pipeline.trunk

    def slow(images: object) -> object:
        time.sleep(0.2)
        return trunk(images)

    monkeypatch.setattr(pipeline, "trunk", slow)
    after = time_stages(engine, image)
    assert after[TRUNK] > before[TRUNK] + 100
    assert after[WHOLE] > after[TRUNK]
    assert sum(after[name] for name in STAGES) < 2 * after[TRUNK]


def test_nobody_watches_outside(engine: Engine) -> None:
    seen: list[str] = []

    def watch(name: str) -> nullcontext[None]:
        seen.append(name)
        return nullcontext()

    with watching(watch):
        engine(make_picture(60, 80, 0))
    assert tuple(seen) == STAGES
    engine(make_picture(60, 80, 0))
    with stage(TRUNK):
        pass
    assert len(seen) == len(STAGES)
