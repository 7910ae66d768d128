"""Where each image of a tar file begins, how long it is and what size it has: read once, then kept beside the tar.

One pass over the headers of tar and images makes the index. It is written as ``NAME.tar.index.npz`` into the tar's
folder or, where that cannot be written to, into the cache folder, and it counts as long as the tar keeps its length and
its time of modification. Processes that index at the same time do each other no harm: a file appears whole or not at
all, and every one of them writes the same bytes.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import struct
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from onestepsr.core.errors import UserError
from onestepsr.core.files import replacing
from onestepsr.core.progress import progress
from onestepsr.data.photos import is_image_name, read_size
from onestepsr.imaging.read import MAX_BYTES

logger = logging.getLogger(__name__)

FORMAT = 1
"""Raise it when the index of the same tar would be another one."""
MEMBER = np.dtype(
    [("offset", "<i8"), ("bytes", "<u4"), ("width", "<u4"), ("height", "<u4"), ("role", "u1"), ("partner", "<i4")]
)
"""One image. ``offset`` is that of its data; ``width`` is 0 where the header could not be read; ``role`` is HR or LR
for members called ``KEY.hr.EXT`` and ``KEY.lr.EXT``; ``partner`` is the number of the member with the same key and the
other role, or -1."""
OTHER, HR, LR = 0, 1, 2
Members = NDArray[np.void]

_PACKED = struct.Struct("<qIIIBi")
_PAIRED_NAME = re.compile(r"(?P<key>.+)\.(?P<role>hr|lr)\.[^./]+")
_ROLES = {"hr": HR, "lr": LR}
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\3\4": "zip"}
_DISK_TROUBLE = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT)
"""Not the image's fault: the index would leave it out for good."""
_STALE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)


class TarStamp(NamedTuple):
    """What must not change about a tar while its index is in use."""

    bytes: int
    modified_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> TarStamp:
        """From the file's status."""
        return cls(status.st_size, status.st_mtime_ns)


@dataclass(frozen=True, kw_only=True)
class TarIndex:
    """The images of one tar file, in the file's order."""

    path: Path
    stamp: TarStamp
    members: Members
    """(number of images,) of dtype MEMBER."""


def open_indexes(paths: Sequence[Path], cache_dir: Path) -> list[TarIndex]:
    """The index of every tar in ``paths``, from disk where it is there; UserError names the first bad tar.

    The processes of one run start at different places, so that they share the work instead of repeating it.
    """
    rank, processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    begin = len(paths) * rank // max(processes, 1) % max(len(paths), 1)
    rotated = [*paths[begin:], *paths[:begin]]
    indexes = [open_index(path, cache_dir) for path in progress(rotated, "indexing tar files")]
    return [*indexes[len(paths) - begin :], *indexes[: len(paths) - begin]]


