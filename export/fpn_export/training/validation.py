"""Validation: the COCO score of a model while it is being trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fpn_engine.annotations import CocoGroundTruth
from fpn_engine.engine import Engine
from fpn_engine.evaluation import DetectionScore, ProposalScore, score_detections, score_proposals
from fpn_engine.ground_truth import AnnotatedImage, check_images, check_size
from fpn_engine.images import to_array
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
            found = {image.id: proposals for image, proposals in propose(engine, self._truth, self._folder)}
            return score_proposals(self._truth, found)
        results: list[dict[str, Any]] = []
        for image in self._truth.images:
            given = None if self._proposals is None else [self._proposals(image.file_name)]
            path = self._folder / image.file_name
            (detections,) = engine(path, proposals=given)
            check_size(path, detections.image_size, (image.height, image.width))
            results += coco_results(detections, image.id)
        return score_detections(self._truth, results)


def propose(engine: Engine, truth: CocoGroundTruth, folder: Path) -> Iterator[tuple[AnnotatedImage, ProposalBoxes]]:
    """Every annotated image with its proposals. Raises: ImageError if it cannot be read or has another size."""
    for image in truth.images:
        pixels = to_array(folder / image.file_name)
        check_size(folder / image.file_name, pixels.shape[:2], (image.height, image.width))
        yield image, engine.propose(pixels)[0]
