"""Mask proposals on the native backend: trunk and windows' networks out of a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F

from fpn_engine.backends.native.level_scores import LevelScores, screens_well, split_scores
from fpn_engine.backends.native.loading import check_native, explain_failure
from fpn_engine.backends.native.ops import NONE, RELU, Linear, WindowScore
from fpn_engine.backends.native.packing import unpack_part
from fpn_engine.backends.native.parts import (
    PROBE_SIDE,
    Executor,
    MakeExecutor,
    check_float32,
    check_outputs,
    make_trunk_executor,
)
from fpn_engine.backends.native.program import Program
from fpn_engine.masks.pipeline import MaskTrunkOutput
from fpn_engine.masks.spec import MaskSpec
from fpn_engine.plan import Plan
from fpn_kernels import window_linear

LEAST_PLACES = 32  # for each to be found: below, exact scores everywhere cost less than those of candidates


class NativeMaskTrunk:
    """Images (N, 3, H, W) to levels and score logits, all channels_last; scores are float32.

    A program ends in a score map for each level, or, on the CPU, in a :class:`WindowScore` of all levels for each head.
    In the second case scores may be rough. ``input_dtype``: see Trunk.

    Args:
        screens: whether scores of large images are rough; None has it so where that is faster.
        The others are those of :class:`fpn_engine.backends.native.parts.NativeTrunk`.
    Raises: ValueError if the program does not make such maps.
    """

    executor: Executor

    def __init__(
        self,
        program: Program,
        weights: Mapping[str, Tensor],
        spec: MaskSpec,
        threads: int | None = None,
        make_executor: MakeExecutor | None = None,
        *,
        screens: bool | None = None,
    ) -> None:
        self._levels, self._heads = len(spec.levels), len(spec.heads)
        self._joined = any(isinstance(op, WindowScore) for op in program.ops)
        scores = [1] * len(spec.heads) if self._joined else [len(spec.heads)] * self._levels
        expected = [spec.feature_channels] * self._levels + scores
        check_outputs(program, weights, (1, PROBE_SIDE, PROBE_SIDE, 3), expected)
        check_float32(program, self._levels)
        self._screened: LevelScores | None = None
        self._least = LEAST_PLACES * spec.masks_per_img
        if make_executor is None and (screens_well() if screens is None else screens):
            program, window_scores = split_scores(program, weights, self._levels)
            if window_scores:
                self._screened = LevelScores(window_scores, weights, threads)
                weights = {name: weights[name] for name in program.weights()}
        self.executor, self.input_dtype = make_trunk_executor(program, weights, threads, make_executor)

    def __call__(self, images: Tensor, /) -> MaskTrunkOutput:
        maps = self.executor(images.permute(0, 2, 3, 1))
        features = tuple(level.permute(0, 3, 1, 2) for level in maps[: self._levels])
        if self._screened is not None:
            exact = partial(self._screened.exact, features)
            if sum(level[0, 0].numel() for level in features) * self._heads < self._least:
                return MaskTrunkOutput(features, exact())
            return MaskTrunkOutput(features, self._screened.rough(features), exact)
        if not self._joined:
            return MaskTrunkOutput(features, tuple(s.permute(0, 3, 1, 2) for s in maps[self._levels :]))
        sizes = [level.shape[2:] for level in features]
        ends = list(accumulate(h * w for h, w in sizes))
        if any(scores.shape[1] != ends[-1] for scores in maps[self._levels :]):
            raise ValueError("its scores are not those of its levels")
        heads = torch.cat([scores[..., 0, 0, None] for scores in maps[self._levels :]], dim=2)  # (N, M, A)
        split = heads.split([h * w for h, w in sizes], dim=1)
        scores = tuple(s.unflatten(1, tuple(size)).permute(0, 3, 1, 2) for s, size in zip(split, sizes, strict=True))
        return MaskTrunkOutput(features, scores)


class NativeMaskAnswer:
    """Mask logits (R, S, S) at places, by the head's two layers; the first reads windows of the levels.

    With the scores' layers a :class:`fpn_engine.masks.screening.LayeredAnswer` as well.

    Args:
        heads: program and tensors of each.
        device: None is the CPU.
        score_layers: weights (O,) and bias (1,) of each head, for :meth:`score`.
    Raises: ValueError if a program is not two layers that fit the spec.
    """

    def __init__(
        self,
        heads: Sequence[tuple[Program, Mapping[str, Tensor]]],
        spec: MaskSpec,
        device: torch.device | None = None,
        score_layers: Sequence[tuple[Tensor, Tensor | None]] = (),
    ) -> None:
        self._spec = spec
        self._score_layers = score_layers
        self._layers = []
        for (program, weights), head in zip(heads, spec.heads, strict=True):
            width = head.kernel**2 * spec.feature_channels
            check_outputs(program, weights, (1, width), [spec.mask_size**2])
            layers = [op for op in program.ops if isinstance(op, Linear)]
            if len(program.ops) != 2 or [op.activation for op in layers] != [RELU, NONE]:
                raise ValueError("a head is two layers with a ReLU between them")
            tensors = [weights[name] if name else None for op in layers for name in (op.weight, op.bias)]
            self._layers.append([None if tensor is None else tensor.to(device or "cpu") for tensor in tensors])

    def __call__(self, number: int, features: Sequence[Tensor], places: Tensor) -> Tensor:
        return self.draw(number, self.hide(number, features, places))

    def hide(self, number: int, features: Sequence[Tensor], places: Tensor) -> Tensor:
        """The hidden numbers (R, O) of head ``number`` at ``places``, (R, 4) as of :func:`window_linear`."""
        first, bias, *_ = self._layers[number]
        assert first is not None  # for mypy
        features = [level.to(first.dtype) for level in features]
        return window_linear(features, places, first, bias, kernel=self._spec.heads[number].kernel, relu=True)

    def draw(self, number: int, hidden: Tensor) -> Tensor:
        """Mask logits (R, S, S)."""
        *_, last, bias = self._layers[number]
        assert last is not None  # for mypy
        return F.linear(hidden, last, bias).view(-1, self._spec.mask_size, self._spec.mask_size)

    def score(self, number: int, hidden: Tensor) -> Tensor:
        """Score logits (R,)."""
        weight, bias = self._score_layers[number]
        scores = hidden @ weight
        return scores if bias is None else scores + bias


def load_native_masks(plan: Plan, threads: int | None = None) -> tuple[NativeMaskTrunk, NativeMaskAnswer]:
    """Make the parts of a native plan of a mask-proposal model ready.

    Raises: as ``load_native`` does.
    """
    check_native(plan.manifest)
    spec = plan.manifest.spec
    assert isinstance(spec, MaskSpec)
    device = None
    try:
        make = None
        if plan.manifest.device == "cuda":
            from fpn_engine.backends.native.cuda.loading import prepare

            make, device = prepare(plan), torch.device("cuda", torch.cuda.current_device())
        return make_native_masks(plan.parts, spec, threads, make, device)
    except (ValueError, RuntimeError) as error:
        raise explain_failure(plan.manifest, error) from error


def make_native_masks(
    parts: Mapping[str, bytes],
    spec: MaskSpec,
    threads: int | None = None,
    make_executor: MakeExecutor | None = None,
    device: torch.device | None = None,
    *,
    screens: bool | None = None,
) -> tuple[NativeMaskTrunk, NativeMaskAnswer]:
    """The trunk and the answer of a plan's parts; arguments and errors are theirs."""
    program, weights = unpack_part("trunk", parts)
    trunk = NativeMaskTrunk(program, weights, spec, threads, make_executor, screens=screens)
    layers = [
        (weights[op.scale], None if op.shift is None else weights[op.shift])
        for op in program.ops
        if isinstance(op, WindowScore)
    ]
    return trunk, NativeMaskAnswer([unpack_part(name, parts) for name in spec.head_names], spec, device, layers)
