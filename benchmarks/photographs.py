"""A checkpoint and annotated photographs: what parity and tolerances are measured on."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from benchmarks.provenance import describe_run
from fpn_engine.annotations import CocoGroundTruth, load_annotations
from fpn_export.checkpoint import load_checkpoint
from tests.parity.subject import Subject
from tests.parity.torchvision_oracle import Pixels


class Photographs(NamedTuple):
    """As the command line names them; ``run``: the provenance of what is measured on them. ``folder``: their files."""

    subject: Subject
    truth: CocoGroundTruth
    images: dict[int, Pixels]
    run: dict[str, Any]
    output: Path
    folder: Path


def read_photographs(module: str, about: str | None) -> Photographs:
    """Of the command line ``python -m MODULE CHECKPOINT ANNOTATIONS IMAGES -o OUTPUT``."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("annotations", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    given = parser.parse_args()
    checkpoint = load_checkpoint(given.checkpoint)
    truth = load_annotations(given.annotations)
    names = [given.checkpoint.name, given.annotations.name, f"{given.images.name}/"]
    return Photographs(
        Subject(checkpoint.spec, checkpoint.model, checkpoint.shape.representation_size),
        truth,
        {i.id: np.array(Image.open(given.images / i.file_name).convert("RGB")) for i in truth.images},
        describe_run(shlex.join(["python", "-m", module, *names])),
        given.output,
        given.images,
    )
