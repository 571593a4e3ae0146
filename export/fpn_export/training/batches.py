"""Batches: which images each update sees, and how they enter the network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from fpn_engine.errors import FpnEngineError
from fpn_engine.masks.spec import MaskSpec
from fpn_engine.resizing import padded_size, resized_size
from fpn_engine.spec import ModelSpec
from fpn_engine.work import Pixels
from fpn_export.training.augmentation import augment
from fpn_export.training.examples import Example, Examples
from fpn_export.training.randomness import AUGMENTATION, ORDER, random_state
from fpn_export.training.recipe import Recipe
from fpn_export.training.targets import Objects
from fpn_kernels import pack_images, preprocess


class Batch(NamedTuple):
    """One update's images on one process.

    Attributes:
        images: (N, 3, H, W) float32, normalised and padded. image_sizes: (N, 2) int64, resized height and width.
        objects: of each image, boxes in pixels of the resized image.
        proposals: (R_n, 4) float32 of each image in pixels of the resized image, or None.
    """

    images: Tensor
    image_sizes: Tensor
    objects: list[Objects]
    proposals: list[Tensor] | None

    def to(self, device: torch.device) -> Batch:
        return Batch(
            self.images.to(device, non_blocking=True),
            self.image_sizes.to(device, non_blocking=True),
            [Objects(*(t.to(device, non_blocking=True) for t in objects)) for objects in self.objects],
            None if self.proposals is None else [p.to(device, non_blocking=True) for p in self.proposals],
        )


class Place(NamedTuple):
    """An image's place in a run: the image, and which update and slot of the batch see it."""

    image: int
    step: int
    slot: int


class BatchOrder(Sampler[list[Place]]):
    """The images of each update from ``first_step`` on, those of process ``rank`` of ``world_size``.

    Every epoch is a new permutation; upright and wide images go into separate batches, which keeps padding small.
    What is left over of an orientation at the end of an epoch waits for the next. The order depends on the recipe
    alone, so a run may be taken up anywhere.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        recipe: Recipe,
        *,
        first_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if recipe.batch_size % world_size:
            raise ValueError(f"a batch of {recipe.batch_size} does not divide among {world_size} processes")
        self._upright = [height > width for height, width in shapes]
        self._recipe, self._first_step = recipe, first_step
        share = recipe.batch_size // world_size
        self._slots = slice(rank * share, (rank + 1) * share)

    def __len__(self) -> int:
        return max(0, self._recipe.steps - self._first_step)

    def __iter__(self) -> Iterator[list[Place]]:
        for step, batch in zip(range(self._recipe.steps), self._batches(), strict=False):
            if step >= self._first_step:
                yield [Place(index, step, slot) for slot, index in list(enumerate(batch))[self._slots]]

    def _batches(self) -> Iterator[list[int]]:
        waiting: tuple[list[int], list[int]] = ([], [])
        epoch = 0
        while True:
            for index in random_state(self._recipe.seed, ORDER, epoch).permutation(len(self._upright)).tolist():
                queue = waiting[self._upright[index]]
                queue.append(index)
                if len(queue) == self._recipe.batch_size:
                    yield list(queue)
                    queue.clear()
            epoch += 1


class _Returning(Dataset[Any]):
    """Examples, or the FpnEngineError that one of them raised, whose sentence a worker's traceback would wrap."""

    def __init__(self, examples: Dataset[Any]) -> None:
        self._examples = examples

    def __getitem__(self, place: Place) -> Any:
        try:
            return self._examples[place]
        except FpnEngineError as error:
            return error


class _UnlessFailed:
    """A batch of examples, or the first error among them."""

    def __init__(self, collate: Callable[[Sequence[Any]], Any]) -> None:
        self._collate = collate

    def __call__(self, drawn: Sequence[Any]) -> Any:
        failed = [error for error in drawn if isinstance(error, FpnEngineError)]
        return failed[0] if failed else self._collate(drawn)


@contextmanager
def readers_named(then: str = "") -> Iterator[None]:
    """In it, torch's RuntimeError for a reader that died is an FpnEngineError of one sentence, which ends in ``then``.

    torch notices the death by a signal, so the error comes from wherever this process is, not only from a read.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise FpnEngineError(
            f"a process that reads images ahead was killed, perhaps for want of memory; fewer --workers need less{then}"
        ) from None


def read_batches(
    examples: Dataset[Any], order: BatchOrder, collate: Callable[[Sequence[Any]], Any], workers: int
) -> Iterator[Any]:
    """What ``collate`` makes of the examples of each update; ``workers`` processes read ahead, 0 reads at once.

    Raises: FpnEngineError as ``examples`` raised it, in whatever process, and for a process that was killed.
    """
    loader: DataLoader[Any] = DataLoader(
        _Returning(examples), batch_sampler=order, collate_fn=_UnlessFailed(collate), num_workers=workers
    )
    with readers_named():
        for batch in loader:
            if isinstance(batch, FpnEngineError):
                raise batch
            yield batch


class _Augmented(Dataset[tuple[Example, float]]):
    def __init__(self, examples: Examples, recipe: Recipe) -> None:
        self._examples, self._recipe = examples, recipe

    def __getitem__(self, place: Place) -> tuple[Example, float]:
        random = random_state(self._recipe.seed, AUGMENTATION, place.step, place.slot)
        return augment(self._examples[place.image], self._recipe, random)


def assemble(
    pixels: Sequence[Pixels], factors: Sequence[float], spec: ModelSpec | MaskSpec
) -> tuple[Tensor, list[tuple[int, int]]]:
    """(N, 3, H, W) float32, resized by ``factors`` beside the usual, normalised and padded, and the resized sizes."""
    sizes = [
        resized_size(image.shape[0], image.shape[1], round(spec.min_size * factor), round(spec.max_size * factor))
        for image, factor in zip(pixels, factors, strict=True)
    ]
    images = preprocess(
        *pack_images([torch.from_numpy(image) for image in pixels]),
        torch.tensor(sizes, dtype=torch.int64),
        padded_size((max(h for h, _ in sizes), max(w for _, w in sizes)), spec.size_divisor),
        spec.image_mean,
        spec.image_std,
        reverse_channels=spec.channel_order == "bgr",
    )
    return images, sizes


class _Collate:
    """Resize, normalise and pad as inference does."""

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec

    def __call__(self, drawn: Sequence[tuple[Example, float]]) -> Batch:
        images, sizes = assemble([e.pixels for e, _ in drawn], [factor for _, factor in drawn], self._spec)
        objects, proposals = [], []
        for (example, _), (h, w) in zip(drawn, sizes, strict=True):
            ratio = np.array([w, h, w, h], np.float32) / np.array(example.pixels.shape[1::-1] * 2, np.float32)
            objects.append(Objects(torch.from_numpy(example.boxes * ratio), torch.from_numpy(example.labels)))
            if example.proposals is not None:
                proposals.append(torch.from_numpy(example.proposals * ratio))
        return Batch(images, torch.tensor(sizes, dtype=torch.int64), objects, proposals or None)


def load_batches(
    examples: Examples,
    spec: ModelSpec,
    recipe: Recipe,
    *,
    first_step: int = 0,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
) -> Iterator[Batch]:
    """A :class:`Batch` for each update from ``first_step`` on, as :func:`read_batches` reads them."""
    order = BatchOrder(examples.shapes, recipe, first_step=first_step, rank=rank, world_size=world_size)
    return read_batches(_Augmented(examples, recipe), order, _Collate(spec), workers)
