"""How well two results agree."""

import math


def decibels(signal, other) -> float:
    """Signal to noise ratio of ``other``."""
    return 20.0 * math.log10(signal.float().norm() / (other.float() - signal.float()).norm())
