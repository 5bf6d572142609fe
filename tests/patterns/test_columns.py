"""The choice of columns for given groups is exact: compared with trying every set of lengths, and with a plain sort."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from shflnb.patterns.backend import NumpyBackend
from shflnb.patterns.columns import Budget, rounding_step
from shflnb.patterns.grouping import group_sizes

XP = NumpyBackend()


def sums(groups: int, k: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((groups, k)).astype(np.float32)


@pytest.mark.parametrize("density", [0.0, 0.01, 0.25, 0.5, 0.99, 1.0])
def test_a_layer_budget_keeps_the_best_vectors_of_all_groups(density: float) -> None:
    t = sums(6, 40)
    keep = Budget(group_sizes(24, 4), 40, density).select(XP, t)
    count = int(density * t.size + 1e-6)
    assert keep.sum() == count
    np.testing.assert_allclose(t[keep].sum(), np.sort(t.ravel())[::-1][:count].sum(), rtol=1e-6)


def test_ties_do_not_break_the_budget() -> None:
    budget = Budget(group_sizes(24, 4), 40, 0.25)
    assert budget.select(XP, np.ones((6, 40), dtype=np.float32)).sum() == 60
    assert budget.select(XP, np.zeros((6, 40), dtype=np.float32)).sum() == 60
    rounded = Budget(group_sizes(24, 4), 40, 0.25, step=5)
    assert rounded.select(XP, np.ones((6, 40), dtype=np.float32)).sum() == 60
    equal = Budget(group_sizes(24, 4), 40, 0.25, equal=True)
    assert (equal.select(XP, np.ones((6, 40), dtype=np.float32)).sum(1) == 10).all()


@pytest.mark.parametrize("m", [21, 22, 23])
@pytest.mark.parametrize("density", [0.1, 0.25, 0.5, 0.9])
def test_a_short_last_group_is_ranked_and_counted_by_its_size(m: int, density: float) -> None:
    sizes = group_sizes(m, 4)
    budget = Budget(sizes, 40, density)
    t = sums(6, 40) * sizes[:, None].astype(np.float32)
    keep = budget.select(XP, t)
    spent = (keep * sizes[:, None]).sum()
    assert spent <= density * m * 40 + 1e-6 < spent + 4
    value = t / sizes[:, None]
    assert value[keep].min() >= np.sort(value[~keep])[-1]


@pytest.mark.parametrize(("k", "step"), [(12, 4), (10, 4), (7, 3)])
@pytest.mark.parametrize("seed", range(4))
def test_rounded_lengths_lose_the_least(k: int, step: int, seed: int) -> None:
    groups, density = 3, 0.5
    t = sums(groups, k, seed) ** 3
    keep = Budget(group_sizes(groups * 2, 2), k, density, step=step).select(XP, t)
    lengths = keep.sum(1)
    allowed = {*range(0, k + 1, step), k}
    assert set(lengths.tolist()) <= allowed and lengths.sum() <= density * groups * k
    ranked = -np.sort(-t, axis=1)

    def worth(choice: tuple[int, ...]) -> float:
        return float(sum(ranked[g, :n].sum() for g, n in enumerate(choice)))

    # The best of all choices that keep no more columns than ours: no way of spending the same is better.
    best = max(worth(c) for c in itertools.product(sorted(allowed), repeat=groups) if sum(c) <= lengths.sum())
    np.testing.assert_allclose(t[keep].sum(), best, rtol=1e-6)
    assert density * groups * k - lengths.sum() < step + (k % step > 0) * step


def test_equal_lengths_rounded_differ_by_one_step_and_spend_the_budget() -> None:
    t = sums(8, 100)
    lengths = Budget(group_sizes(32, 4), 100, 0.25, equal=True, step=16).select(XP, t).sum(1)
    assert set(lengths.tolist()) == {16, 32} and 200 - 16 < lengths.sum() <= 200


def test_equal_lengths_without_rounding() -> None:
    assert (Budget(group_sizes(32, 4), 100, 0.25, equal=True).select(XP, sums(8, 100)).sum(1) == 25).all()


@pytest.mark.parametrize(
    ("k", "tile_k", "density", "step"), [(4096, 64, 0.25, 64), (64, 64, 0.25, 16), (64, 64, 0.01, 1), (8, 16, 1.0, 8)]
)
def test_the_step_shrinks_until_an_average_group_holds_one(k: int, tile_k: int, density: float, step: int) -> None:
    assert rounding_step(k, tile_k, density) == step


@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize("step", [1, 4])
def test_prices_part_kept_from_dropped(equal: bool, step: int) -> None:
    t = sums(6, 40)
    keep, price = Budget(group_sizes(24, 4), 40, 0.3, equal=equal, step=step).select_with_price(XP, t)
    price = np.broadcast_to(price, t.shape)
    assert (t[keep] >= price[keep]).all() and (t[~keep] <= price[~keep]).all()


def test_the_kept_group_lengths_of_empty_and_full_groups_have_a_price() -> None:
    t = np.stack([np.full(8, 9.0), np.full(8, 0.1)]).astype(np.float32)
    keep, price = Budget(group_sizes(4, 2), 8, 0.5, step=4).select_with_price(XP, t)
    assert keep[0].all() and not keep[1].any()
    assert price[0, 0] <= 9.0 and price[1, 0] > 0.1
