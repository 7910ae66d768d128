"""Reading a single-file checkpoint: all networks of a Stable Diffusion in one file, with the names of its first code.

The translation of names is diffusers' own. It is done on names alone, so that only what is used is read.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from onestepsr.core.errors import UserError
from onestepsr.models.stable_diffusion.config import SD21_BASE, SDXL_BASE, SDXL_SCALING, AutoencoderConfig, UNetConfig
from onestepsr.weights.foreign import LazyTensors, materialize, open_weights

UNET = "model.diffusion_model."
AUTOENCODER = "first_stage_model."
CROSS_ATTENTION = "transformer_blocks.0.attn2.to_k.weight"
KNOWN = {
    "Stable Diffusion 2.1-base": (SD21_BASE, AutoencoderConfig()),
    "SDXL base": (SDXL_BASE, AutoencoderConfig(scaling_factor=SDXL_SCALING)),
}
"""Models that such a file can hold: it says nothing of attention heads, so that its sizes have to be known."""


def open_checkpoint(path: Path) -> LazyTensors:
    """The file's tensors under their own names; :class:`UserError` if there is no diffusion UNet among them."""
    tensors = open_weights(path)
    if f"{UNET}input_blocks.0.0.weight" not in tensors:
        raise UserError(
            f"{path}: neither onestepsr weights nor a Stable Diffusion checkpoint (no weight "
            f"'{UNET}input_blocks.0.0.weight')"
        )
    return tensors


def detect(path: Path, tensors: LazyTensors) -> tuple[UNetConfig, AutoencoderConfig]:
    """Sizes of the networks in the file, recognised by the width of the UNet's cross-attention."""
    channels = tensors[f"{UNET}input_blocks.0.0.weight"]().shape[1]
    if channels != SD21_BASE.in_channels:
        raise UserError(f"{path}: a UNet of {channels} latent channels, expected {SD21_BASE.in_channels}")
    attention = next((key for key in tensors if key.startswith(UNET) and key.endswith(CROSS_ATTENTION)), None)
    width = tensors[attention]().shape[1] if attention is not None else 0
    for unet, autoencoder in KNOWN.values():
        if unet.cross_attention_dim == width:
            return unet, autoencoder
    accepted = ", ".join(f"{unet.cross_attention_dim} ({name})" for name, (unet, _) in KNOWN.items())
    raise UserError(f"{path}: a UNet of cross-attention width {width}, expected {accepted}")


def unet_weights(tensors: LazyTensors, config: UNetConfig) -> LazyTensors:
    """The UNet's tensors under diffusers' names."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    own = {key: key for key in tensors if key.startswith(UNET)}  # the names stand for their tensors
    names: dict[str, str | None] = convert_ldm_unet_checkpoint(own, _as_settings(config))
    return {key: tensors[name] for key, name in names.items() if name is not None}


def autoencoder_weights(path: Path, tensors: LazyTensors, config: AutoencoderConfig) -> LazyTensors:
    """The autoencoder's tensors under diffusers' names."""
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    own = {key: tensors[key]() for key in tensors if key.startswith(AUTOENCODER)}
    if not own:
        raise UserError(f"{path}: holds no autoencoder (no weights '{AUTOENCODER}*')")
    levels = [None] * len(config.block_out_channels)
    converted = convert_ldm_vae_checkpoint(own, {"down_block_types": levels, "up_block_types": levels})
    return {key: partial(materialize, value) for key, value in converted.items()}


def _as_settings(config: UNetConfig) -> dict[str, Any]:
    return {"layers_per_block": config.layers_per_block, "addition_embed_type": config.addition_embed_type}
