"""The stages of one image side by side: as they came, and B's run once more on what A's were given.

A fault early in B spoils all that follows as it came. Given A's inputs, each stage answers for itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fpn_engine.detections import Detections
from fpn_engine.pipeline import Thresholds
from fpn_export.verification.matching import (
    TWIN_SCORE,
    Limits,
    Lost,
    Matched,
    explain,
    find_gaps,
    match_boxes,
    match_detections,
)
from fpn_export.verification.subject import Subject
from fpn_export.verification.tensor_error import TensorError, magnitudes, measure
from fpn_export.verification.tolerances import SAME_CORNER, SAME_SCORE
from fpn_export.verification.trace import (
    BOX_DELTAS,
    CLASS_LOGITS,
    DELTAS,
    DETECTIONS,
    IMAGE,
    OBJECTNESS,
    PROPOSALS,
    ROI_FEATURES,
    Boxes,
    Input,
    Maps,
    Trace,
    order_maps,
)
from fpn_kernels import decode_proposals, make_base_anchors, select_topk

SHARED_SCALE = (OBJECTNESS, DELTAS)  # one layer makes all levels; the last has few cells, which may all be near zero
MOST_CANDIDATES = 1000


class StageError(NamedTuple):
    """One stage of one image, or one level of it.

    Attributes:
        part: the level or map, "" where the stage is one. came: B against A as they came. fed: the same with B's stage
            run on A's input. Of proposals and detections, the share without counterpart.
    """

    stage: str
    part: str
    came: TensorError
    fed: TensorError

    def by_norm(self) -> StageError:
        """With errors of which the norm counts alone."""
        return self._replace(came=self.came._replace(by_norm=True), fed=self.fed._replace(by_norm=True))


class Pair:
    """Two subjects and one image's traces of them."""

    def __init__(self, a: Subject, b: Subject, first: Trace, second: Trace) -> None:
        self.a, self.b, self.first, self.second = a, b, first, second

    def errors(self) -> Iterator[StageError]:
        """Every stage that both have, in the order of the dataflow."""
        first, second = self.first, self.second
        image = measure(second.input.image, first.input.image)
        yield StageError(IMAGE, "", image, image)
        yield from self._trunk_errors(image)
        if first.proposals is None or second.proposals is None:
            yield self._detection_error()
            return
        yield from self._proposal_errors(first.proposals, second.proposals)
        yield from self._head_errors(first.proposals, second.proposals)
        yield self._detection_error()

    def match(self) -> Matched:
        return match_detections(self.first.detections, self.second.detections)

    def explain(self, matched: Matched) -> list[Lost]:
        """The cause for each detection without a twin."""
        ours, theirs = self.first.detections, self.second.detections
        lost = []
        if matched.only_a:
            lost += explain("A", matched.only_a, ours, theirs, _candidates(self.a, self.first), _limits(self.b))
        if matched.only_b:
            lost += explain("B", matched.only_b, theirs, ours, _candidates(self.b, self.second), _limits(self.a))
        return lost

    def _trunk_errors(self, image: TensorError) -> Iterator[StageError]:
        first, came = self.first.maps, self.second.maps
        fed = came if image.value == 0 else self.b.run_trunk(self.first.input)
        scales = {stage: _joint_scale(first, stage) for stage in SHARED_SCALE}
        for stage, part, name in order_maps(self.a.spec, first):
            if name in came:
                yield StageError(
                    stage, part, *(measure(maps[name], first[name], scales.get(stage)) for maps in (came, fed))
                )
            elif stage in SHARED_SCALE:
                missing = TensorError(np.inf, np.inf, f"B has no {name}")
                yield StageError(stage, part, missing, missing)

    def _proposal_errors(self, first: Boxes, second: Boxes) -> Iterator[StageError]:
        if not self.a.spec.has_rpn:
            return
        first, second = _scored(first), _scored(second)
        came = _share(len(_pair_proposals(first, second)), len(first.boxes), len(second.boxes))
        if misfit := self._misfit("level_names", "num_anchors"):
            yield StageError(PROPOSALS, "", came, misfit)
            return
        fed = _scored(self.b.propose(self.first.maps, self.first.input))
        same = _same(*_arrays(first, fed), first.scores.numpy(), fed.scores.numpy())
        error = _share(len(same), len(first.boxes), len(fed.boxes))
        yield StageError(PROPOSALS, self._level_of_lost(first, fed, same), came, error)

    def _head_errors(self, first: Boxes, second: Boxes) -> Iterator[StageError]:
        a, b = self.first, self.second
        assert a.roi_features is not None
        assert b.roi_features is not None
        assert a.answer is not None
        assert b.answer is not None
        rows = _pair_proposals(_scored(first), _scored(second))  # which are the first of each
        fed: TensorError = self._misfit("level_names", "roi_levels", "feature_channels") or measure(
            self.b.pool(a.maps, first), a.roi_features
        )
        yield StageError(ROI_FEATURES, "", _measure_rows(b.roi_features, a.roi_features, rows), fed)
        misfit = self._misfit("feature_channels", "num_classes")
        if a.roi_features.shape[1:] != b.roi_features.shape[1:]:
            misfit = measure(b.roi_features, a.roi_features)
        answer = None if misfit else self.b.run_head(a.roi_features)
        for number, stage in enumerate((CLASS_LOGITS, BOX_DELTAS)):
            fed = misfit or measure(answer[number], a.answer[number]) if answer else misfit  # type: ignore[assignment]
            yield StageError(stage, "", _measure_rows(b.answer[number], a.answer[number], rows), fed)

    def _detection_error(self) -> StageError:
        """The share of both sides' detections without counterpart, ties aside."""
        ours, theirs = self.first.detections, self.second.detections
        matched = self.match()
        lost = [each for each in self.explain(matched) if not each.tie]
        came = TensorError(len(lost) / max(1, len(ours) + len(theirs)), 0.0)
        if not (self.first.finite and self.second.finite):
            came = TensorError(np.inf, np.inf, "NaN or infinity in " + self._broken)
        if misfit := self._misfit("num_classes"):
            return StageError(DETECTIONS, "", came, misfit)
        first = self.first
        found = self.b.finish(first.maps, first.proposals, first.answer, first.input)
        if found is None:
            return StageError(DETECTIONS, "", came, came if came.fault else TensorError(1.0, 0.0))
        pairs = _same_detections(ours, found, first.input)
        left = [sorted(set(range(len(side))) - set(pairs[:, i].tolist())) for i, side in enumerate((ours, found))]
        others = [("A", left[0], ours, found, self.a, self.b), ("B", left[1], found, ours, self.b, self.a)]
        lost = []
        for side, listed, mine, its, subject, other in others:
            if listed:
                lost += explain(side, listed, mine, its, _candidates(subject, first), _limits(other))
        real = sum(not each.tie for each in lost)
        return StageError(DETECTIONS, "", came, TensorError(real / max(1, len(ours) + len(found)), 0.0))

    @property
    def _broken(self) -> str:
        return {(False, True): "A", (True, False): "B"}.get((self.first.finite, self.second.finite), "both")

    def _misfit(self, *fields: str) -> TensorError | None:
        """Why B's stage cannot take A's tensors; None if it can."""
        for field in fields:
            ours, theirs = getattr(self.a.spec, field), getattr(self.b.spec, field)
            if ours != theirs:
                return TensorError(np.inf, np.inf, f"{field.replace('_', ' ')} {ours} and {theirs}")
        return None

    def _level_of_lost(self, first: Boxes, second: Boxes, pairs: np.ndarray) -> str:
        """The level that most of the proposals without counterpart come from."""
        left = [
            boxes.boxes[sorted(set(range(len(boxes.boxes))) - set(pairs[:, i].tolist()))]
            for i, boxes in enumerate((first, second))
        ]
        lost = torch.cat(left)
        if not len(lost):
            return ""
        candidates, levels = _decode_all(self.a, self.first.maps, self.first.input)
        nearest = torch.cdist(lost.double(), candidates.double(), p=torch.inf).argmin(dim=1)
        return self.a.spec.level_names[int(levels[nearest].mode().values)]


