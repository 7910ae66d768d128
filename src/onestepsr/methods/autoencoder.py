"""Pretraining, stage one: the KL autoencoder of a small backbone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

from torch import Tensor, nn

from onestepsr.config import to_mapping
from onestepsr.methods.base import Batch, Exported, Method, MethodEntry, Networks, Phase, SampleRandom, register
from onestepsr.models.tiny import TinyAutoencoder, TinyConfig


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """The network and the weights of its losses."""

    model: TinyConfig = field(default_factory=TinyConfig)
    """Sizes of the backbone; the UNet's part is not used here."""
    kl_weight: float = 1e-4
    """Weight of the Kullback-Leibler term, in nats per latent value against a reconstruction error in [-1, 1]."""

    def __post_init__(self) -> None:
        if self.kl_weight < 0:
            raise ValueError(f"kl_weight must not be negative, got {self.kl_weight}")


def build(config: AutoencoderConfig) -> Method:
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


register(
    MethodEntry(
        name="autoencoder",
        summary="KL autoencoder of a small backbone (pretraining, stage 1)",
        config=AutoencoderConfig,
        build=build,
        needs_lr=False,
    )
)
