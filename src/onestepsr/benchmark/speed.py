"""How fast a model is, stage by stage, from file to file: against the ceiling of the device and a plain baseline.

The product is the upscaler as the ``upscale`` command uses it. The baseline does what published scripts do: eager
float32, contiguous tensors, whole images. Both are run alternately, so that a disturbance of the machine meets both.
"""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import nn

from onestepsr.benchmark.ceiling import measure_ceiling
from onestepsr.benchmark.peak_memory import MemoryTask, MemoryUse, measure_memory
from onestepsr.benchmark.speed_paths import (
    WHOLE,
    EnlargingPath,
    ProductPath,
    Run,
    Samples,
    WholePath,
    run_path,
    stage_names,
)
from onestepsr.benchmark.speed_result import ModelSpeed, PathSpeed, StageSpeed, spread
from onestepsr.benchmark.stages import NETWORK, count_stages
from onestepsr.core.errors import UserError
from onestepsr.core.machine import free_memory, resident_memory
from onestepsr.inference.compiling import compiler_errors_named
from onestepsr.inference.upscaler import UpscaleOptions, Upscaler
from onestepsr.models.generators import Generator
from onestepsr.models.loading import load_generator
from onestepsr.models.resshift.generator import ResidualShiftGenerator

# The plain network that the product is measured beside ----------------------------------------------------------------


def load_plain(model: str, device: torch.device, steps: int | None = None) -> Generator:
    """The generator in float32 and PyTorch's usual memory format, with the layers that were trained. What depends on
    the prompt alone is computed beforehand here too."""
    generator = load_generator(model, device=device, dtype=torch.float32, steps=steps, faster=False)
    return generator.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload,no-any-return]


def steps_of(generator: nn.Module) -> int:
    """Evaluations of the diffusion network for one image."""
    return generator.schedule.steps if isinstance(generator, ResidualShiftGenerator) else 1


logger = logging.getLogger(__name__)

MOST_DECIBELS = 100.0
"""Agreement reported for equal images."""
FORMATS = {"jpg": ".jpg", "png": ".png", "webp": ".webp", "tiff": ".tif"}
"""File formats that can be read and written, and their endings."""
NAMES = {torch.channels_last: "channels_last", torch.contiguous_format: "contiguous"}


@dataclass(frozen=True, kw_only=True)
class SpeedConfig:
    """What is measured and how often."""

    width: int = 128
    """Columns of the image that is enlarged."""
    height: int = 128
    """Its rows."""
    batch: int = 1
    """Images of that size that the network is given at once; from 2 on they are not cut into tiles."""
    device: str = "auto"
    """Where the network runs."""
    dtype: str = "auto"
    """Number format of the product; the baseline has float32."""
    tile: int | Literal["auto", "off"] = "auto"
    """Tile side of the product in input pixels."""
    compiled: bool = False
    """Whether the product goes through ``torch.compile``; the runs before the timed ones are when that happens."""
    file_format: str = "jpg"
    """Format of the files read and written."""
    repeats: int = 5
    """Runs that are timed."""
    warmup: int = 1
    """Runs before them."""
    baseline: bool = True
    """Whether the plain network is measured beside the product."""
    memory: bool = True
    """Whether the memory of one image is measured too, in an interpreter of its own."""
    ceiling_seconds: float = 0.5
    """Time for every shape that the ceiling is looked for with."""

    def __post_init__(self) -> None:
        least = {"width": 1, "height": 1, "batch": 1, "repeats": 1, "warmup": 0}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise UserError(f"{name} {getattr(self, name)}: accepted: {smallest} and more")
        if self.file_format not in FORMATS:
            raise UserError(f"format '{self.file_format}': accepted: {', '.join(FORMATS)}")
        if self.batch > 1 and self.tile not in ("auto", "off"):
            raise UserError(f"tile {self.tile} with batch {self.batch}: only single images are cut into tiles")
        if self.compiled and self.warmup == 0:
            raise UserError("warmup 0 with compile: accepted: 1 and more, because the first run compiles")


def measure_speed(
    model: str, config: SpeedConfig, steps: int | None = None, announce: Callable[[str], None] = logger.info
) -> ModelSpeed:
    """The speed of ``model`` with ``steps`` evaluations (None: its own number); ``announce`` is told what is done.

    Raises :class:`UserError` or :class:`UnknownModel` for what cannot be loaded or does not go together.
    """
    with tempfile.TemporaryDirectory(prefix="onestepsr-speed-") as name:
        sources = write_sources(Path(name), config)
        announce(f"{model}: loading")
        upscaler = Upscaler.from_pretrained(model, config.device, config.dtype, steps=steps, compiled=config.compiled)
        paths = [_product(upscaler, config), *_plain(model, upscaler, config, steps, announce)]
        announce(f"{model}: {config.warmup} + {config.repeats} runs of {len(paths)} paths")
        with compiler_errors_named(model) if config.compiled else nullcontext():
            runs = alternate(paths, sources, config)
        announce(f"{model}: ceiling")
        product = paths[0]
        ceiling = measure_ceiling(
            product.device, product.dtype, memory_format=product.memory_format, seconds=config.ceiling_seconds
        )
        return ModelSpeed(
            model=model,
            steps=steps_of(product.generator),
            output=(runs[0][0].pixels[0].shape[1], runs[0][0].pixels[0].shape[0]),
            batch=config.batch,
            product=_path_speed(product, runs[0], config),
            ceiling=ceiling,
            baseline=_path_speed(paths[1], runs[1], config) if len(paths) > 1 else None,
            agreement_db=agreement(runs[0][-1].pixels, runs[1][-1].pixels) if len(paths) > 1 else None,
            memory=_memory(model, sources[0], config, steps, announce),
        )


