"""First-order degradation of faces: one blur, strong shrinking, noise, JPEG, and back to the full size.

With the kernel k, the factor r, noise n and JPEG quality q (Wang et al., GFPGAN, 2021, section 4.1):
``x = ([(y * k) shrunk by r + n] after JPEG of quality q) enlarged by r``. LR and HR images have the same size, so the
scale is 1. At a larger scale the shrinking is counted from the LR size.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from onestepsr.core.rng import uniform
from onestepsr.data.degradation.kernels import KernelConfig, draw_kernel
from onestepsr.data.degradation.operators import ResizeMode
from onestepsr.data.degradation.parameters import Degradation, Noise, Stage


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
