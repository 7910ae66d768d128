from __future__ import annotations

import itertools

import torch

from onestepsr.train.randomness import derive_seed, generator


def test_seeds_differ_wherever_a_part_differs() -> None:
    parts = itertools.product((0, 1), ("loss", "dropout"), (0, 1), (0, 1, 10, 100), (0, 1), (0, 1, 10))
    seeds = [derive_seed(*each) for each in parts]
    assert len(set(seeds)) == len(seeds)
    assert derive_seed(1, 23) != derive_seed(12, 3)
    assert derive_seed(1) != derive_seed("1")


def test_seeds_stay_what_they_are() -> None:
    """Another hash would silently change every resumed run."""
    assert derive_seed(0, "loss", 0, 0, 0, 0) == 4458762779685691403
    assert torch.equal(torch.rand(3, generator=generator(5, "a")), torch.rand(3, generator=generator(5, "a")))
