"""The table of bytes and products in the documents is that of the benchmark's cases."""

from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_leaves

from benchmarks.bench_kernels import write_floor
from benchmarks.kernel_cases import all_cases

DOCUMENT = Path(__file__).parents[2] / "docs" / "kernels.md"
CASES = {case.name: case for case in all_cases(torch.device("cpu"), [1], torch.float16)}


def test_documents_have_the_table_that_the_code_writes():
    table = DOCUMENT.read_text().partition("<!-- floor -->\n")[2].partition("\n<!-- end of floor -->")[0]
    assert table == write_floor()


@pytest.mark.parametrize("name", ["merge P2", "select"])
def test_bytes_are_those_of_arguments_and_results(name):
    """Where everything is read and written once; the levels that ``select`` gives do not grow with the batch."""
    case = CASES[name]
    arguments = case.make_inputs(0)
    results = tree_leaves(case.contestants["fpn_kernels"](*arguments))
    tensors = [*tree_leaves(arguments), *results[:2]]
    assert case.moved == sum(t.numel() * t.element_size() for t in tensors)
