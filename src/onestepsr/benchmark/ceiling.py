"""What the device can do at best: throughput of a large matrix product and of a 3 x 3 convolution."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

Shapes = Sequence[tuple[int, int, int]]
"""Samples, channels and side of the images that are convolved."""
CONVOLUTIONS: dict[str, Shapes] = {
    "cpu": ((1, 128, 128), (1, 256, 64), (1, 512, 64)),
    "cuda": ((8, 256, 128), (8, 512, 64), (32, 512, 64)),
}
"""Convolutions tried by device type; those of "cpu" for all others. They are layers of Stable Diffusion's networks."""
MATRICES: dict[str, Sequence[int]] = {"cpu": (1024, 2048), "cuda": (4096, 8192)}
"""Sides of the square matrices tried."""
LEAST_RUNS = 3


@dataclass(frozen=True, kw_only=True)
class Ceiling:
    """Best throughput found, in TFLOP/s; a multiplication and an addition are two operations."""

    convolution: float
    """Of a 3 x 3 convolution with bias, weights and images in the memory format that was asked for."""
    matrix: float
    """Of a product of two square matrices, the second one transposed in memory as a linear layer's weights are."""


def measure_ceiling(
    device: torch.device,
    dtype: torch.dtype,
    *,
    memory_format: torch.memory_format = torch.channels_last,
    seconds: float = 0.5,
) -> Ceiling:
    """The best of several shapes, each run for ``seconds`` but at least three times, after one run to warm up."""
    images = CONVOLUTIONS.get(device.type, CONVOLUTIONS["cpu"])
    return Ceiling(
        convolution=convolution_speed(device, dtype, images, memory_format=memory_format, seconds=seconds),
        matrix=matrix_speed(device, dtype, MATRICES.get(device.type, MATRICES["cpu"]), seconds=seconds),
    )


def convolution_speed(
    device: torch.device,
    dtype: torch.dtype,
    shapes: Shapes,
    *,
    memory_format: torch.memory_format = torch.channels_last,
    seconds: float = 0.5,
    least: int = LEAST_RUNS,
) -> float:
    """Best TFLOP/s of a 3 x 3 convolution with as many outputs as inputs, over ``shapes``."""

    def prepared(shape: tuple[int, int, int]) -> tuple[Callable[[], Tensor], int]:
        samples, channels, side = shape
        images = torch.randn(samples, channels, side, side, device=device, dtype=dtype)
        images = images.contiguous(memory_format=memory_format)
        weight = torch.randn(channels, channels, 3, 3, device=device, dtype=dtype)
        weight, bias = weight.contiguous(memory_format=memory_format), torch.randn(channels, device=device, dtype=dtype)
        work = 2 * samples * channels * channels * 9 * side * side
        return lambda: functional.conv2d(images, weight, bias, padding=1), work

    return _best(map(prepared, shapes), device, seconds, least)


def matrix_speed(
    device: torch.device, dtype: torch.dtype, sides: Sequence[int], *, seconds: float = 0.5, least: int = LEAST_RUNS
) -> float:
    """Best TFLOP/s of a product of square matrices, over ``sides``."""

    def prepared(side: int) -> tuple[Callable[[], Tensor], int]:
        left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        return lambda: functional.linear(left, right), 2 * side**3

    return _best(map(prepared, sides), device, seconds, least)


def _best(
    trials: Iterable[tuple[Callable[[], Tensor], int]], device: torch.device, seconds: float, least: int
) -> float:
    with torch.inference_mode():
        return max(work / _fastest(run, device, seconds, least) / 1e12 for run, work in trials)


def _fastest(run: Callable[[], Tensor], device: torch.device, seconds: float, least: int) -> float:
    """Shortest time of one run, in seconds."""
    best, begun, runs = float("inf"), time.perf_counter(), 0
    run()
    while runs < least or time.perf_counter() - begun < seconds:
        wait(device)
        started = time.perf_counter()
        run()
        wait(device)
        best, runs = min(best, time.perf_counter() - started), runs + 1
    return best


def wait(device: torch.device) -> None:
    """Return when ``device`` has done everything that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


# Whether a machine had other things to do while something was measured ------------------------------------------------

BUSY_FIELDS = (0, 1, 2, 5, 6, 7)
"""Columns of /proc/stat in which a core works: user, nice, system, interrupts (two), and what the hypervisor took."""


class OtherWork:
    """Counts from its creation on how many cores were busy with anything but this process and its children."""

    def __init__(self) -> None:
        self._begun, self._busy, self._own = time.perf_counter(), _busy_seconds(), _own_seconds()

    def cores(self) -> float | None:
        """Mean number of busy cores, of those that this process may use; None where the system does not tell."""
        busy = _busy_seconds()
        elapsed = time.perf_counter() - self._begun
        if busy is None or self._busy is None or elapsed <= 0:
            return None
        return max(0.0, (busy - self._busy) - (_own_seconds() - self._own)) / elapsed


def _own_seconds() -> float:
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def _busy_seconds() -> float | None:
    try:
        lines = Path("/proc/stat").read_text(encoding="ascii", errors="replace").splitlines()
        usable = {f"cpu{core}" for core in os.sched_getaffinity(0)}
        rows = [words[1:] for words in (line.split() for line in lines) if words and words[0] in usable]
        return sum(int(row[field]) for row in rows for field in BUSY_FIELDS) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):  # not Linux, or another layout of the file
        return None
