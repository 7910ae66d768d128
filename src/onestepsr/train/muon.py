"""Muon for convolution kernels: momentum, orthogonalised, so that every direction of a layer moves equally far."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""a, b, c of the iteration X <- aX + b(XXᵀ)X + c(XXᵀ)²X, which brings singular values between 0.002 and 1 into 0.68 to
1.21 in :data:`ITERATIONS` steps (Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024)."""
ITERATIONS = 5
ADAMW_STEP = 0.2
"""Root mean square of an update per unit of learning rate, about that of AdamW, so that one rate suits both (Liu et
al., "Muon is Scalable for LLM Training", 2025)."""


class Muon(torch.optim.AdamW):
    """Muon on parameters of four dimensions, each kernel a matrix of outputs x (inputs, height, width); AdamW on all
    others."""

    def __init__(self, parameters: Iterable[Tensor], *, momentum: float, **settings: Any) -> None:
        """``momentum`` is the decay of the running sum of gradients; ``settings`` are those of AdamW."""
        trained = list(parameters)
        groups = [[p for p in trained if p.ndim == 4], [p for p in trained if p.ndim != 4]]
        # Not fused: that kernel looks at the overflows of fp16 itself, while `step` below must be skipped as a whole.
        super().__init__([{"params": group} for group in groups], foreach=True, **settings)
        self.momentum = momentum

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; ``closure`` is passed on to AdamW."""
        kernels = self.param_groups[0]
        alike: defaultdict[torch.Size, list[Tensor]] = defaultdict(list)
        for kernel in kernels["params"]:
            if kernel.grad is not None:
                alike[kernel.shape].append(kernel)
        for shape, members in alike.items():
            directions = orthogonalized(torch.stack([self._momentum(kernel).flatten(1) for kernel in members]))
            length = kernels["lr"] * ADAMW_STEP * math.sqrt(max(directions.shape[1:]))
            for kernel, direction in zip(members, directions, strict=True):
                kernel.mul_(1 - kernels["lr"] * kernels["weight_decay"])
                kernel.sub_(direction.view(shape), alpha=length)
                kernel.grad = None  # AdamW leaves alone what has no gradient
        return super().step(closure)

    def _momentum(self, kernel: Tensor) -> Tensor:
        """The running sum with this step's gradient in it, looking one step ahead (Nesterov)."""
        gradient = kernel.grad
        assert gradient is not None
        state = self.state[kernel]
        if not state:
            state["momentum"] = torch.zeros_like(kernel)
        running = state["momentum"].mul_(self.momentum).add_(gradient)
        return gradient.add(running, alpha=self.momentum)


def orthogonalized(matrices: Tensor) -> Tensor:
    """About U Vᵀ of the singular value decompositions U S Vᵀ of ``matrices`` (K, R, C), in their dtype.

    The iteration runs on the smaller Gram matrix, whose powers commute: a kernel of 160 x 160 x 3 x 3 takes a third of
    the multiplications.
    """
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonalized(matrices.mT).mT
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp_min(1e-30)
    a, b, c = NEWTON_SCHULZ
    identity = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    gram, product = x @ x.mT, identity.expand(len(x), -1, -1)
    for _ in range(ITERATIONS):
        factor = a * identity + b * gram + c * (gram @ gram)
        gram, product = factor @ gram @ factor, factor @ product
    return torch.matmul(product, x)
