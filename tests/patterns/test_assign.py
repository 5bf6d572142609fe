from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from shflnb.patterns.assign import assign, assignment_value, rows_by_group
from shflnb.patterns.backend import NumpyBackend
from shflnb.patterns.grouping import group_sizes

XP = NumpyBackend()


def exact(profit: np.ndarray, sizes: np.ndarray) -> float:
    seats = np.repeat(np.arange(len(sizes)), sizes)
    rows, columns = linear_sum_assignment(-profit[:, seats])
    return float(profit[rows, seats[columns]].sum())


@pytest.mark.parametrize(("m", "v"), [(96, 16), (100, 16), (128, 8), (60, 20), (33, 16), (7, 3)])
@pytest.mark.parametrize("kind", ["noise", "popular", "clusters"])
def test_balanced_and_close_to_the_exact_optimum(m: int, v: int, kind: str) -> None:
    rng = np.random.default_rng(m + v)
    sizes = group_sizes(m, v)
    profit = rng.standard_normal((m, len(sizes)))
    if kind == "popular":
        profit += np.linspace(0, 6, len(sizes))
    if kind == "clusters":
        profit[np.arange(m), rng.integers(0, len(sizes), m)] += 5
    profit = profit.astype(np.float32)
    labels = assign(XP, profit, sizes)
    assert np.bincount(labels, minlength=len(sizes)).tolist() == sizes.tolist()
    best, random = exact(profit.astype(np.float64), sizes), float((profit.mean(0) * sizes).sum())
    # Some per cent of what there is to gain is what a greedy end leaves at such small sizes; without prices 10 to 20 %.
    # With 7 rows one wrong choice is a large part, so there only the balance counts.
    if m > 7:
        assert assignment_value(XP, profit, labels) >= best - 0.06 * (best - random)


def test_planted_groups_are_found() -> None:
    truth = np.random.default_rng(0).permutation(np.repeat(np.arange(8), 16))
    profit = np.random.default_rng(1).random((128, 8)).astype(np.float32)
    profit[np.arange(128), truth] += 2
    np.testing.assert_array_equal(assign(XP, profit, group_sizes(128, 16)), truth)


def test_equal_profits_and_one_group() -> None:
    labels = assign(XP, np.zeros((10, 3), dtype=np.float32), np.array([4, 4, 2]))
    assert np.bincount(labels).tolist() == [4, 4, 2]
    assert not assign(XP, np.ones((5, 1), dtype=np.float32), np.array([5])).any()


def test_rows_by_group_keeps_the_order_inside() -> None:
    np.testing.assert_array_equal(rows_by_group(XP, np.array([1, 0, 1, 0])), [1, 3, 0, 2])
