"""Weights that are not part of the package: where they come from, where they are kept, what to do without a network.

A file is looked for in the cache, then in the mirror that the environment names, then at its sources in order; whatever
comes is checked against its SHA-256 before it appears under its name. Docs: ``docs/models.md``.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urlsplit

from filelock import FileLock, Timeout

from onestepsr.errors import UserError
from onestepsr.files import file_sha256, replacing
from onestepsr.models.transfer import PartialFile, Progress, SourceFailed, copy, progress_bar, receive

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


def obtain(download: Download, *, replace: bool = False) -> Path:
    """The file in the cache, fetched first if it is not there.

    Of several processes one downloads and the others wait. A damaged file is an error, or is replaced if ``replace``.
    Raises :class:`UserError` when the file cannot be had: the message says what was tried, and the three ways out.
    """
    try:
        if not _is_there(download, replace):
            download.path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(download):
                if not _is_there(download, replace):
                    _bring(download)
    except (OSError, NotImplementedError) as error:  # the latter: a file system without locks
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{download.path.parent}: cannot be written ({reason}); {CACHE} names another") from error
    return download.path


def obtain_all(downloads: Iterable[Download], *, replace: bool = False) -> list[Path]:
    """The files of one model, see :func:`obtain`; its terms are logged once."""
    paths: list[Path] = []
    told = False
    for download in downloads:
        absent = not download.path.exists()
        paths.append(obtain(dataclasses.replace(download, notice="") if told else download, replace=replace))
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


def _bring(download: Download) -> None:
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
        part.settle()
        found = part.sha256
    _write_record(download.path, found)
    os.replace(part.path, download.path)


def _open_part(path: Path) -> PartialFile:
    with progress_bar(f"continuing {path.name[1:]}") as progress:
        return PartialFile(path, progress)


def _transfer(place: str | Path, part: PartialFile, sha256: str, size: int | None, progress: Progress) -> None:
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
