"""Mask proposals on the native backend: trunk and windows' networks out of a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F

from fpn_engine.backends.native.loading import check_native
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
from fpn_engine.errors import PlanError
from fpn_engine.masks.pipeline import MaskTrunkOutput
from fpn_engine.masks.spec import MaskSpec
from fpn_engine.plan import MAX_REASON, Plan, rebuild_hint
from fpn_kernels import window_linear


class NativeMaskTrunk:
    """Images (N, 3, H, W) to levels and score logits, all channels_last; scores are float32.

    A program ends in a score map for each level, or, on the CPU, in a :class:`WindowScore` of all levels for each head.
    ``input_dtype``: see Trunk. Args: as of :class:`fpn_engine.backends.native.parts.NativeTrunk`.
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
    ) -> None:
        self._levels = len(spec.levels)
        self._joined = any(isinstance(op, WindowScore) for op in program.ops)
        scores = [1] * len(spec.heads) if self._joined else [len(spec.heads)] * self._levels
        expected = [spec.feature_channels] * self._levels + scores
        check_outputs(program, weights, (1, PROBE_SIDE, PROBE_SIDE, 3), expected)
        check_float32(program, self._levels)
        self.executor, self.input_dtype = make_trunk_executor(program, weights, threads, make_executor)

    def __call__(self, images: Tensor, /) -> MaskTrunkOutput:
        maps = self.executor(images.permute(0, 2, 3, 1))
        features = tuple(level.permute(0, 3, 1, 2) for level in maps[: self._levels])
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

    Args: heads: program and tensors of each. device: None is the CPU.
    Raises: ValueError if a program is not two layers that fit the spec.
    """

    def __init__(
        self,
        heads: Sequence[tuple[Program, Mapping[str, Tensor]]],
        spec: MaskSpec,
        device: torch.device | None = None,
    ) -> None:
        self._spec = spec
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
        first, bias, last, last_bias = self._layers[number]
        assert first is not None  # for mypy
        assert last is not None
        kernel, size = self._spec.heads[number].kernel, self._spec.mask_size
        features = [level.to(first.dtype) for level in features]
        hidden = window_linear(features, places, first, bias, kernel=kernel, relu=True)
        return F.linear(hidden, last, last_bias).view(-1, size, size)


def load_native_masks(plan: Plan, threads: int | None = None) -> tuple[NativeMaskTrunk, NativeMaskAnswer]:
    """Make the parts of a native plan of a mask-proposal model ready.

    Raises: PlanError if the plan does not fit what is here or its parts are not what a build writes.
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
        trunk = NativeMaskTrunk(*unpack_part("trunk", plan.parts), spec, threads, make)
        answer = NativeMaskAnswer([unpack_part(name, plan.parts) for name in spec.head_names], spec, device)
    except (ValueError, RuntimeError) as error:
        raise PlanError(f"the plan is damaged: {str(error)[:MAX_REASON]}; {rebuild_hint(plan.manifest)}") from None
    return trunk, answer
