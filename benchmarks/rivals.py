"""The others as contestants: torchvision in its forms, and ONNX Runtime on torchvision's own export."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import onnxruntime as ort
import torch
from torch import Tensor

from benchmarks.scene import ROTATING, Contestant, Maker, Scene, as_found
from benchmarks.suite import BASE, NotHereError
from fpn_engine.ruler import Turn
from tests.parity.torchvision_oracle import Found

LEGACY = "ONNX Runtime on torchvision's export fp32"
COMPILED = ("parts", "whole")
HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
OPSET = 17  # of the legacy exporter


def list_base() -> dict[str, Maker]:
    return {BASE: make_torchvision}


def list_rivals(device: torch.device) -> dict[str, Maker]:
    """torchvision in every form that needs no compiler, and its export."""
    half = "fp16" if device.type == "cuda" else "bf16"  # which the CPU has instructions for
    return {
        **list_base(),
        "torchvision fp32, channels_last": partial(make_torchvision, channels_last=True),
        f"torchvision {half} autocast": partial(make_torchvision, precision=half),
        f"torchvision {half} autocast, channels_last": partial(make_torchvision, precision=half, channels_last=True),
        LEGACY: make_legacy_export,
    }


def list_compiled(device: torch.device) -> dict[str, Maker]:
    """torch.compile of torchvision: of its networks, between which it waits, and of the whole; these take minutes."""
    options: dict[str, Any] = {"precision": "fp16", "channels_last": True} if device.type == "cuda" else {}
    form = "fp16 autocast, channels_last" if options else "fp32"
    return {
        f"torchvision {form}, torch.compile of {'its parts' if what == 'parts' else 'the whole'}": partial(
            make_torchvision, compiled=what, **options
        )
        for what in COMPILED
    }


def make_torchvision(
    scene: Scene, precision: str = "fp32", channels_last: bool = False, compiled: str = ""
) -> Contestant:
    """torchvision's model: below fp32 under autocast; compiled in "parts", between which it waits, or "whole"."""
    model = scene.copy_torchvision()
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    heads: Any = model.roi_heads
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

    @contextmanager
    def running() -> Iterator[list[Tensor]]:
        autocast = torch.autocast(scene.device.type, HALF.get(precision), enabled=precision != "fp32")
        with cudnn_that_measures(), torch.inference_mode(), autocast:
            yield [image.permute(2, 0, 1).float() / 255 for image in sets[at[0]]]

    def run() -> list[dict[str, Tensor]]:
        with running() as images:
            return model(images)

    def detect(number: int) -> list[Found]:
        load(number)
        return [as_found(found) for found in run()]

    def maps() -> list[Tensor]:
        load(0)
        with running() as images:
            return list(model.backbone(model.transform(images)[0].tensors).values())

    return Contestant(turn=Turn("call", load, run), detect=detect, precision=precision, maps=maps)


@contextmanager
def cudnn_that_measures() -> Iterator[None]:
    """cuDNN takes the kernel that was fastest at each shape: for others, as our plans have measured theirs."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def make_legacy_export(scene: Scene) -> Contestant:
    """The way that torchvision documents: the whole detector by the tracing exporter, one image a run."""
    if scene.batch > 1:
        raise NotHereError("the export takes one image")
    provider = "CUDAExecutionProvider" if scene.device.type == "cuda" else "CPUExecutionProvider"
    if provider not in ort.get_available_providers():
        raise NotHereError(f"this ONNX Runtime has no {provider}")
    model, file = scene.copy_torchvision().cpu(), io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the tracer takes for constant, and that it is deprecated
        torch.onnx.export(model, ([torch.rand(3, *scene.size)],), file, dynamo=False, opset_version=OPSET)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # torch wants the cores in between
    session = ort.InferenceSession(file.getvalue(), options, providers=[provider])
    name = session.get_inputs()[0].name
    sets = [torch.from_numpy(images[0]).to(scene.device) for images in scene.images]
    at = [0]

    def load(number: int) -> None:
        at[0] = number % ROTATING

    def run() -> list[Any]:
        return session.run(None, {name: (sets[at[0]].permute(2, 0, 1).float() / 255).cpu().numpy()})

    def detect(number: int) -> list[Found]:
        load(number)
        boxes, labels, scores = run()  # the order of torchvision's dictionary
        return [Found(boxes, scores, labels)]

    return Contestant(turn=Turn("wall", load, run), detect=detect, precision="fp32")
