"""Subjects: forms of a detector whose stages can be run one at a time, on their own inputs or on another's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from fpn_engine.backends import BoxHead, TrunkOutput
from fpn_engine.batching import size_ratio, trim
from fpn_engine.detections import Detections
from fpn_engine.pipeline import PaddedDetections, Pipeline, Proposals, Thresholds
from fpn_engine.proposals import Boxes as GivenBoxes
from fpn_engine.resizing import padded_size, resized_size
from fpn_engine.spec import ModelSpec
from fpn_engine.work import Pixels
from fpn_export.verification.trace import Answer, Boxes, Input, Maps, Trace
from fpn_kernels import pack_images

RunTrunk = Callable[[Tensor], tuple[tuple[Tensor, ...], TrunkOutput]]


class Subject(Protocol):
    """A form of a detector. All tensors that go in and come out are float32 in host memory.

    Attributes:
        name: the file's. runtime: what runs it, for people: "PyTorch fp32", "native bf16 on the CPU".
        precision: "fp32", "fp16", "bf16", "int8" or "fp8", of trunk and head.
    """

    name: str
    runtime: str
    spec: ModelSpec
    precision: str

    def preprocess(self, pixels: Pixels) -> Input: ...

    def trace(self, pixels: Pixels, given: GivenBoxes | None = None) -> Trace:
        """Everything from (H, W, 3) uint8 pixels on. given: a Fast R-CNN's proposals in pixels of the original."""
        ...

    def run_trunk(self, given: Input) -> Maps: ...

    def propose(self, maps: Maps, given: Input) -> Boxes: ...

    def pool(self, maps: Maps, proposals: Boxes) -> Tensor: ...

    def run_head(self, roi_features: Tensor) -> Answer: ...

    def finish(
        self, maps: Maps, proposals: Boxes | None, answer: Answer | None, given: Input, **thresholds: Any
    ) -> Detections | None:
        """Detections, None if something was NaN or infinite; ``thresholds`` as of Thresholds, instead of the spec's."""
        ...


def trace_by_stages(subject: Subject, pixels: Pixels, given: GivenBoxes | None) -> Trace:
    """A subject's stages one after another."""
    prepared = subject.preprocess(pixels)
    maps = subject.run_trunk(prepared)
    proposals = roi_features = answer = None
    if subject.spec.has_box_head:
        proposals = subject.propose(maps, prepared) if given is None else scale_given(given, prepared)
        roi_features = subject.pool(maps, proposals)
        answer = subject.run_head(roi_features)
    found = subject.finish(maps, proposals, answer, prepared)
    return Trace(
        input=prepared,
        maps=maps,
        proposals=proposals,
        roi_features=roi_features,
        answer=answer,
        detections=no_detections(subject.spec, prepared.shape) if found is None else found,
        finite=found is not None,
    )


def scale_given(given: GivenBoxes, prepared: Input) -> Boxes:
    """Boxes in pixels of the original as proposals in those of the resized image."""
    height, width = prepared.image_sizes[0].tolist()
    boxes = torch.from_numpy(given * size_ratio((height, width), prepared.shape))
    return Boxes(boxes, boxes.new_ones(len(boxes)))


def no_detections(spec: ModelSpec, shape: tuple[int, int]) -> Detections:
    boxes = torch.zeros(0, 4).numpy()
    labels = torch.zeros(0, dtype=torch.int64).numpy()
    return Detections(boxes=boxes, scores=boxes[:, 0], labels=labels, image_size=shape, categories=spec.categories)


def as_detections(spec: ModelSpec, found: PaddedDetections, given: Input) -> Detections | None:
    """The one image of ``found`` in pixels of the original; None for one whose status is non-finite."""
    height, width = given.image_sizes[0].tolist()
    trimmed = trim(found, 0, given.shape, (height, width))
    if trimmed is None:
        return None
    return Detections(**trimmed._asdict(), image_size=given.shape, categories=spec.categories)


