"""Speed of a model, stage by stage, from file to file: against the ceiling of the device and a plain baseline.

The product is the upscaler as the ``upscale`` command uses it. The baseline does what published scripts do: eager
float32, contiguous tensors, whole images. Both are run alternately, so that a disturbance of the machine meets both.
Results are plain data, the JSON document that docs/benchmark.md describes; ``speed_report`` makes tables of it.
"""

from __future__ import annotations

import functools
import logging
import math
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from onestepsr.benchmark.counting import Call, Method, count_stages, stages_of, wrapped
from onestepsr.benchmark.probes import measure_ceiling, measure_memory, wait
from onestepsr.core.errors import UserError
from onestepsr.core.machine import free_memory, resident_memory
from onestepsr.imaging.color import TOLERANCES, wavelet
from onestepsr.imaging.read import LoadedImage, read_image, samples_to_tensor, tensor_to_samples
from onestepsr.imaging.write import write_image
from onestepsr.inference.devices import compiler_errors_named
from onestepsr.inference.tiled import LoadedGenerator
from onestepsr.inference.upscaler import UpscaleOptions, Upscaler, enlarge
from onestepsr.models.generators import Generator, pad_to_multiple
from onestepsr.models.loading import load_generator

logger = logging.getLogger(__name__)

Samples = NDArray[Any]
Tile = int | Literal["auto", "off"]
FORMATS = {"jpg": ".jpg", "png": ".png", "webp": ".webp", "tiff": ".tif"}
"""File formats that can be read and written, and their endings."""
WHOLE, READ, UPSCALE, WRITE, NETWORK = "whole", "read", "upscale", "write", "network"
"""Sections that are timed; ``network`` is the whole evaluation of a generator, whose stages are parts of it."""
AROUND = ("forward", "encode_lr", "restore_latent")
"""Methods of generators that call its stages: all of them for one tile, or one where stages have tiles of their own."""
MOST_DECIBELS = 100.0
"""Agreement reported for equal images."""


@dataclass(frozen=True, kw_only=True)
class SpeedConfig:
    """Settings of a measurement."""

    width: int = 128
    height: int = 128
    """Size of the input image."""
    batch: int = 1
    """Images of that size that the network is given at once; from 2 on they are not cut into tiles."""
    device: str = "auto"
    dtype: str = "auto"
    """Dtype of the product; the baseline has float32."""
    tile: Tile = "auto"
    compiled: bool = False
    """Send the product through ``torch.compile``, which happens in the runs before the timed ones."""
    file_format: str = "jpg"
    repeats: int = 5
    """Runs that are timed."""
    warmup: int = 1
    """Runs before them."""
    baseline: bool = True
    """Measure the plain network beside the product."""
    memory: bool = True
    """Measure the memory of one image, in a fresh interpreter."""
    ceiling_seconds: float = 0.5
    """Time for every shape that is tried for the ceiling."""

    def __post_init__(self) -> None:
        for name, least in {"width": 1, "height": 1, "batch": 1, "repeats": 1, "warmup": 0}.items():
            if getattr(self, name) < least:
                raise UserError(f"{name} {getattr(self, name)}: accepted: {least} and more")
        if self.file_format not in FORMATS:
            raise UserError(f"format '{self.file_format}': accepted: {', '.join(FORMATS)}")
        if self.batch > 1 and self.tile not in ("auto", "off"):
            raise UserError(f"tile {self.tile} with batch {self.batch}: only single images are cut into tiles")
        if self.compiled and self.warmup == 0:
            raise UserError("warmup 0 with compile: accepted: 1 and more, because the first run compiles")


