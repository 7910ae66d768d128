"""Random numbers: generators derived from names and numbers, and the few draws that data needs.

A sample's randomness depends on (seed, purpose, index) and on nothing else, so any number of loader workers, any order
and any restart give the same sample.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch


def derived_seed(*path: int | str) -> int:
    """A seed in [0, 2^63) that is a fixed function of ``path``, for example ``(seed, "crop", index)``."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in path)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(*path: int | str) -> torch.Generator:
    """A CPU generator seeded with :func:`derived_seed`."""
    return torch.Generator().manual_seed(derived_seed(*path))


def uniform(low: float, high: float, rng: torch.Generator) -> float:
    """One number from U[low, high)."""
    return low + (high - low) * float(torch.rand((), generator=rng, dtype=torch.float64))


def integer(count: int, rng: torch.Generator) -> int:
    """One of 0, 1, ..., ``count - 1``."""
    return int(torch.randint(count, (), generator=rng))


def choose(weights: Sequence[float], rng: torch.Generator) -> int:
    """Index of one entry, drawn in proportion to non-negative ``weights`` whose sum is positive."""
    target = uniform(0, sum(weights), rng)
    last = 0
    for index, weight in enumerate(weights):
        if weight <= 0:
            continue
        last = index
        if target < weight:
            return index
        target -= weight
    return last
