"""Our detectors as contestants: the pipeline around each backend's trunk and head."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnxruntime as ort
import torch
from torch import Tensor

from benchmarks.native_stages import load_as_tuned
from benchmarks.plans import QUANTIZED, build
from benchmarks.scene import ROTATING, Contestant, Maker, Scene
from benchmarks.suite import NotHereError
from fpn_engine.backends import BoxHead, Trunk, TrunkOutput
from fpn_engine.backends.loading import load_parts
from fpn_engine.batching import trim
from fpn_engine.errors import FpnEngineError
from fpn_engine.pipeline import PaddedDetections, Pipeline, Thresholds
from fpn_engine.plan import Plan
from fpn_engine.ruler import Turn
from fpn_engine.runtime.captured import CapturedRunner
from fpn_engine.runtime.cuda import make_cuda_runner
from fpn_engine.runtime.packet import unpack_result
from fpn_engine.runtime.runner import EagerRunner, Group, Task
from fpn_export.detector import FpnDetector
from fpn_export.native.tactics import TuneFor
from fpn_export.ort_cuda_parts import ProviderOptions
from fpn_export.tensorrt.builder import BuildOptions
from fpn_export.tensorrt.profiles import Batches
from fpn_kernels import PackedImages, pack_images
from tests.parity.subject import Subject
from tests.parity.torchvision_oracle import Found

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Every backend in every precision that it has anywhere, those with a target first.
FORMS = {
    "cuda": (
        *(("native", precision) for precision in ("fp16", "bf16", "fp32", "int8")),
        *(("tensorrt", precision) for precision in ("fp16", "bf16", "fp32", "int8", "fp8")),
        ("onnxruntime", "fp16"),
        ("onnxruntime", "fp32"),
    ),
    "cpu": (
        ("onnxruntime", "fp32"),
        *(("native", precision) for precision in ("fp32", "bf16", "int8", "fp16")),
        ("onnxruntime", "int8"),
        ("tensorrt", "fp16"),
    ),
}


def list_ours(device: torch.device, quick: bool = False) -> dict[str, Maker]:
    """A quick try leaves out what has to be calibrated first."""
    return {
        f"fpn-engine, {backend} {precision}": partial(make_ours, backend=backend, precision=precision)
        for backend, precision in FORMS[device.type]
        if not (quick and precision in QUANTIZED)
    }


def make_ours(scene: Scene, backend: str, precision: str) -> Contestant:
    """Raises: NotHereError with the reason if the plan cannot be had on this device."""
    return run_pipeline(scene, *load(scene, backend, precision), precision)


def load(scene: Scene, backend: str, precision: str) -> tuple[Trunk, BoxHead | None]:
    """Trunk and head; made once for a scene."""
    name = f"{backend} {precision}"
    if name not in scene.parts:
        if reason := why_not(scene.device.type, backend, precision):
            raise NotHereError(reason)
        try:
            scene.parts[name] = _build(scene, backend, precision)
        except FpnEngineError as error:
            raise NotHereError(str(error)) from error
    return scene.parts[name]


def why_not(device: str, backend: str, precision: str) -> str:
    """What a build would not say by itself, or only after it has quantised the model."""
    if device == "cpu":
        if backend == "tensorrt":
            return "needs an NVIDIA GPU and TensorRT"
        return "a CPU computes fp16 in float32, so that its time says nothing" if precision == "fp16" else ""
    if backend == "tensorrt" and find_spec("tensorrt") is None:
        return "TensorRT is not installed"
    if backend == "onnxruntime" and "CUDAExecutionProvider" not in ort.get_available_providers():
        return "this ONNX Runtime has no CUDA provider"
    if backend == "native" and precision in QUANTIZED:
        return "quantised models run on a GPU by TensorRT"
    return ""


def _build(scene: Scene, backend: str, precision: str) -> tuple[Trunk, BoxHead | None]:
    if scene.device.type == "cpu":
        return load_parts(build_for_cpu(scene.subject, backend, precision))
    if backend != "native":
        fixed: dict[str, Any] = {"batches": Batches(best=scene.batch, most=scene.batch), "sizes": (scene.size,)}
        options = BuildOptions(**fixed) if backend == "tensorrt" else ProviderOptions(**fixed)
        return load_parts(build(scene.subject, precision, backend, options), device=scene.device)
    seconds = scene.tuning_seconds if precision == "fp16" else scene.tuning_seconds / 3
    tune_for = TuneFor(shapes=((scene.batch, *scene.size),), seconds=seconds)
    return load_as_tuned(build(scene.subject, precision, backend, tune_for))


def build_for_cpu(subject: Subject, backend: str, precision: str, photographs: Sequence[Path] = ()) -> Plan:
    """Those that are made once are taken. Raises: FpnEngineError if there is no such plan."""
    made = {"onnxruntime fp32": "plan", "native fp32": "native_plan"}.get(f"{backend} {precision}")
    return getattr(subject, made) if made else build(subject, precision, backend, photographs=photographs)


class EagerTrunk:
    """PyTorch's own trunk in one number type, channels_last; objectness and deltas as the native one has them."""

    def __init__(self, model: FpnDetector, dtype: torch.dtype) -> None:
        self.input_dtype = dtype
        self._model = model

    def __call__(self, images: Tensor, /) -> TrunkOutput:
        out = self._model.trunk(images.contiguous(memory_format=torch.channels_last))
        return TrunkOutput(out.features, *(tuple(level.float() for level in maps) for maps in out[1:]))


