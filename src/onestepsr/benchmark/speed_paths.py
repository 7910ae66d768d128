"""Two ways of enlarging images from file to file, with a stopwatch: the product, and what published scripts do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from onestepsr.benchmark.stages import NETWORK, Call, Stopwatch, stages_of
from onestepsr.imaging.color import wavelet
from onestepsr.imaging.read import LoadedImage, read_image, samples_to_tensor, tensor_to_samples
from onestepsr.imaging.write import write_image
from onestepsr.inference.allocator import no_malloc_trim
from onestepsr.inference.tiled import LoadedGenerator
from onestepsr.inference.tiling import Sides
from onestepsr.inference.upscaler import UpscaleOptions, Upscaler, enlarge
from onestepsr.models.generators import Generator, pad_to_multiple

WHOLE, READ, UPSCALE, WRITE = "whole", "read", "upscale", "write"
Samples = NDArray[Any]


class EnlargingPath(Protocol):
    """A way of enlarging images of equal size."""

    @property
    def generator(self) -> Generator:
        """The network."""
        ...

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype."""
        ...

    @property
    def memory_format(self) -> torch.memory_format:
        """Order of its tensors in memory."""
        ...

    def enlarge(self, images: Sequence[LoadedImage]) -> list[Samples]:
        """The images four times as large, (H, W, 3) of their own kind."""
        ...

    def tile(self, height: int, width: int) -> Sides:
        """Height and width of the tiles in input pixels for images of this size; the image's if there is one."""
        ...

    def stage_tiles(self, height: int, width: int) -> dict[str, Sides]:
        """Likewise by stage, where encoder, UNet and decoder have tiles of their own."""
        ...


class ProductPath:
    """Every image through the upscaler, tiles and all."""

    memory_format: torch.memory_format = torch.channels_last

    def __init__(self, upscaler: Upscaler, options: UpscaleOptions) -> None:
        self.upscaler, self.options = upscaler, options

    @property
    def generator(self) -> Generator:
        """The network, which the upscaler may exchange when a dtype overflows."""
        return self.upscaler.generator

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.upscaler.device

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the network."""
        return self.upscaler.dtype

    def enlarge(self, images: Sequence[LoadedImage]) -> list[Samples]:
        """One after the other."""
        return [self.upscaler.upscale_image(image, self.options).pixels for image in images]

    def tile(self, height: int, width: int) -> Sides:
        """What the upscaler plans."""
        tile = self.upscaler.plan_tile(height, width, self.options)
        return min(tile[0], height), min(tile[1], width)

    def stage_tiles(self, height: int, width: int) -> dict[str, Sides]:
        """What the upscaler plans for each."""
        planned = self.upscaler.plan(height, width, self.options).stages or {}
        names = zip(stages_of(self.generator).values(), planned.values(), strict=False)
        return {name: (min(plan.tile[0], height), min(plan.tile[1], width)) for name, plan in names}


class WholePath:
    """All images at once and whole through the network, then the wavelet colour fix."""

    def __init__(
        self,
        generator: Generator,
        device: torch.device,
        dtype: torch.dtype,
        memory_format: torch.memory_format,
        *,
        keep_memory: bool = False,
    ) -> None:
        """``keep_memory``: treat freed memory as the upscaler does, see :mod:`onestepsr.inference.allocator`."""
        self._keep_memory = keep_memory
        self.generator, self.device, self.dtype, self.memory_format = generator, device, dtype, memory_format
        self._scale = generator.scale
        loaded = LoadedGenerator(generator=generator, device=device, dtype=dtype, name="whole")
        self._input_dtype = loaded.input_dtype

    def enlarge(self, images: Sequence[LoadedImage]) -> list[Samples]:
        """The network draws the noise that the upscaler gives an image of one tile, where it draws any."""
        extra: dict[str, Any] = {} if self.generator.takes_batches else {"rng": torch.Generator().manual_seed(0)}
        with no_malloc_trim(self._keep_memory), torch.inference_mode():
            lr = self._padded(torch.cat([samples_to_tensor(image.pixels) for image in images]).to(self.device))
            rgb = lr.to(self._input_dtype).contiguous(memory_format=self.memory_format)
            sr = self.generator(rgb, **extra)
            fixed = wavelet(sr.float().clamp(0.0, 1.0), enlarge(lr, self._scale))
        height, width = (side * self._scale for side in (images[0].height, images[0].width))
        return [tensor_to_samples(values[:, :height, :width], np.uint8) for values in fixed]

    def _padded(self, lr: torch.Tensor) -> torch.Tensor:
        """Padded before everything, as the upscaler does, so that the colour fix sees the same borders."""
        return pad_to_multiple(lr, self.generator.lr_multiple)

    def tile(self, height: int, width: int) -> Sides:
        """The whole image."""
        return height, width

    def stage_tiles(self, height: int, width: int) -> dict[str, Sides]:
        """None."""
        return {}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One batch from files to files."""

    seconds: dict[str, float]
    """Time by stage, and of ``network`` and ``whole``, of which the stages are parts."""
    calls: tuple[Call, ...]
    """What of the network was called, with tensors of which shapes."""
    pixels: list[Samples]
    """What came out."""


def run_path(path: EnlargingPath, sources: Sequence[Path], folder: Path) -> Run:
    """Enlarge the files ``sources`` into ``folder``.

    ``enlarge`` is what the generator does besides its stages; ``colour`` is what the path does besides the generator:
    dtypes, joining of tiles, colour fix, rounding.
    """
    watch = Stopwatch(path.device)
    with watch.section(WHOLE), watch.watching(path.generator):
        with watch.section(READ):
            images = [read_image(source) for source in sources]
        with watch.section(UPSCALE):
            pixels = path.enlarge(images)
        with watch.section(WRITE):
            for source, samples in zip(sources, pixels, strict=True):
                write_image(LoadedImage(pixels=samples), folder / source.name)
    return Run(seconds=_completed(watch.read(), path.generator), calls=tuple(watch.calls), pixels=pixels)


def stage_names(generator: nn.Module) -> list[str]:
    """The stages of a run with this generator, in order."""
    return [READ, "enlarge", *stages_of(generator).values(), "colour", WRITE]


def _completed(seconds: dict[str, float], generator: nn.Module) -> dict[str, float]:
    """With the two stages that are what is left of a whole."""
    parts = sum(seconds.get(stage, 0.0) for stage in stages_of(generator).values())
    upscale, network = seconds.pop(UPSCALE), seconds.get(NETWORK, 0.0)
    return {**seconds, "enlarge": max(0.0, network - parts), "colour": max(0.0, upscale - network)}
