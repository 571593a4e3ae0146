"""Winograd's 3x3 convolution against float64: every remainder of tiles, residuals, shared weights, where it is used."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fpn_engine.backends.native.winograd as winograd
from fpn_engine.backends.native.cpu import make_runs
from fpn_engine.backends.native.cpu_convolution import make_convolution
from fpn_engine.backends.native.ops import Activation, Conv
from fpn_engine.backends.native.program import Program

# Every remainder of 4 on both sides; one tile; more than one strip, the last one partial.
SIZES = [(1, 1), (4, 4), (5, 9), (6, 10), (7, 11), (8, 12), (43, 38), (64, 90)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def in_float64(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    bias = None if bias is None else bias.double()
    y = F.conv2d(x.permute(0, 3, 1, 2).double(), weight.permute(0, 3, 1, 2).double(), bias, padding=1)
    return y.permute(0, 2, 3, 1)


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 3e-5 * expected.abs().max()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("added", ["nothing", "bias", "residual"])
def test_is_the_convolution(size: tuple[int, int], batch: int, added: str) -> None:
    x, weight = random(batch, *size, 20), random(12, 3, 3, 20, seed=1)
    bias = random(12, seed=2) if added == "bias" else None
    residual = random(batch, *size, 12, seed=3) if added == "residual" else None
    expected = in_float64(x, weight, bias) + (0 if residual is None else residual.double())
    found = winograd.convolve(x, winograd.transform_weight(weight), bias, residual)
    assert_close(found, expected)
    assert residual is None or found is residual


def test_error_is_a_few_times_that_of_the_plain_sum() -> None:
    x, weight = random(1, 40, 40, 256).relu(), random(256, 3, 3, 256, seed=1) / 48
    expected = in_float64(x, weight, None)
    plain = F.conv2d(x.permute(0, 3, 1, 2), weight.permute(0, 3, 1, 2), padding=1).permute(0, 2, 3, 1)
    found = winograd.convolve(x, winograd.transform_weight(weight), None)
    assert (found - expected).abs().max() <= 20 * (plain - expected).abs().max()


def conv(**changes: object) -> Conv:
    values: dict[str, object] = {"inputs": ("x",), "output": "y", "weight": "w", "padding": (1, 1, 1, 1)}
    return Conv(**{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "shape", "dtype"),
    [
        ({"stride": (2, 2)}, (128, 3, 3, 128), torch.float32),
        ({"dilation": (2, 2)}, (128, 3, 3, 128), torch.float32),
        ({"groups": 2}, (128, 3, 3, 128), torch.float32),
        ({"padding": (0, 0, 0, 0)}, (128, 3, 3, 128), torch.float32),
        ({"padding": (0, 0, 1, 1)}, (128, 3, 3, 128), torch.float32),
        ({"inputs": ("x", "r"), "upsample": (2, 2)}, (128, 3, 3, 128), torch.float32),
        ({}, (128, 3, 3, 127), torch.float32),
        ({}, (127, 3, 3, 128), torch.float32),
        ({}, (128, 3, 5, 128), torch.float32),
        ({}, (128, 3, 3, 128), torch.bfloat16),
    ],
)
def test_other_convolutions_do_not_suit(changes: dict[str, object], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert winograd.suits(conv(), torch.empty(128, 3, 3, 128))
    assert not winograd.suits(conv(**changes), torch.empty(shape, dtype=dtype))


@pytest.mark.parametrize("kind", ["none", "relu", "sigmoid", "hardswish"])
@pytest.mark.parametrize("place", ["none", "own", "the residual's"])
def test_within_an_operation(kind: str, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[torch.Size] = []
    convolve = winograd.convolve
    monkeypatch.setattr(winograd, "convolve", lambda x, *given: called.append(x.shape) or convolve(x, *given))
    weights = {"w": random(128, 3, 3, 128) / 34, "b": random(128, seed=1)}
    op = conv(inputs=("x", "r"), bias="b", activation=Activation(kind=kind))
    run = make_convolution(op, weights, True, winograd.WinogradWeights(weights))
    for size, is_large in (((33, 30), True), ((8, 8), False)):
        x, residual = random(1, *size, 128, seed=2), random(1, *size, 128, seed=3)
        activate = {"none": lambda y: y, "relu": F.relu, "sigmoid": torch.sigmoid, "hardswish": F.hardswish}[kind]
        expected = activate(in_float64(x, weights["w"], weights["b"]) + residual.double())
        kept = residual.clone()
        out = {"none": None, "own": torch.full_like(residual, torch.nan), "the residual's": residual}[place]
        found = run([x, residual], out)
        assert_close(found, expected)
        assert out is None or found.data_ptr() == out.data_ptr()
        assert out is residual or torch.equal(residual, kept)
        assert (x.shape in called) == is_large


def test_shared_weights_are_transformed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    transform = winograd.transform_weight
    monkeypatch.setattr(winograd, "transform_weight", lambda weight: made.append(1) or transform(weight))
    weights = {"w": random(128, 3, 3, 128)}
    ops = tuple(conv(inputs=(a,), output=b) for a, b in (("x", "y"), ("y", "z")))
    runs = make_runs(Program(input="x", input_dtype="float32", ops=ops, outputs=("z",)), weights)
    assert not made
    x = random(1, 32, 32, 128)
    for run in runs:
        x = run([x], None)
    assert made == [1]


def test_tensors_with_nan_go_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "convolve", lambda *given: pytest.fail("NaN would spread over tiles"))
    weights = {"w": random(128, 3, 3, 128), "b": torch.full((128,), torch.nan)}
    program = Program(input="x", input_dtype="float32", ops=(conv(bias="b"),), outputs=("y",))
    (run,) = make_runs(program, weights)
    assert run([random(1, 32, 32, 128)], None).isnan().all()
