"""Oracles in NumPy and SciPy: the product by definition, through SciPy, and by emulating what a tensor core reads.

All compute `activation(W @ x + bias[:, None]) + residual` for a packed W (m, k) and x (k, n) or (k,), slowly and
plainly. Nothing here shares code with the kernels; the fragment emulations take their lane tables from the PTX ISA.

Stored places follow IEEE arithmetic, also where the stored weight is zero; pruned places never read x. So a NaN in a
row of x reaches the outputs of exactly those groups that keep the column. (`matmul_scipy` alone drops stored zeros:
finite x only.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from .arrays import host_array
from .errors import ArgumentError
from .formats.layout import KernelLayout, to_mma, to_wgmma
from .formats.shflbw import ShflBWMatrix

__all__ = ["Judgement", "activate", "error_bound", "judge", "matmul_core_matrices", "matmul_definition",
           "matmul_fragments", "matmul_scipy", "relative_error"]  # fmt: skip


def activate(y: np.ndarray, activation: str | None) -> np.ndarray:
    """`relu`, `gelu` (exact: y * erfc(-y / sqrt(2)) / 2) or `silu` of y, in the dtype of y; None returns y."""
    from scipy.special import erfc, expit

    if activation is None:
        return y
    if activation == "relu":
        return np.maximum(y, 0)  # NaN stays NaN
    if activation == "gelu":
        t = np.asarray(-y / np.sqrt(2.0))
        if t.dtype == np.longdouble:  # SciPy's erfc has no wider form than float64
            t = t.astype(np.float64)
        return y * (0.5 * erfc(t))
    if activation == "silu":
        return y * expit(y)
    raise ArgumentError(f"activation is {activation!r}; expected None, 'relu', 'gelu' or 'silu'")


def matmul_definition(
    packed: ShflBWMatrix,
    x: Any,
    bias: Any = None,
    activation: str | None = None,
    residual: Any = None,
    *,
    precision: type = np.float64,
) -> np.ndarray:
    """The product by definition, from `to_dense`: float64, (m, n) or (m,).

    For each group with rows R and kept columns C: `y[R] = W[R][:, C] @ x[C]`.

    Parameters
    ----------
    packed : ShflBWMatrix, shape (m, k)
    x : array (k, n) or (k,)
        NumPy, torch or any device array that `host_array` can copy; any weight dtype.
    bias : array (m,), optional
    activation : None, "relu", "gelu" or "silu"
    residual : array of the result's shape, optional
        Added after the activation.
    precision : numpy scalar type
        The dtype of all arithmetic; `np.longdouble` judges float64 kernels.

    Examples
    --------
    >>> import numpy as np
    >>> from shflnb.formats import pack
    >>> w = np.arange(32, dtype=np.float32).reshape(16, 2)
    >>> matmul_definition(pack(w, block=(16, 16)), np.ones(2, dtype=np.float32))[:3].tolist()
    [1.0, 5.0, 9.0]
    """
    w: np.ndarray = packed.to_dense().astype(precision)
    x = _columns(x).astype(precision)
    y = np.zeros((packed.shape[0], *x.shape[1:]), dtype=precision)
    for g in range(packed.groups):
        rows = packed.row_perm[g * packed.v : (g + 1) * packed.v]
        columns = packed.indices[packed.indptr[g] : packed.indptr[g + 1]]
        with np.errstate(invalid="ignore"):  # NaN and Inf are data here
            y[rows] = w[rows][:, columns] @ x[columns]
    return _epilogue(y, bias, activation, residual)


def matmul_scipy(
    packed: ShflBWMatrix, x: Any, bias: Any = None, activation: str | None = None, residual: Any = None
) -> np.ndarray:
    """The product through `scipy.sparse.csr_array`, in float64; see `matmul_definition`. For finite x."""
    y = packed.to_scipy("csr").astype(np.float64) @ _columns(x).astype(np.float64)
    return _epilogue(y, bias, activation, residual)


def matmul_fragments(
    packed: ShflBWMatrix,
    x: Any,
    bias: Any = None,
    activation: str | None = None,
    residual: Any = None,
    *,
    tile_k: int | None = None,
) -> np.ndarray:
    """The product as `mma.m16n8k16` instructions compute it, lane by lane, from the `to_mma` layout: float64 epilogue.

    Each instruction multiplies 16 columns exactly and adds the sum to a float32 accumulator, rounding once. Padded
    columns put zeros into the B fragment instead of reading x.
    """
    layout = to_mma(packed, tile_k)
    fragments = layout.values.reshape(layout.tiles, layout.tile_k // 16, packed.v // 16, 32, 8).astype(np.float64)
    a_row, a_column, b_row, b_column, c_row, c_column = _mma_lanes()

    def one_tile(tile: int, stitched: np.ndarray, accumulator: np.ndarray) -> None:
        for step in range(layout.tile_k // 16):
            rows_of_b = stitched[16 * step : 16 * step + 16]
            b = np.zeros((16, stitched.shape[1]))
            for block in range(0, stitched.shape[1], 8):
                registers = rows_of_b[b_row, block + b_column]  # (32 lanes, 4)
                b[b_row, block + b_column] = registers
            for r in range(packed.v // 16):
                a = np.zeros((16, 16))
                a[a_row, a_column] = fragments[tile, step, r]
                with np.errstate(invalid="ignore"):
                    product = a @ b
                for block in range(0, stitched.shape[1], 8):
                    c = accumulator[16 * r : 16 * r + 16, block : block + 8]
                    c[c_row, c_column] = c[c_row, c_column] + product[c_row, block + c_column]

    return _by_tiles(packed, layout, x, 8, one_tile, bias, activation, residual)


def matmul_core_matrices(
    packed: ShflBWMatrix,
    x: Any,
    bias: Any = None,
    activation: str | None = None,
    residual: Any = None,
    *,
    tile_k: int | None = None,
) -> np.ndarray:
    """The product as `wgmma` reads operand A from the `to_wgmma` layout: 8x8 core matrices found by descriptor offsets.

    Within a tile the core matrix of columns 8i.. and rows 8j.. starts `i * LBO + j * SBO` bytes on, with the leading
    (along k) offset LBO = v / 8 * 128 and the stride (along rows) offset SBO = 128; its row r is 16 bytes at `r * 16`.
    """
    layout = to_wgmma(packed, tile_k)
    flat = layout.values.astype(np.float64)
    leading, stride = packed.v // 8 * 128 // 2, 128 // 2  # elements of 2 bytes

    def one_tile(tile: int, stitched: np.ndarray, accumulator: np.ndarray) -> None:
        start = tile * layout.tile_k * packed.v
        for step in range(0, layout.tile_k // 8, 2):
            for j in range(packed.v // 8):
                halves = [flat[start + i * leading + j * stride :][:64].reshape(8, 8) for i in (step, step + 1)]
                with np.errstate(invalid="ignore"):
                    accumulator[8 * j : 8 * j + 8] += np.hstack(halves) @ stitched[8 * step : 8 * step + 16]

    return _by_tiles(packed, layout, x, 1, one_tile, bias, activation, residual)


def relative_error(y: Any, reference: np.ndarray) -> float:
    """`norm(y - reference) / norm(reference)` (Frobenius); 0.0 if both are zero or empty; NaN if one is not finite."""
    difference = float(np.linalg.norm(np.ravel(host_array(y).astype(reference.dtype) - reference)))
    size = float(np.linalg.norm(np.ravel(reference)))
    if difference == 0.0:
        return 0.0
    return difference / size if size else float("inf")


def error_bound(
    packed: ShflBWMatrix, x: Any, bias: Any = None, activation: str | None = None, residual: Any = None
) -> tuple[np.ndarray, float]:
    """The reference and the relative error that promise 2 allows: twice that of the dense product in the same dtypes.

    The dense product accumulates in float32 (in float64 for float64 inputs), applies the epilogue there and rounds once
    to the dtype of x. On very small outputs the dense error may be zero by luck, so an allowance of 4 roundings of the
    accumulator relative to `|W| @ |x|`, divided by the square root of the number of outputs, is added; it vanishes
    against the first term as outputs grow. For finite inputs; `judge` also takes others, and looks at single outputs.

    Returns
    -------
    reference : float64 array (longdouble for float64 inputs)
    bound : float
        A result y is right if `relative_error(y, reference) <= bound`.

    Examples
    --------
    >>> import numpy as np
    >>> from shflnb.formats import pack
    >>> w = np.random.default_rng(0).standard_normal((64, 48)).astype(np.float16)
    >>> reference, bound = error_bound(pack(w), np.ones((48, 3), dtype=np.float16))
    >>> bool(relative_error(reference.astype(np.float16), reference) <= bound < 1e-3)
    True
    """
    a = _columns(x)
    reference, dense, scale = _reference_and_dense(packed, a, bias, activation, residual)
    return reference, _allowed(reference, dense, scale, a.dtype)


@dataclass(frozen=True)
class Judgement:
    """What `judge` found about a product; `holds` is the verdict and `str` says it in a line."""

    error: float
    """Relative error (Frobenius) against the reference."""
    bound: float
    """What promise 2 allows."""
    worst: float
    """The largest error of one output, in units of its own derived bound."""
    where: tuple[int, ...]
    """The output with the largest error."""

    @property
    def holds(self) -> bool:
        """Whether the product keeps promise 2 as a whole, and each output its own bound."""
        return self.error <= self.bound and self.worst <= 1.0

    def __str__(self) -> str:
        return (
            f"relative error {self.error:.3g} (allowed {self.bound:.3g}); worst output {self.where} has "
            f"{self.worst:.3g} of its bound"
        )


def judge(
    y: Any, packed: ShflBWMatrix, x: Any, bias: Any = None, activation: str | None = None, residual: Any = None
) -> Judgement:
    """Compare a product with the reference: promise 2 over all outputs, and a derived bound for each one.

    The norm of all outputs hides a single wrong one, so each output must also lie within

        2 * (u * |reference| + sqrt(c) * a * (|W| @ |x| + |bias|) + tiny)

    of the reference, where u is the unit roundoff of the dtype of y, a that of the accumulator, c the largest number of
    kept columns of a group, and tiny the smallest number of the dtype. The residual counts like an output. Where the
    reference is not finite in the dtype of y (NaN, Inf, overflow), y must be the same NaN or Inf.

    Examples
    --------
    >>> import numpy as np
    >>> from shflnb.formats import pack
    >>> w = np.random.default_rng(0).standard_normal((64, 48)).astype(np.float16)
    >>> x = np.ones((48, 3), dtype=np.float16)
    >>> y = (w.astype(np.float32) @ x.astype(np.float32)).astype(np.float16)
    >>> judge(y, pack(w), x).holds
    True
    >>> y[5, 1] += 1
    >>> judge(y, pack(w), x).where
    (5, 1)
    """
    a, result = _columns(x), host_array(y, what="y")
    with np.errstate(invalid="ignore", over="ignore"):
        reference, dense, scale = _reference_and_dense(packed, a, bias, activation, residual)
        rounded = reference.astype(result.dtype)
    finite = np.isfinite(rounded.astype(np.float64))
    if not np.array_equal(rounded[~finite].astype(np.float64), result[~finite].astype(np.float64), equal_nan=True):
        bad = ~finite & (rounded.astype(np.float64) != result.astype(np.float64))
        bad &= ~(np.isnan(rounded.astype(np.float64)) & np.isnan(result.astype(np.float64)))
        return Judgement(float("nan"), 0.0, float("inf"), _place(bad))
    info = ml_dtypes.finfo(result.dtype)
    unit, accumulator = float(info.eps) / 2, _accumulator_eps(a.dtype) / 2
    size = np.abs(reference)
    if residual is not None:
        size = size + np.abs(host_array(residual).astype(size.dtype))
    terms = np.sqrt(max(1, int(packed.counts.max(initial=0))))
    bound = 2 * (unit * size + terms * accumulator * scale + float(info.smallest_subnormal))
    with np.errstate(invalid="ignore"):
        parts = np.where(finite, np.abs(result.astype(reference.dtype) - reference) / bound, 0.0)
    parts = np.where(np.isnan(parts), np.inf, parts)
    error = relative_error(result[finite], reference[finite])
    allowed = _allowed(reference[finite], dense[finite], scale[finite], a.dtype)
    return Judgement(error, allowed, float(parts.max(initial=0.0)), _place(parts))


def _place(a: np.ndarray) -> tuple[int, ...]:
    """Where `a` is largest; all zeros for an empty array."""
    if a.size == 0:
        return (0,) * a.ndim
    return tuple(int(i) for i in np.unravel_index(int(np.argmax(a)), a.shape))


def _accumulator_eps(dtype: np.dtype) -> float:
    return float(np.finfo(np.float64 if dtype == np.float64 else np.float32).eps)


def _reference_and_dense(
    packed: ShflBWMatrix, x: np.ndarray, bias: Any, activation: str | None, residual: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The exact product, the dense one in the given dtypes, and `|W| @ |x| + |bias|`; pruned places do not read x."""
    double = x.dtype == np.float64
    compute, precision = (np.float64, np.longdouble) if double else (np.float32, np.float64)
    reference = matmul_definition(packed, x, bias, activation, residual, precision=precision)
    finite_x = np.where(np.isfinite(x.astype(np.float64)), x, np.zeros_like(x))
    w = packed.to_dense()
    dense = _epilogue(w.astype(compute) @ finite_x.astype(compute), bias, activation, residual).astype(x.dtype)
    scale = np.abs(w.astype(np.float64)) @ np.abs(finite_x.astype(np.float64))
    if bias is not None:
        size = np.abs(host_array(bias).astype(np.float64))
        scale = scale + (size[:, None] if scale.ndim == 2 else size)
    return reference, dense, scale


