"""The convolution of few channels against conv2d in float64: units of one and two numbers, borders, what follows."""

import math

import pytest
import torch
import torch.nn.functional as F

from fpn_kernels.triton.epilogue import FUNCTIONS, clip_bounds
from fpn_kernels.triton.few_channels import (
    MOST_UNITS,
    Units,
    count_units,
    few_channels_tiles,
    launch_few_channels,
    pack_weight,
)
from fpn_kernels.triton.tiles import FEW_CHANNELS_TILES, Tile
from tests.kernels.triton.capture import assert_capturable
from tests.kernels.triton.device import DEVICE
from tests.kernels.triton.test_convolution import STEPS, apply, parts_of, randn

pytestmark = pytest.mark.usefixtures("poisoned_memory")
SMALL = Tile(16, 16, 32, 4, 1)


def convolve(x, weight, bias, out_hw, *, stride, padding, tile=SMALL, kind="none", out_dtype=None):
    units = count_units(weight.shape[1:3], x.shape[3], x.shape[2], stride[1], padding[1], x.element_size())
    packed = pack_weight(weight, units, tile.k)
    out = torch.empty((len(x), *out_hw, len(weight)), dtype=out_dtype or x.dtype, device=x.device)
    return launch_few_channels(
        x, packed, bias, out, units=units, kernel=tuple(weight.shape[1:3]), tile=tile, stride=stride, top=padding[0],
        function=FUNCTIONS[kind], bounds=clip_bounds(kind, -0.5, 0.5),
    )  # fmt: skip


def assert_convolves(parts, *, stride, padding, kind="none", **options):
    x, weight, bias = (part if part is None else part.to(DEVICE) for part in parts[:3])
    top, left, bottom, right = padding
    padded = F.pad(x.double().permute(0, 3, 1, 2), (left, right, top, bottom))
    w = weight.double().permute(0, 3, 1, 2)
    wanted = F.conv2d(padded, w, None if bias is None else bias.double(), stride)
    size = F.conv2d(padded.abs(), w.abs(), None, stride).permute(0, 2, 3, 1)
    wanted = apply(wanted, kind, -0.5, 0.5).permute(0, 2, 3, 1)
    out = convolve(x, weight, bias, wanted.shape[1:3], stride=stride, padding=padding, kind=kind, **options)
    tolerance = 2 * STEPS[out.dtype] * wanted.abs() + 2**-24 * weight[0].numel() ** 0.5 * 8 * (size + 8)
    assert ((out.double() - wanted).abs() <= tolerance).all()
    return out


@pytest.mark.parametrize("dtype", STEPS, ids=str)
@pytest.mark.parametrize("width", [11, 70])
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"),
    [
        ((7, 7), (2, 2), (3, 3, 3, 3)),
        ((3, 3), (2, 2), (1, 1, 1, 1)),
        ((3, 3), (2, 2), (0, 0, 1, 1)),
        ((2, 5), (1, 1), (0, 3, 2, 1)),
        ((4, 4), (4, 4), (0, 0, 0, 0)),
    ],
    ids=str,
)
def test_windows(kernel, stride, padding, channels, width, dtype):
    assert_convolves(parts_of(2, 9, width, channels, 7, kernel, dtype=dtype), stride=stride, padding=padding)