def _decode_all(subject: Subject, maps: Maps, given: Input) -> tuple[Tensor, Tensor]:
    """All boxes that the NMS of the proposals chooses from, (K, 4), and the index of each one's level, (K,)."""
    spec = subject.spec
    objectness, deltas = ([maps[f"{kind}_{level}"] for level in spec.level_names] for kind in SHARED_SCALE)
    anchors = torch.stack([make_base_anchors(sizes, spec.aspect_ratios) for sizes in spec.anchor_sizes])
    k = spec.rpn_pre_nms_top_n_test
    logits, indices, levels = select_topk(objectness, k)
    boxes, _ = decode_proposals(logits, indices, deltas, anchors, given.padded_size, given.image_sizes, k=k)
    return boxes[0], levels


def _candidates(subject: Subject, trace: Trace) -> Detections:
    """What the last NMS chose from, as far as it fits."""
    most = max(MOST_CANDIDATES, subject.spec.box_detections_per_img)
    found = subject.finish(
        trace.maps, trace.proposals, trace.answer, trace.input, box_nms_thresh=1.0, box_detections_per_img=most
    )
    return trace.detections if found is None else found


def _limits(subject: Subject) -> Limits:
    thresholds = Thresholds.of(subject.spec)
    return Limits(thresholds.box_score_thresh, thresholds.box_nms_thresh, thresholds.box_detections_per_img)


