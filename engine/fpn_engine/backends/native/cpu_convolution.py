"""Convolution on a CPU: oneDNN with all that follows it, and what it shares with the other operations there."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from fpn_engine.backends.native import winograd
from fpn_engine.backends.native.ops import UNIT, Activation, Conv, Padding, Pair

Run = Callable[[Sequence[Tensor], Tensor | None], Tensor]
Weights = Mapping[str, Tensor]
Alone = Callable[[Tensor], Tensor]
Onto = Callable[[Tensor, Tensor], None]
SIZES_KEPT = 4  # input sizes that a 1x1 layer's weight is kept laid out for
# What oneDNN calls the activations that it applies within a convolution.
_FUSED = {"none": "none", "relu": "relu", "clip": "hardtanh", "sigmoid": "sigmoid", "hardswish": "hardswish"}


@cache
def has_fused_convolution() -> bool:
    """Whether this torch has oneDNN's convolution with what follows it, on which inductor builds too."""
    x, weight = torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
    geometry = ([0, 0], [1, 1], [1, 1])
    try:
        packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *geometry, 1, None)
        y = torch.ops.mkldnn._convolution_pointwise(x, packed, None, *geometry, 1, "relu", [], "")
        torch.ops.mkldnn._convolution_pointwise_.binary(y, x, packed, None, *geometry, 1, "add", 1.0, "relu", [], "")
    except (AttributeError, RuntimeError, TypeError):
        return False
    return float(y) == 2.0


@cache
def has_bfloat16() -> bool:
    """Whether the processor and this torch convolve in bfloat16."""
    try:
        return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):
        return False


def make_convolution(op: Conv, weights: Weights, fused: bool, transformed: Weights | None = None) -> Run:
    """The function of a convolution; ``fused`` lets oneDNN apply the activation, and its ReLU makes 0 of NaN.

    ``transformed``: the weights as :mod:`winograd` wants them, for what suits it; None is without it.
    """
    direct = _make_direct(op, weights, fused)
    if transformed is None or not winograd.suits(op, weights[op.weight]):
        return direct
    bias = None if op.bias is None else weights[op.bias]

    def run(inputs: Sequence[Tensor], out: Tensor | None) -> Tensor:
        if not winograd.pays(inputs[0].shape):
            return direct(inputs, out)
        residual = own(inputs[1], out) if len(inputs) == 2 else None
        return activate_(winograd.convolve(inputs[0], transformed[op.weight], bias, residual), op.activation)

    return run


def _make_direct(op: Conv, weights: Weights, fused: bool) -> Run:
    weight = nchw(weights[op.weight])
    bias = None if op.bias is None else weights[op.bias]
    whole = is_symmetric(op.padding)
    padding = list(op.padding[:2]) if whole else [0, 0]
    convolve = _fused_convolution if fused else _plain_convolution
    convolve_alone, add_convolution = convolve(op, weight, bias, padding)

    def run(inputs: Sequence[Tensor], out: Tensor | None) -> Tensor:
        x = nchw(inputs[0])
        if not whole:
            x = pad(x, op.padding, 0.0)
        if len(inputs) == 1:
            return convolve_alone(x).permute(0, 2, 3, 1).contiguous()
        residual = inputs[1]
        if op.upsample != UNIT:
            out = upsample_into(residual, op.upsample, out)
        else:
            out = own(residual, out)
        add_convolution(nchw(out), x)
        return out

    return run


def own(residual: Tensor, out: Tensor | None) -> Tensor:
    """``residual`` where it may be written onto: in ``out``, which it may lie in already."""
    if out is None:
        return residual.clone()
    return out if out.data_ptr() == residual.data_ptr() else out.copy_(residual)


