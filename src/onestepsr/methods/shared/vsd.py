"""Variational score distillation as an adversarial term on latents: OSEDiff's regulariser and its teacher.

The teacher is the frozen backbone under guidance. The regulariser is the same backbone under adapters that learn to
predict the noise on latents of the generator; it is trained after the generator, on the same latents.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Literal, cast

import torch
from torch import Tensor, nn

from onestepsr.core.errors import UserError
from onestepsr.losses.distillation import guided, noise_prediction_loss, variational_gradient, variational_loss
from onestepsr.methods.base import Batch, Networks, SampleRandom
from onestepsr.methods.shared.adversarial import AdversarialTerm, GeneratorOutput
from onestepsr.models.lora import LoraConfig, add_lora, copy_sharing_weights
from onestepsr.models.osediff.generator import FIRST_LAYER, UNET_LAYERS, OSEDiffGenerator
from onestepsr.models.stable_diffusion.networks import StableDiffusionUNet

REGULARIZER, TEACHER = "regularizer", "teacher"
"""Names of the two networks in :class:`onestepsr.methods.base.Method`."""


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(LoraConfig):
    """Low-rank adapters with OSEDiff's numbers."""

    rank: int = 4
    """Rank of the update."""
    alpha: float = 8.0
    """Scaling numerator. The published code does not set it, so that it is peft's default and the update enters with
    factor 2."""


@dataclass(frozen=True, kw_only=True)
class VariationalConfig:
    """Both networks of variational score distillation; the defaults are the published code's."""

    weight: float = 1.0
    """Weight of the distillation term in the generator's loss."""
    t_min: int = 20
    """Smallest step to which latents are noised for the generator's term."""
    t_max: int = 979
    """Largest one."""
    guidance: float = 7.5
    """Scale of classifier-free guidance of the teacher, used where there is a negative prompt; 1 leaves it out."""
    tuning: Literal["lora", "full"] = "lora"
    """Training of the regulariser: adapters, as published, or all of its parameters."""
    lora: AdapterConfig = field(default_factory=AdapterConfig)
    """The regulariser's adapters, used with ``tuning: lora``."""
    regularizer_weight: float = 1.0
    """Weight of the regulariser's own loss."""
    regularizer_t_min: int = 0
    """Smallest step at which the regulariser learns."""
    regularizer_t_max: int = 999
    """Largest one."""
    start: int = 0
    """First iteration of both; before it the generator trains on the other terms alone. 0 in the published code, whose
    generator starts from a good image; that of a small backbone has to find one first."""

    def __post_init__(self) -> None:
        for name in ("t", "regularizer_t"):
            low, high = getattr(self, f"{name}_min"), getattr(self, f"{name}_max")
            if not 0 <= low <= high:
                raise ValueError(f"need 0 <= {name}_min <= {name}_max, got {low} and {high}")
        if min(self.weight, self.regularizer_weight, self.guidance, self.start) < 0:
            raise ValueError("weights, guidance and start must not be negative")


class GuidedTeacher(nn.Module):
    """A frozen UNet under classifier-free guidance."""

    negative: Tensor | None

    def __init__(self, unet: nn.Module, negative: Tensor | None, scale: float) -> None:
        """``negative`` (1, L, C) is the negative prompt; without one there is no guidance."""
        super().__init__()
        self.unet, self.scale = unet, scale
        self.register_buffer("negative", negative, persistent=False)

    def forward(self, z_t: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
        """Predicted noise, shaped like ``z_t`` (N, C, h, w), at steps ``t`` (N,), under ``prompt`` (1 or N, L, C)."""
        if self.negative is None or self.scale == 1.0:
            return cast(Tensor, self.unet(z_t, t, prompt))
        count = len(z_t)
        prompts = torch.cat([side.expand(count, -1, -1) for side in (self.negative.to(prompt), prompt)])
        both = self.unet(torch.cat([z_t, z_t]), torch.cat([t, t]), prompts)  # one evaluation for both
        eps_negative, eps_positive = both.chunk(2)
        return guided(eps_negative, eps_positive, self.scale)


def build_pair(
    generator: OSEDiffGenerator, config: VariationalConfig, negative: Tensor | None, *, share: bool
) -> tuple[nn.Module, GuidedTeacher]:
    """Regulariser and teacher from ``generator``'s UNet, which must not have adapters yet.

    With ``share`` their frozen layers are the generator's own: three networks in the memory of one.
    """
    last = generator.schedule.steps - 1
    if max(config.t_max, config.regularizer_t_max) > last:
        raise UserError(
            f"config.vsd: steps up to {max(config.t_max, config.regularizer_t_max)}, the last one is {last}"
        )
    teacher = GuidedTeacher(_copied(generator.unet, share=share), negative, config.guidance)
    regularizer = _copied(generator.unet, share=share and config.tuning == "lora")
    if config.tuning == "lora":
        add_lora(regularizer, unet_adapters(regularizer, config.lora))
    else:
        regularizer.requires_grad_(True)
    return regularizer, teacher


def unet_adapters(unet: nn.Module, lora: LoraConfig) -> LoraConfig:
    """``lora`` with OSEDiff's layers on a Stable Diffusion where it names none; other networks know their own."""
    if lora.targets is not None or not isinstance(unet, StableDiffusionUNet):
        return lora
    return LoraConfig(rank=lora.rank, alpha=lora.alpha, targets=UNET_LAYERS)


def variational_term(generator: OSEDiffGenerator, config: VariationalConfig) -> AdversarialTerm:
    """The distillation term of the generator's loss, and the regulariser's loss on the latents in the batch's ``z_sr``.

    Both networks are under the prompt of each image (the batch's ``prompt``), or under the generator's own.
    """
    schedule = generator.schedule

    def prompt_of(given: Tensor | None) -> Tensor:
        return generator.prompt.detach() if given is None else given

    def generator_loss(networks: Networks, output: GeneratorOutput, random: SampleRandom) -> Tensor:
        z, prompt = output.z_sr, prompt_of(output.prompt)
        with torch.no_grad():
            t = random.integers(config.t_min, config.t_max + 1).to(z.device)
            z_t = schedule.add_noise(z, random.normal(z), t)
            teacher, regularizer = (
                schedule.x0_from_eps(z_t, networks[name](z_t, t, prompt), t) for name in (TEACHER, REGULARIZER)
            )
            gradient = variational_gradient(z, teacher, regularizer)
        return config.weight * variational_loss(z, gradient)

    def discriminator_loss(networks: Networks, batch: Batch, random: SampleRandom) -> dict[str, Tensor]:
        z, prompt = batch["z_sr"], prompt_of(batch.get("prompt"))
        t = random.integers(config.regularizer_t_min, config.regularizer_t_max + 1).to(z.device)
        noise = random.normal(z)
        eps = networks[REGULARIZER](schedule.add_noise(z, noise, t), t, prompt)
        return {"eps": config.regularizer_weight * noise_prediction_loss(eps, noise)}

    return AdversarialTerm(
        network=REGULARIZER,
        name="vsd",
        start=config.start,
        generator_loss=generator_loss,
        discriminator_loss=discriminator_loss,
    )


def _copied(unet: nn.Module, *, share: bool) -> nn.Module:
    return copy_sharing_weights(unet, own=FIRST_LAYER) if share else copy.deepcopy(unet)
