"""Downloads: whole, resumed, broken off, stalled, refused, wrong, doubled and interrupted."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from fpn_engine import download as download_module
from fpn_engine.download import download
from fpn_engine.errors import DownloadError
from tests.engine.web import Web, serving

CONTENT = np.random.default_rng(0).bytes(3_000_000)
DIGEST = hashlib.sha256(CONTENT).hexdigest()[:8]
PATIENCE = 30.0  # seconds for a process to get somewhere


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses between attempts, which take no time."""
    made: list[float] = []
    monkeypatch.setattr(download_module.time, "sleep", made.append)
    return made


@pytest.fixture
def web(pauses: list[float], monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    """A server that has the file."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serving() as web:
        web.files["model.pth"] = CONTENT
        yield web


@pytest.fixture
def path(workplace: Path) -> Path:
    return workplace / "new" / "model.pth"


class Fetched(NamedTuple):
    """What was reported on the way."""

    done: list[int]
    totals: set[int | None]


def fetch(web: Web, path: Path) -> Fetched:
    """Download the file, which is then alone in its folder."""
    reports: list[tuple[int, int | None]] = []
    download(f"{web.url}/model.pth", path, DIGEST, on_progress=lambda *report: reports.append(report))
    assert path.read_bytes() == CONTENT
    assert list(path.parent.iterdir()) == [path]
    return Fetched([done for done, _ in reports], {total for _, total in reports})


def refuse(web: Web, path: Path, *words: str) -> str:
    """The one sentence that a failed download ends with."""
    with pytest.raises(DownloadError) as caught:
        download(f"{web.url}/model.pth", path, DIGEST)
    assert not path.exists()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


def test_a_file_is_fetched_once(web: Web, path: Path) -> None:
    fetched = fetch(web, path)
    assert fetched.totals == {len(CONTENT)}
    assert fetched.done == sorted(fetched.done)
    assert (fetched.done[0], fetched.done[-1]) == (0, len(CONTENT))
    assert fetch(web, path).done == []
    assert (web.requests, web.served) == ([""], len(CONTENT))


def test_a_wrong_file_in_its_place_is_replaced(web: Web, path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(CONTENT[:-1])
    fetch(web, path)


def test_without_a_length(web: Web, path: Path) -> None:
    web.told_length = False
    assert fetch(web, path).totals == {None}


def test_what_an_earlier_run_left_is_not_fetched_again(web: Web, path: Path) -> None:
    path.parent.mkdir()
    part = path.with_name("model.pth.part")
    part.write_bytes(CONTENT[:2_000_000])
    assert fetch(web, path).done[0] == 2_000_000
    assert (web.requests, web.served) == (["bytes=2000000-"], 1_000_000)
    path.rename(part)  # ended between the last byte and the new name
    fetch(web, path)
    assert (web.requests[1:], web.served) == ([f"bytes={len(CONTENT)}-"], 1_000_000)


def test_a_server_without_ranges_sends_all_again(web: Web, path: Path) -> None:
    web.ranges = False
    path.parent.mkdir()
    path.with_name("model.pth.part").write_bytes(CONTENT[:2_000_000])
    assert fetch(web, path).done[0] == 0
    assert web.served == len(CONTENT)


@pytest.mark.parametrize("left", [b"other" * 1000, b"\0" * len(CONTENT), CONTENT + b"more"], ids=len)
@pytest.mark.parametrize("ranges", [True, False])
def test_a_part_of_another_file_is_fetched_anew(web: Web, path: Path, left: bytes, ranges: bool) -> None:
    web.ranges = ranges
    path.parent.mkdir()
    path.with_name("model.pth.part").write_bytes(left)
    fetch(web, path)
    assert web.served <= 2 * len(CONTENT)


def test_answers_that_break_off_are_continued(web: Web, path: Path) -> None:
    web.cuts = [100_000, 0, 1_000_000]
    fetch(web, path)
    assert web.requests == ["", "bytes=100000-", "bytes=100000-", "bytes=1100000-"]
    assert web.served == len(CONTENT)


def test_answers_that_stall_are_continued(web: Web, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download_module, "TIMEOUT", 1.0)
    web.stalls = [100_000]
    fetch(web, path)
    assert web.requests[:2] == ["", "bytes=100000-"]
    assert all(request.startswith("bytes=") for request in web.requests[1:])


def test_there_are_attempts_as_long_as_there_is_progress(web: Web, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download_module, "LEAST_PROGRESS", 100_000)
    web.cuts = [100_000] * 20
    fetch(web, path)
    assert web.served == len(CONTENT)


@pytest.mark.parametrize("ranges", [True, False])
def test_there_are_few_attempts_without(web: Web, pauses: list[float], path: Path, ranges: bool) -> None:
    web.ranges = ranges
    web.cuts = [1000] * 20
    message = refuse(web, path, f"cannot download {web.url}/model.pth (the answer ended after ", f"put it at {path}")
    assert f"of {len(CONTENT)} bytes" in message
    assert len(web.requests) == 4
    assert pauses == [1, 2, 4]
    assert path.with_name("model.pth.part").stat().st_size == (4000 if ranges else 1000)
    web.cuts = []
    fetch(web, path)  # a later run goes on


def test_a_server_that_stays_silent(web: Web, pauses: list[float], path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download_module, "TIMEOUT", 0.2)
    web.stalls = [0] * 20
    refuse(web, path, "(no byte came for 0.2 seconds)", f"put it at {path}")
    assert len(pauses) == 3


def test_busy_servers_are_asked_again(web: Web, path: Path) -> None:
    web.statuses = [503, 429, 500]
    fetch(web, path)
    path.unlink()
    web.statuses = [503] * 20
    refuse(web, path, "(the server answers 503 Service Unavailable)")


@pytest.mark.parametrize(("status", "phrase"), [(404, "Not Found"), (403, "Forbidden"), (410, "Gone")])
def test_what_a_server_refuses_is_not_asked_again(web: Web, path: Path, status: int, phrase: str) -> None:
    web.statuses = [status]
    refuse(
        web, path, f"cannot download {web.url}/model.pth (the server answers {status} {phrase})", f"put it at {path}"
    )
    assert len(web.requests) == 1


def test_another_part_than_was_asked_for(web: Web, path: Path) -> None:
    web.cuts = [100_000]
    web.shift = 10
    fetch(web, path)


@pytest.mark.parametrize("content", [b"", b"<html>Please log in</html>", CONTENT[:-1] + b"x"], ids=len)
def test_a_file_with_another_digest_is_deleted(web: Web, path: Path, content: bytes) -> None:
    web.files["model.pth"] = content
    refuse(web, path, f"{web.url}/model.pth gave another file", DIGEST, "it was deleted", "login page")
    assert list(path.parent.iterdir()) == []
    assert len(web.requests) == 1
    web.cuts = [10]
    refuse(web, path, "gave another file")
    assert list(path.parent.iterdir()) == []


def test_offline(web: Web, pauses: list[float], path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # and nobody listens
        closed = Web(url=f"http://127.0.0.1:{unused.getsockname()[1]}")
        refuse(closed, path, "cannot download", f"{closed.url}/model.pth (Connection refused)", f"put it at {path}")
    assert pauses == []


def test_no_such_server_and_no_such_address(path: Path, web: Web) -> None:
    for url in ("http://nowhere.invalid", "http://127.0.0.1:99999", "http://a b", "http://[", "https://127.0.0.1:1"):
        refuse(Web(url=url), path, f"cannot download {url}/model.pth (", f"put it at {path}")


def test_a_connection_lost_on_the_way_is_awaited(web: Web, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    web.cuts = [1_000_000]
    opened: list[int] = []
    urlopen = download_module.urllib.request.urlopen

    def sometimes(*arguments: Any, **options: Any) -> Any:
        opened.append(1)
        if len(opened) == 2:
            raise download_module.urllib.error.URLError(OSError(errno.ENETUNREACH, "Network is unreachable"))
        return urlopen(*arguments, **options)

    monkeypatch.setattr(download_module.urllib.request, "urlopen", sometimes)
    fetch(web, path)
    assert len(opened) == 3


def test_a_full_disk(web: Web, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(path.parent.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=2_999_999))
    refuse(web, path, f"cannot write {path}: it needs 3 MB, which the disk does not have; free some space")
    assert web.served < len(CONTENT) + 1
    monkeypatch.undo()
    path.with_name("model.pth.part").unlink(missing_ok=True)
    if os.path.exists("/dev/full"):
        path.with_name("model.pth.part").symlink_to("/dev/full")
        refuse(web, path, f"cannot write {path}: No space left on device; free some space or set FPN_ENGINE_CACHE")


def test_a_folder_that_cannot_be(web: Web, path: Path) -> None:
    path.parent.write_text("a file")
    with pytest.raises(DownloadError, match="cannot write"):
        download(f"{web.url}/model.pth", path, DIGEST)
    assert web.requests == []


CHILD = """
import sys
from pathlib import Path
from fpn_engine.download import download
def show(done, total): print(done, flush=True)
download(sys.argv[1], Path(sys.argv[2]), sys.argv[3], on_progress=show, on_wait=lambda: print("waits", flush=True))
"""


def start(web: Web, path: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, f"{web.url}/model.pth", str(path), DIGEST]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdout is not None
    timer = threading.Timer(PATIENCE, process.kill)
    timer.start()
    try:
        assert any(line.strip() == text for line in process.stdout)
    finally:
        timer.cancel()


def finish(process: subprocess.Popen[str]) -> int:
    process.communicate(timeout=PATIENCE)
    return process.returncode


def test_two_processes_fetch_one_file_once(web: Web, path: Path) -> None:
    web.stalls = [1_000_000]
    first = start(web, path)
    wait_for(first, "1000000")
    second = start(web, path)
    wait_for(second, "waits")
    web.go.set()
    assert (finish(first), finish(second)) == (0, 0)
    assert path.read_bytes() == CONTENT
    assert web.served == len(CONTENT)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["SIGINT", "SIGKILL"])
def test_an_interrupted_download_is_resumed(web: Web, path: Path, number: int) -> None:
    web.stalls = [2_000_000]
    process = start(web, path)
    wait_for(process, "2000000")
    process.send_signal(number)
    assert finish(process) != 0
    assert not path.exists()
    fetch(web, path)
    assert web.served < len(CONTENT) + 300_000