def write_sources(folder: Path, config: SpeedConfig) -> list[Path]:
    """As many different images in ``folder`` as a batch has: smooth areas, edges and grain, the same in every run."""
    rng = np.random.default_rng(0)
    paths = [folder / f"{number}{FORMATS[config.file_format]}" for number in range(config.batch)]
    for path in paths:
        coarse = rng.integers(30, 226, (config.height // 16 + 2, config.width // 16 + 2, 3), dtype=np.uint8)
        size = (config.width, config.height)
        smooth = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)).astype(np.int16)
        stripes = 20 * ((np.arange(config.width) // 11 + np.arange(config.height)[:, None] // 7) % 2)[..., None]
        grain = rng.normal(0.0, 4.0, smooth.shape)
        Image.fromarray((smooth + stripes + grain).clip(0, 255).astype(np.uint8)).save(path)
    return paths


def alternate(paths: Sequence[EnlargingPath], sources: Sequence[Path], config: SpeedConfig) -> list[list[Run]]:
    """The timed runs of each path: after the warm-up, one of each in turn."""
    runs: list[list[Run]] = [[] for _ in paths]
    target = sources[0].parent / "out"
    for turn in range(config.warmup + config.repeats):
        for path, done in zip(paths, runs, strict=True):
            run = run_path(path, sources, target)
            if turn >= config.warmup:
                done.append(run)
    return runs


def agreement(one: Sequence[Samples], other: Sequence[Samples]) -> float:
    """PSNR in dB over all samples of two lists of 8-bit images, at most :data:`MOST_DECIBELS`."""
    squares = [np.square(a.astype(np.float64) - b).mean() for a, b in zip(one, other, strict=True)]
    error = float(np.mean(squares))
    return MOST_DECIBELS if error == 0.0 else min(MOST_DECIBELS, 10.0 * math.log10(255.0**2 / error))


def _product(upscaler: Upscaler, config: SpeedConfig) -> EnlargingPath:
    if config.batch == 1:
        return ProductPath(upscaler, UpscaleOptions(tile=config.tile))
    kept = upscaler.keeps_freed_memory(config.width * config.height * config.batch)
    return WholePath(upscaler.generator, upscaler.device, upscaler.dtype, torch.channels_last, keep_memory=kept)


def _plain(
    model: str, upscaler: Upscaler, config: SpeedConfig, steps: int | None, announce: Callable[[str], None]
) -> list[EnlargingPath]:
    """The plain path, or nothing where it is not wanted or whole images in float32 would not fit into memory."""
    if not config.baseline:
        return []
    pixels = config.width * config.height * config.batch
    weights = 4 * sum(parameter.numel() for parameter in upscaler.generator.parameters())
    needed = weights + pixels * upscaler.generator.memory_cost(torch.float32).bytes_per_pixel
    free = free_memory(upscaler.device)
    if needed > free:
        announce(f"{model}: no baseline, whole images in float32 need {needed / 1e9:.1f} GB, {free / 1e9:.1f} are free")
        return []
    generator = load_plain(model, upscaler.device, steps)
    return [WholePath(generator, upscaler.device, torch.float32, torch.contiguous_format)]


def _path_speed(path: EnlargingPath, runs: Sequence[Run], config: SpeedConfig) -> PathSpeed:
    macs, tiles = count_stages(path.generator, runs[0].calls), path.stage_tiles(config.height, config.width)
    return PathSpeed(
        dtype=str(path.dtype).removeprefix("torch."),
        memory_format=NAMES[path.memory_format],
        tile=path.tile(config.height, config.width),
        stages=tuple(
            StageSpeed(
                name=name,
                seconds=spread([run.seconds[name] for run in runs]),
                macs=macs.get(name),
                tile=tiles.get(name),
            )
            for name in stage_names(path.generator)
        ),
        network=spread([run.seconds[NETWORK] for run in runs]),
        whole=spread([run.seconds[WHOLE] for run in runs]),
    )


def _memory(
    model: str, source: Path, config: SpeedConfig, steps: int | None, announce: Callable[[str], None]
) -> MemoryUse | None:
    if not config.memory:
        return None
    if not resident_memory():
        announce(f"{model}: no memory, this system does not tell how much a process takes")
        return None
    announce(f"{model}: memory")
    target = source.with_name(f"memory{source.suffix}")
    task = MemoryTask(
        model=model,
        source=str(source),
        target=str(target),
        device=config.device,
        dtype=config.dtype,
        tile=config.tile,
        steps=steps,
        compiled=config.compiled,
    )
    return measure_memory(task)
