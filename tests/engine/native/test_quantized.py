"""The operations on 8 bits against integers in float64: a single step apart, and that rarely."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fpn_engine.backends.native.cpu_quantized as cpu_quantized
import fpn_engine.backends.native.loading as loading
from fpn_engine.backends.native.cpu import make_run
from fpn_engine.backends.native.cpu_quantized import has_int8_products, largest_of_windows, make_quantized_run
from fpn_engine.backends.native.executor import CpuExecutor
from fpn_engine.backends.native.ops import RELU, Activation, Add, Conv, MaxPool, Op, Upsample
from fpn_engine.backends.native.packing import pack_part, unpack_part
from fpn_engine.backends.native.program import Program
from fpn_engine.backends.native.quantized import OFFSET, Dequantize, Quantize, QuantizedConv, QuantizedLinear
from fpn_engine.errors import BackendError

needs_int8 = pytest.mark.skipif(not has_int8_products(), reason="this processor or torch has no int8 products")
RARE = 1e-3  # of the results: float32 decides a half where float64 decides it otherwise
STEP, RESIDUAL_STEP = 0.05, 0.3


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_bits(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, generator=generator(seed), dtype=torch.uint8)


def make_tensors(*shape: int) -> dict[str, Tensor]:
    """A weight with very different channels, and their bias."""
    out = shape[0]
    scale = torch.logspace(-4, -1, out)
    return {
        "w": torch.randint(-127, 128, shape, generator=generator(1), dtype=torch.int8),
        "s": scale,
        "b": torch.randn(out, generator=generator(2)) * scale * 100,
    }


def round_exact(x: Tensor, step: float) -> Tensor:
    return (x / step).round().clamp(-128, 127) + OFFSET


def assert_within_a_step(ours: Tensor, exact: Tensor) -> None:
    assert ours.dtype == torch.uint8
    assert ours.shape == exact.shape
    assert ours.is_contiguous()
    apart = (ours.double() - exact).abs()
    assert apart.max() <= 1
    assert (apart > 0).double().mean() <= RARE
    assert ours.min() < OFFSET or ours.max() > OFFSET, "something was computed"


def convolve_exact(op: QuantizedConv, tensors: dict[str, Tensor], x: Tensor, residual: Tensor | None = None) -> Tensor:
    top, left, bottom, right = op.padding
    maps = F.pad((x.double() - OFFSET).permute(0, 3, 1, 2), (left, right, top, bottom))
    kernel = tensors["w"].double().permute(0, 3, 1, 2)
    y = F.conv2d(maps, kernel, None, op.stride, 0, op.dilation, op.groups).permute(0, 2, 3, 1)
    y = y * STEP * tensors["s"].double()
    if op.bias is not None:
        y = y + tensors["b"].double()
    if residual is not None:
        coarse = (residual.double() - OFFSET) * RESIDUAL_STEP
        y = y + coarse.repeat_interleave(op.upsample[0], 1).repeat_interleave(op.upsample[1], 2)
    return round_exact(y.relu() if op.activation == RELU else y, op.step)


GEOMETRIES: dict[str, dict[str, Any]] = {
    "1x1": {},
    "3x3": {"padding": (1, 1, 1, 1)},
    "stride": {"padding": (1, 1, 1, 1), "stride": (2, 2)},
    "stem": {"padding": (3, 3, 3, 3), "stride": (2, 2)},
    "uneven padding": {"padding": (1, 2, 0, 1), "stride": (2, 1)},
    "dilated": {"padding": (2, 2, 2, 2), "dilation": (2, 2)},
    "groups": {"padding": (1, 1, 1, 1), "groups": 4},
}
KERNELS = {"1x1": 1, "stem": 7}


@needs_int8
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", [Activation(), RELU])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_convolution(name: str, activation: Activation, residual: bool) -> None:
    geometry, k = GEOMETRIES[name], KERNELS.get(name, 3)
    channels = 3 if name == "stem" else 24
    tensors = make_tensors(32, k, k, channels // geometry.get("groups", 1))
    for n, h, w in ((2, 19, 24), (1, 40, 33), (2, 19, 24)):
        x = random_bits(n, h, w, channels, seed=h)
        op = QuantizedConv(
            inputs=("x", "r") if residual else ("x",),
            output="y",
            weight="w",
            scale="s",
            bias=None if name == "dilated" else "b",
            step=0.7,
            activation=activation,
            **geometry,
        )
        shape = convolve_exact(op, tensors, x).shape
        given = random_bits(*shape, seed=3) if residual else None
        exact = convolve_exact(op, tensors, x, given)
        run = make_quantized_run(op, tensors, {"x": STEP, "r": RESIDUAL_STEP})
        for place in (None, torch.empty(shape, dtype=torch.uint8)) if residual else (None,):
            assert_within_a_step(run([x] if given is None else [x, given.clone()], place), exact)
        if given is not None:  # onto the residual itself
            onto = given.clone()
            assert run([x, onto], onto).data_ptr() == onto.data_ptr()
            assert_within_a_step(onto, exact)


@needs_int8
def test_lateral() -> None:
    tensors = make_tensors(16, 1, 1, 24)
    op = QuantizedConv(inputs=("x", "r"), output="y", weight="w", scale="s", bias="b", step=0.5, upsample=(2, 2))
    x, coarse = random_bits(2, 10, 14, 24), random_bits(2, 5, 7, 16, seed=1)
    run = make_quantized_run(op, tensors, {"x": STEP, "r": RESIDUAL_STEP})
    assert_within_a_step(run([x, coarse], None), convolve_exact(op, tensors, x, coarse))


@needs_int8
@pytest.mark.parametrize("activation", [Activation(), RELU])
def test_linear(activation: Activation) -> None:
    tensors = make_tensors(40, 300)
    op = QuantizedLinear(inputs=("x",), output="y", weight="w", scale="s", bias="b", step=0.4, activation=activation)
    run = make_quantized_run(op, tensors, {"x": STEP})
    for rows in (1, 7, 100):
        x = random_bits(rows, 300, seed=rows)
        exact = (x.double() - OFFSET) @ tensors["w"].double().t() * STEP * tensors["s"] + tensors["b"]
        assert_within_a_step(run([x], None), round_exact(exact.relu() if activation == RELU else exact, 0.4))


def test_rounding_is_half_to_even_and_cut_off() -> None:
    x = torch.tensor([[-1e30, -64.2, -64.0, -0.75, -0.25, 0.0, 0.25, 0.75, 1.25, 63.2, 63.5, 1e30]])
    op = Quantize(inputs=("x",), output="q", step=0.5)
    expected = [-128, -128, -128, -2, 0, 0, 0, 2, 2, 126, 127, 127]
    q = make_quantized_run(op, {}, {})([x], None)
    assert (q.int() - OFFSET).tolist() == [expected]
    back = make_quantized_run(Dequantize(inputs=("q",), output="y"), {}, {"q": 0.5})([q], None)
    assert back.tolist() == [[0.5 * number for number in expected]]


def test_conversions_of_many_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than go through at once, a number that is no multiple of it, and an order that is not dense."""
    monkeypatch.setattr(cpu_quantized, "CHUNK", 1 << 17)
    x = torch.randn(3, 700, 401, generator=generator()).transpose(1, 2) * 3
    out = torch.empty(x.shape, dtype=torch.uint8)
    q = make_quantized_run(Quantize(inputs=("x",), output="q", step=0.037), {}, {})([x], out)
    assert q.data_ptr() == out.data_ptr()
    assert torch.equal(q.double(), round_exact(x / torch.tensor(0.037), 1.0).double())
    back = make_quantized_run(Dequantize(inputs=("q",), output="y"), {}, {"q": 0.037})([q], None)
    assert torch.equal(back, (q.float() - OFFSET) * 0.037)


