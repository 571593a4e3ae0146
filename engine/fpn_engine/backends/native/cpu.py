"""The operations on a CPU: oneDNN through torch for convolutions, torch's own kernels for the rest.

Each maker takes an operation and the stored tensors and gives a function of the inputs and the place of the output,
``run(inputs, out)``: NHWC tensors, and the tensor to write into or None where the result may be a new one. oneDNN's
convolution has no place for its result in torch, unless it adds to what is there already: see :func:`makes_its_output`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fpn_engine.backends.native.cpu_convolution import (
    Run,
    Weights,
    activate_,
    cells,
    has_fused_convolution,
    is_symmetric,
    make_convolution,
    nchw,
    pad,
    spread,
    upsample_into,
)
from fpn_engine.backends.native.cpu_quantized import largest_of_windows, make_quantized_run
from fpn_engine.backends.native.ops import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    INT8,
    UINT8,
    UNIT,
    Activate,
    Add,
    Affine,
    AveragePool,
    Cast,
    Concat,
    Conv,
    Flatten,
    GlobalAveragePool,
    Linear,
    MaxPool,
    Mul,
    Op,
    Slice,
    Unflatten,
    Upsample,
    WindowScore,
)
from fpn_engine.backends.native.overlap_save import MAX_SPECTRUM_BYTES, OverlapSave, spectrum_bytes
from fpn_engine.backends.native.program import Program
from fpn_engine.backends.native.quantized import QUANTIZED_OPS, QuantizedConv, QuantizedLinear
from fpn_engine.backends.native.winograd import WinogradWeights

DTYPES = {
    FLOAT32: torch.float32,
    FLOAT16: torch.float16,
    BFLOAT16: torch.bfloat16,
    UINT8: torch.uint8,
    INT8: torch.int8,
}


def makes_its_output(op: Op) -> bool:
    """Whether the operation gives a tensor of its own: every convolution that adds nothing, and rows in 8 bits."""
    return isinstance(op, (Conv, QuantizedConv, QuantizedLinear)) and len(op.inputs) == 1


def make_runs(program: Program, weights: Weights) -> list[Run]:
    """The function of each operation.

    oneDNN's ReLU makes 0 of NaN, behind which a broken network would look sound. A network of finite tensors makes NaN
    only of sums above 3e38, but one with NaN or infinity among its tensors, or in float16, whose largest number is
    65504, runs without oneDNN's activations and without Winograd's tiles. Few processors compute in float16, and so it
    is computed in float32 and rounded once per operation, as on a GPU; that is slow.
    """
    dtypes, steps = program.dtypes(), program.steps()
    finite = FLOAT16 not in dtypes.values() and all(bool(tensor.isfinite().all()) for tensor in weights.values())
    fused = finite and has_fused_convolution()
    transformed = WinogradWeights(weights) if fused else None
    runs = []
    for op in program.ops:
        if isinstance(op, QUANTIZED_OPS):
            runs.append(make_quantized_run(op, weights, steps))
        elif op.VIEW or not (dtypes[op.inputs[0]] == FLOAT16 or (isinstance(op, (Conv, Linear)) and op.dtype)):
            runs.append(make_run(op, weights, fused, transformed))
        else:
            runs.append(make_exact_run(op, weights, DTYPES[dtypes[op.output]]))
    return runs


def make_run(op: Op, weights: Weights, fused: bool = False, transformed: Weights | None = None) -> Run:
    """The function of one operation, in the number type of its inputs; the rest is of :func:`make_convolution`."""
    if isinstance(op, Conv):
        return make_convolution(op, weights, fused, transformed)
    if isinstance(op, WindowScore):
        return _make_window_score(op, weights, fused)
    return _MAKERS[type(op)](op, weights)


def make_exact_run(op: Op, weights: Weights, dtype: torch.dtype) -> Run:
    """The function of one operation computed in float32 and rounded once to ``dtype``."""
    run_float32 = make_run(op, {name: weights[name].float() for name in op.weights})

    def run(inputs: Sequence[Tensor], out: Tensor | None) -> Tensor:
        result = run_float32([x.float() for x in inputs], None)
        return result.to(dtype) if out is None else out.copy_(result)

    return run


def _make_linear(op: Linear, weights: Weights) -> Run:
    columns = weights[op.weight].t()
    bias = None if op.bias is None else weights[op.bias]

    def run(inputs: Sequence[Tensor], out: Tensor | None) -> Tensor:
        if bias is None:
            out = torch.mm(inputs[0], columns, out=out)
        else:
            out = torch.addmm(bias, inputs[0], columns, out=out)
        return activate_(out, op.activation)

    return run


def make_level_scores(op: WindowScore, weights: Weights, fused: bool) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """Levels (N, H, W, C) to scores (N, H, W): by spectra where oneDNN is there and they do not take too much memory,
    else convolution by convolution.
    """
    weight, score = weights[op.weight], weights[op.scale]
    bias, score_bias = (None if name is None else weights[name] for name in (op.bias, op.shift))
    hidden, kernel, _, channels = weight.shape

    def convolve(levels: Sequence[Tensor]) -> list[Tensor]:
        maps = [F.conv2d(nchw(x), nchw(weight), bias, padding=kernel // 2).relu_() for x in levels]
        return [F.conv2d(x, score.view(1, -1, 1, 1), score_bias)[:, 0] for x in maps]

    if fused and weight.dtype == torch.float32 and spectrum_bytes(channels, hidden, kernel) <= MAX_SPECTRUM_BYTES:
        return OverlapSave(weight, bias, score, score_bias)
    return convolve


def _make_window_score(op: WindowScore, weights: Weights, fused: bool) -> Run:
    score_levels = make_level_scores(op, weights, fused)

    def run(inputs: Sequence[Tensor], out: Tensor | None) -> Tensor:
        scores = torch.cat([level.flatten(1) for level in score_levels(inputs)], dim=1)[:, :, None, None]
        return scores if out is None else out.copy_(scores)

    return run


def _make_max_pool(op: MaxPool, weights: Weights) -> Run:
    # torch takes padding up to half a window, the same on both sides.
    direct = is_symmetric(op.padding) and all(2 * p <= k for p, k in zip(op.padding, op.kernel, strict=False))
    padding = list(op.padding[:2]) if direct else [0, 0]

    def run(inputs: Sequence[Tensor], out: Tensor | None) -> Tensor:
        if op.kernel == UNIT and not any(op.padding):  # p6 (sec. 4.1): every second cell
            every = inputs[0][:, :: op.stride[0], :: op.stride[1]]
            return every.clone(memory_format=torch.contiguous_format) if out is None else out.copy_(every)
        if inputs[0].dtype == torch.uint8:
            return largest_of_windows(inputs[0], op, out)
        x = nchw(inputs[0])
        if not direct:
            x = pad(x, op.padding, -torch.inf)
        if out is None:
            pooled = F.max_pool2d(x, op.kernel, op.stride, padding, op.dilation)
            return pooled.permute(0, 2, 3, 1).contiguous()
        nothing = torch.empty(0, dtype=torch.int64)  # torch wants the places of the maxima too
        torch.ops.aten.max_pool2d_with_indices.out(
            x, op.kernel, op.stride, padding, op.dilation, out=nchw(out), indices=nothing
        )
        return out

    return run


def _make_average_pool(op: AveragePool, weights: Weights) -> Run:
    direct = is_symmetric(op.padding) and all(2 * p <= k for p, k in zip(op.padding, op.kernel, strict=False))
    padding = list(op.padding[:2]) if direct else [0, 0]

    def run(inputs: Sequence[Tensor], out: Tensor | None) -> Tensor:
        x = nchw(inputs[0]) if direct else pad(nchw(inputs[0]), op.padding, 0.0)
        pooled = F.avg_pool2d(x, op.kernel, op.stride, padding, count_include_pad=op.count_padding)
        nhwc = pooled.permute(0, 2, 3, 1)
        return nhwc.contiguous() if out is None else out.copy_(nhwc)

    return run


def _make_global_average_pool(op: GlobalAveragePool, weights: Weights) -> Run:
    return lambda inputs, out: torch.mean(inputs[0], dim=(1, 2), keepdim=True, out=out)


def _make_add(op: Add, weights: Weights) -> Run:
    def run(inputs: Sequence[Tensor], out: Tensor | None) -> Tensor:
        if out is None:
            out = torch.empty_like(inputs[0])
        fine = cells(inputs[0], op.upsample)
        torch.add(fine, spread(inputs[1], op.upsample), out=cells(out, op.upsample))
        return activate_(out, op.activation)

    return run


def _make_mul(op: Mul, weights: Weights) -> Run:
    return lambda inputs, out: torch.mul(inputs[0], inputs[1], out=out)


def _make_affine(op: Affine, weights: Weights) -> Run:
    scale, shift = weights[op.scale], weights[op.shift]
    return lambda inputs, out: activate_(torch.addcmul(shift, inputs[0], scale, out=out), op.activation)


def _make_activate(op: Activate, weights: Weights) -> Run:
    def run(inputs: Sequence[Tensor], out: Tensor | None) -> Tensor:
        if out is None:
            out = inputs[0].clone()
        elif out.data_ptr() != inputs[0].data_ptr():
            out.copy_(inputs[0])
        return activate_(out, op.activation)

    return run


def _make_upsample(op: Upsample, weights: Weights) -> Run:
    return lambda inputs, out: upsample_into(inputs[0], op.factor, out)


def _make_concat(op: Concat, weights: Weights) -> Run:
    return lambda inputs, out: torch.cat(list(inputs), dim=-1, out=out)


def _make_slice(op: Slice, weights: Weights) -> Run:
    return lambda inputs, out: inputs[0][..., op.start : op.stop]


def _make_flatten(op: Flatten, weights: Weights) -> Run:
    return lambda inputs, out: inputs[0].flatten(1)


def _make_unflatten(op: Unflatten, weights: Weights) -> Run:
    return lambda inputs, out: inputs[0].unflatten(1, (op.height, op.width, -1))


def _make_cast(op: Cast, weights: Weights) -> Run:
    return lambda inputs, out: inputs[0].to(DTYPES[op.dtype], copy=True) if out is None else out.copy_(inputs[0])


_MAKERS: dict[type[Op], Callable[..., Run]] = {
    Linear: _make_linear,
    MaxPool: _make_max_pool,
    AveragePool: _make_average_pool,
    GlobalAveragePool: _make_global_average_pool,
    Add: _make_add,
    Mul: _make_mul,
    Affine: _make_affine,
    Activate: _make_activate,
    Upsample: _make_upsample,
    Concat: _make_concat,
    Slice: _make_slice,
    Flatten: _make_flatten,
    Unflatten: _make_unflatten,
    Cast: _make_cast,
}
