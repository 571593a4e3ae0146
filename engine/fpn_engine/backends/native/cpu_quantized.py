"""The operations on 8 bits on a CPU: oneDNN's uint8 x int8 products through torch, as its inductor uses them.

Tensors are ordinary ones; none of torch's quantised engines is switched on. A residual is added to the int32 sums
before they are rounded, so that an addition costs no rounding of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from fpn_engine.backends.native.cpu_convolution import (
    Run,
    SizedWeight,
    Weights,
    is_symmetric,
    nchw,
    own,
    pad,
    upsample_into,
)
from fpn_engine.backends.native.ops import UNIT, MaxPool, Op
from fpn_engine.backends.native.quantized import (
    LARGEST,
    OFFSET,
    Dequantize,
    Quantize,
    QuantizedConv,
    QuantizedLinear,
)

# Numbers that go through all steps of a conversion at once. Behind each step threads wait for one another, where other
# programs have the cores for milliseconds: a cache's worth at a time is 100 waits for p2, and no faster than this.
CHUNK = 1 << 22
PROBE_CHANNELS = 64
Steps = Mapping[str, float]


@cache
def has_int8_products() -> bool:
    """Whether this torch has oneDNN's int8 layers, and the processor adds their products without saturation.

    Without VNNI pairs of products are added in 16 bits, which the largest numbers overflow; so it is tried with them.
    """
    weight = torch.full((PROBE_CHANNELS, PROBE_CHANNELS, 1, 1), 127, dtype=torch.int8)
    x = torch.full((1, 8, 8, PROBE_CHANNELS), LARGEST, dtype=torch.uint8)
    tensors = {"w": weight.permute(0, 2, 3, 1), "s": torch.ones(PROBE_CHANNELS)}
    exact = 127.0 * 127 * PROBE_CHANNELS
    conv = QuantizedConv(inputs=("x",), output="y", weight="w", scale="s", step=exact / 100)
    both = QuantizedConv(inputs=("x", "x"), output="y", weight="w", scale="s", step=exact / 100)
    linear = QuantizedLinear(inputs=("x",), output="y", weight="v", scale="s", step=exact / 100)
    try:
        rows = make_quantized_run(linear, tensors | {"v": weight.flatten(1)}, {"x": 1.0})
        found = [
            make_quantized_run(conv, tensors, {"x": 1.0})([x], None),
            make_quantized_run(both, tensors, {"x": 1.0})([x, torch.full_like(x, OFFSET)], None),
            rows([x.view(-1, PROBE_CHANNELS)], None),
        ]
    except (AttributeError, RuntimeError, TypeError):
        return False
    return all(bool((result == OFFSET + 100).all()) for result in found)


def make_quantized_run(op: Op, weights: Weights, steps: Steps) -> Run:
    """The function of one operation of ``QUANTIZED_OPS``; ``steps`` are those of the values."""
    return _MAKERS[type(op)](op, weights, steps)


def _make_quantize(op: Quantize, weights: Weights, steps: Steps) -> Run:
    def run(inputs: Sequence[Tensor], out: Tensor | None) -> Tensor:
        x = inputs[0]
        if out is None:
            out = torch.empty(x.shape, dtype=torch.uint8)
        for numbers, place in zip(x.reshape(-1).split(CHUNK), out.view(-1).split(CHUNK), strict=True):
            place.copy_(numbers.div(op.step).round_().add_(OFFSET).clamp_(0, LARGEST))
        return out

    return run


def _make_dequantize(op: Dequantize, weights: Weights, steps: Steps) -> Run:
    step = steps[op.inputs[0]]

    def run(inputs: Sequence[Tensor], out: Tensor | None) -> Tensor:
        x = inputs[0]
        if out is None:
            out = torch.empty(x.shape, dtype=torch.float32)
        for numbers, place in zip(x.reshape(-1).split(CHUNK), out.view(-1).split(CHUNK), strict=True):
            place.copy_(numbers).sub_(OFFSET).mul_(step)
        return out

    return run


def _make_conv(op: QuantizedConv, weights: Weights, steps: Steps) -> Run:
    step = steps[op.inputs[0]]
    whole = is_symmetric(op.padding)
    padding = list(op.padding[:2]) if whole else [0, 0]
    geometry = (list(op.stride), padding, list(op.dilation), op.groups)
    weight, scale = nchw(weights[op.weight]).contiguous(), weights[op.scale]
    packed = SizedWeight(
        lambda size: torch.ops.onednn.qconv_prepack(weight, scale, step, OFFSET, *geometry, size),
        is_pointwise=tuple(weight.shape[2:]) == UNIT,
    )
    zeros = torch.zeros(len(weight), dtype=torch.int32)
    bias = None if op.bias is None else weights[op.bias]
    activation = op.activation.kind
    result = (op.step, OFFSET, torch.uint8)

    def run(inputs: Sequence[Tensor], out: Tensor | None) -> Tensor:
        x = nchw(inputs[0])
        if not whole:
            x = pad(x, op.padding, OFFSET)
        given = (x, step, OFFSET, packed(x), scale, zeros)
        if len(inputs) == 1:
            y = torch.ops.onednn.qconv2d_pointwise(*given, bias, *geometry, *result, activation, [], "")
            return y.permute(0, 2, 3, 1).contiguous()
        residual = inputs[1]
        out = own(residual, out) if op.upsample == UNIT else upsample_into(residual, op.upsample, out)
        torch.ops.onednn.qconv2d_pointwise.binary(
            *given, nchw(out), bias, *geometry, *result, steps[op.inputs[1]], OFFSET, "sum", 1.0, activation, [], ""
        )
        return out

    return run


def _make_linear(op: QuantizedLinear, weights: Weights, steps: Steps) -> Run:
    step = steps[op.inputs[0]]
    weight, scale = weights[op.weight].contiguous(), weights[op.scale]
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    zeros = torch.zeros(len(weight), dtype=torch.int32)
    bias = None if op.bias is None else weights[op.bias]
    result = (op.step, OFFSET, torch.uint8)

    def run(inputs: Sequence[Tensor], out: Tensor | None) -> Tensor:
        return torch.ops.onednn.qlinear_pointwise(
            inputs[0], step, OFFSET, packed, scale, zeros, bias, *result, op.activation.kind, [], ""
        )

    return run


_MAKERS: dict[type[Op], Callable[..., Run]] = {
    Quantize: _make_quantize,
    Dequantize: _make_dequantize,
    QuantizedConv: _make_conv,
    QuantizedLinear: _make_linear,
}


def largest_of_windows(x: Tensor, op: MaxPool, out: Tensor | None) -> Tensor:
    """Max-pooling of uint8 (N, H, W, C), which torch has not for maps of more than 255 cells; rows, then columns."""
    top, left, bottom, right = op.padding
    if any(op.padding):
        x = F.pad(x, (0, 0, left, right, top, bottom))  # with the least number
    for axis, kernel, stride, dilation in zip((1, 2), op.kernel, op.stride, op.dilation, strict=True):
        span = x.shape[axis] - dilation * (kernel - 1)
        windows = [x.narrow(axis, i * dilation, span) for i in range(kernel)]
        every = [window[:, ::stride] if axis == 1 else window[:, :, ::stride] for window in windows]
        x = every[0].contiguous() if kernel == 1 else torch.maximum(every[0], every[1])
        for other in every[2:]:
            torch.maximum(x, other, out=x)
    return x if out is None else out.copy_(x)