@pytest.mark.parametrize(
    "op",
    [
        MaxPool(inputs=("x",), output="y", kernel=(3, 3), stride=(2, 2), padding=(1, 1, 1, 1)),
        MaxPool(inputs=("x",), output="y", kernel=(2, 3), stride=(1, 2), padding=(0, 1, 1, 0)),
        MaxPool(inputs=("x",), output="y", kernel=(3, 1), dilation=(2, 1)),
        MaxPool(inputs=("x",), output="y", kernel=(1, 4), stride=(3, 1)),
        MaxPool(inputs=("x",), output="y", kernel=(1, 1), stride=(2, 2)),
        MaxPool(inputs=("x",), output="y", kernel=(1, 1), padding=(1, 0, 0, 2)),
    ],
)
def test_max_pool(op: MaxPool) -> None:
    x = random_bits(2, 17, 20, 5)
    exact = make_run(op, {})([x.double()], None).clamp(min=0)  # a window of padding alone has the least number
    before = x.clone()
    for place in (None, torch.empty(exact.shape, dtype=torch.uint8)):
        assert torch.equal(make_run(op, {})([x], place).double(), exact)
    assert torch.equal(x, before)
    assert largest_of_windows(x, op, None).data_ptr() != x.data_ptr()


OPS: list[Op] = [
    Quantize(inputs=("x",), output="a", step=0.05),
    QuantizedConv(inputs=("a",), output="b", weight="w", scale="s", step=0.7),
    MaxPool(inputs=("b",), output="c", kernel=(1, 1), stride=(2, 2)),
    Upsample(inputs=("c",), output="d", factor=(2, 2)),
    Dequantize(inputs=("d",), output="y"),
]


