"""Datasets without end: sample ``i`` of any i >= 0 depends on (seed, i) and the files alone.

Every epoch goes through the photos in a new order, so ``dataset[i]`` with i = 0, 1, 2, ... is the whole training stream
and a resumed run just continues counting. A sample is ``{"hr": (3, H, W), "lr": (3, H / scale, W / scale)}``, float32
RGB in [0, 1] on the 256 levels of 8 bit; without LR images it is ``{"hr": ...}``.
"""

from __future__ import annotations

from collections.abc import Callable

from onestepsr.data.config import DataConfig
from onestepsr.data.pair_dataset import PairsFolder, PairStream
from onestepsr.data.photo_dataset import HRFolder, HRStream, Sample, SampleStream
from onestepsr.data.pool import Pool
from onestepsr.data.shards.datasets import HRShards, PairShards

__all__ = [
    "DataConfig",
    "HRFolder",
    "HRShards",
    "PairShards",
    "PairsFolder",
    "Pool",
    "Sample",
    "SampleStream",
    "build_dataset",
]

KINDS: dict[str, Callable[[DataConfig, int, bool], HRStream | PairStream]] = {
    "hr_folder": HRFolder,
    "pairs": PairsFolder,
    "shards": HRShards,
    "shard_pairs": PairShards,
}


def build_dataset(config: DataConfig, seed: int, with_lr: bool = True) -> HRStream | PairStream | Pool:
    """Open the dataset that ``config`` describes; everything that is wrong with files or sizes is reported here."""
    source = KINDS[config.kind](config, seed, with_lr)
    return Pool(source, config, seed) if config.pool_size else source
