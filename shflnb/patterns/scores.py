"""What a weight is worth: the score matrix that every search maximises."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from ..arrays import dtype_of, host_array, kind_of
from ..errors import ArgumentError, DtypeError, ShapeError
from .backend import backend_of

__all__ = ["SCORES", "input_norm", "score_matrix"]

SCORES = ("magnitude", "squared", "activation", "gradient")


def input_norm(inputs: Any) -> np.ndarray:
    """Euclidean norm of each input feature over calibration data.

    Parameters
    ----------
    inputs : array (..., k)
        Activations that go into the layer, features last (NumPy or torch, any float dtype).

    Returns
    -------
    float32 array (k,)
        `np.sqrt((inputs ** 2).sum(over all but the last axis))`.

    Examples
    --------
    >>> import numpy as np
    >>> input_norm(np.array([[3.0, 0.0], [4.0, 1.0]]))
    array([5., 1.], dtype=float32)
    """
    x = host_array(inputs, what="inputs")
    if x.ndim < 2:
        raise ShapeError(f"inputs have shape {tuple(x.shape)}; calibration data is (samples, k), a vector is norm=")
    flat = x.reshape(-1, x.shape[-1])
    total = np.zeros(flat.shape[1], dtype=np.float64)
    # In pieces, so that calibration data of any size needs only a few megabytes more.
    rows = max(1, (1 << 22) // max(1, flat.shape[1]))
    for start in range(0, flat.shape[0], rows):
        piece = flat[start : start + rows].astype(np.float64)
        total += (piece * piece).sum(0)
    return np.sqrt(total).astype(np.float32)


def score_matrix(
    w: Any,
    score: str | Callable[[Any], Any] | Any = "magnitude",
    *,
    inputs: Any = None,
    norm: Any = None,
    grad: Any = None,
) -> Any:
    """The score of every weight, float32 (m, k), C-contiguous, not negative.

    Parameters
    ----------
    w : array (m, k)
        Weight; NumPy, or torch on the CPU or a CUDA device; float16, bfloat16, float32 or float64.
    score : str, callable or array
        "magnitude" |w|; "squared" w**2; "activation" |w| * norm[None, :]; "gradient" |w * grad|; a callable that is
        given `w` and returns an array (m, k); or that array itself.
    inputs : array (..., k), optional
        Calibration data for "activation"; see `input_norm`.
    norm : array (k,), optional
        Norm of each input feature, instead of `inputs`.
    grad : array (m, k), optional
        Gradient of the loss for "gradient".

    Returns
    -------
    NumPy array, or a CUDA torch tensor for a CUDA torch `w`.

    Raises
    ------
    ArgumentError
        An unknown score, what a score needs is missing, or a value is NaN, infinite or negative (with its place).
    ShapeError, DtypeError
        An operand does not fit `w`.

    Examples
    --------
    >>> import numpy as np
    >>> score_matrix(np.array([[1.0, -2.0]]), "squared")
    array([[1., 4.]], dtype=float32)
    """
    base = _to_float32(w, "w")
    if base.ndim != 2:
        raise ShapeError(f"w has shape {tuple(base.shape)}; needed is (m, k); flatten filters to (f, r*s*c)")
    _refuse_non_finite(base, "w")
    if isinstance(score, str):
        out = _named_score(base, score, inputs=inputs, norm=norm, grad=grad)
    elif callable(score):
        out = _fitting(score(w), base, "the array that the score callable returned")
    else:
        out = _fitting(score, base, "score")
    if bool((out < 0).any()):
        raise ArgumentError("score has negative values; a score says what keeping a weight is worth: pass abs(score)")
    _refuse_non_finite(out, "score")
    return out if isinstance(score, str) else abs(out)


def _named_score(base: Any, score: str, *, inputs: Any, norm: Any, grad: Any) -> Any:
    if score == "magnitude":
        return abs(base)
    if score == "squared":
        return base * base
    if score == "activation":
        if norm is None and inputs is None:
            raise ArgumentError('score="activation" needs inputs= (calibration data) or norm= (a vector of length k)')
        vector = _to_float32(input_norm(inputs) if norm is None else norm, "norm")
        if tuple(vector.shape) != (base.shape[1],):
            raise ShapeError(f"norm has shape {tuple(vector.shape)}; w needs ({base.shape[1]},)")
        return abs(base) * _same_place(vector, base)[None, :]
    if score == "gradient":
        if grad is None:
            raise ArgumentError('score="gradient" needs grad= (an array shaped like w)')
        return abs(base * _fitting(grad, base, "grad"))
    raise ArgumentError(f"score is {score!r}; needed is one of {', '.join(SCORES)}, a callable or an array")


def _to_float32(x: Any, what: str) -> Any:
    if dtype_of(x) not in ("float16", "bfloat16", "float32", "float64"):
        raise DtypeError(f"{what} is {dtype_of(x)}; needed is float16, bfloat16, float32 or float64")
    if kind_of(x) == "torch-cuda":
        return x.detach().to(sys.modules["torch"].float32).contiguous()
    return np.ascontiguousarray(host_array(x, what=what), dtype=np.float32)


def _same_place(x: Any, like: Any) -> Any:
    """`x` where `like` is: on the host, or on the device of a CUDA tensor."""
    if isinstance(like, np.ndarray):
        return host_array(x)
    return x.to(like.device) if hasattr(x, "to") else sys.modules["torch"].from_numpy(x).to(like.device)


def _fitting(x: Any, base: Any, what: str) -> Any:
    out = _to_float32(x, what)
    if tuple(out.shape) != tuple(base.shape):
        raise ShapeError(f"{what} has shape {tuple(out.shape)}; w needs {tuple(base.shape)}")
    return _same_place(out, base)


def _refuse_non_finite(x: Any, what: str) -> None:
    # A sum in double precision is finite only if all terms are: one pass without a temporary, the slow look on failure.
    if np.isfinite(backend_of(x).total(x)):
        return
    host = host_array(x)
    bad = np.argwhere(~np.isfinite(host))
    if len(bad):
        i, j = (int(a) for a in bad[0])
        raise ArgumentError(f"{what}[{i}, {j}] is {host[i, j]} ({len(bad)} such values); needed are finite values")