def load_eager_parts(scene: Scene, precision: str = "fp32") -> tuple[Trunk, BoxHead]:
    """PyTorch's own trunk and head."""
    dtype = DTYPES[precision]
    model = copy.deepcopy(scene.subject.model).to(scene.device, dtype).to(memory_format=torch.channels_last).eval()

    def head(roi_features: Tensor) -> tuple[Tensor, Tensor]:
        class_logits, box_deltas = model.head(roi_features)
        return class_logits.float(), box_deltas.float()

    return EagerTrunk(model, dtype), head


def make_eager_parts(scene: Scene, precision: str = "fp32") -> Contestant:
    return run_pipeline(scene, *load_eager_parts(scene, precision), precision)


def run_pipeline(scene: Scene, trunk: Trunk, head: BoxHead | None, precision: str) -> Contestant:
    """Our pipeline around a trunk and a head: a captured graph on CUDA, operation by operation on the CPU."""
    pipeline = Pipeline(scene.spec, trunk, head, scene.device)
    maps = partial(compute_maps, scene, pipeline)
    if scene.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # to build a plan is not to run it
        captured = replay_captured(scene, make_cuda_runner(pipeline, batch_size=scene.batch), precision)
        return replace(captured, maps=maps)
    groups, task = make_groups(scene)
    eager, at = EagerRunner(pipeline), [0]

    def load(number: int) -> None:
        at[0] = number % ROTATING

    def run() -> PaddedDetections:
        return eager.submit(groups[at[0]], task).wait()

    def detect(number: int) -> list[Found]:
        load(number)
        return _trim_all(run(), scene)

    return Contestant(turn=Turn("call", load, run), detect=detect, precision=precision, maps=maps)


def compute_maps(scene: Scene, pipeline: Pipeline) -> Sequence[Tensor]:
    """The feature pyramid of the first set."""
    packed = pack_images([torch.from_numpy(image) for image in scene.images[0]])
    given = PackedImages(*(part.to(scene.device) for part in packed))
    image_sizes = torch.tensor([scene.size] * scene.batch, device=scene.device)
    with torch.inference_mode():
        return pipeline.trunk(pipeline.preprocess(given, image_sizes, scene.size)).features


def replay_captured(scene: Scene, runner: CapturedRunner, precision: str) -> Contestant:
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

    return Contestant(turn=Turn("graph", load, graph.replay), detect=detect, precision=precision)


def make_groups(scene: Scene) -> tuple[list[Group], Task]:
    """Each set of images, and the task of detecting in it."""
    groups = [Group(images, [scene.size] * scene.batch) for images in scene.images]
    return groups, Task(padded_size=scene.size, thresholds=Thresholds.of(scene.spec))


def _trim_all(found: PaddedDetections, scene: Scene) -> list[Found]:
    trimmed = [trim(found, row, scene.size, scene.size) for row in range(scene.batch)]
    assert all(trimmed), "the network gave NaN or infinity"
    return [Found(*each) for each in trimmed if each]
