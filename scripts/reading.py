"""Photos per second from a folder and from tar shards of the same photos: decoding and cropping, without degradation.

    python scripts/reading.py PHOTO_DIR [--photos 1000] [--crop 256] [--json FILE]

Makes the shards in a temporary folder, 100 photos each. Prints a table and one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import tarfile
import tempfile
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from onestepsr.data.datasets import DataConfig, build_dataset
from onestepsr.data.photos import find_images

BATCH, WARM_UP, PER_SHARD = 4, 40, 100


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
    """Time to start: reading headers of files, or building or loading the indexes."""
    start = time.perf_counter()
    build_dataset(config, seed=0, with_lr=False)
    return time.perf_counter() - start


def make_shards(photos: list[Path], folder: Path) -> None:
    """Write plain tar files of PER_SHARD photos."""
    for shard, begin in enumerate(range(0, len(photos), PER_SHARD)):
        with tarfile.open(folder / f"train-{shard:05d}.tar", "w") as tar:
            for number, path in enumerate(photos[begin : begin + PER_SHARD]):
                tar.add(path, f"{begin + number:08d}{path.suffix}")


def main() -> None:
    """Measure both and print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos", type=Path, metavar="PHOTO_DIR")
    parser.add_argument("--photos", type=int, default=1000, dest="count")
    parser.add_argument("--crop", type=int, default=256)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        make_shards(find_images(arguments.photos), Path(temporary))
        values = {"crop": arguments.crop, "cache_bytes": 0, "cache_dir": Path(temporary)}
        folder = DataConfig(paths=(arguments.photos,), **values)
        shards = DataConfig(kind="shards", paths=(Path(temporary),), **values)
        opening = {"indexing shards": seconds_to_open(shards), "opening shards": seconds_to_open(shards)}
        opening["opening folder"] = seconds_to_open(folder)
        rates = {
            f"{name}, {workers} worker{'s' * (workers > 1)}": photos_per_second(config, arguments.count, workers)
            for workers in (1, 2)
            for name, config in (("folder", folder), ("shards", shards))
        }
    for name, seconds in opening.items():
        print(f"{name:<20}{seconds:>10.2f} s")
    for name, rate in rates.items():
        print(f"{name:<20}{rate:>10.1f} photos/s, crop {arguments.crop}")
    report = json.dumps({"schema": 1, "crop": arguments.crop, "seconds": opening, "photos_per_second": rates})
    print(report)
    if arguments.json:
        arguments.json.write_text(report + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
