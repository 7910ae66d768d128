"""Synthetic degradation of high-resolution photos: the second-order model of Real-ESRGAN and its relatives.

Drawing and applying are separate. :func:`draw_degradation` turns a configuration and a generator into a
:class:`Degradation`, which is plain numbers and can be written down; :func:`apply_degradation` makes the LR image
(its own randomness is the noise alone) and :func:`target_of` the HR image that belongs to it. :func:`degrade` does
the first two, :func:`degrade_pair` all three.

Order (Wang et al., 2021, section 3 and Fig. 2): blur, resize, noise, JPEG; then blur, resize, noise; then either resize
to the LR size, sinc filter, JPEG, or JPEG, resize, sinc filter; then rounding to 8 bit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from onestepsr.core.errors import UserError
from onestepsr.core.rng import choose, generator, uniform
from onestepsr.data.degradation.kernels import Kernel, KernelConfig, check_sizes, draw_kernel, draw_sinc_kernel
from onestepsr.data.degradation.operators import (
    ResizeMode,
    Variant,
    add_gaussian_noise,
    add_poisson_noise,
    filter2d,
    jpeg,
    rescale,
    resize,
    to_8bit,
    unsharp_mask,
)
from onestepsr.data.photos import read_pixels
from onestepsr.imaging.color import gray
from onestepsr.imaging.read import Samples, samples_to_tensor, tensor_to_samples

# ---- Drawn parameters ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Noise that is added to one image."""

    kind: Literal["gaussian", "poisson"]
    level: float
    """Standard deviation in 8-bit levels (gaussian) or factor on the shot noise (poisson)."""
    gray: bool
    """Equal in all channels."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One drawn round."""

    blur: Kernel | None
    scale: float
    """Resize factor: of the image in the first round, of the LR size in the second."""
    mode: ResizeMode
    noise: Noise


@dataclass(frozen=True, kw_only=True)
class Degradation:
    """Everything that was drawn for one image, except the noise fields themselves."""

    sharpen: bool
    first: Stage | None
    first_jpeg: float | None
    second: Stage | None
    final_mode: ResizeMode
    final_resize_first: bool
    final_sinc: Kernel | None
    final_jpeg: float | None
    antialias: bool
    jpeg_variant: Variant = "published"
    """JPEG arithmetic: that of published training code, or that of an encoder."""
    gray: Literal["none", "lr", "both"] = "none"
    """Images that lose their colour in the end."""


# ---- Faces -----------------------------------------------------------------------------------------------------------
# With the kernel k, the factor r, noise n and JPEG quality q (Wang et al., GFPGAN, 2021, section 4.1):
# ``x = ([(y * k) shrunk by r + n] after JPEG of quality q) enlarged by r``. LR and HR images have the same size, so the
# scale is 1. At a larger scale the shrinking is counted from the LR size.


def _face_kernels() -> KernelConfig:
    return KernelConfig(
        sizes=(41,),
        sinc_probability=0.0,
        gaussian=(0.5, 0.5),
        generalized=(0.0, 0.0),
        plateau=(0.0, 0.0),
        sigma=(0.1, 15.0),
    )


@dataclass(frozen=True, kw_only=True)
class FaceDegradationConfig:
    """Degradation of aligned faces; the defaults are those of ResShift's face restoration."""

    kernels: KernelConfig = field(default_factory=_face_kernels)
    """Distribution of the blur kernel."""
    shrink: tuple[float, float] = (0.8, 32.0)
    """The LR size is divided by a number drawn evenly from this range (below 1 it grows) before noise and JPEG."""
    resize_mode: ResizeMode = "bilinear"
    """Interpolation on the way down and back up, sampled without widening the filter."""
    noise_sigma: tuple[float, float] = (0.0, 20.0)
    """Standard deviation of the coloured Gaussian noise in 8-bit levels."""
    jpeg: tuple[float, float] = (30.0, 100.0)
    """Quality of the JPEG compression of the small image."""
    gray_probability: float = 0.01
    """Share of images that lose their colour."""
    gray_target: bool = True
    """Remove the colour of the target too; otherwise the network is asked to guess colours."""

    def __post_init__(self) -> None:
        for name, lowest, highest in (("shrink", 0.1, 128), ("noise_sigma", 0, 255), ("jpeg", 1, 100)):
            low, high = getattr(self, name)
            if not lowest <= low <= high <= highest:
                raise ValueError(f"{name} is ({low}, {high}): expected {lowest} <= low <= high <= {highest}")
        if not 0 <= self.gray_probability <= 1:
            raise ValueError(f"gray_probability is {self.gray_probability}: expected 0 to 1")


