"""The report of a quantisation: JSON for programs, Markdown for people, a chart of each layer's error."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRow:
    """One layer. Errors are norms of differences as parts of norms; None where none was measured.

    Attributes:
        weight_error: of the weight alone. alone: of its part's outputs, if this layer is quantised and no other.
        gathered_all, gathered: of the layer's result, with all layers quantised and with those that were in the end.
        why_float: of a layer that is not quantised.
    """

    name: str
    parameters: int
    quantized: bool
    why_float: str
    weight_error: float
    alone: float | None
    gathered_all: float | None
    gathered: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What was done and what it costs.

    Attributes:
        calibrated_on, scored_on, sensitivity_on: numbers of images; held_out: whether none of those that calibrated
            was scored.
        metric: "AP", or "agreement" with the float model's own detections; scores are in 0..1, of float32, with all
            layers quantised, and as written; all None if the scored images have nothing to find.
        tolerance: in points of 100, None for any.
    """

    precision: str
    ranges: str
    calibrated_on: int
    scored_on: int
    held_out: bool
    sensitivity_on: int
    metric: str
    tolerance: float | None
    score_float: float | None
    score_all: float | None
    score: float | None
    layers: list[LayerRow]

    @property
    def float_layers(self) -> list[LayerRow]:
        return [row for row in self.layers if not row.quantized]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    def summary(self) -> str:
        """One line."""
        kept = len(self.float_layers)
        of_all = f"{len(self.layers) - kept} of {len(self.layers)} layers in {self.precision}"
        images = f"on {self.scored_on} images"
        if self.score is None:
            return f"{of_all}, {self.metric} not measured: nothing to find {images}"
        return f"{of_all}, {self.metric} {_points(self.score_float)} -> {_points(self.score)} {images}"

    def to_markdown(self, title: str, chart: str) -> str:
        """A page; ``chart`` is the file name of the picture."""
        return "\n".join(self._lines(title, chart)) + "\n"

    def _lines(self, title: str, chart: str) -> Iterator[str]:
        images = "others" if self.held_out else "the same, as there are no others"
        what = {"AP": "COCO AP", "agreement": "Agreement (AP with the float model's detections as truth)"}[self.metric]
        yield f"# {title}"
        yield ""
        yield f"{self.summary()}."
        yield f"Ranges by {self.ranges}, calibrated on {self.calibrated_on} images, scored on {images}."
        yield ""
        yield f"| {what} | points | against float32 |"
        yield "|---|---|---|"
        yield f"| float32 | {_points(self.score_float)} | |"
        yield f"| all that can be in {self.precision} | {_points(self.score_all)} | {self._change(self.score_all)} |"
        yield f"| as written | {_points(self.score)} | {self._change(self.score)} |"
        yield ""
        if self.sensitivity_on:
            yield f"![Error of each layer]({chart})"
            yield ""
            yield f"Errors are |difference| / |value|, on {self.sensitivity_on} images."
            yield "*Alone*: of the network's outputs if this layer alone is quantised."
            yield "*Gathered*: of the layer's own result, all layers quantised, and as written."
        else:
            yield "Without sensitivity per layer. Errors are |difference| / |value|."
        yield ""
        yield "| layer, worst first | parameters | weight | alone | gathered, all | gathered | |"
        yield "|---|---|---|---|---|---|---|"
        for row in sorted(self.layers, key=lambda row: -(row.alone or 0.0)):
            errors = (row.weight_error, row.alone, row.gathered_all, row.gathered)
            kept = "" if row.quantized else f"float: {row.why_float}"
            yield f"| `{row.name}` | {row.parameters:,} | {' | '.join(map(_percent, errors))} | {kept} |"

    def _change(self, score: float | None) -> str:
        return "" if score is None or self.score_float is None else f"{100 * (score - self.score_float):+.2f}"


def _points(score: float | None) -> str:
    return "" if score is None else f"{100 * score:.2f}"


def _percent(error: float | None) -> str:
    return "" if error is None else f"{100 * error:.2f} %"
