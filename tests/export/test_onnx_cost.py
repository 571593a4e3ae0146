"""What a detector costs, against PyTorch's own counter and against a sum done by hand."""

from __future__ import annotations

import pytest
import torch
from onnx import ModelProto
from torch.utils.flop_counter import FlopCounterMode

from fpn_export.onnx_cost import HEAD, LATERAL, OUTPUT, RPN, RPN_OUTPUT, STEM, Cost, count_detector, count_nodes
from fpn_export.onnx_cut import cut_trunk
from tests.export.conftest import SPEC
from tests.parity.subject import Subject, random_subject

SIZE = (96, 160)
WIDTHS = (64, 128, 256, 512)
STAGES = [STEM, "c2", "c3", "c4", "c5", LATERAL, OUTPUT, RPN, RPN_OUTPUT, HEAD]


@pytest.fixture(scope="module")
def subject() -> Subject:
    return random_subject("resnet18")


@pytest.mark.parametrize("batch", [1, 2])
def test_products_are_those_that_pytorch_counts(subject: Subject, batch: int) -> None:
    stages = count_detector(subject.onnx_model, subject.spec, SIZE, batch=batch)
    assert list(stages) == STAGES
    macs = {name: sum(cost.macs for cost in costs) for name, costs in stages.items()}
    rows = batch * subject.spec.rpn_post_nms_top_n_test
    pipeline = subject.model.pipeline
    assert pipeline.head is not None
    with FlopCounterMode(display=False) as trunk, torch.inference_mode():
        out = pipeline.trunk(torch.zeros(batch, 3, *SIZE))
    with FlopCounterMode(display=False) as head, torch.inference_mode():
        pipeline.head(torch.zeros(rows, out.features[0].shape[1], 7, 7))
    assert 2 * (sum(macs.values()) - macs[HEAD]) == trunk.get_total_flops()
    assert 2 * macs[HEAD] == head.get_total_flops()


def test_a_stage_holds_its_own_products(subject: Subject) -> None:
    """The 1x1 and 3x3 convolutions of the pyramid and the RPN, from their shapes."""
    stages = count_detector(subject.onnx_model, subject.spec, SIZE)
    d = subject.spec.fpn_channels
    cells = [SIZE[0] * SIZE[1] // 4**level for level in range(2, 6)]
    top = 2 * 3  # p6: half of 3 x 5, rounded up
    assert sum(c.macs for c in stages[LATERAL]) == sum(
        n * d * c for n, c in zip(cells, (64, 128, 256, 512), strict=True)
    )
    assert sum(c.macs for c in stages[OUTPUT]) == sum(cells) * d * d * 9
    assert sum(c.macs for c in stages[RPN]) == (sum(cells) + top) * d * d * 9
    assert sum(c.macs for c in stages[RPN_OUTPUT]) == (sum(cells) + top) * d * 15


def test_bytes_of_a_lateral_connection(subject: Subject) -> None:
    """Each convolution's input and output, and the coarser level before it is upsampled."""
    stages = count_detector(subject.onnx_model, subject.spec, SIZE, itemsize=4)
    d = subject.spec.fpn_channels
    cells = [SIZE[0] * SIZE[1] // 4**level for level in range(2, 6)]
    maps = sum(n * (c + d) for n, c in zip(cells, WIDTHS, strict=True))
    assert sum(c.activation_bytes for c in stages[LATERAL]) == 4 * (maps + d * sum(cells[1:]))
    weights = sum(c.weight_bytes for c in stages[LATERAL]) - 4 * d * sum(WIDTHS)
    assert 0 <= weights <= 4 * d * len(WIDTHS), "not only biases are left; zeros are one tensor for several layers"


def test_shared_weights_count_once(subject: Subject) -> None:
    """The RPN's head is one for all levels."""
    stages = count_detector(subject.onnx_model, subject.spec, SIZE)
    d = subject.spec.fpn_channels
    assert 0 <= sum(c.weight_bytes for c in stages[RPN]) - 2 * d * d * 9 <= 2 * d


def test_bytes_of_one_convolution(stand_in: ModelProto) -> None:
    first = count_nodes(cut_trunk(stand_in, SPEC), (1, 3, 32, 64), itemsize=2)["p2"]
    cells = 32 * 64
    assert first == Cost(macs=cells * 16 * 27, weight_bytes=2 * 16 * 27, activation_bytes=2 * cells * (3 + 16))
    assert first.floor_seconds(1e12, 1e9) == (first.weight_bytes + first.activation_bytes) / 1e9
    assert first.floor_seconds(1e9, 1e12) == 2 * first.macs / 1e9


def test_a_shape_that_the_graph_does_not_tell(stand_in: ModelProto) -> None:
    trunk = cut_trunk(stand_in, SPEC)
    trunk.graph.node[0].op_type = "Unheard"
    with pytest.raises(ValueError, match=r"the shape of .* cannot be worked out"):
        count_nodes(trunk, (1, 3, 32, 64), itemsize=2)
