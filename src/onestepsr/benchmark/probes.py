"""Measurements around a run: the ceiling of the device, other work on the machine, and memory of one image."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from onestepsr.core.errors import OneStepSRError
from onestepsr.core.machine import resident_memory

# ---- the ceiling of the device ----

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


def measure_ceiling(device: torch.device, dtype: torch.dtype, seconds: float = 0.5) -> dict[str, float]:
    """Best TFLOP/s of a convolution and of a matrix product; a multiplication and an addition are two operations.

    The best of several shapes, each run for ``seconds`` but at least three times, after one run to warm up.
    """
    images = CONVOLUTIONS.get(device.type, CONVOLUTIONS["cpu"])
    sides = MATRICES.get(device.type, MATRICES["cpu"])
    return {
        "convolution": convolution_speed(device, dtype, images, seconds),
        "matrix": matrix_speed(device, dtype, sides, seconds),
    }


def convolution_speed(device: torch.device, dtype: torch.dtype, shapes: Shapes, seconds: float = 0.5) -> float:
    """Best TFLOP/s of a 3 x 3 convolution with bias, channels last, as many outputs as inputs, over ``shapes``."""
    best, last = 0.0, torch.channels_last
    for samples, channels, side in shapes:
        images = torch.randn(samples, channels, side, side, device=device, dtype=dtype).contiguous(memory_format=last)
        weight = torch.randn(channels, channels, 3, 3, device=device, dtype=dtype).contiguous(memory_format=last)
        run = partial(functional.conv2d, images, weight, torch.randn(channels, device=device, dtype=dtype), padding=1)
        best = max(best, 2 * samples * channels * channels * 9 * side * side / _fastest(run, device, seconds) / 1e12)
    return best


def matrix_speed(device: torch.device, dtype: torch.dtype, sides: Sequence[int], seconds: float = 0.5) -> float:
    """Best TFLOP/s of a product of two square matrices, over ``sides``; the second one is transposed in memory, as a
    linear layer's weights are."""
    best = 0.0
    for side in sides:
        left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        best = max(best, 2 * side**3 / _fastest(partial(functional.linear, left, right), device, seconds) / 1e12)
    return best


@torch.inference_mode()
def _fastest(run: Callable[[], Tensor], device: torch.device, seconds: float) -> float:
    """Shortest time of one run, in seconds."""
    best, begun, runs = float("inf"), time.perf_counter(), 0
    run()
    while runs < LEAST_RUNS or time.perf_counter() - begun < seconds:
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


# ---- other work on the machine ----


def other_work() -> float | None:
    """Seconds that the cores of this process have worked so far for anything but it and its children; None where the
    system does not tell (it is not Linux)."""
    try:
        lines = [line.split() for line in Path("/proc/stat").read_text(encoding="ascii").splitlines()]
        usable = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    except (OSError, AttributeError):
        return None
    # user, nice, system, (idle, waiting,) interrupts, soft interrupts, and time taken by the hypervisor
    busy = sum(int(line[field]) for line in lines if line and line[0] in usable for field in (1, 2, 3, 6, 7, 8))
    return busy / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])


# ---- memory of one image: python -m onestepsr.benchmark.probes, with the task as JSON on standard input ----


def measure_memory(model: str, source: str, target: str, **options: Any) -> dict[str, int | None]:
    """Memory of enlarging ``source`` to ``target`` in a fresh interpreter; ``options`` are of the upscaler.

    Raises OneStepSRError with the interpreter's last line if that fails.
    """
    command = [sys.executable, "-m", "onestepsr.benchmark.probes"]
    task = json.dumps({"model": model, "source": source, "target": target, **options})
    done = subprocess.run(command, input=task, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise OneStepSRError(f"measuring the memory of {model} failed: {last}")
    use: dict[str, int | None] = json.loads(done.stdout.splitlines()[-1])
    return use


def _enlarge_once(
    *, model: str, source: str, target: str, memory: float | None = None, tile: Any = "auto", **loading: Any
) -> dict[str, int | None]:
    """Bytes that are resident with the libraries imported, with the model loaded, and at most; ``own`` is the most over
    the first: weights, feature maps and images. ``device_peak`` is the most that is allocated on a GPU.

    ``memory``, ``tile`` and ``loading`` are options of the upscaler.
    """
    from onestepsr.imaging.read import read_image
    from onestepsr.imaging.write import write_image
    from onestepsr.inference.upscaler import UpscaleOptions, Upscaler

    interpreter = resident_memory()["now"]
    upscaler = Upscaler.from_pretrained(model, **loading)
    loaded = resident_memory()["now"]
    image = upscaler.upscale_image(read_image(Path(source)), UpscaleOptions(tile=tile, memory=memory))
    write_image(image, Path(target))
    on_gpu = torch.cuda.max_memory_allocated(upscaler.device) if upscaler.device.type == "cuda" else None
    peak = resident_memory()["peak"]
    use = {"interpreter": interpreter, "loaded": loaded, "peak": peak, "device_peak": on_gpu}
    return {**use, "own": peak - interpreter}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_enlarge_once(**json.load(sys.stdin))) + "\n")
