"""SeeSR's denoiser (Wu et al., "SeeSR: Towards Semantics-Aware Real-World Image Super-Resolution", CVPR 2024): a Stable
Diffusion UNet and a ControlNet, both with a second transformer behind every one of the text.

The ControlNet sees the enlarged LR image; every second transformer attends to the tokens that RAM's image encoder
makes of it. Names of parameters below ``unet`` and ``controlnet`` are the published ones.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from onestepsr.models.generators import LatentUNet, NetworkCost
from onestepsr.models.stable_diffusion.config import UNetConfig
from onestepsr.models.stable_diffusion.networks import MEMORY_PER_POSITION, UNET_BREAKEVEN

IMAGE_TOKENS, IMAGE_WIDTH = 145, 512
"""Tokens of RAM's image encoder, the mean and 12 x 12 places, and their channels."""
TRAINED_BY_TADSR = ("image_attentions", "controlnet_cond_embedding")
"""Parts that TAD-SR's published code trains; the rest of its student stays as it was."""
CONTROL_OVERHEAD = 1.1
"""The ControlNet's residuals, kept while the UNet runs, as a part of the UNet's own feature maps: by their sizes."""


class SeeSRCondition(NamedTuple):
    """All that the denoiser knows of an image beside its latent."""

    control: Tensor
    """Image (N, 3, H, W) in [0, 1] for the ControlNet, ``factor`` times as large as the latent."""
    text: Tensor
    """Embedding of the tags, (1 or N, L, cross_attention_dim)."""
    image: Tensor
    """Tokens of RAM's image encoder, (1 or N, K, image_width)."""


def joined_prompt(text: Tensor, image: Tensor) -> Tensor:
    """One prompt (N, L + K, C) of a text's embedding (N, L, C) and RAM's tokens (N, K, W), filled up with zeros."""
    return torch.cat([text, nn.functional.pad(image, (0, text.shape[2] - image.shape[2]))], dim=1)


class _TextThenImage:
    """In place of the ``forward`` of a transformer under the text: this, then the transformer under the image.

    diffusers hands ``encoder_hidden_states`` on to its transformers untouched: here the pair (text, image).
    """

    def __init__(self, text: nn.Module, image: nn.Module) -> None:
        self.text, self.image = text, image

    def __call__(self, hidden_states: Tensor, encoder_hidden_states: Any, **others: Any) -> tuple[Tensor]:
        text, image = encoder_hidden_states
        others["return_dict"] = False
        forward = type(self.text).forward
        seen = forward(self.text, hidden_states, encoder_hidden_states=text, **others)[0]
        return (self.image(seen, encoder_hidden_states=image, **others)[0],)


def _add_image_attentions(network: nn.Module, config: UNetConfig, image_width: int) -> None:
    """A list ``image_attentions`` beside every ``attentions`` of diffusers' blocks, of the same sizes but for the
    width of what is attended to."""
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    for block in network.modules():
        attentions = getattr(block, "attentions", None)
        if not isinstance(attentions, nn.ModuleList):
            continue
        own = nn.ModuleList()
        for attention in cast(Any, attentions):
            settings = dict(attention.config) | {"cross_attention_dim": image_width}
            image = Transformer2DModel(**{name: value for name, value in settings.items() if name[0] != "_"})
            own.append(image)
            attention.forward = _TextThenImage(attention, image)
        block.image_attentions = own


class SeeSRUNet(LatentUNet):
    """UNet and ControlNet as one network that predicts noise."""

    def __init__(self, config: UNetConfig, condition_channels: tuple[int, ...], image_width: int = IMAGE_WIDTH) -> None:
        """``condition_channels`` are those of the layers that bring the control image to the latent's size."""
        super().__init__()
        from diffusers import ControlNetModel, UNet2DConditionModel

        settings = dataclasses.asdict(config)
        self.config = config
        self.size_multiple = 2 ** (len(config.block_out_channels) - 1)
        self.unet = UNet2DConditionModel(**settings)
        for name in ("out_channels", "up_block_types"):
            del settings[name]
        self.controlnet = ControlNetModel(**settings, conditioning_embedding_out_channels=condition_channels)
        for network in (self.unet, self.controlnet):
            _add_image_attentions(network, config, image_width)

    def forward(self, z_t: Tensor, t: Tensor, y: SeeSRCondition) -> Tensor:
        """Predicted noise, shaped like ``z_t`` (N, C, h, w), at steps ``t`` (N,), under the condition ``y``."""
        down, middle, tokens = self._control(z_t, t, y)
        return cast(
            Tensor,
            self.unet(
                z_t,
                t,
                encoder_hidden_states=tokens,
                down_block_additional_residuals=down,
                mid_block_additional_residual=middle,
                return_dict=False,
            )[0],
        )

    def features(self, z_t: Tensor, t: Tensor, y: SeeSRCondition) -> tuple[Tensor, ...]:
        """The end of every level on the way down, before it is halved, with the ControlNet's residual added: what
        TAD-SR's discriminator judges (N, C_k, h / 2^k, w / 2^k)."""
        down, _, tokens = self._control(z_t, t, y)
        unet = self.unet
        emb = unet.time_embedding(unet.get_time_embed(sample=z_t, timestep=t))
        h = unet.conv_in(z_t)
        features, count = [], 1  # the first residual is that of conv_in
        for block in unet.down_blocks:
            attends = getattr(block, "has_cross_attention", False)
            options: dict[str, Any] = {"encoder_hidden_states": tokens} if attends else {}
            h, outputs = block(hidden_states=h, temb=emb, **options)
            last = len(outputs) - (2 if block.downsamplers else 1)
            features.append(outputs[last] + down[count + last])
            count += len(outputs)
        return tuple(features)

    def _control(self, z_t: Tensor, t: Tensor, y: SeeSRCondition) -> tuple[list[Tensor], Tensor, tuple[Tensor, Tensor]]:
        """The ControlNet's residuals, and both kinds of tokens for each of the N samples."""
        tokens = (y.text.expand(len(z_t), -1, -1), y.image.expand(len(z_t), -1, -1))
        down, middle = self.controlnet(
            z_t, t, encoder_hidden_states=tokens, controlnet_cond=y.control.to(z_t.dtype), return_dict=False
        )
        return down, middle, tokens

    def train_only(self, parts: tuple[str, ...] = TRAINED_BY_TADSR) -> None:
        """Train the parameters below a module of one of these names; the others stay."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(any(part in parts for part in name.split(".")))

    def network_cost(self, dtype: torch.dtype) -> NetworkCost:
        """Cost of one evaluation, in proportion to the widest feature maps."""
        share = self.config.block_out_channels[0] / UNetConfig().block_out_channels[0] * dtype.itemsize / 4
        return NetworkCost(
            bytes_per_position=CONTROL_OVERHEAD * MEMORY_PER_POSITION * share, attention_breakeven=UNET_BREAKEVEN
        )

    def enable_gradient_checkpointing(self) -> None:
        """Compute activations again in the backward pass instead of keeping them."""
        self.unet.enable_gradient_checkpointing()
        self.controlnet.enable_gradient_checkpointing()
