"""Average recall of segments, whatever their class (Lin et al. 2017, table 6), by pycocotools."""

from __future__ import annotations

import contextlib
import io
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from fpn_engine.errors import AnnotationError
from fpn_engine.evaluation import ProposalScore
from fpn_engine.masks.ground_truth import SegmentTruth, as_coco
from fpn_engine.masks.run_lengths import RunLengths, areas_of
from fpn_engine.recall import RecallCounter

LIMITS = (10, 100, 1000)
COLUMNS = ("AR10", "AR100", "AR1000", "AR1000s", "AR1000m", "AR1000l")


class Segments(NamedTuple):
    """Proposals of one image, in any order: run lengths, and scores (n,)."""

    masks: Sequence[RunLengths]
    scores: NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentScore(ProposalScore):
    """Average recall over segment IoU 0.50:0.05:0.95, 0..1; NaN where nothing is annotated.

    AR10, AR100 and AR1000 allow that many proposals per image; s/m/l by the object's area (below 32^2 pixels, to 96^2,
    above) at 1000 proposals: the columns of table 6.
    """

    AR10: float

    def to_table(self) -> Table:
        """In per cent."""
        table = Table("")
        for column in COLUMNS:
            table.add_column(column.replace("1000", "1k"), justify="right")
        values = [getattr(self, name) for name in COLUMNS]
        table.add_row("segments", *("-" if np.isnan(value) else f"{100 * value:.1f}" for value in values))
        return table


def score_segments(
    truth: SegmentTruth, proposals: Mapping[int, Segments], image_ids: Sequence[int] | None = None
) -> SegmentScore:
    """Score mask proposals by average recall (``COCOeval``, "segm", useCats = 0).

    Args:
        truth: the annotations. proposals: by image id; the 1000 best count, an image without an entry has none.
        image_ids: the images that were looked at; all by default.
    Raises: AnnotationError for an image id that the annotations do not have, or a mask of another size than its image.
    """
    sizes = {image.id: [image.height, image.width] for image in truth.truth.images}
    chosen = list(sizes) if image_ids is None else list(dict.fromkeys(image_ids))
    unknown = {*chosen, *proposals} - set(sizes)
    if unknown:
        raise AnnotationError(f"the annotations have no image {min(unknown, key=str)!r}; use the matching file")
    by_image: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for annotation, segment in zip(truth.truth.annotations, truth.segments, strict=True):
        by_image[annotation.image_id].append(as_coco(annotation, segment))
    counter = RecallCounter(LIMITS)
    for image_id in chosen:
        results = _as_results(image_id, proposals.get(image_id), sizes[image_id])
        counter.add(_match(image_id, by_image[image_id], results))
    recall = counter.average()
    values = (*recall[0], *recall[1:, -1])
    return SegmentScore(**dict(zip(COLUMNS, map(float, values), strict=True)))


def _as_results(image_id: int, proposals: Segments | None, size: list[int]) -> list[dict[str, Any]]:
    if proposals is None:
        return []
    wrong = next((mask["size"] for mask in proposals.masks if list(mask["size"]) != size), None)
    if wrong:
        raise AnnotationError(f"a mask of {wrong[1]}x{wrong[0]} pixels is not of image {image_id}, {size[1]}x{size[0]}")
    rows = zip(proposals.masks, proposals.scores.tolist(), areas_of(proposals.masks), strict=True)
    return [
        {"image_id": image_id, "segmentation": mask, "score": score, "area": area, "iscrowd": 0}
        for mask, score, area in rows
    ]


def _match(image_id: int, annotations: Iterable[dict[str, Any]], results: Iterable[dict[str, Any]]) -> list[Any]:
    """What COCOeval says of one image, for all sizes, small, medium and large."""
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        evaluator = COCOeval(_collect(annotations), _collect(results), "segm")
        evaluator.params.imgIds = [image_id]
        evaluator.params.catIds = [1]
        evaluator.params.useCats = 0
        evaluator.params.maxDets = list(LIMITS)
        evaluator.evaluate()
    matches: list[Any] = evaluator.evalImgs
    return matches


def _collect(entries: Iterable[dict[str, Any]]) -> Any:
    """A COCO of entries numbered from 1, of one category: COCOeval takes a match with number 0 for none."""
    from pycocotools.coco import COCO

    coco = COCO()
    numbered = [entry | {"id": number, "category_id": 1} for number, entry in enumerate(entries, start=1)]
    sizes = {entry["image_id"]: entry["segmentation"]["size"] for entry in numbered}
    coco.dataset = {
        "images": [{"id": image_id, "height": size[0], "width": size[1]} for image_id, size in sizes.items()],
        "categories": [{"id": 1}],
        "annotations": numbered,
    }
    coco.createIndex()
    return coco
