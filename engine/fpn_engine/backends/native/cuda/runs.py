"""The operations on CUDA: a function of inputs and output for each tactic, and for the operations that have but one.

All tensors are on the device and stay there; nothing is read back, and nothing but a result and a workspace is
allocated, so that a CUDA graph can be captured of it. cuDNN is called with TF32 off; products of float32 rows by cuBLAS
follow torch's setting, which is off unless a program changes it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fpn_engine.backends.native.cpu import DTYPES, make_run
from fpn_engine.backends.native.cpu_convolution import Run, activate_, is_symmetric, nchw, pad
from fpn_engine.backends.native.cuda.tactics import CUBLAS, CUDNN_EPILOGUE, CUDNN_FUSED, FEW_CHANNELS, Tactic, units_of
from fpn_engine.backends.native.cuda.work import Work
from fpn_engine.backends.native.ops import NONE, UNIT, Activate, Activation, Add, Conv, Linear, MaxPool, Op
from fpn_kernels.triton.convolution import launch_convolution
from fpn_kernels.triton.epilogue import FUNCTIONS, clip_bounds, launch_finish
from fpn_kernels.triton.few_channels import launch_few_channels, pack_weight
from fpn_kernels.triton.max_pool import launch_max_pool

CHANNELS = 8  # halves of which cuDNN's tensor-core kernels read at once; a stem of 3 is filled up with zeros


class Weights(Mapping[str, Tensor]):
    """The stored tensors of a program on its device, and what libraries want made of them, made once.

    Captured graphs read both at the addresses that they had then, while functions for shapes come and go: what is made
    stays as long as the program. Not to be used by two threads at once.
    """

    def __init__(self, stored: Mapping[str, Tensor]) -> None:
        self._stored = dict(stored)
        self._made: dict[Hashable, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        return self._stored[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def make(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """What ``make`` gave for this key the first time."""
        if key not in self._made:
            self._made[key] = made = make()
            if made.is_cuda:  # other streams will read it
                torch.cuda.current_stream(made.device).synchronize()
        return self._made[key]

    def cast(self, name: str, dtype: torch.dtype) -> Tensor:
        """A tensor in a number type."""
        return self.make((name, dtype), lambda: self[name].to(dtype))


def make_tactic_run(tactic: Tactic, op: Conv | Linear, work: Work, weights: Weights, processors: int) -> Run:
    """The function of a convolution or fully connected layer by a tactic that supports it."""
    if tactic.name == CUBLAS:
        assert isinstance(op, Linear)
        return _make_cublas(op, work, weights)
    if tactic.name in (CUDNN_FUSED, CUDNN_EPILOGUE):
        assert isinstance(op, Conv)
        return (_make_cudnn_fused if tactic.name == CUDNN_FUSED else _make_cudnn_epilogue)(op, work, weights)
    if tactic.name == FEW_CHANNELS:
        assert isinstance(op, Conv)
        return _make_few_channels(tactic, op, work, weights)
    return _make_triton(tactic, op, weights, processors)


def make_only_run(op: Op, weights: Weights) -> Run:
    """The function of an operation that has one implementation."""
    match op:
        case MaxPool():
            return _make_max_pool(op)
        case Add():
            return _make_add(op)
        case Activate():
            return lambda inputs, out: _finish(inputs[0], None, None, out, op.activation)
    return make_run(op, weights)


def _make_triton(tactic: Tactic, op: Conv | Linear, weights: Weights, processors: int) -> Run:
    weight, bias = weights[op.weight], None if op.bias is None else weights[op.bias]
    tile = tactic.tile
    assert tile is not None
    geometry = {}
    if isinstance(op, Conv):
        geometry = {"stride": op.stride, "padding": op.padding[:2], "dilation": op.dilation, "upsample": op.upsample}
    function, bounds = _function(op.activation)

    def run(inputs: Sequence[Tensor], out: Tensor | None) -> Tensor:
        residual = inputs[1] if len(inputs) == 2 else None
        return launch_convolution(
            inputs[0],
            weight,
            bias,
            residual,
            _given(out),
            tile=tile,
            split=tactic.split,
            processors=processors,
            function=function,
            bounds=bounds,
            **geometry,
        )

    return run


def _make_few_channels(tactic: Tactic, op: Conv, work: Work, weights: Weights) -> Run:
    tile = tactic.tile
    assert tile is not None
    units = units_of(work)
    packed = weights.make((op.weight, units, tile.k), lambda: pack_weight(weights[op.weight], units, tile.k))
    bias = None if op.bias is None else weights[op.bias]
    kernel = (work.weight[1], work.weight[2])
    function, bounds = _function(op.activation)

    def run(inputs: Sequence[Tensor], out: Tensor | None) -> Tensor:
        return launch_few_channels(
            inputs[0],
            packed,
            bias,
            _given(out),
            units=units,
            kernel=kernel,
            tile=tile,
            stride=op.stride,
            top=op.padding[0],
            function=function,
            bounds=bounds,
        )

    return run


def _make_cudnn_epilogue(op: Conv, work: Work, weights: Weights) -> Run:
    """The convolution in the operands' number type, float32 if the result is wider; then all that follows in place."""
    dtype = DTYPES[work.out_dtype]
    bias = None if op.bias is None else weights[op.bias]
    convolve = make_convolution_alone(op, weights, dtype)
    follows = bias is not None or work.has_residual or op.activation != NONE

    def run(inputs: Sequence[Tensor], out: Tensor | None) -> Tensor:
        out = _given(out)
        residual = inputs[1] if len(inputs) == 2 else None
        # Onto its residual the convolution would overwrite what is added.
        target = torch.empty_like(out) if residual is not None and residual.data_ptr() == out.data_ptr() else out
        convolve(inputs[0].to(dtype), target)
        return _finish(target, bias, residual, out, op.activation, op.upsample) if follows else out

    return run


