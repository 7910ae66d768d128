"""Stable Diffusion's networks through diffusers, in the shape that generators and discriminators need.

Images are (N, 3, H, W) in [-1, 1] and latents (N, 4, H/8, W/8) here. Parameter names below ``vae`` and ``unet`` are
those of diffusers. Everything can be built under ``torch.device("meta")``.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, cast

import torch
from torch import Tensor, nn

from onestepsr.models.generators import (
    LatentAutoencoder,
    LatentUNet,
    NetworkCost,
    OneStepLatentGenerator,
    one_step_generator,
)
from onestepsr.models.stable_diffusion.config import (
    SD_SCALING,
    SDXL_SCALING,
    AutoencoderConfig,
    PromptConfig,
    StableDiffusionEncoderConfig,
    StableDiffusionGeneratorConfig,
    UNetConfig,
)
from onestepsr.models.stable_diffusion.inference import speed_up

LORA_TARGETS = r"unet\.(down_blocks|mid_block|up_blocks)\..*"
"""Layers that get adapters: every linear layer and convolution inside the blocks.

The paper gives rank 16, alpha 16 and 966.3 M parameters in total, not the layers. With Stable Diffusion 2.1-base
(949.565 M with its autoencoder) and a prompt of 77 tokens (0.079 M), rank 16 on

- attention alone is 3,319,808; with projections 4,118,528; with feed-forward 6,914,048;
- all of these and every convolution 16,222,848 (258 layers), 965.866 M: the set of OSEDiff, in whose released weights
  (rank 4: 4,055,712) the names can be read;
- every layer inside the blocks 16,944,128 (278 layers), 966.588 M: as before with the time projections of the residual
  blocks, without the first and last convolution of the UNet. The choice here;
- every layer there is 17,062,528 (282 layers), 966.706 M.

The last three lie within 0.5 M of the paper's total. With the chosen one, and no other of these, a common profiler
prints the paper's 966.3 M and 2,132 G in every digit (``docs/results/complexity.md``).
"""
MEMORY_PER_PIXEL, LEAN_MEMORY_PER_PIXEL = 4000.0, 3400.0
ENCODER_MEMORY, LEAN_ENCODER_MEMORY = 2850.0, 1750.0
DECODER_MEMORY, LEAN_DECODER_MEMORY = 3800.0, 3200.0
"""Peak bytes of the published autoencoder per image pixel in float32, as diffusers wrote it and for inference: of a
whole generator, of encoding, of decoding.

Measured once as growth of the peak resident size at 512 x 512 with random weights on a CPU, the second number for
inference: encoding 2640, 1617; decoding 3614, 2937, which with a UNet after an encoder is 3276; in bfloat16 encoding
1370, 847; decoding 1866, 1543. Its attention over all positions adds nothing that grows faster than the image,
because neither way of computing it ever holds the matrix of all pairs.
"""
MEMORY_PER_POSITION = 75_000.0
"""Peak bytes of the published UNet per latent position in float32, likewise: 73,503, and 37,448 in bfloat16."""
UNET_BREAKEVEN, ENCODER_BREAKEVEN, DECODER_BREAKEVEN = 11_700.0, 80_000.0, 118_000.0
"""Latent positions of a tile at which attention over all of them takes as long as everything else.

