"""Engine: a plan, loaded and ready: images in, detections out."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, Unpack

import numpy as np
from numpy.typing import ArrayLike

from fpn_engine.batching import Batch, Size, make_batches, size_ratio
from fpn_engine.buckets import Buckets
from fpn_engine.detections import Detections
from fpn_engine.errors import DeviceMemoryError, FpnEngineError, ImageError, OptionError, ProposalError
from fpn_engine.images import to_array
from fpn_engine.light import is_light
from fpn_engine.load_options import LoadOptions, check_options, decodes_on_gpu
from fpn_engine.masks.spec import AnySpec, MaskSpec
from fpn_engine.plan import Plan, read_plan
from fpn_engine.proposals import Boxes, ProposalBoxes, as_boxes
from fpn_engine.reading import ReadAhead, ReadImage, ReadItem
from fpn_engine.spec import ModelSpec
from fpn_engine.tasks import AnyPixels, Group, Runner, Task, Thresholds
from fpn_engine.work import Outcome, Window, Work, name_error

if TYPE_CHECKING:  # torch is imported where it is needed, which for a light plan is nowhere
    import torch

    from fpn_engine.images import ImageLike
    from fpn_engine.light.runner import LightRunner
    from fpn_engine.runtime.runner import AnyPipeline

MAX_READERS = 16  # threads that decode for a GPU; for the CPU, which has its own work, there is one


class Engine:
    """Detects objects in images of any size; ``Engine.load("model.plan")(images)``.

    The result of an image does not depend on what else is in the call: images are grouped by their padded size and
    never padded further to fit a batch. Several threads may call one engine.

    Args:
        pipeline: the detector; :meth:`load` makes it from a plan, ``FpnDetector.pipeline`` is PyTorch's own. Several
            on one device, none of which shares buffers with another, take turns, each with a stream of its own.
        batch_size: most images run at once.
        buckets: pad images further, to sizes that more of them share; see :class:`fpn_engine.buckets.Buckets`.
        graphs: on CUDA, capture what runs more than once. False runs operation by operation, for a model in training,
            which needs the memory, or one that cannot be captured. graph_memory: their limit in bytes, None takes half
            of what is free.
        runner: how groups are run; None takes what suits the device. A light runner is its own detector.
        read: makes pixels of images, in host memory or on the pipeline's device.
    """

    def __init__(
        self,
        pipeline: AnyPipeline | Sequence[AnyPipeline] | LightRunner,
        *,
        batch_size: int = 1,
        buckets: int | Sequence[Size] | None = None,
        graphs: bool = True,
        graph_memory: int | None = None,
        runner: Runner | None = None,
        read: ReadImage = to_array,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        pipelines: list[Any] = list(pipeline) if isinstance(pipeline, Sequence) else [pipeline]
        self.spec: AnySpec = pipelines[0].spec
        self._device = str(pipelines[0].device)
        self.batch_size = batch_size
        self._buckets = Buckets(buckets, self.spec.size_divisor)
        if runner is None:
            from fpn_engine.runtime import make_runner

            runner = make_runner(pipelines, batch_size, graphs=graphs, graph_memory=graph_memory)
        self._runner = runner
        self.read = read

    @classmethod
    def from_plan(cls, plan: Plan, **options: Unpack[LoadOptions]) -> Self:
        """Make a plan ready.

        Raises: PlanError if it was built for something else than what is here, BackendError for a device that is not
            here or a decoder that is not, OptionError for streams, buckets or decoding that it has not, or a value of
            the wrong kind.
        """
        check_options(options)
        threads, streams = options.get("threads"), options.get("streams", 1)
        on_gpu = decodes_on_gpu(options, plan.manifest)
        if is_light(plan.manifest, options.get("images"), options.get("device"), streams):
            from fpn_engine.light.runner import LightRunner

            light = LightRunner(plan, threads)
            batch_size, buckets = options.get("batch_size", 1), options.get("buckets")
            return cls(light, batch_size=batch_size, buckets=buckets, runner=light)

        from fpn_engine.backends.loading import load_pipeline
        from fpn_engine.devices import choose_device

        device = choose_device(plan.manifest, options.get("device"))
        if streams < 1 or (streams > 1 and device.type == "cpu"):
            raise OptionError(f"streams must be at least 1, and 1 on the CPU, not {streams}")
        read: ReadImage = to_array
        if on_gpu:
            from fpn_engine.runtime.device_reader import make_cuda_reader

            read = make_cuda_reader(device)
        return cls(
            [load_pipeline(plan, threads, device) for _ in range(streams)],
            batch_size=options.get("batch_size", 1),
            buckets=options.get("buckets"),
            graphs=options.get("graphs", True),
            graph_memory=options.get("graph_memory"),
            read=read,
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str], **options: Unpack[LoadOptions]) -> Self:
        """Read and check a plan and make it ready. Raises PlanError in one sentence that says how to rebuild."""
        return cls.from_plan(read_plan(Path(path)), **options)

    @property
    def device(self) -> torch.device:
        import torch

        return torch.device(self._device)

    def warmup(
        self,
        sizes: Iterable[Size],
        *,
        batches: Sequence[int] | None = None,
        thresholds: Thresholds | None = None,
    ) -> None:
        """Make images of these sizes as fast at first as they are later: compile, measure and capture beforehand.

        Args:
            sizes: (h, w) of the images to come, before resizing. batches: how many at once; None takes batch_size.
            thresholds: those of the calls to come; None takes the spec's.
        Raises: OptionError for a batch above batch_size or a size without pixels.
        """
        spec, thresholds = self.spec, thresholds or Thresholds.of(self.spec)
        found: dict[tuple[int, Size], tuple[Size, Batch]] = {}
        for shape in sizes:
            if min(shape) < 1:
                raise OptionError(f"sizes must be of pixels from 1 on, not {tuple(shape)}")
            for number in batches or [self.batch_size]:
                if not 1 <= number <= self.batch_size:
                    raise OptionError(f"batches must be from 1 to batch_size, {self.batch_size}, not {number}")
                (batch,) = make_batches([shape] * number, spec, number, self._buckets)
                found.setdefault((number, batch.padded_size), (shape, batch))
        areas = {key: key[0] * key[1][0] * key[1][1] for key in found}
        for key in sorted(found, key=areas.__getitem__, reverse=True):  # so that smaller graphs fit into the pool
            shape, batch = found[key]
            image = np.zeros((*shape, 3), np.uint8)
            given = None
            if isinstance(spec, ModelSpec) and not spec.has_rpn:
                given = [np.zeros((spec.rpn_post_nms_top_n_test, 4), np.float32)] * key[0]
            group = Group([image] * key[0], batch.image_sizes, given)
            self._runner.warm(group, Task(padded_size=batch.padded_size, thresholds=thresholds))

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
        results = self._begin(self._read_all(listed), thresholds, given).finish()
        found = []
        for number, (image, result) in enumerate(zip(listed, results, strict=True)):
            if isinstance(result, FpnEngineError):
                raise name_error(result, _source(image) or f"image {number}")
            found.append(replace(result, source=_source(image)))
        return found

    def stream(
        self,
        paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
        *,
        thresholds: Thresholds | None = None,
        proposals: Callable[[str], ProposalBoxes] | None = None,
        read: Callable[[str | os.PathLike[str]], AnyPixels] | None = None,
    ) -> Iterator[Outcome]:
        """Detect in files one after another, in order and in bounded memory; a bad file is an outcome, not an end.

        Files are read ahead in other threads. On a GPU several groups are under way at once, and no outcome waits for
        one that begins later. Closing the generator ends the threads.

        Args:
            paths: one alone counts as a list of one.
            read: is called in those threads; None takes the engine's own. proposals: gives a Fast R-CNN those of the
                image at a path; what it raises as FpnEngineError is an outcome.
        """
        self._check_proposals(proposals is not None)
        thresholds = thresholds or Thresholds.of(self.spec)
        readers = 1 if self._device == "cpu" else min(MAX_READERS, os.cpu_count() or 1)
        # A window of several batches, so that mixed sizes still fill batches of one size.
        window = self.batch_size if self.batch_size == 1 else 4 * self.batch_size
        under_way: deque[Window] = deque()
        listed = [paths] if isinstance(paths, (str, os.PathLike)) else paths
        with ReadAhead(listed, read or self.read, threads=readers, ahead=max(readers, window)) as reading:
            while items := reading.take(window):
                under_way.append(self._begin_window(items, thresholds, proposals))
                while under_way and sum(len(w.batches) for w in list(under_way)[1:]) >= self._runner.depth:
                    yield from under_way.popleft().finish()
            while under_way:
                yield from under_way.popleft().finish()
            reading.raise_failure()

    def propose(self, images: ImageLike | Sequence[ImageLike]) -> list[ProposalBoxes]:
        """The RPN's class-agnostic proposals (Lin et al. 2017, sec. 4.1), at most rpn_post_nms_top_n_test each.

        Raises as a call of the engine does, and ProposalError for a Fast R-CNN.
        """
        if isinstance(self.spec, MaskSpec):
            raise ProposalError("a mask-proposal model has no RPN; what it proposes is what a call of the engine gives")
        if not self.spec.has_rpn:
            raise ProposalError("a Fast R-CNN has no RPN and proposes nothing")
        listed: Sequence[Any] = images if isinstance(images, (list, tuple)) else [images]
        found = []
        for number, result in enumerate(self._begin(self._read_all(listed), None, None).finish()):
            if isinstance(result, FpnEngineError):
                raise name_error(result, _source(listed[number]) or f"image {number}")
            found.append(ProposalBoxes(result.boxes, result.scores))
        return found

    def thresholds(
        self, score: float | None = None, nms: float | None = None, max_detections: int | None = None
    ) -> Thresholds:
        """The spec's thresholds with those given instead.

        Raises: ValueError outside 0..1, below one detection or above 100000, OptionError for an NMS threshold of mask
            proposals.
        """
        if nms is not None and isinstance(self.spec, MaskSpec):
            raise OptionError("mask proposals go through no NMS; leave its threshold out")
        return Thresholds.of(self.spec).override(
            box_score_thresh=score, box_nms_thresh=nms, box_detections_per_img=max_detections
        )

    def _check_proposals(self, given: bool) -> None:
        if given and self.spec.has_rpn:
            raise ProposalError("this model finds its own proposals; proposals are given to a Fast R-CNN only")
        if not given and not self.spec.has_rpn:
            raise ProposalError("this model is a Fast R-CNN, which detects among given proposals; give them too")

    def _read_all(self, images: Sequence[Any]) -> list[AnyPixels]:
        """The pixels of each; an error says which of several it was, unless it is a file, whose name is in it."""
        pixels = []
        for number, image in enumerate(images):
            try:
                pixels.append(self.read(image))
            except ImageError as error:
                if len(images) == 1 or _source(image) is not None:
                    raise
                raise ImageError(f"image {number}: {error}") from error
        return pixels

    def _begin_window(
        self,
        items: Sequence[ReadItem[AnyPixels]],
        thresholds: Thresholds,
        proposals: Callable[[str], ProposalBoxes] | None,
    ) -> Window:
        """Begin with what could be read."""
        read: list[tuple[str, AnyPixels | FpnEngineError]] = []
        given: list[Boxes] = []
        for path, result in items:
            source = os.fspath(path)
            try:
                if proposals is not None and not isinstance(result, FpnEngineError):
                    given += as_boxes([proposals(source)], 1)
                read.append((source, result))
            except FpnEngineError as error:
                read.append((source, error))
        images = [result for _, result in read if not isinstance(result, FpnEngineError)]
        return Window(read, self._begin(images, thresholds, given if proposals else None))

    def _begin(self, images: Sequence[AnyPixels], thresholds: Thresholds | None, given: Sequence[Boxes] | None) -> Work:
        """Begin to detect, or without thresholds to propose, in images of any sizes."""
        work = Work(self.spec, images)
        shapes = [(image.shape[0], image.shape[1]) for image in images]
        for batch in make_batches(shapes, self.spec, self.batch_size, self._buckets):
            self._submit(batch, work, thresholds, given)
        return work

    def _submit(self, batch: Batch, work: Work, thresholds: Thresholds | None, given: Sequence[Boxes] | None) -> None:
        """Give a batch to the runner, or its halves where the device has not the memory for it."""
        indices, sizes = batch.indices, batch.image_sizes
        boxes = None
        if given is not None:
            shapes = [work.images[index].shape[:2] for index in indices]
            scales = [size_ratio(size, shape) for size, shape in zip(sizes, shapes, strict=True)]
            boxes = [given[index] * scale for index, scale in zip(indices, scales, strict=True)]
        group = Group([work.images[index] for index in indices], sizes, boxes)
        try:
            pending = self._runner.submit(group, Task(padded_size=batch.padded_size, thresholds=thresholds))
        except DeviceMemoryError as error:
            failure = DeviceMemoryError(str(error))  # without the traceback, which holds what was computed
        else:
            work.batches.append((batch, pending))
            return
        if len(indices) == 1:
            work.failures[indices[0]] = failure
            return
        half = len(indices) // 2
        for part in (slice(half), slice(half, None)):
            self._submit(Batch(indices[part], sizes[part], batch.padded_size), work, thresholds, given)


def _source(image: Any) -> str | None:
    """The name of an image that was given as a path."""
    return str(os.fspath(image)) if isinstance(image, (str, os.PathLike)) else None
