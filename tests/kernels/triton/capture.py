"""What every launcher promises on a GPU: no word to the host, one graph for all values, the same bits each time."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

REPEATS = 1000


def assert_capturable(launch: Callable[..., Any], arguments: tuple[Any, ...], others: tuple[Any, ...]) -> None:
    """``launch`` never waits for the host, and a graph of it gives its results for other values too, always the same.

    Args: arguments, others: of the launcher, alike but for the tensors' values.
    """
    arguments, others = tree_map_only(torch.Tensor, lambda t: t.cuda(), (arguments, others))
    expected = [tree_leaves(launch(*given)) for given in (arguments, others)]  # compiles too
    captured = tree_map_only(torch.Tensor, torch.clone, arguments)
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the mode warns that it is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        launch(*captured)
    finally:
        torch.cuda.set_sync_debug_mode("default")

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = tree_leaves(launch(*captured))
    for given, wanted in zip((others, arguments), reversed(expected), strict=True):
        for static, value in zip(tree_leaves(captured), tree_leaves(given), strict=True):
            if isinstance(static, torch.Tensor):
                static.copy_(value)
        graph.replay()
        _assert_identical(results, wanted)
    for _ in range(REPEATS):
        graph.replay()
        _assert_identical(results, expected[0])


def _assert_identical(results: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for result, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(result, wanted, rtol=0, atol=0, equal_nan=True)
