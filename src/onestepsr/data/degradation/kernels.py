"""Blur kernels of synthetic degradation: six bivariate families and the circular low-pass (sinc) filter.

The families are those of Real-ESRGAN (Wang et al., 2021, section 3.1 and Fig. 3). Formulas run in float64, because a
kernel is built once and normalised; it is cast to the image's type only where it is applied.

With the offset ``g`` from the kernel's centre and ``q = g^T Sigma^-1 g``: Gaussian ``exp(-q / 2)``, generalised
Gaussian ``exp(-q^beta / 2)``, plateau ``1 / (1 + q^beta)``; each is divided by its sum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from onestepsr.core.rng import choose, uniform

Family = Literal["gaussian", "generalized", "plateau", "sinc"]
FAMILIES: tuple[Family, ...] = ("gaussian", "generalized", "plateau", "sinc")
MAX_KERNEL_SIZE = 127


@dataclass(frozen=True, kw_only=True)
class KernelConfig:
    """Distribution of blur kernels; the defaults are Real-ESRGAN's first stage."""

    sizes: tuple[int, ...] = (7, 9, 11, 13, 15, 17, 19, 21)
    """Odd side lengths in pixels, all equally likely."""
    sinc_probability: float = 0.1
    """Share of sinc filters; the other kernels come from the families below."""
    gaussian: tuple[float, float] = (0.45, 0.25)
    """Relative weights of the isotropic and of the anisotropic Gaussian."""
    generalized: tuple[float, float] = (0.12, 0.03)
    """The same for the generalised Gaussian."""
    plateau: tuple[float, float] = (0.12, 0.03)
    """The same for the plateau-shaped kernel."""
    sigma: tuple[float, float] = (0.2, 3.0)
    """Standard deviation along each axis, in pixels."""
    beta_generalized: tuple[float, float] = (0.5, 4.0)
    """Shape exponent: half of the draws lie below 1 (heavy tails), half above."""
    beta_plateau: tuple[float, float] = (1.0, 2.0)
    """The same for the plateau; a lower end of 1 makes it exactly 1 in half of the draws."""

    def __post_init__(self) -> None:
        check_sizes("kernel sizes", self.sizes)
        weights = (*self.gaussian, *self.generalized, *self.plateau)
        if min(weights) < 0 or (sum(weights) <= 0 and self.sinc_probability < 1):
            raise ValueError(f"kernel weights {weights}: expected non-negative numbers with a positive sum")
        if not 0 <= self.sinc_probability <= 1:
            raise ValueError(f"sinc_probability is {self.sinc_probability}: expected 0 to 1")
        if not 0 < self.sigma[0] <= self.sigma[1]:
            raise ValueError(f"kernel sigma {self.sigma}: expected 0 < low <= high")
        for low, high in (self.beta_generalized, self.beta_plateau):
            if not 0 < low <= 1 <= high:
                raise ValueError(f"kernel beta range ({low}, {high}): expected 0 < low <= 1 <= high")


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One kernel by its parameters; :meth:`tensor` computes it."""

    family: Family
    size: int
    sigma_x: float = 0.0
    """Standard deviation in pixels along the first axis of the (rotated) ellipse. Not used by sinc."""
    sigma_y: float = 0.0
    rotation: float = 0.0
    """Angle of the ellipse in radians."""
    beta: float = 1.0
    """Shape exponent of the generalised and plateau families."""
    cutoff: float = 0.0
    """Angular cut-off frequency of sinc, in radians per pixel."""

    def tensor(self) -> Tensor:
        """The kernel as float64 (size, size), rows along y, of sum 1."""
        if self.family == "sinc":
            return sinc_kernel(self.size, self.cutoff)
        form = mahalanobis(self.size, self.sigma_x, self.sigma_y, self.rotation)
        if self.family == "gaussian":
            return _normalized(torch.exp(-0.5 * form))
        if self.family == "generalized":
            return _normalized(torch.exp(-0.5 * form**self.beta))
        return _normalized(1 / (1 + form**self.beta))


def check_sizes(name: str, sizes: tuple[int, ...]) -> None:
    """Raise ``ValueError`` unless ``sizes`` are odd and between 1 and 127."""
    if not sizes or any(size % 2 == 0 or not 1 <= size <= MAX_KERNEL_SIZE for size in sizes):
        raise ValueError(f"{name} {sizes}: expected odd numbers from 1 to {MAX_KERNEL_SIZE}")


def draw_kernel(config: KernelConfig, rng: torch.Generator) -> Kernel:
    """Draw one blur kernel: a size, then a sinc filter or one of the six bivariate kernels."""
    size = config.sizes[choose([1.0] * len(config.sizes), rng)]
    if uniform(0, 1, rng) < config.sinc_probability:
        # A cut-off that is too low for a small kernel leaves little of the filter, so small ones start higher.
        lowest = math.pi / 3 if size < 13 else math.pi / 5
        return draw_sinc_kernel((size,), rng, lowest=lowest)
    index = choose([*config.gaussian, *config.generalized, *config.plateau], rng)
    family, isotropic = FAMILIES[index // 2], index % 2 == 0
    sigma_x = uniform(*config.sigma, rng)
    sigma_y = sigma_x if isotropic else uniform(*config.sigma, rng)
    rotation = 0.0 if isotropic else uniform(-math.pi, math.pi, rng)
    beta = 1.0
    if family != "gaussian":
        low, high = config.beta_generalized if family == "generalized" else config.beta_plateau
        beta = uniform(low, 1, rng) if uniform(0, 1, rng) < 0.5 else uniform(1, high, rng)
    return Kernel(family=family, size=size, sigma_x=sigma_x, sigma_y=sigma_y, rotation=rotation, beta=beta)


def draw_sinc_kernel(sizes: tuple[int, ...], rng: torch.Generator, lowest: float = math.pi / 3) -> Kernel:
    """Draw a sinc filter with a cut-off from ``lowest`` to pi radians per pixel."""
    size = sizes[choose([1.0] * len(sizes), rng)]
    return Kernel(family="sinc", size=size, cutoff=uniform(lowest, math.pi, rng))


def mahalanobis(size: int, sigma_x: float, sigma_y: float, rotation: float) -> Tensor:
    """``q = g^T Sigma^-1 g`` with ``Sigma = R diag(sigma_x^2, sigma_y^2) R^T`` on a centred grid, (size, size)."""
    y, x = _centred_grid(size)
    cosine, sine = math.cos(rotation), math.sin(rotation)
    along, across = x * cosine + y * sine, y * cosine - x * sine
    return (along / sigma_x) ** 2 + (across / sigma_y) ** 2


def sinc_kernel(size: int, cutoff: float) -> Tensor:
    """Circular low-pass ``w J1(w r) / (2 pi r)``, at the centre ``w^2 / (4 pi)``, (size, size), of sum 1."""
    y, x = _centred_grid(size)
    radius = torch.hypot(x, y)
    centre = radius == 0
    safe, positions = torch.unique(radius.masked_fill(centre, 1), return_inverse=True)
    values = cutoff * bessel_j1(cutoff * safe) / (2 * math.pi * safe)
    return _normalized(values[positions].masked_fill(centre, cutoff**2 / (4 * math.pi)))


def bessel_j1(x: Tensor) -> Tensor:
    """Bessel function of the first kind and order 1 of ``x`` (n,) >= 0, to float64 rounding.

    ``J1(x) = 1/(2 pi) * integral over one turn of cos(t - x sin t)``. The trapezoidal rule on a period is exact up to
    Bessel functions of order about ``points``, which vanish once that exceeds x by some tens. (torch.special.bessel_j1
    is off by up to 5e-7.)
    """
    points = int(x.max()) + 60
    angle = torch.arange(points, dtype=torch.float64) * (2 * math.pi / points)
    return torch.cos(angle - x[:, None] * torch.sin(angle)).mean(1)


def _centred_grid(size: int) -> tuple[Tensor, Tensor]:
    axis = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    return axis[:, None].expand(size, size), axis[None, :].expand(size, size)


def _normalized(kernel: Tensor) -> Tensor:
    return kernel / kernel.sum()
