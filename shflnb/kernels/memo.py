"""The short road for repeated calls on torch tensors: what a call with these shapes and strides came to, looked up
once.

A warm `matmul` has 12 us of host time to spend (what torch.matmul costs); checking every argument again takes twice
that. A memo is kept under everything the checks looked at, except the addresses, whose alignment is checked here. Calls
with a residual, another `out` than `takes_result` wants, other frameworks' arrays or unusual strides take the long road
in `spmm_device.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..formats.shflbw import ShflBWMatrix
from .launch import DeviceContext, LoadedKernel, device_context
from .skinny_plan import SkinnyRoad, launch_skinny
from .transpose_config import transpose_flags
from .views import torch_stream

__all__ = ["KINDS", "FewColumnsMemo", "ProductMemo", "ProductPart", "memo_key", "quick_product", "quick_transpose",
           "takes_result"]  # fmt: skip

KINDS = {"token": "linear", "feature": "linear, feature-major"}
"""By the layout of a result of `linear`, what its memos are kept under; those of `matmul` under "matmul"."""


@dataclass(frozen=True)
class ProductPart:
    """What is launched for some of the tokens; without `turn_in` x is read as it is, without `turn_out` the product
    stores to the result itself.
    """

    start: int
    n: int
    ldx: int
    """Distance of the rows of feature-major x, of the caller's or of what it was turned to."""
    ldo: int
    turn_in: tuple[LoadedKernel, Any, int] | None
    """Kernel, its launch configuration and its `at_once`."""
    turn_out: tuple[LoadedKernel, Any, int] | None
    kernel: LoadedKernel
    launch_config: Any
    head: tuple[int, ...]


@dataclass(frozen=True)
class ProductMemo:
    """A product of many columns: for each part of the tokens a transpose, the product, a transpose."""

    context: DeviceContext
    parts: tuple[ProductPart, ...]
    k: int
    m: int
    turn_in_flags: int
    turn_out_flags: int
    flags: int
    out_shape: tuple[int, ...]
    out_stride: tuple[int, ...] | None
    """None: contiguous."""
    work_values: int
    """16-bit values of the workspace: x turned, and from `product_bytes` on the result before it is turned."""
    product_bytes: int


@dataclass(frozen=True)
class FewColumnsMemo:
    """A product with few columns, in either layout, to a new result."""

    road: SkinnyRoad
    out_shape: tuple[int, ...]
    out_stride: tuple[int, ...] | None


def memo_key(kind: str, x: Any, bias: Any, activation: str | None) -> tuple[Any, ...]:
    """What a memo depends on, for torch tensors."""
    about_bias = None if bias is None else (bias.dtype, bias.shape, bias.stride(), bias.get_device())
    return ("memo", kind, x.dtype, x.shape, x.stride(), x.get_device(), activation, about_bias)


def takes_result(out: Any, x: Any, shape: tuple[int, ...]) -> bool:
    """Whether `out` can take the place of a new result: contiguous, aligned, of x's dtype and device, and not on x."""
    if getattr(out, "data_ptr", None) is None or out.dtype != x.dtype or out.shape != shape:
        return False
    at, start = out.data_ptr(), x.data_ptr()
    if at & 15 or out.get_device() != x.get_device() or not out.is_contiguous() or out.requires_grad:
        return False
    x_values = 1 + sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True))
    return bool(at + 2 * out.numel() <= start or start + 2 * x_values <= at)


def quick_product(packed: ShflBWMatrix, kind: str, x: Any, bias: Any, activation: str | None, out: Any = None) -> Any:
    """The product by memo, or None when there is none; `kind` is "matmul" or one of `KINDS`."""
    memo: ProductMemo | FewColumnsMemo | None = packed.launch_cache.get(memo_key(kind, x, bias, activation))
    if memo is None:
        return None
    address = x.data_ptr()
    if address & 15:
        return None
    shape, stride = memo.out_shape, memo.out_stride
    if out is None:
        out = x.new_empty(shape) if stride is None else x.new_empty_strided(shape, stride)
    elif stride is not None or not takes_result(out, x, shape):
        return None
    out_at, bias_at = out.data_ptr(), 0 if bias is None else bias.data_ptr()
    if isinstance(memo, FewColumnsMemo):
        _launch_few(memo.road, x, address, out_at, bias_at)
        return out
    context, k, m, turned_at, product_at = memo.context, memo.k, memo.m, address, out_at
    launch, stream = context.launch, torch_stream(context.ordinal)
    if memo.work_values:
        work = x.new_empty((memo.work_values,))
        turned_at = work.data_ptr()
        product_at = turned_at + memo.product_bytes
    for part in memo.parts:
        n, ldx, ldo, source, target = part.n, part.ldx, part.ldo, address, out_at
        if part.turn_in is not None:
            turn, config, at_once = part.turn_in
            launch(stream, config, turn, address + 2 * part.start * k, k, turned_at, ldx, n, k, at_once,
                   memo.turn_in_flags)  # fmt: skip
            source = turned_at
        if part.turn_out is not None:
            target = product_at
        launch(stream, part.launch_config, part.kernel, *part.head, source, target, bias_at, 0, n, ldx, ldo, 0,
               memo.flags)  # fmt: skip
        if part.turn_out is not None:
            turn, config, at_once = part.turn_out
            launch(stream, config, turn, target, ldo, out_at + 2 * part.start * m, m, m, n, at_once,
                   memo.turn_out_flags)  # fmt: skip
    return out


def _launch_few(road: SkinnyRoad, x: Any, address: int, out_at: int, bias_at: int) -> None:
    turned, product = road.work_values
    first = x.new_empty((turned,)) if turned else None
    second = x.new_empty((product,)) if product else None
    work = 0 if first is None else first.data_ptr(), 0 if second is None else second.data_ptr()
    launch_skinny(road, torch_stream(road.context.ordinal), address, out_at, work, bias_at, 0)


def quick_transpose(x: Any, rows: int, cols: int, out_shape: Any, is_result: bool, addend: Any = None) -> Any:
    """The turned (rows, cols) matrix that x is in memory, plus `addend`, or None where it takes the long road.

    x and the addend are contiguous memory of the same 16-bit dtype and device; the result, contiguous too, has another
    shape for as many values.
    """
    device, adds = x.get_device(), "" if addend is None else str(x.dtype)[6:]
    context = device_context(device)
    launch = context.transposes.get((rows, cols, adds))
    address, addend_at = x.data_ptr(), 0 if addend is None else addend.data_ptr()
    if launch is None or (address | addend_at) & 15:
        return None
    kernel, config, at_once = launch
    out = x.new_empty(out_shape)
    flags = transpose_flags(cols % 8 == 0, rows % 8 == 0, is_result=is_result)
    context.launch(torch_stream(device), config, kernel, address, cols, out.data_ptr(), rows, rows, cols, at_once,
                   flags, *((addend_at, rows) if adds else ()))  # fmt: skip
    return out
