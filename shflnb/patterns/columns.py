"""Which columns each group keeps, given the sums of the scores of its rows: the exact optimum for a budget.

`T[g, c]` is the summed score of the column vector (g, c); keeping it costs `sizes[g]` weights. All budgets rank by
score per weight, `T[g, c] / sizes[g]`: the groups have equal sizes but for the last, which may be shorter.

Rounded to a tile, a group's columns are taken in steps of `step` columns in falling order. The steps of one group are
then worth less and less, so the best steps of the whole layer are always the first ones of their groups, and a plain
threshold over steps is optimal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .backend import Backend

__all__ = ["Budget", "rounding_step"]


def rounding_step(k: int, tile_k: int, density: float) -> int:
    """Columns per rounding step: `tile_k`, halved until a group of average length has at least one whole step.

    With k = 64, tile_k = 64 and a density of 0.25 a step of 64 would leave three groups of four with nothing at all.
    """
    step = tile_k
    while step > 1 and step > density * k:
        step //= 2
    return step


@dataclass(frozen=True)
class Budget:
    """How many weights may stay, and how they may be spread over the groups.

    Attributes
    ----------
    sizes : int64 array (groups,)
        Rows per group; all equal, but the last may be smaller.
    k : int
        Columns of the weight.
    density : float
        Kept weights / all weights, at most.
    equal : bool
        All groups keep the same number of columns (to within one step when rounded).
    step : int
        Group lengths are multiples of this (or all k columns); 1 for no rounding.
    """

    sizes: np.ndarray
    k: int
    density: float
    equal: bool = False
    step: int = 1

    @property
    def weights(self) -> float:
        """Weights that may stay, with a hair of slack for the rounding of `density`."""
        return self.density * float(self.sizes.sum()) * self.k * (1 + 1e-9) + 1e-6

    def unrounded(self) -> Budget:
        """The same budget with groups of any length."""
        return Budget(self.sizes, self.k, self.density, self.equal)

    def select(self, xp: Backend, t: Any) -> Any:
        """The kept columns as a bool array (groups, k), never over the budget."""
        return self.select_with_price(xp, t)[0]

    def select_with_price(self, xp: Backend, t: Any) -> tuple[Any, Any]:
        """The kept columns, and per group (groups, 1) the sum from which on a column vector is worth keeping."""
        if self.step == 1 and not self.equal:
            return self._by_threshold(xp, t)
        ranked = xp.sort_rows(t)
        lengths = self._lengths(xp.host(ranked))
        return _by_lengths(xp, t, ranked, lengths)

    def _by_threshold(self, xp: Backend, t: Any) -> tuple[Any, Any]:
        v, short = int(self.sizes[0]), int(self.sizes[-1])
        places = t.shape[0] * self.k
        rows = xp.asarray(self.sizes.astype(np.float32))[:, None]
        value = t if v == short else t / rows
        count = min(int(self.weights // v), places)
        keep, threshold = _top(xp, value, count)
        # Vectors of a short last group are cheaper: what they leave over buys more, until less than one vector is left.
        while v != short and count < places:
            cost = v * count - (v - short) * int(keep[-1].sum())
            extra = int((self.weights - cost) // v)
            if extra <= 0:
                break
            count = min(count + extra, places)
            keep, threshold = _top(xp, value, count)
        return keep, threshold * (rows if v != short else rows * 0 + 1)

    def _lengths(self, ranked: np.ndarray) -> np.ndarray:
        """Kept columns per group (int64), the best for columns in falling order `ranked`."""
        groups, k, step = len(self.sizes), self.k, self.step
        if self.density >= 1.0:
            return np.full(groups, k, dtype=np.int64)
        starts = np.arange(0, k, step)
        widths = np.minimum(starts + step, k) - starts
        cost = widths[None, :] * self.sizes[:, None].astype(np.float64)
        if not self.equal:
            gains = np.add.reduceat(ranked, starts, axis=1, dtype=np.float64)
            return (_best_within(gains, cost, self.weights) * widths[None, :]).sum(axis=1)
        per_group = int((self.density * k * (1 + 1e-9) + 1e-6) // step)
        lengths = np.full(groups, min(per_group * step, k), dtype=np.int64)
        left = self.weights - float((lengths * self.sizes).sum())
        if step > 1 and per_group < len(widths) and left > 0:
            # One step more for the groups that gain most, so that the density of the layer is still met.
            gains = ranked[:, starts[per_group] : starts[per_group] + widths[per_group]].sum(axis=1, dtype=np.float64)
            lengths += _best_within(gains, cost[:, per_group], left) * widths[per_group]
        return lengths


def _top(xp: Backend, value: Any, count: int) -> tuple[Any, Any]:
    """The `count` largest as a mask, ties in reading order, and the smallest of them."""
    if count <= 0:
        return value == np.inf, value.max() * 2 + 1
    threshold = xp.kth_largest(value, count)
    keep = value >= threshold
    if int(keep.sum()) > count:
        keep = value > threshold
        ties = xp.nonzero((value == threshold).reshape(-1))
        keep.reshape(-1)[ties[: count - int(keep.sum())]] = True
    return keep, threshold


def _by_lengths(xp: Backend, t: Any, ranked: Any, lengths: np.ndarray) -> tuple[Any, Any]:
    k = t.shape[1]
    wanted = xp.asarray(lengths)[:, None]
    least = xp.take_along(ranked, xp.asarray(np.maximum(lengths - 1, 0))[:, None])
    next_one = xp.take_along(ranked, xp.asarray(np.minimum(lengths, k - 1))[:, None])
    price = xp.where(wanted == 0, next_one * 2 + 1, xp.where(wanted == k, least * 0, 0.5 * (least + next_one)))
    keep = (t >= least) & (wanted > 0)
    if bool((keep.sum(1) != wanted[:, 0]).any()):
        order = xp.argsort(t, descending=True)
        keep = xp.argsort(order) < wanted
    return keep, price


def _best_within(gains: np.ndarray, cost: np.ndarray, budget: float) -> np.ndarray:
    """Take the best by gain per cost until the next would pass the budget; True where taken."""
    order = np.argsort(-(gains / cost).ravel(), kind="stable")
    spent = np.cumsum(cost.ravel()[order])
    taken = np.zeros(order.size, dtype=bool)
    taken[order[: int(np.searchsorted(spent, budget, side="right"))]] = True
    return taken.reshape(gains.shape)
