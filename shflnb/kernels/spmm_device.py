"""The product on CUDA arrays: check, choose, launch. What `shflnb.ops` hands device arrays to.

Few columns go to `skinny_plan.py`, which reads and writes any strides. The rest of this text is about more of them:

`matmul` works feature-major: x (k, n) and out (m, n), n contiguous. `linear` turns token-major arrays with a transpose
kernel before and after, and passes feature-major views (strides (1, tokens)) through untouched. Arrays that are not
16-byte aligned along n are copied into an aligned workspace first: k * n values, from the caller's own allocator.
"""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np


from ..arrays import kind_of
from ..errors import ArgumentError, DeviceError, DtypeError, ShapeError
from ..formats.layout import KernelLayout, to_mma, to_wgmma
from ..formats.shflbw import ShflBWMatrix
from .config import Config, Problem, ceil_div
from .launch import DeviceContext, DeviceMemory, KernelSpec, LoadedKernel, device_context
from .memo import FewColumnsMemo, LinearMemo, MatmulMemo, memo_key, quick_linear, quick_matmul
from .queue import tile_queue
from .remembered import load as remembered_entries
from .select import Choice, choose, has_few_columns, sweep_of
from .skinny_plan import out_flags, run_skinny, x_flags
from .views import DeviceView, current_stream, device_view, new_matrix

__all__ = ["copy_spec", "device_linear", "device_matmul", "kernel_spec", "plan_for", "problem_of", "transpose_spec"]

PLANS_KEPT = 1024  # launch records a packed matrix keeps; a model whose batch changes at every call stays bounded
ALIGNED, HAS_BIAS, BIAS_F32, HAS_RESIDUAL = 1, 2, 4, 8  # bits of the kernels' flags, as in epilogue.py
NO_ROW = np.uint32(0xFFFFFFFF)
ACTIVATIONS = (None, "relu", "gelu", "silu")
_BUILD_LOCK = threading.RLock()


@dataclass(frozen=True)
class DeviceWeights:
    """A packed matrix in a kernel's layout on a device."""

    memory: DeviceMemory
    """Values, columns and rows, as the kernels take them."""
    first: np.ndarray
    counts: np.ndarray
    """First k tile and number of k tiles of each group."""


@dataclass(frozen=True)
class Plan:
    """Everything about a launch that does not change from call to call."""

    choice: Choice
    kernel: LoadedKernel
    launch_config: Any
    weights: DeviceWeights
    queue: DeviceMemory
    head: tuple[int, ...]
    """Addresses of values, columns, queue and rows."""


def kernel_spec(config: Config) -> KernelSpec:
    """How to build the kernel of a config."""

    def make() -> Any:
        if config.kernel == "sm90":
            from .spmm_sm90 import make_spmm_sm90

            return make_spmm_sm90(config)
        from .spmm_sm80 import make_spmm_sm80

        return make_spmm_sm80(config)

    return KernelSpec(
        repr(config), config.name, config.kernel, make, 13, config.threads, config.smem_bytes, config.blocks_per_sm
    )


def transpose_spec(is_chained: bool) -> KernelSpec:
    from .transpose import TRANSPOSE_THREADS, make_transpose

    name = "shflnb_transpose_chained" if is_chained else "shflnb_transpose"
    return KernelSpec(name, name, "transpose", lambda: make_transpose(is_chained), 8, TRANSPOSE_THREADS)


def copy_spec() -> KernelSpec:
    from .transpose import COPY_THREADS, make_copy_strided

    return KernelSpec("copy_strided", "shflnb_copy_strided", "copy", make_copy_strided, 8, COPY_THREADS)


def problem_of(packed: ShflBWMatrix, n: int) -> Problem:
    """The product of a packed matrix with n columns, as the selection sees it."""
    m, k = packed.shape
    lengths = np.diff(packed.indptr)
    return Problem(m, k, n, packed.block[0], packed.dtype, int(packed.indptr[-1]), int(lengths.max(initial=0)))


