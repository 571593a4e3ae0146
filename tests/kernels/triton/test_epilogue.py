"""Bias, residual and activation in one pass against torch's own."""

import pytest
import torch
import torch.nn.functional as F

from fpn_kernels.triton.epilogue import FUNCTIONS, clip_bounds, launch_finish
from tests.kernels.triton.capture import assert_capturable
from tests.kernels.triton.device import DEVICE
from tests.kernels.triton.test_convolution import STEPS, apply, randn

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def finish(x, bias, residual, up=(1, 1), kind="none", out=None):
    out = torch.empty_like(x) if out is None else out
    return launch_finish(x, bias, residual, out, up, FUNCTIONS[kind], clip_bounds(kind, -0.5, 0.5))


@pytest.mark.parametrize("dtype", STEPS, ids=str)
@pytest.mark.parametrize("kind", FUNCTIONS)
@pytest.mark.parametrize(("shape", "up"), [((2, 3, 5, 7), None), ((1, 4, 6, 300), (1, 1)), ((2, 4, 6, 24), (2, 3))])
def test_equals_torch(shape, up, kind, dtype):
    n, h, w, c = shape
    x, bias = randn(*shape, dtype=dtype).to(DEVICE), randn(c, dtype=dtype).to(DEVICE)
    wanted = x.double() + bias.double()
    residual = None
    if up:
        residual = randn(n, h // up[0], w // up[1], c, dtype=dtype).to(DEVICE)
        wanted = wanted + residual.double().repeat_interleave(up[0], 1).repeat_interleave(up[1], 2)
    wanted = apply(wanted, kind, -0.5, 0.5)
    out = finish(x, bias, residual, up or (1, 1), kind)
    torch.testing.assert_close(out.double(), wanted, rtol=2 * STEPS[dtype], atol=1e-6)


def test_in_place_and_onto_the_residual():
    x, bias, residual = (randn(*shape).to(DEVICE) for shape in ((2, 3, 4, 20), (20,), (2, 3, 4, 20)))
    wanted = (x + bias + residual).relu()
    torch.testing.assert_close(finish(x.clone(), bias, residual, kind="relu", out=(own := x.clone())), wanted)
    torch.testing.assert_close(finish(own.copy_(x), bias, residual, kind="relu", out=own), wanted)
    torch.testing.assert_close(finish(x, bias, residual, kind="relu", out=residual), wanted)


def test_one_cell_per_image_and_rows():
    x, one = randn(2, 3, 4, 20).to(DEVICE), randn(2, 1, 1, 20, seed=1).to(DEVICE)
    torch.testing.assert_close(finish(x, None, one, up=(3, 4)), x + one)
    rows, bias = randn(5, 33).to(DEVICE), randn(33).to(DEVICE)
    torch.testing.assert_close(finish(rows, bias, None, kind="hardswish"), F.hardswish(rows + bias))


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_nan_stays(kind):
    x = randn(1, 2, 3, 4).to(DEVICE)
    x[0, 1, 1, 2] = torch.nan
    out = finish(x, None, None, kind=kind)
    assert out[0, 1, 1, 2].isnan()
    assert out.isnan().sum() == 1


def test_another_number_type():
    x = randn(1, 2, 3, 8, dtype=torch.float16).to(DEVICE)
    out = finish(x, bias := randn(8, dtype=torch.float16).to(DEVICE), None, out=torch.empty(x.shape, device=DEVICE))
    assert torch.equal(out, x.float() + bias.float())


@pytest.mark.gpu
def test_capturable():
    shapes = ((1, 50, 76, 256), (256,), (1, 25, 38, 256))
    given, others = ([randn(*s, dtype=torch.float16, seed=seed) for s in shapes] for seed in (1, 2))
    assert_capturable(finish, (*given, (2, 2), "relu"), (*others, (2, 2), "relu"))
