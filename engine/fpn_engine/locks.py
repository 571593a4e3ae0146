"""Locks between processes: one works, the others wait and take the result."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from fpn_engine.files import cache_folder, unusable_cache


@contextlib.contextmanager
def alone_on(path: Path, work: str, on_wait: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """Hold the lock on a kind of ``work`` (a folder's name in the cache) on ``path``, which need not exist.

    A process that is killed gives its lock back. ``on_wait`` is called if another process holds it. Yields a path in
    the folder of that work that no other holder uses. Raises FpnEngineError if the cache folder cannot be written.
    """
    folder = cache_folder() / work
    place = folder / hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:16]
    lock = FileLock(place.with_suffix(".lock"))
    try:
        folder.mkdir(exist_ok=True)
        try:
            held = lock.acquire(timeout=0)
        except Timeout:
            on_wait()
            held = lock.acquire()
    except OSError as error:
        raise unusable_cache(folder, error) from None
    with held:
        yield place
