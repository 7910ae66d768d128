"""What inference does differently from diffusers' code, for time and memory; parameters keep their names and values.

Everywhere: feature maps are overwritten, or forgotten, as soon as nobody reads them any more; the values are the same.
On a CPU in bfloat16, outside ``torch.compile``: attention by blocks of queries, weights packed once, and last layers in
float32, whose digits cost nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onestepsr.models.attention import attention, is_fast

CODERS = ("Encoder", "Decoder")
"""Names of diffusers' classes for the halves of its autoencoder."""
LAST_LAYERS = ("conv_out", "quant_conv")
"""Names of the layers that end diffusers' UNet, encoder and decoder."""
LEAST_WEIGHT = 4
"""Weights are packed beforehand where they hold this many times as many numbers as the picture that they meet."""


class BlockwiseAttention:
    """A processor for diffusers' attention layers: :func:`onestepsr.models.attention.attention`."""

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
        height, width = hidden_states.shape[2:]
        tokens = attn.group_norm(hidden_states).permute(0, 2, 3, 1).flatten(1, 2)  # (N, H W, C)
        result = torch.unflatten(_attend(attn, tokens, None), 1, (height, width)).permute(0, 3, 1, 2)
        return result + hidden_states


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
    """All of it, for inference with the weights that ``network`` has."""
    use_blockwise_attention(network)
    make_lean(network)
    widen_ends(network)
    pack_convolutions(network)


def use_blockwise_attention(network: nn.Module) -> None:
    """Give every attention layer of Stable Diffusion's kind below ``network`` this module's processor; parameters and
    their names stay."""
    for module in network.modules():
        if type(module).__name__ == "Attention" and _is_plain(module):
            cast(Any, module).set_processor(BlockwiseAttention())


def _is_plain(attn: Any) -> bool:
    """Whether an attention layer is one of a transformer block or of an autoencoder, without anything special."""
    extras = (attn.spatial_norm, attn.norm_q, attn.norm_k, attn.norm_cross, attn.rescale_output_factor != 1.0)
    return not any(extras) and (attn.group_norm is not None) == bool(attn.residual_connection)


class LeanResidualBlock(nn.Module):
    """A residual block of diffusers, its layers and their names, that writes over what nobody reads again.

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
        hidden = cast(Tensor, self.conv1(_activated(self.norm1, x)))
        if self.time_emb_proj is not None:
            hidden += self.time_emb_proj(F.silu(cast(Tensor, temb)))[:, :, None, None]
        hidden = _activated(self.norm2, hidden)
        hidden = cast(Tensor, self.conv2(self.dropout(hidden)))
        hidden += x if self.conv_shortcut is None else self.conv_shortcut(x)
        return hidden if self.output_scale_factor == 1.0 else hidden / self.output_scale_factor


def _activated(norm: nn.Module, x: Tensor) -> Tensor:
    return F.silu(norm(x), inplace=True)


class LeanCoder(nn.Module):
    """Encoder or decoder of diffusers' autoencoder, its layers and their names, that forgets what has been read.

    The original keeps the input of a block until the block is done, which at the resolution of the picture is as much
    as the widest of the feature maps.
    """

    def __init__(self, coder: Any) -> None:
        super().__init__()
        for name, layer in coder.named_children():
            self.add_module(name, layer)
        self.train(coder.training)

    def forward(self, x: Tensor) -> Tensor:
        """Latent of a picture, or picture of a latent: one layer after the other, (N, C, H, W)."""
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


def make_lean(network: nn.Module) -> None:
    """Replace residual blocks, encoder and decoder of Stable Diffusion's kind below ``network`` by lean ones;
    parameters and their names stay."""
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ == "ResnetBlock2D" and _is_usual(child):
                setattr(parent, name, LeanResidualBlock(child))
            elif type(child).__name__ in CODERS:
                setattr(parent, name, LeanCoder(child))


def _is_usual(block: Any) -> bool:
    """Whether a residual block keeps the size, and the step, if it knows one, shifts its first convolution's output."""
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
            if type(layer) is nn.Conv2d and _is_ordinary(layer):
                setattr(parent, name, _as_kind(WideConvolution, layer))