def _joint_scale(maps: Maps, stage: str) -> tuple[float, float]:
    flat = [tensor.flatten() for name, tensor in maps.items() if name.startswith(f"{stage}_")]
    return magnitudes(torch.cat(flat)) if flat else (0.0, 0.0)


def _measure_rows(actual: Tensor, expected: Tensor, rows: np.ndarray) -> TensorError:
    """Over the rows whose proposals have a twin."""
    if actual.shape[1:] != expected.shape[1:]:
        return measure(actual, expected)
    if not len(rows) and len(expected):
        return TensorError(np.inf, np.inf, "no common proposals")
    pairs = torch.from_numpy(rows)
    return measure(actual[pairs[:, 1]], expected[pairs[:, 0]])


def _share(pairs: int, first: int, second: int) -> TensorError:
    """The part of the larger side without counterpart."""
    whole = max(first, second)
    return TensorError((whole - pairs) / whole if whole else 0.0, 0.0)


def _scored(proposals: Boxes) -> Boxes:
    """Those whose score is more than rounding: below, NMS takes them in any order.

    A sigmoid has absolute errors of 6e-8 in some runtimes, which ranks what scores 1e-6 anew. What comes later in an
    NMS changes nothing of what came before.
    """
    real = proposals.scores >= SAME_SCORE
    return Boxes(proposals.boxes[real], proposals.scores[real])


def _pair_proposals(first: Boxes, second: Boxes) -> np.ndarray:
    """Those of one place and about one score, wherever they stand in either list."""
    gaps = find_gaps(first.scores.numpy(), second.scores.numpy())
    return match_boxes(*_arrays(first, second), gaps, TWIN_SCORE)


def _arrays(first: Boxes, second: Boxes) -> tuple[np.ndarray, np.ndarray]:
    return first.boxes.double().numpy(), second.boxes.double().numpy()


def _same(
    first: np.ndarray, second: np.ndarray, scores: np.ndarray, others: np.ndarray, corner: float = SAME_CORNER
) -> np.ndarray:
    """Pairs that differ by rounding alone."""
    pairs = match_boxes(first, second, find_gaps(scores, others), SAME_SCORE)
    close = np.abs(first[pairs[:, 0]] - second[pairs[:, 1]]).max(axis=1, initial=0.0) <= corner
    return pairs[close]


def _same_detections(first: Detections, second: Detections, given: Input) -> np.ndarray:
    """As :func:`_same`, class by class, corners in pixels of the resized image."""
    ratio = max(side / int(resized) for side, resized in zip(given.shape, given.image_sizes[0], strict=True))
    found = [np.zeros((0, 2), np.int64)]
    for category in set(first.category_ids.tolist()) & set(second.category_ids.tolist()):
        rows, others = (np.flatnonzero(side.category_ids == category) for side in (first, second))
        pairs = _same(
            first.boxes[rows].astype(np.float64),
            second.boxes[others].astype(np.float64),
            first.scores[rows],
            second.scores[others],
            SAME_CORNER * max(1.0, ratio),
        )
        found.append(np.stack([rows[pairs[:, 0]], others[pairs[:, 1]]], axis=1))
    return np.concatenate(found)
