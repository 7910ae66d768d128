"""Means, intervals and paired tests against SciPy and against counting by hand."""

from itertools import product

import numpy as np
import pytest
from scipy import stats

from onestepsr.evaluate import statistics
from onestepsr.evaluate.statistics import compare_paired, holm, student_quantile, summarize, wilcoxon_test


def samples(count: int, seed: int = 0, shift: float = 0.2) -> tuple[list[float], list[float]]:
    rng = np.random.default_rng(seed)
    first = rng.normal(25, 3, count)
    return first.tolist(), (first + rng.normal(shift, 0.5, count)).tolist()


@pytest.mark.parametrize("count", [2, 3, 7, 30, 500])
def test_interval_is_that_of_students_t(count: int) -> None:
    values = samples(count)[0]
    summary = summarize(values)
    low, high = stats.t.interval(0.95, count - 1, loc=np.mean(values), scale=stats.sem(values))
    assert summary.mean == pytest.approx((low + high) / 2, rel=1e-12)
    assert summary.interval95 == pytest.approx((high - low) / 2, rel=1e-10)
    assert summary.std == pytest.approx(np.std(values, ddof=1), rel=1e-12)


def test_one_value_has_neither_spread_nor_interval() -> None:
    summary = summarize([3.0])
    assert (summary.mean, summary.std, summary.interval95, summary.count) == (3.0, None, None, 1)


@pytest.mark.parametrize("degrees", [1, 2, 5, 29, 1000, 20_000])
def test_quantile(degrees: int) -> None:
    assert student_quantile(0.975, degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=1e-9)


@pytest.mark.parametrize("count", [2, 5, 13, 60, 200])
def test_paired_tests_equal_scipys(count: int) -> None:
    first, second = samples(count, seed=count)
    found = compare_paired(first, second)
    assert found.p_student == pytest.approx(stats.ttest_rel(second, first).pvalue, rel=1e-8)
    exact = stats.wilcoxon(second, first, method="exact").pvalue
    assert found.p_wilcoxon == pytest.approx(exact, rel=1e-8)
    assert found.higher + found.lower == count
    assert found.difference.mean == pytest.approx(np.mean(second) - np.mean(first), abs=1e-12)


def test_many_pairs_take_the_normal_approximation() -> None:
    first, second = samples(statistics.EXACT_RANKS + 50, shift=0.02)
    expected = stats.wilcoxon(second, first, method="asymptotic", correction=True).pvalue
    assert compare_paired(first, second).p_wilcoxon == pytest.approx(expected, rel=1e-9)


def test_ties_and_zeros_are_counted_exactly() -> None:
    differences = [1.0, 1.0, -1.0, 2.0, 2.0, 3.0, 0.0]
    ranks = stats.rankdata([1, 1, 1, 2, 2, 3])
    observed = min(ranks[2], ranks.sum() - ranks[2])
    sums = [sum(r for r, sign in zip(ranks, signs, strict=True) if sign) for signs in product((0, 1), repeat=6)]
    assert wilcoxon_test(differences) == pytest.approx(2 * np.mean(np.array(sums) <= observed + 1e-9))


def test_equal_values_decide_nothing() -> None:
    found = compare_paired([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert (found.p_student, found.p_wilcoxon, found.higher, found.lower) == (1.0, None, 0, 0)


def test_a_constant_shift_is_certain() -> None:
    first = [20.1, 25.7, 31.3]
    assert compare_paired(first, [value + 0.1 for value in first]).p_student == 0.0


def test_values_of_different_length_are_a_mistake() -> None:
    with pytest.raises(ValueError, match="argument 2"):
        compare_paired([1.0], [1.0, 2.0])


def test_holm_is_for_the_number_of_comparisons() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


def test_mean_leaves_out_what_is_missing() -> None:
    assert statistics.mean([1.0, None, 3.0]) == 2.0
    assert statistics.mean([None]) is None
