"""Means with confidence intervals, and paired tests of two methods on the same images.

Images are the sample: an interval says how far the mean would move on other images of the same kind. Two methods
are compared by their differences image by image, because how hard an image is moves both alike and by more than
the methods differ.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

CONFIDENCE = 0.95
EXACT_PAIRS = 200
"""Largest number of pairs for which the signed-rank test is exact; beyond, the normal approximation holds."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One metric over all images that have it."""

    mean: float
    std: float | None
    """Standard deviation of the sample (divisor n - 1); None for fewer than two values."""
    interval95: float | None
    """Half width of the 95 % confidence interval of the mean, from Student's t; None if ``std`` is None."""
    count: int


@dataclass(frozen=True, kw_only=True)
class PairedComparison:
    """Difference of the second of two methods from the first, on the images that both have."""

    difference: Summary
    """Second minus first, image by image."""
    p_student: float | None
    """Two-sided p value of the paired t-test that the mean difference is 0; None for fewer than two images."""
    p_wilcoxon: float | None
    """Two-sided p value of Wilcoxon's signed-rank test; None if no image differs."""
    higher: int
    """Images on which the second has the higher value."""
    lower: int
    """Images on which the second has the lower value."""


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of the values that are not None; None if there is none."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def summarize(values: Sequence[float]) -> Summary:
    """Mean, standard deviation and 95 % interval of at least one finite value."""
    count = len(values)
    if count < 2:
        return Summary(mean=float(values[0]), std=None, interval95=None, count=count)
    spread = statistics.stdev(values)
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, count - 1)) * spread / math.sqrt(count)
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
    """Two-sided p value of the paired t-test; None for fewer than two values, 0 or 1 if all are the same."""
    if len(differences) < 2:
        return None
    # If all values are equal but for rounding, t would be a ratio of two rounding errors.
    if statistics.stdev(differences) <= 1e-12 * max(abs(value) for value in differences):
        return 1.0 if statistics.fmean(differences) == 0 else 0.0
    return float(stats.ttest_1samp(differences, 0).pvalue)


def wilcoxon_test(differences: Sequence[float]) -> float | None:
    """Two-sided p value of Wilcoxon's signed-rank test; zeros are left out, None if all are zero."""
    kept = np.asarray([value for value in differences if value != 0])
    if not kept.size:
        return None
    if kept.size <= EXACT_PAIRS and np.unique(np.abs(kept)).size < kept.size:
        return _exact_with_ties(kept)
    method = "exact" if kept.size <= EXACT_PAIRS else "asymptotic"
    return float(stats.wilcoxon(kept, method=method, correction=True).pvalue)


def holm(values: Sequence[float]) -> list[float]:
    """p values adjusted for their number after Holm (1979), in the order given.

    Of many comparisons some are small by chance: an adjusted value below 0.05 keeps the chance of even one false
    finding among all of them below 5 %.
    """
    order = sorted(range(len(values)), key=lambda index: values[index])
    adjusted, largest = [0.0] * len(values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, values[index] * (len(values) - rank)))
        adjusted[index] = largest
    return adjusted


def _exact_with_ties(differences: NDArray[np.float64]) -> float:
    """Exact signed-rank test with ties; SciPy's is exact for distinct absolute values only.

    Counts the sums of ranks over all 2^n signs; doubled ranks are whole numbers.
    """
    doubled = np.rint(2 * stats.rankdata(np.abs(differences))).astype(int)
    chances = np.zeros(int(doubled.sum()) + 1)
    chances[0] = 1.0
    for rank in doubled:
        chances /= 2
        chances[rank:] += chances[: len(chances) - rank].copy()
    positive = int(doubled[differences > 0].sum())
    return min(1.0, 2 * float(chances[: min(positive, int(doubled.sum()) - positive) + 1].sum()))
