"""The verdict in plain language: what agrees, to what, and the first stage that departs."""

from __future__ import annotations

from collections.abc import Iterator

from fpn_export.verification.comparison import Comparison, StageRecord
from fpn_export.verification.tensor_error import TensorError
from fpn_export.verification.trace import (
    BOX_DELTAS,
    CLASS_LOGITS,
    DELTAS,
    DETECTIONS,
    IMAGE,
    PROPOSALS,
    ROI_FEATURES,
    STAGES,
    TRUNK,
)

HEAD = (CLASS_LOGITS, BOX_DELTAS)
COUNTED = (PROPOSALS, DETECTIONS)  # stages whose error is a share
GROUPS = ((IMAGE, (IMAGE,)), ("trunk", TRUNK), (PROPOSALS, (PROPOSALS,)), (ROI_FEATURES, (ROI_FEATURES,)))


def say_verdict(comparison: Comparison) -> str:
    """One sentence, or two where there is an AP."""
    departure = comparison.departure
    if departure is not None:
        before = ", ".join(_agreements(comparison, departure))
        return f"{before}{'; ' if before else ''}{_depart(comparison, departure)}."
    trunk = _largest(comparison, TRUNK)
    sentence = f"given the same input every stage agrees, the trunk to {trunk:.1g}; {_say_detections(comparison)}"
    if not comparison.detections_agree:
        sentence += f", which is more than {comparison.tolerances.precision} explains: small differences add up"
    return f"{sentence}.{_say_ap(comparison)}"


def say_ap(comparison: Comparison) -> str:
    """AP of both sides in per cent and how far they are apart; "" without annotations."""
    if comparison.scores is None or comparison.ap_difference is None:
        return ""
    first, second = (100 * score.AP for score in comparison.scores)
    difference = round(100 * comparison.ap_difference, 2) + 0.0  # no "-0.00"
    return f"AP {first:.2f} and {second:.2f}, {difference:+.2f} points"


def say_error(stage: str, error: TensorError) -> str:
    """An error for people: a relative one, or for proposals and detections how many per cent have no counterpart."""
    if error.fault:
        return error.fault
    if stage in COUNTED:
        return "all the same" if error.norm == 0 else f"{100 * error.norm:.2g} % differ"
    return "0" if error.value == 0 else f"{error.value:.1g}"


def say_tolerance(record: StageRecord) -> str:
    """The tolerance of a stage as :func:`say_error` says errors."""
    return f"{100 * record.tolerance:g} %" if record.stage in COUNTED else f"{record.tolerance:.1g}"


def _agreements(comparison: Comparison, departure: StageRecord) -> Iterator[str]:
    """What lies before the departure: the preprocessed image, the trunk to 3e-6, ...; within the trunk its parts."""
    end = STAGES.index(departure.stage)
    parts = tuple((stage, (stage,)) for stage in TRUNK)
    for title, stages in (GROUPS[0], *parts) if departure.stage in TRUNK else GROUPS:
        whole = [stage for stage in stages if stage in comparison.stages]
        if not whole or STAGES.index(stages[0]) >= end or departure.stage in stages:
            continue
        error = _largest(comparison, whole)
        verb = "agree" if title in (DELTAS, PROPOSALS, ROI_FEATURES) else "agrees"
        yield f"the {title} {verb}" if error == 0 or title == PROPOSALS else f"the {title} {verb} to {error:.1g}"


def _depart(comparison: Comparison, departure: StageRecord) -> str:
    stage = departure.stage
    place = [f"image {departure.fed_image}"] if departure.fed_image else []
    if departure.fed_part:
        place.append(f"level {departure.fed_part}")
    how = say_error(stage, departure.fed)
    if not departure.fed.fault:
        tolerance = f"{100 * departure.tolerance:g} %" if stage in COUNTED else f"{departure.tolerance:.1g}"
        how = (
            f"{how} on the same input, tolerance {tolerance}"
            if stage in COUNTED
            else f"off by {how}, tolerance {tolerance}"
        )
    found = _say_detections(comparison)
    return f"the first stage that departs is the {stage}, {', '.join(place)} ({how}); {found}"


def _say_detections(comparison: Comparison) -> str:
    first, second = comparison.found
    if not max(first, second):
        return "neither detects anything"
    whole = f"{first} detections" if first == second else f"{first} and {second} detections"
    if not comparison.lost:
        return f"all {whole} have a twin{' but for ties' if comparison.ties else ''}"
    ours = sum(each.side == "A" for each in comparison.lost)
    besides = f", besides {comparison.ties} by ties" if comparison.ties else ""
    return f"of {whole} {ours} and {len(comparison.lost) - ours} have no twin{besides}"


def _say_ap(comparison: Comparison) -> str:
    text = say_ap(comparison)
    if not text:
        return ""
    beyond = "" if comparison.ap_agrees else f", beyond the {100 * comparison.tolerances.ap:g} allowed"
    return f" {text}{beyond}."


def _largest(comparison: Comparison, stages: tuple[str, ...] | list[str]) -> float:
    return max((comparison.stages[stage].fed.value for stage in stages if stage in comparison.stages), default=0.0)
