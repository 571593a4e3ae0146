"""The stages of one detector, each on what the one before it made, beside the least time that an H200 needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.detectors import ROTATING, Scene
from benchmarks.kernel_case import COPY_BANDWIDTH, MATMUL_RATE
from benchmarks.timing import prepare, take_turns
from fpn_engine.backends import BoxHead, Trunk, TrunkOutput
from fpn_engine.pipeline import Pipeline, Proposals, Thresholds
from fpn_engine.runtime.packet import pack_result
from fpn_export.onnx_cost import HEAD, count_detector
from fpn_kernels import PackedImages, pack_images

Maps = Sequence[Tensor]


class Ending(Pipeline):
    """The pipeline with RoIAlign and box head left out: ``answer`` is what they would give."""

    answer: tuple[Tensor, Tensor]

    def __init__(self, pipeline: Pipeline) -> None:
        super().__init__(pipeline.spec, pipeline.trunk, lambda rois: self.answer, pipeline.device)

    def pool(self, out: TrunkOutput, rois: Tensor, counts: Tensor | None = None) -> Tensor:
        return rois


def measure_stages(scene: Scene, trunk: Trunk, head: BoxHead, rounds: int | None = None) -> dict[str, dict[str, Any]]:
    """Times by stage: preprocess, trunk, proposals, RoIAlign, box head, final selection and NMS."""
    pipeline = Pipeline(scene.spec, trunk, head, scene.device)
    ending, thresholds = Ending(pipeline), Thresholds.of(scene.spec)

    def preprocess(pixels: Tensor, offsets: Tensor, sizes: Tensor, image_sizes: Tensor) -> Tensor:
        return pipeline.preprocess(PackedImages(pixels, offsets, sizes), image_sizes, scene.size)

    def propose(features: Maps, objectness: Maps, deltas: Maps, image_sizes: Tensor) -> tuple[Tensor, ...]:
        return tuple(pipeline.propose(_as_output(features, objectness, deltas), scene.size, image_sizes))

    def pool(features: Maps, rois: Tensor, counts: Tensor) -> Tensor:
        return pipeline.pool(_as_output(features, (), ()), rois, counts)

    def finish(
        maps: Sequence[Maps], found: Sequence[Tensor], image_sizes: Tensor, class_logits: Tensor, box_deltas: Tensor
    ) -> Tensor:
        ending.answer = class_logits, box_deltas
        return pack_result(ending.classify(_as_output(*maps), Proposals(*found), image_sizes, thresholds))

    stages: dict[str, Callable[..., Any]] = {
        "preprocess": preprocess,
        "trunk": lambda images: _as_tuples(trunk(images)),
        "proposals": propose,
        "RoIAlign": pool,
        "box head": lambda pooled: tuple(head(pooled)),
        "final selection and NMS": finish,
    }
    inputs: dict[str, list[list[Any]]] = {name: [] for name in stages}
    with torch.inference_mode():
        for number in range(ROTATING):
            packed = pack_images([torch.from_numpy(image) for image in scene.images[number]])
            image_sizes = torch.tensor([scene.size] * scene.batch).to(scene.device)
            given: list[Any] = [*(part.to(scene.device) for part in packed), image_sizes]
            inputs["preprocess"].append(given)
            inputs["trunk"].append([preprocess(*given)])
            maps = stages["trunk"](*inputs["trunk"][-1])
            inputs["proposals"].append([*maps, image_sizes])
            found = propose(*inputs["proposals"][-1])
            inputs["RoIAlign"].append([maps[0], _as_rois(found[0]), found[2]])
            inputs["box head"].append([pool(*inputs["RoIAlign"][-1])])
            answer = stages["box head"](*inputs["box head"][-1])
            inputs["final selection and NMS"].append([maps, found, image_sizes, *answer])
        kind = scene.device.type
        turns = {name: prepare(stage, inputs[name], kind) for name, stage in stages.items()}
        return take_turns(turns, kind, rounds=rounds)


def count_floors(scene: Scene, itemsize: int) -> dict[str, float]:
    """Microseconds on an H200: of the stages that move maps, and within the trunk as ``count_detector`` names them."""
    costs = count_detector(scene.subject.onnx_model, scene.spec, scene.size, batch=scene.batch, itemsize=itemsize)
    parts = {
        name: 1e6 * sum(cost.floor_seconds(MATMUL_RATE, COPY_BANDWIDTH) for cost in listed)
        for name, listed in costs.items()
    }
    spec, cells = scene.spec, math.prod(scene.size)
    pooled = spec.rpn_post_nms_top_n_test * spec.box_roi_pool.output_size**2
    mapped = sum(cells // 4**level for level in spec.roi_levels)
    bytes_moved = {
        "preprocess": 3 * cells * (1 + itemsize),
        "RoIAlign": spec.feature_channels * (mapped + pooled) * itemsize,
    }
    floors = {name: 1e6 * scene.batch * moved / COPY_BANDWIDTH for name, moved in bytes_moved.items()}
    floors["trunk"] = sum(spent for name, spent in parts.items() if name != HEAD)
    return {name: round(spent, 2) for name, spent in (floors | parts).items()}


def _as_output(features: Maps, objectness: Maps, deltas: Maps) -> TrunkOutput:
    return TrunkOutput(tuple(features), tuple(objectness), tuple(deltas))


def _as_tuples(out: TrunkOutput) -> tuple[tuple[Tensor, ...], ...]:
    """A plain tuple, which the ruler can copy."""
    return tuple(tuple(maps) for maps in out)


def _as_rois(boxes: Tensor) -> Tensor:
    """(N, R, 4) to (N * R, 5), the image's index before each box."""
    index = torch.arange(len(boxes), dtype=torch.float32, device=boxes.device)
    return torch.cat([index[:, None, None].expand(-1, boxes.shape[1], 1), boxes], dim=2).view(-1, 5)
