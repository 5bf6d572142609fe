"""The authors' search: balanced k-means on the bits of a pre-mask, then the best columns of those groups.

Source: Huang et al., "Shfl-BW", DAC 2022, arXiv 2203.05016, and the authors' published search. Their balanced k-means
solves a minimum-cost flow per iteration; here the same Lloyd iteration uses the assignment of `assign.py`, which is
within a fraction of a per cent of the flow's optimum and takes milliseconds.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .assign import assign, rows_by_group
from .backend import Backend
from .columns import Budget
from .grouping import Grouping, consecutive_labels, evaluate

__all__ = ["balanced_kmeans", "pre_mask", "search_paper"]


def pre_mask(xp: Backend, s: Any, density: float) -> Any:
    """The unstructured mask of the given density as float32 zeros and ones: `s >= percentile(s)`."""
    count = min(round(density * s.shape[0] * s.shape[1]), s.shape[0] * s.shape[1])
    if count <= 0:
        return s * 0
    return xp.to_float(s >= xp.kth_largest(s, count))


def balanced_kmeans(xp: Backend, x: Any, sizes: np.ndarray, *, seed: int = 0, iterations: int = 20) -> Any:
    """Labels int64 of a balanced k-means of the rows of `x` in the Euclidean metric, started from random rows.

    |x - c|^2 = |x|^2 - 2 x.c + |c|^2: the first term does not depend on the cluster, so the profit of row x in cluster
    c is 2 x.c - |c|^2, one product per iteration.
    """
    start = np.random.default_rng(seed).choice(x.shape[0], size=len(sizes), replace=False)
    centres = xp.take_rows(x, xp.asarray(start))
    width = xp.asarray(sizes.astype(np.float32))[:, None]
    labels = None
    for _ in range(iterations):
        profit = 2.0 * xp.matmul(x, centres.T) - (centres * centres).sum(1)[None, :]
        new = assign(xp, profit, sizes)
        if labels is not None and bool((new == labels).all()):
            break
        labels = new
        centres = xp.group_sums(x, rows_by_group(xp, labels), sizes) / width
    return labels


def search_paper(xp: Backend, s: Any, budget: Budget, *, seed: int = 0) -> Grouping:
    """Pre-mask at twice the density, balanced k-means on its bits, then the best columns."""
    if len(budget.sizes) < 2 or budget.weights < 1:
        return evaluate(xp, s, consecutive_labels(xp, budget.sizes), budget)
    bits = pre_mask(xp, s, 2 * budget.density)
    return evaluate(xp, s, balanced_kmeans(xp, bits, budget.sizes, seed=seed), budget)
