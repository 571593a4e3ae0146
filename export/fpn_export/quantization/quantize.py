"""Quantisation from end to end: calibrate, measure each layer, keep the worst in float until the score is kept."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import ModelProto, helper

import fpn_engine
from fpn_engine.errors import ModelError, OptionError
from fpn_engine.ground_truth import CocoGroundTruth
from fpn_engine.spec import ModelSpec
from fpn_export.quantization.calibration import Note, calibrate, cut_parts
from fpn_export.quantization.eight_bits import DTYPES, FP8
from fpn_export.quantization.layers import Layer, Network, select_layers
from fpn_export.quantization.pairs import insert_pairs, quantize_weight, relative_error, takes_precision
from fpn_export.quantization.ranges import RANGES
from fpn_export.quantization.report import LayerRow, Report
from fpn_export.quantization.scoring import CERTAIN, Found, detect, score_agreement, score_ap
from fpn_export.quantization.sensitivity import Sensitivity
from fpn_export.tensorrt.quantized_graph import is_quantized

METADATA_KEY = "fpn_engine.quantization"
Begin = Callable[[str, int], Callable[[], None]]  # a step's title and length to what is called for each unit done


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeOptions:
    """How to quantise.

    Attributes:
        precision: "int8" or "fp8". ranges: a name in ``RANGES``.
        calibrate, score, sensitivity: how many images to take for each; 0 sensitivity leaves it out.
        tolerance: the largest loss, in points of 100: of AP with annotations, of agreement without. None keeps all
            layers quantised that can be.
        keep_float: layers that are not quantised in any case, names or patterns with ``*``.
    """

    precision: str = "int8"
    ranges: str = "percentile"
    calibrate: int = 64
    score: int = 100
    sensitivity: int = 4
    tolerance: float | None = 0.3
    keep_float: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for what, given, known in (("precision", self.precision, DTYPES), ("ranges", self.ranges, RANGES)):
            if given not in known:
                raise OptionError(f"there is no {what} {given!r}; take one of {', '.join(known)}")
        if self.precision == FP8 and self.ranges == "entropy":
            raise OptionError("entropy is of equal steps, which fp8 has not; take --ranges mse, percentile or max")
        if min(self.calibrate, self.score) < 1 or self.sensitivity < 0:
            raise OptionError("at least one image is needed to calibrate and one to score")
        if self.tolerance is not None and self.tolerance < 0:
            raise OptionError(f"the tolerance is a loss of 0 points or more, not {self.tolerance}")


def quantize_model(
    model: ModelProto,
    spec: ModelSpec,
    paths: Sequence[Path],
    options: QuantizeOptions,
    *,
    truth: CocoGroundTruth | None = None,
    begin: Begin = lambda title, total: lambda: None,
    on_note: Note = lambda line: None,
) -> tuple[ModelProto, Report]:
    """Quantise a whole float32 file; the model given is left as it is.

    Args:
        paths: images like those that the model will see. Some calibrate; the score is taken on others, if there are.
        truth: annotations of all of ``paths``.
    Raises: ModelError for a model that is quantised already, has no RPN, or whose numbers are not finite; OptionError
        for layers that are not there; ImageError if no image can be read.
    """
    if is_quantized(model):
        raise ModelError("the model is quantised already; quantise the float one that it was made of")
    if not spec.has_rpn:
        raise ModelError("a Fast R-CNN takes its proposals from another model and cannot be calibrated on images alone")
    run = _Run(model, spec, options, truth, begin, on_note)
    return run(paths)


class _Run:
    def __init__(
        self,
        model: ModelProto,
        spec: ModelSpec,
        options: QuantizeOptions,
        truth: CocoGroundTruth | None,
        begin: Begin,
        on_note: Note,
    ) -> None:
        self._model, self._spec, self._options, self._truth = model, spec, options, truth
        self._begin, self._note = begin, on_note
        self._network = Network(model)
        neural = {tensor.name for part in cut_parts(model, spec).values() for tensor in part.graph.initializer}
        self._layers = [layer for layer in self._network.layers if layer.weight in neural]
        self._kept = select_layers(self._layers, options.keep_float)
        self._ranges: dict[str, float] = {}

    def __call__(self, paths: Sequence[Path]) -> tuple[ModelProto, Report]:
        options = self._options
        chosen = [layer for layer in self._layers if layer.name not in self._kept and self._takes(layer)]
        if not chosen:
            raise OptionError("no layer is left to quantise; keep fewer in float")
        weights = {layer.name: self._network.weight(layer) for layer in self._layers}
        calibrating, scoring = split_images(paths, options.calibrate, options.score)
        advance = self._begin("calibrating", len(calibrating))
        seen = calibrate(self._model, self._spec, self._layers, calibrating, advance, self._note)
        find_range = RANGES[options.ranges]
        self._ranges = {name: find_range(each, options.precision) for name, each in seen.histograms.items()}
        alone: dict[str, float] = {}
        sensitivity = None
        if options.sensitivity:
            sensitivity = Sensitivity(self._model, self._spec, calibrating[: options.sensitivity], self._note)
            advance = self._begin("measuring layers", len(chosen))
            alone = sensitivity.measure_alone(chosen, self._ranges, options.precision, advance)
        exact = self._detect("scoring fp32", self._model, scoring)
        before = self._score(exact, exact)
        names = [layer.name for layer in chosen]
        first = self._try(set(names), scoring, exact)
        worst = sorted(names, key=lambda name: -alone.get(name, 0.0))
        kept, after = self._fall_back(worst if alone else [], first, before, names, scoring, exact)
        final = set(names) - kept
        made = self._insert(final)
        gathered = [
            sensitivity.measure_gathered(layers, self._ranges, options.precision) if sensitivity else {}
            for layers in (set(names), final)
        ]
        rows = []
        for layer in self._layers:
            array = weights[layer.name]
            steps, scale = quantize_weight(array, options.precision)
            rows.append(
                LayerRow(
                    name=layer.name,
                    parameters=int(array.size),
                    quantized=layer.name in final,
                    why_float=self._why_float(layer, kept),
                    weight_error=relative_error(array, steps, scale),
                    alone=alone.get(layer.name),
                    gathered_all=gathered[0].get(layer.name),
                    gathered=gathered[1].get(layer.name),
                )
            )
        report = Report(
            precision=options.precision,
            ranges=options.ranges,
            calibrated_on=len(seen.images),
            scored_on=len(exact),
            held_out=not set(calibrating) & set(scoring),
            sensitivity_on=min(options.sensitivity, len(calibrating)),
            metric="AP" if self._truth else "agreement",
            tolerance=options.tolerance,
            score_float=_or_none(before),
            score_all=_or_none(first),
            score=_or_none(after),
            layers=rows,
        )
        self._describe(made, report)
        return made, report

    def _takes(self, layer: Layer) -> bool:
        return takes_precision(self._network, layer, self._options.precision)

    def _why_float(self, layer: Layer, fallback: set[str]) -> str:
        if layer.name in self._kept:
            return "asked for"
        if not self._takes(layer):
            return f"not for {self._options.precision}"
        return "costs too much" if layer.name in fallback else ""

    def _insert(self, layers: set[str]) -> ModelProto:
        made = insert_pairs(self._model, layers, self._ranges, self._options.precision)
        onnx.checker.check_model(made, full_check=True)
        return made

    def _detect(self, title: str, model: ModelProto, paths: Sequence[Path]) -> Found:
        silent: Note = lambda line: None  # noqa: E731  a bad image is noted once, by the first who meets it
        note = self._note if title == "scoring fp32" else silent
        return detect(model, self._spec, paths, self._begin(title, len(paths)), note)

    def _score(self, found: Found, exact: Found) -> float:
        """NaN if there is nothing to find."""
        return score_ap(found, self._truth) if self._truth else score_agreement(found, exact)

    def _try(self, layers: set[str], paths: Sequence[Path], exact: Found) -> float:
        if not layers:
            return self._score(exact, exact)
        title = f"scoring {self._options.precision}, {len(layers)} layers"
        return self._score(self._detect(title, self._insert(layers), paths), exact)

    def _fall_back(
        self,
        worst: Sequence[str],
        score: float,
        before: float,
        names: Sequence[str],
        paths: Sequence[Path],
        exact: Found,
    ) -> tuple[set[str], float]:
        """The fewest of the worst layers that must stay float for the tolerance to hold, and the score then.

        Their number is doubled until it holds, then halved back: a few scores, not one for each layer.
        """
        tolerance = self._options.tolerance

        def is_kept(value: float) -> bool:
            return tolerance is None or 100 * (before - value) <= tolerance

        if math.isnan(score):
            what = "nothing is annotated" if self._truth else f"the float model scores nothing {CERTAIN} or more"
            self._note(
                f"{what} on the {len(paths)} images to score on: what {self._options.precision} costs is not known"
            )
            return set(), score
        if is_kept(score):
            return set(), score
        if not worst:
            self._note("the tolerance does not hold, and without --sensitivity no layer can be told to keep in float")
            return set(), score
        scores = {0: score}
        low, high = 0, 1
        while True:
            scores[high] = self._try(set(names) - set(worst[:high]), paths, exact)
            if is_kept(scores[high]) or high == len(worst):
                break
            low, high = high, min(2 * high, len(worst))
        while high - low > 1:
            middle = (low + high) // 2
            scores[middle] = self._try(set(names) - set(worst[:middle]), paths, exact)
            low, high = (low, middle) if is_kept(scores[middle]) else (middle, high)
        if high == len(worst):
            raise ModelError(
                f"the score stays within {tolerance} points in float32 only; raise --tolerance, take more images with "
                "--calibrate, or other --ranges"
            )
        return set(worst[:high]), scores[high]

    def _describe(self, model: ModelProto, report: Report) -> None:
        facts = {
            "precision": report.precision,
            "ranges": report.ranges,
            "calibrated_on": report.calibrated_on,
            "measured": report.summary(),
            "float_layers": [row.name for row in report.layers if not row.quantized],
            "by": f"fpn-engine {fpn_engine.__version__}",
        }
        properties = {prop.key: prop.value for prop in model.metadata_props}
        helper.set_model_props(model, properties | {METADATA_KEY: json.dumps(facts)})


def _or_none(score: float) -> float | None:
    """None for NaN, which JSON does not have."""
    return None if math.isnan(score) else score


def read_measured(model: ModelProto) -> str:
    """The line of the report that a quantised file was written with, empty where it says nothing."""
    text = next((prop.value for prop in model.metadata_props if prop.key == METADATA_KEY), "{}")
    try:
        facts = json.loads(text)
    except ValueError:
        return ""
    line = facts.get("measured", "") if isinstance(facts, dict) else ""
    return line if isinstance(line, str) and line.isprintable() else ""


def split_images(paths: Sequence[Path], calibrate: int, score: int) -> tuple[list[Path], list[Path]]:
    """Images to calibrate on and to score on, each spread evenly; the same ones only where there are too few.

    At least a quarter is left to score on, if there are four.
    """
    fewest = min(calibrate, max(1, len(paths) * 3 // 4))
    chosen = _spread(paths, fewest)
    others = [path for path in paths if path not in set(chosen)]
    return chosen, _spread(others or chosen, score)


def _spread(paths: Sequence[Path], number: int) -> list[Path]:
    if number >= len(paths):
        return list(paths)
    return [paths[i * len(paths) // number] for i in range(number)]
