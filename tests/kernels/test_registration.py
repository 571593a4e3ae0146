"""The ops as PyTorch operators: opcheck, torch.compile in one graph, the device decides what runs."""

import importlib
import pkgutil
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map_only

import fpn_kernels
from fpn_kernels.registration import Op
from tests.kernels.boxes import seeded
from tests.kernels.operators import FUNCTIONS, make_arguments
from tests.kernels.triton.device import DEVICE

MODULES = [importlib.import_module(f"fpn_kernels.{m.name}") for m in pkgutil.iter_modules(fpn_kernels.__path__)]
OPS = {value for module in MODULES for value in vars(module).values() if isinstance(value, Op)}
NEURAL = {"topdown_merge", "lateral_merge", "multilevel_roi_align", "adaptive_roi_align", "roi_align"}
NEURAL |= {"gather_windows", "window_linear"}
NEURAL |= {"multilevel_roi_pool", "roi_pool"}  # differentiable, in all floating-point arguments but the RoIs


def on_device(arguments: Any) -> Any:
    return tree_map_only(torch.Tensor, lambda t: t.to(DEVICE), arguments)


def record(name: str) -> list[tuple[Op, tuple[Any, ...]]]:
    """The operators that a function goes through, with their arguments; those of its gradient too."""
    calls: list[tuple[Op, tuple[Any, ...]]] = []

    def call(op: Op, device: torch.device, *given: Any) -> Any:
        calls.append((op, given))
        return op._op(*given)

    def dispatch(op: Op, *given: Any) -> Any:
        return call(op, DEVICE, *tree_map_only(torch.Tensor, torch.Tensor.detach, given))  # a gradient's has none

    arguments = on_device(make_arguments()[name])
    if name in NEURAL:
        arguments = [a.requires_grad_() if a.is_floating_point() and a.shape[-1] != 5 else a for a in arguments]
    with mock.patch.multiple(Op, __call__=call, dispatch=dispatch):
        for result in tree_leaves(FUNCTIONS[name](*arguments)):
            if result.requires_grad:
                result.sum().backward()
    return calls


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # opcheck's own
@pytest.mark.parametrize("name", FUNCTIONS)
def test_opcheck(name):
    calls = record(name)
    assert calls
    for op, given in calls:
        torch.library.opcheck(op._op, given)


def test_every_operator_is_checked():
    assert {op for name in FUNCTIONS for op, _ in record(name)} == OPS


@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiles_into_one_graph(name):
    torch._dynamo.reset()
    function, arguments = FUNCTIONS[name], on_device(make_arguments()[name])
    compiled = torch.compile(function, fullgraph=True, dynamic=False, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), function(*arguments), rtol=0, atol=0)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_one_graph_serves_all_sizes(name):
    torch._dynamo.reset()
    function = FUNCTIONS[name]
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for number, sizes in enumerate([(26, 38, 2), (24, 34, 3)]):
        arguments = on_device(make_arguments(*sizes)[name])
        # Sizes that happen to be equal need not be so the next time.
        unequal = torch.fx.experimental._config.patch(use_duck_shape=False)
        with torch._dynamo.config.patch(error_on_recompile=number > 0), unequal:
            torch.testing.assert_close(compiled(*arguments), function(*arguments), rtol=0, atol=0)


def test_cpu_tensors_keep_their_gradients():
    """Outside of torch.compile the reference runs as it is, not behind the boundary of an operator."""
    objectness = [torch.randn(1, 3, 4, 4, generator=seeded()).requires_grad_()]
    fpn_kernels.select_topk(objectness, 5)[0].sum().backward()
    assert objectness[0].grad.count_nonzero() == 5


@pytest.mark.parametrize("name", ["topdown_merge", "adaptive_roi_align"])
def test_kernels_are_launched_on_the_device_of_their_tensors(name):
    """Of the only or first tensor, and of the first tensor of a list."""
    [(op, given)] = record(name)[:1]
    with mock.patch("torch.cuda.device") as current:
        op.launch(*given)
    current.assert_called_once_with(tree_leaves(given)[0].device)
    current.return_value.__enter__.assert_called_once_with()
    current.return_value.__exit__.assert_called_once()


@pytest.mark.gpu
@pytest.mark.parametrize("name", FUNCTIONS)
def test_another_device_than_the_current(name):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    function, arguments = FUNCTIONS[name], on_device(make_arguments()[name])
    other = tree_map_only(torch.Tensor, lambda t: t.to("cuda:1"), arguments)
    for result, expected in zip(tree_leaves(function(*other)), tree_leaves(function(*arguments)), strict=True):
        assert result.device.index == 1
        assert torch.equal(result.cpu(), expected.cpu())
