"""`ShflBWMatrix` to SciPy sparse arrays and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ArgumentError, DtypeError, FormatError, ShapeError
from .pack import pack
from .permutation import check_permutation, identity_permutation, invert_permutation
from .shflbw import ShflBWMatrix, check_block, nonzero_mask

if TYPE_CHECKING:
    from scipy.sparse import bsr_array, csr_array

__all__ = ["from_scipy", "to_scipy"]


def to_scipy(packed: ShflBWMatrix, format: str) -> csr_array | bsr_array:
    """See `ShflBWMatrix.to_scipy`."""
    from scipy.sparse import bsr_array

    if format not in ("csr", "bsr"):
        raise ArgumentError(f"format is {format!r}; expected 'csr' or 'bsr'; for others, to_scipy('csr').asformat(...)")
    values = packed.values if packed.values.itemsize > 2 else packed.values.astype(np.float32)
    blocks = values.reshape(-1, packed.v, 1)
    shape = (packed.groups * packed.v, packed.shape[1])
    bsr = bsr_array((blocks, packed.indices, packed.indptr), shape=shape, copy=True)
    if format == "bsr":
        return bsr
    csr = bsr.tocsr()[invert_permutation(packed.row_perm)]
    csr.eliminate_zeros()
    return csr


def from_scipy(a: Any, block: tuple[int, int], row_perm: Any) -> ShflBWMatrix:
    """See `ShflBWMatrix.from_scipy`."""
    from scipy.sparse import issparse

    v, tile_k = check_block(block)
    if not issparse(a):
        raise DtypeError(f"expected a SciPy sparse array, got {type(a).__name__}; use shflnb.pack for dense arrays")
    if a.format != "bsr" or a.blocksize != (v, 1):
        return pack(a, (v, tile_k), row_perm=row_perm)
    if a.dtype not in (np.float32, np.float64):
        raise DtypeError(f"the bsr array has dtype {a.dtype}; expected float32 or float64; use .astype(np.float32)")
    perm = identity_permutation(a.shape[0]) if row_perm is None else np.asarray(row_perm)
    if perm.ndim != 1 or -(-len(perm) // v) * v != a.shape[0]:
        raise ShapeError(f"row_perm has shape {perm.shape}; {a.shape[0]} packed rows in groups of {v} need "
                         f"{a.shape[0] - v + 1} to {a.shape[0]} entries")  # fmt: skip
    perm = check_permutation(perm, len(perm)).copy()
    b = a.copy()
    b.sum_duplicates()  # also sorts the indices of every group
    missing = a.shape[0] - len(perm)
    if missing and nonzero_mask(b.data[b.indptr[-2] :, v - missing :]).any():
        raise FormatError(f"the last {missing} rows of the bsr array are not zero, but row_perm names only {len(perm)}")
    values = np.ascontiguousarray(b.data.reshape(-1, v))
    shape = (len(perm), a.shape[1])
    return ShflBWMatrix(shape, (v, tile_k), b.indptr.astype(np.int64), b.indices.astype(np.int32), values, perm)
