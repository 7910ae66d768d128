"""Bringing one large file here: from a server or a folder into a partial file that a later call continues."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib import request
from urllib.error import HTTPError
from urllib.parse import urlsplit

from onestepsr import __version__
from onestepsr.errors import OneStepSRError, UserError

TIMEOUT = 30.0
"""Seconds without an answer or a byte after which a server counts as dead."""
MAX_REDIRECTS = 5
MAX_BYTES = 20 * 2**30
"""Largest file accepted when its size is not known beforehand."""
SPARE_BYTES = 64 * 2**20
"""Disk space that a download leaves free."""
BLOCK = 256 * 2**10

Progress = Callable[[int, int | None], None]
"""Called with the bytes that are here and, where it is known, their final number."""


class SourceFailed(OneStepSRError):
    """One source could not give the file; the message says why, and another source may be tried."""


class _Cut(Exception):
    """The connection ended early; what came so far is in the partial file."""


class PartialFile:
    """A file on its way: its bytes so far, kept between runs, and their running SHA-256."""

    def __init__(self, path: Path, progress: Progress = lambda done, total: None) -> None:
        self.path = path
        self.size = 0
        self._digest = hashlib.sha256()
        self._handle = path.open("a+b")
        there = self._handle.seek(0, os.SEEK_END)
        self._handle.seek(0)
        while block := self._handle.read(BLOCK):
            self._count(block)
            progress(self.size, there)

    def append(self, block: bytes) -> None:
        """Add bytes at the end."""
        self._handle.write(block)
        self._count(block)

    def restart(self) -> None:
        """Forget what is there."""
        self._handle.truncate(0)
        self.size, self._digest = 0, hashlib.sha256()

    def settle(self) -> None:
        """Put what is there on the disk, beyond the reach of a power cut."""
        self._handle.flush()
        os.fsync(self._handle.fileno())

    @property
    def sha256(self) -> str:
        """SHA-256 of what is there, in hexadecimal."""
        return self._digest.hexdigest()

    def check_room(self, total: int) -> None:
        """Raise :class:`UserError` when the disk cannot hold the file at its full size of ``total`` bytes."""
        free = shutil.disk_usage(self.path.parent).free
        if total - self.size + SPARE_BYTES > free:
            needed, there = (f"{number / 1e9:.1f} GB" for number in (total - self.size, free))
            raise UserError(f"{self.path.parent}: {needed} needed, {there} free on this disk")

    def _count(self, block: bytes) -> None:
        self._digest.update(block)
        self.size += len(block)

    def __enter__(self) -> PartialFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handle.close()
        if not self.size:
            self.path.unlink(missing_ok=True)


@contextmanager
def progress_bar(title: str) -> Iterator[Progress]:
    """A bar of bytes on stderr; nothing when stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    text = TextColumn("{task.description}", markup=False)
    columns = (text, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def receive(url: str, part: PartialFile, *, sha256: str, size: int | None, progress: Progress) -> None:
    """Complete ``part`` from an http or https address.

    Bytes that are already there are continued where a checksum can tell in the end whether they fit; a connection that
    is cut is taken up again as long as each attempt brings something. Raises :class:`SourceFailed` when the server does
    not give the file of that checksum and size; bytes known to be wrong are dropped.
    """
    if not sha256:
        part.restart()
    continued = part.size > 0
    _stream(url, part, bool(sha256), size, progress)
    if continued and part.sha256 != sha256:  # the bytes of an earlier call may be the wrong ones
        part.restart()
        _stream(url, part, bool(sha256), size, progress)
    _check(part, sha256)


def copy(path: Path, part: PartialFile, *, sha256: str, size: int | None, progress: Progress) -> None:
    """Fill ``part`` from a file of this machine, with the same checks as :func:`receive`."""
    part.restart()
    try:
        total = path.stat().st_size
        _check_size(total, size)
        part.check_room(total)
        with path.open("rb") as handle:
            for block in _blocks(handle):
                part.append(block)
                progress(part.size, total)
    except FileNotFoundError as error:
        raise SourceFailed("no such file") from error
    except _Cut as error:
        raise SourceFailed(str(error)) from error
    _check(part, sha256)


def _check(part: PartialFile, sha256: str) -> None:
    found = part.sha256
    if sha256 and found != sha256:
        part.restart()
        raise SourceFailed(f"checksum {found[:12]}… instead of {sha256[:12]}…")


def _check_size(total: int | None, size: int | None) -> None:
    if total is not None and size is not None and total != size:
        raise SourceFailed(f"{total:,} bytes instead of {size:,}")
    if (total or 0) > (size or MAX_BYTES):
        raise SourceFailed(f"larger than {MAX_BYTES >> 30} GiB")


def _stream(url: str, part: PartialFile, resumable: bool, size: int | None, progress: Progress) -> None:
    while size is None or part.size < size:
        before = part.size
        try:
            _attempt(url, part, size, progress)
            return
        except _Cut as error:
            if not resumable or part.size <= before:
                raise SourceFailed(f"connection cut after {part.size:,} bytes ({error})") from error


def _attempt(url: str, part: PartialFile, size: int | None, progress: Progress) -> None:
    """One request for what is missing, to its end; raises _Cut when the end does not come."""
    limit = size or MAX_BYTES
    with _open(url, part) as response:
        total = _total(response, part)
        _check_size(total, size)
        part.check_room(total or size or 0)
        for block in _blocks(response):
            if part.size + len(block) > limit:
                part.restart()
                raise SourceFailed(f"sends more than {limit:,} bytes")
            part.append(block)
            progress(part.size, total or size)
    expected = total or size
    if expected is not None and part.size < expected:
        raise _Cut("too few bytes")


def _blocks(stream: Any) -> Iterator[bytes]:
    """Blocks of a file or a response; only what fails in reading becomes a _Cut, not what the caller does with them."""
    try:
        while block := stream.read(BLOCK):
            yield block
    except (OSError, HTTPException) as error:
        raise _Cut(str(error) or type(error).__name__) from error


def _open(url: str, part: PartialFile) -> Any:
    headers = {"User-Agent": f"onestepsr/{__version__}", "Accept-Encoding": "identity"}
    if part.size:
        headers["Range"] = f"bytes={part.size}-"
    try:
        return _opener().open(request.Request(url, headers=headers), timeout=TIMEOUT)
    except HTTPError as error:
        if error.code == 416:  # the server's file is shorter than what is here
            part.restart()
        error.close()
        raise SourceFailed(f"HTTP {error.code} {error.reason}") from error
    except (OSError, HTTPException, ValueError) as error:
        reason = getattr(error, "reason", "") or error
        raise SourceFailed(str(getattr(reason, "strerror", "") or reason or type(reason).__name__)) from error


def _total(response: Any, part: PartialFile) -> int | None:
    """Full size that the server announces; ``part`` is emptied when the whole file comes instead of the rest."""
    if response.status == 206:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        if found is None or int(found[1]) != part.size:
            part.restart()
            raise SourceFailed("answers with another range than asked for")
        return None if found[2] == "*" else int(found[2])
    if response.status != 200:
        raise SourceFailed(f"HTTP {response.status}")
    part.restart()
    length = response.headers.get("Content-Length", "")
    return int(length) if length.isdigit() else None


class _Redirects(request.HTTPRedirectHandler):
    """Follows a few redirects, to http and https only, and never from an encrypted address to a plain one."""

    max_redirections = MAX_REDIRECTS

    def redirect_request(  # noqa: PLR0917  (the signature of the base class)
        self, req: request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> request.Request | None:
        scheme = urlsplit(newurl).scheme
        if scheme not in ("http", "https") or (scheme == "http" and req.type == "https"):
            raise HTTPError(req.full_url, code, f"redirect to {scheme}: refused", headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener() -> request.OpenerDirector:
    """A client that knows http and https and nothing else; proxies are taken from the environment."""
    opener = request.OpenerDirector()
    for handler in (
        request.ProxyHandler(),
        request.UnknownHandler(),
        request.HTTPHandler(),
        request.HTTPSHandler(),
        request.HTTPDefaultErrorHandler(),
        request.HTTPErrorProcessor(),
        _Redirects(),
    ):
        opener.add_handler(handler)
    return opener
