"""Weights that are not part of the package: where they come from, where they are kept, what to do without a network.

A file is looked for in the cache, then in the mirror that the environment names, then at its sources in order; whatever
comes is checked against its SHA-256 before it appears under its name. Docs: ``docs/models.md``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib import request
from urllib.error import HTTPError
from urllib.parse import quote, urlsplit

from filelock import FileLock, Timeout

from onestepsr import __version__
from onestepsr.core.errors import OneStepSRError, UserError
from onestepsr.core.files import file_sha256, replacing
from onestepsr.core.progress import ProgressCallback, progress_bar

# Bringing one large file here: from a server or a folder into a partial file that a later call c ----------------------

TIMEOUT = 30.0
"""Seconds without an answer or a byte after which a server counts as dead."""
MAX_REDIRECTS = 5
MAX_BYTES = 20 * 2**30
"""Largest file accepted when its size is not known beforehand."""
SPARE_BYTES = 64 * 2**20
"""Disk space that a download leaves free."""
BLOCK = 256 * 2**10


class SourceFailed(OneStepSRError):
    """One source could not give the file; the message says why, and another source may be tried."""


class _Cut(Exception):
    """The connection ended early; what came so far is in the partial file."""


class PartialFile:
    """A file on its way: its bytes so far, kept between runs, and their running SHA-256."""

    def __init__(self, path: Path, progress: ProgressCallback = lambda done, total: None) -> None:
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

    def finish(self) -> None:
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


def receive(url: str, part: PartialFile, *, sha256: str, size: int | None, progress: ProgressCallback) -> None:
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


def copy(path: Path, part: PartialFile, *, sha256: str, size: int | None, progress: ProgressCallback) -> None:
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


def _stream(url: str, part: PartialFile, resumable: bool, size: int | None, progress: ProgressCallback) -> None:
    while size is None or part.size < size:
        before = part.size
        try:
            _attempt(url, part, size, progress)
            return
        except _Cut as error:
            if not resumable or part.size <= before:
                raise SourceFailed(f"connection cut after {part.size:,} bytes ({error})") from error


def _attempt(url: str, part: PartialFile, size: int | None, progress: ProgressCallback) -> None:
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


logger = logging.getLogger(__name__)

CACHE = "ONESTEPSR_CACHE"
MIRROR = "ONESTEPSR_MIRROR"
OFFLINE = "ONESTEPSR_OFFLINE"
_no_downloads: ContextVar[str] = ContextVar("no_downloads", default="")
PROGRESS_BYTES = 32 * 2**20
"""Files from this size on are hashed under a progress bar."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One address of a file."""

    url: str
    """http or https."""
    sha256: str = ""
    """SHA-256, lower-case hexadecimal; empty if unknown: the first file that comes is then trusted and remembered."""
    bytes: int | None = None
    """Exact size, if known."""

    def __post_init__(self) -> None:
        if urlsplit(self.url).scheme not in ("http", "https"):
            raise ValueError(f"url: '{self.url}' is neither http nor https")
        if self.sha256 and not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise ValueError(f"sha256: '{self.sha256}' is not 64 lower-case hexadecimal digits")
        if self.bytes is not None and self.bytes < 1:
            raise ValueError(f"bytes: {self.bytes} is not positive")


@dataclass(frozen=True, kw_only=True)
class Download:
    """A file of a model, the addresses that offer it, and what to tell the person who needs it."""

    model: str
    """Alias; also the name of the folder in the cache, unless ``folder`` is given."""
    file: str
    """Name of the file."""
    sources: tuple[Source, ...]
    """Addresses of the same bytes, in the order in which they are tried."""
    notice: str = ""
    """Licence and terms of use, logged before the first download."""
    alternative: str = "give the path of the file instead of its name"
    """How to name a file that lies elsewhere."""
    folder: str = ""
    """Folder in the cache of a file that several models share; empty is the model's own."""

    def __post_init__(self) -> None:
        if len({(source.sha256, source.bytes) for source in self.sources}) != 1:
            raise ValueError(f"sources: those of '{self.model}' must be at least one and agree in checksum and size")

    @property
    def sha256(self) -> str:
        """Expected checksum; empty if unknown."""
        return self.sources[0].sha256

    @property
    def bytes(self) -> int | None:
        """Expected size, if known."""
        return self.sources[0].bytes

    @property
    def path(self) -> Path:
        """Where the file lies in the cache, or would."""
        return cache_folder() / self.place

    @property
    def place(self) -> str:
        """Folder and name of the file in the cache, and in a mirror that is a copy of a cache."""
        return f"{self.folder or self.model}/{self.file}"

    @property
    def state(self) -> str:
        """What a glance at the cache shows: ``cached``, ``not downloaded`` or what is wrong; nothing is hashed."""
        if not self.path.is_file():
            return "not downloaded"
        size = self.path.stat().st_size
        return "cached" if self.bytes in (None, size) else f"damaged: {size:,} bytes instead of {self.bytes:,}"


