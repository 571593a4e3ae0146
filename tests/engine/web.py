"""A web server on this machine that answers as badly as it is told to."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Web:
    """What the server has and how it answers; may be changed while it runs.

    Attributes:
        files: content by name. statuses: of the next answers, instead of a file. ranges: whether it knows Range.
        told_length: whether it says how long the file is. cuts: of each next answer, after how many bytes it ends.
        stalls: as cuts, but the connection stays open. shift: bytes by which it answers a Range beside it.
        requests: the Range header of each request, "" for none. served: bytes of all bodies.
    """

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    statuses: list[int] = field(default_factory=list)
    ranges: bool = True
    told_length: bool = True
    cuts: list[int] = field(default_factory=list)
    stalls: list[int] = field(default_factory=list)
    shift: int = 0
    requests: list[str] = field(default_factory=list)
    served: int = 0
    go: threading.Event = field(default_factory=threading.Event)


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        web = self.server.web
        web.requests.append(self.headers.get("Range", ""))
        content = web.files.get(self.path.lstrip("/"))
        if web.statuses or content is None:
            return self.send_error(web.statuses.pop(0) if web.statuses else 404)
        start = 0
        if web.ranges and (asked := re.fullmatch(r"bytes=([0-9]+)-", self.headers.get("Range", ""))):
            start = int(asked[1]) + web.shift
            if start >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                return self.end_headers()
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        if web.told_length:
            self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        stalls = web.stalls.pop(0) if web.stalls else None
        cut = stalls if stalls is not None else web.cuts.pop(0) if web.cuts else len(content)
        body = content[start : start + cut]
        web.served += len(body)
        self.wfile.write(body)
        self.wfile.flush()
        if stalls is not None:
            web.go.wait(30)

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""


class _Server(ThreadingHTTPServer):
    web: Web


@contextmanager
def serving() -> Iterator[Web]:
    """A server on a free port; all its threads have ended afterwards."""
    server = _Server(("127.0.0.1", 0), _Handler)
    server.web = Web(url=f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server.web
    finally:
        server.web.go.set()
        server.shutdown()
        server.server_close()
        thread.join()
