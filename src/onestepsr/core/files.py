"""Atomic writes, reads within a size limit, checksums, and locks between processes."""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from onestepsr.core.errors import UserError

logger = logging.getLogger(__name__)

PARTIAL_PREFIX = ".onestepsr-partial-"
"""Names of unfinished files begin with this; they are never read as inputs."""


def at_home(path: Path) -> Path:
    """``path`` with a leading ``~`` replaced by the home folder; unchanged if there is none."""
    try:
        return path.expanduser()
    except RuntimeError:  # a user who is not known
        return path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a hidden path beside ``path`` to write to: renamed to ``path`` if the block succeeds, else deleted."""
    temporary = partial_path(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def partial_path(path: Path) -> Path:
    """A hidden path beside ``path`` that no other process uses; :func:`remove_leftovers` recognises it."""
    # A process number is not enough: on a shared disk, two machines may have the same.
    return path.with_name(f"{PARTIAL_PREFIX}{_digest(path)}-{secrets.token_hex(6)}")


def remove_leftovers(*targets: Path) -> None:
    """Delete unfinished files that a killed run left for these targets; every folder is listed once."""
    names: dict[Path, set[str]] = {}
    for path in targets:
        names.setdefault(path.parent, set()).add(_digest(path))
    for folder, digests in names.items():
        for leftover in folder.glob(f"{PARTIAL_PREFIX}*"):
            if leftover.name.removeprefix(PARTIAL_PREFIX).partition("-")[0] in digests:
                leftover.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError raised while the block writes ``path`` into a :class:`UserError` of one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8 under ``path`` in one step, making its folder; raises UserError if that fails."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        with replacing(path) as temporary:
            # A file name from another system may hold what UTF-8 cannot.
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def read_limited(path: Path, limit: int, kind: str) -> bytes:
    """The content of a file of at most ``limit`` bytes; :class:`UserError` if it is unreadable or larger.

    ``kind`` names in the message what was expected.
    """
    try:
        with path.open("rb") as handle:
            content = handle.read(limit + 1)
    except (OSError, ValueError) as error:  # a name that holds a zero byte is a ValueError
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', error)})") from error
    if len(content) > limit:
        raise UserError(f"{path}: larger than {limit:,} bytes, which is no {kind}")
    return content


def read_text(path: Path, limit: int, kind: str) -> str:
    """As :func:`read_limited`, decoded from UTF-8 with or without a byte-order mark."""
    try:
        return read_limited(path, limit, kind).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text") from error


def file_sha256(path: Path, advance: Callable[[int], None] = lambda count: None) -> str:
    """SHA-256 of a file, in hexadecimal; ``advance`` is called with the size of each block that was read.

    Raises :class:`UserError` if the file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as handle:
            while block := handle.read(2**20):
                digest.update(block)
                advance(len(block))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    return digest.hexdigest()


def _digest(path: Path) -> str:
    # A digest, since the target's own name may already be as long as the file system allows.
    return hashlib.sha256(path.name.encode(errors="surrogateescape")).hexdigest()[:16]


# ---- locks between processes -------------------------------------------------------------------------------------


@contextmanager
def locked(path: Path, *, wait: bool, waiting: str = "") -> Iterator[bool]:
    """Hold the lock file ``path``, made if absent, in a folder that exists, against other processes.

    With ``wait`` until it is free, after a warning ``waiting`` if it is not; without, yields False if another process
    holds it. A file that cannot be opened or locked for any other reason is no obstacle.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if not wait:
                yield False
                return
            if waiting:
                logger.warning(waiting)
            lock.acquire()
    except (OSError, NotImplementedError):  # a read-only folder, a file system without locks
        yield True
        return
    try:
        yield True
    finally:
        lock.release()
