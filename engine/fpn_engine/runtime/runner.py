"""Runners: what takes a group of images of one padded size through the pipeline; this one does it at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from fpn_engine.pipeline import PaddedDetections, Pipeline, Proposals, Thresholds
from fpn_kernels import pack_images


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is done with images of one padded size: (h, w) in pixels.

    ``thresholds`` are those of the detections; None asks for the RPN's proposals instead, at the spec's own.
    """

    padded_size: tuple[int, int]
    thresholds: Thresholds | None


class Group(NamedTuple):
    """Images that share a padded size.

    Attributes:
        images: each (H, W, 3) uint8. image_sizes: resized (h, w) of each before padding.
        given: for a Fast R-CNN, the boxes (n, 4) float32 of each in pixels of the resized image.
    """

    images: Sequence[NDArray[np.uint8]]
    image_sizes: Sequence[tuple[int, int]]
    given: Sequence[NDArray[np.float32]] | None = None


class Pending(Protocol):
    """A result that is on its way."""

    def wait(self) -> PaddedDetections:
        """What was found, in host memory, a row per image. Waits for the device; any number of times."""
        ...


class Runner(Protocol):
    """Runs groups of images; several threads may call it.

    Attributes:
        depth: groups that may be under way before the oldest is waited for; 0 where a group is done when it is
            submitted.
    """

    depth: int

    def submit(self, group: Group, task: Task) -> Pending:
        """Begin; waits for nothing but room."""
        ...

    def warm(self, group: Group, task: Task) -> None:
        """Prepare for groups like this one."""
        ...


class Ready:
    """A result that is there."""

    def __init__(self, found: PaddedDetections) -> None:
        self._found = found

    def wait(self) -> PaddedDetections:
        return self._found


class EagerRunner:
    """Runs operation by operation, a group at a time, in the thread that submits it; on the CPU or any device."""

    depth = 0

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline

    def submit(self, group: Group, task: Task) -> Ready:
        device = self._pipeline.device
        packed = pack_images([torch.from_numpy(image) for image in group.images])
        packed = packed._replace(**{name: part.to(device) for name, part in packed._asdict().items()})
        image_sizes = torch.tensor(group.image_sizes, dtype=torch.int64).to(device)
        given = None if group.given is None else pad_boxes(group.given, device)
        with torch.inference_mode():
            batch = self._pipeline.preprocess(packed, image_sizes, task.padded_size)
            found = run_task(self._pipeline, batch, image_sizes, task, given)
            return Ready(PaddedDetections(*(part.cpu() for part in found)))

    def warm(self, group: Group, task: Task) -> None:
        self.submit(group, task)


def run_task(
    pipeline: Pipeline, batch: torch.Tensor, image_sizes: torch.Tensor, task: Task, given: Proposals | None
) -> PaddedDetections:
    """The task on a preprocessed batch; arguments as of :class:`Pipeline`'s call."""
    if task.thresholds is None:
        return pipeline.find_proposals(batch, image_sizes)
    return pipeline(batch, image_sizes, task.thresholds, given)


def pad_boxes(given: Sequence[NDArray[np.float32]], device: torch.device) -> Proposals:
    """Each image's boxes as proposals on ``device``, padded to one length of at least 1."""
    capacity = max(1, *(len(boxes) for boxes in given))
    padded = torch.zeros(len(given), capacity, 4)
    for row, boxes in enumerate(given):
        padded[row, : len(boxes)] = torch.from_numpy(boxes)
    counts = torch.tensor([len(boxes) for boxes in given], dtype=torch.int64)
    return Proposals.given(padded.to(device), counts.to(device))
