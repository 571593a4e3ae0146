"""Score maps of sliding MLPs joined to operations of their own: the same numbers, and nothing joined that differs."""

from __future__ import annotations

import pytest
import torch

from fpn_engine.backends.native.executor import CpuExecutor
from fpn_engine.backends.native.ops import Conv, WindowScore
from fpn_export.batch_norm import fold_batch_norm
from fpn_export.masks.onnx_export import export_mask_trunk
from fpn_export.masks.variants import make_variant
from fpn_export.native import fuse, lower
from fpn_export.native.network import Network
from fpn_export.native.precision import in_float32
from fpn_export.native.window_scores import join_window_scores
from tests.export.masks.tiny import random_images, tiny_model, tiny_spec

SCORES = [f"scores_p{level}" for level in range(2, 7)]


def make_network(variant: str) -> tuple[Network, list[torch.Tensor]]:
    """A fused trunk, and the score maps that torch makes of two images, heads apart: (N, M) each."""
    spec = make_variant(tiny_spec(), variant)
    model = fold_batch_norm(tiny_model(heads=spec.heads, mask_size=spec.mask_size))
    with torch.no_grad():
        scores = model.trunk(random_images()).scores
    expected = [torch.cat([level[:, head].flatten(1) for level in scores], dim=1) for head in range(len(spec.heads))]
    return fuse(lower(export_mask_trunk(model))), expected


@pytest.mark.parametrize("variant", ["5x5", "dual"])
def test_joined_scores_are_the_networks(variant: str) -> None:
    network, expected = make_network(variant)
    before = len(network.ops)
    assert join_window_scores(network, SCORES)
    joined = [op for op in network.ops if isinstance(op, WindowScore)]
    assert len(joined) == len(expected)
    assert len(network.ops) < before
    found = CpuExecutor(*in_float32(network))(random_images().permute(0, 2, 3, 1))
    assert len(found) == 5 + len(expected)
    for ours, right in zip(found[5:], expected, strict=True):
        torch.testing.assert_close(ours[:, :, 0, 0], right, rtol=0, atol=1e-4)


def test_levels_of_their_own_weights_stay_apart() -> None:
    network, _ = make_network("dual")
    index, conv = next((i, op) for i, op in enumerate(network.ops) if isinstance(op, Conv) and _side(network, op) == 5)
    network.ops[index] = Conv(
        inputs=conv.inputs,
        output=conv.output,
        weight=network.add_weight("other", 2 * network.weights[conv.weight]),
        bias=conv.bias,
        padding=conv.padding,
        activation=conv.activation,
    )
    before = list(network.ops)
    assert not join_window_scores(network, SCORES)
    assert network.ops == before


def test_hidden_channels_that_are_read_elsewhere_stay() -> None:
    network, _ = make_network("5x5")
    network.outputs.append(next(op.output for op in network.ops if isinstance(op, Conv) and _side(network, op) == 5))
    assert not join_window_scores(network, SCORES)


def _side(network: Network, op: Conv) -> int:
    return int(network.weights[op.weight].shape[1])