From ``python scripts/stages.py random:sd21-base 48 64 80 96 128 160`` in bfloat16, two threads of an AMD EPYC
without AMX.
"""


class StableDiffusionAutoencoder(LatentAutoencoder):
    """The KL autoencoder of Stable Diffusion: deterministic (posterior mean), latents scaled to about unit variance."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        from diffusers import AutoencoderKL

        levels = len(config.block_out_channels)
        self.config = config
        self.factor = 2 ** (levels - 1)
        self.latent_channels = config.latent_channels
        self._is_lean = False
        self.vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            **dataclasses.asdict(config),
        )

    def encode(self, x: Tensor) -> Tensor:
        """Scaled posterior mean (N, C, H/8, W/8) of ``x`` (N, 3, H, W) in [-1, 1], sides multiples of 8."""
        return cast(Tensor, self.vae.encode(x).latent_dist.mode()) * self.config.scaling_factor

    def decode(self, z: Tensor) -> Tensor:
        """Image (N, 3, 8h, 8w) in about [-1, 1] of a scaled latent (N, C, h, w)."""
        return cast(Tensor, self.vae.decode(z / self.config.scaling_factor, return_dict=False)[0])

    def memory_per_pixel(self, dtype: torch.dtype) -> float:
        """Peak bytes per image pixel without gradients, in proportion to the widest feature maps."""
        return (LEAN_MEMORY_PER_PIXEL if self._is_lean else MEMORY_PER_PIXEL) * self._published_share(dtype)

    def network_costs(self, dtype: torch.dtype) -> tuple[NetworkCost, NetworkCost]:
        """Cost of encoder and decoder."""
        share = self.factor**2 * self._published_share(dtype)
        encoder = LEAN_ENCODER_MEMORY if self._is_lean else ENCODER_MEMORY
        decoder = LEAN_DECODER_MEMORY if self._is_lean else DECODER_MEMORY
        return (
            NetworkCost(bytes_per_position=share * encoder, attention_breakeven=ENCODER_BREAKEVEN),
            NetworkCost(bytes_per_position=share * decoder, attention_breakeven=DECODER_BREAKEVEN),
        )

    def _published_share(self, dtype: torch.dtype) -> float:
        """Bytes of feature maps over those of the published widths in float32."""
        return self.config.block_out_channels[0] / AutoencoderConfig().block_out_channels[0] * dtype.itemsize / 4

    def enable_gradient_checkpointing(self) -> None:
        """Compute activations again in the backward pass instead of keeping them."""
        self.vae.enable_gradient_checkpointing()

    def speed_up(self) -> None:
        """Compute in less memory, and faster on a CPU in bfloat16, for inference; parameters and their names stay."""
        speed_up(self.vae)
        self._is_lean = True


class StableDiffusionUNet(LatentUNet):
    """The noise-predicting UNet of Stable Diffusion 1 or 2."""

    lora_targets = LORA_TARGETS

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        self.size_multiple = 2 ** (len(config.block_out_channels) - 1)
        self.unet = _build_unet(config)

    def forward(self, z_t: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
        """Predicted noise, shaped like ``z_t`` (N, C, h, w), at steps ``t`` (N,); ``prompt`` is (1 or N, L,
        cross_attention_dim)."""
        prompt = prompt.expand(z_t.shape[0], -1, -1)
        return cast(Tensor, self.unet(z_t, t, encoder_hidden_states=prompt, return_dict=False)[0])

    def network_cost(self, dtype: torch.dtype) -> NetworkCost:
        """Cost of one evaluation, in proportion to the widest feature maps."""
        share = self.config.block_out_channels[0] / UNetConfig().block_out_channels[0] * dtype.itemsize / 4
        return NetworkCost(bytes_per_position=MEMORY_PER_POSITION * share, attention_breakeven=UNET_BREAKEVEN)

    def enable_gradient_checkpointing(self) -> None:
        """Compute activations again in the backward pass instead of keeping them."""
        self.unet.enable_gradient_checkpointing()

    def speed_up(self) -> None:
        """Compute in less memory, and faster on a CPU in bfloat16, for inference; parameters and their names stay."""
        speed_up(self.unet)

    def freeze_prompt(self, prompt: Tensor) -> None:
        """Compute the keys and values of ``prompt`` (1, L, cross_attention_dim) once, for inference with no other.

        The layers that made them are dropped; adapters must have been merged before.
        """
        with torch.no_grad():
            for block in self.unet.modules():
                if type(block).__name__ == "BasicTransformerBlock":
                    block.attn2.to_k = _Computed(block.attn2.to_k(prompt))
                    block.attn2.to_v = _Computed(block.attn2.to_v(prompt))


class _Computed(nn.Module):
    """In place of a layer whose input never changes: its output (1, L, C), for every sample."""

    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value)

    def forward(self, x: Tensor) -> Tensor:
        """The stored output, (N, L, C)."""
        return self.value.expand(x.shape[0], -1, -1)