class PipelineSubject:
    """A trunk and a box head with the engine's own pipeline around them: a checkpoint, a plan, or a cut ONNX file.

    Args:
        run_trunk: (1, 3, H, W) to the bottom-up stages c2.., empty where they are not exposed, and the trunk's output.
    """

    def __init__(
        self,
        *,
        name: str,
        runtime: str,
        spec: ModelSpec,
        precision: str,
        run_trunk: RunTrunk,
        head: BoxHead | None,
        device: torch.device | str = "cpu",
        input_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.name, self.runtime, self.spec, self.precision = name, runtime, spec, precision
        self._run_trunk, self._head, self._device = run_trunk, head, torch.device(device)
        self._input_dtype = input_dtype
        self._features_dtype = torch.float32  # what the trunk gave last

    def preprocess(self, pixels: Pixels) -> Input:
        spec = self.spec
        shape = pixels.shape[0], pixels.shape[1]
        size = resized_size(*shape, spec.min_size, spec.max_size)
        packed = pack_images([torch.from_numpy(pixels)])
        packed = packed._replace(**{name: part.to(self._device) for name, part in packed._asdict().items()})
        sizes = torch.tensor([size], dtype=torch.int64)
        with torch.inference_mode():
            image = self._pipeline().preprocess(packed, sizes.to(self._device), padded_size(size, spec.size_divisor))
        return Input(_host(image), sizes, shape)

    def trace(self, pixels: Pixels, given: GivenBoxes | None = None) -> Trace:
        return trace_by_stages(self, pixels, given)

    def run_trunk(self, given: Input) -> Maps:
        with torch.inference_mode():
            stages, out = self._run_trunk(given.image.to(self._device, self._input_dtype))
        if out.features:
            self._features_dtype = out.features[0].dtype
        maps = {f"c{number}": _host(stage) for number, stage in enumerate(stages, start=2)}
        levels = self.spec.level_names
        for kind, listed in (("", out.features), ("objectness_", out.objectness), ("deltas_", out.deltas)):
            maps |= {kind + level: _host(tensor) for level, tensor in zip(levels, listed, strict=False)}
        return maps

    def propose(self, maps: Maps, given: Input) -> Boxes:
        with torch.inference_mode():
            found = self._pipeline().propose(self._output(maps), given.padded_size, self._to_device(given.image_sizes))
        n = int(found.counts[0])
        return Boxes(_host(found.boxes[0, :n]), _host(found.scores[0, :n]))

    def pool(self, maps: Maps, proposals: Boxes) -> Tensor:
        index = proposals.boxes.new_zeros(len(proposals.boxes), 1)
        rois = self._to_device(torch.cat([index, proposals.boxes], dim=1))
        with torch.inference_mode():
            return _host(self._pipeline().pool(self._output(maps), rois))

    def run_head(self, roi_features: Tensor) -> Answer:
        assert self._head is not None, "an RPN alone has no box head"
        if not len(roi_features):
            width = self.spec.num_classes
            return Answer(roi_features.new_zeros(0, width), roi_features.new_zeros(0, 4 * width))
        with torch.inference_mode():
            class_logits, box_deltas = self._head(roi_features.to(self._device, self._features_dtype))
        return Answer(_host(class_logits), _host(box_deltas))

    def finish(
        self, maps: Maps, proposals: Boxes | None, answer: Answer | None, given: Input, **thresholds: Any
    ) -> Detections | None:
        output, sizes = self._output(maps), self._to_device(given.image_sizes)
        wanted = Thresholds.of(self.spec).override(**thresholds)
        if proposals is None or answer is None:
            rpn = self._pipeline(lambda images: output)
            with torch.inference_mode():
                found = rpn(given.image.to(self._device), sizes, wanted)
        else:
            boxes, scores = (_at_least_one(part)[None] for part in proposals)
            counts = torch.tensor([len(proposals.boxes)], dtype=torch.int64)
            rows = [self._to_device(_at_least_one(part)) for part in answer]
            ending = _Ending(self.spec, lambda images: output, lambda pooled: (rows[0], rows[1]), self._device)
            listed = Proposals(*(self._to_device(part) for part in (boxes, scores, counts)))
            with torch.inference_mode():
                found = ending.classify(output, listed, sizes, wanted)
        return as_detections(self.spec, PaddedDetections(*(part.cpu() for part in found)), given)

    def _pipeline(self, trunk: Callable[[Tensor], TrunkOutput] | None = None) -> Pipeline:
        def refuse(images: Tensor) -> TrunkOutput:
            raise AssertionError("stages are run one at a time")

        run: Any = trunk or refuse
        run.input_dtype = self._input_dtype
        return Pipeline(self.spec, run, self._head, self._device)

    def _output(self, maps: Maps) -> TrunkOutput:
        """The maps, which may be another's, as this one's trunk would give them."""
        levels, dtype = self.spec.level_names, self._features_dtype
        features = tuple(maps[level].to(self._device, dtype) for level in levels if level in maps)
        answers = (
            tuple(self._to_device(maps[kind + level]) for level in levels if kind + level in maps)
            for kind in ("objectness_", "deltas_")
        )
        return TrunkOutput(features, *answers)

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device)


class _Ending(Pipeline):
    """The pipeline behind the box head: RoIs are not pooled, and the head gives what it is made with."""

    def pool(self, out: TrunkOutput, rois: Tensor, counts: Tensor | None = None) -> Tensor:
        return rois


def replace_sizes(spec: ModelSpec, factor: int) -> ModelSpec:
    """The spec with images resized to a ``factor``-th of its sides."""
    return dataclasses.replace(spec, min_size=max(1, spec.min_size // factor), max_size=max(1, spec.max_size // factor))


def _host(tensor: Tensor) -> Tensor:
    """In host memory as float32; never a view of a buffer that the next run overwrites."""
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()


def _at_least_one(rows: Tensor) -> Tensor:
    """Zeros in place of no rows, which the kernels do not take."""
    return rows if len(rows) else rows.new_zeros(1, *rows.shape[1:])
