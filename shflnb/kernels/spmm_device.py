"""The product on CUDA arrays: check, choose, launch. What `shflnb.ops` hands device arrays to.

Few columns go to `skinny_plan.py`, which reads and writes any strides. The rest of this text is about more of them:

`matmul` works feature-major: x (k, n) and out (m, n), n contiguous. `linear` turns token-major arrays with a transpose
kernel before and after, and passes feature-major views (strides (1, tokens)) through untouched. Arrays that are not
16-byte aligned along n are copied into an aligned workspace first: k * n values, from the caller's own allocator.

What is checked is in `operands.py`, what is launched in `device_call.py`, what is kept between calls in `spmm_plan.py`.
"""

from __future__ import annotations

from typing import Any

from ..arrays import kind_of
from ..errors import ArgumentError, DtypeError, ShapeError
from ..formats.shflbw import ShflBWMatrix
from .config import Config, ceil_div
from .device_call import Call, run, run_few, run_linear
from .memo import KINDS, ProductMemo, ProductPart, memo_key, quick_product, takes_result
from .operands import (
    ALIGNED,
    check_activation,
    check_bias,
    check_operand,
    checked,
    checked_out,
    needs_gradient,
    overlap,
    refuse_gradient,
    rows_of,
    turned,
)
from .select import has_few_columns
from .skinny_config import SkinnyConfig
from .spmm_plan import keep, tokens_at_once, transpose_launch
from .transpose_config import transpose_flags
from .views import device_view, new_matrix

__all__ = ["device_linear", "device_matmul", "device_transpose", "linear", "matmul"]


def device_matmul(
    packed: ShflBWMatrix,
    x: Any,
    *,
    bias: Any = None,
    activation: str | None = None,
    residual: Any = None,
    out: Any = None,
    config: Config | SkinnyConfig | None = None,
) -> Any:
    """out (m, n) = activation(W @ x + bias[:, None]) + residual on the device and current stream of x (k, n) or (k,).

    float16 and bfloat16, float32 accumulation. Workspace: none for aligned arrays with contiguous columns.
    """
    quick = kind_of(x) == "torch-cuda" and residual is None and config is None
    if quick and not needs_gradient(x, bias):
        done = quick_product(packed, "matmul", x, bias, activation, out)
        if done is not None:
            return done
    refuse_gradient(x=x, bias=bias, residual=residual)
    view = device_view(x, what="x")
    m, k = packed.shape
    if packed.dtype not in ("float16", "bfloat16"):
        raise DtypeError(
            f"packed is {packed.dtype}; the GPU kernels take float16 and bfloat16 (packed.astype('float16'))"
        )
    check_operand(view, packed, "x", view.device)
    if len(view.shape) not in (1, 2):
        raise ShapeError(f"x has shape {view.shape}; expected ({k}, n) or ({k},)")
    rows = rows_of(view)
    if rows[1] != k:
        raise ShapeError(f"x has {rows[1]} rows; packed needs k = {k}")
    check_activation(activation)
    n = rows[2]
    bias_at = check_bias(bias, packed, view.device)
    out_shape = (m,) if len(view.shape) == 1 else (m, n)
    res_rows = checked(residual, "residual", packed, view, out_shape)
    if out is None:
        out = new_matrix(m, n, x, packed.dtype)
        result = out if len(view.shape) == 2 else out.reshape(m)
        out_rows = rows_of(device_view(out, what="out"))
    else:
        result = out
        out_rows = checked_out(out, packed, view, out_shape)
        if overlap(out_rows, rows) or (res_rows is not None and overlap(out_rows, res_rows) and out_rows != res_rows):
            raise ArgumentError("out overlaps x or residual in memory; pass an array of its own")
    if m == 0 or n == 0:
        return result
    quick = quick and takes_result(result, x, out_shape)
    call = Call(packed, x, view)
    if isinstance(config, SkinnyConfig) or (config is None and has_few_columns(n, call.context.capability)):
        few = run_few(call, rows, out_rows, n, bias_at, res_rows, activation, out_shape, config=config)
        if quick:
            keep(packed, memo_key("matmul", x, bias, activation), few)
        return result
    keep_x, ldx = run(call, rows, out_rows, n, bias_at, res_rows, activation, config)
    if quick and keep_x is None:
        memo = _product_memo(call, n, ldx, out_rows[3], bias_at, activation, out_shape, None)
        keep(packed, memo_key("matmul", x, bias, activation), memo)
    return result


