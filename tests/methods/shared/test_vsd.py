"""Layers with adapters in OSEDiff's UNets."""

from small_diffusion import GENERATOR

from onestepsr.methods.shared.vsd import unet_adapters
from onestepsr.models.architectures import random_backbone
from onestepsr.models.lora import LoraConfig
from onestepsr.models.osediff.generator import UNET_LAYERS
from onestepsr.models.stable_diffusion.networks import stable_diffusion_generator


def test_osediffs_layers_where_a_stable_diffusion_is_told_none() -> None:
    unet, tiny = stable_diffusion_generator(GENERATOR).unet, random_backbone("random:d3sr-tiny").unet
    own = LoraConfig(rank=2, alpha=3.0, targets="mine")
    assert unet_adapters(unet, own) is own
    assert unet_adapters(unet, LoraConfig(rank=2, alpha=3.0)) == LoraConfig(rank=2, alpha=3.0, targets=UNET_LAYERS)
    assert unet_adapters(tiny, LoraConfig(rank=2)) == LoraConfig(rank=2)
