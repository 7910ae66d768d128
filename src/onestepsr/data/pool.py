"""A pool of samples on disk: made on first demand, then reused with new flips in every epoch.

The pool is a folder of plain arrays, mapped into memory by every process that uses it. An entry counts only if its
checksum fits, and the checksum is written after the data: an entry half written by a killed process or lost in a power
cut is simply made again, and two processes that make the same entry write the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from onestepsr.core.config import to_mapping
from onestepsr.core.errors import UserError
from onestepsr.core.rng import generator
from onestepsr.data.config import DataConfig
from onestepsr.data.order import epoch_position
from onestepsr.data.photo_dataset import Sample, SampleStream, augment

FORMAT = 1
"""Part of the pool's name: raise it when the same configuration makes other pixels than before."""
MADE = 1 << 32
"""Set above the CRC-32 of a finished entry, so that an untouched entry (all zeros) never counts."""


class Pool(Dataset[Sample]):
    """The first ``config.pool_size`` samples of ``source``, kept on disk, in a new order and orientation each epoch.

    ``source`` must give 8-bit images of one size. Sample ``i`` depends on (seed, i) and the source alone.
    """

    def __init__(self, source: SampleStream, config: DataConfig, seed: int) -> None:
        self.source, self.config, self.seed, self.size = source, config, seed, config.pool_size
        self.folder = config.cache_dir / f"pool-{_fingerprint(source, config, seed)}"
        self._arrays: dict[str, np.memmap[Any, Any]] | None = None

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        entry = self.entry(epoch_position(self.size, index, self.seed))
        return augment(entry, self.config, generator(self.seed, "pool", index))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_arrays": None}

    def content(self) -> list[Any]:
        """What the source says of its files."""
        return self.source.content()

    def entry(self, number: int) -> Sample:
        """Sample ``number`` of the source, from disk if it is there; exactly what the source itself gives."""
        arrays = self._open()
        if int(arrays["made"][number]) != self._checksum(number):
            for name, image in self.source[number].items():
                arrays[name][number] = (image * 255).round().to(torch.uint8).numpy()
            arrays["made"][number] = self._checksum(number)
        return {name: torch.from_numpy(arrays[name][number].astype(np.float32)) / 255 for name in self._names()}

    def _names(self) -> list[str]:
        return [name for name in self._open() if name != "made"]

    def _checksum(self, number: int) -> int:
        code = 0
        for name in self._names():
            code = zlib.crc32(self._open()[name][number], code)
        return MADE | code

    def _open(self) -> dict[str, np.memmap[Any, Any]]:
        if self._arrays is None:
            shapes = {name: tuple(image.shape) for name, image in self.source[0].items()}
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                _require_space(self.folder, self.size * sum(int(np.prod(shape)) for shape in shapes.values()))
                self._arrays = {name: self._map(name, np.uint8, shape) for name, shape in shapes.items()}
                self._arrays["made"] = self._map("made", np.uint64, ())
            except OSError as error:
                raise UserError(f"{self.folder}: the pool cannot be opened ({error.strerror})") from error
        return self._arrays

    def _map(self, name: str, kind: type[np.generic], shape: tuple[int, ...]) -> np.memmap[Any, Any]:
        """Map one array file, which starts as a hole of zeros that takes no room."""
        path = self.folder / f"{name}.bin"
        full_shape = (self.size, *shape)
        length = int(np.prod(full_shape)) * np.dtype(kind).itemsize
        with path.open("ab"):
            os.truncate(path, length)
        return np.memmap(path, dtype=kind, mode="r+", shape=full_shape)


def _require_space(folder: Path, length: int) -> None:
    """The arrays start as holes: running out of room later would kill the process, so it is checked beforehand."""
    taken = sum(path.stat().st_blocks * 512 for path in folder.iterdir())
    free = shutil.disk_usage(folder).free
    if length - taken > free:
        needed = f"{(length - taken) / 1e9:.1f} GB"
        raise UserError(f"{folder}: the pool needs {needed} more, {free / 1e9:.1f} GB are free; lower data.pool_size")


def fingerprint(values: Any) -> str:
    """A hash of plain values: lists, mappings, texts and numbers."""
    return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=12).hexdigest()


def _fingerprint(source: SampleStream, config: DataConfig, seed: int) -> str:
    """A hash of everything that the entries depend on."""
    settings = to_mapping(config)
    for name in ("cache_dir", "cache_bytes", "paths", "lr_paths", "prompts"):
        del settings[name]
    if config.kind not in ("shards", "shard_pairs"):
        del settings["shuffle_block"]
    settings["with_lr"] = source.with_lr
    settings["degradation"] = to_mapping(config.recipe())
    values = {"format": FORMAT, "seed": seed, "settings": settings, "files": source.content()}
    return fingerprint(values)