def draw_face_degradation(config: FaceDegradationConfig, rng: torch.Generator) -> Degradation:
    """Draw the parameters for one image.

    Expressed in terms of the second-order model: its second round, whose resize aims at the LR size, then JPEG, then
    the resize to the LR size. Compression is an encoder's, as in the published code: the image is small here, down to
    16 pixels a side.
    """
    blur = draw_kernel(config.kernels, rng)
    factor = 1 / uniform(*config.shrink, rng)
    noise = Noise(kind="gaussian", level=uniform(*config.noise_sigma, rng), gray=False)
    quality = uniform(*config.jpeg, rng)
    is_gray = uniform(0, 1, rng) < config.gray_probability
    return Degradation(
        sharpen=False,
        first=None,
        first_jpeg=None,
        second=Stage(blur=blur, scale=factor, mode=config.resize_mode, noise=noise),
        final_mode=config.resize_mode,
        final_resize_first=False,
        final_sinc=None,
        final_jpeg=quality,
        antialias=False,
        jpeg_variant="standard",
        gray=("both" if config.gray_target else "lr") if is_gray else "none",
    )


# ---- Second-order model ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One round of blur, resize and noise; the defaults are Real-ESRGAN's first."""

    probability: float = 1.0
    """Chance that the round takes place at all."""
    blur_probability: float = 1.0
    """Chance of the blur."""
    kernels: KernelConfig = field(default_factory=KernelConfig)
    """Distribution of the blur kernel."""
    resize_weights: tuple[float, float, float] = (0.2, 0.7, 0.1)
    """Relative weights of enlarging, shrinking and keeping the size."""
    resize_range: tuple[float, float] = (0.15, 1.5)
    """Smallest and largest factor: of the image in the first round, of the LR size in the second."""
    gaussian_probability: float = 0.5
    """Share of Gaussian noise; the rest is Poisson (shot) noise."""
    gaussian_sigma: tuple[float, float] = (1.0, 30.0)
    """Standard deviation of Gaussian noise in 8-bit levels."""
    poisson_scale: tuple[float, float] = (0.05, 3.0)
    """Factor on the shot noise."""
    gray_probability: float = 0.4
    """Share of noise that is equal in all three channels."""

    def __post_init__(self) -> None:
        for name in ("probability", "blur_probability", "gaussian_probability", "gray_probability"):
            _check_probability(name, getattr(self, name))
        _check_range("resize_range", self.resize_range, 1e-3)
        if not self.resize_range[0] <= 1 <= self.resize_range[1]:
            raise ValueError(f"resize_range is {self.resize_range}: expected low <= 1 <= high")
        _check_range("gaussian_sigma", self.gaussian_sigma, 0)
        _check_range("poisson_scale", self.poisson_scale, 0)
        if min(self.resize_weights) < 0 or sum(self.resize_weights) <= 0:
            raise ValueError(
                f"resize_weights are {self.resize_weights}: expected three numbers >= 0 with a positive sum"
            )


@dataclass(frozen=True, kw_only=True)
class DegradationConfig:
    """The whole second-order model; the defaults are those with which D3SR's and OSEDiff's data are made."""

    first: StageConfig = field(default_factory=StageConfig)
    """The first round."""
    first_jpeg: tuple[float, float] | None = (30.0, 95.0)
    """Quality of the JPEG compression that ends the first round; none = no compression."""
    second: StageConfig = field(
        default_factory=lambda: StageConfig(
            blur_probability=0.8,
            kernels=KernelConfig(sigma=(0.2, 1.5)),
            resize_weights=(0.3, 0.4, 0.3),
            resize_range=(0.3, 1.2),
            gaussian_sigma=(1.0, 25.0),
            poisson_scale=(0.05, 2.5),
        )
    )
    """The second round."""
    final_jpeg: tuple[float, float] | None = (30.0, 95.0)
    """Quality of the last JPEG compression; none = no compression."""
    final_sinc_probability: float = 0.8
    """Chance of the last sinc filter, which imitates ringing and overshoot."""
    final_sinc_sizes: tuple[int, ...] = (7, 9, 11, 13, 15, 17, 19, 21)
    """Odd side lengths of that filter."""
    final_resize_first_probability: float = 0.5
    """Chance of resize, sinc, JPEG; otherwise the order is JPEG, resize, sinc."""
    resize_modes: tuple[ResizeMode, ...] = ("area", "bilinear", "bicubic")
    """Interpolations, drawn anew for each resize."""
    antialias: bool = False
    """Widen bilinear and bicubic filters when shrinking. Real-ESRGAN does not, so its LR images alias."""
    sharpen: bool = False
    """Sharpen the photo before degrading it (USM), as Real-ESRGAN does. The target is left as it is."""

    def __post_init__(self) -> None:
        for name in ("first_jpeg", "final_jpeg"):
            quality = getattr(self, name)
            if quality is not None and not 1 <= quality[0] <= quality[1] <= 100:
                raise ValueError(f"{name} is {quality}: expected 1 <= low <= high <= 100")
        for name in ("final_sinc_probability", "final_resize_first_probability"):
            _check_probability(name, getattr(self, name))
        check_sizes("final_sinc_sizes", self.final_sinc_sizes)
        if not self.resize_modes:
            raise ValueError("resize_modes is empty: expected some of area, bilinear, bicubic")


