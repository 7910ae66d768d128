"""How much memory one image takes, measured in an interpreter of its own.

``python -m onestepsr.benchmark.peak_memory`` reads its task as JSON from standard input and prints what it found.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from onestepsr.core.errors import OneStepSRError

MODULE = "onestepsr.benchmark.peak_memory"


@dataclass(frozen=True, kw_only=True)
class MemoryTask:
    """One image to enlarge."""

    model: str
    """Name or path of the model."""
    source: str
    """The image."""
    target: str
    """Where the enlarged image goes."""
    device: str
    """Device, as ``--device`` takes it."""
    dtype: str
    """Number format, as ``--dtype`` takes it."""
    tile: int | Literal["auto", "off"]
    """Tile side, as ``--tile`` takes it."""
    steps: int | None = None
    """Evaluations of a residual-shifting generator; None is its own number."""
    memory: float | None = None
    """Most gigabytes to plan with, as ``--memory`` takes it."""
    compiled: bool = False
    """Whether through ``torch.compile``."""


@dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """Bytes of one enlargement. On the machine: what is resident in main memory."""

    interpreter: int
    """With the libraries imported, before the model is loaded."""
    loaded: int
    """With the model loaded."""
    peak: int
    """The most at any time, from the first import to the written file."""
    device_peak: int | None = None
    """The most that PyTorch had allocated on the accelerator; None without one."""

    @property
    def own(self) -> int:
        """The peak over the interpreter's own: weights, feature maps and images."""
        return self.peak - self.interpreter


def measure_memory(task: MemoryTask) -> MemoryUse:
    """Memory of ``task`` in a fresh interpreter. Raises OneStepSRError with its last line if that fails."""
    command = [sys.executable, "-m", MODULE]
    done = subprocess.run(command, input=json.dumps(asdict(task)), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise OneStepSRError(f"measuring the memory of {task.model} failed: {last}")
    return MemoryUse(**json.loads(done.stdout.splitlines()[-1]))


def enlarge_once(task: MemoryTask) -> MemoryUse:
    """Enlarge the image in this process and report what that took."""
    import torch

    from onestepsr.core.machine import resident_memory
    from onestepsr.imaging.read import read_image
    from onestepsr.imaging.write import write_image
    from onestepsr.inference.upscaler import UpscaleOptions, Upscaler

    interpreter = resident_memory()["now"]
    upscaler = Upscaler.from_pretrained(task.model, task.device, task.dtype, steps=task.steps, compiled=task.compiled)
    loaded = resident_memory()["now"]
    options = UpscaleOptions(tile=task.tile, memory=task.memory)
    image = upscaler.upscale_image(read_image(Path(task.source)), options)
    write_image(image, Path(task.target))
    on_gpu = torch.cuda.max_memory_allocated(upscaler.device) if upscaler.device.type == "cuda" else None
    return MemoryUse(interpreter=interpreter, loaded=loaded, peak=resident_memory()["peak"], device_peak=on_gpu)


if __name__ == "__main__":
    found = enlarge_once(MemoryTask(**json.load(sys.stdin)))
    sys.stdout.write(json.dumps(asdict(found)) + "\n")
