"""The short road for repeated calls on torch tensors: what a call with these shapes and strides came to, looked up
once.

A warm `matmul` has 12 us of host time to spend (what torch.matmul costs); checking every argument again takes twice
that. A memo is kept under everything the checks looked at, except the addresses, whose alignment is checked here. Calls
with `out`, a residual, other frameworks' arrays or unusual strides take the long road in `spmm_device.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..formats.shflbw import ShflBWMatrix
from .launch import DeviceContext, LoadedKernel, device_context
from .skinny_plan import SkinnyRoad, launch_skinny
from .transpose_config import transpose_flags
from .views import torch_stream

__all__ = ["FewColumnsMemo", "LinearMemo", "LinearPart", "MatmulMemo", "memo_key", "quick_linear", "quick_matmul",
           "quick_transpose"]  # fmt: skip


@dataclass(frozen=True)
class MatmulMemo:
    """A feature-major product straight from x to a new result."""

    context: DeviceContext
    kernel: LoadedKernel
    launch_config: Any
    head: tuple[int, ...]
    n: int
    ldx: int
    out_shape: tuple[int, ...]
    flags: int


@dataclass(frozen=True)
class LinearPart:
    """Some of the tokens of a token-major product."""

    start: int
    n: int
    ld: int
    turn_in: Any
    turn_out: Any
    in_at_once: int
    out_at_once: int
    kernel: LoadedKernel
    launch_config: Any
    head: tuple[int, ...]


@dataclass(frozen=True)
class LinearMemo:
    """A token-major product: transpose, product, transpose, for each part; the first part is the largest."""

    context: DeviceContext
    turn: LoadedKernel
    parts: tuple[LinearPart, ...]
    k: int
    m: int
    token_stride: int
    turn_in_flags: int
    turn_out_flags: int
    out_shape: tuple[int, ...]
    flags: int


@dataclass(frozen=True)
class FewColumnsMemo:
    """A product with few columns, in either layout, to a new result."""

    road: SkinnyRoad
    out_shape: tuple[int, ...]


def memo_key(kind: str, x: Any, bias: Any, activation: str | None) -> tuple[Any, ...]:
    """What a memo depends on, for torch tensors."""
    about_bias = None if bias is None else (bias.dtype, bias.shape, bias.stride(), bias.get_device())
    return ("memo", kind, x.dtype, x.shape, x.stride(), x.get_device(), activation, about_bias)


def quick_matmul(packed: ShflBWMatrix, x: Any, bias: Any, activation: str | None) -> Any:
    """The product by memo, or None when there is none."""
    memo: MatmulMemo | FewColumnsMemo | None = packed.launch_cache.get(memo_key("matmul", x, bias, activation))
    if memo is None:
        return None
    address = x.data_ptr()
    if address & 15:
        return None
    if isinstance(memo, FewColumnsMemo):
        return _quick_few(memo, x, address, bias)
    out = x.new_empty(memo.out_shape)
    memo.context.launch(
        torch_stream(memo.context.ordinal), memo.launch_config, memo.kernel, *memo.head, address, out.data_ptr(),
        0 if bias is None else bias.data_ptr(), 0, memo.n, memo.ldx, memo.n, 0, memo.flags,
    )  # fmt: skip
    return out


def _quick_few(memo: FewColumnsMemo, x: Any, address: int, bias: Any) -> Any:
    road = memo.road
    out = x.new_empty(memo.out_shape)
    turned, product = road.work_values
    first = x.new_empty(turned) if turned else None
    second = x.new_empty(product) if product else None
    work = 0 if first is None else first.data_ptr(), 0 if second is None else second.data_ptr()
    launch_skinny(road, torch_stream(road.context.ordinal), address, out.data_ptr(), work,
                  0 if bias is None else bias.data_ptr(), 0)  # fmt: skip
    return out


def quick_linear(packed: ShflBWMatrix, x: Any, bias: Any, activation: str | None) -> Any:
    """The token-major product by memo, or None when there is none."""
    memo: LinearMemo | FewColumnsMemo | None = packed.launch_cache.get(memo_key("linear", x, bias, activation))
    if memo is None:
        return None
    address = x.data_ptr()
    if address & 15:
        return None
    if isinstance(memo, FewColumnsMemo):
        return _quick_few(memo, x, address, bias)
    launch, stream, k, m = memo.context.launch, torch_stream(memo.context.ordinal), memo.k, memo.m
    turned = x.new_empty((k, memo.parts[0].ld))
    product = x.new_empty((m, memo.parts[0].ld))
    out = x.new_empty(memo.out_shape)
    turned_at, product_at, out_at = turned.data_ptr(), product.data_ptr(), out.data_ptr()
    bias_at = 0 if bias is None else bias.data_ptr()
    for part in memo.parts:
        n, ld = part.n, part.ld
        launch(stream, part.turn_in, memo.turn, address + 2 * part.start * memo.token_stride, memo.token_stride,
               turned_at, ld, n, k, part.in_at_once, memo.turn_in_flags)  # fmt: skip
        launch(stream, part.launch_config, part.kernel, *part.head, turned_at, product_at, bias_at, 0, n, ld, ld, 0,
               memo.flags)  # fmt: skip
        launch(stream, part.turn_out, memo.turn, product_at, ld, out_at + 2 * part.start * m, m, m, n,
               part.out_at_once, memo.turn_out_flags)  # fmt: skip
    return out


def quick_transpose(x: Any, is_result: bool, addend: Any) -> Any:
    """`x.T` (plus `addend`) of a torch matrix, or None where it takes the long road: the first time, or unusual."""
    if x.dim() != 2 or not x.is_contiguous() or x.data_ptr() & 15:
        return None
    (rows, cols), device, adds = x.shape, x.get_device(), ""
    if addend is not None:
        if (
            addend.shape != (cols, rows)
            or addend.dtype != x.dtype
            or addend.get_device() != device
            or not addend.is_contiguous()
            or addend.data_ptr() & 15
        ):
            return None
        adds = str(x.dtype)[6:]
    context = device_context(device)
    launch = context.transposes.get((rows, cols, adds))
    if launch is None:
        return None
    kernel, config, at_once = launch
    out = x.new_empty((cols, rows))
    flags = transpose_flags(cols % 8 == 0, rows % 8 == 0, is_result=is_result)
    context.launch(
        torch_stream(device), config, kernel, x.data_ptr(), cols, out.data_ptr(), rows, rows, cols, at_once, flags,
        *((addend.data_ptr(), rows) if adds else ()),
    )  # fmt: skip
    return out
