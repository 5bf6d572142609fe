"""What every product kernel does with its results: bias, activation, residual, and the store of 8 columns of a row.

Device functions, built per dtype and epilogue. The result is `activation(acc + bias) + residual`, evaluated in float32
and rounded once to the output dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import cuda
from numba.cuda import types

from .ptx import (
    instruction,
    ld_global_nc_f32,
    ld_global_u16,
    ld_global_u32,
    st_global_u16,
    st_global_v4,
    unpack_high,
    unpack_low,
)

__all__ = ["ALIGNED", "BIAS_F32", "HAS_BIAS", "HAS_RESIDUAL", "NO_ROW", "make_activation", "make_load_bias",
           "make_load_residual", "store_chunk"]  # fmt: skip

u16, u32, u64, f32 = types.uint16, types.uint32, types.uint64, types.float32

# bits of the kernels' `flags` argument
ALIGNED = 1  # out (and residual) rows start at 16-byte boundaries: whole chunks are stored 16 bytes at a time
HAS_BIAS = 2
BIAS_F32 = 4  # bias is float32; otherwise of the dtype of x
HAS_RESIDUAL = 8

NO_ROW = 0xFFFFFFFF  # place of a row that the short last group does not have


# One asm block each: written in Python, 128 inlined copies are more than the optimiser unrolls, and the accumulators go
# to local memory.
# Phi(-z) = 2 ** P(z) for z = |x| up to 6.5, P of degree 5 fitted so that z Phi(-z) is off by at most 4.4e-7 (4.7e-7 in
# float32), and with it the result x Phi(x) = max(x, 0) - z Phi(-z). Nine instructions; with .ftz, since without it each
# ex2 and rcp brings four more for arguments that never come.
_gelu = instruction(
    "x * Phi(x), the exact (erf) form of GELU to about 5e-7.",
    "{ .reg .f32 z, p, r; abs.f32 z, $1; min.f32 z, z, 0f40D00000; fma.rn.f32 p, z, 0fB9F82680, 0f3BE82593; "
    "fma.rn.f32 p, p, z, 0fBD5448F3; fma.rn.f32 p, p, z, 0fBEEB8421; fma.rn.f32 p, p, z, 0fBF934D04; "
    "fma.rn.f32 p, p, z, 0fBF80013C; ex2.approx.ftz.f32 p, p; neg.f32 z, z; max.NaN.f32 r, $1, 0f00000000; "
    "fma.rn.f32 $0, z, p, r; }",
    (f32,), "=f,f", f32, volatile=False)  # fmt: skip
_silu = instruction(
    "x / (1 + exp(-x)).",
    "{ .reg .f32 e; mul.f32 e, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 e, e; add.f32 e, e, 0f3F800000; "
    "rcp.approx.ftz.f32 e, e; mul.f32 $0, $1, e; }",
    (f32,), "=f,f", f32, volatile=False)  # fmt: skip


def make_activation(epilogue: str) -> Callable[..., Any]:
    """Device function float32 -> float32; NaN stays NaN."""
    if epilogue == "relu":

        def activation(a):
            return f32(0.0) if a < f32(0.0) else a

    elif epilogue == "gelu":

        def activation(a):
            return _gelu(a)

    elif epilogue == "silu":

        def activation(a):
            return _silu(a)

    else:

        def activation(a):
            return a

    return cuda.jit(device=True, forceinline=True)(activation)


def make_load_bias(dtype: str) -> Callable[..., Any]:
    """Device function (bias address, row, flags) -> float32; 0 without a bias and for rows that do not exist."""
    unpack = unpack_low[dtype]

    def load_bias(bias, row, flags):
        if (flags & u32(HAS_BIAS)) == u32(0) or row == u32(NO_ROW):
            return f32(0.0)
        if flags & u32(BIAS_F32):
            return ld_global_nc_f32(bias + u64(row) * u64(4))
        return unpack(u32(ld_global_u16(bias + u64(row) * u64(2))))

    return cuda.jit(device=True, forceinline=True)(load_bias)


def make_load_residual(dtype: str) -> Callable[..., Any]:
    """Device function (residual address, row, column, n, ldr, flags) -> two float32, of this column and the next.

    0 beyond n and for rows that do not exist; neither is read.
    """
    low, high = unpack_low[dtype], unpack_high[dtype]

    def load_residual(residual, row, col, n, ldr, flags):
        first, second = f32(0.0), f32(0.0)
        if row != u32(NO_ROW) and col < n:
            at = residual + u64(row) * ldr * u64(2) + u64(col) * u64(2)
            if flags & u32(ALIGNED) and (col & u32(1)) == u32(0) and u32(col + u32(1)) < n:
                pair = ld_global_u32(at)
                first, second = low(pair), high(pair)
            else:
                first = low(u32(ld_global_u16(at)))
                if u32(col + u32(1)) < n:
                    second = low(u32(ld_global_u16(at + u64(2))))
        return first, second

    return cuda.jit(device=True, forceinline=True)(load_residual)


@cuda.jit(device=True, forceinline=True)
def _store_word(word, out, room):
    if room > u32(0):
        st_global_u16(out, u16(word & u32(0xFFFF)))
    if room > u32(1):
        st_global_u16(out + u64(2), u16(word >> u32(16)))


@cuda.jit(device=True, forceinline=True)
def store_chunk(w0, w1, w2, w3, row, col, n, out, ldo, flags):
    """Store 8 consecutive columns (4 words of two values) of an output row; skips columns from n on and `NO_ROW`."""
    if row == u32(NO_ROW) or col >= n:
        return
    target = out + u64(row) * ldo * u64(2) + u64(col) * u64(2)
    room = u32(n - col)
    if room >= u32(8) and flags & u32(ALIGNED):
        st_global_v4(target, w0, w1, w2, w3)
    else:
        _store_word(w0, target, room)
        _store_word(w1, target + u64(4), u32(room - u32(2)) if room > u32(2) else u32(0))
        _store_word(w2, target + u64(8), u32(room - u32(4)) if room > u32(4) else u32(0))
        _store_word(w3, target + u64(12), u32(room - u32(6)) if room > u32(6) else u32(0))
