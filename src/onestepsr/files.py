"""Files that appear under their name only when they are complete, and their checksums."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from onestepsr.errors import UserError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A hidden path beside ``path`` to write to: it takes that name when the block ends well, and is removed if not."""
    # A process number is not enough: on a shared disk, two machines may have the same.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.writing")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
