"""Tuning: every tactic for a piece of work is checked against float32, and the fastest right one taken."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fpn_engine.backends.native.cpu import DTYPES
from fpn_engine.backends.native.cpu_convolution import Run, activate_, upsample_into
from fpn_engine.backends.native.cuda.compiling import MakeRun, compile_ahead
from fpn_engine.backends.native.cuda.gpu import Gpu
from fpn_engine.backends.native.cuda.runs import Weights, make_convolution_alone, make_tactic_run
from fpn_engine.backends.native.cuda.tactics import Tactic, candidates
from fpn_engine.backends.native.cuda.timing_cache import Timed, TimingCache
from fpn_engine.backends.native.cuda.work import BIAS, WEIGHT, Work
from fpn_engine.backends.native.ops import BFLOAT16, FLOAT16, FLOAT32, Conv

Clock = Callable[[Callable[[], object]], float]
ROUNDS = {"quick": 7, "full": 25}
TRIAL_ROUNDS = 3  # after which what is far behind is left out
FAR_BEHIND = 1.5  # times the best
SECONDS = {"quick": 60.0, "full": 300.0}
COMPILING = 0.5  # of the time, after which no further tactic is compiled ahead
INPUT_SETS = 2  # that take turns
# ||result - float32|| / ||float32||: a rounding or two of each number to 2^-11 or 2^-8, and a
# reserve; of float32 below what TF32 comes to.
ERROR = {FLOAT32: 1e-4, FLOAT16: 1e-3, BFLOAT16: 8e-3}
# |result - float32| of any number over the largest one: what a wrong border or tile exceeds.
WORST_ERROR = {FLOAT32: 1e-3, FLOAT16: 2.0**-8, BFLOAT16: 2.0**-5}


@dataclass(slots=True)
class Tuning:
    """What came of it.

    Attributes:
        timed: the best tactic by key of the work. measured: how many pieces of work were measured, not remembered.
        notes: what was left out and why, a line each. is_complete: no time limit cut it short.
    """

    timed: dict[str, Timed] = field(default_factory=dict)
    measured: int = 0
    notes: list[str] = field(default_factory=list)
    is_complete: bool = True

    @property
    def tactics(self) -> dict[str, Tactic]:
        return {key: timed.tactic for key, timed in self.timed.items()}


class Tuner:
    """Measures work on one device.

    Args:
        clock: gives the microseconds of a call, caches cold. cache: what is known, and where results are kept.
        level: "quick" or "full". seconds: after which no further work is begun, None takes the level's SECONDS.
        make_run: makes the function of a tactic. now: the wall clock.
    """

    def __init__(
        self,
        gpu: Gpu,
        device: torch.device,
        clock: Clock,
        cache: TimingCache,
        *,
        level: str = "quick",
        seconds: float | None = None,
        make_run: MakeRun | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._gpu, self._device, self._clock, self._cache = gpu, device, clock, cache
        self._level = level
        self._seconds = SECONDS[level] if seconds is None else seconds
        self._make_run = make_run or self._make_tactic_run
        self._now = now

    def __call__(self, works: Iterable[Work], on_progress: Callable[[str], None] = lambda step: None) -> Tuning:
        """The best tactic for each piece of work; what was measured is kept in the cache, piece after piece."""
        tuning = Tuning()
        listed = list(works)
        begin = self._now()
        self._compile([work for work in listed if self._cache.find(work.key, self._level) is None], on_progress)
        for number, work in enumerate(listed):
            if known := self._cache.find(work.key, self._level):
                tuning.timed[work.key] = known
                continue
            if self._now() - begin > self._seconds:
                tuning.is_complete = False
                continue
            on_progress(f"tune {number + 1} of {len(listed)}")
            if timed := self._measure(work, tuning.notes):
                tuning.timed[work.key] = timed
                tuning.measured += 1
                self._cache.add({work.key: timed})
        if not tuning.is_complete:
            left = len(listed) - len(tuning.timed)
            tuning.notes.append(f"{left} of {len(listed)} layers are not measured: the time was up")
        return tuning

    def _compile(self, works: Sequence[Work], on_progress: Callable[[str], None]) -> None:
        """On a GPU; elsewhere there is nothing to compile."""
        if works and self._device.type == "cuda":
            on_progress("compile")
            end = self._now() + COMPILING * self._seconds
            is_over = lambda: self._now() > end  # noqa: E731
            compile_ahead(works, self._gpu, self._level, self._device, self._make_run, is_over=is_over)

    @torch.inference_mode()
    def _measure(self, work: Work, notes: list[str]) -> Timed | None:
        """The fastest tactic that is right; None, with a note, if none is."""
        sets = [_make_inputs(work, self._device, seed) for seed in range(INPUT_SETS)]
        out = torch.empty(work.out, dtype=DTYPES[work.out_dtype], device=self._device)
        expected = [_compute_float32(work, given) for given in sets]
        runs: dict[Tactic, list[Callable[[], object]]] = {}
        for tactic in candidates(work, self._gpu, self._level):
            try:
                made = [self._make_run(tactic, work, given) for given in sets]
                calls = [_bind(run, given, out, work) for run, given in zip(made, sets, strict=True)]
                if problem := _find_error(work, calls, expected, out) or _find_hidden_nan(work, made[0], sets[0], out):
                    notes.append(f"{work.key}: {tactic} {problem}")
                    continue
            except Exception as error:  # compilers, drivers and libraries have no common one
                reason = str(error).strip().partition("\n")[0][:200]
                notes.append(f"{work.key}: {tactic} does not run here ({type(error).__name__}: {reason})")
                continue
            runs[tactic] = list(calls)
        if not runs:
            notes.append(f"{work.key}: no tactic is right")
            return None
        times: dict[Tactic, list[float]] = {tactic: [] for tactic in runs}
        for number in range(ROUNDS[self._level]):
            if number == TRIAL_ROUNDS:
                best = min(statistics.median(spent) for spent in times.values())
                times = {t: spent for t, spent in times.items() if statistics.median(spent) <= FAR_BEHIND * best}
            for tactic, spent in times.items():
                spent.append(self._clock(runs[tactic][number % INPUT_SETS]))
        winner = min(times, key=lambda tactic: statistics.median(times[tactic]))
        return Timed(winner, statistics.median(times[winner]), self._level)

    def _make_tactic_run(self, tactic: Tactic, work: Work, given: dict[str, Tensor]) -> Run:
        return make_tactic_run(tactic, work.op(), work, Weights(given), self._gpu.processors)


def _make_inputs(work: Work, device: torch.device, seed: int) -> dict[str, Tensor]:
    """Random x, residual, WEIGHT and BIAS, with a result of about unit variance."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(shape: Sequence[int], scale: float = 1.0) -> Tensor:
        numbers = torch.randn(shape, generator=generator, device=device)
        return numbers.mul_(scale).to(DTYPES[work.dtype])

    return {name: draw(shape, work.depth**-0.5 if name == WEIGHT else 1.0) for name, shape in work.operands().items()}


