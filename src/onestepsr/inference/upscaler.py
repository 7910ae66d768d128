"""The public upscaler: any image in, an enlarged image of exactly the wanted size out.

The network enlarges by a fixed factor (4). Other factors are reached from its output: shrunk with an antialiased
Lanczos filter below 4, enlarged bicubically above, so the network always works at the scale it was trained for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from onestepsr.core.errors import UserError
from onestepsr.imaging.color import Statistics, match_statistics, statistics
from onestepsr.imaging.icc import color_profile
from onestepsr.imaging.read import (
    LoadedImage,
    from_array,
    from_pil,
    read_image,
    samples_to_tensor,
    tensor_to_samples,
    to_pil,
)
from onestepsr.imaging.resize import fill_transparent, resize
from onestepsr.imaging.write import check_size, check_writable, format_of, write_image
from onestepsr.inference.devices import (
    DTYPES,
    HELD,
    compile_networks,
    compiler_errors_named,
    is_out_of_memory,
    oom_as_user_error,
    require_compiler,
    resolve_device,
    resolve_dtype,
    separate_mmaps,
)
from onestepsr.inference.engines import ENGINES, Engine, in_engine, in_measured_engine, measured_engine
from onestepsr.inference.memory_plan import InputSize, Plan, Workload, bytes_per_pixel, fewer_pixels, plan_image
from onestepsr.inference.options import Alpha, ColorFix, UpscaleOptions, target_size
from onestepsr.inference.tiled import LoadedGenerator, NonFiniteError, SharedNorms, TiledRun, enlarge
from onestepsr.inference.tiling import TileBlend
from onestepsr.models.generators import Generator, LatentGenerator

__all__ = [
    "ColorFix",
    "Plan",
    "UpscaleOptions",
    "Upscaler",
    "enlarge",
    "resolve_device",
    "resolve_dtype",
    "target_size",
]

logger = logging.getLogger(__name__)

LARGE_WORK = HELD
"""Peak bytes of a tile on a CPU from which on freed memory is kept while the image is enlarged; smaller work lives on
memory that the C library keeps by itself, and would only pay for handing it back."""
IMAGES_AT_ONCE = 16
"""Small images of one size that go through a network on a GPU together, if the memory allows; not measured."""
BAND_ROWS = 256
"""Output rows that are rounded at once."""
Progress = Callable[[int, int], None]


class Upscaler:
    """A generator ready to enlarge images."""

    def __init__(
        self,
        generator: Generator,
        device: str = "auto",
        dtype: str = "auto",
        name: str = "generator",
        *,
        compiled: bool = False,
        engine: Engine = "torch",
    ) -> None:
        """``generator`` is any :class:`onestepsr.models.generators.Generator`; it is moved to the device and dtype, not
        copied. ``compiled``: through ``torch.compile``, for large images or many of one size. ``engine``: what the
        generator runs in, for reports."""
        if not isinstance(generator, Generator):
            raise TypeError(f"a {type(generator).__name__} is no onestepsr.models.generators.Generator")
        self.device = resolve_device(device)
        self.dtype = resolve_dtype(dtype, self.device)
        self.name, self.engine = name, engine
        self.scale = generator.scale
        self._chooses_dtype = dtype == "auto"
        self._most_pixels: int | None = None  # at once, since memory ran out with more
        self.last_plan: Plan | None = None
        """The plan with which the last image succeeded."""
        self.prompt_width = generator.prompt_width or None
        """Channels of the prompt embeddings that the generator reads; None if it reads no text."""
        self.image_tokens, self.added_prompt = generator.image_tokens, generator.added_prompt
        self.generator = generator.eval().requires_grad_(False)
        self._convert(self.dtype)
        self._norms = SharedNorms(generator.autoencoder) if isinstance(generator, LatentGenerator) else None
        self.compiled = compiled
        if compiled:
            require_compiler(self.device)
            compile_networks(self.generator)

    @property
    def draws_noise(self) -> bool:
        """True if the result depends on a seed."""
        return isinstance(self.generator, LatentGenerator) and self.generator.noise_stage is not None

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path = "d3sr-tiny",
        device: str = "auto",
        dtype: str = "auto",
        *,
        steps: int | None = None,
        sampler: str | None = None,
        fidelity: float | None = None,
        compiled: bool = False,
        engine: Engine = "torch",
    ) -> Upscaler:
        """Load a model by alias or from a file; raises UnknownModel or UserError in one line.

        A model of the ResShift family can run another number of ``steps`` than it was made for, or another ``sampler``
        ("ancestral" or "deterministic"). ``fidelity`` moves ``d3sr-tiny`` from crisp (0, as it is) towards faithful
        (1), along the line between the weights of the two. ``compiled``: through ``torch.compile``. ``engine``:
        onnxruntime or openvino run small networks on the CPU in float32; "auto" is the one that ``onestepsr doctor``
        has measured to be the fastest here with the same image, or PyTorch. The default is PyTorch, whose bytes do not
        depend on what was measured.
        """
        from onestepsr.models.loading import load_generator

        if engine not in ENGINES:
            raise UserError(f"engine '{engine}': accepted: {', '.join(ENGINES)}")
        name = str(name_or_path)
        load = partial(load_generator, name_or_path, steps=steps, sampler=sampler, fidelity=fidelity)
        if engine == "auto":
            usual = dtype == "auto" and not compiled and (steps, sampler, fidelity) == (None, None, None)
            choice = measured_engine(name) if usual and resolve_device(device).type == "cpu" else None
            if choice is not None:
                measured = in_measured_engine(load(faster=False), choice)
                if measured is not None:
                    return cls(measured, "cpu", "float32", name, engine=choice[0])
        elif engine != "torch":
            if compiled or dtype not in ("auto", "float32") or device not in ("auto", "cpu"):
                raise UserError(f"engine {engine}: runs on the CPU in float32 and is not compiled")
            return cls(in_engine(load(faster=False), engine, name), "cpu", "float32", name, engine=engine)
        target = resolve_device(device)
        weights_dtype = resolve_dtype(dtype, target)
        full = (
            f"{name_or_path}: not enough memory on {target} for its weights in "
            f"{str(weights_dtype).removeprefix('torch.')}; free some, or choose another --device or --dtype"
        )
        with oom_as_user_error(full), separate_mmaps():
            generator = load(device=target, dtype=weights_dtype)
            return cls(generator, str(target), dtype, name, compiled=compiled)

    def __call__(
        self,
        source: str | Path | bytes | BinaryIO | Image.Image | NDArray[Any],
        scale: float = 4.0,
        *,
        width: int | None = None,
        height: int | None = None,
        tile: int | Literal["auto", "off"] = "auto",
        tile_blend: TileBlend = "smooth",
        memory: float | None = None,
        color_fix: ColorFix = "auto",
        alpha: Alpha = "bicubic",
        seed: int | None = None,
        prompt_embedding: Tensor | None = None,
    ) -> Image.Image:
        """Enlarge a file (its path, its bytes or an open one), a Pillow image or (H, W[, C]) uint8/uint16 samples.

        Options are those of :class:`UpscaleOptions`. The result is a Pillow image; its profile, EXIF, XMP and
        resolution are those of the input, and its ``save`` writes them. Pillow has no 16-bit colour, so that such input
        comes back with 8 bits: :meth:`upscale_file` and :meth:`upscale_image` keep it.
        """
        options = UpscaleOptions(
            scale=scale,
            width=width,
            height=height,
            tile=tile,
            tile_blend=tile_blend,
            memory=memory,
            color_fix=color_fix,
            alpha=alpha,
            seed=seed,
            prompt_embedding=prompt_embedding,
        )
        return to_pil(self.upscale_image(_loaded(source), options))

    def upscale_file(
        self, source: str | Path | bytes | BinaryIO, target: str | Path, options: UpscaleOptions | None = None
    ) -> Path:
        """Enlarge one file into another as the command does: bit depth, profile and metadata kept, written in one step.

        The ending of ``target`` says the format. Returns its path.
        """
        path = Path(target).expanduser()
        file_format = format_of(path)
        check_writable(path)
        image, options = _loaded(source), options or UpscaleOptions()
        check_size(file_format, *target_size(image.width, image.height, options), str(path))
        write_image(self.upscale_image(image, options), path)
        return path

    def upscale_image(
        self, image: LoadedImage, options: UpscaleOptions | None = None, progress: Progress | None = None
    ) -> LoadedImage:
        """Enlarge ``image``, all its metadata kept; ``progress(done, total)`` is called after every tile.

        When memory runs out the image is begun again with half the tile side, and later ones start with that;
        :class:`UserError` when not even the smallest tiles fit. :attr:`last_plan` tells what was used.

        Gray stays gray and bit depth stays. Alpha is resampled on its own, since a network trained on photographs may
        draw texture into it, unless the options leave it to the network, as a gray image. Wide-gamut RGB goes through
        the network as sRGB and returns to its own space before the colour fix, which takes low frequencies from the
        unclipped input.
        """
        options = self.resolved(options)
        width, height = target_size(image.width, image.height, options)
        if options.prompt_embedding is not None:
            self.require_prompt_width(options.prompt_embedding.shape[-1])
        samples = self._enlarge_finite(image, options, progress)
        alpha = image.alpha
        if alpha is not None:
            mask, plan = alpha[..., None], self.last_plan
            if options.alpha == "network":
                mask = self._enlarge_finite(LoadedImage(pixels=mask), options, progress)
                self.last_plan = plan  # that of the colours
            alpha = resize(mask, height, width)[..., 0]
        return replace(image, pixels=resize(samples, height, width), alpha=alpha)

    def upscale_images(self, images: Sequence[LoadedImage], options: UpscaleOptions | None = None) -> list[LoadedImage]:
        """Enlarge images that are alike (:func:`kind_of`), each as :meth:`upscale_image` does.

        Where the network takes batches and an opaque image is one tile, as many as the memory allows go through it
        together. Kernels may add up in another order then: see ``docs/batch.md`` for what differs. If that fails, one
        goes after the other.
        """
        options, first = self.resolved(options), images[0]
        if len(images) > 1 and first.alpha is None and options.color_fix != "adain":
            plan = self._plan(_size_of(first), options, len(images))
            if plan.batch > 1 and plan.tiles == 1 and plan.stages is None:
                try:
                    return self._enlarge_together(images, options, plan)
                except (MemoryError, RuntimeError, NonFiniteError) as error:
                    logger.info("%s: %d images one by one (%s)", self.name, len(images), error)
        return [self.upscale_image(image, options) for image in images]

    def resolved(self, options: UpscaleOptions | None) -> UpscaleOptions:
        """``options``, or the default ones, with the model's colour correction where they leave it open."""
        options = options or UpscaleOptions()
        return replace(options, color_fix=self.generator.color_fix) if options.color_fix == "auto" else options

    def images_at_once(self, options: UpscaleOptions) -> int:
        """Images that are worth giving to :meth:`upscale_images` together: 1 on a CPU unless ``tile_batch`` says so."""
        if not self.generator.takes_batches:
            return 1
        wanted = options.tile_batch
        return wanted if wanted != "auto" else IMAGES_AT_ONCE if self.device.type == "cuda" else 1

    def require_prompt_width(self, width: int) -> None:
        """Raise :class:`UserError` unless the generator reads prompt embeddings of ``width`` channels."""
        if self.prompt_width is None:
            raise UserError(f"{self.name}: reads no text, so it takes no prompt; models of the OSEDiff kind do")
        if self.prompt_width != width:
            raise UserError(
                f"{self.name}: reads prompts of {self.prompt_width} channels, the text encoder gives {width}"
            )

    def _convert(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.generator.to(device=self.device, dtype=dtype)
        self.generator.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    # ---- planning ----

    def plan(
        self, height: int, width: int, options: UpscaleOptions, *, pixel_bytes: int = 3, alpha_bytes: int = 0
    ) -> Plan:
        """The plan for an image of this size, by the memory that is free now.

        Where the dtype was left to choose, and float32 does not fit on a CPU, the plan is one for bfloat16.
        """
        return self._plan(
            InputSize(height=height, width=width, pixel_bytes=pixel_bytes, alpha_bytes=alpha_bytes), options
        )

    def keeps_freed_memory(self, area: int) -> bool:
        """True if ``area`` input pixels at once are worth :func:`onestepsr.inference.devices.no_malloc_trim`."""
        return self.device.type == "cpu" and area * bytes_per_pixel(self.generator, self.dtype) > LARGE_WORK

    def _plan(self, size: InputSize, options: UpscaleOptions, count: int = 1) -> Plan:
        load = Workload(
            generator=self.generator,
            name=self.name,
            dtype=self.dtype,
            size=size,
            options=options,
            device=self.device,
            count=count,
        )
        try:
            return plan_image(load, self._most_pixels)
        except UserError:
            if not self._chooses_dtype or self.device.type != "cpu" or self.dtype != torch.float32:
                raise
            return plan_image(replace(load, dtype=torch.bfloat16), self._most_pixels)

    def _plans(self, size: InputSize, options: UpscaleOptions) -> Iterator[Plan]:
        """Plans with ever fewer pixels at once, each asked for when memory has run out with the one before. Later
        images start with the last."""
        plan = self._plan(size, options)
        yield plan
        while (most := fewer_pixels(plan, options)) is not None:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            first, self._most_pixels = self._most_pixels is None, most
            failed, plan = plan, self._plan(size, options)
            if plan.pixels >= failed.pixels:
                return
            if first:
                logger.warning("%s: memory ran out with %s; using less at once from here on", self.name, failed)
            plan = replace(plan, retries=failed.retries + 1)
            yield plan

    # ---- one image ----

    def _enlarge_finite(self, image: LoadedImage, options: UpscaleOptions, progress: Progress | None) -> NDArray[Any]:
        """:meth:`_enlarge_within_memory`, in float32 from now on if the dtype that was chosen overflows."""
        try:
            return self._enlarge_within_memory(image, options, progress)
        except NonFiniteError:
            if not self._chooses_dtype or self.dtype == torch.float32:
                raise
            logger.warning("%s overflows in %s: repeating in float32", self.name, self.dtype)
            self._chooses_dtype = False
            self._convert(torch.float32)
            return self._enlarge_within_memory(image, options, progress)

    def _enlarge_within_memory(
        self, image: LoadedImage, options: UpscaleOptions, progress: Progress | None
    ) -> NDArray[Any]:
        """:meth:`_enlarge` with the first plan, of smaller and smaller ones, for which the memory suffices."""
        for plan in self._plans(_size_of(image), options):
            logger.info("%s: %s", self.name, plan)
            if DTYPES[plan.dtype] != self.dtype:
                logger.warning("%s in %s does not fit: %s from here on", self.name, self.dtype, plan.dtype)
                self._convert(DTYPES[plan.dtype])
            try:
                samples = self._enlarge(image, options, plan, progress)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
            else:
                self.last_plan = plan
                return samples
        raise UserError(
            f"{self.name}: memory ran out on {self.device} even in tiles of {plan.tile_name} pixels in "
            f"{plan.dtype}; free some, or try --dtype bfloat16 or --tile 64"
        )

    def _enlarge(
        self, image: LoadedImage, options: UpscaleOptions, plan: Plan, progress: Progress | None
    ) -> NDArray[Any]:
        """The network's output at its own scale, colour-fixed, as samples of the image's kind."""
        pixels = image.pixels if image.alpha is None else fill_transparent(image.pixels, image.alpha)
        shape = (image.height * self.scale, image.width * self.scale, pixels.shape[2])
        run = self._run(image, pixels, options, plan, progress)
        errors = compiler_errors_named(self.name) if self.compiled else nullcontext()
        with errors, torch.inference_mode():
            if options.color_fix != "adain":
                return _stored(_cropped(run.rows(), *shape[:2]), shape, pixels.dtype.type)
            # AdaIN needs statistics of the whole output: it is kept with 16 bits until they are known.
            fine = _stored(_cropped(run.rows(), *shape[:2]), shape, np.uint16)
            wanted = statistics(_cropped(run.enlarged_rows(), *shape[:2]))
            return _stored(_matched(fine, statistics(_bands(fine)), wanted), shape, pixels.dtype.type)

    def _enlarge_together(
        self, images: Sequence[LoadedImage], options: UpscaleOptions, plan: Plan
    ) -> list[LoadedImage]:
        """Opaque images of one kind, enlarged with a plan for all of them."""
        first, kind = images[0], images[0].pixels.dtype.type
        width, height = target_size(first.width, first.height, options)
        shape = (first.height * self.scale, first.width * self.scale, first.pixels.shape[2])
        run = self._run(first, first.pixels, options, plan, None)
        with torch.inference_mode():
            stored = [
                resize(_stored(_cropped(rows, *shape[:2]), shape, kind), height, width)
                for rows in run.rows_of_each(image.pixels for image in images)
            ]
        self.last_plan = plan
        return [replace(image, pixels=pixels) for image, pixels in zip(images, stored, strict=True)]

    def _run(
        self,
        image: LoadedImage,
        pixels: NDArray[Any],
        options: UpscaleOptions,
        plan: Plan,
        progress: Progress | None,
    ) -> TiledRun:
        shares_norms = options.tile_norms == "image" and options.tile_blend == "smooth" and not self.compiled
        return TiledRun(
            LoadedGenerator(generator=self.generator, device=self.device, dtype=self.dtype, name=self.name),
            pixels,
            plan,
            options,
            profile=None if image.gray else color_profile(image.icc),
            norms=self._norms if shares_norms else None,
            progress=progress,
            fill=self.compiled,
            keep_memory=self.keeps_freed_memory(plan.pixels),
        )


def kind_of(image: LoadedImage) -> tuple[object, ...]:
    """Properties that images must share for :meth:`Upscaler.upscale_images`: size, channels, depth, alpha, profile."""
    return image.pixels.shape, image.pixels.dtype, image.alpha is None, image.icc


def _loaded(source: object) -> LoadedImage:
    if isinstance(source, np.ndarray):
        return from_array(source)
    if isinstance(source, Image.Image):
        return from_pil(source)
    if isinstance(source, (str, Path)):
        return read_image(Path(source).expanduser())
    if isinstance(source, bytes) or hasattr(source, "read"):
        return read_image(cast("bytes | BinaryIO", source))
    raise UserError(
        f"{type(source).__name__}: not an image; accepted: a path, bytes, a binary file, a Pillow image, an array"
    )


def _size_of(image: LoadedImage) -> InputSize:
    item = image.pixels.itemsize
    return InputSize(
        height=image.height,
        width=image.width,
        pixel_bytes=image.pixels.shape[2] * item,
        alpha_bytes=0 if image.alpha is None else item,
    )


def _cropped(bands: Iterator[Tensor], height: int, width: int) -> Iterator[Tensor]:
    """The first ``height`` rows and ``width`` columns of consecutive bands (1, C, rows, columns)."""
    left = height
    for band in bands:
        yield band[:, :, :left, :width]
        left -= band.shape[2]
        del band  # before the next one is made


def _stored(bands: Iterable[Tensor], shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    """Round bands of rows (1, C, h, W) one after the other into one array (H, W, C)."""
    result, top = np.empty(shape, dtype), 0
    for band in bands:
        for rows in torch.split(band, BAND_ROWS, dim=2):
            result[top : top + rows.shape[2]] = tensor_to_samples(rows, dtype)
            top += rows.shape[2]
        del band, rows  # before the next one is made
    return result


def _bands(samples: NDArray[Any], rows: int = BAND_ROWS) -> Iterator[Tensor]:
    return (samples_to_tensor(samples[top : top + rows]) for top in range(0, samples.shape[0], rows))


def _matched(samples: NDArray[Any], own: Statistics, wanted: Statistics) -> Iterator[Tensor]:
    return (match_statistics(band, own, wanted) for band in _bands(samples))
