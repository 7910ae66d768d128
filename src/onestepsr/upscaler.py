"""The public upscaler: any picture in, an enlarged picture of exactly the wanted size out.

The network enlarges by a fixed factor (4). Other factors are reached from its output: shrunk with an antialiased
Lanczos filter below 4, enlarged bicubically above, so the network always works at the scale it was trained for.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from onestepsr.allocator import freed_memory_kept
from onestepsr.color import Statistics, gray, match_statistics, statistics, wavelet
from onestepsr.errors import OneStepSRError, UserError
from onestepsr.image import Picture, from_array, from_pil, read_picture, samples_to_tensor, tensor_to_samples, to_pil
from onestepsr.image_profile import MatrixProfile, matrix_profile
from onestepsr.image_resample import fill_transparent, resize
from onestepsr.machine import instructions, recall_speeds
from onestepsr.tiling import PUBLISHED_OVERLAPS, TileBlend, choose_tile, join_of, places
from onestepsr.upscale_options import ColorFix, UpscaleOptions, target_size

__all__ = ["ColorFix", "UpscaleOptions", "Upscaler", "enlarge", "resolve_device", "resolve_dtype", "target_size"]

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BFLOAT16_GAIN = 1.2
"""How many times as fast as float32 bfloat16 must be on a CPU to be worth its fewer digits."""
LARGE_WORK = 400_000_000
"""Peak bytes of a tile on a CPU from which on freed memory is kept while the picture is enlarged; smaller work lives on
what the C library keeps by itself, and would only pay for handing it back."""
DEFAULT_MEMORY_PER_PIXEL = 6000.0
"""Peak bytes per input pixel assumed of a generator that does not tell, at 4 bytes per number."""


def resolve_device(name: str) -> torch.device:
    """The device called ``name``; "auto" is the first CUDA GPU, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device '{name}': not available here; accepted: auto, cpu, cuda, cuda:N, mps") from error
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The number format called ``name``.

    "auto" is float16 on a CUDA GPU (its 11 bits matter more to a picture than bfloat16's range; should it overflow, the
    picture is repeated in float32), bfloat16 on a CPU where it is faster, else float32.
    """
    if name == "auto":
        if device.type == "cuda":
            return torch.float16
        return torch.bfloat16 if device.type == "cpu" and _bfloat16_pays() else torch.float32
    if name not in DTYPES:
        raise UserError(f"dtype '{name}': accepted: auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def _bfloat16_pays() -> bool:
    """As ``doctor`` measured it on this processor; where it did not, if there are instructions for it."""
    from onestepsr.models.sources import cache_folder

    speeds = recall_speeds(cache_folder())
    if {"bfloat16", "float32"} <= speeds.keys():
        return speeds["bfloat16"] > BFLOAT16_GAIN * speeds["float32"]
    return not {"amx_bf16", "avx512_bf16"}.isdisjoint(instructions())


class Upscaler:
    """A generator ready to enlarge pictures. It is moved to the device and number format, not copied.

    The generator is a module in eval mode with an int attribute ``scale`` that maps float RGB (N, 3, h, w) in [0, 1] of
    any size to (N, 3, h * scale, w * scale) in about [0, 1]. It may have ``memory_per_pixel(dtype)``, peak bytes per
    input pixel, ``lr_multiple``, at multiples of which tiles start, and ``largest_tile``, the side that "auto" stays
    below; it may take a keyword ``rng``, a ``torch.Generator`` for the noise it draws, and ``origin``, the row and
    column of a tile in the picture, by which the noise of a place is the same in every tile; one that reads text takes
    ``prompt_embedding`` (1, L, C) and has C as ``prompt_width``.
    """

    def __init__(
        self, generator: nn.Module, device: str = "auto", dtype: str = "auto", name: str = "generator"
    ) -> None:
        self.device = resolve_device(device)
        self.dtype = resolve_dtype(dtype, self.device)
        self.name = name
        self.scale = int(cast(int, generator.scale))
        self._may_fall_back = dtype == "auto"
        taken = inspect.signature(generator.forward).parameters
        self._takes_rng, self._takes_origin = "rng" in taken, "origin" in taken
        self.prompt_width = int(cast(int, generator.prompt_width)) if "prompt_embedding" in taken else None
        """Channels of the prompt embeddings that the generator reads; None if it reads no text."""
        self.generator = generator.eval().requires_grad_(False)
        self._move(self.dtype)

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
    ) -> Upscaler:
        """Load a model by alias or from a file; raises UnknownModel or UserError in one line.

        A model of the ResShift family can run another number of ``steps`` than it was made for, or another ``sampler``
        ("ancestral" or "deterministic"). ``fidelity`` moves ``d3sr-tiny`` from crisp (0, as it is) towards faithful
        (1), along the line between the weights of the two.
        """
        from onestepsr.models.registry import load_generator

        target = resolve_device(device)
        number_format = resolve_dtype(dtype, target)
        generator = load_generator(
            name_or_path, device=target, dtype=number_format, steps=steps, sampler=sampler, fidelity=fidelity
        )
        return cls(generator, device, dtype, str(name_or_path))

    def __call__(
        self,
        source: str | Path | Image.Image | NDArray[Any],
        scale: float = 4.0,
        *,
        width: int | None = None,
        height: int | None = None,
        tile: int | Literal["auto", "off"] = "auto",
        tile_blend: TileBlend = "smooth",
        color_fix: ColorFix = "wavelet",
        seed: int | None = None,
        prompt_embedding: Tensor | None = None,
    ) -> Image.Image:
        """Enlarge a file, a Pillow image or (H, W[, C]) uint8/uint16 samples; see :class:`UpscaleOptions`.

        The result is a Pillow image with the input's profile and EXIF in ``info``. Pillow has no 16-bit colour, so that
        such input comes back with 8 bits: :meth:`upscale_picture` keeps it.
        """
        options = UpscaleOptions(
            scale=scale,
            width=width,
            height=height,
            tile=tile,
            tile_blend=tile_blend,
            color_fix=color_fix,
            seed=seed,
            prompt_embedding=prompt_embedding,
        )
        if isinstance(source, np.ndarray):
            picture = from_array(source)
        elif isinstance(source, Image.Image):
            picture = from_pil(source)
        else:
            picture = read_picture(Path(source))
        return to_pil(self.upscale_picture(picture, options))

    def upscale_picture(
        self,
        picture: Picture,
        options: UpscaleOptions | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Picture:
        """Enlarge ``picture``, all its metadata kept; ``progress(done, total)`` is called after every tile.

        Grey stays grey and bit depth stays. Alpha is resampled on its own: a network trained on photographs would draw
        texture into it. Wide-gamut RGB goes through the network as sRGB and returns to its own space before the colour
        fix, which takes low frequencies from the unclipped input.
        """
        options = options or UpscaleOptions()
        width, height = target_size(picture.width, picture.height, options)
        if options.prompt_embedding is not None:
            self.require_prompt_width(options.prompt_embedding.shape[-1])
        try:
            samples = self._enlarge(picture, options, progress)
        except _NonFiniteError:
            if not self._may_fall_back or self.dtype == torch.float32:
                raise
            logger.warning("%s overflows in %s: repeating in float32", self.name, self.dtype)
            self.dtype = torch.float32
            self._move(self.dtype)
            samples = self._enlarge(picture, options, progress)
        alpha = picture.alpha
        if alpha is not None:
            alpha = resize(alpha[..., None], height, width)[..., 0]
        return replace(picture, pixels=resize(samples, height, width), alpha=alpha)

    def require_prompt_width(self, width: int) -> None:
        """Raise :class:`UserError` unless the generator reads prompt embeddings of ``width`` channels."""
        if self.prompt_width is None:
            raise UserError(f"{self.name}: reads no text, so it takes no prompt; models of the OSEDiff kind do")
        if self.prompt_width != width:
            raise UserError(
                f"{self.name}: reads prompts of {self.prompt_width} channels, the text encoder gives {width}"
            )

    def plan_tile(self, height: int, width: int, options: UpscaleOptions) -> int:
        """Tile side in input pixels for a picture of this size."""
        if options.tile == "off":
            return max(height, width)
        if options.tile != "auto":
            return options.tile
        side = choose_tile(self.memory_per_pixel(), self.device, options.overlap)
        side = min(side, int(getattr(self.generator, "largest_tile", side)))
        if height * width <= side * side:
            return max(height, width)
        published = [known for known in PUBLISHED_OVERLAPS if known <= side]
        return max(published) if published and options.tile_blend == "average" else side

    def memory_per_pixel(self) -> float:
        """Peak bytes that the generator needs per input pixel, plus 200 for the colour fix and the joining of tiles."""
        tell = getattr(self.generator, "memory_per_pixel", None)
        own = float(tell(self.dtype)) if callable(tell) else DEFAULT_MEMORY_PER_PIXEL * self.dtype.itemsize / 4
        return own + 200 * self.scale**2 / 16

    def keeps_freed_memory(self, area: int) -> bool:
        """Whether tiles of ``area`` input pixels are worth :func:`onestepsr.allocator.freed_memory_kept`."""
        return self.device.type == "cpu" and area * self.memory_per_pixel() > LARGE_WORK

    def _move(self, dtype: torch.dtype) -> None:
        self.generator = cast(Any, self.generator).to(
            device=self.device, dtype=dtype, memory_format=torch.channels_last
        )

    def _enlarge(
        self, picture: Picture, options: UpscaleOptions, progress: Callable[[int, int], None] | None
    ) -> NDArray[Any]:
        """The network's output at its own scale, colour-fixed, as samples of the picture's kind."""
        pixels = picture.pixels if picture.alpha is None else fill_transparent(picture.pixels, picture.alpha)
        shape = (picture.height * self.scale, picture.width * self.scale, pixels.shape[2])
        tile = self.plan_tile(picture.height, picture.width, options)
        join = join_of(tile, options.overlap, int(getattr(self.generator, "lr_multiple", 1)), options.tile_blend)
        source = _padded(pixels, join.multiple)
        step = _TileStep(self, None if picture.gray else matrix_profile(picture.icc), options, progress)
        step.places = places(source.shape[2], source.shape[3], join.tile, join.overlap)

        def rows(fn: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
            return _cropped(join.rows(fn, source, self.scale), shape[0], shape[1])

        area = math.prod(min(join.tile, side) for side in source.shape[2:])
        with freed_memory_kept(self.keeps_freed_memory(area)), torch.inference_mode():
            if options.color_fix != "adain":
                return _stored(rows(step), shape, pixels.dtype.type)
            # AdaIN needs statistics of the whole output: it is kept with 16 bits until they are known.
            fine = _stored(rows(step), shape, np.uint16)
            wanted = statistics(rows(lambda t: enlarge(_to_float(t), self.scale)))
            return _stored(_matched(fine, statistics(_bands(fine)), wanted), shape, pixels.dtype.type)


def _padded(pixels: NDArray[Any], multiple: int) -> Tensor:
    """Samples (H, W, C) as (1, C, h, w), reflected at the bottom and right up to multiples of ``multiple``."""
    height, width = pixels.shape[:2]
    if height % multiple or width % multiple:
        pixels = np.pad(pixels, ((0, -height % multiple), (0, -width % multiple), (0, 0)), mode="reflect")
    return torch.from_numpy(np.require(pixels, requirements=["C", "W"])).permute(2, 0, 1)[None]


def _cropped(bands: Iterator[Tensor], height: int, width: int) -> Iterator[Tensor]:
    """The first ``height`` rows and ``width`` columns of consecutive bands (1, C, rows, columns)."""
    left = height
    for band in bands:
        yield band[:, :, :left, :width]
        left -= band.shape[2]


class _NonFiniteError(OneStepSRError):
    """The network's output is not finite."""


