"""How far detections move by another JPEG decoder: one that repeats the chroma of 4:2:0 instead of interpolating it.

    python -m benchmarks.decoding model.pth annotations.json images/ -o benchmarks/results/decoding.json

That is libjpeg at its fastest, which also rounds its cosine transform more coarsely. nvJPEG with the flags that
TorchCodec gives it may decode so or better; it has not been compared. Against libjpeg as Pillow has it, in every
annotated image, on ONNX Runtime in fp32; a twin has the same class, IoU 0.95 and a score within 0.02.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.photographs import Photographs, read_photographs
from benchmarks.tolerances import shifts
from fpn_engine.engine import Engine
from tests.parity.test_native import SURE, TWIN_IOU, TWIN_SCORE, detect_all, find_lost
from tests.parity.test_photographs import score
from tests.parity.torchvision_oracle import Pixels

FASTEST = (1, 1)  # Pillow's decoder at full size in draft mode: no "fancy" upsampling, the fastest cosine transform
LEVELS = 3  # what TorchCodec's own tests allow nvJPEG to differ from libjpeg by, in 99 % of values


def read_fast(path: Path) -> Pixels:
    """(H, W, 3) uint8 RGB."""
    with Image.open(path) as image:
        image.decoderconfig = FASTEST  # type: ignore[attr-defined]
        return np.array(image.convert("RGB"))


def compare(given: Photographs, folder: Path) -> dict[str, Any]:
    engine = Engine.from_plan(given.subject.plan)
    fast = {image.id: read_fast(folder / image.file_name) for image in given.truth.images}
    expected, found = detect_all(engine, given.images), detect_all(engine, fast)
    lost = sum(len(find_lost(found[number], wanted)) for number, wanted in expected.items())
    sure = sum(int((wanted.scores >= SURE).sum()) for wanted in expected.values())
    levels = np.concatenate([np.abs(fast[n].astype(int) - given.images[n]).ravel() for n in fast])
    own, other = (score(each, given.subject, given.truth).AP for each in (expected, found))
    return {
        "what": "chroma repeated, against interpolated",
        "images": len(fast),
        "levels": {
            "mean": round(float(levels.mean()), 2),
            "above": LEVELS,
            "share_above": round(float((levels > LEVELS).mean()), 3),
            "most": int(levels.max()),
        },
        "detections": sure,
        "from_score": SURE,
        "without_twin": lost,
        "share_without_twin": round(lost / sure, 3),
        "twin": {"iou": TWIN_IOU, "score": TWIN_SCORE},
        "median_shift_px": float(f"{np.median(list(shifts(found, expected))):.2g}"),
        "AP": round(other, 4),
        "AP_own": round(own, 4),
        "AP_points_change": round(100 * abs(other - own), 1),
        **given.run,
    }


def main() -> None:
    given = read_photographs("benchmarks.decoding", __doc__)
    row = compare(given, given.folder)
    print(json.dumps(row), file=sys.stderr)
    given.output.write_text(json.dumps([row], indent=1) + "\n")


if __name__ == "__main__":
    main()