def device_linear(
    x: Any,
    packed: ShflBWMatrix,
    bias: Any = None,
    *,
    activation: str | None = None,
    residual: Any = None,
    out: Any = None,
    layout: str = "token",
    config: Config | SkinnyConfig | None = None,
) -> Any:
    """activation(x @ W.T + bias) + residual, (..., k) -> (..., m).

    Token-major x is turned by a transpose kernel (a workspace of tokens * k values), and so is a token-major result; in
    parts of the tokens, with workspaces of a part, where x is larger than L2 (`select.linear_tokens`). x whose tokens
    are contiguous (strides (1, tokens)) is used as it is. `layout="feature"` returns a view with strides (1, tokens).
    """
    if layout not in ("token", "feature"):
        raise ArgumentError(f"layout is {layout!r}; expected 'token' or 'feature'")
    quick = kind_of(x) == "torch-cuda" and residual is None and config is None and (out is None or layout == "token")
    if quick and not needs_gradient(x, bias):
        done = quick_product(packed, KINDS[layout], x, bias, activation, out)
        if done is not None:
            return done
    refuse_gradient(x=x, bias=bias, residual=residual)
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
    check_operand(view, packed, "x", view.device)
    check_activation(activation)
    n = view.shape[0]
    bias_at = check_bias(bias, packed, view.device)
    res_flat = None if residual is None else residual.reshape(-1, m)
    res = checked(res_flat, "residual", packed, view, (n, m))
    out_flat = None if out is None else (out if len(shape) == 2 else out.reshape(-1, m))
    if out is not None:
        if tuple(out.shape) != (*lead, m):
            raise ShapeError(f"out has shape {tuple(out.shape)}; expected {(*lead, m)}")
        if device_view(out_flat, what="out").address != device_view(out, what="out").address:
            raise ArgumentError("out cannot be flattened to (tokens, m) without a copy; pass a contiguous array")
    out_at = checked_out(out_flat, packed, view, (n, m))
    if out_at is not None and (
        overlap(out_at, rows_of(view)) or (res is not None and out_at != res and overlap(out_at, res))
    ):
        raise ArgumentError("out overlaps x or residual in memory; pass an array of its own")
    call = Call(packed, flat, view)
    if out_flat is None:
        if layout == "feature":
            ld = n if n % 8 == 0 else ceil_div(n, 8) * 8
            out_flat = new_matrix(m, max(ld, 1), flat, packed.dtype)[:, :n].T
        else:
            out_flat = new_matrix(n, m, flat, packed.dtype)
        out_at = rows_of(device_view(out_flat, what="out"))
    result = out
    if result is None:
        result = out_flat if len(shape) == 2 else out_flat.reshape(*lead, m)
    if m and n:
        quick = quick and (out is None or takes_result(out, x, (*lead, m)))
        stride = tuple(result.stride()) if quick and layout == "feature" else None
        memo = _enqueue_linear(call, rows_of(view), out_at, bias_at, res, activation, config, (*lead, m), stride)
        if quick and memo is not None and flat.data_ptr() == x.data_ptr():
            keep(packed, memo_key(KINDS[layout], x, bias, activation), memo)
    return result


def _enqueue_linear(
    call: Call, x: Any, out: Any, bias: tuple[int, int], res: Any, activation: str | None,
    config: Config | SkinnyConfig | None, out_shape: tuple[int, ...], out_stride: tuple[int, ...] | None,
) -> Any:  # fmt: skip
    """Launch `linear` by one of the two ways; returns the memo of such a call, or None.

    Operands are (address, tokens, features, token stride, feature stride); `out_stride` is None for contiguous results.
    """
    n = x[1]
    if isinstance(config, SkinnyConfig) or (config is None and has_few_columns(n, call.context.capability)):
        return run_few(call, turned(x), turned(out), n, bias, turned(res), activation, out_shape, out_stride, config)
    run_linear(call, x, out, bias, res, activation, config)
    m, k = call.packed.shape
    is_feature = x[3] == 1 and x[4] % 8 == 0 and n <= x[4] < 2**31  # as the product reads it, without a copy
    if min(m, n, k) <= 1 or not (is_feature or x[3:] == (k, 1)):
        return None
    ldx, ldo = x[4] if is_feature else 0, 0 if out[4] == 1 else out[4]
    return _product_memo(call, n, ldx, ldo, bias, activation, out_shape, out_stride)


