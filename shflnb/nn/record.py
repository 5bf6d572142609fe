"""Launch records: the checked matrix, and the device's own copy of it, that stand behind the tensors of one layer.

The operator takes plain tensors, because those are what `state_dict`, `torch.export` and the optimiser know. The
kernels want a `ShflBWMatrix`, whose arrays were checked once and whose kernel layout was uploaded once. This file
keeps the way from the former to the latter, one entry per storage of kept values:

* found by the address of the storage; a weak reference removes the entry when the storage dies, so an address that is
  used again never finds what belonged to another tensor, and a layer that moved away frees its device memory at once;
* good while `_version` of every tensor is the same: an optimiser step, `load_state_dict` or `copy_` under `no_grad`
  makes a new one. Writing through `.data` or through NumPy is invisible to torch: call `forget(values)` after that.
"""

from __future__ import annotations

import ctypes
import functools
import threading
import weakref
from typing import Any

import numpy as np
import torch

from ..arrays import BFLOAT16, DTYPES, host_array
from ..errors import CaptureError, DeviceError, DtypeError
from ..formats import ShflBWMatrix

__all__ = ["LaunchRecord", "forget", "launch_record", "record_count"]

_RECORDS: dict[tuple[Any, ...], LaunchRecord] = {}
_LOCK = threading.Lock()
_DTYPE_NAMES = {getattr(torch, name): name for name in DTYPES}


class LaunchRecord:
    """What is known of one set of tensors: its stamp, and a packed matrix for each compute dtype asked for."""

    __slots__ = ("alive", "by_dtype", "companions", "stamp")

    def __init__(self, stamp: tuple[Any, ...], companions: tuple[torch.Tensor, ...]) -> None:
        self.stamp = stamp
        # Held so that the addresses in the stamp cannot be given to other tensors while the record is in use.
        self.companions = companions
        self.by_dtype: dict[torch.dtype, Any] = {}
        self.alive: weakref.ref[Any] | None = None


def launch_record(
    values: torch.Tensor,
    indices: torch.Tensor,
    indptr: torch.Tensor,
    row_perm: torch.Tensor,
    k: int,
    tile_k: int,
    dtype: torch.dtype,
    *,
    make: bool = True,
) -> Any:
    """The packed matrix behind four tensors, its values in `dtype`: 2 to 3 us when warm.

    Parameters
    ----------
    values : tensor (kept columns, v)
    indices : int32 tensor (kept columns,)
    indptr : int64 tensor (groups + 1,)
    row_perm : int32 tensor (m,)
        As in `shflnb.ShflBWMatrix`, all on one device.
    k, tile_k : int
    dtype : torch.dtype
        Dtype of the activation. Values of another dtype (float32 weights under autocast) are rounded once and kept.
    make : bool
        Whether to make the record where there is none.

    Returns
    -------
    ShflBWMatrix, or the device's record that stands for one; None where `make` is False and there is none

    Raises
    ------
    FormatError, ShapeError, DtypeError
        The tensors break an invariant of the format (checked when the record is made, before a kernel sees an index).
    CaptureError
        The record would have to be made while a CUDA graph is captured.
    """
    record = _RECORDS.get(_key(values, k, tile_k))
    if record is not None and record.stamp == _stamp(values, indices, indptr, row_perm):
        packed = record.by_dtype.get(dtype)
        if packed is not None:
            return packed
    return _make((values, indices, indptr, row_perm), k, tile_k, dtype) if make else None


def _key(values: torch.Tensor, k: int, tile_k: int) -> tuple[Any, ...]:
    return (values.untyped_storage()._cdata, values.storage_offset(), values.shape, values.dtype, k, tile_k)


def _stamp(*tensors: torch.Tensor) -> tuple[int, ...]:
    values, indices, indptr, row_perm = tensors
    return (
        _version(values),
        indices.data_ptr(), _version(indices),
        indptr.data_ptr(), _version(indptr),
        row_perm.data_ptr(), _version(row_perm),
    )  # fmt: skip


