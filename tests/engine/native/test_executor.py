"""The executor: without oneDNN, with broken weights, from several threads, on shapes that come and go."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fpn_engine.backends.native import cpu
from fpn_engine.backends.native.cpu_convolution import has_fused_convolution
from fpn_engine.backends.native.executor import MAX_PREPARED, CpuExecutor
from fpn_engine.backends.native.ops import RELU, Activation, Conv, MaxPool
from fpn_engine.backends.native.program import Program

SAME = (1, 1, 1, 1)
PROGRAM = Program(
    input="x",
    ops=(
        Conv(inputs=("x",), output="a", weight="w", bias="b", padding=SAME, activation=RELU),
        Conv(inputs=("a",), output="c", weight="v", padding=SAME, activation=Activation(kind="hardswish")),
        Conv(inputs=("c", "a"), output="d", weight="v", padding=SAME, activation=RELU),
        MaxPool(inputs=("d",), output="e", kernel=(2, 2), stride=(2, 2)),
        Conv(inputs=("d", "e"), output="y", weight="u", upsample=(2, 2), activation=Activation(kind="clip", high=1.0)),
    ),
    outputs=("y", "e"),
)


@pytest.fixture
def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"w": (4, 3, 3, 3), "b": (4,), "v": (4, 3, 3, 4), "u": (4, 1, 1, 4)}
    return {name: torch.randn(shape, generator=generator) / 4 for name, shape in shapes.items()}


def expect(weights: dict[str, Tensor], x: Tensor) -> list[Tensor]:
    w, v, u = (weights[name].permute(0, 3, 1, 2) for name in "wvu")
    a = F.conv2d(x.permute(0, 3, 1, 2), w, weights["b"], padding=1).relu()
    c = F.hardswish(F.conv2d(a, v, padding=1))
    d = (F.conv2d(c, v, padding=1) + a).relu()
    e = F.max_pool2d(d, 2)
    y = (F.conv2d(d, u) + F.interpolate(e, scale_factor=2.0)).clamp(0, 1)
    return [t.permute(0, 2, 3, 1) for t in (y, e)]


def make_input(n: int = 2, h: int = 8, w: int = 6, seed: int = 1) -> Tensor:
    return torch.randn(n, h, w, 3, generator=torch.Generator().manual_seed(seed))


def assert_right(executor: CpuExecutor, weights: dict[str, Tensor], x: Tensor) -> None:
    for ours, theirs in zip(executor(x), expect(weights, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fused", [True, False], ids=["oneDNN", "plain"])
@pytest.mark.parametrize("all_in_arena", [False, True], ids=["", "arena"])
def test_with_and_without_onednn(
    weights: dict[str, Tensor], fused: bool, all_in_arena: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fused and not has_fused_convolution():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(cpu, "has_fused_convolution", lambda: fused)
    executor = CpuExecutor(PROGRAM, weights, all_in_arena=all_in_arena)
    assert_right(executor, weights, make_input())
    assert_right(executor, weights, make_input().permute(0, 2, 1, 3))


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_what_is_not_finite_is_not_hidden(weights: dict[str, Tensor], broken: float) -> None:
    """A ReLU that makes 0 of NaN would let a broken network pass for one that finds nothing."""
    weights["w"][0, 0, 0, 0] = broken
    y, e = CpuExecutor(PROGRAM, weights)(make_input())
    assert y.isnan().any()
    assert not e.isfinite().all()


def test_shapes_that_come_and_go(weights: dict[str, Tensor]) -> None:
    executor = CpuExecutor(PROGRAM, weights)
    kept = executor(make_input())
    for number in range(MAX_PREPARED + 3):
        assert_right(executor, weights, make_input(1, 2 + 2 * (number % 40), 4 + 2 * (number // 40), number))
    for n, h, w in [(4, 16, 16), (1, 2, 2), (4, 16, 16)]:
        assert_right(executor, weights, make_input(n, h, w))
    for ours, theirs in zip(kept, expect(weights, make_input()), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_shape_that_does_not_fit(weights: dict[str, Tensor]) -> None:
    executor = CpuExecutor(PROGRAM, weights)
    with pytest.raises(ValueError, match=r"conv a: 5 channels on a weight"):
        executor(torch.zeros(1, 8, 8, 5))
    with pytest.raises(ValueError, match=r"conv y: .* upsampled by \(2, 2\) is added to"):
        executor(make_input(1, 7, 8))
    with pytest.raises(ValueError, match="max_pool e would have the shape"):
        executor(make_input(1, 1, 8))
    assert_right(executor, weights, make_input())


def test_threads(weights: dict[str, Tensor]) -> None:
    """One arena, one call at a time; torch's own number of threads is as before."""
    executor = CpuExecutor(PROGRAM, weights, threads=2)
    before = torch.get_num_threads()
    inputs = [make_input(1, 4 + 2 * (i % 3), 8, i) for i in range(24)]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(executor, inputs))
    assert torch.get_num_threads() == before
    for x, outputs in zip(inputs, answers, strict=True):
        for ours, theirs in zip(outputs, expect(weights, x), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_outputs_can_be_used_outside(weights: dict[str, Tensor]) -> None:
    y, _ = CpuExecutor(PROGRAM, weights)(make_input())
    assert (y + 1).sum().isfinite()
    assert not y.requires_grad
