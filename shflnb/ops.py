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
    if kind not in _ON_HOST:
        return _device(kind, x).matmul(packed, x, bias=bias, activation=activation, residual=residual, out=out)
    a = _operand(packed, x, kind)
    m, k = packed.shape
    if a.ndim not in (1, 2) or a.shape[0] != k:
        hint = "; shflnb.linear takes (..., k)" if a.ndim > 2 or a.shape[-1:] == (k,) else ""
        raise ShapeError(f"x has shape {a.shape}; packed is {m} x {k} and needs (k, n) or (k,), k = {k}{hint}")
    shape = (m, *a.shape[1:])
    extras = _extras(packed, kind, x, a, shape, bias, activation, residual, out)
    result = empty_like_kind(shape, x, packed.dtype) if out is None else out
    y = extras.out if extras.out is not None else host_array(result)
    if a.ndim == 1:
        columns = functools.partial(np.expand_dims, axis=1)
        _spmm()(packed, columns(a), columns(y), extras, activation, columns)
    else:
        _run(packed, a, y, extras, activation)
    return result
