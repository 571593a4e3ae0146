"""The timing cache: what was measured on this GPU with these libraries, so that it is measured once."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from fpn_engine.backends.native.cuda.choices import read_tactic
from fpn_engine.backends.native.cuda.gpu import Gpu
from fpn_engine.backends.native.cuda.tactics import LEVELS, Tactic
from fpn_engine.errors import FpnEngineError
from fpn_engine.files import cache_folder, replacing

FOLDER, FORMAT_VERSION = "tactics", 1
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Timed:
    """The fastest tactic for a piece of work, its microseconds, and how much was measured: "quick" or "full"."""

    tactic: Tactic
    microseconds: float
    level: str


class TimingCache:
    """A JSON file in the cache folder for one GPU and one set of versions; without it nothing is lost but time.

    Args: versions: of the libraries that do the work; None takes those that are installed.
    """

    def __init__(self, gpu: Gpu, versions: Mapping[str, str] | None = None) -> None:
        self._for = {"gpu": gpu.name, "capability": gpu.capability, **(installed() if versions is None else versions)}
        self.timed = self._read()

    def find(self, key: str, level: str) -> Timed | None:
        """What is known of the work ``key``, if at least as much was measured as ``level`` asks."""
        timed = self.timed.get(key)
        return timed if timed and LEVELS.index(timed.level) >= LEVELS.index(level) else None

    def add(self, timed: Mapping[str, Timed]) -> None:
        """Keep results, beside those that other processes wrote meanwhile."""
        self.timed = self._read() | dict(timed)
        values = {key: [str(t.tactic), round(t.microseconds, 3), t.level] for key, t in self.timed.items()}
        text = json.dumps({"format_version": FORMAT_VERSION, "for": self._for, "timed": values}, indent=1)
        try:
            with replacing(self._path()) as temporary:
                temporary.write_text(text)
        except FpnEngineError as error:
            _logger.warning("what was measured is not kept: %s", error)

    def _path(self) -> Path:
        digest = hashlib.sha256(json.dumps(self._for, sort_keys=True).encode()).hexdigest()
        return cache_folder() / FOLDER / f"{digest[:16]}.json"

    def _read(self) -> dict[str, Timed]:
        try:
            path = self._path()
            text = path.read_text()
        except (OSError, FpnEngineError):
            return {}
        except ValueError:
            text = ""
        try:
            values = json.loads(text)
            if values["format_version"] != FORMAT_VERSION or values["for"] != self._for:
                raise ValueError("it is of another format or GPU")
            return {key: _read_timed(key, *entry) for key, entry in values["timed"].items()}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            _logger.warning("ignoring the damaged timing cache %s (%s); tactics are measured anew", path, error)
            return {}


def _read_timed(key: str, tactic: str, microseconds: float, level: str) -> Timed:
    if level not in LEVELS or type(microseconds) not in (int, float):
        raise ValueError(f"wrong entry {key[:80]!r}")
    return Timed(read_tactic(key, tactic), float(microseconds), level)


def installed() -> dict[str, str]:
    """Versions of the libraries whose speed is measured, and how torch has cuDNN choose its fused kernels."""
    import triton

    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    chosen = "measured" if torch.backends.cudnn.benchmark else "by rule"
    return {
        "torch": str(torch.__version__),
        "triton": str(triton.__version__),
        "cudnn": str(cudnn),
        "cudnn_kernels": chosen,
    }
