"""Sizes of Stable Diffusion networks, as data: the published models and whatever a diffusers folder describes.

Field names are those of diffusers' ``config.json``, so that a folder's file and ours can be read side by side.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, Self

from onestepsr.models.generators import OneStepConfig

SD_SCALING = 0.18215
"""Factor that gives the latents of Stable Diffusion 1 and 2 about unit variance."""
SDXL_SCALING = 0.13025
"""The same for Stable Diffusion XL's own autoencoder."""
SIZE_IDS = 6
"""Numbers that tell SDXL its sizes: original height and width, crop top and left, target height and width."""

DownBlock = Literal["DownBlock2D", "CrossAttnDownBlock2D"]
UpBlock = Literal["UpBlock2D", "CrossAttnUpBlock2D"]


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """Sizes of a UNet; the defaults are those of Stable Diffusion 2.1-base (865,910,724 parameters)."""

    in_channels: int = 4
    """Channels of the latents."""
    out_channels: int = 4
    """Channels of the predicted noise."""
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    """Channels by level; every level but the last halves the resolution."""
    down_block_types: tuple[DownBlock, ...] = (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D")
    """Kind of every level on the way down: with or without attention."""
    up_block_types: tuple[UpBlock, ...] = ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3)
    """Kind of every level on the way up, the coarsest first."""
    layers_per_block: int = 2
    """Residual blocks by level on the way down; one more on the way up."""
    transformer_layers_per_block: tuple[int, ...] = (1, 1, 1, 1)
    """Transformer blocks behind every residual block, by level."""
    attention_head_dim: tuple[int, ...] = (5, 10, 20, 20)
    """Number of attention heads by level; diffusers keeps the misleading name for the sake of old files."""
    cross_attention_dim: int = 1024
    """Channels of a prompt token."""
    use_linear_projection: bool = True
    """Linear layers as projections around a transformer; convolutions in Stable Diffusion 1."""
    norm_num_groups: int = 32
    """Groups of every group norm."""
    upcast_attention: bool = False
    """Asks for attention in float32; kept for the record, PyTorch's fused attention accumulates in float32 anyway."""
    addition_embed_type: Literal["text_time"] | None = None
    """``text_time``: the network also takes a pooled text embedding and size ids, as SDXL does."""
    addition_time_embed_dim: int | None = None
    """Width of the embedding of one size id."""
    projection_class_embeddings_input_dim: int | None = None
    """Width of the pooled text embedding and all size ids together."""

    def __post_init__(self) -> None:
        levels = {len(self.block_out_channels), len(self.down_block_types), len(self.up_block_types)}
        levels |= {len(self.transformer_layers_per_block), len(self.attention_head_dim)}
        if len(levels) != 1 or 0 in levels:
            raise ValueError("a UNet's channels, block types, transformer layers and heads need one entry per level")
        if self.in_channels != self.out_channels:
            raise ValueError(
                f"the UNet takes {self.in_channels} channels and predicts {self.out_channels}: expected a plain "
                "text-to-image UNet, not one for inpainting or with predicted variances"
            )
        if self.addition_embed_type and self.pooled_width < 1:
            raise ValueError(
                "text_time needs addition_time_embed_dim and a larger projection_class_embeddings_input_dim"
            )

    @property
    def pooled_width(self) -> int:
        """Channels of the pooled text embedding; 0 without one."""
        if not self.addition_embed_type:
            return 0
        sizes = SIZE_IDS * (self.addition_time_embed_dim or 0)
        return (self.projection_class_embeddings_input_dim or 0) - sizes if sizes else 0


SD21_BASE = UNetConfig()
"""Stable Diffusion 2.1-base."""
SDXL_BASE = UNetConfig(
    block_out_channels=(320, 640, 1280),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    transformer_layers_per_block=(1, 2, 10),
    attention_head_dim=(5, 10, 20),
    cross_attention_dim=2048,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)
