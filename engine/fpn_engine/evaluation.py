"""COCO scores: average precision of detections, average recall of proposals (Lin et al. 2017, tables 1-4)."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table
from rich.text import Text

from fpn_engine.annotations import Annotation, CocoGroundTruth
from fpn_engine.errors import AnnotationError
from fpn_engine.recall import RecallCounter

PRECISIONS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
RECALLS = ("AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
PROPOSAL_RECALLS = ("AR100", "AR1000", "AR1000s", "AR1000m", "AR1000l")
PROPOSAL_LIMITS = (100, 1000)

Proposals = tuple[NDArray[np.float32], NDArray[np.float32]]  # boxes (n, 4) and scores (n,) of one image


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectionScore:
    """The twelve COCO metrics (cocodataset.org/#detection-eval), 0..1; NaN where nothing is annotated.

    AP is the mean over IoU 0.50:0.05:0.95, AP50 and AP75 at one IoU, s/m/l by area (below 32^2, to 96^2, above);
    AR1..AR100 allow that many detections per image and class. ``per_class`` is the AP of each category name.
    """

    AP: float
    AP50: float
    AP75: float
    APs: float
    APm: float
    APl: float
    AR1: float
    AR10: float
    AR100: float
    ARs: float
    ARm: float
    ARl: float
    per_class: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, None for NaN."""
        values = dataclasses.asdict(self)
        per_class = {name: _none_if_nan(ap) for name, ap in values.pop("per_class").items()}
        return {name: _none_if_nan(value) for name, value in values.items()} | {"per_class": per_class}

    def to_table(self) -> Table:
        """In per cent as the paper prints them: precision, the classes, recall."""
        table = _table(PRECISIONS)
        table.add_row("all classes", *(_percent(getattr(self, name)) for name in PRECISIONS))
        for name, ap in self.per_class.items():
            table.add_row(Text(f"  {name}"), _percent(ap))
        table.add_section()
        table.add_row("", *RECALLS, style=table.header_style)
        table.add_row("all classes", *(_percent(getattr(self, name)) for name in RECALLS))
        return table


@dataclass(frozen=True, slots=True, kw_only=True)
class ProposalScore:
    """Average recall of class-agnostic proposals (Lin et al. 2017, table 1), 0..1; NaN where nothing is annotated.

    AR100 and AR1000 allow that many proposals per image; s/m/l by the object's area, at 1000 proposals.
    """

    AR100: float
    AR1000: float
    AR1000s: float
    AR1000m: float
    AR1000l: float

    def to_dict(self) -> dict[str, float | None]:
        """JSON-ready, None for NaN."""
        return {name: _none_if_nan(value) for name, value in dataclasses.asdict(self).items()}

    def to_table(self) -> Table:
        """In per cent, the columns of table 1."""
        table = _table(("AR100", "AR1k", "AR1ks", "AR1km", "AR1kl"))
        table.add_row("proposals", *(_percent(getattr(self, name)) for name in PROPOSAL_RECALLS))
        return table


def score_detections(
    truth: CocoGroundTruth, results: Iterable[Mapping[str, Any]], image_ids: Sequence[int] | None = None
) -> DetectionScore:
    """Score COCO results with pycocotools' ``COCOeval``, IoU of boxes.

    Args:
        truth: the annotations.
        results: image_id, category_id, bbox (x, y, w, h in pixels) and score each; in any order, may be empty.
            Those of other images and of categories without annotations are ignored, as COCO does.
        image_ids: the images that were looked at; all by default.
    Raises: AnnotationError for an image id that the annotations do not have.
    """
    results = list(results)
    _known_ids(truth, {result["image_id"] for result in results})
    evaluator = _evaluate(truth, truth.annotations, results, _known_ids(truth, image_ids))
    with _silence():
        evaluator.accumulate()
        evaluator.summarize()
    stats = [_nan_if_absent(value) for value in evaluator.stats]
    precision = evaluator.eval["precision"][:, :, :, 0, -1]  # (IoU, recall, category), all areas, 100 detections
    names = {category.id: category.name for category in truth.categories}
    per_class = {
        names[category_id]: _nan_if_absent(precision[:, :, k].mean())
        for k, category_id in enumerate(evaluator.params.catIds)
    }
    return DetectionScore(**dict(zip(PRECISIONS + RECALLS, stats, strict=True)), per_class=per_class)


def score_proposals(
    truth: CocoGroundTruth, proposals: Mapping[int, Proposals], image_ids: Sequence[int] | None = None
) -> ProposalScore:
    """Score region proposals by average recall, whatever their class (``COCOeval`` with useCats = 0).

    Args:
        truth: the annotations.
        proposals: by image id, boxes (n, 4) x1, y1, x2, y2 in pixels of the original image and scores (n,),
            in any order; the 1000 best count. An image without an entry has none.
        image_ids: the images that were looked at; all by default.
    Raises: AnnotationError for an image id that the annotations do not have.
    """
    _known_ids(truth, proposals)
    counter = RecallCounter(PROPOSAL_LIMITS)
    by_image: dict[int, list[Annotation]] = defaultdict(list)
    for annotation in truth.annotations:
        by_image[annotation.image_id].append(annotation)
    for image_id in _known_ids(truth, image_ids):
        results = _as_results(truth, image_id, proposals.get(image_id))
        evaluator = _evaluate(
            truth, by_image[image_id], results, [image_id], use_categories=False, limits=PROPOSAL_LIMITS
        )
        counter.add(evaluator.evalImgs)
    recall = counter.average()
    values = (recall[0, 0], *recall[:, 1])
    return ProposalScore(**dict(zip(PROPOSAL_RECALLS, map(float, values), strict=True)))


def _known_ids(truth: CocoGroundTruth, image_ids: Iterable[int] | None) -> list[int]:
    listed = [image.id for image in truth.images]
    if image_ids is None:
        return listed
    unknown = set(image_ids) - set(listed)
    if unknown:
        raise AnnotationError(f"the annotations have no image {min(unknown, key=str)!r}; use the matching file")
    return list(dict.fromkeys(image_ids))


def _evaluate(
    truth: CocoGroundTruth,
    annotations: Iterable[Annotation],
    results: Iterable[Mapping[str, Any]],
    image_ids: Sequence[int],
    *,
    use_categories: bool = True,
    limits: Sequence[int] = (1, 10, 100),
) -> Any:
    """A COCOeval that has matched ``results`` to ``annotations``, of each image and class the best ``limits``."""
    from pycocotools.cocoeval import COCOeval

    evaluator = COCOeval(_as_coco(map(dataclasses.asdict, annotations)), _as_coco(map(_complete, results)), "bbox")
    evaluator.params.imgIds = list(image_ids)
    evaluator.params.catIds = [category.id for category in truth.categories]
    evaluator.params.useCats = int(use_categories)
    evaluator.params.maxDets = list(limits)
    with _silence():
        evaluator.evaluate()
    return evaluator


def _as_coco(annotations: Iterable[dict[str, Any]]) -> Any:
    """A COCO of annotations numbered from 1: COCOeval takes a match with number 0 for none.

    Not ``COCO.loadRes``, which fails on an empty list and writes into the caller's.
    """
    from pycocotools.coco import COCO

    coco = COCO()
    coco.dataset = {
        "images": [],
        "categories": [],
        "annotations": [
            annotation | {"id": number, "bbox": list(annotation["bbox"])}  # its IoU takes no tuples
            for number, annotation in enumerate(annotations, start=1)
        ],
    }
    with _silence():
        coco.createIndex()
    return coco


def _complete(result: Mapping[str, Any]) -> dict[str, Any]:
    _, _, width, height = result["bbox"]
    return {**result, "area": width * height, "iscrowd": False}


def _silence() -> contextlib.AbstractContextManager[Any]:
    """pycocotools prints its progress; standard output belongs to results."""
    return contextlib.redirect_stdout(io.StringIO())


def _as_results(truth: CocoGroundTruth, image_id: int, proposals: Proposals | None) -> list[dict[str, Any]]:
    """Proposals as results of some category: useCats = 0 ignores it, but COCOeval collects by the listed ones."""
    if proposals is None:
        return []
    boxes, scores = proposals
    bboxes = np.hstack([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]]).tolist()
    category_id = truth.categories[0].id
    return [
        {"image_id": image_id, "category_id": category_id, "bbox": bbox, "score": score}
        for bbox, score in zip(bboxes, scores.tolist(), strict=True)
    ]


def _table(columns: Sequence[str]) -> Table:
    table = Table("")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.1f}"


def _none_if_nan(value: float) -> float | None:
    return None if math.isnan(value) else value


def _nan_if_absent(value: float) -> float:
    """COCOeval says -1 where nothing is annotated."""
    return math.nan if value < 0 else float(value)
