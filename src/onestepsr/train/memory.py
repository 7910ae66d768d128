"""How much memory a run has needed so far."""

from __future__ import annotations

import sys

import torch
from accelerate import Accelerator


def peak_memory() -> dict[str, float]:
    """Largest memory of this process so far, and of its accelerator where there is one, in MB."""
    peaks: dict[str, float] = {}
    if sys.platform != "win32":
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        peaks["peak_memory_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6, 1)
    if torch.cuda.is_available():
        peaks["peak_gpu_memory_mb"] = round(torch.cuda.max_memory_allocated() / 1e6, 1)
    return peaks


def largest_peak_memory(accelerator: Accelerator) -> dict[str, float]:
    """:func:`peak_memory` of the process that needed most; all processes have to ask together."""
    peaks = peak_memory()
    if accelerator.num_processes == 1 or not peaks:
        return peaks
    every = accelerator.gather(torch.tensor([list(peaks.values())], device=accelerator.device))  # (processes, values)
    return {name: round(value, 1) for name, value in zip(peaks, every.amax(dim=0).tolist(), strict=True)}
