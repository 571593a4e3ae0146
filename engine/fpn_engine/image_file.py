"""Image files: regular, in a known format and of a size that is allowed; opened, and no pixel decoded."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import threading
from collections.abc import Iterator
from typing import IO, NamedTuple

from PIL import Image

from fpn_engine.errors import ImageError

MAX_PIXELS = 1024**3 // 4 // 3  # 89,478,485: a quarter of a GiB as RGB; the limit Pillow itself warns at

# Formats with a signature, decoded inside this process. EPS is left out since Pillow hands it to Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000", "AVIF")

_RAISE_LIMIT = "raise the limit with --max-pixels (max_pixels= in Python)"


class OpenImage(NamedTuple):
    """An image file whose header was read. ``name``: of the file, quoted, for errors."""

    image: Image.Image
    file: IO[bytes]
    name: str


@contextlib.contextmanager
def open_image(path: str | os.PathLike[str], max_pixels: int) -> Iterator[OpenImage]:
    """An image file to decode; see :func:`fpn_engine.images.read_image`, whose arguments and errors these are."""
    name = repr(os.fspath(path))
    lifted = _PILLOW_LIMIT.lifted() if max_pixels > MAX_PIXELS else contextlib.nullcontext()
    with _open_regular(path, name) as file, lifted:
        yield OpenImage(_read_header(file, name, max_pixels), file, name)


def _open_regular(path: str | os.PathLike[str], name: str) -> IO[bytes]:
    """Open a regular file; anything else is refused unopened, as opening a FIFO would block."""
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise ImageError(f"{name} is a folder, not an image file")
        if not stat.S_ISREG(status.st_mode):
            raise ImageError(f"{name} is not a regular file; copy its contents to one")
        if status.st_size == 0:
            raise ImageError(f"{name} is an empty file")
        return open(path, "rb")
    except FileNotFoundError:
        what = "is a link to a file that does not exist" if os.path.islink(path) else "does not exist"
        raise ImageError(f"{name} {what}") from None
    except OSError as error:
        raise ImageError(f"{name} cannot be opened: {error.strerror}") from error
    except ValueError as error:  # a null character in the name
        raise ImageError(f"{name} cannot be opened: {error}") from error


def _read_header(file: IO[bytes], name: str, max_pixels: int) -> Image.Image:
    """The image with its header read, its size checked and no pixel decoded.

    The plugins are called directly, since Image.open would apply Pillow's limit and try every format.
    They get no file name: with one, Pillow maps the file into memory and dies if it shrinks meanwhile.
    """
    Image.init()
    prefix = file.read(16)
    for format in filter(Image.OPEN.__contains__, FORMATS):
        read_format, accept = Image.OPEN[format]
        accepted = accept is not None and accept(prefix)
        if isinstance(accepted, str):  # known, but left out of this build of Pillow
            raise ImageError(f"{name} cannot be read: {accepted}")
        if not accepted:
            continue
        try:
            file.seek(0)
            image = read_format(file, "")
            _require_max_pixels(image.size, name, max_pixels)
            if format == "PNG":  # load() skips the checksums of pixel chunks, verify() uses the image up
                image.verify()
                file.seek(0)
                image = read_format(file, "")
            return image
        except ImageError:
            raise
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise ImageError(f"{name} has too many pixels for Pillow: {error}; {_RAISE_LIMIT}") from error
        except SyntaxError as error:
            raise ImageError(f"{name} has a damaged {format} header or no pixels ({describe(error)})") from error
        except Exception as error:  # whatever a decoder stumbles over in hostile bytes
            raise ImageError(f"{name} is a damaged {format} file: {describe(error)}") from error
    raise ImageError(f"{name} is not an image in a known format ({', '.join(FORMATS)})")


def _require_max_pixels(size: tuple[int, int], name: str, max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        given = f"{width} x {height} = {width * height:,} pixels"
        raise ImageError(f"{name} has {given}, above the limit of {max_pixels:,}; {_RAISE_LIMIT}")


def describe(error: Exception) -> str:
    """What Pillow says, on one line; some of its errors say nothing."""
    return " ".join(str(error).split()) or type(error).__name__


class _PillowLimit:
    """Pillow's limit is one number for the process: out of the way while any thread reads above it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._readers = 0
        self._limit: int | None = None

    @contextlib.contextmanager
    def lifted(self) -> Iterator[None]:
        with self._lock:
            if self._readers == 0:
                self._limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, sys.maxsize
            self._readers += 1
        try:
            yield
        finally:
            with self._lock:
                self._readers -= 1
                if self._readers == 0:
                    Image.MAX_IMAGE_PIXELS = self._limit


_PILLOW_LIMIT = _PillowLimit()