def _allowed(reference: np.ndarray, dense: np.ndarray, scale: np.ndarray, dtype: np.dtype) -> float:
    """Twice the dense error, and the allowance for luck that `error_bound` describes."""
    size = float(np.linalg.norm(np.ravel(reference)))
    if size == 0.0:
        return 0.0
    luck = 2 * _accumulator_eps(dtype) * float(np.linalg.norm(np.ravel(scale))) / (size * np.sqrt(reference.size))
    return 2 * relative_error(dense, reference) + luck


def _columns(x: Any) -> np.ndarray:
    return host_array(x, what="x")


def _epilogue(y: np.ndarray, bias: Any, activation: str | None, residual: Any) -> np.ndarray:
    """In the dtype of y."""
    if bias is not None:
        b = host_array(bias, what="bias").astype(y.dtype)
        y = y + (b[:, None] if y.ndim == 2 else b)
    y = activate(y, activation)
    return y if residual is None else y + host_array(residual, what="residual").astype(y.dtype)


def _mma_lanes() -> tuple[np.ndarray, ...]:
    """Row and column of each register of each lane: A (32, 8), B (32, 4), C (32, 4), as the PTX ISA tabulates them."""
    lane = np.arange(32)[:, None]
    quad, in_quad = lane // 4, lane % 4
    i = np.arange(8)
    a_row = np.where((i < 2) | ((i >= 4) & (i < 6)), quad, quad + 8)
    a_column = np.where(i < 4, in_quad * 2 + i % 2, in_quad * 2 + i % 2 + 8)
    i = np.arange(4)
    b_row = np.where(i < 2, in_quad * 2 + i % 2, in_quad * 2 + i % 2 + 8)
    b_column = np.broadcast_to(quad, (32, 4))
    c_row = np.where(i < 2, quad, quad + 8)
    c_column = in_quad * 2 + i % 2
    return a_row, a_column, b_row, b_column, c_row, c_column