@pytest.mark.parametrize("tile", FEW_CHANNELS_TILES, ids=str)
@pytest.mark.parametrize(("kernel", "outputs"), [(7, 64), (3, 16), (3, 80)])
def test_every_tile(tile, kernel, outputs):
    """Maps so wide that some programs are inside, where nothing is masked."""
    parts = parts_of(1, 13, 2 * 300, 3, outputs, (kernel, kernel), dtype=torch.float16)
    assert_convolves(parts, stride=(2, 2), padding=(kernel // 2,) * 4, tile=tile, kind="relu")


@pytest.mark.parametrize("kind", ["relu", "clip", "sigmoid", "hardswish"])
def test_what_follows(kind):
    x, weight, bias, _ = parts_of(2, 8, 10, 3, 5, (3, 3), dtype=torch.float16)
    for given in (bias, None):
        assert_convolves((x, weight, given), stride=(2, 2), padding=(1, 1, 1, 1), kind=kind)


def test_a_float32_result_of_halves_is_not_rounded():
    parts = parts_of(1, 8, 10, 3, 15, (3, 3), dtype=torch.float16)
    out = assert_convolves(parts, stride=(2, 2), padding=(1, 1, 1, 1), out_dtype=torch.float32)
    assert (out != out.half().float()).any()


@pytest.mark.parametrize("kind", ["none", "relu", "clip"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("place", [(4, 16), (0, 0), (4, 70), (12, 139)], ids=str)
def test_nan_stays_and_does_not_spread(place, dtype, value, kind):
    """Numbers beside a window, which are loaded with it, are not multiplied, not even by zero."""
    x, weight, bias, _ = (p if p is None else p.to(DEVICE) for p in parts_of(1, 13, 140, 3, 6, (7, 7), dtype=dtype))
    x[0, *place] = value
    options = {"stride": (2, 2), "padding": (3, 3, 3, 3), "kind": kind}
    out = convolve(x, weight.abs() if value == math.inf else weight, bias, (7, 70), **options)
    there = torch.zeros(1, 1, 13, 140, device=DEVICE)
    there[0, 0, *place] = 1
    reached = F.conv2d(there, torch.ones(1, 1, 7, 7, device=DEVICE), None, 2, 3)[0, 0] > 0
    found = out[0].isnan() if math.isnan(value) or kind != "clip" else out[0] == 0.5
    if value == math.inf and kind != "clip":
        found = out[0].isinf()
    assert found[reached].all()
    assert out[0][~reached].isfinite().all()


def test_units():
    """A stem of 7 x 7 x 3 begins between two units; an odd row or step makes units of one number."""
    assert count_units((7, 7), 3, 1216, 2, 3, 2) == Units(per=2, lead=1, wide=11, step=3, first=-5)
    assert count_units((3, 3), 3, 224, 2, 1, 2) == Units(per=2, lead=1, wide=5, step=3, first=-2)
    assert count_units((4, 4), 4, 7, 1, 0, 2) == Units(per=2, lead=0, wide=8, step=2, first=0)
    assert count_units((7, 7), 3, 1215, 2, 3, 2) == Units(per=1, lead=0, wide=21, step=6, first=-9)
    assert count_units((3, 3), 3, 224, 1, 1, 2).per == count_units((3, 3), 3, 224, 2, 1, 4).per == 1
    assert count_units((7, 7), 3, 1216, 2, 3, 2).split() == Units(per=1, lead=1, wide=22, step=6, first=-10)
    assert few_channels_tiles(count_units((7, 7), 3, 1216, 2, 3, 2)) == FEW_CHANNELS_TILES
    assert few_channels_tiles(count_units((7, 7), 3, 1215, 2, 3, 2)) == FEW_CHANNELS_TILES[:2]
    assert 7 * count_units((7, 7), 3, 1215, 2, 3, 2).wide < MOST_UNITS


def test_packed_weight():
    weight = randn(5, 3, 3, 3)
    units = count_units((3, 3), 3, 224, 2, 1, 2)
    packed = pack_weight(weight, units, 32)
    assert packed.shape == (64, 32)
    assert packed.is_contiguous()
    rows = packed[:5, :30].unflatten(1, (3, 10))
    assert torch.equal(rows[:, :, 1:], weight.flatten(2))
    assert packed.count_nonzero() == weight.count_nonzero() == rows[:, :, 1:].count_nonzero()


def test_nothing_to_do():
    x, units = torch.empty(0, 8, 8, 3), count_units((3, 3), 3, 8, 2, 1, 4)
    packed, out = pack_weight(torch.empty(6, 3, 3, 3), units, 32), torch.empty(0, 4, 4, 6)
    assert launch_few_channels(x, packed, None, out, units=units, kernel=(3, 3), tile=SMALL) is out


@pytest.mark.gpu
@pytest.mark.parametrize("tile", FEW_CHANNELS_TILES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [1216, 1215])
def test_the_stem(width, dtype, tile):
    if tile not in few_channels_tiles(count_units((7, 7), 3, width, 2, 3, 2)):
        pytest.skip("too many loads")
    parts = parts_of(2, 800, width, 3, 64, (7, 7), dtype=dtype)
    assert_convolves(parts, stride=(2, 2), padding=(3,) * 4, kind="relu", tile=tile)


def launch_stem(x, weight, bias):
    tile = FEW_CHANNELS_TILES[0]
    return convolve(x, weight, bias, (100, 152), stride=(2, 2), padding=(3, 3), tile=tile, kind="relu")


@pytest.mark.gpu
def test_capturable():
    given, others = (parts_of(1, 200, 304, 3, 64, (7, 7), dtype=torch.float16, seed=seed)[:3] for seed in (1, 2))
    assert_capturable(launch_stem, given, others)
