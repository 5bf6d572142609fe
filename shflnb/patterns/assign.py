"""Balanced assignment of rows to groups: maximise sum_i profit[i, a_i] with exactly sizes[g] rows in group g.

An exact transport solver takes seconds to minutes at 4096 rows, so two vectorised steps come close instead:

1. prices: a Sinkhorn-like ascent on one price per group, until the rows' favourites at those prices are nearly
   balanced;
2. greedy by regret: every open row asks for its best open group, groups accept those who would lose most elsewhere.

Measured on profits of trained and synthetic layers (384 to 1536 rows, v = 32 and 64) against the exact optimum: 0.2 to
0.5 % of the distance between a random and the best assignment is lost, without prices 11 to 16 % (2026-11). What is
lost here is found again by the exchanges of `swaps.py`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .backend import Backend

__all__ = ["assign", "assignment_value", "rows_by_group"]


def rows_by_group(xp: Backend, labels: Any) -> Any:
    """Row numbers ordered by group, in rising order inside a group."""
    return xp.argsort(labels)


def assignment_value(xp: Backend, profit: Any, labels: Any) -> float:
    """sum_i profit[i, labels[i]]"""
    return xp.total(xp.take_along(profit, labels[:, None]))


def assign(xp: Backend, profit: Any, sizes: np.ndarray, *, price_steps: int = 12) -> Any:
    """Labels int64 (m,) of a good balanced assignment for `profit` float32 (m, groups); O(m * groups) per step."""
    if len(sizes) == 1:
        return xp.zeros_int(profit.shape[0])
    priced = profit - _prices(xp, profit, sizes, price_steps)[None, :]
    return _greedy(xp, priced, sizes)


def _prices(xp: Backend, profit: Any, sizes: np.ndarray, steps: int) -> Any:
    share = xp.asarray((sizes / sizes.sum()).astype(np.float32))
    _, first, second = xp.top2(profit)
    spread = float((first - second).mean()) + 1e-30
    price = xp.full((profit.shape[1],), 0.0)
    # Annealed from four times the mean regret to a quarter of it: sharp enough that few rows are left to the greedy
    # step.
    for step in range(steps):
        eps = spread * 4.0 * (1.0 / 16.0) ** (step / max(1, steps - 1))
        soft = xp.softmax((profit - price[None, :]) / eps)
        price = price + eps * xp.log((soft.mean(0) + 1e-12) / share)
    return price


def _greedy(xp: Backend, work: Any, sizes: np.ndarray) -> Any:
    """Rounds of asking and accepting; every round fills a group or places all rows. Overwrites `work`."""
    m, groups = work.shape
    labels = xp.zeros_int(m)
    room = xp.asarray(sizes.astype(np.int64))
    rows = xp.arange(m)
    while rows.shape[0]:
        best, first, second = xp.top2(work)
        order = xp.argsort(first - second, descending=True)
        order = order[xp.argsort(best[order])]
        queue = best[order]
        counts = xp.bincount(best, groups)
        place = xp.arange(rows.shape[0]) - (xp.cumsum(counts) - counts)[queue]
        accepted = place < room[queue]
        taken, left = order[accepted], order[~accepted]
        labels[rows[taken]] = best[taken]
        room = room - xp.bincount(best[taken], groups)
        rows = rows[left]
        work = xp.take_rows(work, left)
        work[:, room == 0] = -np.inf
    return labels
