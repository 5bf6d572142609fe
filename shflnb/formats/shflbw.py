"""`ShflBWMatrix`: a weight matrix in the Shuffled Block-wise pattern, in canonical order, on the host.

    packed rows          kept columns of group 0 (values[indptr[0]:indptr[1]] is (columns, v), v contiguous)
    row_perm[0:v]    ->  group 0:  | c0 | c3 | c9 | ...
    row_perm[v:2*v]  ->  group 1:  | c1 | c3 | ...            (another number of columns is fine, so is none)

The canonical order stores no padding along k; a kernel layout (`layout.py`) pads each group to a multiple of `tile_k`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..arrays import DTYPES
from ..errors import ArgumentError, DtypeError, FormatError, ShapeError
from .permutation import check_permutation

if TYPE_CHECKING:
    from scipy.sparse import bsr_array, csr_array

__all__ = ["TILE_K_CHOICES", "V_CHOICES", "ShflBWMatrix", "check_block", "nonzero_mask"]

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
V_CHOICES = (16, 32, 64, 128)
TILE_K_CHOICES = (16, 32, 64)

CHECKED_AT_ONCE = 1 << 16
"""Entries that `validate` looks at in one piece: what it allocates does not grow with the matrix (but for row_perm)."""


def check_block(block: Any) -> tuple[int, int]:
    """Return `(v, tile_k)` as ints, or raise `ArgumentError` naming what is allowed."""
    try:
        v, tile_k = (int(b) for b in block)
    except (TypeError, ValueError):
        raise ArgumentError(f"block is {block!r}; expected a pair (v, tile_k) such as (64, 64)") from None
    if v not in V_CHOICES:
        raise ArgumentError(f"block[0] (v, rows per group) is {v}; expected one of {V_CHOICES}")
    if tile_k not in TILE_K_CHOICES:
        raise ArgumentError(f"block[1] (tile_k, columns per tile) is {tile_k}; expected one of {TILE_K_CHOICES}")
    return v, tile_k


def nonzero_mask(a: np.ndarray) -> np.ndarray:
    """`a != 0` for every value dtype: NaN and Inf are values, both zeros are zero."""
    if a.dtype.itemsize == 2 and a.dtype.kind != "b":
        # Everything but the sign bit: 5 times faster than the comparison, which NumPy does through float32.
        return (a.view(np.uint16) & 0x7FFF).astype(bool)
    return a != 0


@dataclass(frozen=True, eq=False, repr=False)
class ShflBWMatrix:
    """A weight matrix of shape (m, k) whose rows fall into groups of `v` that share their kept columns.

    Build one with `shflnb.pack`, `PruneResult.pack`, `ShflBWMatrix.from_scipy` or `shflnb.load`. The constructor takes
    the arrays as they are (no copy), checks them with `validate()`, and raises what that raises. Treat them as
    read-only from then on: a device copy made by the first product is not refreshed. `dataclasses.replace` makes a
    changed matrix.

    Parameters
    ----------
    shape : (m, k)
        Rows (output features) and columns (input features) of the matrix.
    block : (v, tile_k)
        Rows per group (16, 32, 64 or 128) and stitched columns per kernel tile (16, 32 or 64).
    indptr : int64 array, shape (groups + 1,)
        Group g keeps the columns `indices[indptr[g]:indptr[g + 1]]`. groups = ceil(m / v).
    indices : int32 array, shape (indptr[-1],)
        Kept columns, strictly increasing within a group, each in 0..k-1.
    values : array, shape (indptr[-1], v), C order
        `values[j, r]` is the weight of packed row `g * v + r` at column `indices[j]`. Places of rows that the last
        group does not have (m not a multiple of v) hold zero.
    row_perm : int32 array, shape (m,)
        Packed row i is row `row_perm[i]` of the original matrix.

    Source: Huang et al., "Shfl-BW", DAC 2022, section 3 (pattern); the storage is our own.

    Examples
    --------
    >>> import numpy as np
    >>> from shflnb.formats import pack
    >>> w = np.zeros((32, 8), dtype=np.float32)
    >>> w[::2, [1, 5]] = 1.0
    >>> w[1::2, [0, 2, 7]] = 2.0
    >>> packed = pack(w, block=(16, 16))
    >>> packed.groups, packed.indices.tolist(), packed.density
    (2, [1, 5, 0, 2, 7], 0.3125)
    >>> bool((packed.to_dense() == w).all())
    True
    """

    shape: tuple[int, int]
    block: tuple[int, int]
    indptr: np.ndarray
    indices: np.ndarray
    values: np.ndarray
    row_perm: np.ndarray
    launch_cache: dict[Any, Any] = field(default_factory=dict, init=False, compare=False, repr=False)
    """Per-device launch records of `shflnb.ops`; private to it, never saved, copied or pickled."""

    # NumPy must not take the object apart in `ndarray @ packed`: the product is defined from the left only.
    __array_ufunc__ = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", _check_shape(self.shape))
        object.__setattr__(self, "block", check_block(self.block))
        self.validate(full=True)

    # -- what it is ------------------------------------------------------------------------------------------------

    @property
    def dtype(self) -> str:
        """Name of the value dtype: "float16", "bfloat16", "float32" or "float64"."""
        return _DTYPE_NAMES[self.values.dtype]  # str(dtype) costs 8 us, more than a launch

    @property
    def v(self) -> int:
        """Rows per group."""
        return self.block[0]

    @property
    def tile_k(self) -> int:
        """Stitched columns per kernel tile."""
        return self.block[1]

    @property
    def groups(self) -> int:
        """Number of row groups, ceil(m / v)."""
        return -(-self.shape[0] // self.block[0])

    @property
    def counts(self) -> np.ndarray:
        """Kept columns of each group: int64, shape (groups,)."""
        return np.diff(self.indptr)

    @property
    def nnz(self) -> int:
        """Number of stored values that are not zero (NaN and Inf count, -0.0 does not)."""
        return int(np.count_nonzero(nonzero_mask(self.values)))

    @property
    def stored(self) -> int:
        """Number of value places of real rows: sum over the groups of kept columns times rows in the group."""
        if self.groups == 0:
            return 0
        missing = self.groups * self.v - self.shape[0]
        return int(self.indptr[-1]) * self.v - int(self.indptr[-1] - self.indptr[-2]) * missing

    @property
    def density(self) -> float:
        """stored / (m * k); 0.0 for an empty matrix."""
        places = self.shape[0] * self.shape[1]
        return self.stored / places if places else 0.0

    @property
    def fill_in(self) -> float:
        """stored / nnz: 1.0 when the matrix has exactly the pattern; inf when only zeros are stored."""
        stored, nnz = self.stored, self.nnz
        if nnz == 0:
            return 1.0 if stored == 0 else float("inf")
        return stored / nnz

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays together: values, indices, indptr and row_perm."""
        return self.values.nbytes + self.indices.nbytes + self.indptr.nbytes + self.row_perm.nbytes

    def __repr__(self) -> str:
        m, k = self.shape
        counts = self.counts
        keep = f"{counts.min()}..{counts.max()}" if counts.size else "0"
        if counts.size and counts.min() == counts.max():
            keep = f"{counts[0]}"
        dense = m * k * self.values.itemsize
        return (
            f"<ShflBWMatrix {m} x {k} {self.dtype}, block {self.block}: {self.groups} groups keeping {keep} columns, "
            f"density {self.density:.4g}, fill-in {self.fill_in:.3g}, {_size(self.nbytes)} (dense {_size(dense)})>"
        )

    # -- checks ----------------------------------------------------------------------------------------------------

    def validate(self, full: bool = True) -> None:
        """Check the invariants of the format; a `ShapeError`, `DtypeError` or `FormatError` names the first broken one.

        Parameters
        ----------
        full : bool
            True also reads every array: indptr rises, indices are in range and strictly increasing in each group,
            row_perm is a permutation, and the places of missing rows hold zero. That takes time in the order of
            `len(indices) + m`. False looks at dtypes, shapes and the two ends of indptr only.
        """
        _check_arrays(self)
        if full:
            _check_contents(self)

    # -- conversions -----------------------------------------------------------------------------------------------

    def to_dense(self) -> np.ndarray:
        """The matrix as a dense NumPy array, (m, k) in C order, rows in the original order, same dtype.

        `out[row_perm[g*v + r], indices[j]] = values[j, r]` for every group g and j in indptr[g]..indptr[g+1]-1.
        """
        m, k = self.shape
        out = np.zeros((m, k), dtype=self.values.dtype)
        for g in range(self.groups):
            rows = self.row_perm[g * self.v : (g + 1) * self.v]
            part = slice(self.indptr[g], self.indptr[g + 1])
            band = np.zeros((len(rows), k), dtype=self.values.dtype)
            band[:, self.indices[part]] = self.values[part, : len(rows)].T
            out[rows] = band
        return out

    def astype(self, dtype: Any) -> ShflBWMatrix:
        """The same matrix with values of another dtype; `self` when the dtype does not change.

        Parameters
        ----------
        dtype : str, numpy.dtype or torch.dtype
            "float16", "bfloat16", "float32" or "float64". Rounds to nearest even; what is too large becomes Inf.

        Raises
        ------
        DtypeError
            For any other dtype.
        """
        name = _dtype_name(dtype)
        if name == self.dtype:
            return self
        with np.errstate(over="ignore"):
            return replace(self, values=self.values.astype(DTYPES[name]))

    def to_scipy(self, format: str = "csr") -> csr_array | bsr_array:
        """The matrix as a SciPy sparse array.

        SciPy has no arithmetic for float16 and bfloat16: those values are converted to float32, which holds them
        exactly.

        Parameters
        ----------
        format : "csr" or "bsr"
            "csr": shape (m, k), rows in the ORIGINAL order, stored zeros left out.
            "bsr": shape (groups * v, k), rows in the PACKED order (row i is original row `row_perm[i]`, rows from m on
            are zero), one block of (v, 1) per kept column. `from_scipy(bsr, block, row_perm=row_perm)` undoes it.

        Raises
        ------
        ArgumentError
            For another format.

        Examples
        --------
        >>> import numpy as np
        >>> from shflnb.formats import pack
        >>> packed = pack(np.eye(16, dtype=np.float32), block=(16, 16), fill_in_warning=None)
        >>> packed.to_scipy("csr").nnz, packed.to_scipy("bsr").blocksize
        (16, (16, 1))
        """
        from .scipy_interop import to_scipy

        return to_scipy(self, format)

    @classmethod
    def from_scipy(cls, a: Any, block: tuple[int, int] = (64, 64), *, row_perm: Any = None) -> ShflBWMatrix:
        """Pack a SciPy sparse array or matrix of any format (float32 or float64).

        Parameters
        ----------
        a : scipy.sparse array or matrix, shape (m, k)
            A `bsr_array` with blocksize (v, 1) is taken as packed rows, as `to_scipy("bsr")` gives them: its blocks
            become the kept columns as they stand, without a search, whatever their values. Anything else goes through
            `pack`.
        block : (v, tile_k)
            As in `pack`.
        row_perm : int array, shape (m,), optional
            Packed row i is original row `row_perm[i]`. For a (v, 1) bsr_array its length is the number of rows of the
            result, which may be less than `a.shape[0]` when the rows beyond are zero; the default is the given order.

        Raises
        ------
        DtypeError, ShapeError, FormatError, ArgumentError
            For values that are not float32 or float64, and for a block or row_perm that does not fit.
        """
        from .scipy_interop import from_scipy

        return from_scipy(a, block, row_perm)

    def __matmul__(self, x: Any) -> Any:
        """`packed @ x`: see `shflnb.matmul`."""
        from ..ops import matmul  # the one look upward of this layer, so that the operator exists; never at import

        return matmul(self, x)

    # -- pickling --------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "launch_cache"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__dict__["launch_cache"] = {}


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e6:.3g} MB" if nbytes >= 1e6 else f"{nbytes / 1e3:.3g} kB"


