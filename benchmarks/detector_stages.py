"""The stages of one detector, each on what the one before it made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.roofline import POOLING, PREPROCESS, TRUNK
from benchmarks.scene import ROTATING, Scene
from benchmarks.timing import prepare
from fpn_engine.backends import BoxHead, Trunk, TrunkOutput
from fpn_engine.pipeline import Pipeline, Proposals, Thresholds
from fpn_engine.ruler import Times, Turn, take_turns
from fpn_engine.runtime.packet import pack_result
from fpn_export.onnx_cost import HEAD
from fpn_kernels import PackedImages, pack_images

Maps = Sequence[Tensor]
PROPOSALS, DETECTIONS = "proposals", "final selection and NMS"
STAGES = (PREPROCESS, TRUNK, PROPOSALS, POOLING, HEAD, DETECTIONS)
NETWORK = (TRUNK, HEAD)


class Ending(Pipeline):
    """The pipeline with RoIAlign and box head left out: ``answer`` is what they would give."""

    answer: tuple[Tensor, Tensor]

    def __init__(self, pipeline: Pipeline) -> None:
        super().__init__(pipeline.spec, pipeline.trunk, lambda rois: self.answer, pipeline.device)

    def pool(self, out: TrunkOutput, rois: Tensor, counts: Tensor | None = None) -> Tensor:
        return rois


def time_stages(
    scene: Scene, trunk: Trunk, head: BoxHead, rounds: int | None, seconds: float | None
) -> tuple[Times, dict[str, Turn]]:
    """The stages take turns: STAGES, in this order."""
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
        PREPROCESS: preprocess,
        TRUNK: lambda images: _as_tuples(trunk(images)),
        PROPOSALS: propose,
        POOLING: pool,
        HEAD: lambda pooled: tuple(head(pooled)),
        DETECTIONS: finish,
    }
    inputs: dict[str, list[list[Any]]] = {name: [] for name in stages}
    with torch.inference_mode():
        for number in range(ROTATING):
            packed = pack_images([torch.from_numpy(image) for image in scene.images[number]])
            image_sizes = torch.tensor([scene.size] * scene.batch).to(scene.device)
            given: list[Any] = [*(part.to(scene.device) for part in packed), image_sizes]
            inputs[PREPROCESS].append(given)
            inputs[TRUNK].append([preprocess(*given)])
            maps = stages[TRUNK](*inputs[TRUNK][-1])
            inputs[PROPOSALS].append([*maps, image_sizes])
            found = propose(*inputs[PROPOSALS][-1])
            inputs[POOLING].append([maps[0], _as_rois(found[0]), found[2]])
            inputs[HEAD].append([pool(*inputs[POOLING][-1])])
            answer = stages[HEAD](*inputs[HEAD][-1])
            inputs[DETECTIONS].append([maps, found, image_sizes, *answer])
        kind = scene.device.type
        turns = {name: prepare(stage, inputs[name], kind) for name, stage in stages.items()}
        return take_turns(turns, kind, rounds=rounds, seconds=seconds), turns


def _as_output(features: Maps, objectness: Maps, deltas: Maps) -> TrunkOutput:
    return TrunkOutput(tuple(features), tuple(objectness), tuple(deltas))


def _as_tuples(out: TrunkOutput) -> tuple[tuple[Tensor, ...], ...]:
    """A plain tuple, which the ruler can copy."""
    return tuple(tuple(maps) for maps in out)


def _as_rois(boxes: Tensor) -> Tensor:
    """(N, R, 4) to (N * R, 5), the image's index before each box."""
    index = torch.arange(len(boxes), dtype=torch.float32, device=boxes.device)
    return torch.cat([index[:, None, None].expand(-1, boxes.shape[1], 1), boxes], dim=2).view(-1, 5)
