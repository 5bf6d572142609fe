"""A grouping of the rows with its best columns: what all searches produce, and how one is improved by alternation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .assign import assign, assignment_value, rows_by_group
from .backend import Backend
from .columns import Budget

__all__ = ["Grouping", "alternate", "better", "consecutive_labels", "evaluate", "group_sizes"]


def group_sizes(m: int, v: int) -> np.ndarray:
    """Rows per group, int64: `v` each, and what is left in the last."""
    groups = -(-m // v)
    sizes = np.full(groups, v, dtype=np.int64)
    if groups:
        sizes[-1] = m - (groups - 1) * v
    return sizes


@dataclass(frozen=True)
class Grouping:
    """A grouping of the rows and its best kept columns.

    Attributes
    ----------
    labels : int64 array (m,)
        The group of each row.
    keep : bool array (groups, k)
        The columns that each group keeps.
    kept_score : float
        The sum of the scores of all kept weights.
    """

    labels: Any
    keep: Any
    kept_score: float


def evaluate(xp: Backend, s: Any, labels: Any, budget: Budget) -> Grouping:
    """The best kept columns for the groups `labels` of the rows of the score matrix `s`."""
    sums = xp.group_sums(s, rows_by_group(xp, labels), budget.sizes)
    keep = budget.select(xp, sums)
    return Grouping(labels, keep, xp.total(xp.where(keep, sums, sums * 0)))


def better(a: Grouping, b: Grouping) -> Grouping:
    """The one that keeps more; `a` if they keep the same."""
    return b if b.kept_score > a.kept_score else a


def consecutive_labels(xp: Backend, sizes: np.ndarray) -> Any:
    """Groups of consecutive rows."""
    return xp.asarray(np.repeat(np.arange(len(sizes)), sizes))


def alternate(xp: Backend, s: Any, start: Grouping, budget: Budget, *, iterations: int = 60) -> Grouping:
    """Rows to their best groups, then columns to theirs, until neither helps; the kept score never falls."""
    best = start
    for _ in range(iterations):
        profit = xp.matmul(s, xp.to_float(best.keep).T)
        labels = assign(xp, profit, budget.sizes)
        # Relative to float32's rounding in the product, so that a standstill is recognised as one.
        if assignment_value(xp, profit, labels) <= best.kept_score * (1 + 1e-7):
            break
        new = evaluate(xp, s, labels, budget)
        if new.kept_score <= best.kept_score:
            break
        best = new
    return best