def _fused_convolution(op: Conv, weight: Tensor, bias: Tensor | None, padding: list[int]) -> tuple[Alone, Onto]:
    """The convolution by itself, and added to what its output holds already, both by oneDNN in one go."""
    geometry = (padding, list(op.stride), list(op.dilation), op.groups)
    dense = weight.contiguous(memory_format=torch.channels_last)
    packed = SizedWeight(
        lambda size: torch.ops.mkldnn._reorder_convolution_weight(dense, *geometry, size),
        is_pointwise=tuple(weight.shape[2:]) == UNIT,
    )
    kind = op.activation.kind
    bounds = [op.activation.low, op.activation.high] if kind == "clip" else []
    relu = "relu" if kind == "relu" else None

    def alone(x: Tensor) -> Tensor:
        return torch.ops.mkldnn._convolution_pointwise(x, packed(x), bias, *geometry, _FUSED[kind], bounds, "")

    def onto(out: Tensor, x: Tensor) -> None:
        torch.ops.mkldnn._convolution_pointwise_.binary(out, x, packed(x), bias, *geometry, "add", 1.0, relu, [], "")
        if relu is None:
            activate_(out, op.activation)

    return alone, onto


class SizedWeight:
    """A convolution's weight as oneDNN wants it laid out for the size of its input.

    In another layout it is laid out anew in every call, which for a 1x1 layer of many channels takes several times as
    long as the product. The layout of larger windows does not depend on the size.

    Args: pack: makes the layout for the sides of an input, or for None.
    """

    def __init__(self, pack: Callable[[list[int] | None], Tensor], *, is_pointwise: bool) -> None:
        self._pack, self._is_pointwise = pack, is_pointwise
        self._packed: OrderedDict[torch.Size | None, Tensor] = OrderedDict()

    def __call__(self, x: Tensor) -> Tensor:
        size = x.shape if self._is_pointwise else None
        if size not in self._packed:
            self._packed[size] = self._pack(None if size is None else list(size))
            if len(self._packed) > SIZES_KEPT:
                self._packed.popitem(last=False)
        self._packed.move_to_end(size)
        return self._packed[size]


def _plain_convolution(op: Conv, weight: Tensor, bias: Tensor | None, padding: list[int]) -> tuple[Alone, Onto]:
    """The same step by step, where torch comes without oneDNN."""

    def convolve(x: Tensor) -> Tensor:
        return F.conv2d(x, weight, bias, op.stride, padding, op.dilation, op.groups)

    def onto(out: Tensor, x: Tensor) -> None:
        activate_(out.add_(convolve(x)), op.activation)

    return lambda x: activate_(convolve(x), op.activation), onto


def activate_(x: Tensor, activation: Activation) -> Tensor:
    """Apply the activation in place."""
    match activation.kind:
        case "relu":
            return x.relu_()
        case "clip":
            return x.clamp_(activation.low, activation.high)
        case "sigmoid":
            return x.sigmoid_()
        case "hardswish":
            return F.hardswish(x, inplace=True)
    return x


def nchw(x: Tensor) -> Tensor:
    """(N, H, W, C) as torch's (N, C, H, W) in channels_last order."""
    return x.permute(0, 3, 1, 2)


def nhwc(x: Tensor) -> Tensor:
    """(N, C, H, W) in channels_last order as (N, H, W, C)."""
    return x.permute(0, 2, 3, 1)


def spread(coarse: Tensor, scale: Pair) -> Tensor:
    """(N, H, W, C) as (N, H, 1, W, 1, C), which broadcasts over cells of ``scale``."""
    return coarse if scale == UNIT else coarse[:, :, None, :, None, :]


def cells(x: Tensor, scale: Pair) -> Tensor:
    """(N, H, W, C) as (N, H / scale[0], scale[0], W / scale[1], scale[1], C)."""
    n, h, w, c = x.shape
    return x if scale == UNIT else x.view(n, h // scale[0], scale[0], w // scale[1], scale[1], c)


def upsample_into(coarse: Tensor, scale: Pair, out: Tensor | None) -> Tensor:
    """Repeat each cell, into ``out`` or a new tensor."""
    n, h, w, c = coarse.shape
    if out is None:
        out = coarse.new_empty(n, h * scale[0], w * scale[1], c)
    cells(out, scale).copy_(spread(coarse, scale))
    return out


def pad(x: Tensor, padding: Padding, value: float) -> Tensor:
    """Pad an NCHW view, in NHWC order."""
    top, left, bottom, right = padding
    return F.pad(x.permute(0, 2, 3, 1), (0, 0, left, right, top, bottom), value=value).permute(0, 3, 1, 2)


def is_symmetric(padding: Padding) -> bool:
    """Whether both sides are padded alike, as torch has it."""
    return padding[:2] == padding[2:]
