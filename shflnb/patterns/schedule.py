"""Pruning little by little during training: how sparse at which step, and how to move a mask without flicker."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..arrays import host_array
from ..errors import ArgumentError, ShapeError
from .backend import Backend, backend_of
from .columns import Budget
from .grouping import Grouping
from .pruning import budget_for, check_options, make_result, prune, score_name
from .result import PruneResult
from .scores import score_matrix

__all__ = ["cubic_sparsity", "update_mask"]


def cubic_sparsity(step: int, *, start: int, end: int, final: float, initial: float = 0.0) -> float:
    """Sparsity at a training step: rises fast at first, slowly towards the end.

    `final + (initial - final) * (1 - (step - start) / (end - start)) ** 3` between `start` and `end`, `initial` before,
    `final` from `end` on (Zhu and Gupta, "To prune, or not to prune", arXiv 1710.01878).

    Parameters
    ----------
    step, start, end : int
        Steps of the training loop; `start < end`.
    final, initial : float
        Sparsity, 0 to 1.

    Raises
    ------
    ArgumentError
        `start >= end`, or a sparsity outside 0 to 1.

    Examples
    --------
    >>> [round(cubic_sparsity(step, start=0, end=100, final=0.75), 3) for step in (0, 25, 50, 100, 200)]
    [0.0, 0.434, 0.656, 0.75, 0.75]
    """
    if start >= end:
        raise ArgumentError(f"start is {start} and end {end}; the schedule needs start < end")
    for name, value in (("final", final), ("initial", initial)):
        if not 0.0 <= value <= 1.0:
            raise ArgumentError(f"{name} is {value!r}; a sparsity lies between 0 and 1")
    left = 1.0 - min(max((step - start) / (end - start), 0.0), 1.0)
    return final + (initial - final) * left**3


def update_mask(
    w: Any,
    previous: PruneResult,
    *,
    sparsity: float,
    score: str | Callable[[Any], Any] | Any = "magnitude",
    hysteresis: float = 0.1,
    regroup: float | None = 0.02,
    budget: str = "layer",
    round_to_tile: bool = True,
    seed: int = 0,
    quality: str = "fast",
    inputs: Any = None,
    norm: Any = None,
    grad: Any = None,
) -> PruneResult:
    """The mask for new weights, which changes only where the change is worth it.

    The groups of `previous` stay, and a column vector that was kept counts `1 + hysteresis` times its score, so that
    two vectors of nearly equal score do not take turns. The groups change only if a new search keeps more than `1 +
    regroup` times as much as the old ones do.

    Parameters
    ----------
    w : array (m, k)
        The dense weights as they are now (pruned positions still train); NumPy or torch.
    previous : PruneResult
        The last mask; its block is used again.
    sparsity : float
        As asked now; usually from `cubic_sparsity`.
    hysteresis : float
        Bonus of a kept vector, at least 0; 0 prunes anew within the groups.
    regroup : float or None
        Relative gain that a new grouping must bring. None never searches, which takes milliseconds.
    score, budget, round_to_tile, seed, quality, inputs, norm, grad
        As for `prune`.

    Returns
    -------
    PruneResult
        `search` is "kept groups" where the groups stayed.

    Raises
    ------
    ShapeError
        `w` has another shape than `previous`.
    ArgumentError
        A negative `hysteresis` or `regroup`, and what `prune` refuses.

    Examples
    --------
    >>> import numpy as np
    >>> from shflnb import prune
    >>> w = np.random.default_rng(0).standard_normal((32, 64)).astype("float32")
    >>> half = prune(w, sparsity=0.5, block=(16, 16), quality="fast")
    >>> later = update_mask(w + 0.01, half, sparsity=0.75, regroup=None)
    >>> later.density, bool((later.row_perm == half.row_perm).all())
    (0.25, True)
    """
    if hysteresis < 0 or (regroup is not None and regroup < 0):
        raise ArgumentError(f"hysteresis is {hysteresis} and regroup {regroup}; neither may be negative")
    if tuple(w.shape) != previous.shape:
        raise ShapeError(f"w has shape {tuple(w.shape)}; the previous mask has {previous.shape}")
    check_options(sparsity, previous.block, "refined", budget, quality)
    s = score_matrix(w, score, inputs=inputs, norm=norm, grad=grad)
    xp = backend_of(s)
    limits = budget_for(s.shape, previous.block, sparsity, budget, round_to_tile)
    kept = _within_groups(xp, s, previous, limits, hysteresis)
    old = make_result(w, s, xp, kept, previous.block, search="kept groups", score=score_name(score), quality=quality)
    if regroup is None:
        return old
    new = prune(
        w, sparsity=sparsity, block=previous.block, score=score, budget=budget, seed=seed, quality=quality,
        round_to_tile=round_to_tile, inputs=inputs, norm=norm, grad=grad,
    )  # fmt: skip
    return new if new.retained > (1.0 + regroup) * old.retained else old


def _within_groups(xp: Backend, s: Any, previous: PruneResult, limits: Budget, hysteresis: float) -> Grouping:
    """The best columns of the previous groups, with the bonus for those that were kept."""
    v = previous.block[0]
    order = xp.asarray(previous.row_perm.astype(np.int64))
    kept_before = xp.asarray(host_array(previous.mask)[previous.row_perm[::v]])
    sums = xp.group_sums(s, order, limits.sizes)
    keep = limits.select(xp, sums * (1.0 + hysteresis * xp.to_float(kept_before)))
    labels = xp.zeros_int(s.shape[0])
    labels[order] = xp.asarray(np.repeat(np.arange(len(limits.sizes)), limits.sizes))
    return Grouping(labels, keep, xp.total(xp.where(keep, sums, sums * 0)))
