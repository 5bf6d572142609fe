"""What the tests of the patterns share: planted matrices, and the optimum of tiny cases by trying everything."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np
import pytest

Planted = Callable[..., tuple[np.ndarray, np.ndarray]]


@pytest.fixture
def planted() -> Planted:
    """planted(m, k, v, noise, seed) -> (weight, mask of the planted pattern), rows shuffled, density 1/4."""

    def make(m: int, k: int, v: int, noise: float = 0.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(seed)
        mask = np.zeros((m, k), dtype=bool)
        for start in range(0, m, v):
            mask[start : start + v, rng.choice(k, size=k // 4, replace=False)] = True
        mask = mask[rng.permutation(m)]
        w = np.where(mask, rng.standard_normal((m, k)), 0.0) + noise * rng.standard_normal((m, k))
        return w.astype(np.float32), mask

    return make


def partitions(rows: list[int], v: int) -> Iterator[list[tuple[int, ...]]]:
    """All ways to part `rows` into sets of `v`."""
    if not rows:
        yield []
        return
    for others in itertools.combinations(rows[1:], v - 1):
        rest = [row for row in rows[1:] if row not in others]
        for more in partitions(rest, v):
            yield [(rows[0], *others), *more]


@pytest.fixture
def brute_force() -> Callable[[np.ndarray, int, int], float]:
    """brute_force(scores, v, count): the most that `count` column vectors of any grouping can hold."""

    def best(scores: np.ndarray, v: int, count: int) -> float:
        s = scores.astype(np.float64)
        most = 0.0
        for groups in partitions(list(range(len(s))), v):
            sums = np.concatenate([s[list(group)].sum(0) for group in groups])
            most = max(most, float(np.sort(sums)[::-1][:count].sum()))
        return most

    return best
