"""Recipe: how a detector is trained (Lin et al. 2017, secs. 5.1 and 5.2)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from fpn_engine.errors import SpecError
from fpn_engine.spec_json import convert_value, finite_number, truth_value, whole_number
from fpn_export.training.targets import PAPER_SAMPLES, Samples

SCHEDULES = ("step", "cosine")
RECIPE = "the recipe"
PRECISIONS = ("fp32", "bf16")
PAPER_BATCH = 16  # images per step in the paper: two on each of eight GPUs
PAPER_RATE = 0.02  # learning rate at that batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything that decides the weights, beside the model, its initial weights and the data.

    Attributes:
        steps: weight updates. batch_size: images per update, over all processes.
        learning_rate: at the end of the warm-up; None is the paper's 0.02 for 16 images, in proportion to the batch.
        schedule: "step" divides the rate by 10 at each of ``milestones``, "cosine" takes it to 0.
        milestones: shares of ``steps``; the paper has 30k of 40k for the RPN and 60k of 80k for the box head.
        warmup_steps: steps over which the rate rises linearly.
        momentum, weight_decay: of SGD; nesterov: look ahead (the paper does not).
        clip_norm: largest norm of all gradients together; 0 does not clip.
        flip: chance of a horizontal flip. scales: range of the factor on min_size and max_size, drawn log-uniformly.
        brightness: largest relative change of brightness.
        anchors_per_image, rois_per_image, proposals_per_image: see :class:`Samples`.
        box_weight: of the box losses beside the classification losses (lambda in Ren et al. 2015, eq. 1).
        freeze_norm: batch norms keep their statistics and affine parameters, as when they come from ImageNet.
        frozen_stages: stages of the bottom-up network that are not trained: 0 none, 1 the stem, 2 also c2, ... 5 all.
        precision: of trunk and box head, "fp32" or "bf16"; everything else is fp32.
        seed: of initial weights, order, augmentation and sampling.

    Raises: SpecError for a value outside its range.
    """

    steps: int
    batch_size: int = PAPER_BATCH
    learning_rate: float | None = None
    schedule: str = "step"
    milestones: tuple[float, ...] = (0.75,)
    warmup_steps: int = 500
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    clip_norm: float = 0.0
    flip: float = 0.5
    scales: tuple[float, float] = (1.0, 1.0)
    brightness: float = 0.0
    anchors_per_image: int = PAPER_SAMPLES.anchors
    rois_per_image: int = PAPER_SAMPLES.rois
    proposals_per_image: int = PAPER_SAMPLES.proposals
    box_weight: float = 1.0
    freeze_norm: bool = False
    frozen_stages: int = 0
    precision: str = "fp32"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, ok, allowed in (
            ("steps", 1 <= self.steps < 2**31, "from 1 to 2^31 - 1"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("learning_rate", self.rate > 0 and math.isfinite(self.rate), "positive"),
            ("schedule", self.schedule in SCHEDULES, "one of " + ", ".join(SCHEDULES)),
            ("milestones", all(0 < m < 1 for m in self.milestones), "shares between 0 and 1"),
            ("warmup_steps", self.warmup_steps >= 0, "at least 0"),
            ("momentum", 0 <= self.momentum < 1, "from 0 to below 1"),
            ("nesterov", self.momentum > 0 or not self.nesterov, "false without momentum"),
            ("weight_decay", 0 <= self.weight_decay < 1, "from 0 to below 1"),
            ("clip_norm", self.clip_norm >= 0, "at least 0"),
            ("flip", 0 <= self.flip <= 1, "from 0 to 1"),
            ("scales", 0 < self.scales[0] <= self.scales[1] <= 16, "low,high with 0 < low <= high <= 16"),
            ("brightness", 0 <= self.brightness < 1, "from 0 to below 1"),
            ("anchors_per_image", self.anchors_per_image >= 1, "at least 1"),
            ("rois_per_image", self.rois_per_image >= 1, "at least 1"),
            ("proposals_per_image", self.proposals_per_image >= 1, "at least 1"),
            ("box_weight", self.box_weight > 0 and math.isfinite(self.box_weight), "positive"),
            ("frozen_stages", 0 <= self.frozen_stages <= 5, "from 0 to 5"),
            ("precision", self.precision in PRECISIONS, "one of " + ", ".join(PRECISIONS)),
            ("seed", 0 <= self.seed < 2**32, "from 0 to 2^32 - 1"),
        ):
            if not ok:
                raise SpecError(f"{name} must be {allowed}, not {getattr(self, name)!r}")

    @property
    def rate(self) -> float:
        """Learning rate at the end of the warm-up."""
        return PAPER_RATE * self.batch_size / PAPER_BATCH if self.learning_rate is None else self.learning_rate

    @property
    def samples(self) -> Samples:
        return Samples(self.anchors_per_image, self.rois_per_image, self.proposals_per_image)

    def rate_at(self, step: int) -> float:
        """Learning rate of update ``step``, counted from 0."""
        rate = self.rate
        if self.schedule == "cosine":
            rate *= 0.5 * (1 + math.cos(math.pi * step / self.steps))
        else:
            rate *= 0.1 ** sum(step >= milestone * self.steps for milestone in self.milestones)
        return rate * min(1.0, (step + 1) / (self.warmup_steps + 1))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; :meth:`from_dict` gives it back unchanged."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """From JSON values. Raises SpecError for an unknown key or a value of the wrong form."""
        known = [f.name for f in dataclasses.fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise SpecError(f"unknown key {unknown[0]!r} in the recipe; known keys: {', '.join(known)}")
        if "steps" not in values:
            raise SpecError("the recipe has no steps; say how many")
        return cls(**{name: convert_value(name, _CONVERT[name], value, RECIPE) for name, value in values.items()})


def count_steps(epochs: float, images: int, batch_size: Any) -> int:
    """Updates in which each of ``images`` is seen ``epochs`` times, at least 1.

    Raises: SpecError if there is no such number, or ``batch_size`` is none.
    """
    size = convert_value("batch_size", whole_number, batch_size, RECIPE)
    if size < 1:
        raise SpecError(f"batch_size must be at least 1, not {size}")
    steps = epochs * images / size
    if not math.isfinite(steps):
        raise SpecError(f"{epochs} epochs are no finite number of updates; give other --epochs")
    return max(1, round(steps))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not a text")
    return value


def _rate(value: Any) -> float | None:
    return None if value is None else finite_number(value)


def _numbers(value: Any) -> tuple[float, ...]:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{value!r} is not a list of numbers")
    return tuple(finite_number(number) for number in value)


def _two_numbers(value: Any) -> tuple[float, ...]:
    numbers = _numbers(value)
    if len(numbers) != 2:
        raise ValueError(f"{value!r} is not two numbers")
    return numbers


_BY_TYPE = {"int": whole_number, "float": finite_number, "bool": truth_value, "str": _text}
_BY_NAME = {"learning_rate": _rate, "milestones": _numbers, "scales": _two_numbers}
_CONVERT: dict[str, Any] = {f.name: _BY_NAME.get(f.name) or _BY_TYPE[str(f.type)] for f in dataclasses.fields(Recipe)}
