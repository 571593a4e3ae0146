"""The blood-cell detector and its photographs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fpn_engine.annotations import CocoGroundTruth, load_annotations
from fpn_export.checkpoint import load_checkpoint
from tests.parity.subject import Subject
from tests.parity.torchvision_oracle import Pixels


@pytest.fixture(scope="session")
def bccd(shared_dir: Path) -> Subject:
    """The trained R18-FPN, loaded from its checkpoint."""
    checkpoint = load_checkpoint(shared_dir / "checkpoints" / "bccd_r18_fpn.pth")
    return Subject(checkpoint.spec, checkpoint.model, checkpoint.shape.representation_size)


@pytest.fixture(scope="session")
def bccd_truth(shared_dir: Path) -> CocoGroundTruth:
    """The annotations of the test split."""
    return load_annotations(shared_dir / "data" / "bccd" / "instances_test.json")


@pytest.fixture(scope="session")
def photographs(shared_dir: Path, bccd_truth: CocoGroundTruth) -> dict[int, Pixels]:
    """The test split by image id, decoded once: decoders differ by a grey level or two."""
    folder = shared_dir / "data" / "bccd" / "images"
    return {image.id: np.array(Image.open(folder / image.file_name).convert("RGB")) for image in bccd_truth.images}
