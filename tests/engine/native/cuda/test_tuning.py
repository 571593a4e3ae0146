"""The tuner with a clock that tells what the test wants: fastest right one, wrong ones out, remembered, in time."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fpn_engine.backends.native.cpu import DTYPES, make_exact_run
from fpn_engine.backends.native.cpu_convolution import Run
from fpn_engine.backends.native.cuda import tuning as tuning_module
from fpn_engine.backends.native.cuda.tactics import CUDNN_EPILOGUE, CUDNN_FUSED, GEMM, Tactic, candidates
from fpn_engine.backends.native.cuda.timing_cache import Timed, TimingCache
from fpn_engine.backends.native.cuda.tuning import ROUNDS, TRIAL_ROUNDS, Tuner
from fpn_engine.backends.native.cuda.work import Work
from fpn_engine.backends.native.ops import BFLOAT16
from fpn_kernels.triton.tiles import TILES
from tests.engine.native.cuda.works import H200, SMALL, conv

CPU = torch.device("cpu")
VERSIONS = {"torch": "1", "triton": "2", "cudnn": "3"}
WORK = SMALL["residual"]
Times = dict[str, float]


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FPN_ENGINE_CACHE", str(tmp_path))
    return tmp_path


class Bench:
    """Stand-ins for implementations: each is right, and its time by name is what the clock tells."""

    def __init__(self, times: Times) -> None:
        self.times = times
        self.calls: list[Tactic] = []
        self.timed: list[Tactic] = []
        self.broken: dict[str, Callable[[Tensor], Tensor]] = {}

    def make_run(self, tactic: Tactic, work: Work, given: dict[str, Tensor]) -> Run:
        right = make_exact_run(work.op(), given, DTYPES[work.out_dtype])

        def run(inputs: Any, out: Tensor | None) -> Tensor:
            self.calls.append(tactic)
            result = right(inputs, out)
            return self.broken.get(tactic.name, lambda x: x)(result)

        return run

    def clock(self, call: Callable[[], object]) -> float:
        call()
        self.timed.append(self.calls[-1])
        return self.times.get(self.calls[-1].name, 50.0) + 0.01 * len(self.timed)

    def tuner(self, cache: TimingCache | None = None, **options: Any) -> Tuner:
        cache = cache or TimingCache(H200, VERSIONS)
        return Tuner(H200, CPU, self.clock, cache, make_run=self.make_run, **options)


def test_the_fastest_wins() -> None:
    for number, fastest in enumerate((CUDNN_FUSED, CUDNN_EPILOGUE, GEMM)):
        work = conv(4, 6 + number, 64, 16)
        tuning = Bench({fastest: 5.0}).tuner()([work])
        assert tuning.timed[work.key].tactic.name == fastest
        assert 5 <= tuning.timed[work.key].microseconds < 10
        assert (tuning.measured, tuning.notes, tuning.is_complete) == (1, [], True)


def test_all_take_turns_and_the_slow_are_left_out() -> None:
    bench = Bench({CUDNN_EPILOGUE: 40.0, GEMM: 100.0, CUDNN_FUSED: 45.0})
    bench.tuner()([WORK])
    listed = candidates(WORK, H200, "quick")
    assert bench.timed[: len(listed)] == listed
    counts = {tactic.name: bench.timed.count(tactic) for tactic in listed}
    assert counts == {CUDNN_EPILOGUE: ROUNDS["quick"], CUDNN_FUSED: ROUNDS["quick"], GEMM: TRIAL_ROUNDS}


def spoil_corner(x: Tensor) -> Tensor:
    x[0, -1, -1, -1] += 0.05
    return x


def test_one_wrong_number_among_many_is_seen() -> None:
    """Too few to count in a norm, as a tile's border is."""
    work = conv(64, 64, 64, 16)
    bench = Bench({CUDNN_FUSED: 1.0})
    bench.broken[CUDNN_FUSED] = spoil_corner
    tuning = bench.tuner()([work])
    assert tuning.timed[work.key].tactic.name != CUDNN_FUSED
    assert "at worst" in tuning.notes[0]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda x: x * 1.01, "is wrong by"),
        (lambda x: torch.full_like(x, torch.nan), "is wrong by nan"),
        (lambda x: x.nan_to_num(0.0), "makes numbers of NaN"),
    ],
    ids=["scaled", "nan", "relu"],
)
def test_what_is_wrong_is_left_out(spoil: Callable[[Tensor], Tensor], said: str) -> None:
    bench = Bench({CUDNN_FUSED: 1.0, CUDNN_EPILOGUE: 5.0})
    bench.broken[CUDNN_FUSED] = spoil
    tuning = bench.tuner()([WORK])
    assert tuning.timed[WORK.key].tactic == Tactic(CUDNN_EPILOGUE)
    (note,) = tuning.notes
    assert note.startswith(f"{WORK.key}: cudnn_fused {said}")
    assert Tactic(CUDNN_FUSED) not in bench.timed


