"""Whole detectors that take turns: from uint8 images in device memory to detections, the same weights in each."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.models.detection import FasterRCNN as TorchvisionFasterRCNN

from benchmarks.native_stages import build, load_as_tuned
from benchmarks.timing import Turn
from fpn_engine.backends import BoxHead, Trunk, TrunkOutput
from fpn_engine.backends.loading import load_parts
from fpn_engine.batching import trim
from fpn_engine.pipeline import PaddedDetections, Pipeline, Thresholds
from fpn_engine.runtime.captured import CapturedRunner
from fpn_engine.runtime.cuda import make_cuda_runner
from fpn_engine.runtime.packet import unpack_result
from fpn_engine.runtime.runner import EagerRunner, Group, Task
from fpn_engine.spec import ModelSpec
from fpn_export.detector import FpnDetector
from fpn_export.native.tactics import TuneFor
from tests.parity.random_detector import make_picture
from tests.parity.subject import Subject
from tests.parity.torchvision_oracle import Comparison, Found, Oracle, Pixels, as_tensor, match

ROTATING = 2  # sets of images
PICTURES = 8  # that are drawn; more of them are these, shifted
SHIFT = 37  # pixels
BASE = "torchvision fp32"
# Of what fp32 finds, a lower precision must find this share within these bounds: random weights are not as clear as
# trained ones.
LEAST_SHARE, CORNER, SCORE = 0.4, 8.0, 0.1
COMPILED = ("parts", "whole")


@dataclass(frozen=True, slots=True, kw_only=True)
class Contestant:
    """A detector that is ready.

    Attributes:
        turn: see :func:`benchmarks.timing.take_turns`. detect: what it finds in each image of a set.
        is_exact: it computes in float32.
    """

    turn: Turn
    detect: Callable[[int], list[Found]]
    is_exact: bool


class DeviceOracle(Oracle):
    """torchvision in float32, on the device."""

    def __init__(self, model: TorchvisionFasterRCNN, device: torch.device) -> None:
        super().__init__(model.to(device))
        self._device = device

    def detect(self, image: Pixels) -> Found:
        self._forget_scales()
        with torch.inference_mode():
            (found,) = self.model([as_tensor(image).to(self._device)])
        self._check_scales()
        return _as_found(found)


@dataclass(frozen=True)
class Scene:
    """A model, a batch of images and the device that all contestants are for.

    Attributes:
        size: (h, w) of the images, which are not resized.
        tuning_seconds: of the fp16 plan on CUDA; others get a third, as no target is theirs.
    """

    subject: Subject
    size: tuple[int, int]
    batch: int
    device: torch.device
    tuning_seconds: float = 30.0

    @property
    def spec(self) -> ModelSpec:
        return replace(self.subject.spec, min_size=min(self.size), max_size=max(self.size))

    @cached_property
    def images(self) -> list[list[Pixels]]:
        """The sets."""
        drawn = [make_picture(*self.size, seed) for seed in range(min(PICTURES, ROTATING * self.batch))]
        shifted = [np.roll(drawn[i % PICTURES], SHIFT * (i // PICTURES), axis=1) for i in range(ROTATING * self.batch)]
        return [shifted[start : start + self.batch] for start in range(0, len(shifted), self.batch)]

    @cached_property
    def oracle(self) -> DeviceOracle:
        return DeviceOracle(self.copy_torchvision(), self.device)

    def copy_torchvision(self) -> TorchvisionFasterRCNN:
        """Another copy of torchvision's model."""
        return self.subject.oracle(min_size=self.spec.min_size, max_size=self.spec.max_size).model.to(self.device)

    @cached_property
    def expected(self) -> dict[int, Found]:
        """What torchvision finds in the images of the first set that are checked, the first and the last."""
        return {row: self.oracle.detect(self.images[0][row]) for row in sorted({0, self.batch - 1})}

    @cached_property
    def native_parts(self) -> dict[str, tuple[Trunk, BoxHead | None]]:
        """By precision, as they are made."""
        return {}


