"""Photos per second from a folder: decoding and cropping, without degradation.

    python scripts/reading.py PHOTO_DIR [--photos 1000] [--crop 256] [--json FILE]

Prints a table and one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from onestepsr.data.datasets import DataConfig, build_dataset

BATCH, WARM_UP = 4, 40


def photos_per_second(config: DataConfig, photos: int, workers: int) -> float:
    """Rate of the loader after its first batches; nothing is kept decoded."""
    dataset = build_dataset(config, seed=0, with_lr=False)
    loader = DataLoader(dataset, batch_size=BATCH, sampler=range(WARM_UP + photos), num_workers=workers)
    start = 0.0
    for number, _ in enumerate(loader, start=1):
        if number * BATCH == WARM_UP:
            start = time.perf_counter()
    return photos / (time.perf_counter() - start)


def seconds_to_open(config: DataConfig) -> float:
    """Seconds to start: listing the folder and reading the headers of its files."""
    start = time.perf_counter()
    build_dataset(config, seed=0, with_lr=False)
    return time.perf_counter() - start


def main() -> None:
    """Measure and print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos", type=Path, metavar="PHOTO_DIR")
    parser.add_argument("--photos", type=int, default=1000, dest="count")
    parser.add_argument("--crop", type=int, default=256)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = DataConfig(paths=(arguments.photos,), crop=arguments.crop, cache_bytes=0)
    opening = seconds_to_open(config)
    rates = {
        f"{workers} worker{'s' * (workers > 1)}": photos_per_second(config, arguments.count, workers)
        for workers in (1, 2)
    }
    print(f"{'opening':<20}{opening:>10.2f} s")
    for name, rate in rates.items():
        print(f"{name:<20}{rate:>10.1f} photos/s, crop {arguments.crop}")
    report = json.dumps({"schema": 1, "crop": arguments.crop, "opening_seconds": opening, "photos_per_second": rates})
    print(report)
    if arguments.json:
        arguments.json.write_text(report + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
