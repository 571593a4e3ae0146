"""Figures as people read them: three digits, a unit that fits."""

from __future__ import annotations

from collections.abc import Mapping

NONE = ""


def write_ms(milliseconds: float | None) -> str:
    """Microseconds to seconds."""
    if milliseconds is None:
        return NONE
    if milliseconds >= 1000:
        return f"{_digits(milliseconds / 1e3)} s"
    return f"{_digits(milliseconds)} ms" if milliseconds >= 1 else f"{_digits(1e3 * milliseconds)} µs"


def write_spread(spent: Mapping[str, float]) -> str:
    """The median, and p20 to p80 in the same unit."""
    factor, unit = next(
        (factor, unit)
        for least, factor, unit in ((1000, 1e-3, "s"), (1, 1.0, "ms"), (0, 1e3, "µs"))
        if spent["median"] >= least
    )
    median, p20, p80 = (_digits(factor * spent[name]) for name in ("median", "p20", "p80"))
    return f"{median} {unit} ({p20} to {p80})"


def write_rate(images_per_s: float) -> str:
    return _digits(images_per_s)


def write_number(value: float | None) -> str:
    return NONE if value is None else _digits(value)


def write_percent(share: float | None) -> str:
    return NONE if share is None else f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.1f} %"


def write_bytes(count: int | None) -> str:
    if count is None:
        return "memory not measured"
    return f"{_digits(count / 1e9)} GB" if count >= 1e9 else f"{_digits(count / 1e6)} MB"


def _digits(value: float) -> str:
    """Three of them, never as a power of ten."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.3g}"
