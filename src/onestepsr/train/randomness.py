"""Every random number of a run, as a function of where in the run it is drawn.

A seed is the hash of (run seed, what for, rank, step, ...), so a resumed run draws what the uninterrupted one would
have drawn, and no draw shifts another.
"""

from __future__ import annotations

import hashlib

import torch


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from integers and words; different parts give unrelated seeds."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by :func:`derive_seed`."""
    return torch.Generator("cpu").manual_seed(derive_seed(*parts))