def _kernel_arrays(layout: KernelLayout, packed: ShflBWMatrix) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """([values, columns, rows], first k tile, k tiles) of a layout; an empty group gets a tile of padding."""
    counts = np.diff(layout.tile_ptr).astype(np.int64)
    first = layout.tile_ptr[:-1].astype(np.int64)
    values, columns = layout.values, layout.columns
    if (counts == 0).any():
        first = np.where(counts == 0, layout.tiles, first)
        counts = np.maximum(counts, 1)
        values = np.concatenate([values, np.zeros(layout.tile_k * layout.v, values.dtype)])
        columns = np.concatenate([columns, np.full(layout.tile_k, -1, np.int32)])
    rows = np.full(len(counts) * layout.v, NO_ROW, np.uint32)
    rows[: packed.shape[0]] = packed.row_perm
    return [values.view(np.uint16), columns, rows], first, counts


def _weights(packed: ShflBWMatrix, context: DeviceContext, kernel: str, tile_k: int, stream: int) -> DeviceWeights:
    key = ("weights", context.ordinal, kernel, tile_k)
    found = packed.launch_cache.get(key)
    if found is None:
        context.refuse_capture(stream, "upload the packed weights")
        with _BUILD_LOCK:
            found = packed.launch_cache.get(key)
            if found is None:
                layout = (to_wgmma if kernel == "sm90" else to_mma)(packed, tile_k)
                arrays, first, counts = _kernel_arrays(layout, packed)
                with context.current():
                    found = packed.launch_cache[key] = DeviceWeights(DeviceMemory(context, arrays), first, counts)
    return found


def _queue(
    packed: ShflBWMatrix, context: DeviceContext, weights: DeviceWeights, shape: tuple[int, int, int], stream: int
) -> DeviceMemory:
    """The work queue for (column tiles, grid, sweep), shared by every n that has as many column tiles."""
    key = ("queue", id(weights), shape)
    found: DeviceMemory | None = packed.launch_cache.get(key)
    if found is None:
        context.refuse_capture(stream, "upload the work queue")
        with context.current():
            found = DeviceMemory(context, [tile_queue(weights.first, weights.counts, *shape)])
        packed.launch_cache[key] = found
    return found


def plan_for(
    packed: ShflBWMatrix, context: DeviceContext, n: int, epilogue: str, stream: int, config: Config | None = None
) -> Plan:
    """The launch record for n columns; built at the first call with this n, then found again.

    Raises `CaptureError` when it would have to compile or upload while `stream` is captured.
    """
    key = ("plan", context.ordinal, n, epilogue, config)
    plan: Plan | None = packed.launch_cache.get(key)
    if plan is None:
        problem = problem_of(packed, n)
        if config is None:
            remembered = {**remembered_entries(context.name), **packed.launch_cache.get("tuned", {})}
            choice = choose(problem, context.capability, context.sm_count, context.name, remembered)
        else:
            choice = choose(problem, context.capability, context.sm_count, only=[config])
        chosen = choice.config.with_epilogue(epilogue)
        kernel = context.kernel(kernel_spec(chosen), stream)
        weights = _weights(packed, context, chosen.kernel, chosen.tile_k, stream)
        n_tiles = ceil_div(n, chosen.tile_n)
        tiles = len(weights.counts) * n_tiles
        grid = min(context.sm_count * chosen.blocks_per_sm, tiles) if chosen.kernel == "sm90" else tiles
        memory = _queue(packed, context, weights, (n_tiles, grid, sweep_of(chosen, n_tiles)), stream)
        values, columns, rows = weights.memory.addresses
        launch_config = kernel.config(grid, is_chained=chosen.kernel == "sm90")
        plan = Plan(choice, kernel, launch_config, weights, memory, (values, columns, memory.addresses[0], rows))
        _keep(packed, key, plan)
    return plan


def _keep(packed: ShflBWMatrix, key: Any, record: Any) -> None:
    """Keep a plan or memo, after dropping all of them where they have become many.

    They are cheap to make again; weights and queues stay, since a captured graph may hold their addresses.
    """
    if len(packed.launch_cache) > PLANS_KEPT:
        for old in [k for k in packed.launch_cache if k[0] in ("plan", "memo")]:
            packed.launch_cache.pop(old, None)
    packed.launch_cache[key] = record


