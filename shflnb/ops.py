"""The products: check, choose, launch. Every error of a product is raised here, before anything is allocated.

    y = matmul(packed, x)                # (m, k) @ (k, n) -> (m, n)
    y = linear(x, packed, bias)          # (..., k) -> (..., m)

NumPy arrays and CPU torch tensors are multiplied by `kernels/spmm_cpu.py`; arrays on a CUDA device are handed on to
`kernels/spmm_device.py` as they are.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from .arrays import DTYPES, dtype_of, empty_like_kind, host_array, kind_of
from .errors import ArgumentError, DeviceError, DtypeError, ShapeError
from .formats.shflbw import ShflBWMatrix

__all__ = ["ACTIVATIONS", "linear", "matmul"]

ACTIVATIONS = (None, "relu", "gelu", "silu")
"""What `activation=` takes: nothing, max(z, 0), z * Phi(z) (the exact form, by erf), z / (1 + exp(-z))."""
LAYOUTS = ("token", "feature")


def matmul(
    packed: ShflBWMatrix,
    x: Any,
    *,
    bias: Any = None,
    activation: str | None = None,
    residual: Any = None,
    out: Any = None,
) -> Any:
    """`activation(W @ x + bias[:, None]) + residual` for a packed W.

    Parameters
    ----------
    packed : ShflBWMatrix, shape (m, k)
        The weights.
    x : array, shape (k, n) or (k,), dtype of `packed`
        NumPy array, CPU torch tensor, or any CUDA array (torch, CuPy, Numba, DLPack, `__cuda_array_interface__`). On
        the CPU any strides; feature-major (n contiguous) and token-major (k contiguous) are both fast.
    bias : array, shape (m,), optional
        The dtype of x, or float32.
    activation : None, "relu", "gelu" or "silu"
    residual : array, shape and dtype of the result, optional
        Added after the activation. It may be `out` itself (added in place), but not overlap it otherwise.
    out : array, shape (m, n) or (m,), optional
        Where to put the result: the same kind of array and dtype as x, writable, any strides; must not overlap x.

    Returns
    -------
    array, shape (m, n) or (m,)
        `out` if given, else a new C-contiguous array of the kind, dtype and device of x. On the CPU float16 and
        bfloat16 are accumulated, and the whole expression evaluated, in float32 and rounded once. The bits depend
        neither on the number of threads nor on the other columns of x.

    Raises
    ------
    ShapeError, DtypeError, ArgumentError, DeviceError
        For arguments that do not fit, before any allocation. A torch tensor that requires a gradient is refused while
        gradients are recorded: `shflnb.nn.ShflLinear` has the backward pass.

    Notes
    -----
    Stored places follow IEEE arithmetic; pruned places never read x, so a NaN in a row of x that a group does not keep
    cannot reach the rows of that group. Source: Huang et al., "Shfl-BW", DAC 2022, section 4 (stitching).

    Examples
    --------
    >>> import numpy as np, shflnb
    >>> w = np.zeros((32, 8), dtype=np.float32)
    >>> w[::2, [1, 5]], w[1::2, [0, 2, 7]] = 1.0, 2.0
    >>> packed = shflnb.pack(w, block=(16, 16))
    >>> x = np.arange(16, dtype=np.float32).reshape(8, 2)
    >>> bool((shflnb.matmul(packed, x) == w @ x).all())
    True
    """
    _check_packed(packed)
    kind = kind_of(x)
    if kind in _ON_DEVICE:
        return _device().matmul(packed, x, bias=bias, activation=activation, residual=residual, out=out)
    a = _operand(packed, x, kind)
    m, k = packed.shape
    if a.ndim not in (1, 2) or a.shape[0] != k:
        hint = "; shflnb.linear takes (..., k)" if a.shape[-1:] == (k,) else ""
        raise ShapeError(f"x has shape {a.shape}; packed is {m} x {k} and needs (k, n) or (k,) with k = {k}{hint}")
    shape = (m, *a.shape[1:])
    b, r, y = _extras(packed, kind, a, shape, bias, activation, residual, out)
    if y is None:
        out = empty_like_kind(shape, x, packed.dtype)
        y = host_array(out)
    if a.ndim == 1:
        a, y, r = a[:, None], y[:, None], None if r is None else r[:, None]
    _launch(packed, a, y, b, activation, r)
    return out


def linear(
    x: Any,
    packed: ShflBWMatrix,
    bias: Any = None,
    *,
    activation: str | None = None,
    residual: Any = None,
    out: Any = None,
    layout: str = "token",
) -> Any:
    """`activation(x @ W.T + bias) + residual` for a packed W: the meaning of `torch.nn.functional.linear`.

    Parameters
    ----------
    x : array, shape (..., k), dtype of `packed`
        As in `matmul`. On the CPU leading dimensions that no view can flatten are copied first.
    packed : ShflBWMatrix, shape (m, k)
        The weights.
    bias : array, shape (m,), optional
        The dtype of x, or float32.
    activation : None, "relu", "gelu" or "silu"
    residual : array, shape (..., m) and dtype of the result, optional
        Added after the activation; it may be `out` itself.
    out : array, shape (..., m), optional
        Where to put the result: the kind and dtype of x, writable, any strides; must not overlap x.
    layout : "token" or "feature"
        Memory order of the result if it is allocated here: "token" is C order; "feature" is a view of shape (..., m)
        whose memory is (m, n) in C order, n the product of the leading dimensions, which the next sparse layer reads
        without a transposition. Not together with `out`, whose own strides decide.

    Returns
    -------
    array, shape (..., m)
        `out` if given, else a new array of the kind, dtype and device of x.

    Raises
    ------
    ShapeError, DtypeError, ArgumentError, DeviceError
        As `matmul`.

    Examples
    --------
    >>> import numpy as np, shflnb
    >>> w = np.ones((16, 4), dtype=np.float32)
    >>> x = np.ones((2, 3, 4), dtype=np.float32)
    >>> y = shflnb.linear(x, shflnb.pack(w, block=(16, 16)), layout="feature")
    >>> y.shape, y.strides, bool((y == x @ w.T).all())
    ((2, 3, 16), (12, 4, 24), True)
    """
    _check_packed(packed)
    if not isinstance(layout, str) or layout not in LAYOUTS:
        raise ArgumentError(f"layout is {layout!r}; expected 'token' or 'feature'")
    if out is not None and layout != "token":
        raise ArgumentError("layout='feature' came together with out; the strides of out decide: leave layout away")
    kind = kind_of(x)
    if kind in _ON_DEVICE:
        return _device().linear(x, packed, bias, activation=activation, residual=residual, out=out, layout=layout)
    a = _operand(packed, x, kind)
    m, k = packed.shape
    if a.ndim < 1 or a.shape[-1] != k:
        hint = "; shflnb.matmul takes (k, n)" if a.shape[:1] == (k,) else ""
        raise ShapeError(f"x has shape {a.shape}; packed is {m} x {k} and needs (..., k) with k = {k}{hint}")
    lead = a.shape[:-1]
    n = math.prod(lead)
    b, r, y = _extras(packed, kind, a, (*lead, m), bias, activation, residual, out)
    if y is None and layout == "feature":
        memory = empty_like_kind((m, n), x, packed.dtype)
        out = _last_first(memory, lead, kind)
        y = host_array(memory).T
    elif y is None:
        out = empty_like_kind((*lead, m), x, packed.dtype)
        y = host_array(out)
    flat = y.reshape(n, m)
    if r is not None:
        r = r.reshape(n, m).T
    _launch(packed, a.reshape(n, k).T, flat.T, b, activation, r)
    if flat.size and not np.may_share_memory(flat, y):
        y[...] = flat.reshape(y.shape)
    return out


_ON_DEVICE = ("torch-cuda", "cupy", "numba", "device")
_ON_HOST = ("numpy", "torch")


@functools.cache
def _spmm() -> Callable[..., None]:
    from .kernels.spmm_cpu import spmm  # Numba takes half a second to import: at the first product, not before

    return spmm


@functools.cache
def _device() -> Any:
    from .kernels import spmm_device

    return spmm_device


def _launch(
    packed: ShflBWMatrix,
    x: np.ndarray,
    y: np.ndarray,
    b: np.ndarray | None,
    activation: str | None,
    r: np.ndarray | None,
) -> None:
    """Run the CPU kernel on checked arrays (k, n) and (m, n); it reads and writes aligned memory only."""
    if not x.flags.aligned:
        x = x.copy()
    if r is not None and not r.flags.aligned:
        r = r.copy()
    to = y if y.flags.aligned else np.empty(y.shape, y.dtype)
    _spmm()(packed, x, to, bias=b, activation=activation, residual=r)
    if to is not y:
        y[...] = to


def _last_first(memory: Any, lead: tuple[int, ...], kind: str) -> Any:
    """A view of shape (*lead, m) of a feature-major (m, n) array."""
    shaped = memory.reshape(memory.shape[0], *lead)
    return np.moveaxis(shaped, 0, -1) if kind == "numpy" else shaped.movedim(0, -1)


def _check_packed(packed: Any) -> None:
    if not isinstance(packed, ShflBWMatrix):
        raise DtypeError(f"packed is a {type(packed).__name__}; needed is a ShflBWMatrix, which shflnb.pack makes")


def _operand(packed: ShflBWMatrix, x: Any, kind: str) -> np.ndarray:
    """x on the host as NumPy sees it, of the dtype of `packed`."""
    a = _host(x, kind, "x")
    name = dtype_of(x)
    if name != packed.dtype:
        if name not in DTYPES:
            raise DtypeError(f"x is {name}; needed is the dtype of packed, {packed.dtype}")
        raise DtypeError(
            f"x is {name}, packed is {packed.dtype}; make them one: packed.astype({name!r}), once, or convert x"
        )
    return a


def _host(x: Any, kind: str, what: str) -> np.ndarray:
    """A CPU array as NumPy sees it, without a copy; refuses what would lose a gradient, a mask or the device."""
    if kind not in _ON_HOST:
        if kind in _ON_DEVICE:
            raise DeviceError(f"{what} is on a CUDA device, x on the CPU; move one of them")
        device = getattr(x, "device", None)
        given = type(x).__name__ + (f" on {device}" if device is not None else "")
        raise DtypeError(f"{what} is a {given}; expected a NumPy array, a torch tensor or a CUDA array")
    if kind == "torch":
        torch = sys.modules["torch"]
        if x.requires_grad and torch.is_grad_enabled():
            raise DtypeError(
                f"{what} requires a gradient, and this product records none; use shflnb.nn.ShflLinear, or pass "
                f"{what}.detach()"
            )
    elif isinstance(x, np.ma.MaskedArray):
        raise DtypeError(f"{what} is a masked array, and a product would drop the mask; pass {what}.filled(...)")
    return host_array(x, what=what)


def _extras(
    packed: ShflBWMatrix,
    kind: str,
    x: np.ndarray,
    shape: tuple[int, ...],
    bias: Any,
    activation: Any,
    residual: Any,
    out: Any,
) -> tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None]:
    """Check everything but packed and x; bias, residual and out as NumPy arrays on the host."""
    if not (activation is None or (isinstance(activation, str) and activation in ACTIVATIONS)):
        raise ArgumentError(f"activation is {activation!r}; expected None, 'relu', 'gelu' or 'silu'")
    b = r = y = None
    if bias is not None:
        b = _host(bias, kind_of(bias), "bias")
        if b.shape != (packed.shape[0],):
            raise ShapeError(f"bias has shape {b.shape}; needed is ({packed.shape[0]},), one number per row of packed")
        if dtype_of(bias) not in (packed.dtype, "float32"):
            raise DtypeError(f"bias is {dtype_of(bias)}; needed is the dtype of x ({packed.dtype}) or float32")
    if residual is not None:
        r = _host(residual, kind_of(residual), "residual")
        _check_like_result("residual", r, dtype_of(residual), shape, packed.dtype)
    if out is not None:
        y = _host(out, kind_of(out), "out")
        _check_out(out, y, kind, x, shape, packed.dtype)
        if b is not None and _overlap(b, y):
            raise ArgumentError("out overlaps bias; pass an array of its own")
        if r is not None and _overlap(r, y) and not _same_memory(r, y):
            raise ArgumentError("out overlaps residual in part; pass the same array for both, or one of its own")
    return b, r, y


def _check_like_result(what: str, a: np.ndarray, dtype: str, shape: tuple[int, ...], needed: str) -> None:
    if a.shape != shape:
        raise ShapeError(f"{what} has shape {a.shape}; the result has {shape}")
    if dtype != needed:
        raise DtypeError(f"{what} is {dtype}; the result is {needed}")


def _check_out(out: Any, y: np.ndarray, kind: str, x: np.ndarray, shape: tuple[int, ...], needed: str) -> None:
    if kind_of(out) != kind:
        raise DtypeError(f"out is a {type(out).__name__}; needed is the kind of array that x is ({_ARRAYS[kind]})")
    _check_like_result("out", y, dtype_of(out), shape, needed)
    if not y.flags.writeable:
        raise ArgumentError("out is read-only; pass an array that may be written")
    if any(size > 1 and stride == 0 for size, stride in zip(y.shape, y.strides)):  # noqa: B905 (of one array)
        raise ArgumentError(f"out is a broadcast array (strides {y.strides}): its elements share memory; pass a copy")
    if kind == "torch" and out.is_neg():
        raise ArgumentError("out is a lazily negated view; pass out.resolve_neg()")
    if _overlap(x, y):
        raise ArgumentError("out overlaps x, which is still read while out is written; pass an array of its own")


_OVERLAP_WORK: Any = 1000  # NumPy takes any number of steps; its stubs know of two
_ARRAYS = {"numpy": "NumPy", "torch": "torch on the CPU"}


def _overlap(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays share memory; interleaved views that take long to tell apart count as sharing."""
    try:
        return np.shares_memory(a, b, max_work=_OVERLAP_WORK)
    except np.exceptions.TooHardError:
        return True


def _same_memory(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and a.strides == b.strides and a.ctypes.data == b.ctypes.data
