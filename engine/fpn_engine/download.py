"""Downloads: a large file fetched once, resumed where it broke off, checked, and only then given its name."""

from __future__ import annotations

import hashlib
import http.client
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import fpn_engine
from fpn_engine.errors import DownloadError
from fpn_engine.locks import alone_on

TIMEOUT = 20.0  # seconds without a byte
PAUSES = (1.0, 2.0, 4.0)  # seconds before another attempt; fails after as many in vain
LEAST_PROGRESS = 1 << 20  # bytes that make an attempt worth while
CHUNK = 1 << 18
BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})  # answers that may be others a moment later

OnProgress = Callable[[int, int | None], None]


class _BrokenError(Exception):
    """Why an answer ended early; worth another attempt."""


class _UnreachableError(_BrokenError):
    """Why there is no answer; worth another attempt only if there was one before."""


def download(
    url: str,
    path: Path,
    digest: str,
    *,
    on_progress: OnProgress = lambda done, total: None,
    on_wait: Callable[[], None] = lambda: None,
) -> None:
    """Fetch ``url`` to ``path``, unless the file there is right already.

    What has arrived is kept as ``path`` + ".part", also when the process ends, and the rest is asked for by HTTP Range;
    a server without it sends all again. An answer that breaks off or stalls is taken up again while there is progress.
    The digest alone decides whether the parts fit together; if not, all is fetched once more. Two processes do not
    fetch one file twice: the second waits.

    Args:
        url: http or https; proxies are taken from the environment.
        digest: how the file's SHA-256 begins, in hex.
        on_progress: called with the bytes that are here, and with those of the whole file if the server says.
        on_wait: called if another process is fetching the file.
    Raises: DownloadError, one sentence with the remedy, for what network, server or disk refuse, and for a file with
        another digest, which is deleted.
    """
    with alone_on(path, "downloads", on_wait):
        if has_digest(path, digest):
            return
        part = path.with_name(path.name + ".part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            pieced = _receive(url, path, part, on_progress)
            if pieced and not has_digest(part, digest):
                part.unlink()
                _receive(url, path, part, on_progress)
            if not has_digest(part, digest):
                part.unlink()
                raise DownloadError(
                    f"{url} gave another file than the published one, whose sha256 begins with {digest}, so it was "
                    "deleted; check whether a proxy or a login page answers in its place"
                )
            part.replace(path)
        except OSError as error:
            raise DownloadError(
                f"cannot write {path}: {error.strerror or error}; free some space or set FPN_ENGINE_CACHE "
                "(TORCH_HOME, if you use that) to a folder that is writable"
            ) from None


def has_digest(path: Path, digest: str) -> bool:
    """Whether ``path`` is a file whose SHA-256 begins with ``digest``."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest().startswith(digest)
    except OSError:
        return False


def _receive(url: str, path: Path, part: Path, on_progress: OnProgress) -> bool:
    """Make attempts until ``part`` is complete; returns whether it is pieced together from several."""
    best = first = _size(part)
    failures = 0
    pieced = first > 0
    while True:
        try:
            _attempt(url, part, on_progress)
            return pieced
        except _BrokenError as error:
            size = _size(part)
            pieced = True
            if size >= best + LEAST_PROGRESS:
                failures, best = 0, size
            hopeless = isinstance(error, _UnreachableError) and size <= first
            if hopeless or failures == len(PAUSES):
                raise _refused(url, path, str(error)) from None
            time.sleep(PAUSES[failures])
            failures += 1
        except urllib.error.HTTPError as error:
            raise _refused(url, path, f"the server answers {error.code} {error.reason}") from None


def _attempt(url: str, part: Path, on_progress: OnProgress) -> None:
    """Ask for what is missing and append it to ``part``."""
    size = _size(part)
    try:
        response = _open(url, size)
    except urllib.error.HTTPError as error:
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            if error.headers.get("Content-Range") == f"bytes */{size}":
                return
            part.unlink()  # longer than the file
            raise _BrokenError(f"the server answers {error.code} {error.reason}") from None
        raise
    with response:
        start, total = _extent(response, size)
        if total is not None and shutil.disk_usage(part.parent).free < total - start:
            raise OSError(f"it needs {(total - start) / 1e6:.0f} MB, which the disk does not have")
        done = start
        with part.open("ab" if start else "wb") as file:
            on_progress(done, total)
            while data := _read(response):
                file.write(data)
                file.flush()
                done += len(data)
                on_progress(done, total)
    if total is not None and done < total:
        raise _BrokenError(f"the answer ended after {done} of {total} bytes")


def _open(url: str, offset: int) -> http.client.HTTPResponse:
    headers = {"User-Agent": f"fpn-engine/{fpn_engine.__version__}", "Accept-Encoding": "identity"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
    try:
        response: http.client.HTTPResponse = urllib.request.urlopen(
            urllib.request.Request(url, headers=headers), timeout=TIMEOUT
        )
        return response
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in BUSY:
            raise _BrokenError(f"the server answers {error.code} {error.reason}") from None
        raise
    except urllib.error.URLError as error:
        raise _UnreachableError(_reason(error.reason)) from None
    except (http.client.InvalidURL, ValueError) as error:
        raise _UnreachableError(_reason(error)) from None
    except (OSError, http.client.HTTPException) as error:
        raise _BrokenError(_reason(error)) from None


def _extent(response: http.client.HTTPResponse, offset: int) -> tuple[int, int | None]:
    """Where in the file the answer begins, and how long the file is if the server says."""
    if response.status != http.HTTPStatus.PARTIAL_CONTENT:
        return 0, response.length
    named = re.fullmatch(r"bytes [0-9]+-[0-9]+/([0-9]+)", response.headers.get("Content-Range", ""))
    return offset, int(named[1]) if named else None


def _read(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read1(CHUNK)
    except (OSError, http.client.HTTPException) as error:
        raise _BrokenError(_reason(error)) from None


def _reason(error: object) -> str:
    if isinstance(error, TimeoutError):
        return f"no byte came for {TIMEOUT:g} seconds"
    return str(getattr(error, "strerror", None) or error or type(error).__name__)


def _refused(url: str, path: Path, reason: str) -> DownloadError:
    return DownloadError(
        f"cannot download {url} ({reason}); try again later, or fetch the file by other means and put it at {path}"
    )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
