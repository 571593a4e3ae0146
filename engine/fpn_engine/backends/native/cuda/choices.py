"""Choices: the tactic for every piece of work, measured if it was, else the nearest that was, else by rule."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fpn_engine.backends.native.cuda.gpu import Gpu
from fpn_engine.backends.native.cuda.tactics import LEVELS, Tactic, choose, supports
from fpn_engine.backends.native.cuda.work import Work
from fpn_engine.backends.native.shapes import Shape

PART = "tactics.json"  # of a plan
FORMAT_VERSION = 1
NEAR = 4.0  # times as many cells, within which a measured choice is better than the rule
MAX_SIDE = 1 << 16
_KEYS = {"format_version", "gpu", "level", "shapes", "tactics"}


class Choices:
    """The tactics for a GPU.

    Args: known: measured ones by :attr:`Work.key`.
    """

    def __init__(self, gpu: Gpu, known: Mapping[str, Tactic] | None = None) -> None:
        self.gpu = gpu
        self.known = dict(known or {})
        self._families: dict[str, list[tuple[float, Tactic]]] = {}
        for key, tactic in self.known.items():
            shape, _, family = key.partition(" ")
            self._families.setdefault(family, []).append((_log_cells(shape), tactic))

    def pick(self, work: Work) -> Tactic:
        """What to run. A choice that the GPU or the work does not support is passed over."""
        known = self.known.get(work.key)
        if known is not None and supports(known, work, self.gpu):
            return known
        here = math.log(math.prod(work.x[:-1]))
        near = [
            (abs(cells - here), tactic)
            for cells, tactic in self._families.get(work.family, [])
            if abs(cells - here) <= math.log(NEAR) and supports(tactic, work, self.gpu)
        ]
        return min(near, key=lambda found: found[0])[1] if near else choose(work, self.gpu)


def _log_cells(shape: str) -> float:
    return math.log(math.prod(int(side) for side in shape.split("x")[:-1]))


@dataclass(frozen=True, slots=True, kw_only=True)
class TunedTactics:
    """The part of a CUDA plan that says what was measured.

    Attributes:
        gpu: the name of the GPU that it was measured on, empty if nothing was: then loading measures, once.
        level: "quick" or "full", what is measured.
        shapes: batch, height and width that are measured.
        tactics: by :attr:`Work.key`, of trunk and head.
    """

    gpu: str = ""
    level: str = LEVELS[0]
    shapes: tuple[tuple[int, int, int], ...]
    tactics: Mapping[str, Tactic] = field(default_factory=dict)

    def to_json(self) -> bytes:
        values = {
            "format_version": FORMAT_VERSION,
            "gpu": self.gpu,
            "level": self.level,
            "shapes": self.shapes,
            "tactics": {key: str(tactic) for key, tactic in self.tactics.items()},
        }
        return json.dumps(values, indent=1).encode()

    @classmethod
    def read(cls, data: bytes) -> TunedTactics:
        """What :meth:`to_json` wrote. Raises ValueError that says what is wrong."""
        try:
            values = json.loads(data)
        except (ValueError, RecursionError):
            raise ValueError(f"{PART} is not JSON") from None
        if not isinstance(values, dict) or set(values) != _KEYS or values["format_version"] != FORMAT_VERSION:
            raise ValueError(f"{PART} has not the keys of format {FORMAT_VERSION}")
        gpu, level, shapes, tactics = (values[name] for name in ("gpu", "level", "shapes", "tactics"))
        if not isinstance(gpu, str) or level not in LEVELS or not isinstance(tactics, dict):
            raise ValueError(f"{PART} has a wrong value")
        if not isinstance(shapes, list) or not shapes or not all(_is_shape(shape) for shape in shapes):
            raise ValueError(f"{PART} has wrong shapes")
        return cls(
            gpu=gpu,
            level=level,
            shapes=tuple((n, h, w) for n, h, w in shapes),
            tactics={key: read_tactic(key, text) for key, text in tactics.items()},
        )

    def trunk_shapes(self) -> list[Shape]:
        return [(n, h, w, 3) for n, h, w in self.shapes]

    def head_shapes(self, rois: int, width: int) -> list[Shape]:
        """Rows of RoI features, ``rois`` for each image."""
        return [(n * rois, width) for n in dict.fromkeys(shape[0] for shape in self.shapes)]


def read_tactic(key: Any, text: Any) -> Tactic:
    """A tactic from a file, under the key of its work. Raises ValueError."""
    head = str(key).partition(" ")[0].split("x")
    if len(head) not in (2, 4) or not all(side.isascii() and side.isdigit() and int(side) for side in head):
        raise ValueError(f"{str(key)[:80]!r} names no work")
    if not isinstance(text, str):
        raise ValueError(f"there is no tactic {text!r}")
    return Tactic.parse(text)


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, list) and len(shape) == 3 and all(type(n) is int and 1 <= n <= MAX_SIDE for n in shape)