def open_index(path: Path, cache_dir: Path) -> TarIndex:
    """The index of one tar, made and written now unless it is there already."""
    places = (path.with_name(f"{path.name}.index.npz"), cache_dir / f"tar-index-{_digest(path)}.npz")
    try:
        stamp = TarStamp.of(path.stat())
        for place in places:
            members = _load(place, stamp)
            if members is not None:
                return TarIndex(path=path, stamp=stamp, members=members)
        index = build_index(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    _save(index, places)
    return index


def build_index(path: Path) -> TarIndex:
    """Read the headers of all members; UserError for what is no plain tar, or is damaged or cut off."""
    packed, keys = bytearray(), _Keys()
    with path.open("rb") as file:
        stamp = TarStamp.of(os.fstat(file.fileno()))
        for tar, member in _regular_members(path, file, stamp.bytes):
            if not is_image_name(member.name.rpartition("/")[2]):
                continue
            width, height = _size(tar, member)
            role = keys.add(member.name, len(packed) // _PACKED.size)
            length = min(member.size, MAX_BYTES)
            packed += _PACKED.pack(member.offset_data, length, width, height, role, -1)
    members: Members = np.frombuffer(packed, dtype=MEMBER)
    keys.link(members)
    return TarIndex(path=path, stamp=stamp, members=members)


def name_of(index: TarIndex, number: int) -> str:
    """The tar's path and the name of image ``number`` in it (the first 100 characters of a longer one)."""
    with index.path.open("rb") as file:
        file.seek(int(index.members["offset"][number]) - tarfile.BLOCKSIZE)
        return f"{index.path}: {header_name(file.read(tarfile.BLOCKSIZE))}"


def header_name(header: bytes) -> str:
    """The name in the 512 bytes before a member's data; tarfile.HeaderError if they are none."""
    return tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name


class _Keys:
    """Members that name their role, by key."""

    def __init__(self) -> None:
        self.numbers: dict[int, dict[str, int]] = {HR: {}, LR: {}}

    def add(self, name: str, number: int) -> int:
        """Note a member; returns its role."""
        match = _PAIRED_NAME.fullmatch(name)
        if match is None:
            return OTHER
        role = _ROLES[match["role"]]
        self.numbers[role][match["key"]] = number
        return role

    def link(self, members: Members) -> None:
        """Fill in ``partner``."""
        for key, number in self.numbers[HR].items():
            partner = self.numbers[LR].get(key)
            if partner is not None:
                members["partner"][number], members["partner"][partner] = partner, number


def _regular_members(path: Path, file: IO[bytes], length: int) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """Every plain file in the tar; links, folders and sparse files are passed over."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # or the tar would remember every header
                if not member.isreg() or member.issparse():
                    continue
                if member.offset_data + member.size > length:
                    raise UserError(f"{path}: cut off at byte {length:,}, inside '{member.name}'")
                yield tar, member
            end = tar.offset
    except tarfile.TarError as error:
        raise UserError(f"{path}: {_what_else(file, error)}") from error
    # The tar reader takes a damaged header for the end of the file.
    file.seek(end)
    if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise UserError(f"{path}: damaged at byte {end:,}, where a tar header was expected")


def _what_else(file: IO[bytes], error: Exception) -> str:
    """What a file that is no good tar may be instead."""
    file.seek(0)
    start = file.read(8)
    for magic, name in _COMPRESSED.items():
        if start.startswith(magic):
            return f"compressed with {name}, so that no image can be read on its own; unpack it to a plain .tar"
    return f"not a tar file, or damaged ({error})"


def _size(tar: tarfile.TarFile, member: tarfile.TarInfo) -> tuple[int, int]:
    """Width and height of an image, (0, 0) if it cannot be one."""
    if not 0 < member.size <= MAX_BYTES:
        return 0, 0
    data = tar.extractfile(member)
    if data is None:
        return 0, 0
    with data:
        return read_size(data, fatal=_DISK_TROUBLE) or (0, 0)


def _load(place: Path, stamp: TarStamp) -> Members | None:
    """The index at ``place`` if there is one and it fits."""
    try:
        # Each image takes over 512 bytes in the tar, so its index is always the smaller file.
        if place.stat().st_size > stamp.bytes + 4096:
            return None
        with np.load(place, allow_pickle=False) as arrays:
            if arrays["stamp"].tolist() != [FORMAT, *stamp]:
                return None
            members: Members = arrays["members"]
    except _STALE:
        return None
    return members if members.dtype == MEMBER and members.ndim == 1 else None


def _save(index: TarIndex, places: Sequence[Path]) -> None:
    """Write to the first of ``places`` that can be written to; without any, every start reads the tar again."""
    arrays: dict[str, Any] = {"stamp": np.array([FORMAT, *index.stamp], dtype=np.int64), "members": index.members}
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with replacing(place) as temporary, temporary.open("wb") as file:
                np.savez(file, **arrays)
            return
        except OSError as error:
            reason = error.strerror
    logger.warning("%s: its index cannot be kept at %s (%s)", index.path, " or ".join(map(str, places)), reason)


def _digest(path: Path) -> str:
    return hashlib.blake2b(str(path.resolve()).encode(errors="surrogateescape"), digest_size=12).hexdigest()
