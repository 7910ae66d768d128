"""Pairs per second of each degradation preset, from decoded photos in memory, with one and two worker processes.

    python scripts/degradation.py PHOTO_DIR [--pairs 200] [--crop 256] [--json FILE]

Prints a table and one line of JSON. Each process uses one thread, as the workers of a training loader do.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from onestepsr.data.datasets import DataConfig, build_dataset
from onestepsr.data.degradation.presets import PRESETS


def pairs_per_second(config: DataConfig, pairs: int, workers: int) -> float:
    """Rate after one epoch over a few photos has filled the cache of each worker."""
    dataset = build_dataset(config, seed=0)
    warm_up = 4 * len(dataset)
    warm_up -= warm_up % 4
    loader = DataLoader(dataset, batch_size=4, sampler=range(warm_up + pairs), num_workers=workers)
    start = 0.0
    for number, _ in enumerate(loader, start=1):
        if number * 4 == warm_up:
            start = time.perf_counter()
    return pairs / (time.perf_counter() - start)


def main() -> None:
    """Measure every preset and print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos", type=Path)
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--crop", type=int, default=256)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rates: dict[str, dict[str, float]] = {}
    print(f"{'preset':<14}{'1 worker':>10}{'2 workers':>11}   pairs/s, {arguments.crop} px")
    for name in PRESETS:
        config = DataConfig(paths=(arguments.photos,), crop=arguments.crop, degradation=name)
        rates[name] = {str(count): round(pairs_per_second(config, arguments.pairs, count), 1) for count in (1, 2)}
        print(f"{name:<14}{rates[name]['1']:>10}{rates[name]['2']:>11}")
    report = json.dumps({"schema": 1, "crop": arguments.crop, "pairs_per_second": rates})
    print(report)
    if arguments.json:
        arguments.json.write_text(report + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
