"""A SeeSR of some ten thousand parameters, and its folders as they are published."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from small_diffusion import AUTOENCODER, UNET, write_folder

from onestepsr.models.seesr.generator import SeeSRConfig, SeeSRGenerator, seesr_generator
from onestepsr.models.stable_diffusion.config import PromptConfig

CONFIG = SeeSRConfig(
    unet=UNET,
    autoencoder=AUTOENCODER,
    condition_channels=(8, 16),
    image_tokens=6,
    image_width=12,
    steps=4,
    prompt=PromptConfig(tokens=5),
)


def small_seesr(config: SeeSRConfig = CONFIG, seed: int = 0) -> SeeSRGenerator:
    """The same weights at every call; none of them is zero."""
    torch.manual_seed(seed)
    generator = seesr_generator(config).eval().requires_grad_(False)
    for parameter in generator.unet.parameters():
        torch.nn.init.normal_(parameter, std=0.08)
    torch.nn.init.normal_(generator.negative)
    return generator


def write_published(folder: Path, generator: SeeSRGenerator) -> tuple[Path, Path]:
    """SeeSR's folder with UNet and ControlNet, and that of Stable Diffusion, whose UNet is another."""
    own, base = folder / "seesr", folder / "sd2"
    write_folder(base)
    for name, network in (("unet", generator.denoiser.unet), ("controlnet", generator.denoiser.controlnet)):
        part = own / name
        part.mkdir(parents=True)
        settings = {key: value for key, value in network.config.items() if key[0] != "_"}
        extra = {"use_image_cross_attention": True, "_class_name": type(network).__name__}
        (part / "config.json").write_text(json.dumps(settings | extra))
        state = {key: value.contiguous() for key, value in network.state_dict().items()}
        save_file(state, part / "diffusion_pytorch_model.safetensors")
    return own, base
