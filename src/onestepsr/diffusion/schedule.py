"""Noise schedules of the backbones.

:class:`DiffusionSchedule` is the variance-preserving process of Stable Diffusion that D3SR and OSEDiff are built on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MOST_STEPS = 100_000
"""Longest schedule whose tables are made; published ones have 1,000."""


def expand_as(values: Tensor, like: Tensor) -> Tensor:
    """Reshape per-sample ``values`` (N,) or () so that they broadcast over ``like`` (N, ...)."""
    return values.to(like.device, like.dtype).reshape(values.shape + (1,) * (like.ndim - values.ndim))


@dataclass(frozen=True, kw_only=True)
class DiffusionScheduleConfig:
    """Betas of a variance-preserving diffusion process; the defaults are Stable Diffusion's "scaled linear"
    schedule."""

    steps: int = 1000
    """T, the number of diffusion steps."""
    beta_start: float = 0.00085
    """beta of step 0."""
    beta_end: float = 0.012
    """beta of step T-1."""

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= MOST_STEPS:
            raise ValueError(f"steps must be 1 to {MOST_STEPS:,}, got {self.steps:,}")
        if not 0.0 < self.beta_start <= self.beta_end < 1.0:
            raise ValueError(f"need 0 < beta_start <= beta_end < 1, got {self}")


class DiffusionSchedule:
    """``alpha_bar`` of every step and the three conversions that follow from it.

    ``t`` is an integer tensor (N,) or (), or an int, in [0, T-1]; latents are (N, C, H, W). Arithmetic is done in the
    latents' dtype with coefficients taken from a float32 table.
    """

    def __init__(self, config: DiffusionScheduleConfig | None = None) -> None:
        self.config = config or DiffusionScheduleConfig()
        ends = (self.config.beta_start**0.5, self.config.beta_end**0.5)
        # On the CPU also while networks are built on the meta device: the table must hold values.
        root = torch.linspace(*ends, self.config.steps, device="cpu")
        # The cumulative product is taken in float32 because the published weights were trained with that table.
        self.alpha_bar = torch.cumprod(1.0 - root**2, dim=0)  # (T,)

    @property
    def steps(self) -> int:
        """T, the number of diffusion steps."""
        return self.config.steps

    def coefficients(self, t: Tensor | int, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t), broadcastable over ``like`` (N, C, H, W)."""
        alpha_bar = self.alpha_bar.to(t.device)[t.long()] if isinstance(t, Tensor) else self.alpha_bar[t]
        return expand_as(alpha_bar.sqrt(), like), expand_as((1.0 - alpha_bar).sqrt(), like)

    def add_noise(self, z: Tensor, noise: Tensor, t: Tensor | int) -> Tensor:
        """F(z, t) = sqrt(alpha_bar_t) z + sqrt(1 - alpha_bar_t) noise (D3SR, Eq. 4)."""
        signal, sigma = self.coefficients(t, z)
        return signal * z + sigma * noise

    def x0_from_eps(self, z_t: Tensor, eps: Tensor, t: Tensor | int) -> Tensor:
        """z_0 = (z_t - sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_bar_t) (D3SR, Eq. 1)."""
        signal, sigma = self.coefficients(t, z_t)
        return (z_t - sigma * eps) / signal

    def ancestral_step(self, z_t: Tensor, x0: Tensor, t: int, following: int, noise: Tensor) -> Tensor:
        """A sample of step ``following`` < ``t`` from ``z_t`` and its estimate ``x0`` (Ho et al., NeurIPS 2020, Eq.
        6-7, over the steps from ``following`` to ``t`` at once); ``x0`` itself where ``following`` is below 0."""
        if following < 0:
            return x0
        now, then = self.alpha_bar[t], self.alpha_bar[following]
        kept = now / then
        mean = (then.sqrt() * (1 - kept) * x0 + kept.sqrt() * (1 - then) * z_t) / (1 - now)
        return mean + ((1 - then) / (1 - now) * (1 - kept)).sqrt() * noise
