"""Scores of sliding MLPs as operations of their own, which then need not store their hidden channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from fpn_engine.backends.native.ops import NONE, RELU, UNIT, Concat, Conv, Op, WindowScore
from fpn_export.native.network import Network


class _Chain(NamedTuple):
    """A large convolution with ReLU and the 1x1 convolution to one score behind it."""

    hidden: Conv
    score: Conv


def join_window_scores(network: Network, scores: Sequence[str]) -> bool:
    """Replace the score maps of all levels by one :class:`WindowScore` for each head.

    The outputs ``scores``, (N, H, W, A) for each level, become A outputs (N, M, 1, 1), named
    ``window_scores_0`` and so on.

    Args: scores: names among the outputs, finest level first.
    Returns: whether the network had that form; else it is left as it is.
    """
    chains = [_find_chains(network, name) for name in scores]
    if not chains or any(one is None or len(one) != len(chains[0] or ()) for one in chains):
        return False
    by_head = list(zip(*(one for one in chains if one is not None), strict=True))
    if any(not _share_tensors(of_levels) for of_levels in by_head):
        return False
    joined = [_join(network, of_levels, f"window_scores_{number}") for number, of_levels in enumerate(by_head)]
    gone = {op for one in chains if one for chain in one for op in chain}
    kept = [op for op in network.ops if op not in gone and op.output not in scores]
    network.outputs = [name for name in network.outputs if name not in scores] + [op.output for op in joined]
    network.replace([*kept, *joined])
    return True


def _find_chains(network: Network, output: str) -> list[_Chain] | None:
    """What makes a score map, head by head."""
    readers, makers = network.count_readers(), network.makers()
    last = network.ops[makers[output]]
    parts = [network.ops[makers[name]] for name in last.inputs] if isinstance(last, Concat) else [last]
    chains = []
    for score in parts:
        if not isinstance(score, Conv) or score.inputs[0] not in makers:
            return None
        hidden = network.ops[makers[score.inputs[0]]]
        if not isinstance(hidden, Conv) or readers[hidden.output] != 1 or readers[score.output] != 1:
            return None
        if not _slides(network, hidden) or network.weights[score.weight].shape[:3] != (1, 1, 1):
            return None
        if score.activation != NONE or len(score.inputs) != 1 or score.stride != UNIT or any(score.padding):
            return None
        chains.append(_Chain(hidden, score))
    return chains


def _slides(network: Network, op: Conv) -> bool:
    """A convolution of an odd square window with ReLU that keeps the map's size."""
    _, h, w, _ = network.weights[op.weight].shape
    plain = op.stride == op.dilation == UNIT and op.groups == 1 and len(op.inputs) == 1 and op.activation == RELU
    return plain and h == w and h % 2 == 1 and op.padding == (h // 2,) * 4


def _share_tensors(of_levels: Sequence[_Chain]) -> bool:
    return len({tuple((op.weight, op.bias) for op in chain) for chain in of_levels}) == 1


def _join(network: Network, of_levels: Sequence[_Chain], output: str) -> Op:
    hidden, score = of_levels[0]
    return WindowScore(
        inputs=tuple(chain.hidden.inputs[0] for chain in of_levels),
        output=output,
        weight=hidden.weight,
        bias=hidden.bias,
        scale=network.add_weight(f"{score.weight}:row", network.weights[score.weight].reshape(-1)),
        shift=score.bias,
    )
