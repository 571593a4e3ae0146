"""Batches with masks: as the detectors' batches, with the objects' masks beside their boxes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fpn_engine.masks.run_lengths import Masks
from fpn_engine.masks.spec import MaskSpec
from fpn_engine.proposals import Boxes
from fpn_export.masks.examples import MaskExample, MaskExamples
from fpn_export.training.augmentation import augment
from fpn_export.training.batches import BatchOrder, Place, assemble, read_batches
from fpn_export.training.examples import Example
from fpn_export.training.randomness import AUGMENTATION, random_state
from fpn_export.training.recipe import Recipe


class MaskObjects(NamedTuple):
    """Ground truth of one image.

    Attributes: boxes: (M, 4) float32 around the masks, in pixels of the resized image. masks: (M, H, W) bool of the
        image as it is. scale: (2,) float32, pixels of the image per pixel of the resized one, along x and y.
    """

    boxes: Tensor
    masks: Tensor
    scale: Tensor


class MaskBatch(NamedTuple):
    """One update's images on one process: (N, 3, H, W) float32, normalised and padded, and the objects of each."""

    images: Tensor
    objects: list[MaskObjects]

    def to(self, device: torch.device) -> MaskBatch:
        moved = [MaskObjects(*(part.to(device, non_blocking=True) for part in one)) for one in self.objects]
        return MaskBatch(self.images.to(device, non_blocking=True), moved)


def find_boxes(masks: Masks) -> Boxes:
    """(M, 4) float32, x1 y1 x2 y2 around masks that are not empty, half-open."""
    columns, rows = np.asarray(masks.any(axis=1)), np.asarray(masks.any(axis=2))
    (x1, x2), (y1, y2) = (
        (lines.argmax(axis=1), lines.shape[1] - lines[:, ::-1].argmax(axis=1)) for lines in (columns, rows)
    )
    return np.stack([x1, y1, x2, y2], axis=1).astype(np.float32)


class _Augmented(Dataset[tuple[MaskExample, float]]):
    """Flipped here, masks and all; the rest as the detectors' examples."""

    def __init__(self, examples: MaskExamples, recipe: Recipe) -> None:
        self._examples, self._flip = examples, recipe.flip
        self._recipe = dataclasses.replace(recipe, flip=0.0)

    def __getitem__(self, place: Place) -> tuple[MaskExample, float]:
        random = random_state(self._recipe.seed, AUGMENTATION, place.step, place.slot)
        pixels, masks = self._examples[place.image]
        if random.uniform() < self._flip:
            pixels, masks = pixels[:, ::-1], masks[:, :, ::-1]
        none = Example(pixels, np.zeros((0, 4), np.float32), np.zeros(0, np.int64))
        brightened, factor = augment(none, self._recipe, random)
        return MaskExample(brightened.pixels, np.ascontiguousarray(masks)), factor


class _Collate:
    """Resize, normalise and pad as inference does."""

    def __init__(self, spec: MaskSpec) -> None:
        self._spec = spec

    def __call__(self, drawn: Sequence[tuple[MaskExample, float]]) -> MaskBatch:
        images, sizes = assemble([e.pixels for e, _ in drawn], [factor for _, factor in drawn], self._spec)
        objects = []
        for (example, _), (h, w) in zip(drawn, sizes, strict=True):
            scale = np.array([example.pixels.shape[1] / w, example.pixels.shape[0] / h], np.float32)
            boxes = find_boxes(example.masks) / np.tile(scale, 2)
            objects.append(MaskObjects(*map(torch.from_numpy, (boxes, example.masks, scale))))
        return MaskBatch(images, objects)


def load_mask_batches(
    examples: MaskExamples,
    spec: MaskSpec,
    recipe: Recipe,
    *,
    first_step: int = 0,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
) -> Iterator[MaskBatch]:
    """A :class:`MaskBatch` for each update from ``first_step`` on, as ``read_batches`` reads them."""
    order = BatchOrder(examples.shapes, recipe, first_step=first_step, rank=rank, world_size=world_size)
    return read_batches(_Augmented(examples, recipe), order, _Collate(spec), workers)
