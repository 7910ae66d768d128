"""Seeds derived from names and numbers: all different, and always the same."""

from __future__ import annotations

import itertools

import torch

from onestepsr.core.rng import derived_seed, generator


def test_seeds_differ_wherever_a_part_differs() -> None:
    parts = itertools.product((0, 1), ("loss", "dropout"), (0, 1), (0, 1, 10, 100), (0, 1), (0, 1, 10))
    seeds = [derived_seed(*each) for each in parts]
    assert len(set(seeds)) == len(seeds)
    assert derived_seed(1, 23) != derived_seed(12, 3)
    assert derived_seed(1) != derived_seed("1")


def test_seeds_stay_what_they_are() -> None:
    """Another hash would silently change every resumed run."""
    assert derived_seed(0, "loss", 0, 0, 0, 0) == 837782113053139133
    assert torch.equal(torch.rand(3, generator=generator(5, "a")), torch.rand(3, generator=generator(5, "a")))
