"""How close the plan and the ONNX file are to torchvision, in figures.

    python -m benchmarks.parity model.pth annotations.json images/ -o benchmarks/results/parity.json

Detects in every annotated image with torchvision itself, with the plan and with ONNX Runtime alone, all from the same
decoded pixels, pairs the detections one to one and scores each with the COCO metric.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from benchmarks.photographs import read_photographs
from fpn_engine.annotations import CocoGroundTruth
from tests.parity.subject import Subject
from tests.parity.test_photographs import FORMS, detect_with, score
from tests.parity.torchvision_oracle import Comparison, Oracle, Pixels


def compare(subject: Subject, truth: CocoGroundTruth, images: dict[int, Pixels]) -> list[dict[str, Any]]:
    """One row for each form of the model."""
    oracle: Oracle = subject.oracle()
    expected = {image_id: oracle.detect(image) for image_id, image in images.items()}
    rows = []
    for form in FORMS:
        detect = detect_with(form, subject, oracle)
        actual = {image_id: detect(image) for image_id, image in images.items()}
        comparison = Comparison()
        for image_id, image in images.items():
            comparison.assert_twins(actual[image_id], expected[image_id], oracle.wavering(image), name=str(image_id))
        rows.append(
            {
                "what": f"{form}, fp32, against torchvision",
                "images": len(images),
                "detections": comparison.found,
                "without_twin_by_ties": comparison.tied,
                "largest_score_difference": float(f"{comparison.score:.2g}"),
                "largest_corner_difference_px": float(f"{comparison.corner:.2g}"),
                "AP": round(score(actual, subject, truth).AP, 6),
                "AP_torchvision": round(score(expected, subject, truth).AP, 6),
            }
        )
    return rows


def main() -> None:
    given = read_photographs("benchmarks.parity", __doc__)
    rows = [{**row, **given.run} for row in compare(given.subject, given.truth, given.images)]
    given.output.write_text(json.dumps(rows, indent=1) + "\n")
    json.dump(rows, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
