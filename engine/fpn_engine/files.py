"""Files written whole or not at all, and the folder for what may be remembered between runs."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from fpn_engine.errors import FpnEngineError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that takes its place when the block ends well.

    On any exception, KeyboardInterrupt included, the temporary is removed and ``path`` is as it was. A missing folder
    is made. Raises FpnEngineError where the disk or a permission says no.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise FpnEngineError(f"cannot write {path}: {error.strerror or error}") from None


def remove_stale(path: Path) -> None:
    """Remove temporaries that a killed process left beside ``path``. Call it while holding the lock on ``path``."""
    for left in path.parent.glob(f".{_escape(path.name)}.*.tmp"):
        left.unlink(missing_ok=True)


def cache_folder() -> Path:
    """$FPN_ENGINE_CACHE, else fpn-engine under $XDG_CACHE_HOME or ~/.cache; made if missing."""
    given = os.environ.get("FPN_ENGINE_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(given) if given else Path(base) / "fpn-engine"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FpnEngineError(
            f"cannot use the cache folder {folder}: {error.strerror}; set FPN_ENGINE_CACHE to one that is writable"
        ) from None
    return folder


def sha256_of(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _escape(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
