"""Attention on a CPU in bfloat16 without PyTorch's detour over float32.

Where a gradient is wanted, in other number formats and on other devices, and inside ``torch.compile``, PyTorch's own is
used.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST_KEYS = 512
"""Below this many keys, as for a prompt, PyTorch's own attention is as fast."""
LEAST_ROWS = 128
"""Queries of a block, if their heads are not wider."""
LARGE_SCORE = 6.0
"""Beyond this, the rounding of scores, whose last place is then 1/32, would be seen: attention agrees with float32 to
46 dB where scores have a standard deviation of 1, to 37 dB where it is 4."""


def is_fast(x: Tensor) -> bool:
    """Whether ``x`` is bfloat16 on a CPU, and nothing keeps track of what is computed."""
    plain = torch.is_grad_enabled() or torch.compiler.is_compiling()
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and not plain


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax(Q K^T / sqrt(C)) V for Q (N, H, Q, C), K and V (N, H, K, C), in the way that suits them."""
    if is_fast(query) and key.shape[2] >= LEAST_KEYS:
        return attention_by_blocks(query, key, value)
    return F.scaled_dot_product_attention(query, key, value)


def attention_by_blocks(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The same for tensors of which :func:`is_fast` is true.

    PyTorch's fused kernel multiplies in float32 even for bfloat16 on processors without AMX. Here the products are
    bfloat16's own, head by head, for as many queries at a time as stay in the cache.
    """
    heads, rows, channels = query.shape[1:]
    query, value = (query * channels**-0.5).contiguous(), value.contiguous()
    # Softmax does not see what all keys have in common, but the rounding of the scores does.
    key = (key - key.mean(2, keepdim=True, dtype=torch.float32)).to(value.dtype).transpose(2, 3)
    result = query.new_empty(query.shape[0], rows, heads, channels).transpose(1, 2)
    step = max(LEAST_ROWS, channels)  # every block has the keys packed anew, which wide heads feel
    for place in itertools.product(range(query.shape[0]), range(heads)):
        for start in range(0, rows, step):
            scores = _scores(query[place][start : start + step], key[place])
            result[place][start : start + step] = torch.mm(scores.softmax(-1), value[place])
    return result


def _scores(query: Tensor, key: Tensor) -> Tensor:
    """Q K for Q (Q, C) and K (C, K), but for a number for each row.

    Where they are large, they are computed again less the largest of their row: what matters most is then close to zero
    when it is rounded.
    """
    scores = torch.mm(query, key)
    largest = scores.amax(-1, keepdim=True)
    return scores if largest.max() <= LARGE_SCORE else torch.addmm(-largest, query, key)
