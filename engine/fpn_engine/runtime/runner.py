"""Runners: what takes a group of images of one padded size through the pipeline; this one does it at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from fpn_engine.masks.pipeline import MaskPipeline
from fpn_engine.pipeline import Pipeline, Proposals
from fpn_engine.tasks import Group, PaddedDetections, PaddedMasks, Ready, Task
from fpn_kernels import pack_images

AnyPipeline = Pipeline | MaskPipeline


class EagerRunner:
    """Runs operation by operation, a group at a time, in the thread that submits it; on the CPU or any device."""

    depth = 0

    def __init__(self, pipeline: AnyPipeline) -> None:
        self._pipeline = pipeline

    def submit(self, group: Group, task: Task) -> Ready:
        device = self._pipeline.device
        images = [image if isinstance(image, torch.Tensor) else _wrap(image) for image in group.images]
        if any(isinstance(image, torch.Tensor) for image in group.images):
            images = [image.to(device) for image in images]
        packed = pack_images(images)
        packed = packed._replace(**{name: part.to(device) for name, part in packed._asdict().items()})
        image_sizes = torch.tensor(group.image_sizes, dtype=torch.int64).to(device)
        given = None if group.given is None else pad_boxes(group.given, device)
        with torch.inference_mode():
            batch = self._pipeline.preprocess(packed, image_sizes, task.padded_size)
            found = self._pipeline.run(batch, image_sizes, task, given)
            if isinstance(found, PaddedMasks):  # pasted into the image where they are
                return Ready(found)
            return Ready(PaddedDetections(*(part.cpu() for part in found)))

    def warm(self, group: Group, task: Task) -> None:
        self.submit(group, task)


def _wrap(pixels: NDArray[np.uint8]) -> torch.Tensor:
    """The same memory; a copy of what is read-only, as arrays of Pillow's images are: torch warns of those."""
    return torch.from_numpy(pixels if pixels.flags.writeable else pixels.copy())


def pad_boxes(given: Sequence[NDArray[np.float32]], device: torch.device) -> Proposals:
    """Each image's boxes as proposals on ``device``, padded to one length of at least 1."""
    capacity = max(1, *(len(boxes) for boxes in given))
    padded = torch.zeros(len(given), capacity, 4)
    for row, boxes in enumerate(given):
        padded[row, : len(boxes)] = torch.from_numpy(boxes)
    counts = torch.tensor([len(boxes) for boxes in given], dtype=torch.int64)
    return Proposals.given(padded.to(device), counts.to(device))
