"""What an array is, whoever made it: kind, dtype name, and zero-copy views between NumPy and torch on the CPU.

Frameworks are recognised by duck type and looked up in `sys.modules`, so nothing here imports torch or CuPy: an array
of a framework can only arrive here if the caller has imported that framework already.
"""

from __future__ import annotations

import sys
from typing import Any

import ml_dtypes
import numpy as np

from .errors import DtypeError

__all__ = ["BFLOAT16", "DTYPES", "dtype_of", "empty_like_kind", "host_array", "is_device_array", "kind_of", "like_kind"]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

DTYPES: dict[str, np.dtype] = {
    "float16": np.dtype(np.float16),
    "bfloat16": BFLOAT16,
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}
"""Value dtypes by the name used all over shflnb. bfloat16 is `ml_dtypes.bfloat16` on the NumPy side."""


def kind_of(x: Any) -> str:
    """Return "numpy", "torch" (CPU tensor), "torch-cuda", "cupy", "numba", "device" (other exporter) or "other".

    "device" stands for any object with `__cuda_array_interface__`, or with `__dlpack__` on a CUDA device.
    """
    if isinstance(x, np.ndarray):
        return "numpy"
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(x, torch.Tensor):
        if x.is_cuda:
            return "torch-cuda"
        return "torch" if x.device.type == "cpu" else "other"
    module = type(x).__module__.partition(".")[0]
    if module == "cupy":
        return "cupy"
    if module in ("numba", "numba_cuda") and hasattr(x, "__cuda_array_interface__"):
        return "numba"
    if hasattr(x, "__cuda_array_interface__"):
        return "device"
    if hasattr(x, "__dlpack_device__"):
        device_type = int(x.__dlpack_device__()[0])
        if device_type == 2:  # kDLCUDA
            return "device"
    return "other"


def is_device_array(x: Any) -> bool:
    """Whether `x` lives on a CUDA device."""
    return kind_of(x) in ("torch-cuda", "cupy", "numba", "device")


def dtype_of(x: Any) -> str:
    """The dtype's name ("float16", "bfloat16", "float32", "float64", or whatever the framework calls it)."""
    dtype = getattr(x, "dtype", None)
    if dtype is None:
        raise DtypeError(f"expected an array, got {type(x).__name__}; pass a NumPy array or a torch tensor")
    text = str(dtype)
    return text[6:] if text.startswith("torch.") else text


def host_array(x: Any, *, what: str = "array") -> np.ndarray:
    """View or copy `x` as a NumPy array on the host; torch bfloat16 becomes `ml_dtypes.bfloat16`.

    CPU inputs are viewed without a copy, whatever their strides; device inputs are copied to the host (synchronises).
    Raises `DtypeError` for what is no array.
    """
    kind = kind_of(x)
    if kind == "numpy":
        return x
    if kind in ("torch", "torch-cuda"):
        torch = sys.modules["torch"]
        if x.layout is not torch.strided:
            raise DtypeError(f"{what} is a sparse torch tensor ({x.layout}); call .to_dense() first")
        t = x.detach()
        if kind == "torch-cuda":
            t = t.cpu()
        if t.dtype == torch.bfloat16:
            return t.view(torch.int16).numpy().view(BFLOAT16)
        return t.resolve_conj().resolve_neg().numpy()
    if kind == "cupy":
        return x.get()
    if kind == "numba":
        return x.copy_to_host()
    if kind == "device":
        raise DtypeError(f"{what} is a device array of type {type(x).__name__}; copy it to the host or to torch first")
    raise DtypeError(f"{what} is a {type(x).__name__}; expected a NumPy array, a torch tensor or a SciPy sparse array")


def like_kind(a: np.ndarray, like: Any) -> Any:
    """Wrap the NumPy array `a` as the same kind of CPU array as `like` (NumPy or torch), without a copy."""
    if kind_of(like) == "torch":
        torch = sys.modules["torch"]
        if a.dtype == BFLOAT16:
            return torch.from_numpy(a.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(a)
    return a


def empty_like_kind(shape: tuple[int, ...], like: Any, dtype: str) -> Any:
    """An uninitialised C-contiguous array of `dtype` (a name) of the same kind, and on the same device, as `like`."""
    kind = kind_of(like)
    if kind in ("torch", "torch-cuda"):
        torch = sys.modules["torch"]
        return torch.empty(shape, dtype=getattr(torch, dtype), device=like.device)
    if kind == "cupy":
        cupy = sys.modules["cupy"]
        return cupy.empty(shape, dtype=DTYPES[dtype])
    return np.empty(shape, dtype=DTYPES[dtype])
