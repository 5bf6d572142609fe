"""One budget for several matrices: how sparse each may be so that all together keep the most."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import ArgumentError
from .assign import rows_by_group
from .backend import backend_of
from .pruning import Progress, budget_for, check_options, find_grouping, prune
from .result import PruneResult
from .scores import score_matrix

__all__ = ["prune_model", "share_budget"]


def prune_model(
    weights: Mapping[str, Any],
    *,
    sparsity: float | Mapping[str, float] = 0.75,
    block: tuple[int, int] = (64, 64),
    score: str = "magnitude",
    normalise: bool = True,
    search: str = "refined",
    seed: int = 0,
    quality: str = "default",
    round_to_tile: bool = True,
    progress: Progress | None = None,
    inputs: Mapping[str, Any] | None = None,
    norm: Mapping[str, Any] | None = None,
    grad: Mapping[str, Any] | None = None,
) -> dict[str, PruneResult]:
    """Prune named matrices with one global threshold per name pattern.

    First `share_budget` finds how dense each matrix should be, then `prune` runs on each.

    Parameters
    ----------
    weights : mapping of name to array (m, k)
    sparsity : float, or mapping of name pattern to float
        A pattern is a name, a parent's name ("encoder" stands for "encoder.0.weight") or "re:" and a regular
        expression. All matrices of one pattern share one budget: their total sparsity is the number. The first pattern
        that fits counts.
    block, score, search, seed, quality, round_to_tile
        As for `prune`; `score` by name, so that it means the same for all.
    normalise : bool
        Divide the scores of each matrix by their mean before they compete, so that a matrix with small weights is not
        emptied only because they are small. False compares them as they are.
    progress : callable, optional
        `progress(name, fraction, retained)`, after each matrix.
    inputs, norm, grad : mapping of name to array, optional
        Operands of the score, by matrix.

    Returns
    -------
    dict of name to PruneResult
        In the order of `weights`.

    Raises
    ------
    ArgumentError
        A matrix that no pattern names, a pattern that names no matrix, and what `prune` refuses.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> flat, peaked = rng.standard_normal((32, 64)), rng.standard_normal((32, 64)) * (np.arange(64) < 16)
    >>> found = prune_model({"flat": flat, "peaked": peaked}, sparsity=0.5, block=(16, 16), quality="fast")
    >>> found["flat"].density, found["peaked"].density
    (0.75, 0.25)
    """
    check_options(0.5, block, search, "layer", quality)
    scores = {
        name: score_matrix(w, score, inputs=_of(inputs, name), norm=_of(norm, name), grad=_of(grad, name))
        for name, w in weights.items()
    }
    densities: dict[str, float] = {}
    for target, names in _by_pattern(weights, sparsity):
        densities |= share_budget(
            {name: scores[name] for name in names},
            1.0 - target,
            block=block,
            normalise=normalise,
            round_to_tile=round_to_tile,
        )
    results = {}
    for number, (name, w) in enumerate(weights.items()):
        found = prune(
            w,
            sparsity=1.0 - densities[name],
            block=block,
            score=scores.pop(name),
            search=search,
            seed=seed,
            quality=quality,
            round_to_tile=round_to_tile,
        )
        results[name] = found
        if progress is not None:
            progress(name, (number + 1) / len(weights), found.retained)
    return results


def share_budget(
    scores: Mapping[str, Any],
    density: float,
    *,
    block: tuple[int, int] = (64, 64),
    normalise: bool = True,
    round_to_tile: bool = True,
) -> dict[str, float]:
    """Density of each score matrix under one threshold for all of them; together at most `density`.

    The threshold is laid over the column vectors of the paper's grouping, a quick stand-in for the final one (the
    shares hardly depend on the grouping; the columns are chosen anew by the search that follows).
    """
    gains, cost, owner = [], [], []
    total = 0
    for number, s in enumerate(scores.values()):
        xp = backend_of(s)
        limits = budget_for(s.shape, block, 1.0 - density, "layer", round_to_tile)
        total += s.shape[0] * s.shape[1]
        if s.shape[0] * s.shape[1] == 0:
            continue
        found = find_grouping(xp, s, limits, search="paper")
        ranked = xp.host(xp.sort_rows(xp.group_sums(s, rows_by_group(xp, found.labels), limits.sizes)))
        starts = np.arange(0, limits.k, limits.step)
        width = np.minimum(starts + limits.step, limits.k) - starts
        mean = xp.total(s) / (s.shape[0] * s.shape[1]) if normalise else 1.0
        gains.append((np.add.reduceat(ranked, starts, axis=1, dtype=np.float64) / (mean or 1.0)).ravel())
        cost.append((limits.sizes[:, None] * width[None, :]).ravel())
        owner.append(np.full(gains[-1].size, number))
    shares: Any = np.zeros(len(scores))
    if gains:
        all_gains, all_cost, all_owners = np.concatenate(gains), np.concatenate(cost), np.concatenate(owner)
        order = np.argsort(-all_gains / all_cost, kind="stable")
        spent = np.cumsum(all_cost[order])
        taken = order[: int(np.searchsorted(spent, density * total * (1 + 1e-9), side="right"))]
        shares = np.bincount(all_owners[taken], weights=all_cost[taken], minlength=len(scores))
    sizes = [max(1, s.shape[0] * s.shape[1]) for s in scores.values()]
    return {name: float(share / size) for name, share, size in zip(scores, shares, sizes, strict=True)}


def _of(operands: Mapping[str, Any] | None, name: str) -> Any:
    return None if operands is None else operands.get(name)


def _by_pattern(weights: Mapping[str, Any], sparsity: float | Mapping[str, float]) -> list[tuple[float, list[str]]]:
    if not isinstance(sparsity, Mapping):
        _check_sparsity("sparsity", sparsity)
        return [(sparsity, list(weights))]
    groups: dict[str, list[str]] = {pattern: [] for pattern in sparsity}
    for name in weights:
        home = next((pattern for pattern in sparsity if _fits(name, pattern)), None)
        if home is None:
            raise ArgumentError(
                f"no pattern in sparsity fits {name!r}; add one, or leave the matrix out of weights (patterns: "
                f"{', '.join(sparsity)})"
            )
        groups[home].append(name)
    for pattern, names in groups.items():
        _check_sparsity(f"sparsity[{pattern!r}]", sparsity[pattern])
        if not names:
            raise ArgumentError(f"the pattern {pattern!r} is first to fit none of {', '.join(weights)}; remove it")
    return [(sparsity[pattern], names) for pattern, names in groups.items()]


def _check_sparsity(what: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ArgumentError(f"{what} is {value!r}; needed is a fraction from 0 (keep all) to 1 (keep nothing)")


def _fits(name: str, pattern: str) -> bool:
    if pattern.startswith("re:"):
        try:
            return re.match(pattern[3:], name) is not None
        except re.error as error:
            raise ArgumentError(f"{pattern!r} in sparsity is no regular expression: {error}") from None
    return name == pattern or name.startswith(pattern + ".")
