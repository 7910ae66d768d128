"""Degradations by name, each with the published data that it reproduces or the source that it imitates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from onestepsr.core.errors import UserError, did_you_mean
from onestepsr.data.degradation.kernels import KernelConfig
from onestepsr.data.degradation.pipeline import (
    DegradationConfig,
    DegradationMix,
    DegradationShare,
    FaceDegradationConfig,
    Recipe,
    StageConfig,
)


def real_esrgan() -> DegradationConfig:
    """Real-ESRGAN's x4plus settings without sharpening: the data of D3SR and OSEDiff."""
    return DegradationConfig()


def resshift() -> DegradationConfig:
    """ResShift's and SinSR's data: smaller kernels, and the second round for half of the images."""
    first_sizes, second_sizes = tuple(range(3, 20, 2)), tuple(range(3, 14, 2))
    second = StageConfig(
        probability=0.5,
        blur_probability=0.8,
        kernels=KernelConfig(sizes=second_sizes, sigma=(0.2, 1.5)),
        resize_weights=(0.3, 0.4, 0.3),
        resize_range=(0.3, 1.2),
        gaussian_sigma=(1.0, 25.0),
        poisson_scale=(0.05, 2.5),
    )
    first = StageConfig(kernels=KernelConfig(sizes=first_sizes))
    return DegradationConfig(first=first, second=second, final_sinc_sizes=second_sizes)


def camera() -> DegradationConfig:
    """A decent camera (our own settings): one light blur, antialiased shrinking, little noise, JPEG 70 to 98.

    There is only the second round, whose resize aims at the LR size: noise and compression act at the LR size.
    """
    kernels = KernelConfig(
        sizes=(13, 15, 17, 19),
        sinc_probability=0.0,
        gaussian=(0.6, 0.3),
        generalized=(0.05, 0.0),
        plateau=(0.05, 0.0),
        sigma=(0.4, 3.0),
        beta_generalized=(0.7, 2.0),
    )
    only = StageConfig(
        kernels=kernels,
        resize_weights=(0.0, 0.0, 1.0),
        gaussian_sigma=(0.0, 6.0),
        poisson_scale=(0.0, 0.5),
        gray_probability=0.3,
    )
    return DegradationConfig(
        first=StageConfig(probability=0.0),
        first_jpeg=None,
        second=only,
        final_jpeg=(70.0, 98.0),
        final_sinc_probability=0.0,
        final_resize_first_probability=1.0,
        antialias=True,
    )


def web() -> DegradationConfig:
    """Images that the web has passed on (our own settings): compressed twice and strongly, JPEG 10 to 60, with little
    blur and noise. The last blocks lie on the LR image's pixels in most images and are resized with it in the others.
    """
    first = StageConfig(
        blur_probability=0.3,
        kernels=KernelConfig(sigma=(0.2, 1.5)),
        resize_weights=(0.1, 0.7, 0.2),
        resize_range=(0.25, 1.2),
        gaussian_sigma=(0.0, 8.0),
        poisson_scale=(0.0, 0.5),
    )
    second = StageConfig(
        blur_probability=0.3,
        kernels=KernelConfig(sigma=(0.2, 1.0)),
        resize_weights=(0.3, 0.3, 0.4),
        resize_range=(0.6, 1.3),
        gaussian_sigma=(0.0, 4.0),
        poisson_scale=(0.0, 0.3),
    )
    return DegradationConfig(
        first=first,
        first_jpeg=(10.0, 60.0),
        second=second,
        final_jpeg=(10.0, 60.0),
        final_sinc_probability=0.2,
        final_resize_first_probability=0.7,
        antialias=True,
    )


def bicubic() -> DegradationConfig:
    """Antialiased bicubic shrinking and nothing else: the classical benchmark setting."""
    none = StageConfig(probability=0.0)
    return DegradationConfig(
        first=none,
        first_jpeg=None,
        second=none,
        final_jpeg=None,
        final_sinc_probability=0.0,
        resize_modes=("bicubic",),
        antialias=True,
    )


def face_resshift() -> FaceDegradationConfig:
    """Degradation of the GFPGAN type with which ResShift's and TAD-SR's face models are trained; for scale 1."""
    return FaceDegradationConfig()


def face_osediff() -> FaceDegradationConfig:
    """The same with the numbers of OSEDiff's face model (they are CodeFormer's), without gray images; for scale 1."""
    plain = FaceDegradationConfig()
    return FaceDegradationConfig(
        kernels=replace(plain.kernels, sigma=(1.0, 15.0)), shrink=(1.0, 30.0), gray_probability=0.0
    )


def mixed() -> DegradationMix:
    """Half Real-ESRGAN, half camera: heavy damage and the mild blur of real photos in one training set."""
    return mix({"real_esrgan": 0.5, "camera": 0.5})


PRESETS: dict[str, Callable[[], Recipe]] = {
    "real_esrgan": real_esrgan,
    "resshift": resshift,
    "camera": camera,
    "web": web,
    "bicubic": bicubic,
    "face_resshift": face_resshift,
    "face_osediff": face_osediff,
    "mixed": mixed,
}


def get_preset(name: str) -> Recipe:
    """The degradation called ``name``."""
    if name not in PRESETS:
        raise UserError(f"unknown degradation '{name}': {did_you_mean(name, PRESETS)}")
    return PRESETS[name]()


def mix(weights: Mapping[str, float]) -> DegradationMix:
    """A mixture of presets by relative weight, for example ``{"real_esrgan": 2, "camera": 1}``."""
    shares = []
    for name, weight in weights.items():
        recipe = get_preset(name)
        if isinstance(recipe, DegradationMix):
            raise UserError(f"degradation '{name}' is itself a mixture: name its parts instead")
        shares.append(DegradationShare(weight=weight, degradation=recipe))
    return DegradationMix(shares=tuple(shares))
