"""Loading on CUDA: the tactics of a plan, or those of the timing cache, or measuring them, once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from fpn_engine.backends.native.cuda.choices import Choices, TunedTactics
from fpn_engine.backends.native.cuda.clock import CudaClock
from fpn_engine.backends.native.cuda.executor import CudaExecutor
from fpn_engine.backends.native.cuda.gpu import Gpu
from fpn_engine.backends.native.cuda.timing_cache import TimingCache
from fpn_engine.backends.native.cuda.tuning import Tuner, Tuning
from fpn_engine.backends.native.cuda.work import Work, collect_work
from fpn_engine.backends.native.packing import TACTICS, unpack_part
from fpn_engine.backends.native.parts import MakeExecutor
from fpn_engine.backends.native.program import Program
from fpn_engine.masks.spec import AnySpec, MaskSpec
from fpn_engine.plan import Plan
from fpn_engine.spec import ModelSpec

_logger = logging.getLogger(__name__)
Tune = Callable[[list[Work], TunedTactics], Tuning]


def prepare(plan: Plan) -> MakeExecutor:
    """What makes the executors of a CUDA plan on the current device. Raises ValueError for a damaged part."""
    device = torch.device("cuda", torch.cuda.current_device())
    choices = settle(plan, Gpu.of_device(device), lambda works, tuned: tune_here(works, tuned.level))

    def make(program: Program, weights: Mapping[str, Tensor]) -> CudaExecutor:
        return CudaExecutor(program, weights, choices, device)

    return make


def settle(plan: Plan, gpu: Gpu, tune: Tune) -> Choices:
    """The plan's tactics if they were measured on this kind of GPU, else what ``tune`` finds."""
    tuned = TunedTactics.read(plan.parts[TACTICS])
    if tuned.gpu == gpu.name:
        return Choices(gpu, tuned.tactics)
    tuning = tune(find_work(plan.parts, plan.manifest.spec, tuned), tuned)
    return Choices(gpu, tuning.tactics)


def find_work(parts: Mapping[str, bytes], spec: AnySpec, tuned: TunedTactics) -> list[Work]:
    """All work of trunk and box head at the shapes that are measured; the windows' layers have one implementation."""
    found: dict[str, Work] = {}
    for name in ("trunk",) if isinstance(spec, MaskSpec) else ("trunk", *spec.head_names):
        program, weights = unpack_part(name, parts)
        shapes = tuned.trunk_shapes()
        if name == "head":
            assert isinstance(spec, ModelSpec)  # for mypy
            width = spec.feature_channels * spec.box_roi_pool.output_size**2
            shapes = tuned.head_shapes(spec.rpn_post_nms_top_n_test, width)
        found |= collect_work(program, {key: tuple(tensor.shape) for key, tensor in weights.items()}, shapes)
    return list(found.values())


def tune_here(
    works: Iterable[Work],
    level: str,
    seconds: float | None = None,
    on_progress: Callable[[str], None] = lambda step: None,
) -> Tuning:
    """Measure on the current device, or remember; what was left out is logged."""
    device = torch.device("cuda", torch.cuda.current_device())
    gpu = Gpu.of_device(device)
    cache, listed = TimingCache(gpu), list(works)
    unknown = sum(cache.find(work.key, level) is None for work in listed)
    if unknown:
        _logger.warning("measuring how %d layers run fastest on %s, once", unknown, gpu.name)
    tuning = Tuner(gpu, device, CudaClock(device) if unknown else _no_clock, cache, level=level, seconds=seconds)(
        listed, on_progress
    )
    for note in tuning.notes:
        _logger.info(note)
    return tuning


def _no_clock(run: Callable[[], object]) -> float:
    raise RuntimeError("there is nothing to measure")