def test_steps_follow_what_is_moved() -> None:
    program = Program(input="x", ops=tuple(OPS), outputs=("y",))
    assert program.steps() == {"a": 0.05, "b": 0.7, "c": 0.7, "d": 0.7}
    assert [program.dtypes()[name] for name in "xabcdy"] == ["float32", *["uint8"] * 4, "float32"]


@needs_int8
def test_a_program_in_one_arena() -> None:
    tensors = make_tensors(16, 1, 1, 16)
    program = Program(input="x", ops=tuple(OPS), outputs=("y",))
    x = torch.randn(2, 12, 14, 16, generator=generator())
    results = [CpuExecutor(program, tensors, all_in_arena=whole)(x)[0] for whole in (False, True)]
    assert torch.equal(*results)
    assert results[0].abs().max() > 0
    assert torch.equal(results[0][:, ::2, ::2], results[0][:, 1::2, 1::2])


@pytest.mark.parametrize(
    ("ops", "problem"),
    [
        (OPS[:4], "the output d is of 8 bits"),
        ([OPS[0], Conv(inputs=("a",), output="b", weight="w")], "conv b does not take uint8"),
        ([OPS[0], Add(inputs=("a", "a"), output="b")], "add b does not take uint8"),
        ([OPS[0], Add(inputs=("a", "x"), output="b")], "add b mixes float32 and uint8"),
        ([OPS[1].__class__(inputs=("x",), output="b", weight="w", scale="s", step=1.0)], "b does not take float32"),
        ([Dequantize(inputs=("x",), output="b")], "dequantize b does not take float32"),
    ],
)
def test_number_types_that_do_not_fit(ops: list[Op], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Program(input="x", ops=tuple(ops), outputs=(ops[-1].output,))


@pytest.mark.parametrize("step", [0.0, -1.0, math.inf, math.nan])
def test_steps_that_are_none(step: float) -> None:
    with pytest.raises(ValueError, match="a step is a number above 0"):
        Quantize(inputs=("x",), output="q", step=step)
    with pytest.raises(ValueError, match="a step is a number above 0"):
        QuantizedLinear(inputs=("x",), output="q", weight="w", scale="s", step=step)


def test_activations_that_8_bits_do_not_have() -> None:
    with pytest.raises(ValueError, match="one of none, relu, not 'sigmoid'"):
        QuantizedConv(inputs=("x",), output="y", weight="w", scale="s", step=1.0, activation=Activation(kind="sigmoid"))


def test_tensors_of_another_type_are_refused() -> None:
    program, tensors = Program(input="x", ops=tuple(OPS), outputs=("y",)), make_tensors(16, 1, 1, 16)
    packed = pack_part("trunk", program, tensors)
    assert unpack_part("trunk", packed)[1]["w"].dtype == torch.int8
    for changed in ({"w": tensors["w"].float()}, {"s": tensors["s"].half()}):
        with pytest.raises(ValueError, match="of another number type"):
            unpack_part("trunk", pack_part("trunk", program, tensors | changed))


def test_without_the_instructions_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "has_int8_products", lambda: False)
    with pytest.raises(BackendError, match=r"no VNNI to add.*; build with --backend onnxruntime"):
        loading.check_int8()


def make_layers(sum_of_one: int) -> type:
    """Stands in for oneDNN's layers of a torch: all results are ``sum_of_one``."""

    def fill(out: Tensor) -> Tensor:
        return out.fill_(OFFSET + sum_of_one)

    class Convolve:
        def __call__(self, x: Tensor, *given: Any) -> Tensor:
            return fill(x.clone())

        def binary(self, *given: Any) -> Tensor:
            return fill(given[6])

    class Layers:
        qconv_prepack = staticmethod(lambda weight, *given: weight)
        qlinear_prepack = staticmethod(lambda weight, shape: weight)
        qlinear_pointwise = staticmethod(lambda x, *given: fill(x.clone()))
        qconv2d_pointwise = Convolve()

    return Layers


@pytest.mark.parametrize(
    ("layers", "found"),
    [(make_layers(100), True), (make_layers(40), False), (object(), False)],
    ids=["exact", "saturated, as without VNNI", "not in this torch"],
)
def test_products_are_tried(layers: object, found: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops, "onednn", layers)
    assert has_int8_products.__wrapped__() is found
