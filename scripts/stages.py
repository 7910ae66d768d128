"""Time and memory of encoder, UNet and decoder on tiles of growing size, each for itself.

    python scripts/stages.py random:sd21-base 48 64 80 96 128 160
    python scripts/stages.py random:sd21-base 64 --memory [--dtype float32] [--plain]

Sides are latent positions. Where attention sees all of a tile, its share grows with the area: seconds per position are
a + b x positions, and a / b is the area at which both take as long, the ``balance`` that a network states of itself.
``--memory`` measures peak bytes per position instead, as growth of the resident memory in an interpreter of its own.
``--plain``: the networks as they are trained.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onestepsr.core.machine import resident_memory
from onestepsr.inference.devices import DTYPES, no_malloc_trim
from onestepsr.models.loading import load_generator

STAGES = ("encode", "unet", "decode")
POSITIONS = 1000


def main() -> None:
    """Read the arguments, measure, write one line per side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("sides", type=int, nargs="+")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)  # in the interpreter of its own
    options = parser.parse_args()
    if options.stage is not None:
        sys.stdout.write(f"{memory_of(options)}\n")
    elif options.memory:
        for side in options.sides:
            found = {stage: in_own_interpreter(options, side, stage) / side**2 for stage in STAGES}
            sys.stdout.write(f"{side}: " + ", ".join(f"{s} {b:.0f} bytes" for s, b in found.items()) + " a position\n")
            sys.stdout.flush()
    else:
        measure_times(options)


def measure_times(options: argparse.Namespace) -> None:
    """Seconds by stage and side, and the balance of each stage."""
    generator = load(options)
    seconds: dict[str, list[float]] = {stage: [] for stage in STAGES}
    for side in options.sides:
        for stage in STAGES:
            run = stage_of(generator, stage, side)
            with no_malloc_trim(), torch.inference_mode():
                run()
                seconds[stage].append(statistics.median(timed(run) for _ in range(options.runs)))
        found = {stage: times[-1] for stage, times in seconds.items()}
        each = ", ".join(f"{stage} {POSITIONS * s / side**2:.3f} s" for stage, s in found.items())
        whole = ", ".join(f"{stage} {s:.2f} s" for stage, s in found.items())
        sys.stdout.write(f"{side} x {side}: {whole}; per {POSITIONS} positions: {each}\n")
        sys.stdout.flush()
    if len(options.sides) > 1:
        for stage, times in seconds.items():
            sys.stdout.write(f"{stage}: balance at {balance(options.sides, times):.0f} positions\n")


def balance(sides: list[int], seconds: list[float]) -> float:
    """a / b of the line a + b x positions through seconds per position."""
    areas = [float(side**2) for side in sides]
    slope, constant = statistics.linear_regression(areas, [s / a for s, a in zip(seconds, areas, strict=True)])
    return constant / slope if slope > 0 else float("inf")


def timed(run: Callable[[], Any]) -> float:
    """Seconds of one call."""
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def load(options: argparse.Namespace) -> Any:
    """The generator, as inference has it or as it is trained."""
    generator = load_generator(options.model, dtype=DTYPES[options.dtype], faster=not options.plain)
    return generator.to(dtype=DTYPES[options.dtype], memory_format=torch.channels_last).requires_grad_(False)


def stage_of(generator: Any, stage: str, side: int) -> Callable[[], Tensor]:
    """One evaluation of one network on random input for ``side`` x ``side`` latent positions."""
    factor, dtype = generator.autoencoder.factor, next(generator.parameters()).dtype

    def random(*shape: int) -> Tensor:
        return torch.rand(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)

    if stage == "encode":
        image = random(1, 3, side * factor, side * factor)
        return lambda: generator.encode(image)
    latent = random(1, generator.latent_channels, side, side)
    if stage == "decode":
        return lambda: generator.decode(latent)
    if hasattr(generator, "step"):
        return lambda: generator.step(latent)
    lr = random(1, 3, side * factor // generator.scale, side * factor // generator.scale)
    return lambda: generator.unet(latent, torch.tensor([5]), lr)


def in_own_interpreter(options: argparse.Namespace, side: int, stage: str) -> int:
    """The result of :func:`memory_of` in a fresh interpreter."""
    command = [sys.executable, __file__, options.model, str(side), "--dtype", options.dtype, "--stage", stage]
    command += ["--plain"] if options.plain else []
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def memory_of(options: argparse.Namespace) -> int:
    """Peak bytes of one evaluation over what was resident before it, in this interpreter; Linux only."""
    generator = load(options)
    run = stage_of(generator, options.stage, options.sides[0])
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
    before = resident_memory()["now"]
    with torch.inference_mode():
        run()
    return resident_memory()["peak"] - before


if __name__ == "__main__":
    main()
