"""Comparison: two subjects over many images, and the first stage that departs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fpn_engine.annotations import CocoGroundTruth
from fpn_engine.detections import Detections
from fpn_engine.errors import FpnEngineError, ModelError
from fpn_engine.evaluation import DetectionScore, score_detections
from fpn_engine.proposals import ProposalBoxes, as_boxes
from fpn_engine.results import coco_results
from fpn_engine.spec import ModelSpec
from fpn_engine.work import Pixels
from fpn_export.verification.matching import Lost
from fpn_export.verification.stage_errors import Pair, StageError
from fpn_export.verification.subject import Subject
from fpn_export.verification.tensor_error import NO_ERROR, TensorError
from fpn_export.verification.tolerances import SURE, Tolerances, coarser, derive
from fpn_export.verification.trace import PROPOSALS

NOT_COMPARED = ("source",)  # fields of a spec that say where a model came from, not what it does
UNSPLIT = frozenset({PROPOSALS})  # whose level is that of what was lost, another in each image
Read = tuple[str, Pixels | FpnEngineError]


class Side(NamedTuple):
    """What stands on one side."""

    name: str
    runtime: str
    precision: str


@dataclass(slots=True)
class StageRecord:
    """The largest errors of a stage over all images, and where they were met.

    Attributes: fed_part: the level. departed: the first image in which it was beyond the tolerance, "" if none.
    """

    stage: str
    tolerance: float
    came: TensorError = NO_ERROR
    came_image: str = ""
    fed: TensorError = NO_ERROR
    fed_image: str = ""
    fed_part: str = ""

    @property
    def departs(self) -> bool:
        return not self.fed.value <= self.tolerance


class ImageResult(NamedTuple):
    """One image: detections of both sides, how many are twins, the others with causes, and its worst stage error.

    Attributes: worst: the largest error on the same input as a multiple of its tolerance.
    """

    name: str
    first: Detections
    second: Detections
    twins: int
    lost: list[Lost]
    worst: float

    @property
    def rank(self) -> tuple[int, int, float]:
        """Larger where more is wrong."""
        return sum(not each.tie for each in self.lost), len(self.lost), self.worst


@dataclass(slots=True)
class Comparison:
    """All that was found out.

    Attributes:
        differences: of the specifications, in words. failures: images that could not be read or run.
        stages: by stage, in the order of the dataflow. parts: by level too.
        scores: the COCO score of each side, if there are annotations.
    """

    a: Side
    b: Side
    tolerances: Tolerances
    differences: list[str]
    images: list[ImageResult] = field(default_factory=list)
    failures: list[tuple[str, str]] = field(default_factory=list)
    stages: dict[str, StageRecord] = field(default_factory=dict)
    parts: dict[tuple[str, str], StageRecord] = field(default_factory=dict)
    scores: tuple[DetectionScore, DetectionScore] | None = None

    @property
    def departure(self) -> StageRecord | None:
        """The first stage, and in it the first level, that is beyond its tolerance when given A's input."""
        return next((part for part in self.parts.values() if part.departs), None)

    @property
    def found(self) -> tuple[int, int]:
        """Detections of each side."""
        return sum(len(each.first) for each in self.images), sum(len(each.second) for each in self.images)

    @property
    def twins(self) -> int:
        return sum(each.twins for each in self.images)

    @property
    def lost(self) -> list[Lost]:
        """Without a twin, ties aside."""
        return [lost for each in self.images for lost in each.lost if not lost.tie]

    @property
    def ties(self) -> int:
        return sum(lost.tie for each in self.images for lost in each.lost)

    @property
    def lost_sure(self) -> float:
        """The share of sure detections, of a score from a half on, without a twin, one aside; of the worse side."""
        shares = []
        for letter, sides in zip("AB", self._sides(), strict=True):
            sure = sum(int((side.scores >= SURE).sum()) for side in sides)
            lost = sum(each.side == letter and each.score >= SURE for each in self.lost)
            shares.append(max(0, lost - 1) / sure if sure else 0.0)
        return max(shares)

    @property
    def detections_agree(self) -> bool:
        """At fp32 all have a twin, ties aside; at less all sure ones but a share, and one beyond it on each side."""
        return (
            not self.lost if self.tolerances.precision == "fp32" else self.lost_sure <= self.tolerances.lost_detections
        )

    @property
    def ap_difference(self) -> float | None:
        """B's AP less A's, 0..1."""
        return None if self.scores is None else self.scores[1].AP - self.scores[0].AP

    @property
    def ap_agrees(self) -> bool:
        """Also where nothing is annotated, which has no AP."""
        difference = self.ap_difference
        return difference is None or not abs(difference) > self.tolerances.ap

    @property
    def agrees(self) -> bool:
        return self.departure is None and self.detections_agree and self.ap_agrees

    @property
    def worst_image(self) -> ImageResult:
        return max(self.images, key=lambda image: image.rank)

    def _sides(self) -> Iterator[Sequence[Detections]]:
        yield [each.first for each in self.images]
        yield [each.second for each in self.images]


