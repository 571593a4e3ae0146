"""The floor of a detector, counted on its ONNX graph: the least time of its products and bytes on this device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from onnx import ModelProto

from fpn_engine import stages
from fpn_engine.roofline import DTYPES, Peaks, count_mapping
from fpn_engine.spec import ModelSpec
from fpn_export.onnx_cost import HEAD, Cost, count_detector

ITEMSIZES = {name: dtype.itemsize for name, dtype in DTYPES.items()}  # of the precisions whose floor is known
TRUNK, POOLING, PREPROCESS = "trunk", "RoIAlign", "preprocess"


@dataclass(frozen=True, slots=True, kw_only=True)
class Floors:
    """Of one detector on one batch.

    Attributes:
        stages: milliseconds of the stages that move maps. parts: the same within trunk and head, finer.
        macs: multiply-adds of trunk and head.
    """

    stages: Mapping[str, float]
    parts: Mapping[str, float]
    macs: int

    @property
    def whole(self) -> float:
        """Milliseconds of trunk and head, one operation after another."""
        return sum(self.parts.values())

    def beside(self, milliseconds: float) -> dict[str, float]:
        """The roofline columns of a measured time."""
        return {
            "floor_ms": float(f"{self.whole:.4g}"),
            "share_of_floor": float(f"{self.whole / milliseconds:.3g}"),
            "TFLOP_per_s": float(f"{2 * self.macs / milliseconds / 1e9:.4g}"),
        }


def count_floors(
    model: ModelProto, spec: ModelSpec, size: tuple[int, int], batch: int, itemsize: int, peaks: Peaks
) -> Floors:
    """``size``: padded height and width. ``itemsize``: bytes per number of weights and activations."""
    costs = count_detector(model, spec, size, batch=batch, itemsize=itemsize)
    parts = {name: _add_up(listed, peaks) for name, listed in costs.items()}
    mapping = count_mapping(spec, size, batch, itemsize, peaks)
    found = {
        PREPROCESS: mapping[stages.PREPROCESS],
        TRUNK: sum(spent for name, spent in parts.items() if name != HEAD),
    }
    if stages.POOLING in mapping:
        found[POOLING] = mapping[stages.POOLING]
    if HEAD in parts:
        found[HEAD] = parts[HEAD]
    macs = sum(cost.macs for listed in costs.values() for cost in listed)
    return Floors(stages=_round(found), parts=_round(parts), macs=macs)


def _add_up(costs: Sequence[Cost], peaks: Peaks) -> float:
    return 1e3 * sum(cost.floor_seconds(peaks.flops, peaks.bandwidth) for cost in costs)


def _round(milliseconds: Mapping[str, float]) -> dict[str, float]:
    return {name: float(f"{spent:.4g}") for name, spent in milliseconds.items()}
