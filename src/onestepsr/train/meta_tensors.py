"""Tensors without values: counting the memory they would take, and casting them as an accelerator would."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

COMPUTED_LOW = frozenset(
    {"conv1d", "conv2d", "conv3d", "conv_transpose2d", "linear", "matmul", "__matmul__", "bmm", "mm", "addmm"}
    | {"baddbmm", "einsum", "scaled_dot_product_attention"}
)
"""What autocast computes in 16 bits."""
COMPUTED_IN_FLOAT32 = frozenset(
    {"group_norm", "layer_norm", "softmax", "log_softmax", "softplus", "exp", "log", "pow", "__pow__", "rsqrt"}
    | {"reciprocal", "sum", "prod", "cumsum", "norm", "normalize", "mse_loss", "l1_loss", "cosine_similarity"}
)
"""What autocast computes in float32 on CUDA; on a CPU it leaves these as they come."""


class LiveMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, counts the bytes of tensors on ``device`` that operations make, until nobody holds them."""

    def __init__(self, device: torch.device, given: Sequence[Tensor]) -> None:
        """``given`` were there before; they and views of them do not count."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.device, self.now, self.peak = device, 0, 0
        self._given = list(given)  # held, so that no other storage takes the place of one of them
        self._known = {tensor.untyped_storage()._cdata for tensor in given}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and value.device.type == self.device.type:
                self._count(value.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


class Casts(TorchFunctionMode):
    """What an accelerator does to the types and memory of some operations, for tensors without values.

    Autocast knows nothing of the meta device, so its lists are applied here; and attention is taken to be computed in
    blocks, as every accelerator does it, where the meta device would make the whole matrix.
    """

    def __init__(self, low: torch.dtype | None, *, on_cpu: bool) -> None:
        super().__init__()
        self.low = low
        self.in_float32 = frozenset() if on_cpu else COMPUTED_IN_FLOAT32

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if self.low is not None and (name in COMPUTED_LOW or name in self.in_float32):
            dtype = self.low if name in COMPUTED_LOW else torch.float32
            args, kwargs = tree_map_only(Tensor, lambda tensor: _cast(tensor, dtype), (args, kwargs))
        if name == "scaled_dot_product_attention":
            return _BlockwiseAttention.apply(*args[:3])  # type: ignore[no-untyped-call]
        return func(*args, **kwargs)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


class _BlockwiseAttention(torch.autograd.Function):
    """Keeps what memory-efficient attention keeps: q, k, v, the output and one number per row, in float32."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output = q.new_empty((*q.shape[:-1], v.shape[-1]))
        ctx.save_for_backward(q, k, v, output, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])
