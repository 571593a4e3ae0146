"""The merges' kernels against conv2d, interpolate and add; their gradients."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fpn_kernels import lateral_merge, topdown_merge
from fpn_kernels.topdown import memory_format_of
from fpn_kernels.triton.topdown import TILES, launch_lateral_merge, launch_topdown_merge, tile_for
from tests.kernels.boxes import seeded
from tests.kernels.triton.capture import assert_capturable
from tests.kernels.triton.device import DEVICE

pytestmark = pytest.mark.usefixtures("poisoned_memory")
# Half the spacing of the type's numbers; the interpreter's bfloat16 stores truncate.
STEPS = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-9 if DEVICE.type == "cuda" else 2**-8}
FLOATS = tuple(STEPS)
STAGES = ((256, 200, 304), (512, 100, 152), (1024, 50, 76), (2048, 25, 38))  # channels, height, width of c2..c5


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=seeded(seed + sum(shape))).to(dtype)


def merge_parts(n, c, h, w, dtype=torch.float32):
    return randn(n, c, h, w, dtype=dtype), randn(n, c, (h + 1) // 2, (w + 1) // 2, dtype=dtype)


def lateral_parts(n, c_in, c_out, h, w, coarse=None, dtype=torch.float32, seed=0):
    """c, weight, bias, coarser, with a result of about unit variance."""
    coarse_h, coarse_w = coarse or ((h + 1) // 2, (w + 1) // 2)
    return (
        randn(n, c_in, h, w, dtype=dtype, seed=seed),
        (randn(c_out, c_in, seed=seed) / max(c_in, 1) ** 0.5).to(dtype),
        randn(c_out, dtype=dtype, seed=seed),
        randn(n, c_out, coarse_h, coarse_w, dtype=dtype, seed=seed),
    )


def launch(launcher, *parts):
    merged = launcher(*(None if part is None else part.to(DEVICE) for part in parts))
    assert merged.dtype == parts[0].dtype
    return merged


def assert_merges(lateral, coarse):
    lateral, coarse = lateral.to(DEVICE), coarse.to(DEVICE)
    merged = launch(launch_topdown_merge, lateral, coarse)
    expected = lateral.double() + F.interpolate(coarse.double(), size=lateral.shape[2:], mode="nearest")
    assert merged.is_contiguous(memory_format=memory_format_of(lateral))
    torch.testing.assert_close(merged.double(), expected, rtol=2 * STEPS[lateral.dtype], atol=1e-12, check_stride=False)


def assert_merges_laterally(*parts):
    c, weight, bias, coarser = (None if part is None else part.to(DEVICE) for part in parts)
    merged = launch(launch_lateral_merge, c, weight, bias, coarser)
    assert merged.is_contiguous(memory_format=torch.channels_last)
    # The kernel rounds once, at the end, and before that as float32 sums do.
    expected = F.conv2d(c.double(), weight.double()[:, :, None, None], None if bias is None else bias.double())
    size = F.conv2d(c.double().abs(), weight.double().abs()[:, :, None, None])
    if coarser is not None:
        expected += F.interpolate(coarser.double(), size=c.shape[2:], mode="nearest")
    tolerance = 2 * STEPS[c.dtype] * expected.abs() + 2**-24 * weight.shape[1] ** 0.5 * 4 * (size + 4)
    assert ((merged.double() - expected).abs() <= tolerance).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (2, 3, 5, 7), (1, 24, 7, 1), (2, 100, 3, 4), (1, 256, 13, 19), (1, 300, 2, 3)], ids=str
)
def test_merge_equals_interpolate_and_add(shape, memory_format, dtype):
    lateral, coarse = merge_parts(*shape, dtype=dtype)
    assert_merges(lateral.to(memory_format=memory_format), coarse)
    assert_merges(lateral.to(memory_format=memory_format), coarse.to(memory_format=torch.channels_last))


@settings(deadline=None, max_examples=12)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 9), st.integers(1, 9)),
    dtype=st.sampled_from(FLOATS),
    is_last=st.booleans(),
)
def test_merge_of_any_shape(shape, dtype, is_last):
    lateral, coarse = merge_parts(*shape, dtype=dtype)
    assert_merges(lateral.to(memory_format=torch.channels_last if is_last else torch.contiguous_format), coarse)


def test_merge_of_strided_levels():
    lateral, coarse = merge_parts(2, 6, 8, 10)
    assert_merges(lateral[:, :, 1:-2, ::2], coarse[:, :, 1:, 1:-1])
    assert_merges(lateral.transpose(2, 3), coarse.transpose(2, 3))


@pytest.mark.parametrize("shape", [(0, 4, 4, 4), (2, 0, 3, 3)], ids=str)
def test_nothing_to_merge(shape):
    assert launch(launch_topdown_merge, *merge_parts(*shape)).shape == shape
    assert launch(launch_lateral_merge, *lateral_parts(shape[0], 8, shape[1], *shape[2:])).shape == shape


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("channels", [(1, 1), (5, 7), (24, 100), (100, 24), (256, 256), (512, 300)], ids=str)
def test_lateral_equals_conv_interpolate_and_add(channels, dtype):
    assert_merges_laterally(*lateral_parts(2, *channels, 5, 7, dtype=dtype))


@pytest.mark.parametrize("dtype", FLOATS[:2], ids=str)
@pytest.mark.parametrize("rows", [(1, 1), (13, 19)], ids=str)
def test_lateral_without_bias_or_coarser_level(rows, dtype):
    c, weight, bias, coarser = lateral_parts(1, 64, 48, *rows, dtype=dtype)
    assert_merges_laterally(c, weight, None, coarser)
    assert_merges_laterally(c, weight, bias, None)
    assert_merges_laterally(c, weight, None, None)


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_every_tile(tile, monkeypatch):
    monkeypatch.setattr("fpn_kernels.triton.topdown.TILES", (tile,))
    assert_merges_laterally(*lateral_parts(2, 256, 256, 9, 11, dtype=torch.float16))


@settings(deadline=None, max_examples=25)
@given(sides=st.tuples(*[st.integers(1, 40)] * 2), coarse=st.tuples(*[st.integers(1, 40)] * 2))
def test_nearest_to_any_size_is_that_of_interpolate(sides, coarse):
    coarser = torch.arange(float(coarse[0] * coarse[1])).view(1, 1, *coarse)
    nothing = torch.zeros(1, 1, *sides), torch.zeros(1, 1), None
    expected = F.interpolate(coarser, size=sides, mode="nearest")
    assert torch.equal(launch(launch_lateral_merge, *nothing, coarser).cpu(), expected)


def test_lateral_of_strided_parts():
    c, weight, bias, coarser = lateral_parts(2, 12, 10, 6, 8)
    expected = launch(launch_lateral_merge, c, weight, bias, coarser)
    strided = torch.cat([bias, bias])[:, None].expand(-1, 3)[10:, 1]
    same = c.to(memory_format=torch.channels_last), weight.T.contiguous().T, strided, coarser.mT.contiguous().mT
    assert torch.equal(launch(launch_lateral_merge, *same), expected)


def test_large_tiles_for_large_levels():
    chosen = [tile_for(h * w, c, 256, torch.float16, 132) for c, h, w in STAGES]
    assert [(tile.m, tile.n) for tile in chosen] == [(128, 128), (128, 128), (64, 128), (64, 32)]
    assert all(tile_for(8 * h * w, c, 256, torch.float16, 132) == TILES[0] for c, h, w in STAGES)
    small = tile_for(100, 24, 5, torch.float16, 132)
    assert (small.n, small.k) == (16, 32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_gradients(dtype):
    """The operators' own gradients, in float64 where it is the CPU's; against those of the parts everywhere."""
    merge = [part.to(DEVICE, dtype).requires_grad_() for part in merge_parts(2, 3, 5, 7)]
    lateral = [part.to(DEVICE, dtype).requires_grad_() for part in lateral_parts(2, 3, 4, 5, 7, (2, 6))]
    ops = torch.ops.fpn.topdown_merge, torch.ops.fpn.lateral_merge
    if dtype == torch.float64:
        if DEVICE.type == "cuda":
            pytest.skip("the kernels compute in float32")
        assert all(torch.autograd.gradcheck(op, parts) for op, parts in zip(ops, (merge, lateral), strict=True))
    upsampled = [F.interpolate(parts[-1], size=(5, 7), mode="nearest") for parts in (merge, lateral)]
    c, weight, bias, _ = lateral
    # Not conv2d, which on a GPU may round float32 to 10 bits.
    convolved = torch.einsum("nihw,oi->nohw", c, weight) + bias[:, None, None]
    expected = merge[0] + upsampled[0], convolved + upsampled[1]
    for op, parts, wanted in zip(ops, (merge, lateral), expected, strict=True):
        gradient = randn(*wanted.shape).to(wanted)
        for found, right in zip(*(torch.autograd.grad(x, parts, gradient) for x in (op(*parts), wanted)), strict=True):
            torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4, check_stride=False)


def test_compile_whole_with_their_gradients():
    parts = [part.to(DEVICE).requires_grad_() for part in lateral_parts(2, 3, 4, 5, 7)]

    def merge(c, weight, bias, coarser):
        return topdown_merge(lateral_merge(c, weight, bias, coarser), coarser)

    expected, compiled = merge(*parts), torch.compile(merge, fullgraph=True, backend="aot_eager")(*parts)
    torch.testing.assert_close(compiled, expected)
    for part in zip(*(torch.autograd.grad(m.square().sum(), parts) for m in (compiled, expected)), strict=True):
        torch.testing.assert_close(*part, check_stride=False)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("n", [1, 8])
@pytest.mark.parametrize("stage", STAGES, ids=str)
def test_real_stages(stage, n, dtype):
    c_in, h, w = stage
    parts = lateral_parts(n, c_in, 256, h, w, dtype=dtype)
    parts = [part.to(memory_format=torch.channels_last) if part.ndim == 4 else part for part in parts]
    assert_merges_laterally(*parts)
    assert_merges(*(part.to(memory_format=torch.channels_last) for part in merge_parts(n, 256, h, w, dtype)))


@pytest.mark.gpu
def test_capturable():
    c_in, *sides = STAGES[2]
    laterals = [lateral_parts(2, c_in, 256, *sides, dtype=torch.float16, seed=seed) for seed in (1, 2)]
    assert_capturable(launch_lateral_merge, *laterals)
    merges = [(randn(2, 256, *sides, seed=seed), randn(2, 256, 25, 38, seed=seed)) for seed in (1, 2)]
    assert_capturable(launch_topdown_merge, *merges)
