"""The patterns that Shfl-BW is compared with: each gives a mask and the share of the score that it keeps.

They work on scores, not on weights (`score_matrix` makes one from the other), in NumPy on the host.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ..arrays import host_array
from ..errors import ArgumentError, ShapeError

__all__ = ["Baseline", "block_wise", "n_m", "n_m_in_vectors", "unstructured", "vector_wise"]


class Baseline(NamedTuple):
    """mask: bool (m, k), True where a weight stays; retained: kept score / all score."""

    mask: np.ndarray
    retained: float


def unstructured(scores: Any, sparsity: float = 0.75) -> Baseline:
    """The best single weights: what any pattern can keep at most.

    Parameters
    ----------
    scores : array (m, k)
        Not negative; of magnitude: `abs(w)`.
    sparsity : float
        Share of the weights that goes, 0 to 1. Ties are kept in reading order, so the count is exact.

    Examples
    --------
    >>> import numpy as np
    >>> unstructured(np.array([[1.0, 2.0, 3.0, 4.0]]), 0.5)
    Baseline(mask=array([[False, False,  True,  True]]), retained=0.7)
    """
    s = _checked(scores, sparsity)
    return _result(s, _best(s, _count((1.0 - sparsity) * s.size)))


def block_wise(scores: Any, sparsity: float = 0.75, *, v: int = 32, width: int | None = None) -> Baseline:
    """The best blocks of `v` rows and `width` columns (square by default), rows in the given order.

    Blocks at the right and lower edges may be smaller; they are ranked by their mean and counted by their size.

    Examples
    --------
    >>> import numpy as np
    >>> block_wise(np.array([[1.0, 1.0, 3.0], [1.0, 1.0, 3.0]]), 0.5, v=2, width=1).retained
    0.6
    """
    s = _checked(scores, sparsity)
    width = v if width is None else width
    if v < 1 or width < 1:
        raise ArgumentError(f"the block is {v} x {width}; both sides must be at least 1")
    m, k = s.shape
    sums = np.add.reduceat(np.add.reduceat(s, np.arange(0, m, v), axis=0), np.arange(0, k, width), axis=1)
    heights = np.minimum(v, m - np.arange(0, m, v))
    widths = np.minimum(width, k - np.arange(0, k, width))
    area = heights[:, None] * widths[None, :]
    order = np.argsort(-(sums / area), axis=None, kind="stable")
    spent = np.cumsum(area.ravel()[order])
    kept = np.zeros(sums.size, dtype=bool)
    kept[order[: np.searchsorted(spent, (1.0 - sparsity) * s.size * (1 + 1e-9), side="right")]] = True
    return _result(s, kept.reshape(sums.shape).repeat(v, axis=0)[:m].repeat(width, axis=1)[:, :k])


def vector_wise(scores: Any, sparsity: float = 0.75, *, v: int = 32) -> Baseline:
    """The best column vectors of `v` rows, rows in the given order: Shfl-BW without its shuffle."""
    return block_wise(scores, sparsity, v=v, width=1)


def n_m(scores: Any, n: int = 2, m: int = 4) -> Baseline:
    """The best `n` of every `m` consecutive weights of a row; an incomplete last set keeps at most `n`.

    Examples
    --------
    >>> import numpy as np
    >>> n_m(np.array([[1.0, 4.0, 3.0, 2.0]]))
    Baseline(mask=array([[False,  True,  True, False]]), retained=0.7)
    """
    s = _checked(scores, 0.0)
    if not 0 < n <= m:
        raise ArgumentError(f"the pattern is {n}:{m}; needed is 0 < n <= m")
    return _result(s, _n_m_mask(s, n, m))


def n_m_in_vectors(
    scores: Any, sparsity: float = 0.75, *, v: int = 64, n: int = 2, m: int = 4, row_perm: np.ndarray | None = None
) -> Baseline:
    """`n:m` inside kept column vectors: of every `m` kept columns of a group each row keeps its best `n`.

    Parameters
    ----------
    scores : array (rows, k)
    sparsity : float
        In total, at least 1 - n/m. Each group keeps the same number of columns, as the hardware for it needs.
    v, n, m : int
    row_perm : int array (rows,), optional
        Order of the rows; the given order by default.
    """
    s = _checked(scores, sparsity)
    if not 0 < n <= m:
        raise ArgumentError(f"the pattern is {n}:{m}; needed is 0 < n <= m")
    vector_density = (1.0 - sparsity) * m / n
    if vector_density > 1.0 + 1e-9:
        raise ArgumentError(f"sparsity is {sparsity}; {n}:{m} alone has {1 - n / m}; ask for at least that")
    order = np.arange(s.shape[0]) if row_perm is None else np.asarray(row_perm)
    columns = _count(vector_density * s.shape[1]) // m * m
    mask = np.zeros(s.shape, dtype=bool)
    for start in range(0, s.shape[0], v):
        rows = order[start : start + v]
        kept = np.sort(np.argsort(-s[rows].sum(0), kind="stable")[:columns])
        mask[np.ix_(rows, kept)] = _n_m_mask(s[np.ix_(rows, kept)], n, m)
    return _result(s, mask)


def _n_m_mask(s: np.ndarray, n: int, m: int) -> np.ndarray:
    rows, k = s.shape
    sets = -(-k // m)
    padded = np.full((rows, sets * m), -1.0)
    padded[:, :k] = s
    rank = np.argsort(np.argsort(-padded.reshape(rows, sets, m), axis=2, kind="stable"), axis=2, kind="stable")
    return (rank < n).reshape(rows, sets * m)[:, :k]


def _checked(scores: Any, sparsity: float) -> np.ndarray:
    if not 0.0 <= sparsity <= 1.0:
        raise ArgumentError(f"sparsity is {sparsity!r}; needed is a fraction from 0 (keep all) to 1 (keep nothing)")
    s = host_array(scores, what="scores").astype(np.float64)
    if s.ndim != 2:
        raise ShapeError(f"scores have shape {s.shape}; needed is a matrix (m, k)")
    if not np.isfinite(s).all() or (s < 0).any():
        raise ArgumentError("scores have values that are negative or not finite; pass score_matrix(w)")
    return s


def _count(wanted: float) -> int:
    return int(wanted * (1 + 1e-9) + 1e-6)


def _best(s: np.ndarray, count: int) -> np.ndarray:
    mask = np.zeros(s.size, dtype=bool)
    mask[np.argsort(-s, axis=None, kind="stable")[:count]] = True
    return mask.reshape(s.shape)


def _result(s: np.ndarray, mask: np.ndarray) -> Baseline:
    total = float(s.sum())
    return Baseline(mask, float(s[mask].sum()) / total if total > 0 else 1.0)