"""Stable Diffusion XL base 1.0 (2,567,463,684 parameters)."""


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """Sizes of the KL autoencoder; the defaults are those of Stable Diffusion 1 and 2 (83,653,863 parameters)."""

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    """Channels by level; every level but the last halves the resolution."""
    layers_per_block: int = 2
    """Residual blocks by level of the encoder; one more in the decoder."""
    latent_channels: int = 4
    """Channels of the latents."""
    norm_num_groups: int = 32
    """Groups of every group norm."""
    scaling_factor: float = SD_SCALING
    """Factor on a latent before diffusion."""

    def __post_init__(self) -> None:
        if not self.block_out_channels or self.scaling_factor <= 0:
            raise ValueError("an autoencoder needs block_out_channels and a positive scaling_factor")


@dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """The learnable embedding that takes the text encoder's place, when it is not read from a file."""

    tokens: int = 77
    """Length. The paper says only that there is one embedding; 77 is the length that the attention was trained with."""
    std: float = 1.0
    """Standard deviation of its random start. Text encoders end in a layer norm, so tokens of about unit variance are
    what the attention knows; equal tokens, such as zeros (0), would stay equal in training and act as a single one."""
    seed: int = 0
    """Of the random start."""

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.std < 0:
            raise ValueError(f"a prompt needs at least 1 token and a std of 0 or more, got {self}")


@dataclass(frozen=True, kw_only=True)
class StableDiffusionGeneratorConfig(OneStepConfig):
    """Everything that fixes a generator on a Stable Diffusion backbone, apart from its weights."""

    unet: UNetConfig = SD21_BASE
    """Sizes of the UNet."""
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    """Sizes of the autoencoder."""
    prompt: PromptConfig = field(default_factory=PromptConfig)
    """The learnable prompt embedding."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.unet.in_channels != self.autoencoder.latent_channels:
            raise ValueError(
                f"the UNet takes {self.unet.in_channels} latent channels, the autoencoder gives "
                f"{self.autoencoder.latent_channels}: they are not of one model"
            )
        if self.unet.addition_embed_type:
            raise ValueError(
                f"the UNet has a cross-attention width of {self.unet.cross_attention_dim} and expects pooled text and "
                f"sizes, as SDXL does: a generator needs one like Stable Diffusion 2.1-base (width "
                f"{SD21_BASE.cross_attention_dim}); SDXL can be the discriminator's backbone"
            )

    def with_prompt_tokens(self, tokens: int) -> Self:
        """The same with a prompt embedding of another length."""
        return replace(self, prompt=replace(self.prompt, tokens=tokens))


@dataclass(frozen=True, kw_only=True)
class SDXLConditioning:
    """Choices that D3SR leaves open for SDXL as judge of Stable Diffusion 2.1's latents; no effect on other UNets."""

    latent_scale: Literal["as_is", "rescaled"] = "as_is"
    """``as_is`` shows the latents with the scale (0.18215) that gives them unit variance, which the noise levels of any
    diffusion process assume; ``rescaled`` multiplies the raw latents with SDXL's own factor (0.13025) instead, which
    leaves them 0.715 times as large. Both spaces differ anyway; only the adapters can bridge that."""
    size: Literal["actual", "fixed"] = "actual"
    """Size ids: those of the image that the latents stand for, 8 times as large, or always ``fixed_side``."""
    fixed_side: int = 1024
    """Side in the size ids with ``size: fixed``; SDXL was trained at 1024."""
    prompt_tokens: int = 77
    """Length of the learnable prompt embedding, as SDXL was trained with."""
    prompt_std: float = 0.0
    """Standard deviation of its random start. 0, because SDXL was trained with zeros for "no text", for the tokens as
    for the pooled embedding; equal tokens stay equal in training, so that they act as a single one."""

    def __post_init__(self) -> None:
        if self.fixed_side < 1 or self.prompt_tokens < 1 or self.prompt_std < 0:
            raise ValueError(
                f"need fixed_side and prompt_tokens of at least 1 and prompt_std of at least 0, got {self}"
            )


@dataclass(frozen=True, kw_only=True)
class StableDiffusionEncoderConfig:
    """The half UNet of a discriminator, apart from its weights."""

    unet: UNetConfig = SD21_BASE
    """Sizes of the whole UNet that it is the half of."""
    sdxl: SDXLConditioning = field(default_factory=SDXLConditioning)
    """Conditioning of an SDXL UNet."""
