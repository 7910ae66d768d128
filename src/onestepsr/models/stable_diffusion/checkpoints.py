"""Reading Stable Diffusion from a diffusers folder or from a single-file checkpoint.

Only what a one-step generator or a discriminator needs is read, and nothing is ever fetched.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from onestepsr.core.config import from_mapping, read_mapping
from onestepsr.core.errors import UserError
from onestepsr.diffusion.schedule import DiffusionScheduleConfig
from onestepsr.models.stable_diffusion.config import (
    SD21_BASE,
    SDXL_BASE,
    SDXL_SCALING,
    AutoencoderConfig,
    StableDiffusionGeneratorConfig,
    UNetConfig,
)
from onestepsr.weights.files import LazyTensors, foreign_weights, materialize, open_weights

# ---- a diffusers folder: unet/, vae/ and scheduler/, each a config.json beside its weights ----

WEIGHTS = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.bin.index.json",
)
"""Names under which diffusers stores a network's weights, in the order in which they are looked for."""
NEUTRAL = ("sample_size", "force_upcast")
"""Settings that change no weight and no output."""
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Names of the autoencoder's attention layers in files from before 2023, and their present names."""


def read_generator_config(folder: Path) -> StableDiffusionGeneratorConfig:
    """Sizes and schedule of the UNet and the autoencoder in ``folder``; :class:`UserError` if no generator can use
    them."""
    schedule = _read_schedule(folder)
    values = {"unet": read_unet_config(folder), "autoencoder": _read_autoencoder_config(folder), "schedule": schedule}
    return from_mapping(StableDiffusionGeneratorConfig, values, str(folder))


def read_unet_config(folder: Path) -> UNetConfig:
    """Sizes of the UNet in ``folder``."""
    from diffusers import UNet2DConditionModel

    path = unet_folder(folder) / "config.json"
    values = _known_settings(path, UNet2DConditionModel, UNetConfig)
    levels = len(values.get("block_out_channels", UNetConfig().block_out_channels))
    for name in ("attention_head_dim", "transformer_layers_per_block"):
        if isinstance(values.get(name), int):
            values[name] = [values[name]] * levels
    return from_mapping(UNetConfig, values, str(path))


def unet_folder(folder: Path) -> Path:
    """The UNet's part of a diffusers folder, which may itself be only that part."""
    part = folder / "unet"
    return part if part.is_dir() else folder


def read_folder_weights(folder: Path) -> LazyTensors:
    """Tensors of one network: from one file, or from the shards that an index names; old names are made new."""
    for name in WEIGHTS:
        path = folder / name
        if path.is_file():
            tensors = _open_shards(path) if path.suffix == ".json" else open_weights(path)
            return {_present_name(key): read for key, read in tensors.items()}
    raise UserError(f"{folder}: no weights; looked for {', '.join(WEIGHTS)}")


def _open_shards(index: Path) -> LazyTensors:
    files = read_mapping(index).get("weight_map")
    if not isinstance(files, Mapping) or not all(isinstance(name, str) for name in files.values()):
        raise UserError(f"{index}: not an index of shards (no 'weight_map')")
    shards: dict[str, LazyTensors] = {}
    for name in sorted(set(files.values())):
        if Path(name).name != name:
            raise UserError(f"{index}: shard '{name}' is not a file of the same folder")
        shards[name] = open_weights(index.parent / name)
    for key, name in files.items():
        if key not in shards[name]:
            raise UserError(f"{index.parent / name}: no weight '{key}', which the index places there")
    return {key: shards[name][key] for key, name in files.items()}


def _present_name(key: str) -> str:
    return re.sub(r"(?<=attentions\.0\.)(query|key|value|proj_attn)(?=\.)", lambda found: OLD_ATTENTION[found[1]], key)


def _read_autoencoder_config(folder: Path) -> AutoencoderConfig:
    from diffusers import AutoencoderKL

    path = folder / "vae" / "config.json"
    values = _known_settings(path, AutoencoderKL, AutoencoderConfig, ("down_block_types", "up_block_types"))
    return from_mapping(AutoencoderConfig, values, str(path))


def _read_schedule(folder: Path) -> DiffusionScheduleConfig:
    """The schedule the UNet was trained with; it must predict noise."""
    path = folder / "scheduler" / "scheduler_config.json"
    values = read_mapping(path)
    predicted = values.get("prediction_type", "epsilon")
    if predicted != "epsilon":
        raise UserError(f"{path}: prediction type '{predicted}', expected 'epsilon' (Stable Diffusion 2.1-base has it)")
    if values.get("beta_schedule") != "scaled_linear":
        raise UserError(f"{path}: beta schedule '{values.get('beta_schedule')}', expected 'scaled_linear'")
    names = {"num_train_timesteps": "steps", "beta_start": "beta_start", "beta_end": "beta_end"}
    known = {ours: values[theirs] for theirs, ours in names.items() if theirs in values}
    return from_mapping(DiffusionScheduleConfig, known, str(path))


def _known_settings(path: Path, network: Any, config: Any, implied: Collection[str] = ()) -> dict[str, Any]:
    """Settings of a ``config.json`` that ``config`` has fields for; all others must have their neutral value."""
    fields = {field.name for field in dataclasses.fields(config)}
    defaults = {name: parameter.default for name, parameter in inspect.signature(network.__init__).parameters.items()}
    found: dict[str, Any] = {}
    for name, value in read_mapping(path).items():
        if name in fields:
            found[name] = value
        elif name in defaults and name not in (*NEUTRAL, *implied) and (value or None) != (defaults[name] or None):
            raise UserError(f"{path}: {name} {value!r} is not supported, expected {defaults[name]!r}")
    return {name: value for name, value in found.items() if value is not None}


# ---- a single-file checkpoint: all networks in one file, with the names of Stable Diffusion's first code ----

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
        neither = (
            f"neither onestepsr weights nor a Stable Diffusion checkpoint (no weight '{UNET}input_blocks.0.0.weight')"
        )
        raise UserError(f"{path}: {foreign_weights(tensors) or neither}")
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
    """The UNet's tensors under diffusers' names; translated on names alone, so that only what is used is read."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    own = {key: key for key in tensors if key.startswith(UNET)}  # the names stand for their tensors
    settings = {"layers_per_block": config.layers_per_block, "addition_embed_type": config.addition_embed_type}
    names: dict[str, str | None] = convert_ldm_unet_checkpoint(own, settings)
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
