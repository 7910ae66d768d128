"""Means, intervals and paired tests: recorded values, and ties counted by hand."""

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from onestepsr.evaluate import result
from onestepsr.evaluate.result import compare_paired, holm, summarize, wilcoxon_test

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "statistics.json").read_text())
"""Recorded from an implementation without SciPy: incomplete beta by its continued fraction, signs counted exactly."""


def samples(count: int, seed: int, shift: float = 0.05) -> tuple[list[float], list[float]]:
    rng = np.random.default_rng(seed)
    first = rng.normal(25, 3, count)
    return first.tolist(), (first + rng.normal(shift, 0.5, count)).tolist()


@pytest.mark.parametrize("count", [2, 3, 7, 13, 60, 200, 201, 500])
def test_recorded_values(count: int) -> None:
    first, second = samples(count, seed=count)
    own, found = summarize(first), compare_paired(first, second)
    values = (own.mean, own.std, own.interval95, found.difference.mean, found.difference.interval95)
    assert [*values, found.p_student, found.p_wilcoxon] == pytest.approx(GOLDEN[str(count)], rel=1e-9)
    assert found.higher + found.lower == count


def test_recorded_values_with_ties_and_zeros() -> None:
    rng = np.random.default_rng(5)
    for count in (6, 15, 40, 150, 300):
        found = compare_paired([0.0] * count, rng.integers(-4, 6, count).astype(float).tolist())
        assert [found.p_student, found.p_wilcoxon] == pytest.approx(GOLDEN[f"ties{count}"], rel=1e-9)


def test_one_value_has_neither_spread_nor_interval() -> None:
    summary = summarize([3.0])
    assert (summary.mean, summary.std, summary.interval95, summary.count) == (3.0, None, None, 1)


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
    assert result.mean([1.0, None, 3.0]) == 2.0
    assert result.mean([None]) is None