def _by_tiles(
    packed: ShflBWMatrix,
    layout: KernelLayout,
    x: Any,
    multiple: int,
    one_tile: Any,
    bias: Any,
    activation: str | None,
    residual: Any,
) -> np.ndarray:
    """The loop of every stitched kernel: groups, tiles, gather, multiply-accumulate in float32, scatter of the rows."""
    m, _ = packed.shape
    v, tile_k = packed.v, layout.tile_k
    a = _columns(x)
    columns_of_x = (a if a.ndim == 2 else a[:, None]).astype(np.float64)
    n = columns_of_x.shape[1]
    padded_n = -(-n // multiple) * multiple
    y = np.zeros((m, n), dtype=np.float64)
    for g in range(packed.groups):
        accumulator = np.zeros((v, padded_n), dtype=np.float32)
        for tile in range(layout.tile_ptr[g], layout.tile_ptr[g + 1]):
            ids = layout.columns[tile * tile_k : (tile + 1) * tile_k]
            stitched = np.zeros((tile_k, padded_n))
            stitched[ids >= 0, :n] = columns_of_x[ids[ids >= 0]]
            one_tile(tile, stitched, accumulator)
        rows = packed.row_perm[g * v : (g + 1) * v]
        y[rows] = accumulator[: len(rows), :n]
    return _epilogue(y.reshape(m, *a.shape[1:]), bias, activation, residual)
