"""Scores of a quantised detector beside the float one: AP on annotated images, or agreement where there are none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from onnx import ModelProto

from fpn_engine.detections import Detections
from fpn_engine.evaluation import score_detections
from fpn_engine.ground_truth import AnnotatedImage, Annotation, CocoGroundTruth
from fpn_engine.results import coco_results, find_image_id
from fpn_engine.spec import ModelSpec
from fpn_export.quantization.calibration import Note, make_engine, sound_outcomes

CERTAIN = 0.5  # the least score of a float detection that the quantised model is to find again
Found = dict[str, Detections]


def detect(
    model: ModelProto, spec: ModelSpec, paths: Sequence[Path], on_image: Callable[[], None], on_note: Note
) -> Found:
    """The detections of each file."""
    found = {}
    for outcome in sound_outcomes(make_engine(model, spec), paths, on_note):
        assert isinstance(outcome.result, Detections)
        found[outcome.source] = outcome.result
        on_image()
    return found


def score_ap(found: Found, truth: CocoGroundTruth) -> float:
    """COCO AP of the images that were looked at, 0..1."""
    by_id = {find_image_id(source, truth.image_ids): result for source, result in found.items()}
    results = [line for number, result in by_id.items() for line in coco_results(result, number)]
    return score_detections(truth, results, [int(number) for number in by_id]).AP


def score_agreement(found: Found, exact: Found) -> float:
    """COCO AP, 0..1, with what the float model is certain of in place of annotations; 1 if all of it is found first."""
    sources = list(exact)
    images = tuple(
        AnnotatedImage(
            id=number, file_name=source, height=exact[source].image_size[0], width=exact[source].image_size[1]
        )
        for number, source in enumerate(sources)
    )
    annotations = []
    for number, source in enumerate(sources):
        certain = exact[source].filter(min_score=CERTAIN)
        annotations += [_annotate(number, line) for line in coco_results(certain, number)]
    categories = next(iter(exact.values())).categories
    truth = CocoGroundTruth(images=images, categories=categories, annotations=tuple(annotations))
    results = [line for n, source in enumerate(sources) if source in found for line in coco_results(found[source], n)]
    return score_detections(truth, results).AP


def _annotate(number: int, line: dict[str, Any]) -> Annotation:
    x, y, w, h = line["bbox"]
    return Annotation(image_id=number, category_id=line["category_id"], bbox=(x, y, w, h), area=w * h, iscrowd=False)
