"""An HTTP server that serves, cuts, stalls or alters files as it is told, and remembers what it was asked."""

import hashlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from onestepsr.weights.download import Download

BODY = bytes(range(256)) * 4096
"""The file that is wanted, 1 MiB."""
SIZE = len(BODY)
SHA = hashlib.sha256(BODY).hexdigest()
OTHER = BODY[:-1] + b"x"
"""Another file of that size."""


@dataclass
class Route:
    """Behaviour of one address."""

    body: bytes = b""
    status: int = 200
    ranges: bool = True
    """Whether Range is honoured."""
    length: bool = True
    """Whether Content-Length is sent."""
    cuts: list[int] = field(default_factory=list)
    """Bytes after which the connection drops, one number for each answer to come."""
    location: str = ""
    commit: str = ""
    """Commit hash that a hub reports; without it the server is none."""
    pause: float = 0.0
    """Seconds of silence in the middle of the body."""
    hold: threading.Event | None = None
    """Waited for in the middle of the body."""


class Mirror(ThreadingHTTPServer):
    """Routes by path; ``asked`` lists (path, Range header) of every GET request."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.routes: dict[str, Route] = {}
        self.asked: list[tuple[str, str]] = []
        self.halfway = threading.Event()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}{path}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Mirror

    def do_HEAD(self) -> None:
        self._begin(self.server.routes.get(self.path, Route(status=404)), 0)

    def do_GET(self) -> None:
        asked = self.headers.get("Range", "")
        self.server.asked.append((self.path, asked))
        route = self.server.routes.get(self.path, Route(status=404))
        start = int(asked[6:-1]) if asked and route.ranges else 0
        self._begin(route, start)
        self._send(route, start)

    def _begin(self, route: Route, start: int) -> None:
        self.close_connection = True
        past = start >= len(route.body) > 0
        self.send_response(416 if past else 206 if start and route.status == 200 else route.status)
        self.send_header("Connection", "close")
        if start and not past:
            self.send_header("Content-Range", f"bytes {start}-{len(route.body) - 1}/{len(route.body)}")
        if route.location:
            self.send_header("Location", route.location)
        if route.length:
            self.send_header("Content-Length", str(max(0, len(route.body) - start)))
        if route.commit:
            self.send_header("X-Repo-Commit", route.commit)
            self.send_header("ETag", f'"{hashlib.sha1(route.body).hexdigest()}"')
        self.end_headers()

    def _send(self, route: Route, start: int) -> None:
        end = route.cuts.pop(0) if route.cuts else len(route.body)
        middle = (start + end) // 2
        try:
            self.wfile.write(route.body[start:middle])
            self.wfile.flush()
            self.server.halfway.set()
            time.sleep(route.pause)
            if route.hold is not None:
                route.hold.wait(30)
            self.wfile.write(route.body[middle:end])
        except OSError:  # the client has gone
            pass

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  (the name in the base class)
        pass


@contextmanager
def running() -> Iterator[Mirror]:
    """A server on a free port of this machine."""
    with Mirror() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def download_of(server: Mirror, *paths: str, **others: Any) -> Download:
    """The wanted file as model ``net``, from addresses of the server in order."""
    values = {"model": "net", "file": "net.bin", "sha256": SHA, "bytes": SIZE} | others
    return Download(urls=tuple(server.url(path) for path in paths), **values)


def present(download: Download) -> list[str]:
    """Names in the model's folder, without the lock."""
    return sorted(path.name for path in download.path.parent.iterdir() if not path.name.endswith(".lock"))
