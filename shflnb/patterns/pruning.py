"""`prune`: from a weight to its best Shfl-BW mask."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from ..arrays import dtype_of, host_array, kind_of, like_kind
from ..errors import ArgumentError
from .backend import Backend, backend_of
from .columns import Budget, rounding_step
from .result import PruneResult
from .scores import score_matrix
from .grouping import Grouping, consecutive_labels, evaluate, group_sizes
from .paper import search_paper
from .search import search_refined

__all__ = ["prune"]

SEARCHES = ("refined", "paper", "identity")
QUALITIES = ("fast", "default", "best")
BUDGETS = ("layer", "group")
V_ALLOWED = (16, 32, 64, 128)
TILE_K_ALLOWED = (16, 32, 64)


def prune(
    w: Any,
    *,
    sparsity: float = 0.75,
    block: tuple[int, int] = (64, 64),
    score: str | Callable[[Any], Any] | Any = "magnitude",
    search: str = "refined",
    budget: str = "layer",
    seed: int = 0,
    quality: str = "default",
    round_to_tile: bool = True,
    progress: Callable[[str, float, float], None] | None = None,
    inputs: Any = None,
    norm: Any = None,
    grad: Any = None,
) -> PruneResult:
    """Choose which weights to keep in the Shfl-BW pattern so that the kept score is as large as possible."""
    check_options(sparsity, block, search, budget, quality)
    s = score_matrix(w, score, inputs=inputs, norm=norm, grad=grad)
    xp = backend_of(s)
    m, k = s.shape
    v, tile_k = block
    density = 1.0 - sparsity
    step = rounding_step(k, tile_k, density) if round_to_tile else 1
    limits = Budget(group_sizes(m, v), k, density, equal=budget == "group", step=step)
    found = find_grouping(xp, s, limits, search=search, seed=seed, quality=quality, progress=progress)
    name = score if isinstance(score, str) else "callable" if callable(score) else "array"
    return make_result(w, s, xp, found, block, search=search, score=name, quality=quality)


def find_grouping(
    xp: Backend,
    s: Any,
    limits: Budget,
    *,
    search: str = "refined",
    seed: int = 0,
    quality: str = "default",
    progress: Callable[[str, float, float], None] | None = None,
) -> Grouping:
    """Run a search on a score matrix; any v from 1 on (`limits.sizes`), so that tiny cases can be tested.

    The search sees the rows sorted by their content, so that its result does not hang on the order they came in.
    """
    m, k = s.shape
    given = consecutive_labels(xp, limits.sizes)
    if m == 0 or k == 0:
        return Grouping(given, xp.full((len(limits.sizes), k), 0.0) > 0, 0.0)
    if search == "identity":
        return evaluate(xp, s, given, limits)
    order = content_order(xp, s)
    s = xp.take_rows(s, order)
    if search == "paper":
        found = search_paper(xp, s, limits, seed=seed)
    else:
        found = search_refined(xp, s, limits, given[order], seed=seed, quality=quality, progress=progress)
    labels = xp.copy(found.labels)
    labels[order] = found.labels
    return Grouping(labels, found.keep, found.kept_score)


def content_order(xp: Backend, s: Any) -> Any:
    """An order of the rows that depends on what they hold, not on where they stand."""
    weight = xp.asarray(np.random.default_rng(20221).random(s.shape[1], dtype=np.float32) + 0.5)
    second = xp.concat([xp.row_totals(s[i : i + 256] * weight) for i in range(0, s.shape[0], 256)])
    order = xp.argsort(second)
    return order[xp.argsort(xp.row_totals(s)[order])]


def check_options(sparsity: float, block: tuple[int, int], search: str, budget: str, quality: str) -> None:
    """Refuse options that `prune` does not take."""
    if not 0.0 <= sparsity <= 1.0:
        raise ArgumentError(f"sparsity is {sparsity!r}; needed is a fraction from 0 (keep all) to 1 (keep nothing)")
    if len(tuple(block)) != 2 or block[0] not in V_ALLOWED or block[1] not in TILE_K_ALLOWED:
        raise ArgumentError(f"block is {block!r}; needed is (v, tile_k) with v in {V_ALLOWED}, tile_k in {TILE_K_ALLOWED}")
    for name, value, allowed in (("search", search, SEARCHES), ("budget", budget, BUDGETS), ("quality", quality, QUALITIES)):
        if value not in allowed:
            raise ArgumentError(f"{name} is {value!r}; needed is one of {', '.join(allowed)}")


def make_result(
    w: Any, s: Any, xp: Backend, found: Grouping, block: tuple[int, int], *, search: str, score: str, quality: str
) -> PruneResult:
    """Masks and permutation of a grouping, with the groups in the order of their first rows (the short one last)."""
    labels = host_array(found.labels)
    m, groups = len(labels), found.keep.shape[0]
    first = np.full(groups, m, dtype=np.int64)
    np.minimum.at(first, labels, np.arange(m))
    if groups and m % block[0]:
        first[groups - 1] = m
    order = np.argsort(first, kind="stable")
    rank = np.empty(groups, dtype=np.int64)
    rank[order] = np.arange(groups)
    row_perm = np.argsort(rank[labels], kind="stable").astype(np.int32)
    mask = xp.take_rows(found.keep, found.labels)
    total = xp.total(s)
    retained = xp.total(s[mask]) / total if total > 0 else 1.0
    counts = host_array(found.keep).sum(1).astype(np.int64)[order]
    weight, mask = _masked(w, mask)
    return PruneResult(
        weight=weight, mask=mask, row_perm=row_perm, counts=counts, retained=retained, block=(int(block[0]), int(block[1])),
        search=search, score=score, quality=quality,
    )


def _masked(w: Any, mask: Any) -> tuple[Any, Any]:
    if kind_of(w) == "torch-cuda":
        torch = sys.modules["torch"]
        return torch.where(mask, w.detach(), torch.zeros((), dtype=w.dtype, device=w.device)), mask
    host = host_array(w)
    weight = np.where(mask, host, np.zeros((), dtype=host.dtype))
    return like_kind(weight, w), like_kind(mask, w)
