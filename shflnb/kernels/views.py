"""Device arrays as plain records: address, shape, strides, dtype name, device and current stream, whoever made them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..arrays import kind_of
from ..errors import DeviceError, DtypeError

__all__ = ["DeviceView", "current_stream", "device_view", "new_matrix", "torch_stream"]


@dataclass(frozen=True)
class DeviceView:
    """A strided array on a device. `strides` are in values; `owner` keeps the memory alive."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    device: int
    owner: Any


_TORCH_DTYPES: dict[Any, str] = {}


def _torch_view(x: Any) -> DeviceView:
    if not _TORCH_DTYPES:
        torch = sys.modules["torch"]
        _TORCH_DTYPES.update(
            {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32", torch.float64: "float64"}
        )
    dtype = _TORCH_DTYPES.get(x.dtype) or str(x.dtype)[6:]
    return DeviceView(x.data_ptr(), tuple(x.shape), x.stride(), dtype, x.get_device(), x)


def _interface_view(x: Any, device: int) -> DeviceView:
    interface = x.__cuda_array_interface__
    dtype = _TYPESTR.get(interface["typestr"], interface["typestr"])
    shape = tuple(interface["shape"])
    size = int(interface["typestr"][2:])
    strides = interface.get("strides")
    if strides is None:
        strides, step = [], size
        for extent in reversed(shape):
            strides.append(step)
            step *= max(1, extent)
        strides = tuple(reversed(strides))
    return DeviceView(int(interface["data"][0] or 0), shape, tuple(s // size for s in strides), dtype, device, x)


# torch has exported bfloat16 as if it were float16: what a type string alone says is trusted only for the arrays of
# other makers
_TYPESTR = {"<f2": "float16", "<f4": "float32", "<f8": "float64"}


def device_view(x: Any, *, what: str) -> DeviceView:
    """The record of a device array (torch, CuPy, Numba, or any `__cuda_array_interface__` or DLPack exporter).

    Raises `DtypeError` for an array that is not on a CUDA device.
    """
    if isinstance(x, DeviceView):
        return x
    kind = kind_of(x)
    if kind == "torch-cuda":
        return _torch_view(x)
    if kind == "cupy":
        return _interface_view(x, int(x.device.id))
    if kind == "numba":
        return _interface_view(x, _pointer_device(x))
    if kind == "device":
        if hasattr(x, "__dlpack__"):
            return _dlpack_view(x)
        return _interface_view(x, _pointer_device(x))
    raise DtypeError(
        f"{what} is a {type(x).__module__}.{type(x).__name__} that is not on a CUDA device; all arrays of a call must "
        "be on the device of x"
    )


def _pointer_device(x: Any) -> int:
    """The device that owns an interface array's memory."""
    from cuda.bindings import driver

    address = int(x.__cuda_array_interface__["data"][0] or 0)
    if not address:
        return 0
    attribute = driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
    error, ordinal = driver.cuPointerGetAttribute(attribute, address)
    if int(error):
        raise DeviceError(f"the address of a {type(x).__name__} is not device memory ({error.name})")
    return int(ordinal)


def _dlpack_view(x: Any) -> DeviceView:
    from cuda.core.utils import StridedMemoryView

    view = StridedMemoryView.from_dlpack(x, stream_ptr=-1)
    strides = view.strides
    if strides is None:
        strides, step = [], 1
        for extent in reversed(view.shape):
            strides.append(step)
            step *= max(1, extent)
        strides = tuple(reversed(strides))
    return DeviceView(int(view.ptr), tuple(view.shape), tuple(strides), str(view.dtype), int(view.device_id), (x, view))


_TORCH_STREAM: list[Callable[[int], int]] = []


def _find_torch_stream() -> list[Callable[[int], int]]:
    """torch's function from a device to its current raw stream, remembered."""
    torch = sys.modules["torch"]
    fast = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # 0.2 us; the public road makes an object, 1.5 us
    _TORCH_STREAM[:] = [fast or (lambda device: torch.cuda.current_stream(device).cuda_stream)]
    return _TORCH_STREAM


def torch_stream(device: int) -> int:
    """Raw handle of torch's current stream on a device."""
    return (_TORCH_STREAM or _find_torch_stream())[0](device)


def current_stream(view_owner: Any, device: int) -> int:
    """Raw handle of the stream the owner's framework works on now; the legacy default stream for all other arrays."""
    kind = kind_of(view_owner)
    if kind == "torch-cuda":
        return torch_stream(device)
    if kind == "cupy":
        return int(sys.modules["cupy"].cuda.get_current_stream(device).ptr)
    interface = getattr(view_owner, "__cuda_array_interface__", None)
    stream = interface.get("stream") if interface else None
    return 0 if stream in (None, 1) else int(stream)


def new_matrix(rows: int, cols: int, like: Any, dtype: str) -> Any:
    """An uninitialised (rows, cols) C-contiguous matrix of the same kind and on the same device as `like`."""
    kind = kind_of(like)
    if kind == "torch-cuda":
        return like.new_empty((rows, cols))
    if kind == "cupy":
        cupy = sys.modules["cupy"]
        with cupy.cuda.Device(like.device.id):
            return cupy.empty((rows, cols), dtype=like.dtype)
    if kind == "numba":
        from numba import cuda

        return cuda.device_array((rows, cols), dtype=like.dtype)
    make = getattr(like, "new_matrix", None)  # what the tuner measures with
    if make is not None:
        return make(rows, cols)
    raise DeviceError(
        f"shflnb cannot make an array like {type(like).__name__}; pass out= (and use torch or CuPy arrays where a "
        "layout has to be changed)"
    )
