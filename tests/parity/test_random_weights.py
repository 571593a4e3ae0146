"""Random weights, so that parity does not hang on one checkpoint: R18, R50 and R101, alone and in mixed batches."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from fpn_engine.resizing import padded_size, resized_size
from tests.parity.random_detector import largest_activation, make_picture
from tests.parity.subject import Subject, found_in, preprocess_together, random_subject, run_onnx
from tests.parity.torchvision_oracle import Comparison, Found, Oracle, Pixels

ARCHITECTURES = ("resnet18", "resnet50", "resnet101")
# Several share a padded size but not the size before padding; odd sides, portrait and 1:3 both ways.
SIZES = [(120, 160), (97, 131), (160, 120), (300, 100), (101, 303), (91, 99), (150, 200), (333, 411), (100, 133)]
ENOUGH = 50


@cache
def pictures() -> list[Pixels]:
    return [make_picture(h, w, seed=10 + i) for i, (h, w) in enumerate(SIZES)]


@cache
def oracle_of(arch: str) -> Oracle:
    return random_subject(arch).oracle()


@cache
def expected_of(arch: str) -> list[Found]:
    return [oracle_of(arch).detect(picture) for picture in pictures()]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_weights_prove_something(arch: str) -> None:
    assert max(largest_activation(oracle_of(arch).model, picture) for picture in pictures()) < 100
    for found in expected_of(arch):
        assert len(found.scores) >= ENOUGH
        assert len(set(found.labels.tolist())) >= 2
    counts = [len(found.scores) for found in expected_of(arch)]
    assert min(counts) < random_subject(arch).spec.box_detections_per_img, "the score threshold is never reached"


@pytest.mark.parametrize(("arch", "batch_size"), [("resnet18", 1), *((arch, 4) for arch in ARCHITECTURES)])
def test_plan(arch: str, batch_size: int) -> None:
    """All in one call, which the engine groups into batches by padded size."""
    ours = random_subject(arch).engine(batch_size=batch_size)(pictures())
    assert_parity(arch, [Found.of(detections) for detections in ours])


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_onnx_file(arch: str) -> None:
    """ONNX Runtime alone, images of one padded size together."""
    subject = random_subject(arch)
    found: dict[int, Found] = {}
    for indices in groups(subject):
        chosen = [pictures()[i] for i in indices]
        batch, sizes = preprocess_together(chosen, subject.spec)
        outputs = run_onnx(subject.session, batch, sizes.tolist())
        for row, index in enumerate(indices):
            found[index] = found_in(outputs, row, chosen[row].shape[:2], sizes[row].tolist())
    assert_parity(arch, [found[i] for i in range(len(SIZES))])


def test_module() -> None:
    """The PyTorch detector that everything is exported from."""
    subject = random_subject("resnet18")
    found = []
    for picture in pictures():
        batch, sizes = preprocess_together([picture], subject.spec)
        with torch.inference_mode():
            outputs = subject.model(batch, sizes)
        arrays = {name: value.numpy() for name, value in outputs._asdict().items()}
        found.append(found_in(arrays, 0, picture.shape[:2], sizes[0].tolist()))
    assert_parity("resnet18", found)


def groups(subject: Subject) -> list[list[int]]:
    """Indices of the pictures by padded size."""
    by_size: dict[tuple[int, int], list[int]] = {}
    for index, (h, w) in enumerate(SIZES):
        size = resized_size(h, w, subject.spec.min_size, subject.spec.max_size)
        by_size.setdefault(padded_size(size), []).append(index)
    resized = {
        resized_size(*SIZES[i], subject.spec.min_size, subject.spec.max_size) for i in max(by_size.values(), key=len)
    }
    assert len(by_size) >= 4
    assert len(resized) >= 2, "a batch has to mix sizes before padding"
    return list(by_size.values())


def assert_parity(arch: str, ours: list[Found]) -> None:
    comparison = Comparison()
    for picture, found, theirs in zip(pictures(), ours, expected_of(arch), strict=True):
        comparison.assert_twins(found, theirs, oracle_of(arch).wavering(picture), name=str(picture.shape))
    assert comparison.tied <= 0.01 * comparison.found, comparison