def _check_operand(view: DeviceView, packed: ShflBWMatrix, what: str, device: int) -> None:
    if view.dtype != packed.dtype:
        raise DtypeError(
            f"{what} is {view.dtype}, packed is {packed.dtype}; convert one of them (packed.astype({view.dtype!r}))"
        )
    if view.device != device:
        raise DeviceError(
            f"{what} is on device {view.device}, x on device {device}; all arrays of a call share one device"
        )


def _check_bias(bias: Any, packed: ShflBWMatrix, device: int) -> tuple[int, int]:
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


def _rows(view: DeviceView) -> tuple[int, int, int, int, int]:
    """(address, rows, cols, row stride, column stride) of a vector (one column) or matrix."""
    if len(view.shape) == 1:
        return view.address, view.shape[0], 1, view.strides[0], 1
    return view.address, view.shape[0], view.shape[1], view.strides[0], view.strides[1]


def _is_row_major(rows: int, cols: int, row_stride: int, col_stride: int) -> bool:
    return (cols <= 1 or col_stride == 1) and (rows <= 1 or row_stride >= cols)


def _overlap(a: tuple[int, int, int, int, int], b: tuple[int, int, int, int, int]) -> bool:
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


class _Call:
    """One call on one device and stream: launches kernels and keeps its workspaces alive until they are enqueued."""

    def __init__(self, packed: ShflBWMatrix, x: Any, view: DeviceView) -> None:
        self.packed, self.like, self.view = packed, x, view
        self.context = device_context(view.device)
        self.stream_handle = current_stream(x, view.device)

    def workspace(self, rows: int, cols: int) -> tuple[int, int, Any]:
        """(address, leading dimension, owner) of an uninitialised feature-major matrix with aligned rows."""
        ld = max(8, ceil_div(cols, 8) * 8)
        owner = new_matrix(max(1, rows), ld, self.like, self.packed.dtype)
        return device_view(owner, what="workspace").address, ld, owner

    def copy(self, src: tuple[int, int, int], dst: tuple[int, int, int], rows: int, cols: int) -> None:
        """dst[r, c] = src[r, c]; (address, row stride, column stride) each."""
        if rows == 0 or cols == 0:
            return
        kernel = self.context.kernel(copy_spec(), self.stream_handle)
        grid = (ceil_div(cols, kernel.spec.threads), min(rows, 65535), 1)
        self.context.launch(self.stream_handle, kernel.config(grid), kernel, *src, *dst, rows, cols)

    def transpose(self, src: int, lds: int, dst: int, ldd: int, rows: int, cols: int, is_result: bool = False) -> None:
        """dst[c, r] = src[r, c]; leading dimensions in values. Tokens are the rows of src, of a result its columns."""
        if rows == 0 or cols == 0:
            return
        is_chained = self.context.has_chaining
        kernel = self.context.kernel(transpose_spec(is_chained), self.stream_handle)
        flags = (src % 16 == 0 and lds % 8 == 0) | (dst % 16 == 0 and ldd % 8 == 0) << 1 | is_result << 2
        fast = ceil_div(rows if is_result else cols, 64)  # the other side holds the tokens
        if is_result:
            flags |= 8
        blocks = ceil_div(rows, 64) * ceil_div(cols, 64)
        grid = kernel.config(blocks, is_chained=is_chained)
        self.context.launch(self.stream_handle, grid, kernel, src, lds, dst, ldd, rows, cols, fast, int(flags))

    def plan(
        self, n: int, activation: str | None, bias: tuple[int, int], residual: tuple[int, int], config: Config | None
    ) -> Plan:
        """The launch record for these operands."""
        plain = activation is None and not bias[0] and not residual[0]
        epilogue = "plain" if plain else activation or "identity"
        return plan_for(self.packed, self.context, n, epilogue, self.stream_handle, config)

    def product(self, x: int, ldx: int, out: int, ldo: int, n: int, bias: tuple[int, int], residual: tuple[int, int],
                activation: str | None, config: Config | None) -> None:  # fmt: skip
        """out (m, n) = f(W x + bias) + residual on aligned feature-major x; (address, leading dimension or flags) pairs."""
        plan = self.plan(n, activation, bias, residual, config)
        flags = bias[1]
        if residual[0]:
            flags |= HAS_RESIDUAL
        if (out | residual[0]) % 16 == 0 and (ldo | residual[1]) % 8 == 0:
            flags |= ALIGNED
        self.context.launch(self.stream_handle, plan.launch_config, plan.kernel, *plan.head, x, out, bias[0], residual[0], n, ldx,
                            ldo, residual[1], flags)  # fmt: skip

    def aligned_x(self, rows: tuple[int, int, int, int, int]) -> tuple[int, int, Any]:
        """Address and leading dimension of x with 16-byte aligned rows: x itself, or a copy."""
        address, k, n, row_stride, col_stride = rows
        if k <= 1:
            row_stride = ceil_div(max(row_stride, n, 1), 8) * 8
        if (n <= 1 or col_stride == 1) and address % 16 == 0 and row_stride % 8 == 0 and n <= row_stride < 2**31:
            return address, row_stride, None
        target, ld, owner = self.workspace(k, n)
        self.copy((address, rows[3], col_stride), (target, ld, 1), k, n)
        return target, ld, owner


