"""Calibration: magnitudes of the values that may become 8 bits wide, over real images, through our own pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime as ort
import torch
from onnx import ModelProto, TensorProto, ValueInfoProto
from torch import Tensor

from fpn_engine.backends import TrunkOutput
from fpn_engine.backends.ort import PROVIDERS, session_options
from fpn_engine.engine import Engine
from fpn_engine.errors import FpnEngineError, ImageError, ModelError
from fpn_engine.pipeline import Pipeline
from fpn_engine.spec import ModelSpec
from fpn_engine.work import Outcome
from fpn_export.onnx_cut import cut_trunk, extract
from fpn_export.quantization.integers import use_integers
from fpn_export.quantization.layers import Layer, Network
from fpn_export.quantization.ranges import Histogram

TRUNK, HEAD = "trunk", "head"
# Of RoI features that the head takes at once, 256 MB: conv5 on 1000 RoIs would fill 20 GB with what is looked at.
MOST_NUMBERS = 1 << 26
Sink = Callable[[str, Tensor], None]
Note = Callable[[str], None]


@dataclass(frozen=True)
class Calibration:
    """What was seen: the magnitudes of each value, and which files it was seen on."""

    histograms: dict[str, Histogram]
    images: list[str]


def calibrate(
    model: ModelProto,
    spec: ModelSpec,
    layers: Sequence[Layer],
    paths: Sequence[Path],
    on_image: Callable[[], None] = lambda: None,
    on_note: Note = lambda line: None,
) -> Calibration:
    """Run the float detector on images, for ``layers`` to be quantised; a note says which images cannot be read.

    Raises: ImageError if none can be read, ModelError for NaN or infinity in a value.
    """
    points = Network(model).points(layers)
    histograms = {name: Histogram() for name in points}

    def count(name: str, value: Tensor) -> None:
        try:
            histograms[name].add(value)
        except ValueError as error:
            raise ModelError(f"the network gives {error} in {name}, so that nothing can be calibrated") from None

    engine = recording_engine(model, spec, points, count)
    seen = []
    for outcome in sound_outcomes(engine, paths, on_note):
        seen.append(Path(outcome.source).name)
        on_image()
    return Calibration(histograms, seen)


def sound_outcomes(engine: Engine, paths: Iterable[Path], on_note: Note) -> Iterator[Outcome]:
    """The images that can be read and detected in; the others are noted. Raises ImageError if there are none."""
    any_sound = False
    for outcome in engine.stream(paths):
        if isinstance(outcome.result, ImageError):
            on_note(f"left out: {outcome.result}")
        elif isinstance(outcome.result, FpnEngineError):
            raise outcome.result
        else:
            any_sound = True
            yield outcome
    if not any_sound:
        raise ImageError("none of the images can be read; --images names a folder of photographs like those to come")


def recording_engine(model: ModelProto, spec: ModelSpec, points: Iterable[str], sink: Sink) -> Engine:
    """The detector of a whole file; every value of ``points`` is given to ``sink`` on the way."""
    points = list(points)
    trunk, *heads = (_Recorder(part, points, sink) for part in cut_parts(model, spec).values())
    return _join(spec, trunk, heads[0] if heads else None)


def make_engine(model: ModelProto, spec: ModelSpec) -> Engine:
    """The detector of a whole file, quantised or not, on ONNX Runtime: int8 in integers, fp8 simulated."""
    parts = {name: use_integers(part) for name, part in cut_parts(model, spec).items()}
    trunk, *heads = (_Recorder(part, [], lambda name, value: None) for part in parts.values())
    return _join(spec, trunk, heads[0] if heads else None)


def cut_parts(model: ModelProto, spec: ModelSpec) -> dict[str, ModelProto]:
    """Trunk and head of a whole file, with the names of their values as they are there."""
    parts = {TRUNK: cut_trunk(model, spec)}
    if spec.has_box_head:
        parts[HEAD] = extract(model, ["roi_features"], ["class_logits", "box_deltas"])
    return parts


def open_part(network: ModelProto) -> Any:
    """A session. Fusions of ONNX Runtime take fp8 for int8, so that fp8 runs without."""
    options = session_options()
    if any(tensor.data_type == TensorProto.FLOAT8E4M3FN for tensor in network.graph.initializer):
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(network.SerializeToString(), options, providers=PROVIDERS)


def _join(spec: ModelSpec, trunk: _Recorder, head: _Recorder | None) -> Engine:
    levels = len(spec.levels)

    def run_trunk(images: Tensor, /) -> TrunkOutput:
        maps = tuple(level.permute(0, 3, 1, 2) for level in trunk(images))
        split = len(maps) - 2 * levels
        return TrunkOutput(maps[:split], maps[split : split + levels], maps[split + levels :])

    def run_head(roi_features: Tensor, /) -> tuple[Tensor, Tensor]:
        assert head is not None
        rows = max(1, MOST_NUMBERS // roi_features.shape[1:].numel())
        answers = [head(portion) for portion in roi_features.split(rows)]
        class_logits, box_deltas = (torch.cat(parts) for parts in zip(*answers, strict=True))
        return class_logits, box_deltas

    return Engine(Pipeline(spec, run_trunk, run_head if head else None))


class _Recorder:
    """A part of the detector that gives inner values, and what it is given, to a sink."""

    def __init__(self, network: ModelProto, points: Sequence[str], sink: Sink) -> None:
        self._given, self._sink = network.graph.input[0].name, sink
        self._outputs = len(network.graph.output)
        made = {name for node in network.graph.node for name in node.output}
        self._points = [name for name in points if name in made]
        self._takes_input = self._given in points
        network.graph.output.extend(ValueInfoProto(name=name) for name in self._points)
        self._session = open_part(network)

    def __call__(self, x: Tensor) -> list[Tensor]:
        values: list[Any] = self._session.run(None, {self._given: x.contiguous().numpy()})
        tensors = [torch.from_numpy(value) for value in values]
        if self._takes_input:
            self._sink(self._given, x)
        for name, tensor in zip(self._points, tensors[self._outputs :], strict=True):
            self._sink(name, tensor)
        return tensors[: self._outputs]
