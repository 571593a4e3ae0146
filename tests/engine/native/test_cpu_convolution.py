"""Weights laid out for the size of the input: the same numbers at every size, laid out once, and not for ever."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fpn_engine.backends.native.cpu_convolution import SIZES_KEPT, has_fused_convolution, make_convolution
from fpn_engine.backends.native.ops import Activation, Conv

SIZES = [(1, 8, 10), (2, 8, 10), (1, 15, 20), (1, 25, 38), (1, 50, 76), (3, 7, 9)]


@pytest.mark.skipif(not has_fused_convolution(), reason="this torch has no oneDNN")
@pytest.mark.parametrize(("window", "layouts"), [(1, len(SIZES)), (3, 1)])
def test_every_size(window: int, layouts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    reorder = torch.ops.mkldnn._reorder_convolution_weight
    monkeypatch.setattr(
        torch.ops.mkldnn, "_reorder_convolution_weight", lambda *given: made.append(given[-1]) or reorder(*given)
    )
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(64, window, window, 128, generator=generator), torch.randn(64, generator=generator)
    op = Conv(
        inputs=("x",), output="y", weight="w", bias="b", padding=(window // 2,) * 4, activation=Activation(kind="relu")
    )
    run = make_convolution(op, {"w": weight, "b": bias}, fused=True)
    for size in SIZES:
        x = torch.randn(*size, 128, generator=generator)
        expected = F.conv2d(x.permute(0, 3, 1, 2), weight.permute(0, 3, 1, 2), bias, padding=window // 2).relu()
        for _ in range(2):  # the second time laid out already
            torch.testing.assert_close(run([x], None), expected.permute(0, 2, 3, 1), rtol=1e-4, atol=1e-4)
    assert len(made) == layouts
    run([torch.zeros(*SIZES[-1], 128)], None)
    assert len(made) == layouts
    run([torch.zeros(*SIZES[0], 128)], None)
    assert len(SIZES) > SIZES_KEPT
    assert len(made) == layouts + (window == 1), "it was given up"
