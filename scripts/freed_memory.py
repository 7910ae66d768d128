"""CPU time lost by handing large freed blocks back to the system, in one block of Stable Diffusion's autoencoder.

    python scripts/freed_memory.py [--channels 128] [--side 512] [--runs 3] [--json FILE]

Runs on one thread and reads the processor's own time, so that other work on the machine matters little.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor
from torch.nn import functional

from onestepsr.core.machine import describe_machine
from onestepsr.inference.devices import no_malloc_trim


def processor_milliseconds(run: Callable[[], Tensor], runs: int) -> float:
    """Least time of one run after one to warm up, user and system together."""
    best = float("inf")
    for number in range(runs + 1):
        begun = time.thread_time()
        run()
        if number:
            best = min(best, time.thread_time() - begun)
    return best * 1e3


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    layout, dtype = torch.channels_last, torch.bfloat16
    block = ResnetBlock2D(in_channels=options.channels, temb_channels=None, groups=32, eps=1e-6).eval()
    block = block.to(dtype=dtype, memory_format=layout)
    x = torch.randn(1, options.channels, options.side, options.side).to(dtype=dtype, memory_format=layout)
    operations: dict[str, Callable[[], Tensor]] = {
        "residual block": lambda: block(x, None),
        "convolution": lambda: block.conv1(x),
        "SiLU": lambda: functional.silu(x),
        "division": lambda: x / 1.0,
    }
    rows = {}
    with torch.inference_mode():
        for name, run in operations.items():
            usual = processor_milliseconds(run, options.runs)
            with no_malloc_trim():
                rows[name] = {"usual_ms": usual, "kept_ms": processor_milliseconds(run, options.runs)}
            print(f"{name:15s} usual {usual:7.1f} ms   kept {rows[name]['kept_ms']:7.1f} ms")
    result = {"schema": 1, "machine": describe_machine(["torch", "diffusers"]), "shape": list(x.shape), "times": rows}
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
