"""What a checked call on device arrays launches: copies and transposes to workspaces, and the product between them."""

from __future__ import annotations

from typing import Any

from ..errors import ArgumentError
from ..formats.shflbw import ShflBWMatrix
from .config import Config, ceil_div
from .launch import device_context
from .memo import FewColumnsMemo
from .operands import ALIGNED, HAS_RESIDUAL, is_row_major
from .skinny_config import PACED, SkinnyConfig, is_paced, stores_directly
from .skinny_plan import SkinnyRoad, chosen_config, launch_skinny, skinny_plan, turn_of_out, turn_of_x
from .skinny_select import fits_few
from .spmm_plan import Plan, copy_spec, plan_for, tokens_at_once, transpose_launch
from .transpose_config import transpose_flags
from .views import DeviceView, current_stream, device_view, new_matrix

__all__ = ["Call", "run", "run_few", "run_linear"]


class Call:
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

    def copy(self, src: tuple[int, int, int], dst: tuple[int, int, int], rows: int, cols: int, pad: int = 0) -> None:
        """dst[r, c] = src[r, c]; (address, row stride, column stride) each. Zeros from `cols` up to `pad` columns."""
        if rows == 0 or cols == 0:
            return
        kernel = self.context.kernel(copy_spec(), self.stream_handle)
        wide = max(cols, pad)
        grid = (ceil_div(wide, kernel.spec.threads), min(rows, 65535), 1)
        self.context.launch(self.stream_handle, kernel.config(grid), kernel, *src, *dst, rows, cols, wide)

    def transpose(self, src: int, lds: int, dst: int, ldd: int, rows: int, cols: int, is_result: bool = False,
                  is_padded: bool = False, addend: tuple[int, int] = (0, 0)) -> None:  # fmt: skip
        """dst[c, r] = src[r, c]; leading dimensions in values. Tokens are the rows of src, of a result its columns.

        With `is_padded` rows of dst are written up to the next multiple of 8, with zeros. addend: (address, leading
        dimension) of a (cols, rows) matrix that is added, in the dtype of the call; it may be dst. Then rows of dst and
        of the addend are aligned and a multiple of 8 values long.
        """
        if rows == 0 or cols == 0:
            return
        adds = self.view.dtype if addend[0] else ""
        kernel, grid, at_once = transpose_launch(self.context, self.stream_handle, rows, cols, adds)
        src_aligned, dst_aligned = src % 16 == 0 and lds % 8 == 0, dst % 16 == 0 and ldd % 8 == 0
        flags = transpose_flags(src_aligned, dst_aligned, is_result=is_result, is_padded=is_padded)
        self.context.launch(self.stream_handle, grid, kernel, src, lds, dst, ldd, rows, cols, at_once, flags,
                            *(addend if adds else ()))  # fmt: skip

    def plan(
        self, n: int, activation: str | None, bias: tuple[int, int], residual: tuple[int, int], config: Config | None
    ) -> Plan:
        """The launch record for these operands."""
        epilogue = epilogue_of(activation, bool(bias[0] or residual[0]))
        return plan_for(self.packed, self.context, n, epilogue, self.stream_handle, config)

    def product(self, x: int, ldx: int, out: int, ldo: int, n: int, bias: tuple[int, int], residual: tuple[int, int],
                activation: str | None, config: Config | None) -> None:  # fmt: skip
        """out (m, n) = f(W x + bias) + residual on aligned feature-major x.

        bias is (address, flags), residual (address, leading dimension).
        """
        plan = self.plan(n, activation, bias, residual, config)
        flags = bias[1]
        if residual[0]:
            flags |= HAS_RESIDUAL
        if (out | residual[0]) % 16 == 0 and (ldo | residual[1]) % 8 == 0:
            flags |= ALIGNED
        self.context.launch(self.stream_handle, plan.launch_config, plan.kernel, *plan.head, x, out, bias[0],
                            residual[0], n, ldx, ldo, residual[1], flags)  # fmt: skip

    def aligned_x(self, rows: tuple[int, int, int, int, int]) -> tuple[int, int, Any]:
        """Address and leading dimension of x with 16-byte aligned rows: x itself, or a copy."""
        address, k, n, row_stride, col_stride = rows
        if k <= 1:
            row_stride = ceil_div(max(row_stride, n, 1), 8) * 8
        if (n <= 1 or col_stride == 1) and address % 16 == 0 and row_stride % 8 == 0 and n <= row_stride < 2**31:
            return address, row_stride, None
        target, ld, owner = self.workspace(k, n)
        self.copy((address, rows[3], col_stride), (target, ld, 1), k, n, ld)
        return target, ld, owner


def epilogue_of(activation: str | None, is_added_to: bool) -> str:
    """Which epilogue a call takes; `is_added_to`: by a bias or a residual."""
    return activation or ("identity" if is_added_to else "plain")