def cache_folder() -> Path:
    """Folder of downloaded weights: ``ONESTEPSR_CACHE``, or ``~/.cache/onestepsr``; UserError if there is no home."""
    try:
        return Path(os.environ.get(CACHE) or "~/.cache/onestepsr").expanduser()
    except RuntimeError as error:
        raise UserError(f"no home folder for the cache of weights; set {CACHE} to a folder") from error


def is_offline() -> bool:
    """Whether ``ONESTEPSR_OFFLINE`` forbids every use of the network."""
    return os.environ.get(OFFLINE, "").strip().lower() not in ("", "0", "false", "no")


@contextmanager
def without_downloads(reason: str) -> Iterator[None]:
    """Inside, whatever would have to be fetched is reported as missing, with ``reason``."""
    token = _no_downloads.set(reason)
    try:
        yield
    finally:
        _no_downloads.reset(token)


def human_bytes(number: int | None) -> str:
    """A size for people: ``5.2 GB``, ``7 kB``, ``unknown size``."""
    if number is None:
        return "unknown size"
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if number >= factor:
            return f"{number / factor:.1f} {unit}"
    return f"{number} bytes"


def download_file(download: Download, *, replace: bool = False) -> Path:
    """The file in the cache, fetched first if it is not there.

    Of several processes one downloads and the others wait. A damaged file is an error, or is replaced if ``replace``.
    Raises :class:`UserError` when the file cannot be had: the message says what was tried, and the three ways out.
    """
    try:
        if not _is_there(download, replace):
            download.path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(download):
                if not _is_there(download, replace):
                    _fetch(download)
    except (OSError, NotImplementedError) as error:  # the latter: a file system without locks
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{download.path.parent}: cannot be written ({reason}); {CACHE} names another") from error
    return download.path


def download_all(downloads: Iterable[Download], *, replace: bool = False) -> list[Path]:
    """The files of one model, see :func:`download_file`; its terms are logged once."""
    paths: list[Path] = []
    told = False
    for download in downloads:
        absent = not download.path.exists()
        paths.append(download_file(dataclasses.replace(download, notice="") if told else download, replace=replace))
        told = told or absent
    return paths


def check(download: Download, *, thorough: bool = False) -> str:
    """SHA-256 of the cached file, after comparison with what it should be; :class:`UserError` when it differs.

    The file is read through when nobody did since it last changed (a record beside it tells), or if ``thorough``.
    """
    path = download.path
    if not path.is_file():
        raise UserError(f"{path}: not there; 'onestepsr models download {download.model}' fetches it")
    if download.bytes not in (None, path.stat().st_size):
        raise _damaged(download, download.state.removeprefix("damaged: "))
    recorded = _read_record(path)
    fresh = bool(recorded) and _record(path).stat().st_mtime >= path.stat().st_mtime
    found = recorded if fresh and not thorough else _hash(path)
    expected = download.sha256 or recorded
    if expected and found != expected:
        raise _damaged(download, f"checksum {found[:12]}… instead of {expected[:12]}…")
    if not fresh:
        try:
            _write_record(path, found)
        except OSError as error:  # a shared cache may be read-only
            logger.info("%s: checksum not recorded (%s)", path, error)
    return found


def _is_there(download: Download, replace: bool) -> bool:
    """Whether a good file is cached; a damaged one raises, or counts as absent if it may be replaced."""
    if not download.path.exists():
        return False
    try:
        check(download, thorough=replace)
    except UserError as error:
        if not replace:
            raise
        logger.info("%s", error)
        return False
    return True


