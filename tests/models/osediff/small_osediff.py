"""OSEDiff on the Stable Diffusion of a few ten thousand parameters, with adapters that have learnt something."""

from dataclasses import replace

import torch
from small_diffusion import AUTOENCODER, UNET

from onestepsr.models.lora import LoraConfig, add_lora
from onestepsr.models.osediff.generator import (
    ENCODER_LAYERS,
    UNET_LAYERS,
    OSEDiffGenerator,
    OSEDiffGeneratorConfig,
    osediff_generator,
)

CONFIG = OSEDiffGeneratorConfig(unet=UNET, autoencoder=AUTOENCODER)


def plain(seed: int = 0, **changes) -> OSEDiffGenerator:
    """A backbone, the same one for equal seeds."""
    torch.manual_seed(seed)
    return osediff_generator(replace(CONFIG, **changes)).eval().requires_grad_(False)


def adapted(rank: int = 4, alpha: float = 8.0) -> OSEDiffGenerator:
    """The same under adapters of peft whose B is not zero, with another first convolution."""
    generator = plain()
    add_lora(generator.unet, LoraConfig(rank=rank, alpha=alpha, targets=UNET_LAYERS))
    add_lora(generator.autoencoder, LoraConfig(rank=rank, alpha=alpha, targets=ENCODER_LAYERS))
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in generator.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
            elif "unet.conv_in.base_layer" in name:
                parameter.add_(0.01 * torch.randn_like(parameter))
    return generator


def photo(side: int = 8) -> torch.Tensor:
    return torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
