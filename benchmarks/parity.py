"""How close the plan and the ONNX file are to torchvision, in figures.

    python -m benchmarks.parity model.pth annotations.json images/ -o benchmarks/results/parity.json

Detects in every annotated image with torchvision itself, with the plan and with ONNX Runtime alone, all from the same
decoded pixels, pairs the detections one to one and scores each with the COCO metric.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.provenance import describe_run
from fpn_engine.annotations import CocoGroundTruth, load_annotations
from fpn_export.checkpoint import load_checkpoint
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("annotations", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    given = parser.parse_args()
    checkpoint = load_checkpoint(given.checkpoint)
    subject = Subject(checkpoint.spec, checkpoint.model, checkpoint.shape.representation_size)
    truth = load_annotations(given.annotations)
    images = {i.id: np.array(Image.open(given.images / i.file_name).convert("RGB")) for i in truth.images}
    names = [given.checkpoint.name, given.annotations.name, f"{given.images.name}/"]
    run = describe_run(shlex.join(["python", "-m", "benchmarks.parity", *names]))
    rows = [{**row, **run} for row in compare(subject, truth, images)]
    given.output.write_text(json.dumps(rows, indent=1) + "\n")
    json.dump(rows, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
