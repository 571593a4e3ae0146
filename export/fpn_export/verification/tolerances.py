"""How far stages may differ, by precision: what rounding alone explains, and twice that.

Errors of layers add up as those of a random walk: with L layers that each round weights and activations by a relative
rms error of r, the norm of what comes out is off by about r sqrt(2 L) of itself. r is

    fp32        sqrt(K) 2^-24: a sum of K products, in another order
    fp16, bf16  2^-11 / sqrt(3), 2^-8 / sqrt(3): uniform within half a step; sums are float32
    int8        8 / (127 sqrt(12)): a step is a 127th of the range, and the range about eight times the rms
    fp8         2^-4 / sqrt(3): E4M3 keeps three bits

Only the neural parts and the maps they leave depend on it: preprocessing, selection, decoding and NMS are float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fpn_engine.spec import ModelSpec
from fpn_export.verification.trace import (
    BOX_DELTAS,
    CLASS_LOGITS,
    DETECTIONS,
    IMAGE,
    PROPOSALS,
    ROI_FEATURES,
    STAGES,
    TRUNK,
)

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8")  # finest first
CALIBRATED = ("int8", "fp8")
SAFETY = 2.0
UNIFORM = math.sqrt(3.0)
ROUNDINGS = {
    "fp16": 2.0**-11 / UNIFORM,
    "bf16": 2.0**-8 / UNIFORM,
    "int8": 8 / (127 * math.sqrt(12.0)),
    "fp8": 2.0**-4 / UNIFORM,
}
FLOAT32 = 2.0**-24
CONVOLUTIONS = {"resnet18": 17, "resnet34": 33, "resnet50": 49, "resnet101": 100}  # on the way to c5
BEHIND_C5 = 4  # lateral and output of the pyramid, the RPN's window and its two answers
HEAD_LAYERS = {"two_mlp": 3, "conv5": 10}  # with the predictor
WINDOW = 9  # cells of a 3x3 convolution
# A coordinate near 1333 pixels is rounded by 2^-24 of that, 8e-5 pixels; on P2, of stride 4, 2e-5 cells in each axis.
COORDINATES = 4e-5
PREPROCESSED = 1e-5  # resampling weights in float32, as tests hold it against torchvision

# The same proposal or detection from the same input: pixels of the resized image, and score.
SAME_CORNER, SAME_SCORE = 1e-2, 1e-4
# The top-k and the NMS of thousands of boxes meet ties that rounding decides; detections have their ties looked at.
LOST_PROPOSALS = 0.01
# Detections from half on that may lose their twin to rounding, ties aside, as a share; at reduced precision one always.
SURE = 0.5
LOST_DETECTIONS = {"fp32": 0.0, "fp16": 0.01, "bf16": 0.05, "int8": 0.35, "fp8": 0.50}
AP_POINTS = {"fp32": 0.001, "fp16": 0.002, "bf16": 0.003, "int8": 0.003, "fp8": 0.005}  # 0..1


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerances:
    """Of one pair. ``stages``: of each stage, relative error on the same input, or share without counterpart."""

    precision: str
    stages: dict[str, float]
    lost_detections: float
    ap: float

    @property
    def by_norm(self) -> bool:
        """Whether the norm of an error counts alone: calibrated ranges clip the largest values on purpose."""
        return self.precision in CALIBRATED


def coarser(first: str, second: str) -> str:
    """The precision of the two with fewer bits."""
    return max(first, second, key=PRECISIONS.index)


def derive(spec: ModelSpec, precision: str) -> Tolerances:
    """The tolerances for a model, one of whose two forms has ``precision``, the other at least that."""
    sums = WINDOW * max(8 * spec.body_width, spec.fpn_channels)  # the longest sums of the trunk: c5 or the pyramid
    layers = CONVOLUTIONS[spec.arch] + BEHIND_C5
    trunk = _spread(precision, layers, sums)
    features = spec.feature_channels * spec.box_roi_pool.output_size**2
    head = _spread(precision, HEAD_LAYERS[spec.box_head], features if spec.box_head == "two_mlp" else sums)
    stored = ROUNDINGS.get(precision, 0.0)
    stages = dict.fromkeys(TRUNK, trunk) | {
        IMAGE: max(PREPROCESSED, SAFETY * stored if precision in ("fp16", "bf16") else 0.0),
        PROPOSALS: LOST_PROPOSALS,
        ROI_FEATURES: SAFETY * max(COORDINATES, 2 * UNIFORM * stored),  # features and results, each by half a step
        CLASS_LOGITS: head,
        BOX_DELTAS: head,
        DETECTIONS: 0.0,
    }
    return Tolerances(
        precision=precision,
        stages={stage: stages[stage] for stage in STAGES},
        lost_detections=LOST_DETECTIONS[precision],
        ap=AP_POINTS[precision],
    )


def _spread(precision: str, layers: int, sums: int) -> float:
    """Of ``layers`` layers whose longest sums have ``sums`` products."""
    rounding = max(ROUNDINGS.get(precision, 0.0), math.sqrt(sums) * FLOAT32)
    return SAFETY * rounding * math.sqrt(2.0 * layers)
