"""Scores of sliding MLPs on all levels, rough and exact, apart from the program that makes the levels."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from fpn_engine.backends.native.cpu import make_level_scores
from fpn_engine.backends.native.cpu_convolution import has_fused_convolution, nhwc
from fpn_engine.backends.native.executor import cpu_threads
from fpn_engine.backends.native.ops import Cast, WindowScore
from fpn_engine.backends.native.overlap_save import MAX_SPECTRUM_BYTES, OverlapSave, spectrum_bytes
from fpn_engine.backends.native.program import Program

Scores = tuple[Tensor, ...]
ScoreLevels = Callable[[Sequence[Tensor]], list[Tensor]]


class LevelScores:
    """What the :class:`WindowScore` of each head makes of levels (N, d, H_l, W_l): logits (N, A, H_l, W_l), float32.

    Each kind of scores is made ready when it is first asked for, and by one thread at a time.

    Args: ops, weights: the heads and their float32 tensors. threads: of the CPU, None leaves torch's setting.
    """

    def __init__(self, ops: Sequence[WindowScore], weights: Mapping[str, Tensor], threads: int | None = None) -> None:
        self._ops = ops
        self._weights = {name: weights[name] for op in ops for name in op.weights}
        self._threads = threads
        self._lock = threading.Lock()

    def rough(self, levels: Sequence[Tensor]) -> Scores:
        """In bfloat16, by spectra."""
        return self._score(levels, rough=True)

    def exact(self, levels: Sequence[Tensor]) -> Scores:
        """In float32, as the operation itself has it."""
        return self._score(levels, rough=False)

    def _score(self, levels: Sequence[Tensor], *, rough: bool) -> Scores:
        with self._lock, torch.inference_mode(), cpu_threads(self._threads):
            maps = [nhwc(level).float() for level in levels]
            scores = [score(maps) for score in (self._rough if rough else self._exact)]
            return tuple(torch.stack(of_level, dim=1) for of_level in zip(*scores, strict=True))

    @cached_property
    def _rough(self) -> list[ScoreLevels]:
        return [OverlapSave(*_tensors(op, self._weights), torch.bfloat16) for op in self._ops]

    @cached_property
    def _exact(self) -> list[ScoreLevels]:
        return [make_level_scores(op, self._weights, fused=True) for op in self._ops]


def split_scores(program: Program, weights: Mapping[str, Tensor], levels: int) -> tuple[Program, list[WindowScore]]:
    """The program without the window scores behind its first ``levels`` outputs, and those; none if they don't fit.

    They fit if every one reads all those outputs in order, of which it may want a copy in float32, is small enough for
    spectra, and has finite tensors.
    """
    made = {op.output: op for op in program.ops}
    scores = [made[name] for name in program.outputs[levels:]]
    features = list(program.outputs[:levels])
    kept: list[WindowScore] = []
    for op in scores:
        if not isinstance(op, WindowScore) or [_source(made.get(name), name) for name in op.inputs] != features:
            return program, []
        hidden, kernel, _, channels = weights[op.weight].shape
        small = spectrum_bytes(channels, hidden, kernel) <= MAX_SPECTRUM_BYTES
        if not small or not all(bool(weights[name].isfinite().all()) for name in op.weights):
            return program, []
        kept.append(op)
    read = {*features}
    ops = []
    for one in reversed(program.ops):
        if one.output in read:
            ops.append(one)
            read.update(one.inputs)
    return dataclasses.replace(program, ops=tuple(reversed(ops)), outputs=tuple(features)), kept


def screens_well() -> bool:
    """Whether rough scores are much faster here: the processor multiplies bfloat16, and this torch lets it."""
    supports = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return supports is not None and bool(supports()) and has_fused_convolution()


def _source(op: object, name: str) -> str:
    return op.inputs[0] if isinstance(op, Cast) else name


def _tensors(op: WindowScore, weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    bias, shift = (None if name is None else weights[name] for name in (op.bias, op.shift))
    return weights[op.weight], bias, weights[op.scale], shift
