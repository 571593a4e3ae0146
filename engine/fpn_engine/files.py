"""Files written whole or not at all, and the folder for what may be remembered between runs."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from fpn_engine.errors import FpnEngineError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that takes its place when the block ends well.

    On any exception, KeyboardInterrupt included, the temporary is removed and ``path`` is as it was. A missing folder
    is made; a link stays a link. Raises FpnEngineError where the disk or a permission says no, and for folders, devices
    and pipes.
    """
    target = Path(os.path.realpath(path))
    temporary = target.parent / f".{target.name}.{os.getpid()}.tmp"
    try:
        if target.exists() and not target.is_file():
            what = "a folder" if target.is_dir() else "a device or pipe"
            raise FpnEngineError(f"cannot write {path}: it is {what}; give the name of a file")
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise unwritable(path, error) from None


def refuse_replacing(path: Path | None, option: str, inputs: Iterable[Path | None]) -> None:
    """Keep what a command reads from what it writes. Raises FpnEngineError if ``path`` is one of ``inputs``."""
    if path is None or not os.path.exists(path):
        return
    target = os.path.realpath(path)
    for source in inputs:
        if source is not None and os.path.realpath(source) == target:
            raise FpnEngineError(f"{option} {path} would replace {source}, which is read; give another name")


def unwritable(path: Path, error: OSError) -> FpnEngineError:
    """What to say when a file that the caller named cannot be written."""
    reason = error.strerror or error
    if isinstance(error, (FileExistsError, NotADirectoryError)):
        reason = "a part of its path is a file, not a folder"
    return FpnEngineError(f"cannot write {path}: {reason}; give a place that is writable and has space")


def remove_stale(path: Path) -> None:
    """Remove temporaries that a killed process left beside ``path``. Call it while holding the lock on ``path``."""
    target = Path(os.path.realpath(path))
    ours = re.compile(rf"\.{re.escape(target.name)}\.[0-9]+\.tmp")
    with contextlib.suppress(OSError):  # what cannot be removed is in nobody's way
        for left in target.parent.iterdir():
            if ours.fullmatch(left.name):
                left.unlink(missing_ok=True)


def cache_folder() -> Path:
    """$FPN_ENGINE_CACHE, else fpn-engine under $XDG_CACHE_HOME or ~/.cache; made if missing."""
    given, base = os.environ.get("FPN_ENGINE_CACHE"), os.environ.get("XDG_CACHE_HOME")
    try:
        folder = Path(given) if given else (Path(base) if base else Path.home() / ".cache") / "fpn-engine"
    except RuntimeError:  # a user without an entry in the system's list, as in containers
        raise FpnEngineError("there is no home folder to cache in; set FPN_ENGINE_CACHE to a folder") from None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unusable_cache(folder, error) from None
    return folder


def unusable_cache(folder: Path, error: OSError) -> FpnEngineError:
    """What to say when the cache folder, or something in it, cannot be written."""
    return FpnEngineError(
        f"cannot use the cache folder {folder}: {error.strerror or error}; "
        "set FPN_ENGINE_CACHE to a folder that is writable"
    )