def _make_cudnn_fused(op: Conv, work: Work, weights: Weights) -> Run:
    weight = _weight_for_cudnn(op, weights, DTYPES[work.dtype])
    bias = weights[op.bias] if op.bias else weights.make((op.weight, "no bias"), lambda: weight.new_zeros(len(weight)))
    geometry = (list(op.stride), list(op.padding[:2]), list(op.dilation), op.groups)

    def run(inputs: Sequence[Tensor], out: Tensor | None) -> Tensor:
        x = nchw(_fill_up(inputs[0], op.groups))
        if len(inputs) == 2:
            result = torch.ops.aten.cudnn_convolution_add_relu(x, weight, nchw(inputs[1]), 1.0, bias, *geometry)
        else:
            result = torch.ops.aten.cudnn_convolution_relu(x, weight, bias, *geometry)
        return result.permute(0, 2, 3, 1)

    return run


def make_convolution_alone(op: Conv, weights: Weights, dtype: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
    """cuDNN's convolution of maps of ``dtype`` into the output, without what follows; never in TF32."""
    is_half = dtype != torch.float32
    weight = _weight_for_cudnn(op, weights, dtype)
    whole = is_symmetric(op.padding)
    padding = list(op.padding[:2]) if whole else [0, 0]

    def run(x: Tensor, out: Tensor) -> Tensor:
        x = nchw(_fill_up(x, op.groups) if is_half else x)
        if not whole:
            x = pad(x, op.padding, 0.0)
        if not x.is_cuda:  # cuDNN's place in tests on a CPU
            y = F.conv2d(x.float(), weight.float(), None, op.stride, padding, op.dilation, op.groups)
            return out.copy_(y.permute(0, 2, 3, 1))
        flags = {"benchmark": False, "deterministic": True, "allow_tf32": False}
        stride, dilation = list(op.stride), list(op.dilation)
        torch.ops.aten.cudnn_convolution.out(x, weight, padding, stride, dilation, op.groups, **flags, out=nchw(out))
        return out

    return run


def _make_cublas(op: Linear, work: Work, weights: Weights) -> Run:
    dtype = DTYPES[work.out_dtype]
    columns = weights.cast(op.weight, dtype).t()
    bias = None if op.bias is None else weights.cast(op.bias, dtype)
    has_relu = op.activation.kind == "relu" and dtype == torch.bfloat16  # cuBLAS makes 0 of NaN there

    def run(inputs: Sequence[Tensor], out: Tensor | None) -> Tensor:
        out = _given(out)
        rows = inputs[0].to(dtype)
        if bias is None:
            return activate_(torch.mm(rows, columns, out=out), op.activation)
        if has_relu:
            return torch.ops.aten._addmm_activation.out(bias, rows, columns, out=out)
        return activate_(torch.addmm(bias, rows, columns, out=out), op.activation)

    return run


def _make_max_pool(op: MaxPool) -> Run:
    padding = (op.padding[0], op.padding[1])
    return lambda inputs, out: launch_max_pool(inputs[0], _given(out), op.kernel, op.stride, padding, op.dilation)


def _make_add(op: Add) -> Run:
    def run(inputs: Sequence[Tensor], out: Tensor | None) -> Tensor:
        fine, coarse = inputs
        scale = op.upsample
        if coarse.shape != fine.shape and scale == UNIT:  # one cell for each image
            scale = (fine.shape[1], fine.shape[2])
        return _finish(fine, None, coarse, out, op.activation, scale)

    return run


def _finish(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out: Tensor | None,
    activation: Activation,
    upsample: tuple[int, int] = UNIT,
) -> Tensor:
    return launch_finish(x, bias, residual, _given(out), upsample, *_function(activation))


def _function(activation: Activation) -> tuple[int, tuple[float, float]]:
    """How the kernels know an activation."""
    return FUNCTIONS[activation.kind], clip_bounds(activation.kind, activation.low, activation.high)


def _fill_up(x: Tensor, groups: int) -> Tensor:
    """Zeros behind the channels of a map or weight, up to a multiple of CHANNELS."""
    missing = -x.shape[-1] % CHANNELS
    return F.pad(x, (0, missing)) if missing and groups == 1 else x


def _weight_for_cudnn(op: Conv, weights: Weights, dtype: torch.dtype) -> Tensor:
    """(O, kH, kW, C) as torch's (O, C, kH, kW), dense in channels_last order, halves filled up."""
    weight = weights.cast(op.weight, dtype)
    if dtype != torch.float32:
        weight = weights.make((op.weight, dtype, "filled"), lambda: _fill_up(weight, op.groups))
    return nchw(weight.contiguous())


def _given(out: Tensor | None) -> Tensor:
    assert out is not None, "on a device results have their places"
    return out