def _check_shape(shape: Any) -> tuple[int, int]:
    try:
        m, k = (int(size) for size in shape)
    except (TypeError, ValueError):
        raise ShapeError(f"shape is {shape!r}; expected a pair (m, k)") from None
    largest = np.iinfo(np.int32).max
    if not (0 <= m <= largest and 0 <= k <= largest):
        raise ShapeError(f"shape is ({m}, {k}); expected sizes in 0..{largest}, which int32 indices can name")
    return m, k


def _dtype_name(dtype: Any) -> str:
    name = str(dtype)
    name = name[6:] if name.startswith("torch.") else name
    if name not in DTYPES:
        try:
            name = str(np.dtype(dtype))
        except TypeError:
            name = str(dtype)
    if name not in DTYPES:
        raise DtypeError(f"dtype {dtype!r} is not a weight dtype; expected one of {', '.join(DTYPES)}")
    return name


def _check_arrays(packed: ShflBWMatrix) -> None:
    """Dtypes, shapes, memory order, and the two ends of indptr."""
    for name, dtype in (("indptr", np.int64), ("indices", np.int32), ("row_perm", np.int32)):
        a = getattr(packed, name)
        if not isinstance(a, np.ndarray):
            raise DtypeError(f"{name} is a {type(a).__name__}; expected a NumPy array of {np.dtype(dtype)}")
        if a.dtype != dtype:
            raise DtypeError(f"{name} has dtype {a.dtype}; expected {np.dtype(dtype)}")
        if a.ndim != 1 or not a.flags.c_contiguous:
            raise ShapeError(f"{name} has shape {a.shape} and strides {a.strides}; expected one contiguous dimension")
    values = packed.values
    if not isinstance(values, np.ndarray) or values.dtype not in DTYPES.values():
        given = values.dtype if isinstance(values, np.ndarray) else type(values).__name__
        raise DtypeError(f"values is {given}; expected a NumPy array of {', '.join(DTYPES)}")
    if packed.indptr.shape != (packed.groups + 1,):
        raise ShapeError(f"indptr has {packed.indptr.size} entries; {packed.shape[0]} rows in groups of {packed.v} "
                         f"need {packed.groups + 1}")  # fmt: skip
    columns = len(packed.indices)
    if packed.indptr[0] != 0 or packed.indptr[-1] != columns:
        raise FormatError(f"indptr runs from {packed.indptr[0]} to {packed.indptr[-1]}; expected 0 to {columns}, "
                          f"the length of indices")  # fmt: skip
    if values.shape != (columns, packed.v):
        raise ShapeError(f"values has shape {values.shape}; expected ({columns}, {packed.v}), one row per kept column")
    if not values.flags.c_contiguous:
        raise ShapeError(f"values has strides {values.strides}; expected C order (use np.ascontiguousarray)")
    if packed.row_perm.shape != (packed.shape[0],):
        raise ShapeError(f"row_perm has {packed.row_perm.size} entries; expected {packed.shape[0]}, one per row")