def _damaged(download: Download, what: str) -> UserError:
    return UserError(f"{download.path}: {what}; 'onestepsr models download {download.model}' fetches it again")


def _fetch(download: Download) -> None:
    """Fill the cache from the first place that gives the right bytes."""
    recorded = download.sha256 or _read_record(download.path)
    places, failures = _places(download), []
    if places and download.notice:
        logger.warning("%s: %s", download.model, download.notice)
    with _open_part(download.path.with_name(f".{download.file}.part")) as part:
        for place in places:
            logger.info("%s: %s from %s", download.model, human_bytes(download.bytes), place)
            try:
                with progress_bar(download.file) as progress:
                    _transfer(place, part, recorded, download.bytes, progress)
                break
            except SourceFailed as error:
                logger.info("%s: %s", place, error)
                failures.append(f"{_label(place)}: {error}")
        else:
            raise UserError(_missing(download, failures))
        part.finish()
        found = part.sha256
    _write_record(download.path, found)
    os.replace(part.path, download.path)


def _open_part(path: Path) -> PartialFile:
    with progress_bar(f"continuing {path.name[1:]}") as progress:
        return PartialFile(path, progress)


def _transfer(place: str | Path, part: PartialFile, sha256: str, size: int | None, progress: ProgressCallback) -> None:
    if isinstance(place, Path):
        copy(place, part, sha256=sha256, size=size, progress=progress)
    else:
        receive(place, part, sha256=sha256, size=size, progress=progress)


def _places(download: Download) -> list[str | Path]:
    """Folders and addresses to try: the mirror of the environment first; no addresses when offline."""
    names = (download.place, download.file)
    mirror = os.environ.get(MIRROR, "")
    places: list[str | Path] = []
    if "://" not in mirror:
        places += [Path(mirror).expanduser() / name for name in names if mirror]
    elif _is_address(mirror):
        places += [f"{mirror.rstrip('/')}/{quote(name)}" for name in names]
    else:
        raise UserError(f"{MIRROR}: '{mirror}' is neither a folder nor an http or https address")
    places += [source.url for source in download.sources]
    closed = is_offline() or bool(_no_downloads.get())
    return [place for place in places if isinstance(place, Path) or not closed]


def _is_address(text: str) -> bool:
    """Whether this is an http or https address whose server and port can be told."""
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # no number, or half a bracket
        return False


def _label(place: str | Path) -> str:
    """A place for a message: the path, or the server without what may be secret in an address."""
    if isinstance(place, Path):
        return str(place)
    parts = urlsplit(place)
    return f"{parts.hostname}:{parts.port}" if parts.port else str(parts.hostname)


def _missing(download: Download, failures: list[str]) -> str:
    """What was tried, and the three ways out, in one line."""
    tried = [f"{OFFLINE} is set"] if is_offline() else [reason for reason in (_no_downloads.get(),) if reason]
    tried += list(dict.fromkeys(failures))
    folder, size = download.path.parent, human_bytes(download.bytes)
    return (
        f"{download.model}: {download.file} ({size}) is not in {folder} and could not be fetched ({'; '.join(tried)}). "
        f"Three ways to provide it: (1) run 'onestepsr models download {download.model}' on a machine with a network "
        f"and copy the file into {folder}; (2) {download.alternative}; (3) set {MIRROR} to a folder or an address that "
        f"holds {download.place}"
    )


@contextmanager
def _locked(download: Download) -> Iterator[None]:
    lock = FileLock(download.path.with_name(f".{download.file}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning("%s: another process is downloading it; waiting", download.model)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _record(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _read_record(path: Path) -> str:
    """The checksum written beside a file, in the format of sha256sum; empty if there is none."""
    try:
        with _record(path).open("rb") as handle:
            found = re.match(rb"[0-9a-f]{64}(?= )", handle.read(65))
    except OSError:
        return ""
    return found[0].decode() if found else ""


def _write_record(path: Path, sha256: str) -> None:
    with replacing(_record(path)) as temporary:
        temporary.write_text(f"{sha256}  {path.name}\n", encoding="utf-8")


def _hash(path: Path) -> str:
    size = path.stat().st_size
    if size < PROGRESS_BYTES:
        return file_sha256(path)
    with progress_bar(f"checking {path.name}") as progress:
        return file_sha256(path, lambda done: progress(done, size))
