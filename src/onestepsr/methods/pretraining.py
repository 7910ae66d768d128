"""Pretraining of a small backbone: a KL autoencoder, then an eps-predicting UNet on HR latents, the diffusion prior."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from onestepsr.core.config import to_mapping
from onestepsr.core.errors import UserError
from onestepsr.methods.base import Batch, Exported, Method, Networks, Phase, SampleRandom, register
from onestepsr.models.discriminators import PromptedUNet
from onestepsr.models.loading import load_network
from onestepsr.models.tiny.generator import TinyGeneratorConfig, tiny_generator
from onestepsr.models.tiny.networks import TinyAutoencoder, TinyConfig

# ---- Stage one: autoencoder ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """Sizes of the network and weight of its loss."""

    model: TinyConfig = field(default_factory=TinyConfig)
    """Sizes of the backbone; the UNet's part is not used here."""
    kl_weight: float = 1e-4
    """Weight of the Kullback-Leibler term, in nats per latent value against a reconstruction error in [-1, 1]."""

    def __post_init__(self) -> None:
        if self.kl_weight < 0:
            raise ValueError(f"kl_weight must not be negative, got {self.kl_weight}")


@register("autoencoder", AutoencoderConfig, needs_lr=False)
def build_autoencoder(config: AutoencoderConfig) -> Method:
    """One network, one phase: L1 reconstruction through a sampled posterior, plus KL."""

    def loss(networks: Networks, batch: Batch, random: SampleRandom) -> dict[str, Tensor]:
        x = batch["hr"] * 2 - 1
        n, _, height, width = x.shape
        sides = (height // TinyAutoencoder.factor, width // TinyAutoencoder.factor)
        noise = random.normal(x.new_empty(n, config.model.latent_channels, *sides))
        reconstruction, mean, log_variance = networks["autoencoder"](x, noise)
        kl = 0.5 * (mean.square().mean(dim=(0, 2, 3)) + log_variance.exp() - 1 - log_variance).mean()
        return {"l1": (reconstruction - x).abs().mean(), "kl": config.kl_weight * kl}

    def preview(networks: Networks, batch: Batch) -> dict[str, Tensor]:
        reconstruction = networks["autoencoder"](batch["hr"] * 2 - 1)[0]
        return {"SR": (reconstruction * 0.5 + 0.5).clamp(0, 1), "HR": batch["hr"]}

    def export(networks: Mapping[str, nn.Module]) -> Exported:
        network = cast(TinyAutoencoder, networks["autoencoder"])
        return Exported(
            state_dict=network.state_dict(), architecture="tiny-autoencoder", config=to_mapping(network.config)
        )

    return Method(
        networks={"autoencoder": TinyAutoencoder(config.model)},
        phases=(Phase(network="autoencoder", loss=loss),),
        ema=("autoencoder",),
        preview=preview,
        export=export,
        hr_multiple=TinyAutoencoder.factor,
    )


# ---- Stage two: diffusion --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """The autoencoder to build on and the UNet to train."""

    autoencoder: Path
    """Weights from the ``autoencoder`` method; they stay frozen and set the sizes of the latent."""
    backbone: TinyGeneratorConfig = field(default_factory=TinyGeneratorConfig)
    """UNet sizes and schedule (autoencoder sizes are taken from the weights)."""


UNET_SIZES = ("widths", "down_blocks", "up_blocks", "time_width", "prompt_tokens", "prompt_width")
"""Fields of :class:`TinyConfig` that ``backbone`` decides; the autoencoder's own configuration gives all others."""


@register("diffusion", DiffusionConfig, needs_lr=False)
def build_diffusion(config: DiffusionConfig) -> Method:
    """One network, one phase: mean squared error of the predicted noise at uniformly drawn steps."""
    autoencoder = load_network(config.autoencoder)
    if not isinstance(autoencoder, TinyAutoencoder):
        raise UserError(f"{config.autoencoder}: holds a {type(autoencoder).__name__}, expected a tiny autoencoder")
    sizes = {name: getattr(config.backbone.model, name) for name in UNET_SIZES}
    backbone = replace(config.backbone, model=replace(autoencoder.config, **sizes))
    generator = tiny_generator(backbone)
    generator.autoencoder.load_state_dict(autoencoder.state_dict())
    schedule = generator.schedule

    def loss(networks: Networks, batch: Batch, random: SampleRandom) -> dict[str, Tensor]:
        with torch.no_grad():
            z = generator.encode(batch["hr"])
        t = random.integers(0, schedule.steps)
        noise = random.normal(z)
        eps = networks["unet"](schedule.add_noise(z, noise, t), t.to(z.device))
        return {"eps": (eps - noise).square().mean()}

    def preview(networks: Networks, batch: Batch) -> dict[str, Tensor]:
        """Noise HR latents to an intermediate step and denoise them in one evaluation."""
        z = generator.encode(batch["hr"])
        rng = torch.Generator().manual_seed(0)
        t = torch.full((z.shape[0],), backbone.timestep, device=z.device)
        z_t = schedule.add_noise(z, torch.randn(z.shape, generator=rng).to(z), t)
        denoised = schedule.x0_from_eps(z_t, networks["unet"](z_t, t), t)
        columns = {"noised": generator.decode(z_t), "denoised": generator.decode(denoised), "HR": batch["hr"]}
        return {title: image.clamp(0, 1) for title, image in columns.items()}

    def export(networks: Mapping[str, nn.Module]) -> Exported:
        trained = networks["unet"].state_dict()
        state = {f"autoencoder.{key}": value for key, value in generator.autoencoder.state_dict().items()} | trained
        return Exported(state_dict=state, architecture="tiny-latent-diffusion", config=to_mapping(backbone))

    return Method(
        networks={"unet": PromptedUNet(generator.unet, generator.prompt)},
        frozen={"autoencoder": generator.autoencoder},
        phases=(Phase(network="unet", loss=loss),),
        ema=("unet",),
        preview=preview,
        export=export,
        hr_multiple=generator.scale * generator.lr_multiple,
    )