def compare(
    a: Subject,
    b: Subject,
    images: Iterable[Read],
    *,
    proposals: Callable[[str], ProposalBoxes] | None = None,
    truth: CocoGroundTruth | None = None,
    image_ids: Sequence[int] = (),
    on_image: Callable[[], None] = lambda: None,
) -> Comparison:
    """Run both on every image.

    Args:
        images: name and pixels, or the error instead of them, which is kept and passed over.
        proposals: by name, for a Fast R-CNN. truth: scores both, on the images that could be read.
        image_ids: the annotations' of each of ``images``.
    Raises: ModelError for models of different kinds, FpnEngineError if a side cannot run at all.
    """
    if a.spec.model != b.spec.model:
        raise ModelError(f"{a.name} is a {a.spec.model} and {b.name} a {b.spec.model}; give two forms of one model")
    tolerances = derive(a.spec, coarser(a.precision, b.precision))
    first, second = (Side(each.name, each.runtime, each.precision) for each in (a, b))
    comparison = Comparison(first, second, tolerances, describe_differences(a.spec, b.spec))
    results: list[list[Any]] = [[], []]
    scored = []
    for number, (name, pixels) in enumerate(images):
        if isinstance(pixels, FpnEngineError):
            comparison.failures.append((name, str(pixels)))
        else:
            given = None if proposals is None else as_boxes([proposals(name)], 1)[0]
            pair = Pair(a, b, a.trace(pixels, given), b.trace(pixels, given))
            result = _compare_image(comparison, name, pair)
            comparison.images.append(result)
            if truth:
                scored.append(image_ids[number])
                for listed, found in zip(results, (result.first, result.second), strict=True):
                    listed += coco_results(found, image_ids[number])
        on_image()
    if truth and scored:
        comparison.scores = (score_detections(truth, results[0], scored), score_detections(truth, results[1], scored))
    return comparison


def describe_differences(a: ModelSpec, b: ModelSpec) -> list[str]:
    """Fields in which two specifications differ, each as "name: A's against B's"."""
    found = []
    for each in dataclasses.fields(ModelSpec):
        ours, theirs = getattr(a, each.name), getattr(b, each.name)
        if each.name in NOT_COMPARED or ours == theirs:
            continue
        if each.name == "categories" and len(ours) != len(theirs):
            found.append(f"{len(ours)} classes against {len(theirs)}")
        elif each.name == "categories":
            unlike = next((x, y) for x, y in zip(ours, theirs, strict=True) if x != y)
            found.append("class {} {!r} against {} {!r}".format(*(v for c in unlike for v in (c.id, c.name))))
        elif dataclasses.is_dataclass(ours):
            found += [
                f"{each.name}.{inner.name} {getattr(ours, inner.name)} against {getattr(theirs, inner.name)}"
                for inner in dataclasses.fields(ours)
                if getattr(ours, inner.name) != getattr(theirs, inner.name)
            ]
        else:
            found.append(f"{each.name} {ours} against {theirs}")
    return found


def _compare_image(comparison: Comparison, name: str, pair: Pair) -> ImageResult:
    worst = 0.0
    for error in pair.errors():
        if comparison.tolerances.by_norm:
            error = error.by_norm()
        tolerance = comparison.tolerances.stages[error.stage]
        _record(comparison, error, name, tolerance)
        worst = max(worst, error.fed.value / tolerance if tolerance else error.fed.value)
    matched = pair.match()
    return ImageResult(
        name, pair.first.detections, pair.second.detections, len(matched.pairs), pair.explain(matched), worst
    )


def _record(comparison: Comparison, error: StageError, image: str, tolerance: float) -> None:
    """Keep the largest; the parts stay in the order of the dataflow."""
    key = (error.stage, "" if error.stage in UNSPLIT else error.part)
    whole = comparison.stages.setdefault(error.stage, StageRecord(error.stage, tolerance))
    part = comparison.parts.setdefault(key, StageRecord(error.stage, tolerance))
    for record in (whole, part):
        if error.came.value >= record.came.value or not record.came_image:
            record.came, record.came_image = error.came, image
        if error.fed.value > record.fed.value or not record.fed_image:
            record.fed, record.fed_image, record.fed_part = error.fed, image, error.part
