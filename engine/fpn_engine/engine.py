"""Engine: a plan, loaded and ready: images in, detections out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from fpn_engine.backends.loading import load_parts
from fpn_engine.detections import Detections
from fpn_engine.errors import FpnEngineError, ImageError, NonFiniteError, ProposalError
from fpn_engine.images import to_array
from fpn_engine.pipeline import NON_FINITE, PaddedDetections, Pipeline, Proposals, Thresholds
from fpn_engine.plan import Plan, read_plan
from fpn_engine.proposals import Boxes, ProposalBoxes, as_boxes
from fpn_engine.resizing import padded_size, resized_size
from fpn_engine.spec import ModelSpec
from fpn_kernels import pack_images, preprocess

if TYPE_CHECKING:
    from fpn_engine.images import ImageLike

Pixels = NDArray[np.uint8]
NON_FINITE_REASON = "the network gave NaN or infinity; check the checkpoint's weights"


class Outcome(NamedTuple):
    """What became of one image of a stream: its pixels and detections, or the error that was met."""

    source: str
    pixels: Pixels | None
    result: Detections | FpnEngineError


class Engine:
    """Detects objects in images of any size; ``Engine.load("model.plan")(images)``.

    The result of an image does not depend on what else is in the call: images are grouped by their padded size and
    never padded further to fit a batch.

    Args:
        pipeline: the detector; :meth:`load` makes it from a plan, ``FpnDetector.pipeline`` is PyTorch's own.
        batch_size: most images run at once.
    """

    def __init__(self, pipeline: Pipeline, *, batch_size: int = 1) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        self.spec: ModelSpec = pipeline.spec
        self.batch_size = batch_size
        self._pipeline = pipeline

    @classmethod
    def from_plan(cls, plan: Plan, *, batch_size: int = 1, threads: int | None = None) -> Self:
        """Make a plan ready; ``threads`` are the CPU threads of its neural parts, None takes one per core.

        Raises: PlanError if it was built for something else than what is here.
        """
        trunk, head = load_parts(plan, threads)
        return cls(Pipeline(plan.manifest.spec, trunk, head), batch_size=batch_size)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, batch_size: int = 1, threads: int | None = None) -> Self:
        """Read and check a plan. Raises PlanError in one sentence that says how to rebuild."""
        return cls.from_plan(read_plan(Path(path)), batch_size=batch_size, threads=threads)

    def __call__(
        self,
        images: ImageLike | Sequence[ImageLike],
        *,
        proposals: Sequence[ProposalBoxes | ArrayLike] | None = None,
        score_threshold: float | None = None,
        nms_threshold: float | None = None,
        max_detections: int | None = None,
    ) -> list[Detections]:
        """Detect in images given as arrays, PIL images, tensors or paths; one alone counts as a list of one.

        Args:
            images: see :func:`fpn_engine.images.to_array` for what is accepted.
            proposals: for a Fast R-CNN, and only for one: boxes (n, 4) of each image, x1 y1 x2 y2 in its pixels.
            score_threshold, nms_threshold: in 0..1; max_detections: per image. None takes the spec's.
        Returns: one Detections per image, in order, boxes in pixels of the original image.
        Raises: ImageError for an image that cannot be read, ProposalError for proposals that are no such boxes, missing
            or of no use to the model, NonFiniteError if the network gave NaN or infinity.
        """
        thresholds = self.thresholds(score_threshold, nms_threshold, max_detections)
        listed: Sequence[Any] = images if isinstance(images, (list, tuple)) else [images]
        self._check_proposals(proposals is not None)
        given = None if proposals is None else as_boxes(proposals, len(listed))
        results = self._detect(_read_all(listed), thresholds, given)
        found = []
        for number, (image, result) in enumerate(zip(listed, results, strict=True)):
            if isinstance(result, NonFiniteError):
                raise NonFiniteError(f"{_source(image) or f'image {number}'}: {result}")
            found.append(replace(result, source=_source(image)))
        return found

    def stream(
        self,
        paths: Iterable[str | os.PathLike[str]],
        *,
        thresholds: Thresholds | None = None,
        proposals: Callable[[str], ProposalBoxes] | None = None,
        read: Callable[[str | os.PathLike[str]], Pixels] = to_array,
    ) -> Iterator[Outcome]:
        """Detect in files one after another, in order and in bounded memory; a bad file is an outcome, not an end.

        ``proposals`` gives a Fast R-CNN those of the image at a path; what it raises as FpnEngineError is an outcome.
        """
        self._check_proposals(proposals is not None)
        thresholds = thresholds or Thresholds.of(self.spec)
        remaining = iter(paths)
        # A window of several batches, so that mixed sizes still fill batches of one size.
        window = self.batch_size if self.batch_size == 1 else 4 * self.batch_size
        while chunk := list(islice(remaining, window)):
            read_chunk = [_read_with_proposals(path, read, proposals) for path in chunk]
            good = [image for image in read_chunk if not isinstance(image, FpnEngineError)]
            given = [boxes for _, boxes in good if boxes is not None]
            results = iter(self._detect([pixels for pixels, _ in good], thresholds, given if proposals else None))
            for path, item in zip(chunk, read_chunk, strict=True):
                source = os.fspath(path)
                if isinstance(item, FpnEngineError):
                    yield Outcome(source, None, item)
                    continue
                image = item[0]
                result = next(results)
                if isinstance(result, NonFiniteError):
                    yield Outcome(source, image, NonFiniteError(f"{source}: {result}"))
                else:
                    yield Outcome(source, image, replace(result, source=source))

    def propose(self, images: ImageLike | Sequence[ImageLike]) -> list[ProposalBoxes]:
        """The RPN's class-agnostic proposals (Lin et al. 2017, sec. 4.1), at most rpn_post_nms_top_n_test each.

        Raises as a call of the engine does, and ProposalError for a Fast R-CNN.
        """
        if not self.spec.has_rpn:
            raise ProposalError("a Fast R-CNN has no RPN and proposes nothing")
        listed: Sequence[Any] = images if isinstance(images, (list, tuple)) else [images]
        pixels = _read_all(listed)
        found: list[ProposalBoxes | None] = [None] * len(pixels)
        for indices, size in self._batches(pixels):
            chosen = [pixels[i] for i in indices]
            batch, image_sizes = self._preprocess(chosen, size)
            with torch.inference_mode():
                out = self._pipeline.trunk(batch)
                proposals = self._pipeline.propose(out, size, image_sizes)
                finite = self._pipeline.find_finite(out).tolist()
                proposals = Proposals(*(t.cpu() for t in proposals))
            for row, index in enumerate(indices):
                if not finite[row]:
                    raise NonFiniteError(f"{_source(listed[index]) or f'image {index}'}: {NON_FINITE_REASON}")
                n = int(proposals.counts[row])
                ratio = _ratio(pixels[index].shape[:2], image_sizes[row].tolist())
                found[index] = ProposalBoxes(
                    proposals.boxes[row, :n].numpy() * ratio, proposals.scores[row, :n].numpy().copy()
                )
        return [proposal for proposal in found if proposal is not None]

    def thresholds(
        self, score: float | None = None, nms: float | None = None, max_detections: int | None = None
    ) -> Thresholds:
        """The spec's thresholds with those given instead. Raises ValueError outside 0..1 or below one detection."""
        return Thresholds.of(self.spec).override(
            box_score_thresh=score, box_nms_thresh=nms, box_detections_per_img=max_detections
        )

    def _check_proposals(self, given: bool) -> None:
        if given and self.spec.has_rpn:
            raise ProposalError("this model finds its own proposals; proposals are given to a Fast R-CNN only")
        if not given and not self.spec.has_rpn:
            raise ProposalError("this model is a Fast R-CNN, which detects among given proposals; give them too")

    def _detect(
        self, images: Sequence[Pixels], thresholds: Thresholds, given: Sequence[Boxes] | None
    ) -> list[Detections | NonFiniteError]:
        results: list[Detections | NonFiniteError | None] = [None] * len(images)
        for indices, size in self._batches(images):
            chosen = [images[i] for i in indices]
            batch, image_sizes = self._preprocess(chosen, size)
            proposals = None if given is None else self._pack(chosen, [given[i] for i in indices], image_sizes)
            with torch.inference_mode():
                padded = self._pipeline(batch, image_sizes, thresholds, proposals)
                padded = PaddedDetections(*(t.cpu() for t in padded))
            for row, index in enumerate(indices):
                results[index] = self._trim(padded, row, images[index], image_sizes[row])
        return [result for result in results if result is not None]

    def _batches(self, images: Sequence[Pixels]) -> Iterator[tuple[list[int], tuple[int, int]]]:
        """Indices of images that share a padded size, at most batch_size at a time."""
        groups: dict[tuple[int, int], list[int]] = {}
        for index, image in enumerate(images):
            groups.setdefault(padded_size(self._resized(image), self.spec.size_divisor), []).append(index)
        for size, indices in groups.items():
            for start in range(0, len(indices), self.batch_size):
                yield indices[start : start + self.batch_size], size

    def _resized(self, image: Pixels) -> tuple[int, int]:
        return resized_size(image.shape[0], image.shape[1], self.spec.min_size, self.spec.max_size)

    def _preprocess(self, images: Sequence[Pixels], size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        packed = pack_images([torch.from_numpy(image) for image in images])
        image_sizes = torch.tensor([self._resized(image) for image in images], dtype=torch.int64)
        batch = preprocess(
            *packed,
            image_sizes,
            size,
            self.spec.image_mean,
            self.spec.image_std,
            reverse_channels=self.spec.channel_order == "bgr",
        )
        return batch.to(self._pipeline.device), image_sizes.to(self._pipeline.device)

    def _pack(self, images: Sequence[Pixels], given: Sequence[Boxes], image_sizes: torch.Tensor) -> Proposals:
        """Boxes in pixels of the originals as proposals in pixels of the resized images, padded to one length."""
        capacity = max(1, *(len(boxes) for boxes in given))
        packed = torch.zeros(len(images), capacity, 4)
        for row, (image, boxes) in enumerate(zip(images, given, strict=True)):
            packed[row, : len(boxes)] = torch.from_numpy(boxes * _ratio(image_sizes[row].tolist(), image.shape[:2]))
        counts = torch.tensor([len(boxes) for boxes in given], dtype=torch.int64)
        return Proposals.given(packed.to(self._pipeline.device), counts.to(self._pipeline.device))

    def _trim(
        self, padded: PaddedDetections, row: int, image: Pixels, image_size: torch.Tensor
    ) -> Detections | NonFiniteError:
        """Row ``row`` on the host, boxes back in pixels of the original image."""
        if int(padded.status[row]) == NON_FINITE:
            return NonFiniteError(NON_FINITE_REASON)
        n = int(padded.counts[row])
        return Detections(
            boxes=padded.boxes[row, :n].numpy() * _ratio(image.shape[:2], image_size.tolist()),
            scores=padded.scores[row, :n].numpy().copy(),
            labels=padded.labels[row, :n].numpy().copy(),
            image_size=(image.shape[0], image.shape[1]),
            categories=self.spec.categories,
        )


def _ratio(of: Sequence[int], to: Sequence[int]) -> NDArray[np.float32]:
    """One (h, w) over another as x, y, x, y, rounded to float32 before it multiplies, as torchvision does."""
    h, w = (np.float32(side) / np.float32(other) for side, other in zip(of, to, strict=True))
    return np.array([w, h, w, h], dtype=np.float32)


def _source(image: Any) -> str | None:
    """The name of an image that was given as a path."""
    return str(os.fspath(image)) if isinstance(image, (str, os.PathLike)) else None


def _read_all(images: Sequence[Any]) -> list[Pixels]:
    """The pixels of each; an error says which of several it was, unless it is a file, whose name is in it."""
    pixels = []
    for number, image in enumerate(images):
        try:
            pixels.append(to_array(image))
        except ImageError as error:
            if len(images) == 1 or _source(image) is not None:
                raise
            raise ImageError(f"image {number}: {error}") from error
    return pixels


def _read_with_proposals(
    path: str | os.PathLike[str],
    read: Callable[[str | os.PathLike[str]], Pixels],
    proposals: Callable[[str], ProposalBoxes] | None,
) -> tuple[Pixels, Boxes | None] | FpnEngineError:
    """An image and what it is given, or the error that was met."""
    try:
        return read(path), None if proposals is None else as_boxes([proposals(os.fspath(path))], 1)[0]
    except FpnEngineError as error:
        return error