def measure_speed(
    model: str, config: SpeedConfig, steps: int | None = None, announce: Callable[[str], None] = logger.info
) -> dict[str, Any]:
    """The speed of ``model`` with ``steps`` evaluations (None: its own number); ``announce`` is told each part.

    Raises :class:`UserError` or :class:`UnknownModel` for a model that cannot be loaded or settings that do not fit it.
    """
    with tempfile.TemporaryDirectory(prefix="onestepsr-speed-") as name:
        sources = write_sources(Path(name), config)
        announce(f"{model}: loading")
        upscaler = Upscaler.from_pretrained(model, config.device, config.dtype, steps=steps, compiled=config.compiled)
        paths: list[EnlargingPath] = [
            ProductPath(upscaler, config.tile)
            if config.batch == 1
            else BatchPath(upscaler.generator, upscaler.device, upscaler.dtype, torch.channels_last)
        ]
        if config.baseline and (plain := _plain(model, upscaler, config, steps, announce)):
            paths.append(plain)
        announce(f"{model}: {config.warmup} + {config.repeats} runs of {len(paths)} paths")
        with compiler_errors_named(model) if config.compiled else nullcontext():
            runs = alternate(paths, sources, config)
        announce(f"{model}: ceiling")
        ceiling = measure_ceiling(upscaler.device, upscaler.dtype, config.ceiling_seconds)
        product, baseline, *_ = *(_path_speed(*each, config) for each in zip(paths, runs, strict=True)), {}
        memory = _memory(model, sources[0], config, steps, announce) if config.memory else None
    rows, columns, _ = runs[0][0].pixels[0].shape
    images, tflops = config.batch / product["whole"]["median"], product["tflops"]
    return {
        "model": model,
        "steps": upscaler.generator.steps,
        "output": [columns, rows],
        "batch": config.batch,
        "images_per_second": images,
        "megapixels_per_second": images * columns * rows / 1e6,
        "tflops": tflops,
        "ceiling_tflops": ceiling,
        "fraction_of_ceiling": tflops and tflops / ceiling["convolution"],
        "fraction_of_matrix_ceiling": tflops and tflops / ceiling["matrix"],
        "speedup_over_baseline": baseline["network"]["median"] / product["network"]["median"] if baseline else None,
        "agreement_db": agreement(runs[0][-1].pixels, runs[1][-1].pixels) if baseline else None,
        "memory_bytes": memory,
        "product": product,
        "baseline": baseline or None,
    }


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


def agreement(one: Sequence[Samples], other: Sequence[Samples]) -> float:
    """PSNR in dB over all samples of two lists of 8-bit images, at most :data:`MOST_DECIBELS`."""
    squares = [np.square(a.astype(np.float64) - b).mean() for a, b in zip(one, other, strict=True)]
    error = float(np.mean(squares))
    return MOST_DECIBELS if error == 0.0 else min(MOST_DECIBELS, 10.0 * math.log10(255.0**2 / error))


# ---- product and baseline ----


