"""`pack`: a dense or SciPy matrix becomes a `ShflBWMatrix`. The only door in, and it never loses a value."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import numpy as np

from ..arrays import DTYPES, host_array
from ..errors import DtypeError, FillInWarning, ShapeError
from .grouping import find_row_order, group_union
from .permutation import check_permutation
from .shflbw import ShflBWMatrix, check_block, nonzero_mask

__all__ = ["FILL_IN_WARNING", "pack"]

FILL_IN_WARNING = 1.25
"""Above this ratio of stored places to non-zeros, `pack` warns."""

BAND_ELEMENTS = 1 << 24
"""A sparse input is turned into dense bands of at most this many elements (or one row)."""


def pack(
    dense_w: Any,
    block: tuple[int, int] = (64, 64),
    *,
    row_perm: Any = None,
    mask: Any = None,
    fill_in_warning: float | None = FILL_IN_WARNING,
) -> ShflBWMatrix:
    """Store `dense_w` in the Shfl-BW format: `pack(w).to_dense() == w`, whatever `w` is.

    A group stores every column in which one of its rows is not zero, for all of its rows. Without `row_perm` the
    grouping is found here: rows of equal support stand together, so that a pattern that is present comes back exactly;
    rows that are left over are grouped so that few zeros are stored. The order found is deterministic.

    Parameters
    ----------
    dense_w : (m, k) array
        NumPy array, torch tensor (CPU or CUDA, which is copied to the host) or SciPy sparse array; float16, bfloat16,
        float32 or float64; any strides. NaN and Inf are values; -0.0 is a zero.
    block : (v, tile_k)
        Rows per group (16, 32, 64 or 128) and stitched columns per kernel tile (16, 32 or 64).
    row_perm : int array, shape (m,), optional
        Packed row i is original row `row_perm[i]`; rows g*v .. g*v+v-1 are group g. Default: found.
    mask : bool array, shape (m, k), optional
        Positions to store even where the value is zero. Values outside the mask that are not zero are stored too.
    fill_in_warning : float or None
        Warn (`FillInWarning`) when more than this many times the non-zeros (and masked zeros) are stored. None: never.

    Returns
    -------
    ShflBWMatrix

    Raises
    ------
    DtypeError
        For integers and other dtypes, and for what is no array.
    ShapeError, FormatError, ArgumentError
        For an array that is not 2-D, a mask of another shape, no permutation, and a block that is not allowed.

    Source: the pattern of Huang et al., DAC 2022; the habit is that of `scipy.sparse.bsr_array(dense, blocksize)`.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> w = np.zeros((64, 48), dtype=np.float32)
    >>> for rows, columns in ((slice(0, None, 2), [1, 4, 9]), (slice(1, None, 2), [0, 4])):
    ...     w[rows, columns] = rng.standard_normal((32, len(columns))) if rows.start == 0 else 1.0
    >>> packed = pack(w, block=(32, 16))
    >>> packed.fill_in, packed.counts.tolist()
    (1.0, [3, 2])
    """
    v, tile_k = check_block(block)
    w = _as_matrix(dense_w)
    kept = None if mask is None else _as_mask(mask, w.shape)
    m, k = w.shape
    perm = None if row_perm is None else check_permutation(_plain(row_perm), m).copy()
    bits = support_bits(w, kept)
    if perm is None:
        perm = find_row_order(bits, v)
    union = group_union(bits[perm], v)
    flags = np.unpackbits(union.view(np.uint8), axis=1, count=k).view(bool)
    group_ids, columns = np.nonzero(flags)
    groups = len(union)
    indptr = np.zeros(groups + 1, dtype=np.int64)
    np.cumsum(np.bincount(group_ids, minlength=groups), out=indptr[1:])
    indices = columns.astype(np.int32)
    values = _gather(w, perm, indptr, indices, v)
    packed = ShflBWMatrix((m, k), (v, tile_k), indptr, indices, values, perm)
    if fill_in_warning is not None:
        _warn_fill_in(packed, int(np.bitwise_count(bits).sum(dtype=np.int64)), fill_in_warning)
    return packed


def support_bits(w: Any, kept: Any = None) -> np.ndarray:
    """One bit per element, set where `w` is not zero or `kept` is True: uint64, (m, ceil(k / 64)), packbits order."""
    m, k = w.shape
    words = -(-k // 64)
    out = np.zeros((m, words * 8), dtype=np.uint8)
    step = max(1, BAND_ELEMENTS // max(k, 1))
    for start in range(0, m, step):
        rows = slice(start, min(start + step, m))
        flags = nonzero_mask(_band(w, rows))
        if kept is not None:
            flags |= _band(kept, rows)
        out[rows, : -(-k // 8)] = np.packbits(flags, axis=1)
    return out.view(np.uint64)


def _band(w: Any, rows: slice | np.ndarray) -> np.ndarray:
    """Dense rows of a dense or CSR matrix."""
    part = w[rows]
    return part if isinstance(part, np.ndarray) else part.toarray()


def _gather(w: Any, perm: np.ndarray, indptr: np.ndarray, indices: np.ndarray, v: int) -> np.ndarray:
    """Canonical values, (indptr[-1], v); zero at the rows that the last group does not have."""
    values = np.empty((len(indices), v), dtype=w.dtype)
    for g in range(len(indptr) - 1):
        rows = perm[g * v : (g + 1) * v]
        part = slice(indptr[g], indptr[g + 1])
        band = _band(w, rows)
        values[part, : len(rows)] = np.take(band, indices[part], axis=1).T
        values[part, len(rows) :] = 0
    return values


def _plain(row_perm: Any) -> np.ndarray:
    return np.asarray(row_perm) if isinstance(row_perm, (list, tuple, range)) else host_array(row_perm, what="row_perm")


def _is_scipy_sparse(a: Any) -> bool:
    """Whether `a` comes from SciPy, without importing it: the caller has, if so."""
    sparse = sys.modules.get("scipy.sparse")
    return sparse is not None and bool(sparse.issparse(a))


def _as_matrix(w: Any) -> Any:
    """A 2-D NumPy array or CSR array of a weight dtype, in native byte order."""
    if _is_scipy_sparse(w):
        if w.ndim != 2:
            raise ShapeError(f"dense_w has shape {w.shape}; expected two dimensions (m, k)")
        _check_dtype(w.dtype)
        return w.tocsr()  # duplicates may stay: toarray() of a band adds them up
    a = np.asarray(host_array(w, what="dense_w"))
    _check_dtype(a.dtype)
    if a.ndim != 2:
        raise ShapeError(f"dense_w has shape {a.shape}; expected two dimensions (m, k); flatten convolution filters to "
                         f"(f, r*s*c) with c fastest")  # fmt: skip
    return a if a.dtype.isnative else a.astype(a.dtype.newbyteorder("="))


def _check_dtype(dtype: np.dtype) -> None:
    if dtype.newbyteorder("=") not in DTYPES.values():
        raise DtypeError(f"dense_w has dtype {dtype}; expected one of {', '.join(DTYPES)}; convert it first")


def _as_mask(mask: Any, shape: tuple[int, int]) -> Any:
    if _is_scipy_sparse(mask):
        a = mask.tocsr()
    else:
        a = host_array(mask, what="mask")
    if a.dtype != np.bool_:
        raise DtypeError(f"mask has dtype {a.dtype}; expected bool (True where a value is kept)")
    if a.shape != shape:
        raise ShapeError(f"mask has shape {a.shape}; expected that of dense_w, {shape}")
    return a


def _warn_fill_in(packed: ShflBWMatrix, wanted: int, limit: float) -> None:
    if packed.stored <= limit * wanted:
        return
    v = packed.v
    warnings.warn(
        f"pack stores {packed.stored / wanted:.2f} times the {wanted} non-zeros of this {packed.shape[0]} x "
        f"{packed.shape[1]} matrix (the fill-in; the limit is {limit:g}): its rows do not fall into groups of {v} that "
        f"share their columns. Prune it first, as in shflnb.prune(w, sparsity=0.75, block={packed.block}).pack(), or "
        f"take a smaller v, or pass fill_in_warning=None to accept it.",
        FillInWarning,
        stacklevel=3,
    )