def test_bfloat16_may_hide_nan() -> None:
    """It has float32's range: finite tensors make no NaN in it."""
    work = SMALL["bfloat16"]
    bench = Bench({CUDNN_FUSED: 1.0})
    bench.broken[CUDNN_FUSED] = lambda x: x.nan_to_num(0.0)
    assert work.dtype == BFLOAT16
    assert bench.tuner()([work]).timed[work.key].tactic == Tactic(CUDNN_FUSED)


def test_what_gives_other_bits_each_time_is_left_out() -> None:
    signs = itertools.cycle((1.0, 1.0 + 2.0**-10))
    bench = Bench({CUDNN_FUSED: 1.0, CUDNN_EPILOGUE: 5.0})
    bench.broken[CUDNN_FUSED] = lambda x: x * next(signs)
    tuning = bench.tuner()([WORK])
    assert tuning.timed[WORK.key].tactic == Tactic(CUDNN_EPILOGUE)
    assert tuning.notes == [f"{WORK.key}: cudnn_fused gives other bits the second time"]


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="torch before 2.9 has one interface to TF32")
def test_torchs_settings_are_neither_read_nor_changed() -> None:
    """By its older interface that fails once the program has used the newer one."""
    settings = torch.backends.cudnn.conv
    before = settings.fp32_precision
    settings.fp32_precision = "ieee"
    try:
        with pytest.raises(RuntimeError, match="mix of the legacy and new APIs"):
            _ = torch.backends.cudnn.allow_tf32
        assert Bench({}).tuner()([WORK]).measured == 1
        assert settings.fp32_precision == "ieee"
    finally:
        settings.fp32_precision = before
    assert torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("name", SMALL)
def test_float32_is_that_of_the_cpu(name: str) -> None:
    work = SMALL[name]
    given = tuning_module._make_inputs(work, CPU, seed=1)
    inputs = [given[key] for key in work.op().inputs]
    expected = make_exact_run(work.op(), given, torch.float32)(inputs, None)
    torch.testing.assert_close(tuning_module._compute_float32(work, given), expected, rtol=1e-5, atol=1e-5)


def test_what_does_not_run_is_left_out() -> None:
    def refuse(x: Tensor) -> Tensor:
        raise RuntimeError("out of resource: shared memory\nRequired: 300000")

    bench = Bench({GEMM: 1.0, CUDNN_EPILOGUE: 9.0})
    bench.broken[GEMM] = refuse
    tuning = bench.tuner()([WORK])
    assert tuning.timed[WORK.key].tactic == Tactic(CUDNN_EPILOGUE)
    assert len(tuning.notes) == sum(t.name == GEMM for t in candidates(WORK, H200, "quick"))
    assert tuning.notes[0].endswith("does not run here (RuntimeError: out of resource: shared memory)")


def test_nothing_is_right() -> None:
    bench = Bench({})
    bench.broken = dict.fromkeys((CUDNN_FUSED, CUDNN_EPILOGUE, GEMM), lambda x: x + 1)
    tuning = bench.tuner()([WORK])
    assert tuning.timed == {}
    assert tuning.notes[-1] == f"{WORK.key}: no tactic is right"


def test_measured_once(cache_folder: Path) -> None:
    first, second = Bench({GEMM: 1.0}), Bench({CUDNN_EPILOGUE: 1.0})
    measured = first.tuner()([WORK])
    remembered = second.tuner()([WORK])
    assert remembered.timed == {k: replace(t, microseconds=round(t.microseconds, 3)) for k, t in measured.timed.items()}
    assert (remembered.measured, second.timed) == (0, [])
    assert len(list((cache_folder / "tactics").iterdir())) == 1


