"""The bundled model on scenes that nothing was trained or chosen on.

    python -m benchmarks.score_bundled --work FOLDER -o benchmarks/results/demo.json
    python -m benchmarks.score_bundled --work FOLDER --checkpoint last.pth --what "torchvision's" -o yardstick.json

Draws 500 scenes of a seed of their own into FOLDER, unless they are there, detects in them in fp32 and scores with the
COCO metric, per class too. Another checkpoint can take the bundled model's place.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import sys
import time
from pathlib import Path

from benchmarks.ablations import draw
from benchmarks.provenance import describe_run
from fpn_engine.annotations import load_annotations
from fpn_engine.files import replacing
from fpn_export.bundled import CHECKPOINT
from fpn_export.checkpoint import load_checkpoint
from fpn_export.scenes.dataset import IMAGES
from fpn_export.training.validation import CocoValidation

TRAINED = ("trained_with", "steps", "step", "minutes", "minutes_of", "batch", "decay", "reached")
SEED = 500  # training takes 1, 3 and 4, validation 2, the ablations 101 and 102


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the scenes")
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="default: the bundled model")
    parser.add_argument("--what", default="the bundled model", help="what the result calls it")
    parser.add_argument("-o", "--output", type=Path, required=True)
    given = parser.parse_args()
    path = draw(given.work, SEED, given.scenes)
    loaded, truth = load_checkpoint(given.checkpoint), load_annotations(path)
    if len(truth.images) != given.scenes:
        parser.error(f"{given.work} holds {len(truth.images)} scenes, not {given.scenes}; give another folder")
    began = time.perf_counter()
    score = CocoValidation(truth, path.parent / IMAGES)(loaded.model).to_dict()
    about = json.loads(given.checkpoint.with_suffix(".json").read_text())["about"]
    per_class = {name: round(value, 4) for name, value in score.pop("per_class").items()}
    command = ["python", "-m", "benchmarks.score_bundled", "--work", "FOLDER", "--scenes", str(given.scenes)]
    if given.checkpoint != CHECKPOINT:
        command += ["--checkpoint", given.checkpoint.name, "--what", given.what]
    row = {
        "what": f"{given.what} on {given.scenes} fresh scenes",
        "scenes": given.scenes,
        "seed": SEED,
        "score": {**{name: round(value, 4) for name, value in score.items()}, "per_class": per_class},
        "minutes": round((time.perf_counter() - began) / 60, 1),
        "sha256": hashlib.sha256(given.checkpoint.read_bytes()).hexdigest(),
        "trained": {name: about[name] for name in TRAINED if name in about},
        **describe_run(shlex.join(command)),
    }
    with replacing(given.output) as temporary:
        temporary.write_text(json.dumps([row], indent=1) + "\n")
    json.dump(row, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