def run_few(call: Call, x: Any, out: Any, n: int, bias: tuple[int, int], residual: Any, activation: str | None,
            out_shape: tuple[int, ...], out_stride: tuple[int, ...] | None = None,
            config: SkinnyConfig | None = None) -> FewColumnsMemo:  # fmt: skip
    """The product with few columns between checked operands.

    Each is (address, features, tokens, feature stride, token stride). The memo is for an x and a result of these
    strides at aligned addresses, without residual. Without a config the choice is `skinny_select.choose_few`'s.
    """
    context, stream = call.context, call.stream_handle
    m, k = call.packed.shape
    epilogue = epilogue_of(activation, bool(bias[0]) or residual is not None)
    address, _, _, feature_stride, token_stride = x
    layout = "token" if feature_stride == 1 else "feature"
    if config is None:
        config = chosen_config(call.packed, context, n, layout, stream)
    elif not fits_few(config, call.packed.v, n, call.packed.dtype, layout):
        raise ArgumentError(f"{config.name} cannot take {n} columns of {layout}-major {call.packed.dtype}, "
                            f"v = {call.packed.v}")  # fmt: skip
    token_major = config.token_major
    plan = skinny_plan(call.packed, context, config, epilogue, stream)
    turn_in, ldx = None, token_stride if token_major else feature_stride
    is_rows = (n == 1 or token_stride == 1) and address % 16 == 0 and feature_stride % 8 == 0
    if not (token_major or (is_rows and n <= feature_stride < 2**31)):
        ldx = ceil_div(n, 8) * 8
        turn_in = turn_of_x(context, n, k, address, (token_stride, feature_stride), stream)
    turn_out, ot, of = None, out[4], out[3]
    if out[3] == 1 and m > 1 and n > 1 and not stores_directly(m, n, k * plan.density, stitches=token_major):
        turn_out, ot, of = turn_of_out(context, n, m, out[0], out[4], stream), 1, ceil_div(n, 8) * 8
    rt, rf, flags = (0, 0, 0) if residual is None else (residual[4], residual[3], HAS_RESIDUAL)
    if token_major and is_paced(m, k, n, plan.density):
        flags |= PACED
    road = SkinnyRoad(context, plan, turn_in, turn_out, n, k, m, ldx, ot, of, rt, rf, bias[1] | flags)
    works = [new_matrix(1, values, call.like, call.packed.dtype) if values else None for values in road.work_values]
    at = [0 if work is None else device_view(work, what="workspace").address for work in works]
    launch_skinny(road, stream, address, out[0], (at[0], at[1]), bias[0], 0 if residual is None else residual[0])
    return FewColumnsMemo(road, out_shape, out_stride)


def run(call: Call, rows: Any, out_rows: Any, n: int, bias: tuple[int, int], res_rows: Any, activation: str | None,
        config: Config | None) -> tuple[Any, int]:  # fmt: skip
    """The product between checked feature-major operands; misaligned or strided ones go through workspaces.

    Returns the copy of x that was needed, or None, and the leading dimension of x.
    """
    m = call.packed.shape[0]
    x_address, ldx, keep_x = call.aligned_x(rows)
    residual, keep_r = (0, 0), None
    if res_rows is not None:
        if is_row_major(m, n, res_rows[3], res_rows[4]):
            residual = (res_rows[0], res_rows[3] if m > 1 else max(8, ceil_div(n, 8) * 8))
        else:
            target, ld, keep_r = call.workspace(m, n)
            call.copy((res_rows[0], res_rows[3], res_rows[4]), (target, ld, 1), m, n)
            residual = (target, ld)
    if is_row_major(m, n, out_rows[3], out_rows[4]):
        ldo = out_rows[3] if m > 1 else max(8, ceil_div(n, 8) * 8)
        call.product(x_address, ldx, out_rows[0], ldo, n, bias, residual, activation, config)
    else:
        target, ld, keep_o = call.workspace(m, n)
        call.product(x_address, ldx, target, ld, n, bias, residual, activation, config)
        call.copy((target, ld, 1), (out_rows[0], out_rows[3], out_rows[4]), m, n)
        del keep_o
    del keep_r
    return keep_x, ldx


def run_linear(call: Call, x: Any, out: Any, bias: tuple[int, int], res: Any, activation: str | None,
               config: Config | None) -> None:  # fmt: skip
    """The token-major product between checked operands, in parts of the tokens where that is faster.

    Operands are (address, tokens, features, token stride, feature stride).
    """
    n = x[1]
    are_turned = all(o[4] == 1 and o[3] != 1 and o[2] > 1 for o in (x, out))
    step = tokens_at_once(call.packed, call.context, n) if are_turned and config is None else n
    for start in range(0, n, max(1, step)):
        count = min(step, n - start)
        parts = [None if o is None else (o[0] + 2 * start * o[3], count, *o[2:]) for o in (x, out, res)]
        _run_part(call, parts[0], parts[1], bias, parts[2], activation, config)


def _run_part(call: Call, x: Any, out_at: Any, bias: tuple[int, int], res: Any, activation: str | None,
              config: Config | None) -> None:  # fmt: skip
    """As `run_linear`, at once; what is not feature-major is transposed before and after."""
    m, k = call.packed.shape
    address, n, _, token_stride, feature_stride = x
    keep = []
    if token_stride == 1 or n == 1:
        x_rows = (address, k, n, feature_stride, 1)
    elif feature_stride == 1 and k > 1:
        target, ld, owner = call.workspace(k, n)
        keep.append(owner)
        call.transpose(address, token_stride, target, ld, n, k, is_padded=True)
        x_rows = (target, k, n, ld, 1)
    else:
        x_rows = (address, k, n, feature_stride, token_stride)
    res_rows = None if res is None else (res[0], m, n, res[4], res[3])
    if res_rows is not None and not is_row_major(m, n, res_rows[3], res_rows[4]) and res[4] == 1:
        target, ld, owner = call.workspace(m, n)
        keep.append(owner)
        call.transpose(res[0], res[3], target, ld, n, m)
        res_rows = (target, m, n, ld, 1)
    out_rows = (out_at[0], m, n, out_at[4], out_at[3])
    if out_at[4] == 1 and m > 1 and n > 1:  # token-major out: the product into a workspace, then a transpose
        target, ld, owner = call.workspace(m, n)
        keep.append(owner)
        run(call, x_rows, (target, m, n, ld, 1), n, bias, res_rows, activation, config)
        call.transpose(target, ld, out_at[0], out_at[3], m, n, is_result=True)
    else:
        run(call, x_rows, out_rows, n, bias, res_rows, activation, config)
    del keep
