"""Sensitivity: what each layer costs, quantised alone, and what has gathered at each in the quantised network."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from fpn_engine.spec import ModelSpec
from fpn_export.quantization.calibration import (
    Note,
    cut_parts,
    open_part,
    recording_engine,
    sound_outcomes,
)
from fpn_export.quantization.integers import use_integers
from fpn_export.quantization.layers import Layer, Network
from fpn_export.quantization.pairs import insert_pairs

GIVEN = ("image", "roi_features")  # what trunk and head are given
Arrays = list[NDArray[Any]]


@dataclass(frozen=True)
class Part:
    """Trunk or head in float32, what it is given for some images, and what it makes of that."""

    network: ModelProto
    given: Arrays
    expected: list[Arrays]

    def error(self, made: Sequence[Arrays]) -> float:
        """Mean over the outputs of |made - expected| / |expected|, norms over all images."""
        errors = []
        for index in range(len(self.expected[0])):
            difference = sum(_square(m[index] - e[index]) for m, e in zip(made, self.expected, strict=True))
            errors.append(_ratio(difference, sum(_square(e[index]) for e in self.expected)))
        return float(np.mean(errors))


class Sensitivity:
    """Errors of a detector on a few images, in float32 and quantised.

    All errors are norms of differences as parts of the norms.
    """

    def __init__(self, model: ModelProto, spec: ModelSpec, paths: Sequence[Path], on_note: Note) -> None:
        self._model, self._spec = model, spec
        given: dict[str, Arrays] = {name: [] for name in GIVEN}
        engine = recording_engine(model, spec, GIVEN, lambda name, value: given[name].append(value.numpy().copy()))
        for _ in sound_outcomes(engine, paths, on_note):
            pass
        networks = cut_parts(model, spec).values()
        self._parts = [
            Part(network, given[name], _run(network, given[name]))
            for name, network in zip(GIVEN, networks, strict=False)
        ]

    def measure_alone(
        self, layers: Sequence[Layer], ranges: Mapping[str, float], precision: str, on_layer: Callable[[], None]
    ) -> dict[str, float]:
        """The error of its part's outputs if a layer is quantised and no other is."""
        found = {}
        for layer in layers:
            for part in self._parts:
                if any(tensor.name == layer.weight for tensor in part.network.graph.initializer):
                    quantized = use_integers(insert_pairs(part.network, {layer.name}, ranges, precision))
                    found[layer.name] = part.error(_run(quantized, part.given))
            on_layer()
        return found

    def measure_gathered(
        self, layers: Collection[str], ranges: Mapping[str, float], precision: str
    ) -> dict[str, float]:
        """The error of each layer's result, in the network in which ``layers`` are quantised; of all layers.

        The head is given what it is given in float32.
        """
        found = {}
        for part in self._parts:
            network = Network(part.network)
            results = {layer.name: [network.result(node) for node in layer.nodes] for layer in network.layers}
            names = [name for values in results.values() for name in values]
            exact = _run(part.network, part.given, names)
            made = _run(insert_pairs(part.network, layers, ranges, precision), part.given, names)
            squares = {
                name: (
                    sum(_square(m[i] - e[i]) for m, e in zip(made, exact, strict=True)),
                    sum(_square(e[i]) for e in exact),
                )
                for i, name in enumerate(names)
            }
            for layer, values in results.items():
                found[layer] = _ratio(sum(squares[v][0] for v in values), sum(squares[v][1] for v in values))
        return found


def _run(network: ModelProto, given: Arrays, names: Sequence[str] = ()) -> list[Arrays]:
    """For each image the outputs, or the inner values of these names."""
    copy = ModelProto()
    copy.CopyFrom(network)
    if names:
        del copy.graph.output[:]
        for name in names:
            copy.graph.output.add().name = name
    session, source = open_part(copy), network.graph.input[0].name
    return [session.run(None, {source: value}) for value in given]


def _square(array: NDArray[Any]) -> float:
    return float(np.vdot(array, array))


def _ratio(difference: float, expected: float) -> float:
    return float(np.sqrt(difference / expected)) if expected else float(np.sqrt(difference))
