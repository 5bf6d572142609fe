"""`prune`: from a weight to its best Shfl-BW mask."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from ..arrays import host_array, kind_of, like_kind
from ..errors import ArgumentError, DtypeError
from .backend import Backend, backend_of
from .columns import Budget, rounding_step
from .grouping import Grouping, consecutive_labels, evaluate, group_sizes
from .paper import search_paper
from .result import PruneResult
from .scores import score_matrix
from .search import search_refined

__all__ = ["budget_for", "check_options", "find_grouping", "make_result", "prune", "score_name"]

SEARCHES = ("refined", "paper", "identity")
QUALITIES = ("fast", "default", "best")
BUDGETS = ("layer", "group")
V_ALLOWED = (16, 32, 64, 128)
TILE_K_ALLOWED = (16, 32, 64)

Progress = Callable[[str, float, float], None]


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
    progress: Progress | None = None,
    inputs: Any = None,
    norm: Any = None,
    grad: Any = None,
) -> PruneResult:
    """Choose which weights stay, in the Shfl-BW pattern, so that the kept score is as large as possible.

    The m rows are shuffled into groups of v, and in each group a column stays for all v rows or for none:
    `retained = (score * mask).sum() / score.sum()` is what the search maximises, over groups and columns together.

    Parameters
    ----------
    w : array (m, k)
        Weight; NumPy, torch on the CPU, or torch on a CUDA device (the search then runs there); float16, bfloat16,
        float32 or float64; any strides.
    sparsity : float
        Share of the weights that goes, 0 to 1; the density of the result is never above 1 - sparsity.
    block : (v, tile_k)
        v = 16, 32, 64 or 128 rows per group; tile_k = 16, 32 or 64 columns per packed block.
    score : str, callable or array
        What a weight is worth: "magnitude" |w|, "squared" w**2, "activation" |w| times the norm of its input (`inputs`
        or `norm`), "gradient" |w * grad|, a callable that is given `w`, or an array (m, k) that is not negative.
    search : str
        "refined": the joint search of this package; "paper": the authors' (Huang et al., DAC 2022), once through;
        "identity": rows as given (vector-wise pruning).
    budget : str
        "layer": one threshold for the whole matrix, so groups keep different numbers of columns; "group": equal numbers
        (to within one tile when rounded).
    seed : int
        Same input, device, options and seed give the same result.
    quality : str
        "fast", "default" or "best": how long "refined" searches; a better one never keeps less.
    round_to_tile : bool
        Make the groups' lengths multiples of `tile_k` at the least loss, because padding costs time. Where a group of
        average length is shorter than `tile_k`, the multiple is halved until it is not.
    progress : callable, optional
        Called as `progress(stage: str, fraction: float, retained: float)` from time to time.
    inputs : array (..., k), optional
        Calibration data for "activation".
    norm : array (k,), optional
        Norm per input feature for "activation", instead of `inputs`.
    grad : array (m, k), optional
        For "gradient".

    Returns
    -------
    PruneResult
        `weight`, `mask` (kind and device of `w`), `row_perm`, `retained`, `counts`, ...; `.pack()` stores it.

    Raises
    ------
    ArgumentError
        An option that does not exist, a NaN or an infinity in `w` (with its place), a score that is negative.
    ShapeError, DtypeError
        `w` is no matrix of floats, or an operand does not fit it.

    Notes
    -----
    Rows are sorted by content before the search, so the result does not depend on their order, unless the groups of the
    given order, which are always tried too, turn out best. "refined" never keeps less than "identity" and "paper" do.
    Memory beyond `w` is about 2.5 times its size in float32.

    Examples
    --------
    >>> import numpy as np
    >>> w = np.random.default_rng(0).standard_normal((96, 128)).astype("float32")
    >>> pruned = prune(w, sparsity=0.75, block=(32, 16))
    >>> pruned.density, pruned.counts.sum(), pruned.retained > prune(w, block=(32, 16), search="identity").retained
    (0.25, np.int64(96), True)
    """
    check_options(sparsity, block, search, budget, quality)
    if kind_of(w) not in ("numpy", "torch", "torch-cuda"):
        raise DtypeError(f"w is a {type(w).__name__}; needed is a NumPy array or a torch tensor (torch.from_dlpack(w))")
    s = score_matrix(w, score, inputs=inputs, norm=norm, grad=grad)
    xp = backend_of(s)
    limits = budget_for(s.shape, block, sparsity, budget, round_to_tile)
    found = find_grouping(xp, s, limits, search=search, seed=seed, quality=quality, progress=progress)
    return make_result(w, s, xp, found, block, search=search, score=score_name(score), quality=quality)


def check_options(sparsity: float, block: tuple[int, int], search: str, budget: str, quality: str) -> None:
    """Refuse options that `prune` does not take."""
    if not isinstance(sparsity, (int, float, np.number)) or not 0.0 <= sparsity <= 1.0:
        raise ArgumentError(f"sparsity is {sparsity!r}; needed is a fraction from 0 (keep all) to 1 (keep nothing)")
    if (
        not isinstance(block, (tuple, list))
        or len(block) != 2
        or block[0] not in V_ALLOWED
        or block[1] not in TILE_K_ALLOWED
    ):
        raise ArgumentError(
            f"block is {block!r}; needed is (v, tile_k) with v in {V_ALLOWED} and tile_k in {TILE_K_ALLOWED}"
        )
    for name, value, allowed in (
        ("search", search, SEARCHES),
        ("budget", budget, BUDGETS),
        ("quality", quality, QUALITIES),
    ):
        if value not in allowed:
            raise ArgumentError(f"{name} is {value!r}; needed is one of {', '.join(allowed)}")


def budget_for(
    shape: tuple[int, int], block: tuple[int, int], sparsity: float, budget: str, round_to_tile: bool
) -> Budget:
    """The options as a `Budget`."""
    m, k = shape
    density = 1.0 - sparsity
    step = rounding_step(k, block[1], density) if round_to_tile else 1
    return Budget(group_sizes(m, block[0]), k, density, equal=budget == "group", step=step)


def score_name(score: Any) -> str:
    """How the result names the score."""
    if isinstance(score, str):
        return score
    return getattr(score, "__name__", "callable") if callable(score) else "array"


def find_grouping(
    xp: Backend,
    s: Any,
    limits: Budget,
    *,
    search: str = "refined",
    seed: int = 0,
    quality: str = "default",
    progress: Progress | None = None,
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
    s = _in_safe_range(xp, xp.take_rows(s, order))
    if search == "paper":
        found = search_paper(xp, s, limits, seed=seed)
    else:
        found = search_refined(xp, s, limits, given[order], seed=seed, quality=quality, progress=progress)
    labels = xp.copy(found.labels)
    labels[order] = found.labels
    return Grouping(labels, found.keep, found.kept_score)


def _in_safe_range(xp: Backend, s: Any) -> Any:
    """`s`, times a power of two where sums and products of its values could leave the range of float32."""
    peak = float(s.max())
    if 2.0**-40 <= peak <= 2.0**40 or peak == 0.0:
        return s
    return s * xp.full((1,), 2.0 ** -max(-120, min(120, math.frexp(peak)[1])))


def content_order(xp: Backend, s: Any) -> Any:
    """An order of the rows that depends on what they hold, not on where they stand."""
    weight = xp.asarray(np.random.default_rng(0).random(s.shape[1], dtype=np.float32) + np.float32(0.5))
    second = xp.concat([xp.row_totals(s[i : i + 256] * weight) for i in range(0, s.shape[0], 256)])
    order = xp.argsort(second)
    return order[xp.argsort(xp.row_totals(s)[order])]


def make_result(
    w: Any, s: Any, xp: Backend, found: Grouping, block: tuple[int, int], *, search: str, score: str, quality: str
) -> PruneResult:
    """Masks and permutation of a grouping, with the groups in the order of their first rows (a short one last)."""
    labels = xp.host(found.labels)
    m, groups = len(labels), found.keep.shape[0]
    first = np.full(groups, m, dtype=np.int64)
    np.minimum.at(first, labels, np.arange(m))
    if groups and m % block[0]:
        first[groups - 1] = m
    order = np.argsort(first, kind="stable")
    rank = np.empty(groups, dtype=np.int64)
    rank[order] = np.arange(groups)
    mask = xp.take_rows(found.keep, found.labels)
    total = xp.total(s)
    retained = xp.total(s * mask) / total if total > 0 else 1.0
    weight, mask = _masked(w, mask)
    return PruneResult(
        weight=weight,
        mask=mask,
        row_perm=np.argsort(rank[labels], kind="stable").astype(np.int32),
        counts=xp.host(found.keep).sum(1).astype(np.int64)[order],
        retained=min(retained, 1.0),
        block=(int(block[0]), int(block[1])),
        search=search,
        score=score,
        quality=quality,
    )


def _masked(w: Any, mask: Any) -> tuple[Any, Any]:
    if kind_of(w) == "torch-cuda":
        torch = sys.modules["torch"]
        return torch.where(mask, w.detach(), torch.zeros((), dtype=w.dtype, device=w.device)), mask
    host = host_array(w)
    weight = np.where(mask, host, np.zeros((), dtype=host.dtype))
    return like_kind(weight, w), like_kind(mask, w)
