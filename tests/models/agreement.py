"""How well two results agree."""

import math

import torch

from onestepsr.core.machine import instructions


def decibels(signal, other) -> float:
    """Signal to noise ratio of ``other``."""
    return 20.0 * math.log10(signal.float().norm() / (other.float() - signal.float()).norm())


def agree(found, expected) -> bool:
    """True if two results in bfloat16 of the same products, summed in float32 and rounded once, are the same bits.

    With AMX, on which we could not try it, the order of the sums may depend on the order of the weights in memory:
    there a few sums may be rounded the other way. One more rounding of all of them would be seen: it leaves 56 dB.
    """
    return torch.equal(found, expected) or ("amx_bf16" in instructions() and decibels(expected, found) > 60.0)
