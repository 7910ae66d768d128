"""Files that appear under their name only when they are complete, reading within a limit, and checksums."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from onestepsr.core.errors import UserError

PARTIAL_PREFIX = ".onestepsr-partial-"
"""Names of unfinished files begin with this; they are never read as inputs."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A hidden path beside ``path`` to write to: it takes that name when the block ends well, and is removed if not."""
    temporary = partial_path(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def partial_path(path: Path) -> Path:
    """A name beside ``path`` that no other process takes, and from which :func:`remove_leftovers` knows ``path``."""
    # A process number is not enough: on a shared disk, two machines may have the same.
    return path.with_name(f"{PARTIAL_PREFIX}{_digest(path)}-{secrets.token_hex(6)}")


def remove_leftovers(*targets: Path) -> None:
    """Delete unfinished files that a killed run left for these very targets; every folder is looked through once."""
    names: dict[Path, set[str]] = {}
    for path in targets:
        names.setdefault(path.parent, set()).add(_digest(path))
    for folder, digests in names.items():
        for leftover in folder.glob(f"{PARTIAL_PREFIX}*"):
            if leftover.name.removeprefix(PARTIAL_PREFIX).partition("-")[0] in digests:
                leftover.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Whatever the system refuses while the block writes ``path`` becomes a UserError of one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8 under ``path`` in one step, making its folder; raises UserError if that fails."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            # A file name from another system may hold what UTF-8 cannot.
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def read_limited(path: Path, limit: int, kind: str) -> bytes:
    """The content of a file of at most ``limit`` bytes; UserError if it cannot be read or is larger, and so no
    ``kind``."""
    try:
        with path.open("rb") as handle:
            content = handle.read(limit + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if len(content) > limit:
        raise UserError(f"{path}: larger than {limit:,} bytes, which is no {kind}")
    return content


def read_text(path: Path, limit: int, kind: str) -> str:
    """As :func:`read_limited`, decoded from UTF-8 with or without a byte-order mark."""
    try:
        return read_limited(path, limit, kind).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text") from error


def file_sha256(path: Path, progress: Callable[[int], None] = lambda done: None) -> str:
    """SHA-256 of a file, in hexadecimal; ``progress`` is told the bytes read so far. Raises UserError if unreadable."""
    digest, done = hashlib.sha256(), 0
    try:
        with path.open("rb") as handle:
            while block := handle.read(2**20):
                digest.update(block)
                done += len(block)
                progress(done)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    return digest.hexdigest()


def _digest(path: Path) -> str:
    # A digest, since the target's own name may already be as long as the file system allows.
    return hashlib.sha256(path.name.encode(errors="surrogateescape")).hexdigest()[:16]


# Locks between processes: what several of them share is made by one, and a run has one writer -------------------------

HELD_BY_ANOTHER = (errno.EACCES, errno.EAGAIN)


@contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[bool]:
    """Hold the file ``path``, made if absent, in a folder that exists, against other processes.

    With ``wait`` until it is free; without, yields False if another process holds it. A file that cannot be opened or
    locked for any other reason is no obstacle.
    """
    if os.name != "posix":
        yield True
        return
    try:
        file = path.open("a")
    except OSError:
        yield True
        return
    with file:
        yield _take(file, wait)


def _take(file: IO[str], wait: bool) -> bool:
    import fcntl

    try:
        fcntl.lockf(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in HELD_BY_ANOTHER
    return True
