"""The machine as the doctor sees it: every fact comes through one object, so that tests can make any machine."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fpn_engine.files import cache_folder, unusable_cache

PROBE_SECONDS = 120  # a first import of torch from a cold disk takes a while


class Reply(NamedTuple):
    """What a probe found, or why it could not."""

    values: Mapping[str, Any]
    failure: str | None = None


class Machine:
    """This machine and this Python."""

    @property
    def python(self) -> tuple[int, int, int]:
        return sys.version_info[:3]

    @property
    def system(self) -> str:
        """Linux, Darwin or Windows."""
        return platform.system()

    @property
    def platform(self) -> str:
        return platform.platform()

    @property
    def environment(self) -> Mapping[str, str]:
        return os.environ

    @property
    def cores(self) -> int:
        """Cores that this process may use."""
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    def read(self, path: str) -> str:
        """A text file of the system, or "" where there is none."""
        try:
            return Path(path).read_text(errors="replace")
        except OSError:
            return ""

    def version(self, package: str) -> str | None:
        """Installed version of a distribution, read without importing it."""
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    def requires(self, package: str) -> list[str]:
        """What a distribution asks for, as it states it."""
        try:
            return importlib.metadata.requires(package) or []
        except importlib.metadata.PackageNotFoundError:
            return []

    def version_file(self, module: str) -> str:
        """Text of a package's ``version.py``, which names the CUDA it was built for, without importing it."""
        spec = importlib.util.find_spec(module)
        folders = (spec.submodule_search_locations or []) if spec else []
        return "".join(self.read(os.path.join(folder, "version.py")) for folder in folders)

    def probe(self, name: str) -> Reply:
        """Ask one of ``fpn_engine.doctor.probes`` in a process of its own."""
        command = [sys.executable, "-P", "-m", "fpn_engine.doctor.probes", name]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=PROBE_SECONDS)
        except subprocess.TimeoutExpired:
            return Reply({}, f"no answer within {PROBE_SECONDS} s")
        if done.returncode == 0:
            return Reply(json.loads(done.stdout))
        if done.returncode < 0:
            return Reply({}, f"the process crashed with signal {-done.returncode}")
        lines = done.stderr.strip().splitlines()
        return Reply({}, lines[-1] if lines else f"exit code {done.returncode}")

    def check_cache(self) -> Path:
        """The cache folder, after writing a file there. Raises FpnEngineError if that is not possible."""
        folder = cache_folder()
        try:
            with tempfile.TemporaryFile(dir=folder) as stream:
                stream.write(b"x")
        except OSError as error:
            raise unusable_cache(folder, error) from None
        return folder
