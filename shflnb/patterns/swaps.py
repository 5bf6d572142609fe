"""Exact local search: exchange single rows between pairs of groups, each exchange checked by its true gain.

Alternating rows and columns stops early: the kept columns of a group were chosen with its own rows in it, so every row
looks best where it is. The true gain of exchanging row i of group g with row j of group h, at a fixed price of a kept
weight, is

    sum_c phi_g(T[g,c] - S[i,c] + S[j,c]) - phi_g(T[g,c]) + phi_h(T[h,c] - S[j,c] + S[i,c]) - phi_h(T[h,c])
    phi_g(t) = max(t - theta_g, 0)

and costs O(k). One product R = S @ keep.T per sweep ranks all candidates: its values are biased, their order is good.
Then the groups meet in a round-robin tournament: in each round every group has one partner, all pairs propose their
best exchange, the true gains of all proposals are computed at once, and those that pass are made. `theta` is the score
of the last column vector within the budget (per group where the budget fixes the lengths); the sum is the Lagrangian of
the budget, and the kept score itself is measured after each sweep.

With a temperature an exchange that loses may pass, as in simulated annealing. Measured on layers of a small trained
transformer (2026-11): 200 sweeps of two tournaments reach what simulated annealing reaches with 100 million random
proposals, 4 to 8 % above the paper's search. Pairing the groups by their hopes instead of by the tournament was worse
(2.3 against 2.6 % at 4096 x
4096).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .assign import rows_by_group
from .backend import Backend
from .columns import Budget
from .grouping import Grouping, better

__all__ = ["Schedule", "anneal", "tournament"]


@dataclass(frozen=True)
class Schedule:
    """How long to search: sweeps (one product each), rounds of exchanges per sweep, and the first temperature.

    `heat` is in units of the mean absolute gain of the proposals of the first sweep; it falls to zero in a straight
    line over 85 % of the sweeps. 0.6 was best on trained layers (tried: 0, 0.3, 0.6, 1, 2).
    """

    sweeps: int
    rounds: int
    heat: float = 0.0


@dataclass
class _State:
    """A grouping laid out for the exchanges: `place[g, r]` is row r of group g, `above` is T - theta."""

    order: Any
    above: Any
    grouping: Grouping


def anneal(
    xp: Backend,
    s: Any,
    start: Grouping,
    budget: Budget,
    schedule: Schedule,
    *,
    seed: int = 0,
    report: Callable[[float, Grouping], None] | None = None,
) -> Grouping:
    """Sweeps of exchanges from `start`; the best grouping seen, which is never worse than `start`."""
    groups = len(budget.sizes)
    if groups < 2 or start.kept_score <= 0:
        return start
    xp.seed(seed)
    rng = np.random.default_rng(seed)
    best = start
    state = _state(xp, s, start.labels, budget)
    scale = 0.0
    rounds: list[tuple[Any, Any]] = []
    for sweep in range(schedule.sweeps):
        while len(rounds) < schedule.rounds:
            rounds += tournament(xp, groups, rng)
        heat = schedule.heat * max(0.0, 1.0 - sweep / (0.85 * schedule.sweeps))
        labels, made, mean_gain = _sweep(xp, s, state, budget, rounds[: schedule.rounds], heat * scale)
        del rounds[: schedule.rounds]
        scale = scale or mean_gain
        state = _state(xp, s, labels, budget)
        best = better(best, state.grouping)
        if report is not None:
            report((sweep + 1) / schedule.sweeps, best)
        if made == 0 and heat == 0:
            break
    return best


def tournament(xp: Backend, groups: int, rng: np.random.Generator) -> list[tuple[Any, Any]]:
    """Rounds of disjoint pairs in which every group meets every other once, in random order (the circle method).

    Each round is a pair of index arrays of even length, (me, partner): the first half holds one of each pair.
    """
    seats = groups + groups % 2
    seat = rng.permutation(seats)
    rounds = []
    for _ in range(seats - 1):
        g, h = seat[: seats // 2], seat[::-1][: seats // 2]
        real = (g < groups) & (h < groups)
        g, h = g[real], h[real]
        rounds.append((xp.asarray(np.concatenate([g, h])), xp.asarray(np.concatenate([h, g]))))
        seat = np.concatenate([seat[:1], np.roll(seat[1:], 1)])
    return [rounds[i] for i in rng.permutation(len(rounds))]


def _state(xp: Backend, s: Any, labels: Any, budget: Budget) -> _State:
    order = rows_by_group(xp, labels)
    sums = xp.group_sums(s, order, budget.sizes)
    keep, theta = budget.select_with_price(xp, sums)
    grouping = Grouping(labels, keep, xp.total(xp.where(keep, sums, sums * 0)))
    return _State(order, sums - theta, grouping)


def _sweep(
    xp: Backend, s: Any, state: _State, budget: Budget, rounds: list[tuple[Any, Any]], temperature: float
) -> tuple[Any, int, float]:
    """New labels, the number of exchanges made, and the mean absolute gain of those tried. Overwrites `state.above`."""
    groups, v = len(budget.sizes), int(budget.sizes[0])
    above, m = state.above, s.shape[0]
    rank = _candidates(xp, s, state, groups, v)
    place = xp.concat([state.order, xp.zeros_int(groups * v - m)]).reshape(groups, v)
    # Made once: a Python number would cross to the device in every round.
    gone = xp.full((), -np.inf)
    made = tried = 0
    absolute: Any = 0.0
    for me, partner in rounds:
        pairs = me.shape[0] // 2
        seat = rank[me, :, partner].argmax(1)
        hope = rank[me, seat, partner]
        rows = place[me, seat]
        delta = s[rows[pairs:]] - s[rows[:pairs]]
        delta = xp.concat([delta, -delta])
        mine = above[me]
        gain = (xp.positive(mine + delta) - xp.positive(mine)).sum(1)
        gain = gain[:pairs] + gain[pairs:]
        tried += pairs
        absolute = absolute + abs(gain).sum()
        # A proposal has had its chance, whatever comes of it; -inf marks a seat that is empty or out of date.
        rank[me, seat, partner] = gone
        least = temperature * xp.log(xp.uniform((pairs,))) if temperature > 0 else 0.0
        passed = xp.nonzero((gain > least) & (hope[:pairs] + hope[pairs:] > gone))
        count = passed.shape[0]
        if count:
            made += count
            both, crossed = xp.concat([passed, passed + pairs]), xp.concat([passed + pairs, passed])
            me, seat = me[both], seat[both]
            above[me] += delta[both]
            place[me, seat] = rows[crossed]
            # The rank of a moved row is out of date: it stays where it is for the rest of the sweep.
            rank[me, seat] = gone
    labels = xp.copy(state.grouping.labels)
    labels[place.reshape(-1)[:m]] = state.grouping.labels[state.order]
    return labels, made, float(absolute) / max(1, tried)


def _candidates(xp: Backend, s: Any, state: _State, groups: int, v: int) -> Any:
    """rank[g, r, h]: what row r of group g would gain in group h at the present columns; -inf for empty seats."""
    profit = xp.matmul(s, xp.to_float(state.grouping.keep).T)
    profit -= xp.take_along(profit, state.grouping.labels[:, None])
    rank = xp.full((groups * v, groups), -np.inf)
    rank[: s.shape[0]] = xp.take_rows(profit, state.order)
    return rank.reshape(groups, v, groups)