def _activation(activation: str | None) -> None:
    if activation not in ACTIVATIONS:
        raise ArgumentError(f"activation is {activation!r}; expected one of {ACTIVATIONS}")


def device_matmul(
    packed: ShflBWMatrix,
    x: Any,
    *,
    bias: Any = None,
    activation: str | None = None,
    residual: Any = None,
    out: Any = None,
    config: Config | None = None,
) -> Any:
    """out (m, n) = activation(W @ x + bias[:, None]) + residual on the device and current stream of x (k, n) or (k,).

    float16 and bfloat16, float32 accumulation. Workspace: none for aligned arrays with contiguous columns.
    """
    is_torch = kind_of(x) == "torch-cuda"
    quick = is_torch and residual is None and out is None and config is None
    if quick and not _needs_gradient(x, bias):
        done = quick_matmul(packed, x, bias, activation)
        if done is not None:
            return done
    _refuse_gradient(x=x, bias=bias, residual=residual)
    view = device_view(x, what="x")
    m, k = packed.shape
    if packed.dtype not in ("float16", "bfloat16"):
        raise DtypeError(
            f"packed is {packed.dtype}; the GPU kernels take float16 and bfloat16 (packed.astype('float16'))"
        )
    _check_operand(view, packed, "x", view.device)
    if len(view.shape) not in (1, 2):
        raise ShapeError(f"x has shape {view.shape}; expected ({k}, n) or ({k},)")
    rows = _rows(view)
    if rows[1] != k:
        raise ShapeError(f"x has {rows[1]} rows; packed needs k = {k}")
    _activation(activation)
    n = rows[2]
    bias_at = _check_bias(bias, packed, view.device)
    out_shape = (m,) if len(view.shape) == 1 else (m, n)
    res_rows = _checked(residual, "residual", packed, view, out_shape)
    if out is None:
        out = new_matrix(m, n, x, packed.dtype)
        result = out if len(view.shape) == 2 else out.reshape(m)
        out_rows = _rows(device_view(out, what="out"))
    else:
        result = out
        checked = _checked_out(out, packed, view, out_shape)
        if _overlap(checked, rows) or (res_rows is not None and _overlap(checked, res_rows) and checked != res_rows):
            raise ArgumentError("out overlaps x or residual in memory; pass an array of its own")
        out_rows = checked
    if m == 0 or n == 0:
        return result
    call = _Call(packed, x, view)
    if config is None and has_few_columns(n):
        few = _run_few(call, rows, out_rows, n, bias_at, res_rows, activation, out_shape)
        if quick:
            _keep(packed, memo_key("matmul", x, bias, activation), few)
        return result
    keep_x, ldx = _run(call, rows, out_rows, n, bias_at, res_rows, activation, config)
    if quick and keep_x is None:
        plan = call.plan(n, activation, bias_at, (0, 0), None)
        flags = bias_at[1] | (ALIGNED if n % 8 == 0 else 0)  # torch's own allocations start at 512-byte boundaries
        memo = MatmulMemo(call.context, plan.kernel, plan.launch_config, plan.head, n, ldx, out_shape, flags)
        packed.launch_cache[memo_key("matmul", x, bias, activation)] = memo
    return result


