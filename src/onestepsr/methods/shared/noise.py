"""What a latent discriminator sees: clean latents, or latents noised to steps drawn in one of two ways."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from onestepsr.core.errors import UserError
from onestepsr.core.machine import is_one_of_several
from onestepsr.diffusion.schedule import DiffusionSchedule
from onestepsr.methods.base import SampleRandom


@dataclass(frozen=True, kw_only=True)
class AdaptiveConfig:
    """Noise whose strength follows how sure the discriminator is (Wang et al., "Diffusion-GAN", 2023, section 3.3)."""

    t_initial: int = 5
    """Largest step in the beginning, and the smallest that it may fall to."""
    target: float = 0.6
    """Share of real over fake verdicts on real latents, as E[sign(D - 1/2)], at which the strength stays."""
    images: int = 100_000
    """Real images over which the largest step would grow to ``t_max`` if the discriminator were always too sure."""
    clean_share: float = 0.5
    """Part of the samples that get no noise."""
    prior: Literal["priority", "uniform"] = "priority"
    """Distribution of the step up to the present largest: in proportion to the step, or even."""

    def __post_init__(self) -> None:
        if self.t_initial < 0 or self.images < 1 or not 0 <= self.clean_share <= 1 or not -1 < self.target < 1:
            raise ValueError(f"need t_initial >= 0, images >= 1, clean_share in 0..1 and target in (-1, 1), got {self}")


@dataclass(frozen=True, kw_only=True)
class NoiseConfig:
    """How latents are noised before a discriminator judges them."""

    kind: Literal["noise_aware", "vanilla", "diffusion_gan"] = "noise_aware"
    """``noise_aware`` draws the step evenly from [t_min, t_max], as D3SR does (Eq. 2-3); ``vanilla`` shows clean
    latents at step 0; ``diffusion_gan`` adapts the strength (Table 6)."""
    t_min: int = 0
    """Smallest step of ``noise_aware``."""
    t_max: int = 999
    """Largest step; the paper draws from all of [0, T]."""
    adaptive: AdaptiveConfig = field(default_factory=AdaptiveConfig)
    """Settings of ``diffusion_gan``."""

    def __post_init__(self) -> None:
        if not 0 <= self.t_min <= self.t_max:
            raise ValueError(f"need 0 <= t_min <= t_max, got {self.t_min} and {self.t_max}")
        if self.kind == "diffusion_gan" and self.adaptive.t_initial > self.t_max:
            raise ValueError(f"adaptive.t_initial must be at most t_max {self.t_max}, got {self.adaptive.t_initial}")


class LatentNoise(nn.Module):
    """F(z, t) = sqrt(alpha_bar_t) z + sqrt(1 - alpha_bar_t) noise with t drawn per sample (D3SR, Eq. 4)."""

    def __init__(self, schedule: DiffusionSchedule, config: NoiseConfig, gain: float = 1.0) -> None:
        """``gain`` multiplies the latents first, for a discriminator that knows them on another scale."""
        super().__init__()
        if config.t_max >= schedule.steps:
            raise UserError(f"discriminator.t_max: {config.t_max}, but the diffusion has {schedule.steps} steps from 0")
        self.schedule, self.config, self.gain = schedule, config, gain

    def forward(self, z: Tensor, random: SampleRandom) -> tuple[Tensor, Tensor]:
        """Noised latents, shaped like ``z`` (N, C, h, w), and their steps (N,) on the same device."""
        z = z if self.gain == 1.0 else self.gain * z
        if self.config.kind == "vanilla":
            return z, torch.zeros(len(z), dtype=torch.long, device=z.device)
        t = self.draw(random)
        noised = self.schedule.add_noise(z, random.normal(z), t)
        if self.config.kind == "diffusion_gan":  # step 0 means no noise there, not the schedule's first whiff
            noised = torch.where(t.to(z.device).reshape(-1, 1, 1, 1) == 0, z, noised)
        return noised, t.to(z.device)

    def draw(self, random: SampleRandom) -> Tensor:
        """Steps (N,)."""
        return random.integers(self.config.t_min, self.config.t_max + 1)

    def update(self, real_logits: Tensor) -> None:
        """Learn how sure the discriminator is of real latents, from its logits (N, 1, h', w')."""

    def step(self) -> None:
        """Turn what was observed since the last call into the strength of the iteration that begins."""


class AdaptiveNoise(LatentNoise):
    """Diffusion-GAN's noise: the largest step grows while the discriminator is too sure of itself, and shrinks again.

    Our reading where D3SR's Table 6 only names it: same backbone and head, the schedule of the diffusion model, and the
    discriminator is told the step. The state lies in buffers, so that checkpoints carry it.
    """

    largest: Tensor
    observed: Tensor

    def __init__(self, schedule: DiffusionSchedule, config: NoiseConfig, gain: float = 1.0) -> None:
        super().__init__(schedule, config, gain)
        self.register_buffer("largest", torch.tensor(float(config.adaptive.t_initial)))
        self.register_buffer("observed", torch.zeros(2))  # sum of signs, number of samples

    def draw(self, random: SampleRandom) -> Tensor:
        """Steps (N,): 0 for the clean share, else up to the present largest."""
        settings = self.config.adaptive
        clean = (random.uniform() < settings.clean_share).to(self.largest.device)
        place = random.uniform().to(self.largest.device)
        if settings.prior == "priority":  # p(t) in proportion to t: the inverse of its distribution function
            place = place.sqrt()
        steps = (place * self.largest).ceil().long()
        return torch.where(clean, torch.zeros_like(steps), steps)

    @torch.no_grad()
    def update(self, real_logits: Tensor) -> None:
        """Add up sign(D - 1/2), which is the logit's sign, averaged over regions, of all processes.

        At once, not in :meth:`step`: a checkpoint in between holds the buffers of one process for all.
        """
        signs = real_logits.detach().float().sign().mean(dim=(1, 2, 3))
        seen = torch.stack([signs.sum(), torch.full_like(signs[0], len(signs))])
        if is_one_of_several():
            dist.all_reduce(seen)
        self.observed += seen

    @torch.no_grad()
    def step(self) -> None:
        """Move the largest step by the images seen, up when r_d is above the target and down when below."""
        settings = self.config.adaptive
        signs, images = self.observed.clone()
        direction = (signs / images.clamp(min=1) - settings.target).sign() * (images > 0)
        change = direction * images / settings.images * (self.config.t_max - settings.t_initial)
        self.largest.add_(change).clamp_(settings.t_initial, self.config.t_max)
        self.observed.zero_()


def latent_noise(schedule: DiffusionSchedule, config: NoiseConfig, gain: float = 1.0) -> LatentNoise:
    """The noise that ``config`` describes, on latents multiplied with ``gain``."""
    kind = AdaptiveNoise if config.kind == "diffusion_gan" else LatentNoise
    return kind(schedule, config, gain)
