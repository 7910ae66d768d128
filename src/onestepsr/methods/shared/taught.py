"""Targets that another model makes: a stream of samples with a teacher's image beside the photo, and its pool on disk.

A deterministic teacher has one answer to every LR image, so what it makes is kept, in 8 bits, and reused.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from onestepsr.core.errors import UserError
from onestepsr.core.files import file_sha256
from onestepsr.core.progress import progress
from onestepsr.data.datasets import TAUGHT, DataConfig, PhotoStream, Pool, Sample, fingerprint
from onestepsr.inference.devices import resolve_device, resolve_dtype
from onestepsr.inference.tiled import LoadedGenerator
from onestepsr.models.generators import Generator

FORMAT = 1
"""Part of the pool's name: raise it when the same settings make other targets than before."""


class Teacher:
    """A model by name or file that enlarges LR images; loaded when it is first asked, and never pickled."""

    def __init__(self, name: str, dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto") -> None:
        self.name = name
        self.device = resolve_device("auto")
        self.dtype = resolve_dtype(dtype, self.device)
        self._network: Generator | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_network": None}

    def identity(self) -> list[str]:
        """Values that its images depend on: the weights, and the dtype they are computed in."""
        path = Path(self.name)
        return [file_sha256(path) if path.is_file() else self.name, str(self.dtype)]

    @torch.inference_mode()
    def __call__(self, lr: Tensor) -> Tensor:
        """Images (N, 3, s h, s w) on the 256 levels of 8 bits of ``lr`` (N, 3, h, w), both float32 in [0, 1]."""
        if self._network is None:
            from onestepsr.models.loading import load_generator

            self._network = load_generator(self.name, device=self.device, dtype=self.dtype)
        loaded = LoadedGenerator(generator=self._network, device=self.device, dtype=self.dtype, name=self.name)
        sr: Tensor = self._network(lr.to(self.device, loaded.input_dtype).contiguous(memory_format=torch.channels_last))
        return (sr.float().clamp(0, 1) * 255).round().cpu() / 255


class TaughtStream(PhotoStream):
    """Samples of ``source`` with the teacher's image of their LR image beside them."""

    def __init__(self, source: PhotoStream, teacher: Teacher) -> None:
        super().__init__(source.config, source.seed, source.with_lr, source.photos)
        self.source, self.teacher, self.files = source, teacher, source.files

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        sample = self.source[index]
        return {**sample, TAUGHT: self.teacher(sample["lr"][None])[0].clone()}

    def content(self) -> list[Any]:
        """Values that the samples depend on besides configuration and seed."""
        return [*self.source.content(), ["teacher", *self.teacher.identity()]]


class TaughtPool(Pool):
    """A pool of taught samples. Its folder does not depend on ``pool_size``: a larger pool goes on where a smaller one
    ends, and training may begin with the first part while the rest is being made."""

    def __init__(self, source: TaughtStream, config: DataConfig, seed: int) -> None:
        super().__init__(source, config, seed)
        parts = [FORMAT, Pool(source, replace(config, pool_size=1), seed).folder.name]
        self.folder = config.cache_dir / f"taught-{fingerprint(parts)}"

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        sample = self._taught.source[0]  # the teacher, who may be slow to load, makes images of the photo's size
        return {name: tuple(image.shape) for name, image in sample.items()} | {TAUGHT: tuple(sample["hr"].shape)}

    def _map(self, name: str, kind: type[np.generic], shape: tuple[int, ...]) -> np.memmap[Any, Any]:
        path = self.folder / f"{name}.bin"
        full_shape = (self.size, *shape)
        length = int(np.prod(full_shape)) * np.dtype(kind).itemsize
        with path.open("ab") as file:
            if file.tell() < length:  # never shortened: another run may use more of it
                os.truncate(path, length)
        return np.memmap(path, dtype=kind, mode="r+", shape=full_shape)

    def fill(self, numbers: Iterable[int] | None = None) -> None:
        """Make the entries that are not there yet, all of them or those of ``numbers``, under a progress bar."""
        wanted = list(range(self.size) if numbers is None else numbers)
        for number in progress(wanted, f"{self.size:,} targets of {self._taught.teacher.name}"):
            self.entry(number)

    @property
    def _taught(self) -> TaughtStream:
        assert isinstance(self.source, TaughtStream)
        return self.source


def taught(source: Any, teacher: Teacher, config: DataConfig, seed: int) -> TaughtStream | TaughtPool:
    """``source``, a stream or a pool of one, with targets; a pool where ``config`` asks for one."""
    stream = source.source if isinstance(source, Pool) else source
    if not stream.with_lr or config.prompts is not None:
        raise UserError("data: a teacher needs LR images, and its pool keeps no texts")
    if config.taught_paths:
        raise UserError("data.taught_paths: the targets of this method are made by its own teacher")
    taught_stream = TaughtStream(stream, teacher)
    return TaughtPool(taught_stream, config, seed) if config.pool_size else taught_stream
