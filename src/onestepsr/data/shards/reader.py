"""Tar files by path, folder or pattern, and images read from the middle of them."""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
from collections import OrderedDict
from collections.abc import Sequence
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onestepsr.core.errors import UserError
from onestepsr.data.shards.index import TarIndex, TarStamp, header_name

MAX_OPEN_FILES = 128
"""Per process. An epoch's order touches about half as many tars at a time."""
MAX_NAMES = 1_000_000
"""A pattern that stands for more files than this is taken for a mistake."""

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_COMPRESSED_ENDINGS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


def find_tars(paths: Sequence[Path]) -> list[Path]:
    """Every tar that ``paths`` name: files, folders (searched recursively), patterns such as ``a-{000..099}.tar``."""
    return [tar for path in paths for tar in _tars_of(path)]


def expand_braces(pattern: str) -> list[str]:
    """The names that ``pattern`` stands for; groups such as ``{000..099}`` and ``{train,extra}`` expand as in a shell.

    UserError for a group that is neither, a range that runs backwards, or more than MAX_NAMES names.
    """
    group = _BRACES.search(pattern)
    if group is None:
        return [pattern]
    choices, endings = _choices(group[1], pattern), expand_braces(pattern[group.end() :])
    if len(choices) * len(endings) > MAX_NAMES:
        raise UserError(f"{pattern}: stands for {len(choices) * len(endings):,} files, expected at most {MAX_NAMES:,}")
    return [pattern[: group.start()] + choice + ending for choice in choices for ending in endings]


class TarImages:
    """Images inside tar files, numbered through. Reading holds few files open and is safe after fork and pickling."""

    def __init__(self, indexes: Sequence[TarIndex], chosen: Sequence[NDArray[np.int64]]) -> None:
        """``chosen`` holds, for each index, the numbers of the members to take, in order."""
        self.tars: list[tuple[Path, TarStamp]] = [(index.path, index.stamp) for index in indexes]
        picked = [(index.members, numbers) for index, numbers in zip(indexes, chosen, strict=True)]
        self.starts = np.cumsum([0, *map(len, chosen)], dtype=np.int64)
        self.offsets: NDArray[np.int64] = np.concatenate([members["offset"][numbers] for members, numbers in picked])
        self.lengths: NDArray[np.uint32] = np.concatenate([members["bytes"][numbers] for members, numbers in picked])
        self._open: OrderedDict[int, FileIO] = OrderedDict()

    def __len__(self) -> int:
        return len(self.offsets)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def fetch(self, number: int) -> tuple[bytes, str]:
        """The bytes of image ``number`` and its name; UserError if its tar is gone, changed or cannot be read."""
        tar = int(np.searchsorted(self.starts, number, side="right")) - 1
        path, _ = self.tars[tar]
        begin = int(self.offsets[number]) - tarfile.BLOCKSIZE
        try:
            data = self._read(tar, begin, tarfile.BLOCKSIZE + int(self.lengths[number]))
            name = header_name(data[: tarfile.BLOCKSIZE])
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from error
        except tarfile.HeaderError as error:
            raise UserError(f"{path}: changed since it was indexed (no tar header at byte {begin:,})") from error
        return data[tarfile.BLOCKSIZE :], f"{path}: {name}"

    def content(self) -> list[Any]:
        """What identifies the images: name and length of each tar, and a digest of where they lie."""
        places = hashlib.blake2b(self.offsets.tobytes() + self.lengths.tobytes(), digest_size=16)
        return [[path.name, stamp.bytes] for path, stamp in self.tars] + [places.hexdigest()]

    def _read(self, tar: int, begin: int, length: int) -> bytes:
        # Reading at a position leaves the file's own one alone, which forked processes share.
        descriptor, pieces, done = self._file(tar).fileno(), [], 0
        while done < length and (piece := os.pread(descriptor, length - done, begin + done)):
            pieces.append(piece)
            done += len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _file(self, tar: int) -> FileIO:
        if tar in self._open:
            self._open.move_to_end(tar)
            return self._open[tar]
        path, stamp = self.tars[tar]
        file = FileIO(path)
        if TarStamp.of(os.fstat(file.fileno())) != stamp:
            file.close()
            raise UserError(f"{path}: changed since it was indexed")
        while len(self._open) >= MAX_OPEN_FILES:
            self._open.popitem(last=False)[1].close()
        self._open[tar] = file
        return file


def _tars_of(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(tar for tar in path.rglob("*.tar") if tar.is_file() and not tar.name.startswith("."))
        if not found:
            raise UserError(f"{path}: no .tar files in it{_compressed_ones(path)}")
        return found
    if path.exists():
        return [path]
    names = [Path(name) for name in expand_braces(str(path))]
    missing = [name for name in names if not name.is_file()]
    if missing:
        among = f" ({len(missing)} of {len(names)} are missing: {path})" if len(names) > 1 else ""
        raise UserError(f"{missing[0]}: no such file{among}")
    return names


def _compressed_ones(folder: Path) -> str:
    names = [path.name for path in folder.rglob("*") if path.name.endswith(_COMPRESSED_ENDINGS)]
    return f"; {names[0]} is compressed: unpack it to a plain .tar" if names else ""


def _choices(text: str, pattern: str) -> list[str]:
    numbers = _RANGE.fullmatch(text)
    if numbers is None:
        if "," in text:
            return text.split(",")
        raise UserError(f"{pattern}: {{{text}}} is neither a range such as {{00..99}} nor a list such as {{a,b}}")
    low, high = int(numbers[1]), int(numbers[2])
    if not low <= high < low + MAX_NAMES:
        raise UserError(f"{pattern}: {{{text}}} is not a range of 1 to {MAX_NAMES:,} numbers")
    padded = any(len(end) > 1 and end.startswith("0") for end in numbers.groups())
    width = max(map(len, numbers.groups())) if padded else 0
    return [f"{number:0{width}d}" if width else str(number) for number in range(low, high + 1)]
