"""The light runner: trunk, joints and box head of a plan one after another, in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from fpn_engine.backends.ort import ROIS, TRUNK, check_ort, open_session, part_names, run_session
from fpn_engine.light.preprocessing import preprocess
from fpn_engine.plan import Plan
from fpn_engine.tasks import Group, PaddedDetections, Ready, Task, Thresholds

Values = dict[str, Any]  # arrays by the names that they have in the graphs


class LightRunner:
    """Runs a group at once, in the thread that submits it. See :class:`fpn_engine.tasks.Runner`.

    What is found is what the pipeline finds, beyond float rounding: the joints are the end-to-end file's own.

    Args: threads: of each graph; None takes one per core.
    Raises: PlanError if the plan does not fit what is here.
    """

    depth = 0
    device = "cpu"

    def __init__(self, plan: Plan, threads: int | None = None) -> None:
        check_ort(plan.manifest)
        self.spec = plan.manifest.detector
        self._sessions = {name: open_session(plan.parts[name], threads) for name in part_names(self.spec)}

    def submit(self, group: Group, task: Task) -> Ready:
        images = cast("Sequence[NDArray[np.uint8]]", group.images)  # nothing is decoded on a device where this runs
        values: Values = {
            "image": preprocess(images, group.image_sizes, task.padded_size, self.spec),
            "image_sizes": np.array(group.image_sizes, dtype=np.int64),
        }
        if group.given is not None:
            values["proposals"], values["proposal_counts"] = _pad_boxes(group.given)
        if task.thresholds is None:
            return Ready(self._propose(values))
        return Ready(self._detect(values, task.thresholds))

    def warm(self, group: Group, task: Task) -> None:
        self.submit(group, task)

    def _detect(self, values: Values, thresholds: Thresholds) -> PaddedDetections:
        kind = "box" if self.spec.has_box_head else "rpn"
        values |= {
            f"{kind}_score_thresh": np.array(thresholds.box_score_thresh, dtype=np.float32),
            f"{kind}_nms_thresh": np.array(thresholds.box_nms_thresh, dtype=np.float32),
            "box_detections_per_img": np.array([thresholds.box_detections_per_img], dtype=np.int64),
        }
        for name in part_names(self.spec):
            self._run(name, values)
        return PaddedDetections(*(values[name] for name in PaddedDetections._fields))

    def _propose(self, values: Values) -> PaddedDetections:
        """The RPN's proposals as detections of label 1."""
        spec = self.spec
        if not spec.has_box_head:
            return self._detect(
                values, Thresholds.of(spec).override(box_detections_per_img=spec.rpn_post_nms_top_n_test)
            )
        for name in (TRUNK, ROIS):
            self._run(name, values)
        boxes, scores = values["proposals"], values["proposal_scores"]
        real = scores >= 0
        return PaddedDetections(
            np.where(real[..., None], boxes, np.float32(0)),
            np.where(real, scores, np.float32(0)),
            real.astype(np.int64),
            real.sum(axis=1),
            np.isnan(values["map_check"]).astype(np.int64),
        )

    def _run(self, name: str, values: Values) -> None:
        """Run one graph on those of ``values`` that it takes, and add what it gives."""
        session = self._sessions[name]
        taken = [value.name for value in (*session.get_inputs(), *session.get_overridable_initializers())]
        given = [value.name for value in session.get_outputs()]
        values |= zip(given, run_session(session, {name: values[name] for name in taken}), strict=True)


def _pad_boxes(given: Sequence[NDArray[np.float32]]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Each image's boxes padded to one length of at least 1, (N, R, 4), and how many are real, (N,)."""
    capacity = max(1, *(len(boxes) for boxes in given))
    padded = np.zeros((len(given), capacity, 4), dtype=np.float32)
    for row, boxes in enumerate(given):
        padded[row, : len(boxes)] = boxes
    return padded, np.array([len(boxes) for boxes in given], dtype=np.int64)
