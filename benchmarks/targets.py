"""Targets: one TOML file per device under targets/; where that device is, a required target that is missed fails.

    device = "NVIDIA H200"          # what the provenance's device is, or begins with
    [[target]]
    suite = "engine"
    what = "R50-FPN, 800x1216, batch 1"
    contestants = ["fpn-engine, native fp16", "fpn-engine, native bf16"]    # the best of those that were timed counts
    figure = "milliseconds.median"
    at_most = 2.5                   # or at_least
    required = true                 # default; false: reported only
    step = "first"                  # what it is called

A target without ``contestants`` is about a figure of the row itself.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from benchmarks.rows import Row
from fpn_engine.errors import FpnEngineError

FOLDER = Path(__file__).parent / "targets"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A bound on one figure of one row; exactly one of ``at_most`` and ``at_least`` is given."""

    suite: str
    what: str
    figure: str
    contestants: tuple[str, ...] = ()
    at_most: float | None = None
    at_least: float | None = None
    required: bool = True
    step: str = "required"

    def __post_init__(self) -> None:
        if (self.at_most is None) == (self.at_least is None):
            raise ValueError(f"the target for {self.what!r} needs one of at_most and at_least")

    def find(self, row: Mapping[str, Any]) -> float | None:
        """The best figure, None where none was measured."""
        places = [row]
        if self.contestants:
            measured = row.get("contestants", {})
            places = [measured[name] for name in self.contestants if name in measured]
        found = [figure for place in places if (figure := _look_up(place, self.figure)) is not None]
        return (min if self.at_most is not None else max)(found, default=None)

    def is_met(self, figure: float) -> bool:
        return figure <= self.at_most if self.at_most is not None else figure >= (self.at_least or 0.0)

    def __str__(self) -> str:
        who = f", {' or '.join(self.contestants)}" if self.contestants else ""
        bound = f"at most {self.at_most:g}" if self.at_most is not None else f"at least {self.at_least:g}"
        return f"{self.suite}, {self.what}{who}: {self.figure} {bound}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """``figure`` None: it was not measured. ``is_here``: measured on the device that the target is for."""

    target: Target
    target_device: str
    device: str
    figure: float | None
    is_here: bool

    @property
    def is_met(self) -> bool:
        return self.figure is not None and self.target.is_met(self.figure)

    @property
    def is_failure(self) -> bool:
        """Missed by what was measured on the target's own device."""
        return self.is_here and self.target.required and self.figure is not None and not self.is_met

    @property
    def word(self) -> str:
        if self.figure is None:
            return "not measured"
        return "met" if self.is_met else "missed"

    def __str__(self) -> str:
        found = "" if self.figure is None else f"; {self.figure:g} on {self.device}"
        return f"{self.word}: {self.target}{found}"


@dataclass(frozen=True, slots=True)
class Targets:
    """By device."""

    of: Mapping[str, Sequence[Target]]

    @classmethod
    def load_all(cls, folder: Path = FOLDER) -> Self:
        """Raises: FpnEngineError naming the file that cannot be read."""
        found: dict[str, Sequence[Target]] = {}
        for path in sorted(folder.glob("*.toml")):
            try:
                table = tomllib.loads(path.read_text())
                found[table["device"]] = [
                    Target(**{**each, "contestants": tuple(each.get("contestants", ()))}) for each in table["target"]
                ]
            except (ValueError, TypeError, KeyError) as error:
                raise FpnEngineError(f"{path.name} holds no targets: {error}; see benchmarks/targets.py") from error
        return cls(found)

    def judge(self, rows: Iterable[Row]) -> list[Verdict]:
        """On the targets' own devices; elsewhere too, where nothing fails. Quick tries are no measurements."""
        return list(self._judge([row for row in rows if not row.get("quick")]))

    def _judge(self, rows: Sequence[Row]) -> Iterator[Verdict]:
        for device, targets in self.of.items():
            for target in targets:
                for row in rows:
                    if (row.get("suite"), row.get("what")) == (target.suite, target.what):
                        here = row.get("device", "")
                        yield Verdict(
                            target=target,
                            target_device=device,
                            device=here,
                            figure=target.find(row),
                            is_here=here.startswith(device),
                        )


def _look_up(place: Mapping[str, Any], figure: str) -> float | None:
    value: Any = place
    for key in figure.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