class _TileStep:
    """One tile of stored samples (1, C, h, w) to colour-fixed float32 output (1, C, h * scale, w * scale)."""

    def __init__(
        self,
        owner: Upscaler,
        profile: MatrixProfile | None,
        options: UpscaleOptions,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self.owner, self.profile, self.options, self.progress = owner, profile, options, progress
        self.places: list[tuple[int, int]] = []  # row and column of every tile, in the order of the calls
        self.done = 0

    def __call__(self, tile: Tensor) -> Tensor:
        lr = _to_float(tile)
        if self.owner.device.type == "cuda":  # elsewhere than on CUDA and the CPU only the network is sure to run
            lr = lr.to(self.owner.device)
        output = self._run(lr if self.profile is None else self.profile.to_srgb(lr)).to(lr.device).clamp(0.0, 1.0)
        if self.profile is not None:
            output = self.profile.from_srgb(output)
        if tile.shape[1] == 1:
            output = gray(output)
        if self.options.color_fix == "wavelet":
            output = wavelet(output, enlarge(lr, self.owner.scale))
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, len(self.places))
        return output

    def _run(self, lr: Tensor) -> Tensor:
        rgb = (
            lr.expand(-1, 3, -1, -1)
            .to(self.owner.device, self.owner.dtype)
            .contiguous(memory_format=torch.channels_last)
        )
        extra: dict[str, Any] = {}
        if self.owner._takes_origin:  # the place decides the noise
            extra["origin"] = self.places[self.done]
        if self.owner._takes_rng:  # otherwise every tile has its own, the same in every run
            own = 0 if self.owner._takes_origin else self.done
            extra["rng"] = torch.Generator().manual_seed((self.options.seed or 0) * 1_000_003 + own)
        if self.options.prompt_embedding is not None:
            extra["prompt_embedding"] = self.options.prompt_embedding.to(self.owner.device, self.owner.dtype)
        output = self.owner.generator(rgb, **extra).float()
        expected = (1, 3, *(side * self.owner.scale for side in lr.shape[-2:]))
        if output.shape != expected:
            raise OneStepSRError(
                f"{self.owner.name}: gave {tuple(output.shape)} for {tuple(lr.shape)}, expected {expected}"
            )
        if not torch.isfinite(torch.stack(output.aminmax())).all():  # far cheaper than looking at every value
            raise _NonFiniteError(
                f"{self.owner.name}: values that are not finite in {self.owner.dtype}; try --dtype float32"
            )
        return cast(Tensor, output)


def enlarge(values: Tensor, scale: int) -> Tensor:
    """Bicubic enlargement (a = -0.5, as Pillow) of (N, C, H, W), clamped to [0, 1]."""
    height, width = (side * scale for side in values.shape[-2:])
    return functional.interpolate(values, (height, width), mode="bicubic", antialias=True).clamp(0.0, 1.0)


def _to_float(tile: Tensor) -> Tensor:
    return samples_to_tensor(tile[0].permute(1, 2, 0).numpy())


def _stored(bands: Iterable[Tensor], shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    """Round bands of rows (1, C, h, W) one after the other into one array (H, W, C)."""
    result, top = np.empty(shape, dtype), 0
    for band in bands:
        result[top : top + band.shape[2]] = tensor_to_samples(band, dtype)
        top += band.shape[2]
    return result


def _bands(samples: NDArray[Any], rows: int = 256) -> Iterator[Tensor]:
    return (samples_to_tensor(samples[top : top + rows]) for top in range(0, samples.shape[0], rows))


def _matched(samples: NDArray[Any], own: Statistics, wanted: Statistics) -> Iterator[Tensor]:
    return (match_statistics(band, own, wanted) for band in _bands(samples))
