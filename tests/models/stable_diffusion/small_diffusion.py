"""A Stable Diffusion of a few ten thousand parameters, and the files it may come in."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from onestepsr.models.stable_diffusion.config import AutoencoderConfig, StableDiffusionGeneratorConfig, UNetConfig

UNET = UNetConfig(
    block_out_channels=(32, 64),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    transformer_layers_per_block=(1, 1),
    attention_head_dim=(2, 4),
    cross_attention_dim=16,
    norm_num_groups=8,
)
AUTOENCODER = AutoencoderConfig(block_out_channels=(32, 64), layers_per_block=1)
GENERATOR = StableDiffusionGeneratorConfig(unet=UNET, autoencoder=AUTOENCODER, timestep=300)
XL = UNetConfig(
    **{
        **asdict(UNET),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2),
        "cross_attention_dim": 24,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 64,
    }
)


def diffusers_unet(config=UNET, seed=0):
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    return UNet2DConditionModel(**asdict(config)).eval().requires_grad_(False)


def diffusers_vae(config=AUTOENCODER, seed=1):
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    levels = len(config.block_out_channels)
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    return AutoencoderKL(**kinds, **asdict(config)).eval().requires_grad_(False)


def write_folder(folder: Path, *, shards: str | None = None, xl: bool = False):
    """A folder as diffusers itself writes it; returns its UNet and autoencoder."""
    unet, vae = diffusers_unet(XL if xl else UNET), diffusers_vae()
    unet.save_pretrained(folder / "unet", max_shard_size=shards or "1GB")
    vae.save_pretrained(folder / "vae")
    write_scheduler(folder)
    return unet, vae


def write_scheduler(folder: Path, **changes):
    (folder / "scheduler").mkdir(exist_ok=True)
    values = {
        "_class_name": "PNDMScheduler",
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
    }
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(values | changes), encoding="utf-8")


def change_settings(path: Path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def write_single_file(path: Path, unet, vae=None, **extra):
    """One checkpoint with the names of the first Stable Diffusion code."""
    tensors = {f"model.diffusion_model.{ldm_unet_name(key, unet)}": value for key, value in unet.state_dict().items()}
    if vae is not None:
        for key, value in vae.state_dict().items():
            name = ldm_vae_name(key, len(vae.config.block_out_channels))
            is_projection = ".attn_1." in name and value.ndim == 2
            tensors[f"first_stage_model.{name}"] = value[:, :, None, None] if is_projection else value
    tensors["cond_stage_model.model.positional_embedding"] = torch.zeros(3)  # a text encoder, of no use here
    tensors |= extra
    tensors = {key: value.contiguous() for key, value in tensors.items()}
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save({"state_dict": tensors, "global_step": 7}, path)


RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
OUTER = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def ldm_unet_name(key: str, unet) -> str:
    """The first code's name of a UNet tensor: numbered blocks instead of levels."""
    stem, kind = key.rsplit(".", 1)
    if stem in OUTER:
        return f"{OUTER[stem]}.{kind}"
    part, *rest = key.split(".")
    layers = unet.config.layers_per_block
    if part == "mid_block":
        block = "middle_block.1" if rest[0] == "attentions" else f"middle_block.{2 * int(rest[1])}"
        return f"{block}.{_inner(rest[0], rest[2:])}"
    level, member, index, *inner = rest
    if part == "down_blocks":
        first = 1 + int(level) * (layers + 1)
        if member == "downsamplers":
            return f"input_blocks.{first + layers}.0.op.{inner[-1]}"
        slot = 1 if member == "attentions" else 0
        return f"input_blocks.{first + int(index)}.{slot}.{_inner(member, inner)}"
    first = int(level) * (layers + 1)
    if member == "upsamplers":
        slot = 2 if "CrossAttn" in unet.config.up_block_types[int(level)] else 1
        return f"output_blocks.{first + layers}.{slot}.conv.{inner[-1]}"
    slot = 1 if member == "attentions" else 0
    return f"output_blocks.{first + int(index)}.{slot}.{_inner(member, inner)}"


def _inner(member: str, inner: list[str]) -> str:
    return ".".join([RESNET[inner[0]], *inner[1:]] if member == "resnets" else inner)


def ldm_vae_name(key: str, levels: int) -> str:
    """The first code's name of an autoencoder tensor."""
    side, _, rest = key.partition(".")
    if side not in ("encoder", "decoder"):
        return key
    rest = rest.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    for old, new in {
        "mid_block.resnets.0": "mid.block_1",
        "mid_block.resnets.1": "mid.block_2",
        "mid_block.attentions.0": "mid.attn_1",
        "group_norm": "norm",
        "to_q": "q",
        "to_k": "k",
        "to_v": "v",
        "to_out.0": "proj_out",
    }.items():
        rest = rest.replace(old, new)
    parts = rest.split(".")
    if parts[0] in ("down_blocks", "up_blocks"):
        level = int(parts[1]) if side == "encoder" else levels - 1 - int(parts[1])
        way = "down" if side == "encoder" else "up"
        if parts[2] == "resnets":
            return f"{side}.{way}.{level}.block.{'.'.join(parts[3:])}"
        return f"{side}.{way}.{level}.{way}sample.conv.{parts[-1]}"
    return f"{side}.{rest}"
