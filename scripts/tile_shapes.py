"""Time of one image in the tiles that the planner chooses, beside square ones of a given side.

    python scripts/tile_shapes.py 500x333:268 640x480:256 --model d3sr-tiny --rounds 7

The images are made up; both ways take turns, and medians are shown.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import numpy as np
from PIL import Image

from onestepsr import Upscaler


def main() -> None:
    """Read the arguments, time, write one line per size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="+", help="WIDTHxHEIGHT:SIDE, the side of the squares")
    parser.add_argument("--model", default="d3sr-tiny")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    upscaler = Upscaler.from_pretrained(arguments.model)
    for text in arguments.sizes:
        size, side = text.split(":")
        width, height = map(int, size.split("x"))
        coarse = np.random.default_rng(0).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        chosen, squares = _medians(upscaler, image, int(side), arguments.rounds)
        sys.stdout.write(f"{size}: {chosen:.2f} s, squares of {side}: {squares:.2f} s, {squares / chosen:.2f} x\n")
        sys.stdout.flush()


def _medians(upscaler: Upscaler, image: Image.Image, side: int, rounds: int) -> tuple[float, float]:
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 1):
        for seconds, tile in zip(times, ("auto", side), strict=True):
            start = time.perf_counter()
            upscaler(image, tile=tile)
            if number:  # the first of each only warms up
                seconds.append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])


if __name__ == "__main__":
    main()