def list_contestants(
    device: torch.device, compiled: str = COMPILED[0]
) -> list[dict[str, Callable[[Scene], Contestant]]]:
    """By name, in groups: those that cannot fail first, those that may take minutes last."""
    half = torch.float16 if device.type == "cuda" else torch.bfloat16  # which the CPU has instructions for
    name = str(half).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")
    theirs: dict[str, Callable[[Scene], Contestant]] = {
        BASE: make_torchvision,
        f"torchvision {name} autocast": partial(make_torchvision, dtype=half),
        f"torchvision {name} autocast, channels_last": partial(make_torchvision, dtype=half, channels_last=True),
    }
    if device.type == "cpu":
        return [
            theirs | {"fpn-engine, PyTorch's parts fp32": make_eager_parts},
            {"fpn-engine, native fp32": make_native},
        ]
    return [
        theirs | {"fpn-engine, PyTorch's parts fp16": partial(make_eager_parts, dtype=half)},
        {f"fpn-engine, native {p}": partial(make_native, precision=p) for p in ("fp16", "bf16", "fp32")},
        {
            f"torchvision fp16 autocast, channels_last, torch.compile of {what}": partial(
                make_torchvision, dtype=half, channels_last=True, compiled=what
            )
            for what in COMPILED[: 1 + COMPILED.index(compiled)]
        },
    ]


def make_torchvision(
    scene: Scene, dtype: torch.dtype | None = None, channels_last: bool = False, compiled: str = ""
) -> Contestant:
    """torchvision's model: with ``dtype`` under autocast; compiled in "parts", between which it waits, or "whole"."""
    model = scene.copy_torchvision()
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    heads = model.roi_heads
    parts = {
        "": [],
        "parts": [model.backbone, model.rpn.head, heads.box_head, heads.box_predictor],
        "whole": [model],
    }
    for part in parts[compiled]:
        part.compile()
    sets = [[torch.from_numpy(image).to(scene.device) for image in images] for images in scene.images]
    at = [0]

    def load(number: int) -> None:
        at[0] = number % ROTATING

    def run() -> list[dict[str, Tensor]]:
        with torch.inference_mode(), torch.autocast(scene.device.type, dtype, enabled=dtype is not None):
            return model([image.permute(2, 0, 1).float() / 255 for image in sets[at[0]]])

    def detect(number: int) -> list[Found]:
        load(number)
        return [_as_found(found) for found in run()]

    return Contestant(turn=("call", load, run), detect=detect, is_exact=dtype is None)


class EagerTrunk:
    """PyTorch's own trunk in one number type, channels_last; objectness and deltas as the native one has them."""

    def __init__(self, model: FpnDetector, dtype: torch.dtype) -> None:
        self.input_dtype = dtype
        self._model = model

    def __call__(self, images: Tensor, /) -> TrunkOutput:
        out = self._model.trunk(images.contiguous(memory_format=torch.channels_last))
        return TrunkOutput(out.features, *(tuple(level.float() for level in maps) for maps in out[1:]))


def load_eager_parts(scene: Scene, dtype: torch.dtype = torch.float32) -> tuple[Trunk, BoxHead]:
    """PyTorch's own trunk and head."""
    model = copy.deepcopy(scene.subject.model).to(scene.device, dtype).to(memory_format=torch.channels_last).eval()

    def head(roi_features: Tensor) -> tuple[Tensor, Tensor]:
        class_logits, box_deltas = model.head(roi_features)
        return class_logits.float(), box_deltas.float()

    return EagerTrunk(model, dtype), head


def load_native_parts(scene: Scene, precision: str = "fp32") -> tuple[Trunk, BoxHead | None]:
    """The native backend's; made once for a scene."""
    if precision not in scene.native_parts:
        if scene.device.type == "cpu":
            scene.native_parts[precision] = load_parts(scene.subject.native_plan)
        else:
            seconds = scene.tuning_seconds if precision == "fp16" else scene.tuning_seconds / 3
            tune_for = TuneFor(shapes=((scene.batch, *scene.size),), seconds=seconds)
            scene.native_parts[precision] = load_as_tuned(build(scene.subject, tune_for, precision))
    return scene.native_parts[precision]


