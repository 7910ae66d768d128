"""Stable Diffusion's layers for inference in less time and memory; parameters keep their names and values.

Everywhere: feature maps are overwritten or freed as soon as nothing reads them any more; the values are the same. On a
CPU in bfloat16, outside ``torch.compile``: attention by blocks of queries, weights packed once, and last layers in
float32, whose digits cost nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onestepsr.models.cpu_kernels import as_kind, attention, is_fast, is_ordinary, replace_layers, use_cpu_kernels

CODERS = ("Encoder", "Decoder")
"""Names of diffusers' classes for the halves of its autoencoder."""
LAST_LAYERS = ("conv_out", "quant_conv")
"""Names of the layers that end diffusers' UNet, encoder and decoder."""


class BlockwiseAttention:
    """A processor for diffusers' attention layers: :func:`onestepsr.models.cpu_kernels.attention`."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """The layer's output for (N, L, C) or, of an autoencoder, (N, C, H, W), whose order in memory is kept.

        ``temb``, which an autoencoder hands to all its layers, matters to norms that :func:`_is_plain` leaves out.
        """
        if attention_mask is not None:
            raise ValueError("attention here takes no mask")
        if hidden_states.ndim == 3:
            return _attend(attn, hidden_states, encoder_hidden_states)
        result = _attend(attn, _tokens(attn.group_norm(hidden_states)), None)
        return _maps(result, hidden_states) + hidden_states


def _tokens(maps: Tensor) -> Tensor:
    """(N, C, H, W) as (N, H W, C), in channels_last without a copy."""
    return maps.permute(0, 2, 3, 1).flatten(1, 2)


def _maps(tokens: Tensor, like: Tensor) -> Tensor:
    """The way back, in channels_last, to the height and width of ``like``."""
    return torch.unflatten(tokens, 1, like.shape[2:]).permute(0, 3, 1, 2)


def _attend(attn: Any, tokens: Tensor, context: Tensor | None) -> Tensor:
    """Projections, attention and the last projection of (N, L, C), without norm and residual."""
    context = tokens if context is None else context
    query, key, value = (
        torch.unflatten(layer(given), -1, (attn.heads, -1)).transpose(1, 2)  # (N, heads, L, C / heads)
        for layer, given in ((attn.to_q, tokens), (attn.to_k, context), (attn.to_v, context))
    )
    result = attention(query, key, value).transpose(1, 2).flatten(2)
    return cast(Tensor, attn.to_out[1](attn.to_out[0](result)))


def speed_up(network: nn.Module) -> None:
    """Apply all of it to ``network``, for inference with the weights that it has."""
    use_blockwise_attention(network)
    replace_layers(network, _lean)
    widen_ends(network)
    use_cpu_kernels(network)


def use_blockwise_attention(network: nn.Module) -> None:
    """Give every attention layer of Stable Diffusion's kind below ``network`` this module's processor; parameters and
    their names stay."""
    for module in network.modules():
        if type(module).__name__ == "Attention" and _is_plain(module):
            cast(Any, module).set_processor(BlockwiseAttention())


def _is_plain(attn: Any) -> bool:
    """True for an attention layer of a transformer block or an autoencoder without anything special."""
    extras = (attn.spatial_norm, attn.norm_q, attn.norm_k, attn.norm_cross, attn.rescale_output_factor != 1.0)
    return not any(extras) and (attn.group_norm is not None) == bool(attn.residual_connection)


class LeanResidualBlock(nn.Module):
    """A residual block of diffusers, its layers and their names, that overwrites feature maps no longer read.

    The original makes a new tensor for each activation, sum and division, the last one by 1.
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm1, self.conv1, self.time_emb_proj = block.norm1, block.conv1, block.time_emb_proj
        self.norm2, self.dropout, self.conv2 = block.norm2, block.dropout, block.conv2
        self.conv_shortcut = block.conv_shortcut
        self.output_scale_factor = float(block.output_scale_factor)
        self.train(block.training)

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        """Output (N, out_channels, H, W) of ``x`` (N, in_channels, H, W) and the embedding (N, C) of the step, which an
        autoencoder has not."""
        hidden = cast(Tensor, self.conv1(F.silu(self.norm1(x), inplace=True)))
        if self.time_emb_proj is not None:
            hidden += self.time_emb_proj(F.silu(cast(Tensor, temb)))[:, :, None, None]
        hidden = F.silu(self.norm2(hidden), inplace=True)
        hidden = cast(Tensor, self.conv2(self.dropout(hidden)))
        hidden += x if self.conv_shortcut is None else self.conv_shortcut(x)
        return hidden if self.output_scale_factor == 1.0 else hidden / self.output_scale_factor


