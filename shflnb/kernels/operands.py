"""Operands of a product on a device: their checks, and (address, rows, cols, row stride, column stride) of each."""

from __future__ import annotations

import sys
from typing import Any

from ..errors import ArgumentError, DeviceError, DtypeError, ShapeError
from ..formats.shflbw import ShflBWMatrix
from .views import DeviceView, device_view

__all__ = ["ALIGNED", "HAS_RESIDUAL", "check_activation", "check_bias", "check_operand", "checked", "checked_out",
           "is_row_major", "needs_gradient", "overlap", "refuse_gradient", "rows_of", "turned"]  # fmt: skip

ALIGNED, HAS_BIAS, BIAS_F32, HAS_RESIDUAL = 1, 2, 4, 8  # bits of the kernels' flags, as in epilogue.py
ACTIVATIONS = (None, "relu", "gelu", "silu")


def check_operand(view: DeviceView, packed: ShflBWMatrix, what: str, device: int) -> None:
    """Refuse an operand of another dtype than packed or on another device than x."""
    if view.dtype != packed.dtype:
        raise DtypeError(
            f"{what} is {view.dtype}, packed is {packed.dtype}; convert one of them (packed.astype({view.dtype!r}))"
        )
    if view.device != device:
        raise DeviceError(
            f"{what} is on device {view.device}, x on device {device}; all arrays of a call share one device"
        )


def check_bias(bias: Any, packed: ShflBWMatrix, device: int) -> tuple[int, int]:
    """Address and flags of a bias."""
    if bias is None:
        return 0, 0
    view = device_view(bias, what="bias")
    if view.shape != (packed.shape[0],):
        raise ShapeError(f"bias has shape {view.shape}; expected ({packed.shape[0]},), one value a row of W")
    if view.dtype not in ("float32", packed.dtype):
        raise DtypeError(f"bias is {view.dtype}; expected {packed.dtype} or float32")
    if view.device != device:
        raise DeviceError(
            f"bias is on device {view.device}, x on device {device}; all arrays of a call share one device"
        )
    if packed.shape[0] > 1 and view.strides[0] != 1:
        raise ArgumentError(f"bias has stride {view.strides[0]}; pass a contiguous vector")
    return view.address, HAS_BIAS | (BIAS_F32 if view.dtype == "float32" else 0)


def rows_of(view: DeviceView) -> tuple[int, int, int, int, int]:
    """(address, rows, cols, row stride, column stride) of a vector (one column) or matrix."""
    if len(view.shape) == 1:
        return view.address, view.shape[0], 1, view.strides[0], 1
    return view.address, view.shape[0], view.shape[1], view.strides[0], view.strides[1]


def is_row_major(rows: int, cols: int, row_stride: int, col_stride: int) -> bool:
    """Whether columns are contiguous and rows do not overlap."""
    return (cols <= 1 or col_stride == 1) and (rows <= 1 or row_stride >= cols)


def overlap(a: tuple[int, int, int, int, int], b: tuple[int, int, int, int, int]) -> bool:
    """Whether two matrices of 16-bit values, as `rows_of` gives them, may share memory."""

    def span(t: tuple[int, int, int, int, int]) -> tuple[int, int]:
        return t[0], t[0] + 2 * ((t[1] - 1) * t[3] + (t[2] - 1) * t[4] + 1)

    if 0 in (a[1], a[2], b[1], b[2]):
        return False
    (a0, a1), (b0, b1) = span(a), span(b)
    if a0 >= b1 or b0 >= a1:
        return False
    pitch = 2 * a[3]
    if a[3] == b[3] and a[4] == b[4] == 1 and a[2] + b[2] <= a[3] and (a[0] - b[0]) % 2 == 0:
        # windows of rows of one matrix: they share memory only where their columns meet
        between = (b[0] - a[0]) % pitch
        return between < 2 * a[2] or pitch - between < 2 * b[2]
    return True


def check_activation(activation: str | None) -> None:
    """Refuse an activation that no kernel has."""
    if activation not in ACTIVATIONS:
        raise ArgumentError(f"activation is {activation!r}; expected one of {ACTIVATIONS}")


def turned(rows: Any) -> Any:
    """(address, features, tokens, feature stride, token stride) of a token-major `rows_of`; None for None."""
    return None if rows is None else (rows[0], rows[2], rows[1], rows[4], rows[3])


def needs_gradient(x: Any, bias: Any) -> bool:
    """Whether torch would record a gradient for x or bias now."""
    wanted = x.requires_grad or (bias is not None and getattr(bias, "requires_grad", False))
    return wanted and sys.modules["torch"].is_grad_enabled()


def refuse_gradient(**tensors: Any) -> None:
    """Refuse torch tensors whose gradient would silently be lost."""
    for name, t in tensors.items():
        if getattr(t, "requires_grad", False) and sys.modules["torch"].is_grad_enabled():
            raise DtypeError(
                f"{name} requires a gradient, and this product records none; use shflnb.nn.ShflLinear, or pass "
                f"{name}.detach()"
            )


def checked(a: Any, what: str, packed: ShflBWMatrix, x: DeviceView, shape: tuple[int, ...]) -> Any:
    """The (address, rows, cols, strides) of out or residual after its checks; None for None."""
    if a is None:
        return None
    view = device_view(a, what=what)
    check_operand(view, packed, what, x.device)
    if view.shape != shape:
        raise ShapeError(f"{what} has shape {view.shape}; expected {shape}")
    return rows_of(view)


def checked_out(out: Any, packed: ShflBWMatrix, x: DeviceView, shape: tuple[int, ...]) -> Any:
    """As `checked`, for memory that is written: its values must not share places."""
    rows = checked(out, "out", packed, x, shape)
    if rows is not None and ((rows[1] > 1 and rows[3] == 0) or (rows[2] > 1 and rows[4] == 0)):
        raise ArgumentError(f"out is a broadcast array (strides {rows[3:]}): its elements share memory; pass a copy")
    return rows
