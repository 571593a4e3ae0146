"""The ops as PyTorch operators: opcheck, torch.compile in one graph, the device decides what runs."""

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import fpn_kernels
from fpn_kernels.registration import Op
from tests.kernels.boxes import clustered_boxes, seeded
from tests.kernels.test_candidates import make_head
from tests.kernels.test_decode import BASE_ANCHORS, make_outputs
from tests.kernels.test_preprocess import MEAN, STD, make_image

SHAPES = [(8, 12), (4, 6), (2, 3), (1, 2), (1, 1)]


def propose(objectness: list[Tensor], deltas: list[Tensor], sizes: Tensor) -> tuple[Tensor, ...]:
    """From the RPN's outputs to proposals, as the pipeline has it."""
    logits, indices, levels = fpn_kernels.select_topk(objectness, 20)
    boxes, scores = fpn_kernels.decode_proposals(logits, indices, deltas, BASE_ANCHORS, (64, 96), sizes, k=20)
    return boxes, *fpn_kernels.padded_nms(boxes, scores, levels.expand(len(logits), -1), 0.7, 30)


def select(logits: Tensor, deltas: Tensor, proposals: Tensor, counts: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
    return fpn_kernels.select_candidates(logits, deltas, proposals, counts, sizes)


def preprocess(pixels: Tensor, offsets: Tensor, sizes: Tensor, image_sizes: Tensor) -> Tensor:
    return fpn_kernels.preprocess(pixels, offsets, sizes, image_sizes, (64, 96), MEAN, STD, dtype=torch.float16)


def make_functions() -> list[Any]:
    """Every public function that goes through an op, with arguments."""
    objectness, deltas = make_outputs(2, SHAPES)
    sizes = torch.tensor([[60, 90], [64, 96]])
    packed = fpn_kernels.pack_images([make_image(20, 30), make_image(9, 8)])
    boxes, scores = torch.stack([clustered_boxes(40, 5)] * 2), torch.rand(2, 40, generator=seeded())
    groups = torch.randint(3, (2, 40), generator=seeded())
    return [
        pytest.param(propose, (objectness, deltas, sizes), id="propose"),
        pytest.param(select, (*make_head(2, 10, 4), torch.tensor([10, 3]), sizes), id="select_candidates"),
        pytest.param(preprocess, (*packed, sizes), id="preprocess"),
        pytest.param(fpn_kernels.padded_nms, (boxes, scores, groups, 0.5, 20), id="padded_nms"),
    ]


@pytest.mark.parametrize(("function", "arguments"), make_functions())
def test_ops_pass_opcheck(function, arguments):
    calls = []
    run = Op.__call__

    def record(op: Op, device: torch.device, *given: Any) -> Any:
        calls.append((op._op, given))
        return run(op, device, *given)

    with mock.patch.object(Op, "__call__", record):
        function(*arguments)
    assert calls
    for op, given in calls:
        torch.library.opcheck(op, given)


@pytest.mark.parametrize(("function", "arguments"), make_functions())
def test_compiles_into_one_graph(function, arguments):
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=False, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), function(*arguments), rtol=0, atol=0)


def test_cpu_tensors_keep_their_gradients():
    """Outside of torch.compile the reference runs as it is, not behind the boundary of an operator."""
    objectness = [torch.randn(1, 3, 4, 4, generator=seeded()).requires_grad_()]
    fpn_kernels.select_topk(objectness, 5)[0].sum().backward()
    assert objectness[0].grad.count_nonzero() == 5
