"""The joints: what they take is there when they run, nothing in them is a weight, older files are refused."""

from __future__ import annotations

import onnx
import pytest

from fpn_engine.backends.ort import open_session, part_names
from fpn_engine.errors import ModelError
from fpn_export.onnx_joints import cut_joints
from tests.parity.test_systems import SYSTEMS, subject_of


@pytest.mark.parametrize("system", SYSTEMS)
def test_names_are_the_wires(system: str) -> None:
    plan = subject_of(system).plan
    known = {"image", "image_sizes"} | (set() if plan.manifest.spec.has_rpn else {"proposals", "proposal_counts"})
    assert sorted(plan.parts) == sorted(part_names(plan.manifest.spec))
    for name in part_names(plan.manifest.spec):
        session = open_session(plan.parts[name])
        assert {value.name for value in session.get_inputs()} <= known
        known |= {value.name for value in session.get_outputs()}
    kind = "box" if plan.manifest.spec.has_box_head else "rpn"
    overridable = {value.name for value in session.get_overridable_initializers()}
    assert overridable == {f"{kind}_score_thresh", f"{kind}_nms_thresh", "box_detections_per_img"}
    assert {"boxes", "scores", "labels", "counts", "status"} <= known


def test_no_weight_is_stored_twice() -> None:
    subject = subject_of("finest")
    for joint in cut_joints(subject.onnx_model, subject.spec).values():
        assert sum(len(tensor.raw_data) for tensor in joint.graph.initializer) < 4096
        onnx.checker.check_model(joint)


def test_a_file_from_before(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = subject_of("finest")
    old = onnx.ModelProto.FromString(subject.onnx_model.SerializeToString())
    for node in old.graph.node:
        for names in (node.input, node.output):
            names[:] = ["check" if name == "map_check" else name for name in names]
    with pytest.raises(ModelError, match="the ONNX file has no tensor map_check; export it again with this version"):
        cut_joints(old, subject.spec)
