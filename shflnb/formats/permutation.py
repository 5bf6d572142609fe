"""Row permutations: `perm[i]` is the original row that stands at packed place `i`.

In NumPy words: `packed_rows = rows[perm]` and `rows[perm] = packed_rows`.
"""

from __future__ import annotations

import numpy as np

from ..errors import FormatError, ShapeError

__all__ = ["apply_permutation", "check_permutation", "compose_permutations", "identity_permutation",
           "invert_permutation", "undo_permutation"]  # fmt: skip


def identity_permutation(m: int) -> np.ndarray:
    """`np.arange(m)` as int32: every row stays where it is."""
    return np.arange(m, dtype=np.int32)


def check_permutation(perm: np.ndarray, m: int) -> np.ndarray:
    """Return `perm` as a contiguous int32 array of length `m`, or raise.

    Raises `ShapeError` for a wrong length or rank and `FormatError` when some row is missing or out of range.
    """
    perm = np.asarray(perm)
    if perm.ndim != 1 or perm.shape[0] != m:
        raise ShapeError(f"row_perm has shape {perm.shape}; expected ({m},), one entry per row")
    if m == 0:
        return np.zeros(0, dtype=np.int32)
    if perm.dtype.kind not in "iu":
        raise FormatError(f"row_perm has dtype {perm.dtype}; expected integers")
    low, high = int(perm.min()), int(perm.max())
    if low < 0 or high >= m:
        raise FormatError(f"row_perm holds {low if low < 0 else high}; expected rows in 0..{m - 1}")
    if m > np.iinfo(np.int32).max:
        raise ShapeError(f"{m} rows are more than int32 can name")
    seen = np.zeros(m, dtype=bool)
    seen[perm] = True
    if not seen.all():
        missing = int(np.flatnonzero(~seen)[0])
        raise FormatError(f"row_perm is not a permutation: row {missing} is missing")
    return np.ascontiguousarray(perm, dtype=np.int32)


def invert_permutation(perm: np.ndarray) -> np.ndarray:
    """`inv[perm[i]] = i`, int32: the packed place of every original row."""
    inverse = np.empty(len(perm), dtype=np.int32)
    inverse[perm] = np.arange(len(perm), dtype=np.int32)
    return inverse


def compose_permutations(outer: np.ndarray, inner: np.ndarray) -> np.ndarray:
    """The permutation that applies `inner` first: `rows[compose(outer, inner)] == rows[inner][outer]`."""
    if len(outer) != len(inner):
        raise ShapeError(f"cannot compose permutations of {len(outer)} and {len(inner)} rows")
    return np.ascontiguousarray(np.asarray(inner)[outer], dtype=np.int32)


def apply_permutation(rows: np.ndarray, perm: np.ndarray) -> np.ndarray:
    """`rows[perm]`: original order to packed order along the first axis (a copy)."""
    return np.asarray(rows)[perm]


def undo_permutation(packed_rows: np.ndarray, perm: np.ndarray) -> np.ndarray:
    """Packed order back to the original order along the first axis (a copy)."""
    out = np.empty_like(packed_rows)
    out[perm] = packed_rows
    return out
