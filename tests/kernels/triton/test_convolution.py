"""The implicit matrix product against conv2d in float64: geometry, shares of tiles, what follows, number types."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fpn_kernels.triton.convolution import launch_convolution
from fpn_kernels.triton.epilogue import FUNCTIONS, clip_bounds
from fpn_kernels.triton.tiles import (
    FLOAT32_TILE,
    LARGE_TILE,
    RAGGED_TILES,
    STREAM,
    TILES,
    WHOLE,
    Tile,
    count_shared_bytes,
    divide,
)
from tests.kernels.boxes import seeded
from tests.kernels.triton.capture import assert_capturable
from tests.kernels.triton.device import DEVICE

pytestmark = pytest.mark.usefixtures("poisoned_memory")
SMALL = Tile(32, 32, 32, 4, 2)
# Half the spacing of the type's numbers; the interpreter's bfloat16 stores truncate.
STEPS = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-9 if DEVICE.type == "cuda" else 2**-8}


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=seeded(seed + sum(shape))).to(dtype)


def parts_of(n, h, w, c, o, kernel=(1, 1), out=None, up=None, dtype=torch.float32, seed=0):
    """x, weight, bias, residual (if ``up``), with a result of about unit variance."""
    weight = (randn(o, *kernel, c, seed=seed) / (c * math.prod(kernel)) ** 0.5).to(dtype)
    residual = None
    if up is not None:
        residual = randn(n, out[0] // up[0], out[1] // up[1], o, dtype=dtype, seed=seed)
    return randn(n, h, w, c, dtype=dtype, seed=seed), weight, randn(o, dtype=dtype, seed=seed), residual


def apply(x, kind, low, high):
    match kind:
        case "relu":
            return x.relu()
        case "clip":
            return x.clamp(low, high)
        case "sigmoid":
            return x.sigmoid()
        case "hardswish":
            return F.hardswish(x)
    return x


def assert_convolves(
    parts, *, stride=(1, 1), padding=(0, 0, 0, 0), dilation=(1, 1), up=(1, 1), kind="none", out_dtype=None, **tactic
):
    x, weight, bias, residual = (None if part is None else part.to(DEVICE) for part in parts)
    top, left, bottom, right = padding
    padded = F.pad(x.double().permute(0, 3, 1, 2), (left, right, top, bottom))
    w = weight.double().permute(0, 3, 1, 2)
    wanted = F.conv2d(padded, w, None if bias is None else bias.double(), stride, 0, dilation)
    size = F.conv2d(padded.abs(), w.abs(), None, stride, 0, dilation)
    if residual is not None:
        up_residual = residual.double().permute(0, 3, 1, 2).repeat_interleave(up[0], 2).repeat_interleave(up[1], 3)
        wanted = wanted + up_residual
    wanted = apply(wanted, kind, -0.5, 0.5).permute(0, 2, 3, 1)
    out = torch.empty(wanted.shape, dtype=out_dtype or x.dtype, device=DEVICE)
    launch_convolution(
        x, weight, bias, residual, out, **{"tile": SMALL} | tactic, stride=stride, padding=padding[:2],
        dilation=dilation, upsample=up, function=FUNCTIONS[kind], bounds=clip_bounds(kind, -0.5, 0.5),
    )  # fmt: skip
    depth = weight[0].numel()
    tolerance = 2 * STEPS[out.dtype] * wanted.abs() + 2**-24 * depth**0.5 * 8 * (size.permute(0, 2, 3, 1) + 8)
    assert ((out.double() - wanted).abs() <= tolerance).all()
    return out


@pytest.mark.parametrize("dtype", STEPS, ids=str)
@pytest.mark.parametrize("channels", [(1, 1), (5, 7), (24, 40), (64, 15)], ids=str)
def test_pointwise(channels, dtype):
    assert_convolves(parts_of(2, 5, 7, *channels, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("channels", [3, 40], ids=str)
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [
        ((1, 1), (2, 2), (0, 0, 0, 0), (1, 1)),
        ((3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
        ((3, 3), (2, 2), (1, 1, 1, 1), (1, 1)),
        ((3, 3), (1, 1), (2, 2, 2, 2), (2, 2)),
        ((1, 3), (2, 1), (0, 2, 1, 0), (1, 2)),
        ((7, 7), (2, 2), (3, 3, 3, 3), (1, 1)),
        ((1, 1), (1, 1), (1, 0, 0, 2), (1, 1)),
        ((2, 2), (1, 1), (0, 0, 0, 0), (1, 1)),
    ],
    ids=str,
)
def test_windows(kernel, stride, padding, dilation, channels, dtype):
    parts = parts_of(2, 6, 7, channels, 17, kernel, dtype=dtype)
    assert_convolves(parts, stride=stride, padding=padding, dilation=dilation)


@pytest.mark.parametrize("split", [WHOLE, 3, 16, STREAM], ids=str)
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)], ids=str)
@pytest.mark.parametrize("up", [None, (1, 1), (2, 1)], ids=str)
def test_what_follows_and_shares(kernel, up, split):
    """A residual and an activation come once, after the last share."""
    pad = kernel[0] // 2
    parts = parts_of(2, 6, 5, 40 if pad else 200, 20, kernel, out=(6, 5), up=up, dtype=torch.float16)
    for kind in ("relu", "hardswish") if split == 3 else ("relu",):
        assert_convolves(parts, padding=(pad,) * 4, up=up or (1, 1), kind=kind, split=split, processors=5)


@pytest.mark.parametrize("split", [WHOLE, STREAM], ids=str)
@pytest.mark.parametrize("up", [(2, 2), (3, 1), (1, 10), (6, 10)], ids=str)
def test_parents_of_tiles_that_begin_anywhere(up, split):
    """Tiles of 16 and 32 rows on lines of 10 cells, two images."""
    parts = parts_of(2, 6, 10, 64, 20, out=(6, 10), up=up, dtype=torch.float16)
    for tile in (SMALL, SMALL._replace(m=16)):
        assert_convolves(parts, up=up, tile=tile, split=split, processors=5)


@pytest.mark.parametrize("processors", [1, 3, 7, 1000])
def test_stream_over_any_number_of_processors(processors):
    """Programs that have the end of one tile, all of another and the start of a third; and several for one tile."""
    assert_convolves(parts_of(1, 7, 9, 96, 36), kind="relu", split=STREAM, processors=processors)


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 12), st.integers(1, 20), st.integers(0, 9), st.integers(1, 30))
def test_shares_cover_every_block_once(tiles, blocks, split, processors):
    """As the kernels reckon: every block of every tile in one share, every slot written once and read where written."""
    shares = divide(tiles, blocks, split, processors)
    covered, slots = {}, {}
    for program in range(shares.programs):
        step = program * shares.per
        end = min(step + shares.per, shares.steps)
        assert step < end
        while step < end:
            tile, first = divmod(step, shares.span)
            last = min(first + end - step, shares.span)
            covered.setdefault(tile, []).extend(range(first, min(last, blocks)))
            if last - first < shares.span:
                slot = program if step == program * shares.per else shares.programs + program
                assert slot not in slots
                slots[slot] = tile
            step += last - first
    assert covered == {tile: list(range(blocks)) for tile in range(tiles)}
    read = {}
    for tile in range(tiles):
        start = tile * shares.span
        first, last = start // shares.per, (start + shares.span - 1) // shares.per
        if first != last:
            for p in range(first, last + 1):
                read[p if p * shares.per >= start else shares.programs + p] = tile
    assert read == slots
    assert split == STREAM or all(slot < shares.programs for slot in slots)


@pytest.mark.parametrize("tile", [*TILES, LARGE_TILE, *RAGGED_TILES], ids=str)
def test_every_tile(tile):
    assert_convolves(parts_of(1, 9, 15, 96, 160, dtype=torch.float16), tile=tile)
    assert_convolves(parts_of(1, 3, 4, 64, 40, (3, 3), dtype=torch.float16), padding=(1, 1, 1, 1), tile=tile, split=2)


def test_rows_of_a_fully_connected_layer():
    x, weight, bias, _ = parts_of(1, 1, 13, 200, 30)
    x, weight = x[0, 0].to(DEVICE), weight[:, 0, 0].contiguous().to(DEVICE)
    for split in (WHOLE, 4, STREAM):
        out = torch.empty(13, 30, device=DEVICE)
        launch_convolution(x, weight, bias.to(DEVICE), None, out, tile=FLOAT32_TILE, split=split, processors=3)
        torch.testing.assert_close(out, F.linear(x, weight, bias.to(DEVICE)), rtol=1e-4, atol=1e-5)


def test_a_float32_result_of_halves_is_not_rounded():
    parts = parts_of(1, 4, 5, 64, 15, dtype=torch.float16)
    out = assert_convolves(parts, out_dtype=torch.float32)
    assert (out != out.half().float()).any()


def test_without_bias_onto_its_residual():
    x, weight, _, residual = parts_of(1, 6, 8, 32, 24, out=(6, 8), up=(1, 1))
    expected = assert_convolves((x, weight, None, residual), kind="relu")
    onto = residual.to(DEVICE, copy=True)
    bounds = clip_bounds("relu", 0, 0)
    launch_convolution(x.to(DEVICE), weight.to(DEVICE), None, onto, onto, tile=SMALL, bounds=bounds)
    assert torch.equal(onto, expected)


@pytest.mark.parametrize("kind", ["none", "relu", "clip"])
@pytest.mark.parametrize("split", [WHOLE, 2])
def test_nan_stays(kind, split):
    """A ReLU that makes 0 of NaN would let a broken network pass for one that finds nothing."""
    x, weight, bias, _ = (None if p is None else p.to(DEVICE) for p in parts_of(1, 3, 4, 40, 6))
    x[0, 1, 2, 3] = torch.nan
    out = torch.empty(1, 3, 4, 6, device=DEVICE)
    launch_convolution(x, weight, bias, None, out, tile=SMALL, split=split, bounds=clip_bounds(kind, -1.0, 1.0))
    assert out[0, 1, 2].isnan().all()
    assert out.isnan().sum() == 6


def test_same_bits_every_time():
    x, weight, bias, _ = (None if p is None else p.to(DEVICE) for p in parts_of(1, 7, 9, 300, 40))
    outs = [torch.empty(1, 7, 9, 40, device=DEVICE) for _ in range(3)]
    for out in outs:
        launch_convolution(x, weight, bias, None, out, tile=SMALL, split=STREAM, processors=6)
    assert all(torch.equal(outs[0], out) for out in outs[1:])


def test_nothing_to_do():
    out = torch.empty(0, 3, 4, 6, device=DEVICE)
    assert launch_convolution(torch.empty(0, 3, 4, 5), torch.empty(6, 1, 1, 5), None, None, out, tile=SMALL) is out


def launch_stage(x, weight, bias, residual, split):
    out = torch.empty((*x.shape[:3], len(weight)), dtype=x.dtype, device=x.device)
    pad = weight.shape[1] // 2
    return launch_convolution(
        x, weight, bias, residual, out, tile=TILES[1], split=split, processors=132, padding=(pad, pad),
        bounds=clip_bounds("relu", 0, 0),
    )  # fmt: skip


# Height, width, channels and outputs of R50's blocks at 800 x 1216, and of fpn's and the RPN's windows.
POINTWISE_STAGES = ((200, 304, 64, 256), (100, 152, 512, 128), (50, 76, 256, 1024), (25, 38, 2048, 512))
WINDOW_STAGES = ((200, 304, 64, 64), (100, 152, 128, 128), (25, 38, 512, 512), (50, 76, 256, 256))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tile", [*TILES, LARGE_TILE], ids=str)
def test_real_stages(tile, dtype):
    if count_shared_bytes(tile, 2) > torch.cuda.get_device_properties(0).shared_memory_per_block_optin:
        pytest.skip("needs more shared memory than there is")
    for h, w, c, o in POINTWISE_STAGES:
        for split in (WHOLE, 4, STREAM):
            up = None if tile == LARGE_TILE else (1, 1)
            parts = parts_of(1, h, w, c, o, out=(h, w), up=up, dtype=dtype)
            assert_convolves(parts, kind="relu", tile=tile, split=split, processors=132)
    for h, w, c, o in WINDOW_STAGES:
        for split in (WHOLE, 4, STREAM):
            parts = parts_of(1, h, w, c, o, (3, 3), dtype=dtype)
            assert_convolves(parts, padding=(1,) * 4, kind="relu", tile=tile, split=split, processors=132)


@pytest.mark.gpu
@pytest.mark.parametrize("tile", RAGGED_TILES, ids=str)
def test_the_stem(tile):
    parts = parts_of(1, 800, 1216, 3, 64, (7, 7), dtype=torch.float16)
    assert_convolves(parts, stride=(2, 2), padding=(3,) * 4, kind="relu", tile=tile)


@pytest.mark.gpu
@pytest.mark.parametrize("split", [WHOLE, 4, STREAM])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)], ids=str)
def test_capturable(kernel, split):
    shape = (1, 25, 38, 512, 512, kernel)
    given, others = (parts_of(*shape, out=(25, 38), up=(1, 1), dtype=torch.float16, seed=seed) for seed in (1, 2))
    assert_capturable(launch_stage, (*given, split), (*others, split))
