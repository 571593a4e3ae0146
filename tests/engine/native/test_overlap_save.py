"""Scores by spectra against convolutions in float64, on ragged levels, with borders and tiles in every position."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fpn_engine.backends.native import cpu, overlap_save
from fpn_engine.backends.native.cpu_convolution import has_bfloat16, has_fused_convolution
from fpn_engine.backends.native.executor import CpuExecutor
from fpn_engine.backends.native.ops import WindowScore
from fpn_engine.backends.native.overlap_save import OverlapSave, tile_side
from fpn_engine.backends.native.program import Program
from fpn_engine.backends.native.shapes import infer_shapes

needs_onednn = pytest.mark.skipif(not has_fused_convolution(), reason="this torch has no oneDNN")
SIZES = [(45, 30), (23, 15), (12, 8), (1, 1), (20, 41)]


def make_layer(kernel: int, hidden: int = 70, channels: int = 6) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(kernel)
    return {
        "weight": torch.randn(hidden, kernel, kernel, channels, generator=g) / (kernel * channels**0.5),
        "bias": torch.randn(hidden, generator=g) / 4,
        "scale": torch.randn(hidden, generator=g) / hidden**0.5,
        "shift": torch.randn(1, generator=g),
    }


def make_levels(n: int = 2, channels: int = 6) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(n, h, w, channels, generator=g) for h, w in SIZES]


def convolve(levels: list[Tensor], layer: dict[str, Tensor]) -> list[Tensor]:
    """The same in float64, directly."""
    weight, bias, scale, shift = (layer[name].double() for name in ("weight", "bias", "scale", "shift"))
    found = []
    for level in levels:
        hidden = F.conv2d(level.double().permute(0, 3, 1, 2), weight.permute(0, 3, 1, 2), bias, padding="same").relu()
        found.append(torch.einsum("nohw,o->nhw", hidden, scale) + shift)
    return found


@needs_onednn
@pytest.mark.parametrize("kernel", [1, 3, 5, 7, 9])
@pytest.mark.parametrize("tiles", [overlap_save.TILES, 3])
def test_scores_are_the_convolutions(kernel: int, tiles: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap_save, "TILES", tiles)  # 3: parts that end within rows of tiles
    layer, levels = make_layer(kernel), make_levels()
    expected = convolve(levels, layer)
    found = OverlapSave(*(layer[name] for name in ("weight", "bias", "scale", "shift")))(levels)
    for ours, right in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), right, rtol=0, atol=5e-6)


@needs_onednn
def test_rounding_is_no_worse_than_a_convolutions() -> None:
    """The error budget is what float32 convolutions themselves are off by: sums of 49 x 64 products."""
    layer, levels = make_layer(7, hidden=64, channels=64), make_levels(1, 64)
    right = convolve(levels, layer)
    direct = [
        torch.einsum(
            "nohw,o->nhw",
            F.conv2d(x.permute(0, 3, 1, 2), layer["weight"].permute(0, 3, 1, 2), layer["bias"], padding=3).relu(),
            layer["scale"],
        )
        + layer["shift"]
        for x in levels
    ]
    ours = OverlapSave(*(layer[name] for name in ("weight", "bias", "scale", "shift")))(levels)

    def off(found: list[Tensor]) -> float:
        return max(float((a - b).abs().max()) for a, b in zip(found, right, strict=True))

    assert off(ours) <= off(direct) + 1e-6


@needs_onednn
def test_an_image_is_what_it_is_alone() -> None:
    layer, levels = make_layer(5), make_levels(3)
    scores = OverlapSave(layer["weight"], None, layer["scale"], None)
    together = scores(levels)
    for i in range(3):
        for alone, batch in zip(scores([level[i : i + 1] for level in levels]), together, strict=True):
            torch.testing.assert_close(alone[0], batch[i], rtol=0, atol=1e-5)


def test_tiles_are_even_and_larger_than_windows() -> None:
    for kernel in range(1, 16, 2):
        assert tile_side(kernel) % 2 == 0
        assert tile_side(kernel) >= 2 * kernel


@pytest.mark.parametrize("how", ["spectra", "without oneDNN", "too large"])
def test_the_operation(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "without oneDNN":
        monkeypatch.setattr(cpu, "has_fused_convolution", lambda: False)
    elif how == "too large":
        monkeypatch.setattr(cpu, "MAX_SPECTRUM_BYTES", 1)
    elif not has_fused_convolution():
        pytest.skip("this torch has no oneDNN")
    layer, (level, *_) = make_layer(5), make_levels()
    op = WindowScore(inputs=("x",), output="y", weight="weight", bias="bias", scale="scale", shift="shift")
    program = Program(input="x", ops=(op,), outputs=("y",))
    (found,) = CpuExecutor(program, layer)(level)
    assert found.shape == (2, 45 * 30, 1, 1)
    (expected,) = convolve([level], layer)
    torch.testing.assert_close(found.view(2, 45, 30).double(), expected, rtol=0, atol=5e-6)


def test_nan_is_not_hidden() -> None:
    layer, (level, *_) = make_layer(5), make_levels()
    level[1, 7, 7, 0] = torch.nan
    op = WindowScore(inputs=("x",), output="y", weight="weight", scale="scale")
    program = Program(input="x", ops=(op,), outputs=("y",))
    (found,) = CpuExecutor(program, {name: layer[name] for name in ("weight", "scale")})(level)
    assert found[0].isfinite().all()
    assert found[1].isnan().any()


def test_what_does_not_fit_is_told() -> None:
    layer = make_layer(5)
    op = WindowScore(inputs=("x",), output="y", weight="weight", bias="bias", scale="shift")
    program = Program(input="x", ops=(op,), outputs=("y",))
    with pytest.raises(ValueError, match="window_score y"):
        infer_shapes(program.ops, {"x": (1, 9, 9, 6)}, {name: tuple(t.shape) for name, t in layer.items()})


@needs_onednn
@pytest.mark.skipif(not has_bfloat16(), reason="this processor or torch does not convolve in bfloat16")
@pytest.mark.parametrize("kernel", [5, 7])
def test_in_bfloat16_scores_are_rough(kernel: int) -> None:
    """Right to a few hundredths of their spread, and in another order of work than in float32."""
    layer, levels = make_layer(kernel, hidden=300, channels=64), make_levels(2, 64)
    rough = OverlapSave(*(layer[name] for name in ("weight", "bias", "scale", "shift")), torch.bfloat16)
    found = torch.cat([level.flatten() for level in rough(levels)])
    right = torch.cat([level.flatten() for level in convolve(levels, layer)])
    assert found.dtype == torch.float32
    off = (found - right).abs()
    assert float(off.max()) <= 0.1 * float(right.std())
    assert float(off.max()) > 1e-4 * float(right.std())  # else it was float32