def _inputs(work: Work, given: dict[str, Tensor]) -> list[Tensor]:
    return [given[name] for name in work.op().inputs]


def _compute_float32(work: Work, given: dict[str, Tensor]) -> Tensor:
    """By torch's own operations, without TF32 whatever the program allows, and rows as a map one cell wide.

    torch's settings are left alone: to read or change some that were made by its other interface is an error.
    """
    op, exact = work.op(FLOAT32), {name: tensor.float() for name, tensor in given.items()}
    x, out = exact["x"], torch.empty(work.out, device=given["x"].device)
    if isinstance(op, Conv):
        y = out
    else:
        x, y, exact[WEIGHT] = x[None, :, None], out[None, :, None], exact[WEIGHT][:, None, None]
        op = Conv(inputs=op.inputs, output=op.output, weight=WEIGHT)
    make_convolution_alone(op, Weights(exact), torch.float32)(x, y)
    if work.has_bias:
        out += exact[BIAS]
    if work.has_residual:
        out += upsample_into(exact["residual"], work.upsample, None)
    return activate_(out, work.activation)


def _bind(run: Run, given: dict[str, Tensor], out: Tensor, work: Work) -> Callable[[], Tensor]:
    inputs = _inputs(work, given)
    return lambda: run(inputs, out)


def _find_error(work: Work, calls: Sequence[Callable[[], object]], expected: Sequence[Tensor], out: Tensor) -> str:
    """What is wrong with the results, "" if nothing is. Fresh memory is NaN, so that what is not written shows."""
    for call, wanted in zip(calls, expected, strict=True):
        out.fill_(torch.nan)
        _poison(out)
        result = call()
        assert isinstance(result, Tensor)
        first = result.clone()
        difference = first.float() - wanted
        error = float(difference.norm() / wanted.norm().clamp(min=1e-30))
        worst = float(difference.abs().max() / wanted.abs().max().clamp(min=1e-30))
        if not (error <= ERROR[work.dtype] and worst <= WORST_ERROR[work.dtype]):
            return f"is wrong by {error:.1e}, at worst {worst:.1e} of the largest"
        again = call()
        assert isinstance(again, Tensor)
        if not torch.equal(first, again):
            return "gives other bits the second time"
    return ""


def _poison(like: Tensor) -> None:
    """Leave NaN in the memory that the next tensor of this size gets."""
    torch.full_like(like, torch.nan)


def _find_hidden_nan(work: Work, run: Run, given: dict[str, Tensor], out: Tensor) -> str:
    """Whether float16, which overflows, comes out as numbers where it was NaN: a broken network would look sound."""
    if work.dtype != FLOAT16:
        return ""
    broken = dict(given)
    broken["x"] = torch.full_like(given["x"], torch.nan)
    result = run(_inputs(work, broken), out)
    return "" if bool(result.isnan().all()) else "makes numbers of NaN"
