"""Time of single layers on a CPU: as PyTorch computes them, and as inference does.

    python scripts/layers.py [--runs 5]

Attention by blocks beside PyTorch's fused one, weights packed once beside weights packed at every call, norms with
given statistics beside norms that take their own; sizes of Stable Diffusion's networks at 512 x 512 pixels. Both ways
take turns, and the least time of each is shown.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onestepsr.inference.devices import no_malloc_trim
from onestepsr.inference.tiled import SharedNorms
from onestepsr.models.cpu_kernels import attention_by_blocks, use_cpu_kernels

ATTENTION = ((5, 4096, 64, 1.0), (2, 1024, 64, 2.0), (1, 4096, 512, 1.0))
"""Heads, positions, channels of a head, and standard deviation of queries and keys."""
LINEAR = (
    (4096, 320, 2560, 5),
    (4096, 1280, 320, 5),
    (4096, 320, 320, 40),
    (1024, 640, 5120, 5),
    (1024, 2560, 640, 5),
    (1024, 640, 640, 40),
    (256, 1280, 10240, 5),
    (256, 5120, 1280, 5),
    (256, 1280, 1280, 40),
    (64, 1280, 10240, 1),
    (64, 5120, 1280, 1),
    (64, 1280, 1280, 8),
    (1, 1280, 1280, 24),
)
"""Rows, channels in and out, and how many such layers the UNet has at 64 x 64 latents."""


def main() -> None:
    """Measure, write one line per comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    torch.manual_seed(0)
    with torch.inference_mode(), no_malloc_trim(), ExitStack() as stack:
        for shape in ATTENTION:
            report("attention {} x {} x {}".format(*shape), options.runs, *attentions(*shape))
        coarse = torch.randn(1, 1280, 8, 8).contiguous(memory_format=torch.channels_last)
        report("convolution, 8 x 8", options.runs, *packed(nn.Conv2d(1280, 1280, 3, padding=1), coarse))
        report("all linear layers of the UNet", options.runs, *linears())
        report("group norm, 256 x 512 x 512", options.runs, *norms(stack))


def report(name: str, runs: int, plain: Callable[[], Any], fast: Callable[[], Any], note: str = "") -> None:
    """One line: least milliseconds of both."""
    best = [math.inf, math.inf]
    for turn in range(runs + 1):
        for number, run in enumerate((plain, fast)):
            begun = time.perf_counter()
            run()
            if turn:
                best[number] = min(best[number], 1e3 * (time.perf_counter() - begun))
    sys.stdout.write(f"{name}: {best[0]:.1f} ms, ours {best[1]:.1f} ms{note}\n")
    sys.stdout.flush()


def attentions(heads: int, positions: int, channels: int, spread: float) -> tuple[Any, Any, str]:
    """The fused one, ours, and the agreement of each with float32."""
    query, key, value = (spread * torch.randn(1, positions, heads, channels).transpose(1, 2) for _ in range(3))
    value = value / spread
    exact = F.scaled_dot_product_attention(*(x.bfloat16().float() for x in (query, key, value)))
    inputs = [x.bfloat16() for x in (query, key, value)]
    ways = (lambda: F.scaled_dot_product_attention(*inputs), lambda: attention_by_blocks(*inputs))
    found = [10 * math.log10(exact.square().mean() / (way().float() - exact).square().mean()) for way in ways]
    return *ways, f"; against float32 {found[0]:.1f} dB, ours {found[1]:.1f} dB"


def packed(layer: nn.Module, x: Tensor) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """A layer on ``x`` with its own weights, and with packed ones."""
    plain = layer.bfloat16().to(memory_format=torch.channels_last).requires_grad_(False)
    ours = nn.Sequential(plain)
    use_cpu_kernels(ours)
    inputs = x.bfloat16()
    return (lambda: plain(inputs)), (lambda: ours(inputs))


def linears() -> tuple[Callable[[], Any], Callable[[], Any]]:
    """All of the UNet's, one after the other, each with weights of its own."""
    pairs = [
        packed(nn.Linear(inputs, outputs), torch.randn(1, rows, inputs))
        for rows, inputs, outputs, count in LINEAR
        for _ in range(count)
    ]
    return (lambda: [plain() for plain, _ in pairs]), (lambda: [ours() for _, ours in pairs])


def norms(stack: ExitStack) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """A norm with statistics of its input, and one that is given them until ``stack`` ends."""
    x = torch.randn(1, 256, 512, 512).bfloat16().contiguous(memory_format=torch.channels_last)
    plain = nn.GroupNorm(32, 256, eps=1e-6).bfloat16().requires_grad_(False)
    ours = nn.Sequential(copy.deepcopy(plain))
    stack.enter_context(SharedNorms(ours).calibrated_by(lambda: ours(x)))
    return (lambda: plain(x)), (lambda: ours(x))


if __name__ == "__main__":
    main()
