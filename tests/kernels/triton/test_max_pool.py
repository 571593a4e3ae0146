"""Maxima of windows against torch's."""

import pytest
import torch
import torch.nn.functional as F

from fpn_kernels.triton.max_pool import launch_max_pool
from tests.kernels.triton.capture import assert_capturable
from tests.kernels.triton.device import DEVICE
from tests.kernels.triton.test_convolution import randn

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def pool(x, kernel, stride, padding, dilation=(1, 1)):
    top, left, bottom, right = padding
    padded = F.pad(x.permute(0, 3, 1, 2), (left, right, top, bottom), value=-torch.inf)
    wanted = F.max_pool2d(padded.float(), kernel, stride, 0, dilation).to(x.dtype).permute(0, 2, 3, 1)
    out = torch.empty(wanted.shape, dtype=x.dtype, device=x.device)
    return launch_max_pool(x, out, kernel, stride, (top, left), dilation), wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [
        ((3, 3), (2, 2), (1, 1, 1, 1), (1, 1)),
        ((1, 1), (2, 2), (0, 0, 0, 0), (1, 1)),
        ((2, 3), (1, 2), (0, 2, 1, 0), (2, 1)),
        ((2, 2), (2, 2), (0, 0, 0, 0), (1, 1)),
    ],
    ids=str,
)
def test_equals_torch(kernel, stride, padding, dilation, dtype):
    for shape in ((2, 7, 9, 5), (1, 6, 8, 300)):
        out, wanted = pool((randn(*shape) - 9).to(DEVICE, dtype), kernel, stride, padding, dilation)
        assert torch.equal(out, wanted)


def test_nan_wins():
    x = randn(1, 8, 8, 3).to(DEVICE)
    x[0, 4, 4, 1] = torch.nan
    out, wanted = pool(x, (3, 3), (2, 2), (1, 1, 1, 1))
    assert torch.equal(out.isnan(), wanted.isnan())
    assert out.isnan().any()


def test_nothing_to_pool():
    out = torch.empty(0, 2, 2, 3, device=DEVICE)
    assert launch_max_pool(torch.empty(0, 4, 4, 3, device=DEVICE), out, (2, 2), (2, 2), (0, 0)) is out


@pytest.mark.gpu
def test_capturable():
    def stem(x):
        return launch_max_pool(x, x.new_empty(1, 100, 152, 64), (3, 3), (2, 2), (1, 1))

    assert_capturable(stem, *((randn(1, 200, 304, 64, dtype=torch.float16, seed=seed),) for seed in (1, 2)))
