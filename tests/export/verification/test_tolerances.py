"""Tolerances follow precision and depth, and errors are what they say."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from fpn_export.verification.stage_errors import StageError
from fpn_export.verification.tensor_error import TensorError, measure
from fpn_export.verification.tolerances import PRECISIONS, coarser, derive
from fpn_export.verification.trace import CLASS_LOGITS, DETECTIONS, IMAGE, PROPOSALS, PYRAMID, ROI_FEATURES
from tests.engine.conftest import SPEC


def test_by_hand() -> None:
    """R18 of width 64: 21 layers, the longest sum 9 * 512 products."""
    spec = dataclasses.replace(SPEC, arch="resnet18", fpn_channels=256)
    assert derive(spec, "fp32").stages[PYRAMID] == pytest.approx(2 * math.sqrt(4608 * 42) * 2**-24)
    assert derive(spec, "bf16").stages[PYRAMID] == pytest.approx(2 * 2**-8 / math.sqrt(3) * math.sqrt(42))
    assert derive(spec, "fp16").stages[CLASS_LOGITS] == pytest.approx(2 * 2**-11 / math.sqrt(3) * math.sqrt(6))


def test_they_grow_with_depth_and_fewer_bits() -> None:
    deep = dataclasses.replace(SPEC, arch="resnet101")
    for precision in PRECISIONS:
        assert derive(SPEC, precision).stages[PYRAMID] < derive(deep, precision).stages[PYRAMID]
    for stage in (PYRAMID, CLASS_LOGITS, ROI_FEATURES):
        values = [derive(SPEC, precision).stages[stage] for precision in PRECISIONS]
        assert values[0] < values[1] < values[2]
    for stage in (PROPOSALS, DETECTIONS):
        assert len({derive(SPEC, precision).stages[stage] for precision in PRECISIONS}) == 1, "float32 always"
    assert derive(SPEC, "int8").stages[IMAGE] == derive(SPEC, "fp32").stages[IMAGE]


def test_calibrated_ranges_clip_the_largest() -> None:
    """Only the norm is held against the tolerance, but a fault is one."""
    came, fed = TensorError(0.05, 0.3), TensorError(math.inf, math.inf, "NaN or infinity in B")
    assert came.value == 0.3
    error = StageError("pyramid", "p3", came, fed).by_norm()
    assert (error.came.value, error.fed.value) == (0.05, math.inf)
    assert [precision for precision in PRECISIONS if derive(SPEC, precision).by_norm] == ["int8", "fp8"]


def test_the_coarser() -> None:
    assert coarser("bf16", "fp32") == coarser("fp32", "bf16") == "bf16"
    assert coarser("fp16", "int8") == "int8"


def test_errors() -> None:
    expected = torch.tensor([3.0, -4.0, 0.0, 0.0])
    error = measure(expected + torch.tensor([0.0, 0.0, 0.5, 0.0]), expected)
    assert error.norm == pytest.approx(0.1)
    assert error.largest == pytest.approx(0.125)
    assert error.value == error.largest
    assert measure(expected, expected).value == 0
    assert measure(expected * 0, expected * 0).value == 0
    assert measure(expected, expected * 0).value == math.inf
    assert measure(torch.zeros(0, 4), torch.zeros(0, 4)).value == 0
    assert measure(expected + 0.5, expected, (5.0, 10.0)).largest == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("actual", "expected", "fault"),
    [
        (torch.zeros(2, 3), torch.zeros(3), "shapes 3 and 2x3"),
        (torch.tensor([math.nan]), torch.zeros(1), "NaN or infinity in B"),
        (torch.zeros(1), torch.tensor([math.inf]), "NaN or infinity in A"),
        (torch.tensor([math.nan]), torch.tensor([math.nan]), "NaN or infinity in both"),
    ],
)
def test_faults(actual: torch.Tensor, expected: torch.Tensor, fault: str) -> None:
    error = measure(actual, expected)
    assert (error.fault, error.value) == (fault, math.inf)
