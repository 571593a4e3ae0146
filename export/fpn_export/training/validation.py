"""Validation: the COCO score of a model while it is being trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fpn_engine.annotations import CocoGroundTruth
from fpn_engine.engine import Engine
from fpn_engine.evaluation import DetectionScore, ProposalScore, score_detections, score_proposals
from fpn_engine.ground_truth import check_images, check_size
from fpn_engine.proposals import ProposalBoxes
from fpn_engine.results import coco_results
from fpn_export.detector import FpnDetector

Score = DetectionScore | ProposalScore
Validation = Callable[[FpnDetector], Score]


def main_figure(score: Score) -> tuple[str, float]:
    """The figure that the best model is chosen by: AP, or average recall of 1000 proposals."""
    return ("AR1000", score.AR1000) if isinstance(score, ProposalScore) else ("AP", score.AP)


class CocoValidation:
    """Scores a model on the images of an annotation file, in fp32.

    Args: truth: the annotations. folder: where their images lie. proposals: those of a file name, for Fast R-CNN.
    Raises: AnnotationError if images are missing.
    """

    def __init__(
        self, truth: CocoGroundTruth, folder: Path, proposals: Callable[[str], ProposalBoxes] | None = None
    ) -> None:
        check_images([folder / image.file_name for image in truth.images], folder, "--val-images")
        self._truth, self._folder, self._proposals = truth, folder, proposals

    def __call__(self, model: FpnDetector) -> Score:
        """Raises: FpnEngineError for an image that cannot be read or has another size, or if the network gives NaN."""
        engine = Engine(model.pipeline, graphs=False)
        if model.spec.model == "rpn":
            return score_proposals(self._truth, propose(engine, self._truth, self._folder))
        results: list[dict[str, Any]] = []
        for image in self._truth.images:
            given = None if self._proposals is None else [self._proposals(image.file_name)]
            path = self._folder / image.file_name
            (detections,) = engine(path, proposals=given)
            check_size(path, detections.image_size, (image.height, image.width))
            results += coco_results(detections, image.id)
        return score_detections(self._truth, results)


def propose(engine: Engine, truth: CocoGroundTruth, folder: Path) -> dict[int, ProposalBoxes]:
    """The proposals of every annotated image, by its id."""
    return {image.id: engine.propose(folder / image.file_name)[0] for image in truth.images}
