"""The joint search for row groups and kept columns.

maximise  sum_g sum_{c kept by g} T[g, c],   T[g, c] = sum of S[i, c] over the rows i of group g,   within the budget.

1. Starts: the paper's clusters; a run whose density falls from twice the target to the target (rows first follow the
   coarse structure, then the fine); random groups; the order as given.
2. Each start alternates (best groups for the columns, best columns for the groups) and makes a few cold exchanges.
3. The best goes through annealed exchanges (`swaps.py`), which is where most of the gain is.
4. With group lengths rounded to the tile, step 3 is repeated, shorter, on the rounded budget itself.

The rows come in an order of their own (`pruning.py` sorts them by content), and the order as given only ever competes
with the result of the others: where it does not win, the result is the same for any order of the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .assign import assign
from .backend import Backend
from .columns import Budget
from .grouping import Grouping, alternate, better, evaluate
from .paper import search_paper
from .swaps import Schedule, anneal

__all__ = ["Plan", "falling_density", "plans_for", "search_refined"]

Progress = Callable[[str, float, float], None]


@dataclass(frozen=True)
class Plan:
    """What one quality does on top of the one below it.

    Attributes
    ----------
    falling, randoms : int
        Starts with a falling density, and random starts.
    cold : Schedule
        Exchanges that every start makes.
    long : Schedule
        Annealing of the best start.
    rounded : Schedule
        Annealing on the rounded budget.
    """

    falling: int
    randoms: int
    cold: Schedule
    long: Schedule
    rounded: Schedule


def plans_for(m: int, k: int, groups: int, quality: str, *, round_limit: int = 112) -> list[Plan]:
    """The plans to run one after the other; "best" runs all three, so that a better quality never keeps less."""
    tournaments = max(1, groups - 1)
    # A tournament or more; in a tournament a pair has one proposal, of at most v.
    rounds = min(tournaments * max(1, min(32 // tournaments, m // groups)), round_limit)
    # A sweep costs about m * k * groups; small layers can afford many more of them.
    work = max(1.0, float(m) * k * groups)
    sweeps = min(int(np.clip(32 * (2.0**30 / work) ** 0.3, 18, 200)), 8 + m // 2)
    cold = Schedule(4, rounds)
    fast = Plan(0, 0, cold, Schedule(6, rounds), Schedule(3, rounds))
    default = Plan(1, 0, cold, Schedule(sweeps, rounds, 0.6), Schedule(8 + sweeps // 8, rounds, 0.1))
    randoms = int(np.clip(2.0**26 / work, 2, 40))
    best = Plan(1, randoms, cold, Schedule(5 * sweeps, rounds, 1.0), Schedule(sweeps, rounds, 0.1))
    return {"fast": [fast], "default": [fast, default], "best": [fast, default, best]}[quality]


def search_refined(
    xp: Backend,
    s: Any,
    budget: Budget,
    given: Any,
    *,
    seed: int = 0,
    quality: str = "default",
    progress: Progress | None = None,
) -> Grouping:
    """The best grouping found; never below that of the labels `given` nor the paper's search at the same seed."""
    total = xp.total(s) or 1.0
    free = budget.unrounded()
    plans = plans_for(s.shape[0], s.shape[1], len(budget.sizes), quality, round_limit=xp.round_limit)

    def say(stage: str, fraction: float, found: Grouping) -> None:
        if progress is not None:
            progress(stage, fraction, found.kept_score / total)

    identity, paper = evaluate(xp, s, given, free), search_paper(xp, s, free, seed=seed)
    final = better(evaluate(xp, s, paper.labels, budget), evaluate(xp, s, given, budget))
    say("starts", 1.0, final)

    def improve(start: Grouping, schedule: Schedule) -> Grouping:
        return anneal(xp, s, alternate(xp, s, start, free), free, schedule, seed=seed)

    best = improve(paper, plans[0].cold)
    own = improve(identity, plans[0].cold)
    for level, plan in enumerate(plans):
        for start in _starts(xp, s, free, plan, np.random.default_rng((seed, level))):
            best = better(best, improve(start, plan.cold))
        best = anneal(xp, s, best, free, plan.long, seed=seed + level, report=lambda f, b: say("exchanges", f, b))
        final = better(final, _finish(xp, s, better(best, own), budget, plan, seed))
        say(f"plan {level + 1} of {len(plans)}", 1.0, final)
    return final


def _starts(xp: Backend, s: Any, budget: Budget, plan: Plan, rng: np.random.Generator) -> Iterator[Grouping]:
    for _ in range(plan.falling):
        yield falling_density(xp, s, _random_labels(xp, budget, rng), budget)
    for _ in range(plan.randoms):
        yield evaluate(xp, s, _random_labels(xp, budget, rng), budget)


def _random_labels(xp: Backend, budget: Budget, rng: np.random.Generator) -> Any:
    """A random balanced grouping."""
    return xp.asarray(rng.permutation(np.repeat(np.arange(len(budget.sizes)), budget.sizes)))


def falling_density(xp: Backend, s: Any, labels: Any, budget: Budget, *, steps: int = 12) -> Grouping:
    """Alternation while the density falls geometrically from twice the target to the target."""
    high = min(0.9, 2.0 * budget.density)
    for step in range(steps if 0.0 < budget.density < high else 0):
        density = high * (budget.density / high) ** (step / (steps - 1))
        now = evaluate(xp, s, labels, Budget(budget.sizes, budget.k, density, budget.equal))
        labels = assign(xp, xp.matmul(s, xp.to_float(now.keep).T), budget.sizes)
    return evaluate(xp, s, labels, budget)


def _finish(xp: Backend, s: Any, found: Grouping, budget: Budget, plan: Plan, seed: int) -> Grouping:
    """The same groups under the budget as asked, improved there if that budget is a rounded one."""
    if budget.step == 1:
        return found
    rounded = evaluate(xp, s, found.labels, budget)
    return anneal(xp, s, alternate(xp, s, rounded, budget), budget, plan.rounded, seed=seed)