class LeanTransformer(nn.Module):
    """The transformer blocks of one level of diffusers' UNet, with their layers and names, that keep the memory format
    of feature maps.

    The original copies its result into another memory format, from which everything after it is copied back.
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm, self.proj_in, self.proj_out = block.norm, block.proj_in, block.proj_out
        self.transformer_blocks = block.transformer_blocks
        self.train(block.training)

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **others: Any
    ) -> tuple[Tensor]:
        """Feature maps (N, C, H, W) from feature maps and the prompt (N, L, C'); ``others``, masks and whatever else
        diffusers hands to such layers, must be None."""
        if any(value is not None for name, value in others.items() if name != "return_dict"):
            raise ValueError(f"transformer blocks here take a prompt alone, no {', '.join(sorted(others))}")
        tokens = self.proj_in(_tokens(self.norm(hidden_states)))
        for block in self.transformer_blocks:
            tokens = block(tokens, encoder_hidden_states=encoder_hidden_states)
        return (_maps(self.proj_out(tokens), hidden_states) + hidden_states,)


class LeanCoder(nn.Module):
    """Encoder or decoder of diffusers' autoencoder, its layers and their names, that frees feature maps once read.

    The original keeps the input of a block until the block is done, which at the resolution of the image is as much
    as the widest of the feature maps.
    """

    def __init__(self, coder: Any) -> None:
        super().__init__()
        for name, layer in coder.named_children():
            self.add_module(name, layer)
        self.train(coder.training)

    def forward(self, x: Tensor) -> Tensor:
        """Latent of an image, or image of a latent: one layer after the other, (N, C, H, W)."""
        for layer in _layers(self):
            x = layer(x)
        return x


def _layers(coder: Any) -> Iterator[nn.Module]:
    """The layers of diffusers' encoder or decoder in the order of their use."""
    yield coder.conv_in
    if hasattr(coder, "up_blocks"):
        yield coder.mid_block
        for block in coder.up_blocks:
            yield from (*block.resnets, *(block.upsamplers or ()))
    else:
        for block in coder.down_blocks:
            yield from (*block.resnets, *(block.downsamplers or ()))
        yield coder.mid_block
    yield from (coder.conv_norm_out, coder.conv_act, coder.conv_out)


def _lean(layer: Any) -> nn.Module | None:
    name = type(layer).__name__
    if name == "ResnetBlock2D" and _is_usual(layer):
        return LeanResidualBlock(layer)
    # Transformers that read feature maps through a linear layer, as from Stable Diffusion 2 on.
    if name == "Transformer2DModel" and layer.is_input_continuous and layer.use_linear_projection:
        return LeanTransformer(layer)
    return LeanCoder(layer) if name in CODERS else None


def _is_usual(block: Any) -> bool:
    """True for a residual block that keeps the size, and in which the step, if any, shifts the first convolution."""
    plain = block.upsample is None and block.downsample is None and isinstance(block.nonlinearity, nn.SiLU)
    timeless = block.time_emb_proj is None and block.time_embedding_norm == "group"
    return plain and not block.skip_time_act and (timeless or block.time_embedding_norm == "default")


class WideConvolution(nn.Conv2d):
    """A convolution that computes in float32 where :func:`is_fast` is true, so that its output is not rounded."""

    def forward(self, x: Tensor) -> Tensor:
        """Output (N, out_channels, h, w) of ``x`` (N, in_channels, H, W)."""
        if not is_fast(x) and x.dtype == self.weight.dtype:
            return super().forward(x)
        bias = None if self.bias is None else self.bias.float()
        return F.conv2d(x.float(), self.weight.float(), bias, self.stride, self.padding)


def widen_ends(network: nn.Module) -> None:
    """Let the last layers of ``network``, which have few channels and so cost next to nothing, compute in float32;
    parameters and their names stay."""
    for parent in list(network.modules()):
        for name in LAST_LAYERS:
            layer = getattr(parent, name, None)
            if type(layer) is nn.Conv2d and is_ordinary(layer):
                setattr(parent, name, as_kind(WideConvolution, layer))
