"""The diffusion of ResShift, SinSR and TAD-SR: from the HR latent to the LR latent, by shifting their residual.

Symbols: z_0 is the HR latent, z_y the latent of the enlarged LR image, z_t the latent at step t, eta_t the share of the
residual z_y - z_0 that z_t has taken over, kappa the strength of the noise. Steps are counted from 0 to T-1 as in the
published code (the papers count from 1). Tables are float64; arithmetic is done in the latents' dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from onestepsr.core.errors import UserError
from onestepsr.core.rng import generator as seeded
from onestepsr.diffusion.schedule import MOST_STEPS, expand_as

# ---- Noise on an endless plane ---------------------------------------------------------------------------------------

NOISE_BLOCK = 64
"""Side of the blocks that the plane of noise is drawn in, in latent positions."""


class NoisePlane:
    """Unbounded standard normal noise: each value follows from seed, draw, sample and position alone.

    ``origin`` is the row and column on the plane of the latents that are asked for. Calling it is :data:`Noise`.
    """

    def __init__(self, seed: int, origin: tuple[int, int] = (0, 0)) -> None:
        self.seed, self.origin = seed, origin

    @classmethod
    def drawn(cls, rng: torch.Generator | None, origin: tuple[int, int], scale: int, factor: int) -> NoisePlane:
        """The plane that ``rng`` decides (None: always the same one), at row and column ``origin`` of an LR image.

        The image is enlarged ``scale`` times; a latent position stands for ``factor`` pixels of the output.
        """
        seed = 0 if rng is None else int(torch.randint(2**62, (), generator=rng, device=rng.device))
        return cls(seed, (origin[0] * scale // factor, origin[1] * scale // factor))

    def __call__(self, draw: int, like: Tensor) -> Tensor:
        """Noise of draw number ``draw`` with shape (N, C, h, w), device and dtype of ``like``; drawn on the CPU."""
        samples = [self._window(draw, sample, *like.shape[1:]) for sample in range(like.shape[0])]
        return torch.stack(samples).to(like.device, like.dtype)

    def _window(self, draw: int, sample: int, channels: int, height: int, width: int) -> Tensor:
        (first_row, top), (first_column, left) = (divmod(start, NOISE_BLOCK) for start in self.origin)
        rows = range(first_row, first_row - (-(top + height) // NOISE_BLOCK))
        columns = range(first_column, first_column - (-(left + width) // NOISE_BLOCK))

        def block(row: int, column: int) -> Tensor:
            rng = seeded(self.seed, "noise", draw, sample, row, column)
            return torch.randn(channels, NOISE_BLOCK, NOISE_BLOCK, generator=rng, device="cpu")

        whole = torch.cat([torch.cat([block(row, column) for column in columns], dim=2) for row in rows], dim=1)
        return whole[:, top : top + height, left : left + width]


# ---- Schedule --------------------------------------------------------------------------------------------------------

InputScaling = Literal["latent", "pixel", "none"]
Respacing = Literal["spread", "published"]
Predict = Callable[[Tensor, Tensor], Tensor]
"""A network: scaled z_t (N, C, h, w) and its steps (N,), integers, to its estimate of z_0 (N, C, h, w)."""
Noise = Callable[[int, Tensor], Tensor]
"""Standard normal noise: number of the draw (0 is the start, then one per step) and a tensor whose shape, device and
dtype it has."""


@dataclass(frozen=True, kw_only=True)
class ResidualShiftConfig:
    """A residual-shifting process; the defaults are those of the 15-step models (ResShift v1 and v2, SinSR)."""

    steps: int = 15
    """T, the number of diffusion steps; ResShift v3 and the models after it have 4."""
    kappa: float = 2.0
    """Standard deviation of the noise at eta = 1."""
    min_noise: float = 0.04
    """Standard deviation of the noise at step 0; 0.2 with 4 steps. The first sqrt(eta) is this over kappa, at most
    this."""
    sqrt_eta_end: float = 0.99
    """sqrt(eta) of step T-1. The published configurations call it ``etas_end``, but it is the root."""
    power: float = 0.3
    """Exponent p of the schedule: below 1, most of the shift happens in the first steps."""
    input_scaling: InputScaling = "latent"
    """Divisor of z_t before the network sees it: its standard deviation when latents have unit variance
    ("latent"), the largest value that images in [-1, 1] are likely to reach ("pixel"), or nothing ("none")."""

    def __post_init__(self) -> None:
        if not 2 <= self.steps <= MOST_STEPS:
            raise ValueError(f"steps must be 2 to {MOST_STEPS:,}, got {self.steps:,}")
        if self.kappa <= 0 or self.power <= 0 or not 0 < self.sqrt_eta_start < self.sqrt_eta_end <= 1:
            raise ValueError(
                "need kappa > 0, power > 0 and 0 < min_noise / kappa < sqrt_eta_end <= 1, got "
                f"kappa {self.kappa:g}, power {self.power:g}, min_noise {self.min_noise:g}, "
                f"sqrt_eta_end {self.sqrt_eta_end:g}"
            )
        if self.input_scaling not in get_args(InputScaling):
            raise ValueError(f"input_scaling must be one of {get_args(InputScaling)}, got '{self.input_scaling}'")

    @property
    def sqrt_eta_start(self) -> float:
        """sqrt(eta) of step 0. (SinSR's code also caps it at sqrt(0.001), which changes nothing at its own 0.04.)"""
        return min(self.min_noise / self.kappa, self.min_noise)


def exponential_sqrt_eta(config: ResidualShiftConfig) -> Tensor:
    """sqrt(eta_t) (T,), float64: s_0 (s_end / s_0)^((t / (T-1))^p) (ResShift's schedule)."""
    position = torch.arange(config.steps, dtype=torch.float64, device="cpu") / (config.steps - 1)
    ratio = config.sqrt_eta_end / config.sqrt_eta_start
    return config.sqrt_eta_start * torch.pow(ratio, position**config.power)


def kept_steps(steps: int, count: int, rule: Respacing = "spread") -> list[int]:
    """``count`` of the steps 0..``steps``-1, ascending.

    "spread" takes them evenly and always keeps the last, so that the chain starts where the network was trained to
    start; one step is the last. "published" is the rule of the published code, floor(steps / count * k): it never keeps
    the last step (15 to 4 keeps 0, 3, 7, 11, where sqrt(eta) is 0.75 instead of 0.99), which costs quality, so it is
    only for comparison. Raises UserError for a number of steps that the schedule cannot give.
    """
    fewest = 2 if rule == "published" and count != steps else 1
    if not fewest <= count <= steps:
        raise UserError(f"{count} steps: this schedule has {steps}, accepted: {fewest} to {steps}")
    if rule == "published":
        return [int(steps / count * k) for k in range(count)]
    return [steps - 1 - round((steps - 1) * k / max(count - 1, 1)) for k in reversed(range(count))]


class ResidualShiftSchedule:
    """Tables of the process, every conversion that follows from them, and the two ways of sampling.

    ``t`` is an index into the tables: an int or an integer tensor (N,) in [0, steps-1]. In a schedule with fewer steps
    than it was trained with (:meth:`respaced`), ``timesteps[t]`` is what the network is told.
    """

    def __init__(self, config: ResidualShiftConfig | None = None, kept: Sequence[int] | None = None) -> None:
        """``kept`` are the steps of ``config`` that this schedule has, ascending; None means all."""
        self.config = config or ResidualShiftConfig()
        every = exponential_sqrt_eta(self.config)
        self.timesteps = torch.tensor(range(self.config.steps) if kept is None else kept, device="cpu")
        self.sqrt_eta = every[self.timesteps]  # (n,), as all tables
        self.eta = self.sqrt_eta**2
        self.eta_previous = torch.cat([torch.zeros_like(self.eta[:1]), self.eta[:-1]])
        self.alpha = self.eta - self.eta_previous
        # q(z_t-1 | z_t, z_0) (TAD-SR, Eq. 2); its variance is zero at t = 0, where no noise is added.
        self.mean_of_z_t = self.eta_previous / self.eta
        self.mean_of_z_0 = self.alpha / self.eta
        self.posterior_variance = self.config.kappa**2 * self.mean_of_z_t * self.alpha
        clipped = self.posterior_variance.clone()
        clipped[0] = clipped[1] if len(clipped) > 1 else self.config.kappa**2 * self.eta[0]
        self.posterior_log_variance = clipped.log()
        # z_t-1 = k z_0 + m z_t + j z_y (TAD-SR, Eq. 3, from SinSR)
        root = (self.eta_previous * self.eta).sqrt()
        self.m = (self.eta_previous / self.eta).sqrt()
        self.j = self.eta_previous - root
        self.k = 1.0 - self.eta_previous + root - self.m
        self.input_scale = self._input_scale()

    def _input_scale(self) -> Tensor:
        kappa = self.config.kappa
        if self.config.input_scaling == "latent":
            return (1.0 + kappa**2 * self.eta).sqrt()
        if self.config.input_scaling == "pixel":
            return 1.0 + 3.0 * kappa * self.sqrt_eta  # three standard deviations beyond the range of images
        return torch.ones_like(self.eta)

    @property
    def steps(self) -> int:
        """Number of steps of this schedule: T, or fewer after :meth:`respaced`."""
        return len(self.eta)

    @property
    def kept(self) -> list[int]:
        """The steps of the trained process that this schedule has, ascending."""
        return [int(step) for step in self.timesteps]

    def respaced(self, count: int, rule: Respacing = "spread") -> ResidualShiftSchedule:
        """The same process in ``count`` of its T steps; see :func:`kept_steps`."""
        return ResidualShiftSchedule(self.config, kept_steps(self.config.steps, count, rule))

    def _at(self, table: Tensor, t: Tensor | int, like: Tensor) -> Tensor:
        values = table.to(like.dtype)  # before it goes to a device that may not know float64
        return expand_as(values.to(t.device)[t.long()] if isinstance(t, Tensor) else values[t], like)

    def q_sample(self, z_0: Tensor, z_y: Tensor, noise: Tensor, t: Tensor | int) -> Tensor:
        """z_t = z_0 + eta_t (z_y - z_0) + kappa sqrt(eta_t) noise (TAD-SR, Eq. 1); all are (N, C, h, w)."""
        sigma = self._at(self.config.kappa * self.sqrt_eta, t, z_0)
        return z_0 + self._at(self.eta, t, z_0) * (z_y - z_0) + sigma * noise

    def prior(self, z_y: Tensor, noise: Tensor) -> Tensor:
        """z_T = z_y + kappa sqrt(eta_T) noise, where sampling starts; the share 1 - eta_T of z_0 is left out."""
        return z_y + self._at(self.config.kappa * self.sqrt_eta, self.steps - 1, z_y) * noise

    def scale_input(self, z_t: Tensor, t: Tensor | int) -> Tensor:
        """``z_t`` as the network sees it; the LR condition is not scaled."""
        return z_t / self._at(self.input_scale, t, z_t)

    def posterior(self, z_0: Tensor, z_t: Tensor, t: Tensor | int) -> tuple[Tensor, Tensor]:
        """Mean (N, C, h, w) and variance, which broadcasts, of z_t-1 given ``z_t`` and ``z_0`` (TAD-SR, Eq. 2)."""
        mean = self._at(self.mean_of_z_t, t, z_t) * z_t + self._at(self.mean_of_z_0, t, z_t) * z_0
        return mean, self._at(self.posterior_variance, t, z_t)

    def ancestral_step(self, z_0: Tensor, z_t: Tensor, noise: Tensor, t: int) -> Tensor:
        """A sample of z_t-1 given ``z_t`` and an estimate of ``z_0``; at t = 0 the mean, which is ``z_0``."""
        mean = self.posterior(z_0, z_t, t)[0]
        return mean + self._at((0.5 * self.posterior_log_variance).exp(), t, z_t) * noise if t > 0 else mean

    def deterministic_step(self, z_0: Tensor, z_t: Tensor, z_y: Tensor, t: Tensor | int) -> Tensor:
        """z_t-1 = k_t z_0 + m_t z_t + j_t z_y (TAD-SR, Eq. 3); at t = 0 that is ``z_0``."""
        return self._at(self.k, t, z_t) * z_0 + self._at(self.m, t, z_t) * z_t + self._at(self.j, t, z_t) * z_y

    def estimate(self, predict: Predict, z_t: Tensor, t: int) -> Tensor:
        """The network's estimate of z_0 from ``z_t`` (N, C, h, w): scaled input, and the step it was trained with."""
        step = self.timesteps[t].to(z_t.device).expand(z_t.shape[0])
        return predict(self.scale_input(z_t, t), step)

    def sample_ancestral(self, predict: Predict, z_y: Tensor, noise: Noise) -> Tensor:
        """An estimate of z_0 (N, C, h, w) by ``steps`` evaluations, with new noise in every step but the last."""
        z = self.prior(z_y, noise(0, z_y))
        for draw, t in enumerate(reversed(range(1, self.steps)), start=1):
            z = self.ancestral_step(self.estimate(predict, z, t), z, noise(draw, z), t)
        return self.estimate(predict, z, 0)

    def sample_deterministic(self, predict: Predict, z_y: Tensor, z_T: Tensor) -> Tensor:
        """An estimate of z_0 by ``steps`` evaluations from the start ``z_T`` (see :meth:`prior`), with no more noise.

        With one step, ``respaced(1)``, this is SinSR's inference.
        """
        z = z_T
        for t in reversed(range(1, self.steps)):
            z = self.deterministic_step(self.estimate(predict, z, t), z, z_y, t)
        return self.estimate(predict, z, 0)