def _check_contents(packed: ShflBWMatrix) -> None:
    """Every entry of indptr, indices and row_perm, and the zeros of the rows that the last group does not have."""
    indptr = packed.indptr
    falls = np.flatnonzero(indptr[1:] < indptr[:-1])
    if falls.size:
        g = int(falls[0])
        raise FormatError(f"indptr falls from {indptr[g]} to {indptr[g + 1]} at group {g}; it must not fall")
    for start in range(0, len(packed.indices), CHECKED_AT_ONCE):
        _check_indices(packed, start, min(start + CHECKED_AT_ONCE, len(packed.indices)))
    check_permutation(packed.row_perm, packed.shape[0])
    missing = packed.groups * packed.v - packed.shape[0]
    if missing:
        tail = packed.values[indptr[-2] :, packed.v - missing :]
        for start in range(0, len(tail), CHECKED_AT_ONCE // packed.v):
            if nonzero_mask(tail[start : start + CHECKED_AT_ONCE // packed.v]).any():
                raise FormatError(f"values of the {missing} rows that the last group does not have must be zero")


def _check_indices(packed: ShflBWMatrix, start: int, stop: int) -> None:
    """`indices[start:stop]`: range, and order with the one before; a piece at a time, so that little is allocated."""
    indptr, k = packed.indptr, packed.shape[1]
    begin = max(start - 1, 0)
    piece = packed.indices[begin:stop]
    low, high = int(piece.min()), int(piece.max())
    if low < 0 or high >= k:
        raise FormatError(f"indices holds column {low if low < 0 else high}; expected columns from 0 to below {k}")
    rises = piece[1:] > piece[:-1]
    groups = slice(np.searchsorted(indptr, begin, side="right"), np.searchsorted(indptr, stop, side="left"))
    rises[indptr[groups] - begin - 1] = True  # the first column of a group has none before it
    bad = np.flatnonzero(~rises)
    if bad.size:
        j = begin + int(bad[0]) + 1
        g = int(np.searchsorted(indptr, j, side="right")) - 1
        raise FormatError(f"indices of group {g} are not strictly increasing: {packed.indices[j - 1]} stands before "
                          f"{packed.indices[j]}")  # fmt: skip