class ProductPath:
    """One image after the other through the upscaler, tiles and all."""

    memory_format = torch.channels_last

    def __init__(self, upscaler: Upscaler, tile: Tile) -> None:
        self.upscaler, self.options = upscaler, UpscaleOptions(tile=tile)
        self.generator, self.device = upscaler.generator, upscaler.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the network, which the upscaler changes if it overflows."""
        return self.upscaler.dtype

    def enlarge(self, images: Sequence[LoadedImage]) -> list[Samples]:
        """The enlarged images, (H, W, 3) of their own kind."""
        return [self.upscaler.upscale_image(image, self.options).pixels for image in images]


@dataclass(frozen=True)
class BatchPath:
    """All images at once and whole through the network, then its colour correction."""

    generator: Generator
    device: torch.device
    dtype: torch.dtype
    memory_format: torch.memory_format

    def enlarge(self, images: Sequence[LoadedImage]) -> list[Samples]:
        """The enlarged images; the network draws the noise that the upscaler gives an image of one tile."""
        extra = {} if self.generator.takes_batches else {"rng": torch.Generator().manual_seed(0)}
        scale = self.generator.scale
        loaded = LoadedGenerator(generator=self.generator, device=self.device, dtype=self.dtype, name="whole")
        with torch.inference_mode():
            lr = torch.cat([samples_to_tensor(image.pixels) for image in images]).to(self.device)
            # padded before everything, as in the upscaler, so that the colour fix sees the same borders
            lr = pad_to_multiple(lr, self.generator.lr_multiple)
            rgb = lr.to(loaded.input_dtype).contiguous(memory_format=self.memory_format)
            sr = self.generator(rgb, **extra)
            fixed = sr.float().clamp(0.0, 1.0)
            if self.generator.color_fix in TOLERANCES:
                fixed = wavelet(fixed, enlarge(lr, scale), TOLERANCES[self.generator.color_fix])
        height, width = images[0].height * scale, images[0].width * scale
        return [tensor_to_samples(values[:, :height, :width], np.uint8) for values in fixed]


EnlargingPath = ProductPath | BatchPath
"""A way of enlarging images of equal size."""


def load_plain(model: str, device: torch.device, steps: int | None = None) -> Generator:
    """The generator in float32 and PyTorch's usual memory format, with the layers that were trained. What depends on
    the prompt alone is computed beforehand here too."""
    generator = load_generator(model, device=device, dtype=torch.float32, steps=steps, faster=False)
    return generator.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload,no-any-return]


def _plain(
    model: str, upscaler: Upscaler, config: SpeedConfig, steps: int | None, announce: Callable[[str], None]
) -> BatchPath | None:
    """The baseline, or None where whole images in float32 would not fit into memory."""
    weights = 4 * sum(parameter.numel() for parameter in upscaler.generator.parameters())
    pixels = config.width * config.height * config.batch
    needed = weights + pixels * upscaler.generator.memory_cost(torch.float32).bytes_per_pixel
    free = free_memory(upscaler.device)
    if needed > free:
        announce(f"{model}: no baseline, whole images in float32 need {needed / 1e9:.1f} GB, {free / 1e9:.1f} are free")
        return None
    generator = load_plain(model, upscaler.device, steps)
    return BatchPath(generator, upscaler.device, torch.float32, torch.contiguous_format)


# ---- runs ----


class Run(NamedTuple):
    """One batch from files to files."""

    seconds: dict[str, float]
    """Time by stage, and of ``network`` and ``whole``, of which the stages are parts."""
    calls: tuple[Call, ...]
    pixels: list[Samples]


def alternate(paths: Sequence[EnlargingPath], sources: Sequence[Path], config: SpeedConfig) -> list[list[Run]]:
    """The timed runs of each path: after the warm-up, one of each in turn."""
    runs: list[list[Run]] = [[] for _ in paths]
    for turn in range(config.warmup + config.repeats):
        for path, done in zip(paths, runs, strict=True):
            run = run_path(path, sources, sources[0].parent / "out")
            if turn >= config.warmup:
                done.append(run)
    return runs


def run_path(path: EnlargingPath, sources: Sequence[Path], folder: Path) -> Run:
    """Enlarge the files ``sources`` into ``folder``.

    ``enlarge`` is the work of the generator besides its stages; ``colour`` is that of the path besides the generator:
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
    seconds = watch.read()
    stages = sum(seconds.get(stage, 0.0) for stage in stages_of(path.generator).values())
    seconds["enlarge"] = max(0.0, seconds.get(NETWORK, 0.0) - stages)
    seconds["colour"] = max(0.0, seconds[UPSCALE] - seconds.get(NETWORK, 0.0))
    return Run(seconds=seconds, calls=tuple(watch.calls), pixels=pixels)


# ---- stopwatch ----