def _as_kind(kind: type[nn.Conv2d], plain: nn.Conv2d) -> nn.Conv2d:
    """The same layer with the same parameters, not copied, as another kind of convolution."""
    with torch.device("meta"):
        made = kind(
            plain.in_channels,
            plain.out_channels,
            cast(Any, plain.kernel_size),
            cast(Any, plain.stride),
            cast(Any, plain.padding),
            bias=plain.bias is not None,
        )
    made.weight, made.bias = plain.weight, plain.bias
    return made.train(plain.training)


class PackedConvolution(nn.Conv2d):
    """A convolution that keeps its weights in the order that the CPU's kernel wants, once it has been called.

    Otherwise they are brought into that order at every call, which at the coarse levels of a UNet, where there are
    more weights than pixels, takes longer than the convolution. There is one copy of them: while they are packed,
    ``weight`` has a shape but no contents. :meth:`unpack` brings these back, as do saving, loading, copying and moving.
    """

    _packed: Tensor | None = None

    @classmethod
    def of(cls, plain: nn.Conv2d) -> PackedConvolution:
        """The same layer with the same parameters, not copied."""
        return cast(PackedConvolution, _as_kind(cls, plain))

    def forward(self, x: Tensor) -> Tensor:
        """Output (N, out_channels, h, w) of ``x`` (N, in_channels, H, W)."""
        if not is_fast(x) or self.weight.dtype != x.dtype:
            self.unpack()
            return super().forward(x)
        if self._packed is None:
            if self.weight.numel() < LEAST_WEIGHT * x.numel():
                return super().forward(x)
            self._pack(x)
        channels_last = x.contiguous(memory_format=torch.channels_last)
        bias, padding, stride = self.bias, list(cast(Any, self.padding)), list(self.stride)
        convolve = torch.ops.mkldnn._convolution_pointwise
        return cast(Tensor, convolve(channels_last, self._packed, bias, padding, stride, [1, 1], 1, "none", [], ""))

    def unpack(self) -> None:
        """Bring back the contents of ``weight``; the next call packs them anew."""
        if self._packed is None:
            return
        with torch.inference_mode(False), torch.no_grad():  # for use in training too, wherever this is called
            self.weight = nn.Parameter(self._packed.to_dense(), requires_grad=self.weight.requires_grad)
        self._packed = None

    def _pack(self, x: Tensor) -> None:
        reorder = cast(Any, torch._C._nn).mkldnn_reorder_conv2d_weight
        plain = self.weight.detach().to_mkldnn()
        self._packed = reorder(plain, self.padding, self.stride, (1, 1), 1, list(x.shape))
        with torch.inference_mode(False), torch.no_grad():
            empty = torch.empty_like(self.weight, device="meta")
            self.weight = nn.Parameter(empty, requires_grad=self.weight.requires_grad)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.unpack()
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        self.unpack()
        super()._load_from_state_dict(*args, **options)

    def _save_to_state_dict(self, *args: Any, **options: Any) -> None:
        self.unpack()
        super()._save_to_state_dict(*args, **options)

    def __getstate__(self) -> dict[str, Any]:
        self.unpack()
        return self.__dict__

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedConvolution:
        if id(self.weight) not in memo:  # what is there already replaces the weights: they need not be unpacked for it
            self.unpack()
        made = memo[id(self)] = type(self).__new__(type(self))
        made.__dict__.update(copy.deepcopy({**self.__dict__, "_packed": None}, memo))
        return made


def pack_convolutions(network: nn.Module) -> None:
    """Replace the plain convolutions below ``network`` by ones that pack their weights at their first call; parameters
    and their names stay. For inference only: weights that an optimiser changes would be missed."""
    if not (cast(Any, torch.backends.mkldnn).is_available() and hasattr(torch._C._nn, "mkldnn_reorder_conv2d_weight")):
        return
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Conv2d and _is_ordinary(child):
                setattr(parent, name, PackedConvolution.of(child))


def _is_ordinary(layer: nn.Conv2d) -> bool:
    plain = layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros"
    return plain and not isinstance(layer.padding, str)