@dataclass(frozen=True, kw_only=True)
class DegradationShare:
    """One part of a mixture."""

    weight: float
    """Relative share of the images."""
    degradation: DegradationConfig | FaceDegradationConfig
    """Degradation of these images."""


@dataclass(frozen=True, kw_only=True)
class DegradationMix:
    """Several degradations, one of which is drawn for each image."""

    shares: tuple[DegradationShare, ...]
    """The parts."""

    def __post_init__(self) -> None:
        weights = [share.weight for share in self.shares]
        if not weights or min(weights) < 0 or sum(weights) <= 0:
            raise ValueError(f"weights of the degradation mix are {weights}: expected numbers >= 0 with a positive sum")


Recipe = DegradationConfig | FaceDegradationConfig | DegradationMix


def degrade(hr: Tensor, recipe: Recipe, rng: torch.Generator, scale: int = 4) -> Tensor:
    """Make the LR image of ``hr``, (3, H, W) or (N, 3, H, W), RGB in [0, 1], H and W multiples of ``scale``.

    Returns (..., H / scale, W / scale) in [0, 1] on the 256 levels of 8 bit. Each image of a batch gets its own draw.
    Deterministic for a given generator state.
    """
    if hr.ndim == 4:
        return torch.stack([degrade(image, recipe, rng, scale) for image in hr])
    return degrade_pair(hr, recipe, rng, scale)[1]


def degrade_pair(hr: Tensor, recipe: Recipe, rng: torch.Generator, scale: int = 4) -> tuple[Tensor, Tensor]:
    """The HR image as target, (3, H, W), and its LR image; as :func:`degrade` for one image ``hr`` (3, H, W)."""
    drawn = draw_degradation(recipe, rng)
    return target_of(hr, drawn), apply_degradation(hr, drawn, rng, scale)


def target_of(hr: Tensor, drawn: Degradation) -> Tensor:
    """Target of the LR image: ``hr`` (3, H, W) in [0, 1], in rare cases without its colour."""
    return to_8bit(_without_colour(hr[None]))[0] if drawn.gray == "both" else hr


def draw_degradation(recipe: Recipe, rng: torch.Generator) -> Degradation:
    """Draw the parameters for one image."""
    if isinstance(recipe, DegradationMix):
        index = choose([share.weight for share in recipe.shares], rng)
        return draw_degradation(recipe.shares[index].degradation, rng)
    if isinstance(recipe, FaceDegradationConfig):
        return draw_face_degradation(recipe, rng)
    has_sinc = uniform(0, 1, rng) < recipe.final_sinc_probability
    return Degradation(
        sharpen=recipe.sharpen,
        first=_draw_stage(recipe.first, recipe.resize_modes, rng),
        first_jpeg=None if recipe.first_jpeg is None else uniform(*recipe.first_jpeg, rng),
        second=_draw_stage(recipe.second, recipe.resize_modes, rng),
        final_mode=_draw_mode(recipe.resize_modes, rng),
        final_resize_first=uniform(0, 1, rng) < recipe.final_resize_first_probability,
        final_sinc=draw_sinc_kernel(recipe.final_sinc_sizes, rng) if has_sinc else None,
        final_jpeg=None if recipe.final_jpeg is None else uniform(*recipe.final_jpeg, rng),
        antialias=recipe.antialias,
    )