def forget(values: torch.Tensor) -> None:
    """Drop what is kept for a layer's `values`; needed only after a write that torch cannot see (`.data`, NumPy)."""
    address = values.untyped_storage()._cdata
    with _LOCK:
        for key in [key for key in _RECORDS if key[0] == address]:
            del _RECORDS[key]


def record_count() -> int:
    """Number of records alive (for tests and for looking after memory)."""
    return len(_RECORDS)


def _version(t: torch.Tensor) -> int:
    # Tensors made under inference_mode have no version counter; they cannot be trained, only overwritten in that mode.
    return -1 if t.is_inference() else t._version


def _make(tensors: tuple[torch.Tensor, ...], k: int, tile_k: int, dtype: torch.dtype) -> Any:
    values, indices, indptr, row_perm = tensors
    if values.is_cuda and torch.cuda.is_current_stream_capturing():
        raise CaptureError(
            "a Shfl-BW layer was called for the first time (or the first time since its weights or dtype changed) "
            "while a CUDA graph is being captured; call the model once with the same input before the capture"
        )
    key, stamp = _key(values, k, tile_k), _stamp(*tensors)
    with _LOCK:
        record = _RECORDS.get(key)
        if record is None or record.stamp != stamp:
            record = LaunchRecord(stamp, (indices, indptr, row_perm))
            record.alive = weakref.ref(values.untyped_storage(), functools.partial(_drop, key))
        if dtype not in record.by_dtype:
            record.by_dtype[dtype] = _pack(values, indices, indptr, row_perm, k, tile_k, dtype)
        _RECORDS[key] = record
        return record.by_dtype[dtype]


def _drop(key: tuple[Any, ...], _: Any) -> None:
    # May run in the garbage collector, with _LOCK held by this very thread: one atomic dict operation, no lock.
    _RECORDS.pop(key, None)


def _pack(
    values: torch.Tensor,
    indices: torch.Tensor,
    indptr: torch.Tensor,
    row_perm: torch.Tensor,
    k: int,
    tile_k: int,
    dtype: torch.dtype,
) -> Any:
    """A `ShflBWMatrix` of the tensors (on the CPU a view of the values, from a device a copy on the host)."""
    for name, t in (("indices", indices), ("indptr", indptr), ("row_perm", row_perm)):
        if t.device != values.device:
            raise DeviceError(f"values is on {values.device}, {name} on {t.device}; move the whole layer with .to()")
    if dtype not in _DTYPE_NAMES:
        raise DtypeError(f"x is {dtype}; needed is one of {', '.join(DTYPES)}")
    values = values.detach()
    if values.dtype == dtype and not values.is_cuda and values.is_contiguous():
        kept = _borrowed(values)
    else:
        kept = np.ascontiguousarray(host_array(values.to(dtype), what="values"))
    return ShflBWMatrix(
        shape=(row_perm.shape[0], k),
        block=(values.shape[1], tile_k),
        indptr=_copied(indptr),
        indices=_copied(indices),
        values=kept,
        row_perm=_copied(row_perm),
    )


def _copied(t: torch.Tensor) -> np.ndarray:
    return np.array(host_array(t), order="C")


def _borrowed(t: torch.Tensor) -> np.ndarray:
    """The memory of a contiguous CPU tensor as an array that does NOT keep the tensor alive.

    `t.numpy()` would: the record would then keep the storage alive, and the storage the record, for ever. The record is
    only used while the caller holds the tensor, and dropped when the storage dies.
    """
    dtype = BFLOAT16 if t.dtype == torch.bfloat16 else DTYPES[_DTYPE_NAMES[t.dtype]]
    count = t.numel()
    if count == 0:
        return np.empty(tuple(t.shape), dtype=dtype)
    memory = (ctypes.c_char * (count * t.element_size())).from_address(t.data_ptr())
    return np.frombuffer(memory, dtype=dtype, count=count).reshape(tuple(t.shape))