def make_eager_parts(scene: Scene, dtype: torch.dtype = torch.float32) -> Contestant:
    return _make_ours(scene, *load_eager_parts(scene, dtype), dtype == torch.float32)


def make_native(scene: Scene, precision: str = "fp32") -> Contestant:
    return _make_ours(scene, *load_native_parts(scene, precision), precision == "fp32")


def _make_ours(scene: Scene, trunk: Trunk, head: BoxHead | None, is_exact: bool) -> Contestant:
    """Our pipeline around a trunk and a head: a captured graph on CUDA, operation by operation on the CPU."""
    pipeline = Pipeline(scene.spec, trunk, head, scene.device)
    if scene.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # to build a plan is not to run it
        return replay_captured(scene, make_cuda_runner(pipeline, batch_size=scene.batch), is_exact)
    groups, task = make_groups(scene)
    eager, at = EagerRunner(pipeline), [0]

    def load(number: int) -> None:
        at[0] = number % ROTATING

    def run() -> PaddedDetections:
        return eager.submit(groups[at[0]], task).wait()

    def detect(number: int) -> list[Found]:
        load(number)
        return _trim_all(run(), scene)

    return Contestant(turn=("call", load, run), detect=detect, is_exact=is_exact)


def replay_captured(scene: Scene, runner: CapturedRunner, is_exact: bool) -> Contestant:
    """Times a replay of the graph that the runtime captures, on a packet that it has uploaded before."""
    groups, task = make_groups(scene)
    graph = runner.capture(groups[0], task)

    def load(number: int) -> None:
        runner.submit(groups[number % ROTATING], task).wait()  # the graph reads it there again

    def detect(number: int) -> list[Found]:
        load(number)
        with torch.inference_mode():
            graph.output.fill_(-1)  # so that what is read is what the replay wrote
            graph.replay()
            return _trim_all(unpack_result(graph.output.cpu()), scene)

    return Contestant(turn=("graph", load, graph.replay), detect=detect, is_exact=is_exact)


def make_groups(scene: Scene) -> tuple[list[Group], Task]:
    """Each set of images, and the task of detecting in it."""
    groups = [Group(images, [scene.size] * scene.batch) for images in scene.images]
    return groups, Task(padded_size=scene.size, thresholds=Thresholds.of(scene.spec))


def _trim_all(found: PaddedDetections, scene: Scene) -> list[Found]:
    trimmed = [trim(found, row, scene.size, scene.size) for row in range(scene.batch)]
    assert all(trimmed), "the network gave NaN or infinity"
    return [Found(*each) for each in trimmed if each]


def check(scene: Scene, contestant: Contestant) -> dict[str, Any]:
    """What it finds beside what torchvision finds in float32. Raises: AssertionError if that is too far off."""
    ours = contestant.detect(0)
    assert len(ours) == scene.batch
    comparison, twins, most = Comparison(), 0, 0
    for row, theirs in scene.expected.items():
        if contestant.is_exact:
            comparison.assert_twins(ours[row], theirs, scene.oracle.wavering(scene.images[0][row]), name=f"image {row}")
        twins += len(match(ours[row], theirs, corner_tolerance=CORNER, score_tolerance=SCORE)[0])
        most += max(len(ours[row].scores), len(theirs.scores))
    share = twins / most
    assert share >= LEAST_SHARE, f"only {share:.2f} of the detections have a twin in fp32"
    exact = {
        "without_twin_by_ties": comparison.tied,
        "largest_score_difference": float(f"{comparison.score:.2g}"),
        "largest_corner_difference_px": float(f"{comparison.corner:.2g}"),
    }
    return {"detections": most, "share_with_twins": round(share, 3), **(exact if contestant.is_exact else {})}


def _as_found(found: Mapping[str, Tensor]) -> Found:
    boxes, scores = (found[name].float().cpu().numpy() for name in ("boxes", "scores"))
    return Found(boxes, scores, found["labels"].cpu().numpy())