class Stopwatch:
    """Seconds by stage. On CUDA the device's own clock is read, so that nothing waits that would not wait otherwise."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.calls: list[Call] = []
        """Calls of the generator that was watched."""
        self._spans: list[tuple[str, Any, Any]] = []
        self._inside = False

    @contextmanager
    def section(self, name: str, *, on_device: bool = False) -> Iterator[None]:
        """Time the block as ``name``; with ``on_device`` the work that it gives the device, not the time that giving
        it takes. Any other section ends when the device has done its work."""
        begin = self._mark(on_device)
        yield
        if not on_device:
            wait(self.device)
        self._spans.append((name, begin, self._mark(on_device)))

    @contextmanager
    def watching(self, generator: nn.Module) -> Iterator[None]:
        """Time every evaluation of ``generator`` and its stages."""
        stages = stages_of(generator)

        def timed(name: str, method: Method) -> Method:
            def call(*args: Any, **kwargs: Any) -> Any:
                stage = self.section(stages[name], on_device=True) if name in stages else nullcontext()
                with self._outermost(name, args), stage:
                    return method(*args, **kwargs)

            return call

        names = {*stages, *(AROUND if stages else AROUND[:1])}
        with wrapped(generator, {name: functools.partial(timed, name) for name in names}):
            yield

    def read(self) -> dict[str, float]:
        """Seconds by stage since the last reading."""
        wait(self.device)
        seconds: Counter[str] = Counter()
        for name, begin, end in self._spans:
            seconds[name] += end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1e3
        self._spans.clear()
        return dict(seconds)

    @contextmanager
    def _outermost(self, name: str, args: Sequence[Tensor]) -> Iterator[None]:
        """Count a method as the network unless another method that is timed has called it."""
        if self._inside:
            yield
            return
        self.calls.append((name, tuple(tuple(values.shape) for values in args)))
        self._inside = True
        try:
            with self.section(NETWORK, on_device=True):
                yield
        finally:
            self._inside = False

    def _mark(self, on_device: bool) -> Any:
        if not on_device or self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event


# ---- figures ----


def _path_speed(path: EnlargingPath, runs: Sequence[Run], config: SpeedConfig) -> dict[str, Any]:
    names, macs = stages_of(path.generator).values(), count_stages(path.generator, runs[0].calls)
    plan = path.upscaler.last_plan if isinstance(path, ProductPath) else None
    planned = [each.tile for each in plan.stages.values()] if plan and plan.stages else []
    tiles = dict(zip(names, planned, strict=False))

    def within(tile: tuple[int, int]) -> list[int]:
        return [min(tile[0], config.height), min(tile[1], config.width)]

    stages = []
    for name in (READ, "enlarge", *names, "colour", WRITE):
        seconds = spread([run.seconds[name] for run in runs])
        work = {"macs": macs.get(name), "tflops": throughput(macs.get(name), seconds["median"])}
        stages.append({"name": name, **seconds, **work, **({"tile": within(tiles[name])} if name in tiles else {})})
    total, counted = sum(macs.values()), sum(stage["median"] for stage in stages if stage["macs"])
    return {
        "dtype": str(path.dtype).removeprefix("torch."),
        "memory_format": "channels_last" if path.memory_format == torch.channels_last else "contiguous",
        "tile": within(plan.tile if plan else (config.height, config.width)),
        "network": spread([run.seconds[NETWORK] for run in runs]),
        "whole": spread([run.seconds[WHOLE] for run in runs]),
        "macs": total,
        "tflops": throughput(total, counted),
        "stages": stages,
    }


def spread(seconds: Sequence[float]) -> dict[str, Any]:
    """Median, quartiles and the shortest of at least one run."""
    values = list(seconds)
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": median, "lower": lower, "upper": upper, "best": min(values), "runs": len(values)}


def throughput(macs: int | None, seconds: float) -> float | None:
    """Operations, two per MAC, per second, in units of 10^12; None where nothing is counted."""
    return 2 * macs / seconds / 1e12 if macs else None


def _memory(
    model: str, source: Path, config: SpeedConfig, steps: int | None, announce: Callable[[str], None]
) -> dict[str, int | None] | None:
    if not resident_memory():
        announce(f"{model}: no memory, this system does not tell the size of a process")
        return None
    announce(f"{model}: memory")
    options = {name: getattr(config, name) for name in ("device", "dtype", "tile", "compiled")}
    return measure_memory(model, str(source), str(source.with_name(f"memory{source.suffix}")), steps=steps, **options)