def apply_degradation(hr: Tensor, drawn: Degradation, rng: torch.Generator, scale: int = 4) -> Tensor:
    """Make the LR image of one ``hr`` (3, H, W) in [0, 1] with drawn parameters; ``rng`` makes the noise."""
    height, width = hr.shape[-2:]
    if height % scale or width % scale:
        raise ValueError(f"image of {width}x{height}: expected sides that are multiples of {scale}")
    lr_size = (height // scale, width // scale)
    image = hr[None]
    if drawn.sharpen:
        image = unsharp_mask(image)
    if drawn.first is not None:
        image = _blur(image, drawn.first.blur)
        image = rescale(image, drawn.first.scale, drawn.first.mode, antialias=drawn.antialias)
        image = _add_noise(image, drawn.first.noise, rng)
    image = _compress(image, drawn.first_jpeg, drawn.jpeg_variant)
    if drawn.second is not None:
        image = _blur(image, drawn.second.blur)
        size = (_scaled(lr_size[0], drawn.second.scale), _scaled(lr_size[1], drawn.second.scale))
        image = resize(image, size, drawn.second.mode, antialias=drawn.antialias)
        image = _add_noise(image, drawn.second.noise, rng)
    image = _finish(image, drawn, lr_size)
    return to_8bit(image if drawn.gray == "none" else _without_colour(image))[0]


def _finish(image: Tensor, drawn: Degradation, lr_size: tuple[int, int]) -> Tensor:
    """Bring the image to its final size; JPEG comes last, or first so that its blocks are resized too."""
    if not drawn.final_resize_first:
        image = _compress(image, drawn.final_jpeg, drawn.jpeg_variant)
    image = resize(image, lr_size, drawn.final_mode, antialias=drawn.antialias)
    image = _blur(image, drawn.final_sinc)
    return _compress(image, drawn.final_jpeg, drawn.jpeg_variant) if drawn.final_resize_first else image


def _blur(image: Tensor, kernel: Kernel | None) -> Tensor:
    return image if kernel is None else filter2d(image, kernel.tensor())


def _compress(image: Tensor, quality: float | None, variant: Variant) -> Tensor:
    return image if quality is None else jpeg(image.clamp(0, 1), quality, variant=variant)


def _without_colour(image: Tensor) -> Tensor:
    return gray(image.clamp(0, 1)).expand_as(image)


def _add_noise(image: Tensor, noise: Noise, rng: torch.Generator) -> Tensor:
    add = add_gaussian_noise if noise.kind == "gaussian" else add_poisson_noise
    return add(image, torch.tensor([noise.level]), torch.tensor([noise.gray]), rng)


def _scaled(length: int, factor: float) -> int:
    return max(1, int(length * factor))


def _draw_stage(config: StageConfig, modes: tuple[ResizeMode, ...], rng: torch.Generator) -> Stage | None:
    if uniform(0, 1, rng) >= config.probability:
        return None
    has_blur = uniform(0, 1, rng) < config.blur_probability
    return Stage(
        blur=draw_kernel(config.kernels, rng) if has_blur else None,
        scale=_draw_scale(config, rng),
        mode=_draw_mode(modes, rng),
        noise=_draw_noise(config, rng),
    )


def _draw_scale(config: StageConfig, rng: torch.Generator) -> float:
    low, high = config.resize_range
    ranges = ((1.0, high), (low, 1.0), (1.0, 1.0))
    return uniform(*ranges[choose(config.resize_weights, rng)], rng)


def _draw_mode(modes: tuple[ResizeMode, ...], rng: torch.Generator) -> ResizeMode:
    return modes[choose([1.0] * len(modes), rng)]


def _draw_noise(config: StageConfig, rng: torch.Generator) -> Noise:
    is_gaussian = uniform(0, 1, rng) < config.gaussian_probability
    level = uniform(*(config.gaussian_sigma if is_gaussian else config.poisson_scale), rng)
    gray = uniform(0, 1, rng) < config.gray_probability
    return Noise(kind="gaussian" if is_gaussian else "poisson", level=level, gray=gray)


def _check_probability(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}: expected 0 to 1")


def _check_range(name: str, values: tuple[float, float], lowest: float) -> None:
    if not lowest <= values[0] <= values[1]:
        raise ValueError(f"{name} is {values}: expected {lowest} <= low <= high")


# ---- Photos in files -------------------------------------------------------------------------------------------------
# What is done to a photo depends on the seed and on its name alone.


def draw_for(recipe: Recipe, seed: int, name: str) -> Degradation:
    """Draw the parameters for the photo called ``name``, its path in the folder of photos with forward slashes."""
    return draw_degradation(recipe, generator(seed, "degrade", name))


def make_pair(
    path: Path, drawn: Degradation, *, seed: int, name: str, scale: int, multiple: int
) -> tuple[Samples, Samples]:
    """LR samples (h, w, 3) and HR samples (h scale, w scale, 3), uint8, of the photo in ``path``.

    HR is cut at the bottom and right to multiples of ``multiple``, itself a multiple of ``scale``. Raises UserError for
    a photo that cannot be read or leaves nothing then.
    """
    pixels = read_pixels(path)
    height, width = (side // multiple * multiple for side in pixels.shape[:2])
    if not height or not width:
        raise UserError(f"{path}: {pixels.shape[1]} x {pixels.shape[0]}, expected sides of at least {multiple}")
    hr = samples_to_tensor(pixels[:height, :width])[0]
    lr = apply_degradation(hr, drawn, generator(seed, "degrade noise", name), scale)
    kind = pixels.dtype.type
    return tensor_to_samples(lr, kind), tensor_to_samples(target_of(hr, drawn), kind)
