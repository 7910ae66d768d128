"""Means with intervals, and paired tests of two methods on the same images; no SciPy needed.

Images are the sample: an interval says how far the mean would move on other images of the same kind. Two methods
are compared by their differences image by image, because how hard an image is moves both alike and by more than
the methods differ.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
EXACT_RANKS = 200
"""Up to so many pairs the signed-rank test counts every assignment of signs; beyond, the normal approximation holds."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One metric over all images that have it."""

    mean: float
    std: float | None
    """Standard deviation of the sample (divisor n - 1); none for fewer than two values."""
    interval95: float | None
    """Half width of the 95 % confidence interval of the mean, from Student's t; none where ``std`` is none."""
    count: int


@dataclass(frozen=True, kw_only=True)
class PairedComparison:
    """How the second of two methods differs from the first on the images that both have."""

    difference: Summary
    """Second minus first, image by image."""
    p_student: float | None
    """Two-sided p value of the paired t-test that the mean difference is 0; none for fewer than two images."""
    p_wilcoxon: float | None
    """Two-sided p value of Wilcoxon's signed-rank test; none where no image differs."""
    higher: int
    """Images on which the second has the higher value."""
    lower: int
    """Images on which the second has the lower value."""


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of those values that there are."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def summarize(values: Sequence[float]) -> Summary:
    """Mean, spread and 95 % interval of at least one finite value."""
    count = len(values)
    if count < 2:
        return Summary(mean=float(values[0]), std=None, interval95=None, count=count)
    spread = statistics.stdev(values)
    half = student_quantile(0.5 + CONFIDENCE / 2, count - 1) * spread / math.sqrt(count)
    return Summary(mean=statistics.fmean(values), std=spread, interval95=half, count=count)


def compare_paired(first: Sequence[float], second: Sequence[float]) -> PairedComparison:
    """Compare two methods by their values on the same images, in the same order; at least one."""
    differences = [b - a for a, b in zip(first, second, strict=True)]
    return PairedComparison(
        difference=summarize(differences),
        p_student=student_test(differences),
        p_wilcoxon=wilcoxon_test(differences),
        higher=sum(value > 0 for value in differences),
        lower=sum(value < 0 for value in differences),
    )


def student_test(differences: Sequence[float]) -> float | None:
    """Two-sided p value of the paired t-test; none for fewer than two values, 0 or 1 where all are the same."""
    if len(differences) < 2:
        return None
    middle, spread = statistics.fmean(differences), statistics.stdev(differences)
    # Values that are equal but for rounding have no spread to speak of: a ratio of two rounding errors means nothing.
    if spread <= 1e-12 * max(abs(value) for value in differences):
        return 1.0 if middle == 0 else 0.0
    return student_tails(middle / (spread / math.sqrt(len(differences))), len(differences) - 1)


def wilcoxon_test(differences: Sequence[float]) -> float | None:
    """Two-sided p value of Wilcoxon's signed-rank test (Biometrics Bulletin 1, 1945); none if no value differs from 0.

    Zeros are left out, equal sizes share the mean of their ranks. Up to 200 pairs the distribution over all signs is
    exact, ties included; beyond, the normal approximation has the tie correction and that for continuity.
    """
    kept = np.asarray([value for value in differences if value != 0], dtype=np.float64)
    if not len(kept):
        return None
    ranks = _mean_ranks(np.abs(kept))
    positive = float(ranks[kept > 0].sum())
    statistic = min(positive, float(ranks.sum()) - positive)
    return _exact_tails(ranks, statistic) if len(kept) <= EXACT_RANKS else _normal_tails(ranks, statistic)


def holm(values: Sequence[float]) -> list[float]:
    """p values adjusted for their number after Holm (1979), in the order given.

    Of many comparisons some are small by chance: an adjusted value below 0.05 keeps the chance of even one false
    finding among all of them below 5 %.
    """
    order = sorted(range(len(values)), key=lambda index: values[index])
    adjusted, largest = [0.0] * len(values), 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, values[index] * (len(values) - place)))
        adjusted[index] = largest
    return adjusted


def student_tails(t: float, degrees: int) -> float:
    """Probability that Student's t with so many degrees of freedom is at least as far from 0 as ``t``."""
    return _incomplete_beta(degrees / (degrees + t * t), degrees / 2, 0.5)


@lru_cache(maxsize=256)
def student_quantile(probability: float, degrees: int) -> float:
    """The value below which Student's t lies with ``probability`` (0.5 to 1), found by halving intervals."""
    tails, low, high = 2 * (1 - probability), 0.0, 1.0
    while student_tails(high, degrees) > tails:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if student_tails(middle, degrees) > tails else (low, middle)
    return (low + high) / 2


def _mean_ranks(sizes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks from 1; equal sizes share the mean of their places."""
    _, places, counts = np.unique(sizes, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((2 * last - counts + 1) / 2)[places]


def _exact_tails(ranks: NDArray[np.float64], statistic: float) -> float:
    """Share of all 2^n signs whose rank sum is at least as far out; doubled ranks are whole numbers."""
    doubled = np.rint(2 * ranks).astype(int)
    chances = np.zeros(int(doubled.sum()) + 1)
    chances[0] = 1.0
    for rank in doubled:
        chances /= 2
        chances[rank:] += chances[: len(chances) - rank].copy()
    return min(1.0, 2 * float(chances[: round(2 * statistic) + 1].sum()))


def _normal_tails(ranks: NDArray[np.float64], statistic: float) -> float:
    middle, spread = float(ranks.sum()) / 2, math.sqrt(float((ranks**2).sum()) / 4)
    return min(1.0, math.erfc((middle - statistic - 0.5) / spread / math.sqrt(2)))


def _incomplete_beta(x: float, a: float, b: float) -> float:
    """Regularised incomplete beta function I_x(a, b) by its continued fraction (Abramowitz and Stegun 26.5.8)."""
    if x <= 0 or x >= 1:
        return 0.0 if x <= 0 else 1.0
    if x > (a + 1) / (a + b + 2):  # the fraction converges fast on the other side
        return 1 - _incomplete_beta(1 - x, b, a)
    scale = a * math.log(x) + b * math.log1p(-x) + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    return math.exp(scale) / (a * _beta_fraction(x, a, b))


def _beta_fraction(x: float, a: float, b: float) -> float:
    """The value of 1 + d_1 / (1 + d_2 / (1 + ...)), from the innermost term outwards."""
    value = 1.0
    for index in range(400, 0, -1):
        half = index // 2
        if index % 2:
            term = -(a + half) * (a + b + half) * x / ((a + index - 1) * (a + index))
        else:
            term = half * (b - half) * x / ((a + index - 1) * (a + index))
        value = 1 + term / value
    return value
