"""How far results move by what is not fp32 at an image's own padded size: buckets and reduced precision, in figures.

    python -m benchmarks.tolerances model.pth annotations.json images/ -o benchmarks/results/tolerances.json

Each row is against ONNX Runtime in fp32 at own sizes, in every annotated image. A twin has the same class, IoU 0.95 and
a score within 0.02; "tied" are those without one where NMS chose between two boxes of one object whose fp32 scores
differ by less than 1e-3. "rounded" is the native plan in fp32 with tensors and values rounded to so many bits of
mantissa, throughout or in one part alone: 10 are fp16's and TF32's. "rivals" counts, of the sure detections, those that
NMS preferred to another box of their object by less than so much of score.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.photographs import read_photographs
from fpn_engine.annotations import CocoGroundTruth
from fpn_engine.backends.native.cpu_convolution import Run, has_bfloat16
from fpn_engine.backends.native.executor import CpuExecutor
from fpn_engine.backends.native.ops import Slice
from fpn_engine.backends.native.packing import unpack_part
from fpn_engine.backends.native.parts import NativeHead, NativeTrunk
from fpn_engine.backends.native.program import Program
from fpn_engine.engine import Engine
from fpn_engine.pipeline import Pipeline
from tests.parity.subject import Subject
from tests.parity.test_native import SURE, TIE, TWIN_IOU, TWIN_SCORE, detect_all, find_lost, iou, is_tie
from tests.parity.test_photographs import score
from tests.parity.torchvision_oracle import Found, Pixels

BUCKETS = (128, 256, 512)
HALF_BITS = 10
BITS = (10, 11, 12, 13)
# What the names of a part's tensors begin with.
PARTS = {"body": "backbone.body", "laterals and outputs": "backbone.fpn", "RPN head": "rpn", "box head": "roi_heads"}
GAPS = (1e-5, 1e-4, 1e-3)
NMS_IOU = 0.5


def round_bits(x: Tensor, bits: int) -> Tensor:
    """float32 to the nearest with ``bits`` of mantissa, half to even; exponents keep their range."""
    dropped = 23 - bits
    whole = x.contiguous().view(torch.int32)
    whole = whole + ((1 << (dropped - 1)) - 1) + (whole >> dropped & 1)
    return (whole & -(1 << dropped)).view(torch.float32)


class RoundingExecutor(CpuExecutor):
    """Rounds what operations make whose tensors begin with ``prefix``, these tensors and the program's input.

    Sums that nothing but views are taken of stay as they are, as in plans of 16 bits.
    """

    def __init__(self, program: Program, weights: Mapping[str, Tensor], bits: int, prefix: str) -> None:
        chosen = {name: round_bits(t, bits) if name.startswith(prefix) else t for name, t in weights.items()}
        super().__init__(program, chosen)
        answers = {op.inputs[0] for op in program.ops if isinstance(op, Slice)} | {*program.outputs}
        features = {name for op in program.ops for name in op.inputs if not isinstance(op, Slice)}
        for index, op in enumerate(program.ops):
            if any(name.startswith(prefix) for name in op.weights) and op.output not in answers - features:
                self._runs[index] = self._rounding(self._runs[index], bits)
        first = next(op for op in program.ops if program.input in op.inputs)
        self._bits = bits if any(name.startswith(prefix) for name in first.weights) else None

    @staticmethod
    def _rounding(run: Run, bits: int) -> Run:
        def rounded(inputs: Sequence[Tensor], out: Tensor | None) -> Tensor:
            result = run(inputs, out)
            return result.copy_(round_bits(result, bits))

        return rounded

    def __call__(self, x: Tensor) -> list[Tensor]:
        return super().__call__(x if self._bits is None else round_bits(x.float(), self._bits))


def make_rounding(subject: Subject, bits: int, prefix: str = "") -> Engine:
    """An engine on the native plan in fp32 that rounds."""

    def make(program: Program, weights: Mapping[str, Tensor]) -> RoundingExecutor:
        return RoundingExecutor(program, weights, bits, prefix)

    plan, spec = subject.native_plan, subject.spec
    trunk = NativeTrunk(*unpack_part("trunk", plan.parts), spec, make_executor=make)
    return Engine(Pipeline(spec, trunk, NativeHead(*unpack_part("head", plan.parts), spec, make_executor=make)))


def contestants(subject: Subject) -> Iterator[tuple[str, Callable[[], Engine]]]:
    for precision in ("fp32", *(["bf16"] if has_bfloat16() else []), "fp16"):
        yield f"native {precision}", lambda p=precision: Engine.from_plan(subject.build("native", p))  # type: ignore[misc]
    for bits in BITS:
        yield f"rounded to {bits} bits", lambda b=bits: make_rounding(subject, b)  # type: ignore[misc]
    for part, prefix in PARTS.items():
        yield f"{part} rounded to {HALF_BITS} bits", lambda p=prefix: make_rounding(subject, HALF_BITS, p)  # type: ignore[misc]
    for multiple in BUCKETS:
        yield f"padded to multiples of {multiple}", lambda m=multiple: Engine.from_plan(subject.plan, buckets=m)  # type: ignore[misc]


def compare(subject: Subject, truth: CocoGroundTruth, images: dict[int, Pixels]) -> Iterator[dict[str, Any]]:
    """A row for each contestant."""
    exact = Engine.from_plan(subject.plan)
    expected = detect_all(exact, images)
    everything = {
        image_id: Found.of(exact(image, nms_threshold=1.0, max_detections=1000)[0])
        for image_id, image in images.items()
    }
    gaps = [gap for image_id, wanted in expected.items() for gap in find_gaps(wanted, everything[image_id])]
    rivals = [{"below": limit, "detections": sum(gap < limit for gap in gaps)} for limit in GAPS]
    own = score(expected, subject, truth).AP
    for name, make in contestants(subject):
        found = detect_all(make(), images)
        lost = tied = 0
        for image_id, wanted in expected.items():
            missing = find_lost(found[image_id], wanted)
            lost += len(missing)
            tied += sum(is_tie(number, found[image_id], wanted, everything[image_id]) for number in missing)
        precision = score(found, subject, truth).AP
        yield {
            "what": f"{name}, against fp32 at own sizes",
            "images": len(images),
            "detections": len(gaps),
            "from_score": SURE,
            "without_twin": lost,
            "with_twin": len(gaps) - lost,
            "share_without_twin": round(lost / len(gaps), 3),
            "tied": tied,
            "tied_below": TIE,
            "score_changes": describe_changes(found, expected),
            "rivals": rivals,
            "twin": {"iou": TWIN_IOU, "score": TWIN_SCORE},
            "median_shift_px": float(f"{np.median(list(shifts(found, expected))):.2g}"),
            "AP": round(precision, 4),
            "AP_own": round(own, 4),
            "AP_points_change": round(100 * abs(precision - own), 1),
        }


def find_gaps(wanted: Found, candidates: Found) -> Iterator[float]:
    """By how much each sure detection has a higher score than the best box that NMS dropped for it and is no twin."""
    for box, confidence, label in zip(wanted.boxes, wanted.scores, wanted.labels, strict=True):
        overlaps = iou(box, candidates.boxes)
        rivals = (candidates.labels == label) & (overlaps > NMS_IOU) & (overlaps < TWIN_IOU)
        if confidence >= SURE:
            yield float((confidence - candidates.scores[rivals]).min(initial=np.inf))


def describe_changes(found: dict[int, Found], expected: dict[int, Found]) -> dict[str, float]:
    """How far the scores of sure detections are from those of the boxes that overlap them by TWIN_IOU."""
    changes = []
    for image_id, wanted in expected.items():
        ours = found[image_id]
        for box, confidence, label in zip(wanted.boxes, wanted.scores, wanted.labels, strict=True):
            near = (ours.labels == label) & (iou(box, ours.boxes) >= TWIN_IOU)
            if confidence >= SURE and near.any():
                changes.append(float(np.abs(ours.scores[near] - confidence).min()))
    median, most = np.percentile(changes, [50, 95])
    return {"median": float(f"{median:.1e}"), "p95": float(f"{most:.1e}")}


def shifts(found: dict[int, Found], expected: dict[int, Found]) -> Iterator[float]:
    """How far the corners of each sure detection are from those of the box that overlaps it most, at the most."""
    for image_id, wanted in expected.items():
        ours = found[image_id].boxes
        for box, confidence in zip(wanted.boxes, wanted.scores, strict=True):
            if confidence >= SURE and len(ours):
                yield float(np.abs(ours[int(iou(box, ours).argmax())] - box).max())


def main() -> None:
    given = read_photographs("benchmarks.tolerances", __doc__)
    rows = []
    for row in compare(given.subject, given.truth, given.images):
        rows.append({**row, **given.run})
        print(json.dumps(row), file=sys.stderr, flush=True)
        given.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
