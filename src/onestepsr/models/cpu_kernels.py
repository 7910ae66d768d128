"""Faster kernels for inference in bfloat16 on a CPU: packed weights, and attention by blocks of queries.

Where the processor does not multiply bfloat16, the layers multiply in float32, which is faster there
(:func:`onestepsr.core.machine.multiplies_bfloat16`): only weights and what passes between layers are bfloat16.
They rest on operators of PyTorch that are not public, all of them called in this file alone. The environment variable
:data:`SWITCH` set to 0 turns them off; every network then computes with PyTorch's usual layers.
"""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onestepsr.core.machine import multiplies_bfloat16

SWITCH = "ONESTEPSR_CPU_KERNELS"
"""Environment variable that turns the kernels off with 0."""


def is_fast(x: Tensor) -> bool:
    """True for input of the kernels here: bfloat16 on a CPU, without gradients and outside ``torch.compile``."""
    plain = torch.is_grad_enabled() or torch.compiler.is_compiling() or os.environ.get(SWITCH) == "0"
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and not plain


def use_cpu_kernels(network: nn.Module) -> None:
    """Replace the plain convolutions and linear layers below ``network`` by ones that pack their weights at their first
    call; parameters and their names stay. For inference only: weights that an optimiser changes would be missed."""
    has_operators = cast(Any, torch.backends.mkldnn).is_available() and hasattr(
        torch._C._nn, "mkldnn_reorder_conv2d_weight"
    )
    if has_operators and os.environ.get(SWITCH) != "0":
        replace_layers(network, _packing)


# ---- attention without PyTorch's detour over float32 ----

LEAST_KEYS = 512
"""Below this many keys, as for a prompt, PyTorch's own attention is as fast."""
LEAST_ROWS = 128
"""Queries of a block, if their heads are not wider."""
LARGE_SCORE = 6.0
"""Beyond this, the rounding of scores, whose last place is then 1/32, would be seen: attention agrees with float32 to
46 dB where scores have a standard deviation of 1, to 37 dB where it is 4."""


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax(Q K^T / sqrt(C)) V for Q (N, H, Q, C), K and V (N, H, K, C), by whichever kernel is faster."""
    if is_fast(query) and key.shape[2] >= LEAST_KEYS and multiplies_bfloat16():
        return attention_by_blocks(query, key, value)
    return F.scaled_dot_product_attention(query, key, value)


def attention_by_blocks(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The same for tensors of which :func:`is_fast` is true.

    PyTorch's fused kernel multiplies in float32 even for bfloat16 on processors without AMX. Here the products are
    bfloat16's own, head by head, for as many queries at a time as stay in the cache.
    """
    heads, rows, channels = query.shape[1:]
    query, value = (query * channels**-0.5).contiguous(), value.contiguous()
    # Softmax ignores what all keys have in common, but the rounding of the scores does not.
    key = (key - key.mean(2, keepdim=True, dtype=torch.float32)).to(value.dtype).transpose(2, 3)
    result = query.new_empty(query.shape[0], rows, heads, channels).transpose(1, 2)
    step = max(LEAST_ROWS, channels)  # every block has the keys packed anew, which wide heads feel
    for index in itertools.product(range(query.shape[0]), range(heads)):
        for start in range(0, rows, step):
            scores = _scores(query[index][start : start + step], key[index])
            result[index][start : start + step] = torch.mm(scores.softmax(-1), value[index])
    return result


def _scores(query: Tensor, key: Tensor) -> Tensor:
    """Q K for Q (Q, C) and K (C, K), up to a constant per row.

    Where scores are large, they are computed again less the largest of their row: those that matter most are then close
    to zero when they are rounded.
    """
    scores = torch.mm(query, key)
    largest = scores.amax(-1, keepdim=True)
    return scores if largest.max() <= LARGE_SCORE else torch.addmm(-largest, query, key)


# ---- layers exchanged for others with the same parameters, under the same names ----

Kind = TypeVar("Kind", bound=nn.Module)


def replace_layers(network: nn.Module, replacement: Callable[[Any], nn.Module | None]) -> None:
    """Replace every layer below ``network`` by ``replacement(layer)`` where that is not None."""
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            made = replacement(child)
            if made is not None:
                setattr(parent, name, made)