def _product_memo(
    call: Call, n: int, ldx: int, ldo: int, bias: tuple[int, int], activation: str | None, out_shape: tuple[int, ...],
    out_stride: tuple[int, ...] | None,
) -> ProductMemo:  # fmt: skip
    """The memo of a product whose feature-major x and result have rows this far apart; 0: token-major, contiguous."""
    m, k = call.packed.shape
    step = n if ldx or ldo else tokens_at_once(call.packed, call.context, n)
    width = ceil_div(step, 8) * 8
    parts = []
    for start in range(0, n, step):
        count = min(step, n - start)
        ld = ceil_div(count, 8) * 8
        turn_in = None if ldx else transpose_launch(call.context, call.stream_handle, count, k)
        turn_out = None if ldo else transpose_launch(call.context, call.stream_handle, m, count)
        plan = call.plan(count, activation, bias, (0, 0), None)
        parts.append(ProductPart(start, count, ldx or ld, ldo or ld, turn_in, turn_out, plan.kernel,
                                 plan.launch_config, plan.head))  # fmt: skip
    turned_values = 0 if ldx else ceil_div(k * width, 256) * 256  # the second workspace starts at 512 bytes, too
    return ProductMemo(
        call.context, tuple(parts), k, m,
        transpose_flags(k % 8 == 0, True, is_padded=True), transpose_flags(True, m % 8 == 0, is_result=True),
        bias[1] | (ALIGNED if ldo % 8 == 0 else 0), out_shape, out_stride,
        turned_values + (0 if ldo else m * width), 2 * turned_values,
    )  # fmt: skip


def device_transpose(x: Any, *, is_result: bool = False, addend: Any = None, out: Any = None) -> Any:
    """`x.T` of a (rows, cols) matrix of 16-bit values, as a C-contiguous (cols, rows) array of the kind of x.

    The tokens are the rows of x; with `is_result` they are its columns (a feature-major result becomes token-major).
    For layers that share one transpose of their common input (`shflnb.nn`).

    Parameters
    ----------
    x : device array (rows, cols), float16 or bfloat16, columns contiguous
    addend : device array (cols, rows), optional
        Of the dtype of x, C-contiguous, at a 16-byte boundary; rows is a multiple of 8. The result is `x.T + addend`,
        added in float32 and rounded once.
    out : device array (cols, rows), optional
        C-contiguous; may be the addend.
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
    call = Call(None, x, view)  # type: ignore[arg-type]  # no product is made
    added = (0, 0) if addend is None else (_matrix_at(addend, "addend", (cols, rows), view.dtype), rows)
    if added[0] and (rows % 8 or added[0] % 16):
        raise ShapeError(f"addend has rows of {rows} values at {added[0]:#x}; needed are multiples of 8, aligned to 16")
    out = new_matrix(cols, rows, x, view.dtype) if out is None else out
    to = _matrix_at(out, "out", (cols, rows), view.dtype)
    call.transpose(view.address, view.strides[0], to, rows, rows, cols, is_result, addend=added)
    return out


def _matrix_at(array: Any, what: str, shape: tuple[int, int], dtype: str) -> int:
    """The address of a C-contiguous matrix of this shape and dtype."""
    view = device_view(array, what=what)
    steps = tuple(s for s, size in zip(view.strides, view.shape, strict=True) if size > 1)
    wanted = tuple(s for s, size in zip((shape[1], 1), shape, strict=True) if size > 1)
    if view.shape != shape or view.dtype != dtype or (0 not in shape and steps != wanted):
        raise ShapeError(
            f"{what} is {view.dtype} of shape {view.shape}, strides {view.strides}; expected a C-contiguous {dtype} "
            f"matrix of shape {shape}"
        )
    return int(view.address)


matmul, linear = device_matmul, device_linear
