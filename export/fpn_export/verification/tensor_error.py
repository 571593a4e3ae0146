"""How far one tensor is from another."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor


class TensorError(NamedTuple):
    """The error of B against A.

    Attributes:
        norm: of the difference, as a part of A's. largest: difference, as a part of A's largest magnitude.
        fault: why no number says it: other shapes, NaN; else "".
        by_norm: whether the norm alone counts, as where outliers are clipped on purpose.
    """

    norm: float
    largest: float
    fault: str = ""
    by_norm: bool = False

    @property
    def value(self) -> float:
        """What is held against a tolerance; infinite where there is a fault."""
        if self.fault:
            return math.inf
        return self.norm if self.by_norm else max(self.norm, self.largest)


NO_ERROR = TensorError(0.0, 0.0)


def measure(actual: Tensor, expected: Tensor, scale: tuple[float, float] | None = None) -> TensorError:
    """The error of ``actual``; both float32.

    Args: scale: root mean square and largest magnitude to measure against, where those of ``expected`` are no measure.
    """
    if actual.shape != expected.shape:
        return TensorError(math.inf, math.inf, f"shapes {_text(expected)} and {_text(actual)}")
    if not expected.numel():
        return NO_ERROR
    finite = bool(expected.isfinite().all()), bool(actual.isfinite().all())
    if not all(finite):
        where = {(False, True): "A", (True, False): "B"}.get(finite, "both")
        return TensorError(math.inf, math.inf, f"NaN or infinity in {where}")
    own = magnitudes(expected)
    rms, largest = (max(pair) for pair in zip(own, scale or own, strict=True))
    difference = (actual - expected).double()
    return TensorError(
        _ratio(float(difference.square().mean().sqrt()), rms), _ratio(float(difference.abs().max()), largest)
    )


def magnitudes(tensor: Tensor) -> tuple[float, float]:
    """Root mean square and largest magnitude; zeros of an empty tensor."""
    if not tensor.numel():
        return 0.0, 0.0
    return float(tensor.double().square().mean().sqrt()), float(tensor.abs().max())


def _ratio(part: float, whole: float) -> float:
    """0 of nothing is 0."""
    return part / whole if whole else (0.0 if part == 0 else math.inf)


def _text(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape))
