"""Other systems than the Faster R-CNN with a pyramid: an RPN alone, a Fast R-CNN, one map."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from fpn_engine.proposals import ProposalBoxes
from fpn_engine.work import Pixels
from fpn_export.detector import make_detector
from fpn_export.onnx_export import export_onnx
from fpn_export.systems import make_system
from fpn_export.verification import Subject, compare, open_subject
from fpn_export.verification.opening import _with_stages
from fpn_export.verification.subject import PipelineSubject
from fpn_export.verification.verdict import say_verdict
from tests.engine.conftest import LOGIT_SCALE, SPEC
from tests.export.verification.conftest import with_spec

SYSTEMS = {"rpn": ("fpn", "rpn"), "fast_rcnn": ("fpn", "fast_rcnn"), "c5": ("c5", "faster_rcnn")}


def make_pair(system: str, folder: Path) -> tuple[Subject, Subject]:
    """PyTorch and the exported file."""
    torch.manual_seed(0)
    base = dataclasses.replace(SPEC, categories=SPEC.categories[:1]) if system == "rpn" else SPEC
    spec = make_system(base, *SYSTEMS[system])
    detector = make_detector(spec, representation_size=32).eval()
    if detector.has_box_head:
        with torch.no_grad():
            detector.roi_heads["box_predictor"].cls_score.weight *= LOGIT_SCALE
    onnx.save(export_onnx(detector, spec), str(folder / "model.onnx"))
    ours = PipelineSubject(
        name="model.pth",
        runtime="PyTorch",
        spec=spec,
        precision="fp32",
        run_trunk=_with_stages(detector),
        head=detector.head if detector.has_box_head else None,
    )
    return ours, open_subject(folder / "model.onnx")


@pytest.mark.parametrize("system", SYSTEMS)
def test_they_agree(system: str, tmp_path: Path, pictures: list[tuple[str, Pixels]]) -> None:
    first, second = make_pair(system, tmp_path)
    boxes = np.array([[5, 5, 40, 40], [0, 0, 30, 20], [10, 20, 45, 58]], np.float32)
    given = None if first.spec.has_rpn else lambda name: ProposalBoxes(boxes, np.ones(3, np.float32))
    for a, b in ((first, second), (second, first)):
        comparison = compare(a, b, pictures, proposals=given)
        assert comparison.agrees, say_verdict(comparison)
        assert sum(comparison.found) > 0
        assert ("RoI features" in comparison.stages) == first.spec.has_box_head
        assert ("proposals" in comparison.stages) == (first.spec.has_rpn and first.spec.has_box_head)
    weaker = compare(second, with_spec(first, box_detections_per_img=1), pictures, proposals=given)
    assert weaker.departure is not None
    assert weaker.departure.stage == "detections"