@pytest.mark.parametrize("what", ["gpu", "version"])
def test_another_gpu_or_version_is_measured_anew(what: str) -> None:
    Bench({GEMM: 1.0}).tuner()([WORK])
    gpu = replace(H200, name="NVIDIA H100") if what == "gpu" else H200
    cache = TimingCache(gpu, VERSIONS | ({"triton": "4"} if what == "version" else {}))
    assert cache.find(WORK.key, "quick") is None
    assert Bench({CUDNN_EPILOGUE: 1.0}).tuner(cache)([WORK]).measured == 1
    assert TimingCache(H200, VERSIONS).find(WORK.key, "quick") is not None


def test_what_cudnn_measured_is_kept_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its fused kernels are other ones then."""
    TimingCache(H200).add({WORK.key: Timed(Tactic(CUDNN_FUSED), 1.0, "full")})
    assert TimingCache(H200).find(WORK.key, "quick") is not None
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", not torch.backends.cudnn.benchmark)
    assert TimingCache(H200).find(WORK.key, "quick") is None


def test_full_is_not_content_with_quick() -> None:
    quick, full = Bench({}), Bench({})
    quick.tuner()([WORK])
    assert full.tuner(level="full")([WORK]).measured == 1
    assert len(set(full.timed)) > len(set(quick.timed))
    assert Bench({}).tuner()([WORK]).measured == 0, "quick is content with full"


def test_the_time_is_up() -> None:
    clock = iter([0.0, 1.0, 11.0, 12.0])
    works = [conv(4, 6, 64, o) for o in (16, 32, 48)]
    tuning = Bench({}).tuner(seconds=10.0, now=lambda: next(clock))(works)
    assert (len(tuning.timed), tuning.measured, tuning.is_complete) == (1, 1, False)
    assert tuning.notes == ["2 of 3 layers are not measured: the time was up"]
    assert Bench({}).tuner()(works).measured == 2, "the next one goes on"


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b"\xff",
        b"[]",
        b'{"format_version": 1}',
        b'{"format_version": 1, "for": {}, "timed": {}}',
        "entry",
        "key",
    ],
)
def test_a_damaged_cache_is_ignored_with_one_warning(
    cache_folder: Path, damage: bytes | str, caplog: pytest.LogCaptureFixture
) -> None:
    Bench({}).tuner()([WORK])
    (path,) = (cache_folder / "tactics").iterdir()
    if isinstance(damage, str):
        values = json.loads(path.read_text())
        values["timed"] = {"entry": {WORK.key: ["magic", 1.0, "quick"]}, "key": {"0x0 no": ["cublas", 1.0, "quick"]}}[
            damage
        ]
        path.write_text(json.dumps(values))
    else:
        path.write_bytes(damage)
    with caplog.at_level(logging.WARNING):
        cache = TimingCache(H200, VERSIONS)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "ignoring the damaged timing cache" in caplog.text
    assert cache.timed == {}
    caplog.clear()
    assert Bench({}).tuner(cache)([WORK]).measured == 1
    assert TimingCache(H200, VERSIONS).find(WORK.key, "quick") is not None, "written anew"


def test_what_two_processes_measure_is_kept() -> None:
    one, other = TimingCache(H200, VERSIONS), TimingCache(H200, VERSIONS)
    timed = Timed(Tactic(GEMM, TILES[0], 4), 12.5, "full")
    one.add({SMALL["rows"].key: timed})
    other.add({WORK.key: timed})
    assert TimingCache(H200, VERSIONS).timed == {SMALL["rows"].key: timed, WORK.key: timed}


def test_a_cache_that_cannot_be_written(cache_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (cache_folder / "tactics").write_text("a file")
    assert Bench({}).tuner()([WORK]).measured == 1
    assert "what was measured is not kept: cannot write" in caplog.text


def test_the_real_runs_in_the_interpreter() -> None:
    """Triton's kernels and torch in the place of cuDNN, whose fused kernel does not run here."""
    bench = Bench({})
    timer = Tuner(H200, CPU, lambda call: (call(), 1.0)[1], TimingCache(H200, VERSIONS))
    if torch.cuda.is_available():
        pytest.skip("the interpreter is off")
    tuning = timer([SMALL["lateral"], SMALL["rows"]])
    assert tuning.measured == 2
    assert tuning.notes == []
    assert bench.timed == []