class StableDiffusionUNetEncoder(nn.Module):
    """Time embedding, downsampling blocks and middle block of a Stable Diffusion UNet, 1 and 2 or XL: what a
    discriminator reuses. The other half is never allocated."""

    lora_targets = LORA_TARGETS
    trained_beside_lora = ("pooled_prompt",)

    def __init__(self, config: StableDiffusionEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.feature_channels = config.unet.block_out_channels[-1]
        self.latent_channels = config.unet.in_channels
        self.unet = _build_half(config.unet)
        if config.unet.addition_embed_type:
            self.pooled_prompt = nn.Parameter(torch.zeros(1, config.unet.pooled_width))

    @property
    def latent_gain(self) -> float:
        """Factor on latents of Stable Diffusion 1 and 2 before noise is added; see :class:`SDXLConditioning`."""
        rescaled = self.config.unet.addition_embed_type is not None and self.config.sdxl.latent_scale == "rescaled"
        return SDXL_SCALING / SD_SCALING if rescaled else 1.0

    def forward(self, z_t: Tensor, t: Tensor, prompt: Tensor) -> tuple[Tensor]:
        """Middle features (N, feature_channels, h', w') of ``z_t`` (N, C, h, w); ``t`` (N,), ``prompt`` (1 or N, L,
        cross_attention_dim)."""
        added = self._added_conditions(z_t) if self.config.unet.addition_embed_type else None
        prompt = prompt.expand(z_t.shape[0], -1, -1)
        features = self.unet(z_t, t, encoder_hidden_states=prompt, added_cond_kwargs=added, return_dict=False)
        return (cast(Tensor, features[0]),)

    def _added_conditions(self, z_t: Tensor) -> dict[str, Tensor]:
        """SDXL's pooled text embedding (N, pooled_width), and ids (N, 6) of original size, crop corner, target
        size."""
        sdxl = self.config.sdxl
        fixed = sdxl.size == "fixed"
        height, width = (sdxl.fixed_side if fixed else 8 * side for side in z_t.shape[-2:])
        ids = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32, device=z_t.device)
        count = z_t.shape[0]
        return {"text_embeds": self.pooled_prompt.expand(count, -1), "time_ids": ids.expand(count, -1)}

    def enable_gradient_checkpointing(self) -> None:
        """Compute activations again in the backward pass instead of keeping them."""
        self.unet.enable_gradient_checkpointing()


def stable_diffusion_generator(config: StableDiffusionGeneratorConfig) -> OneStepLatentGenerator:
    """Autoencoder, UNet and prompt embedding, freshly initialised, as one generator."""
    autoencoder, unet = StableDiffusionAutoencoder(config.autoencoder), StableDiffusionUNet(config.unet)
    return one_step_generator(autoencoder, unet, initial_prompt(config.unet, config.prompt), config)


def initial_prompt(unet: UNetConfig, config: PromptConfig) -> Tensor:
    """Random prompt embedding (1, tokens, cross_attention_dim) on the default device; equal seeds, equal values."""
    prompt = torch.empty(1, config.tokens, unet.cross_attention_dim)
    if prompt.is_meta:
        return prompt
    rng = torch.Generator().manual_seed(config.seed)
    return (config.std * torch.randn(prompt.shape, generator=rng, device="cpu")).to(prompt.device)


def _build_unet(config: UNetConfig) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**dataclasses.asdict(config))


def _build_half(config: UNetConfig) -> Any:
    """A UNet without its upsampling half: diffusers' own forward then ends with the middle features."""
    device = torch.empty(0).device
    with torch.device("meta"):
        whole = _build_unet(config)
    half = copy.copy(whole)
    half.up_blocks, half.conv_norm_out, half.conv_out = nn.ModuleList(), None, nn.Identity()
    if device.type == "meta":
        return half
    half.to_empty(device=device)
    for module in half.modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
    return half