def _run_few(call: _Call, x: Any, out: Any, n: int, bias: tuple[int, int], residual: Any, activation: str | None,
             out_shape: tuple[int, ...]) -> FewColumnsMemo:  # fmt: skip
    """The product with few columns between checked operands, (address, features, tokens, feature stride, token stride) each.

    The memo is for an x and a result of these strides at aligned addresses, without residual.
    """
    k = call.packed.shape[1]
    added = (0, 0, 0) if residual is None else (residual[0], residual[4], residual[3])
    plan = run_skinny(call, x[0], x[4], x[3], n, out[0], out[4], out[3], bias, added, activation)
    flags = bias[1] | x_flags(0, x[4], x[3], n) | out_flags(0, out[4], out[3])
    strides = (x[4], x[3], out[4], out[3], 0, 0, n | flags << 16 | k << 32, *plan.tail)
    return FewColumnsMemo(call.context, plan.kernels, plan.head, strides, plan.work_bytes // 2, out_shape)


def _turned(rows: Any) -> Any:
    """(address, features, tokens, feature stride, token stride) of a token-major `_rows`; None for None."""
    return None if rows is None else (rows[0], rows[2], rows[1], rows[4], rows[3])


def _needs_gradient(x: Any, bias: Any) -> bool:
    """Whether torch would record a gradient for x or bias now."""
    wanted = x.requires_grad or (bias is not None and getattr(bias, "requires_grad", False))
    return wanted and sys.modules["torch"].is_grad_enabled()


def _refuse_gradient(**tensors: Any) -> None:
    """Refuse torch tensors whose gradient would silently be lost."""
    for name, t in tensors.items():
        if getattr(t, "requires_grad", False) and sys.modules["torch"].is_grad_enabled():
            raise DtypeError(
                f"{name} requires a gradient, and this product records none; use shflnb.nn.ShflLinear, or pass {name}.detach()"
            )


def _checked(a: Any, what: str, packed: ShflBWMatrix, x: DeviceView, shape: tuple[int, ...]) -> Any:
    """The (address, rows, cols, strides) of out or residual after its checks; None for None."""
    if a is None:
        return None
    view = device_view(a, what=what)
    _check_operand(view, packed, what, x.device)
    if view.shape != shape:
        raise ShapeError(f"{what} has shape {view.shape}; expected {shape}")
    return _rows(view)


def _checked_out(out: Any, packed: ShflBWMatrix, x: DeviceView, shape: tuple[int, ...]) -> Any:
    """As `_checked`, for memory that is written: its values must not share places."""
    rows = _checked(out, "out", packed, x, shape)
    if rows is not None and ((rows[1] > 1 and rows[3] == 0) or (rows[2] > 1 and rows[4] == 0)):
        raise ArgumentError(f"out is a broadcast array (strides {rows[3:]}): its elements share memory; pass a copy")
    return rows


def _run(call: _Call, rows: Any, out_rows: Any, n: int, bias: tuple[int, int], res_rows: Any, activation: str | None,
         config: Config | None) -> tuple[Any, int]:  # fmt: skip
    """The product between checked feature-major operands; misaligned or strided ones go through workspaces.

    Returns the copy of x that was needed, or None, and the leading dimension of x.
    """
    m = call.packed.shape[0]
    x_address, ldx, keep_x = call.aligned_x(rows)
    residual, keep_r = (0, 0), None
    if res_rows is not None:
        if _is_row_major(m, n, res_rows[3], res_rows[4]):
            residual = (res_rows[0], res_rows[3] if m > 1 else max(8, ceil_div(n, 8) * 8))
        else:
            target, ld, keep_r = call.workspace(m, n)
            call.copy((res_rows[0], res_rows[3], res_rows[4]), (target, ld, 1), m, n)
            residual = (target, ld)
    if _is_row_major(m, n, out_rows[3], out_rows[4]):
        ldo = out_rows[3] if m > 1 else max(8, ceil_div(n, 8) * 8)
        call.product(x_address, ldx, out_rows[0], ldo, n, bias, residual, activation, config)
    else:
        target, ld, keep_o = call.workspace(m, n)
        call.product(x_address, ldx, target, ld, n, bias, residual, activation, config)
        call.copy((target, ld, 1), (out_rows[0], out_rows[3], out_rows[4]), m, n)
        del keep_o
    del keep_r
    return keep_x, ldx


def device_linear(
    x: Any,
    packed: ShflBWMatrix,
    bias: Any = None,
    *,
    activation: str | None = None,
    residual: Any = None,
    out: Any = None,
    layout: str = "token",
    config: Config | None = None,
) -> Any:
    """activation(x @ W.T + bias) + residual, (..., k) -> (..., m); `layout="feature"` returns a view with strides (1, tokens).

    Token-major x is turned by a transpose kernel (a workspace of tokens * k values), and so is a token-major result;
    x whose tokens are contiguous (strides (1, tokens)) is used as it is.
    """
    if layout not in ("token", "feature"):
        raise ArgumentError(f"layout is {layout!r}; expected 'token' or 'feature'")
    quick = kind_of(x) == "torch-cuda" and residual is None and out is None and config is None and layout == "token"
    if quick and not _needs_gradient(x, bias):
        done = quick_linear(packed, x, bias, activation)
        if done is not None:
            return done
    _refuse_gradient(x=x, bias=bias, residual=residual)
    m, k = packed.shape
    shape = tuple(x.shape)
    if not shape or shape[-1] != k:
        raise ShapeError(f"x has shape {shape}; expected (..., {k}), the last dimension is packed's k")
    lead = shape[:-1]
    flat = x if len(shape) == 2 else x.reshape(-1, k)
    view = device_view(flat, what="x")
    if packed.dtype not in ("float16", "bfloat16"):
        raise DtypeError(
            f"packed is {packed.dtype}; the GPU kernels take float16 and bfloat16 (packed.astype('float16'))"
        )
    _check_operand(view, packed, "x", view.device)
    _activation(activation)
    n = view.shape[0]
    bias_at = _check_bias(bias, packed, view.device)
    res_flat = None if residual is None else residual.reshape(-1, m)
    res = _checked(res_flat, "residual", packed, view, (n, m))
    out_flat = None if out is None else (out if len(shape) == 2 else out.reshape(-1, m))
    if out is not None:
        if tuple(out.shape) != (*lead, m):
            raise ShapeError(f"out has shape {tuple(out.shape)}; expected {(*lead, m)}")
        if device_view(out_flat, what="out").address != device_view(out, what="out").address:
            raise ArgumentError("out cannot be flattened to (tokens, m) without a copy; pass a contiguous array")
    out_at = _checked_out(out_flat, packed, view, (n, m))
    if out_at is not None and (
        _overlap(out_at, _rows(view)) or (res is not None and out_at != res and _overlap(out_at, res))
    ):
        raise ArgumentError("out overlaps x or residual in memory; pass an array of its own")
    call = _Call(packed, flat, view)
    if out_flat is None:
        if layout == "feature":
            ld = n if n % 8 == 0 else ceil_div(n, 8) * 8
            out_flat = new_matrix(m, max(ld, 1), flat, packed.dtype)[:, :n].T
        else:
            out_flat = new_matrix(n, m, flat, packed.dtype)
        out_at = _rows(device_view(out_flat, what="out"))
    if m and n and config is None and has_few_columns(n):
        few = _run_few(call, _turned(_rows(view)), _turned(out_at), n, bias_at, _turned(res), activation, (*lead, m))
        if quick and (len(shape) == 2 or x.is_contiguous()):
            _keep(packed, memo_key("linear", x, bias, activation), few)
    elif m and n:
        _run_linear(call, view, n, out_at, bias_at, res, activation, config)
        if quick and x.is_contiguous() and min(m, n, k) > 1:
            packed.launch_cache[memo_key("linear", x, bias, activation)] = _linear_memo(
                call, n, (*lead, m), bias_at, activation
            )
    if out is not None:
        return out
    return out_flat if len(shape) == 2 else out_flat.reshape(*lead, m)


def _linear_memo(
    call: _Call, n: int, out_shape: tuple[int, ...], bias: tuple[int, int], activation: str | None
) -> LinearMemo:
    """The memo of a token-major product on a contiguous, aligned x."""
    m, k = call.packed.shape
    is_chained = call.context.has_chaining
    turn = call.context.kernel(transpose_spec(is_chained), call.stream_handle)
    turn_in = turn.config(ceil_div(k, 64) * ceil_div(n, 64), is_chained=is_chained)
    turn_out = turn.config(ceil_div(n, 64) * ceil_div(m, 64), is_chained=is_chained)
    plan = call.plan(n, activation, bias, (0, 0), None)
    ld = ceil_div(n, 8) * 8
    return LinearMemo(
        call.context, turn, turn_in, turn_out,
        plan.kernel, plan.launch_config, plan.head, n, ld, k, m, k, ceil_div(k, 64), ceil_div(m, 64), (k % 8 == 0) | 2, 1 | (m % 8 == 0) << 1 | 12, out_shape,
        bias[1] | ALIGNED,
    )  # fmt: skip


def _run_linear(call: _Call, view: DeviceView, n: int, out_at: Any, bias: tuple[int, int], res: Any, activation: str | None,
                config: Config | None) -> None:  # fmt: skip
    m, k = call.packed.shape
    address, _, _, token_stride, feature_stride = _rows(view)
    keep = []
    if token_stride == 1 or n == 1:
        x_rows = (address, k, n, feature_stride, 1)
    elif feature_stride == 1 and k > 1:
        target, ld, owner = call.workspace(k, n)
        keep.append(owner)
        call.transpose(address, token_stride, target, ld, n, k)
        x_rows = (target, k, n, ld, 1)
    else:
        x_rows = (address, k, n, feature_stride, token_stride)
    res_rows = None if res is None else (res[0], m, n, res[4], res[3])
    if res_rows is not None and not _is_row_major(m, n, res_rows[3], res_rows[4]) and res[4] == 1:
        target, ld, owner = call.workspace(m, n)
        keep.append(owner)
        call.transpose(res[0], res[3], target, ld, n, m)
        res_rows = (target, m, n, ld, 1)
    out_rows = (out_at[0], m, n, out_at[4], out_at[3])
    if out_at[4] == 1 and m > 1 and n > 1:  # token-major out: the product into a workspace, then a transpose
        target, ld, owner = call.workspace(m, n)
        keep.append(owner)
        _run(call, x_rows, (target, m, n, ld, 1), n, bias, res_rows, activation, config)
        call.transpose(target, ld, out_at[0], out_at[3], m, n, is_result=True)
    else:
        _run(call, x_rows, out_rows, n, bias, res_rows, activation, config)
    del keep


def device_transpose(x: Any, *, is_result: bool = False) -> Any:
    """`x.T` of a (rows, cols) matrix of 16-bit values, as a new C-contiguous (cols, rows) array of the kind of x.

    The tokens are the rows of x; with `is_result` they are its columns (a feature-major result becomes token-major). For
    layers that share one transpose of their common input (`shflnb.nn`).
    """
    view = device_view(x, what="x")
    if (
        view.dtype not in ("float16", "bfloat16")
        or len(view.shape) != 2
        or (view.shape[1] > 1 and view.strides[1] != 1)
    ):
        raise DtypeError(
            f"x is {view.dtype} of shape {view.shape}, strides {view.strides}; expected a 16-bit C-order matrix"
        )
    rows, cols = view.shape
    call = _Call(None, x, view)  # type: ignore[arg-type]  # no product is made
    out = new_matrix(cols, rows, x, view.dtype)
    call.transpose(view.address, view.strides[0], device_view(out, what="out").address, rows, rows, cols, is_result)
    return out


matmul, linear = device_matmul, device_linear
