"""The timing cache: what the builder measured on this GPU, kept so that the next build need not measure it again."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from fpn_engine.backends.tensorrt.target import Gpu
from fpn_engine.errors import FpnEngineError
from fpn_engine.files import cache_folder, replacing


class TimingCache:
    """A file in the cache folder for one version of TensorRT and one kind of GPU; without one nothing is lost but time.

    Attributes: path: the file, None where there is no cache folder to use.
    """

    def __init__(self, version: str, gpu: Gpu) -> None:
        name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{version}-{gpu.name}-sm{gpu.capability[0]}{gpu.capability[1]}")
        self.path: Path | None = None
        with contextlib.suppress(FpnEngineError):
            self.path = cache_folder() / "tensorrt" / f"timing-{name}.cache"

    def read(self) -> bytes:
        """What is known, b"" for nothing."""
        try:
            return self.path.read_bytes() if self.path else b""
        except OSError:
            return b""

    def write(self, data: bytes) -> None:
        if self.path and data:
            with contextlib.suppress(FpnEngineError), replacing(self.path) as temporary:
                temporary.write_bytes(data)
