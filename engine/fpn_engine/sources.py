"""Which images to read: files, folders and globs, in the order they were given."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NoReturn

from fpn_engine.errors import ImageError

SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    *(".png", ".apng", ".webp", ".tif", ".tiff", ".bmp", ".gif"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
    *(".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".avif"),
)

SHOWN_SUFFIXES = ".jpg, .png, .tif, .webp, .bmp, .gif, ..."


def list_images(inputs: Iterable[str | os.PathLike[str]], *, recursive: bool = False) -> Iterator[Path]:
    """The image files that ``inputs`` name, each once, folder by folder, in the given order.

    A file is yielded as it is, also if it is missing or has another suffix, so that whoever reads it
    reports it. A folder gives what has an image suffix and is not hidden, sorted by name; in it a dangling
    link or a FIFO called x.jpg is yielded, to be reported, and a folder called x.jpg is not. A glob
    (``*``, ``?``, ``[...]``, ``**`` for any depth) is filtered and sorted as a folder is; a name that
    exists is never taken for a glob. The same absolute path is yielded once; two links to one file are two.

    Args:
        inputs: file names, folders, globs; one of them may stand alone.
        recursive: look into the subfolders of a folder as well, without following links to folders.
    Raises: ImageError, when it is reached, for a folder that holds no image or cannot be listed, for a glob that
        matches no image, and for an empty name, as of a shell's variable that is not set.
    """
    seen: set[str] = set()
    for given in [inputs] if isinstance(inputs, str | os.PathLike) else inputs:
        name = os.fspath(given)
        for path in _expand(name, recursive):
            key = os.path.abspath(path)
            if key not in seen:
                seen.add(key)
                yield Path(path)


def _expand(name: str, recursive: bool) -> Iterator[str]:
    if not name:
        raise ImageError("the name of an image is empty; give a file, a folder or a glob ('.' is this folder)")
    if os.path.isdir(name):
        return _list_folder(name, recursive)
    if glob.has_magic(name) and not os.path.lexists(name):
        return _list_glob(name)
    return iter([name])


def _list_folder(folder: str, recursive: bool) -> Iterator[str]:
    empty, skipped = True, False
    for parent, folders, files in os.walk(folder, onerror=_refuse_folder):
        skipped = bool(folders) and not recursive
        folders[:] = sorted(name for name in folders if not name.startswith(".")) if recursive else []
        for name in sorted(files):
            if _is_image(name) and not name.startswith("."):
                empty = False
                yield os.path.join(parent, name)
    if empty:
        remedy = "; add --recursive (recursive=True) to look into its subfolders" if skipped else ""
        raise ImageError(f"the folder {folder!r} holds no image ({SHOWN_SUFFIXES}){remedy}")


def _list_glob(pattern: str) -> Iterator[str]:
    matches = glob.iglob(pattern, recursive=True)
    paths = sorted(path for path in matches if _is_image(path) and not os.path.isdir(path))
    if not paths:
        raise ImageError(f"no image matches {pattern!r} ({SHOWN_SUFFIXES})")
    return iter(paths)


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def _refuse_folder(error: OSError) -> NoReturn:
    raise ImageError(f"the folder {error.filename!r} cannot be listed: {error.strerror}") from error
