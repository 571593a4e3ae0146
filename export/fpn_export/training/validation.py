"""Validation: the COCO score of a model while it is being trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fpn_engine.annotations import CocoGroundTruth
from fpn_engine.detections import Detections
from fpn_engine.engine import Engine
from fpn_engine.evaluation import DetectionScore, ProposalScore, score_detections, score_proposals
from fpn_engine.images import to_array
from fpn_engine.results import coco_results
from fpn_export.detector import FpnDetector

Score = DetectionScore | ProposalScore
Validation = Callable[[FpnDetector], Score]


def main_figure(score: Score) -> tuple[str, float]:
    """The figure that the best model is chosen by: AP, or average recall of 1000 proposals."""
    return ("AR1000", score.AR1000) if isinstance(score, ProposalScore) else ("AP", score.AP)


class CocoValidation:
    """Scores a model on the images of an annotation file, in fp32.

    Args: truth: the annotations. folder: where their images lie. proposals: by image id, for Fast R-CNN.
    """

    def __init__(self, truth: CocoGroundTruth, folder: Path, proposals: Mapping[int, Any] | None = None) -> None:
        self._truth, self._proposals = truth, proposals
        self._files = {image.id: folder / image.file_name for image in truth.images}

    def __call__(self, model: FpnDetector) -> Score:
        """Raises: FpnEngineError for an image that cannot be read, or if the network gives NaN or infinity."""
        engine = Engine(model.pipeline)
        if model.spec.model == "rpn":
            found = {image_id: engine.propose(to_array(path))[0] for image_id, path in self._files.items()}
            return score_proposals(self._truth, found)
        results: list[dict[str, Any]] = []
        for image_id, path in self._files.items():
            results += coco_results(self._detect(engine, image_id, path), image_id)
        return score_detections(self._truth, results)

    def _detect(self, engine: Engine, image_id: int, path: Path) -> Detections:
        if self._proposals is None:
            return engine(path)[0]
        return engine(path, proposals=[self._proposals[image_id]])[0]