def as_kind(kind: type[Kind], plain: nn.Module) -> Kind:
    """The same layer, its parameters not copied, as ``kind``: a class below its own that has nothing to initialise."""
    made = kind.__new__(kind)
    own = {name: value.copy() if isinstance(value, dict) else value for name, value in vars(plain).items()}
    made.__dict__.update(own)  # dicts of their own: another parameter there is none in ``plain``
    return made


# ---- packed weights ----

LEAST_WEIGHT = 4
"""Weights of a convolution are packed where they hold this many times as many numbers as the image that they meet."""


class _Packed(nn.Module):
    """A layer that, once called, keeps its weights in the memory layout of the CPU's kernel.

    Otherwise they are brought into that layout at every call, which at the coarse levels of a UNet, where there are
    more weights than pixels, takes longer than the convolution. There is one copy of them: while they are packed,
    ``weight`` has a shape but no contents. :meth:`unpack` restores these, as do saving, loading, copying and moving.
    """

    weight: Tensor
    _packed: Tensor | None = None

    def unpack(self) -> None:
        """Restore the contents of ``weight``; the next call packs them anew."""
        if self._packed is None:
            return
        with torch.inference_mode(False), torch.no_grad():  # for use in training too, wherever this is called
            self.weight = nn.Parameter(self._packed.to_dense(), requires_grad=self.weight.requires_grad)
        self._packed = None

    def _replace_weight(self, packed: Tensor) -> None:
        self._packed = packed
        with torch.inference_mode(False), torch.no_grad():
            empty = torch.empty_like(self.weight, device="meta")
            self.weight = nn.Parameter(empty, requires_grad=self.weight.requires_grad)

    def _suits(self, x: Tensor) -> bool:
        """True if ``x`` can be computed with packed weights; otherwise they are unpacked."""
        if is_fast(x) and self.weight.dtype == x.dtype:
            return True
        self.unpack()
        return False

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

    def __deepcopy__(self, memo: dict[int, Any]) -> _Packed:
        if id(self.weight) not in memo:  # a replacement of the weights is there already: they need not be unpacked
            self.unpack()
        made = memo[id(self)] = type(self).__new__(type(self))
        made.__dict__.update(copy.deepcopy({**self.__dict__, "_packed": None}, memo))
        return made


class PackedConvolution(_Packed, nn.Conv2d):
    """A convolution with packed weights, where they outweigh the image."""

    def forward(self, x: Tensor) -> Tensor:
        """Output (N, out_channels, h, w) of ``x`` (N, in_channels, H, W)."""
        if not self._suits(x):
            return super().forward(x)
        if not multiplies_bfloat16():
            return cast(Tensor, self._conv_forward(x.float(), *_wide(self)).to(x.dtype))
        if self._packed is None:
            if self.weight.numel() < LEAST_WEIGHT * x.numel():
                return super().forward(x)
            reorder = cast(Any, torch._C._nn).mkldnn_reorder_conv2d_weight
            plain = self.weight.detach().to_mkldnn()
            self._replace_weight(reorder(plain, self.padding, self.stride, (1, 1), 1, list(x.shape)))
        channels_last = x.contiguous(memory_format=torch.channels_last)
        bias, padding, stride = self.bias, list(cast(Any, self.padding)), list(self.stride)
        convolve = torch.ops.mkldnn._convolution_pointwise
        return cast(Tensor, convolve(channels_last, self._packed, bias, padding, stride, [1, 1], 1, "none", [], ""))


class PackedLinear(_Packed, nn.Linear):
    """A linear layer with packed weights."""

    def forward(self, x: Tensor) -> Tensor:
        """Output (..., out_features) of ``x`` (..., in_features)."""
        if not self._suits(x):
            return super().forward(x)
        if not multiplies_bfloat16():
            return F.linear(x.float(), *_wide(self)).to(x.dtype)
        if self._packed is None:
            rows = x.numel() // self.in_features
            self._replace_weight(torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), rows))
        return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], ""))


def _wide(layer: nn.Conv2d | nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of ``layer`` in float32."""
    return layer.weight.float(), None if layer.bias is None else layer.bias.float()


def _packing(layer: nn.Module) -> nn.Module | None:
    if type(layer) is nn.Conv2d and is_ordinary(layer):
        return as_kind(PackedConvolution, layer)
    if type(layer) is nn.Linear and hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return as_kind(PackedLinear, layer)
    return None


def is_ordinary(layer: nn.Conv2d) -> bool:
    """True for a convolution without groups and dilation that pads with zeros."""
    plain = layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros"
    return plain and not isinstance(layer.padding, str)
