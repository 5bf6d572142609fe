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
    copy_values_g2s,
    copy_values_s2g,
    float_of_bits,
    instruction,
    ld_global_nc_f32,
    ld_global_u16,
    ld_global_u16_u32,
    ld_global_u32,
    ld_global_v4,
    ld_shared_u32,
    ld_shared_v4,
    st_global_v4,
    st_shared_v4,
    unpack_high,
    unpack_low,
)

__all__ = ["ALIGNED", "BIAS_F32", "HAS_BIAS", "HAS_RESIDUAL", "NO_ROW", "fetch_chunk", "load_bias_word",
           "make_activation", "make_add_residual", "make_bias_value", "make_load_bias", "store_chunk"]  # fmt: skip

u32, u64, f32 = types.uint32, types.uint64, types.float32

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


@cuda.jit(device=True, forceinline=True)
def load_bias_word(bias, row, flags):
    """The bits of a row's bias, for `bias_value` to make a number of; 0 where there is none.

    What `make_load_bias` does, in two steps, so that nothing waits for the load before the number is needed; where the
    number is needed at once that is a few instructions more.
    """
    word = u32(0)
    if flags & u32(HAS_BIAS) and row != u32(NO_ROW):
        if flags & u32(BIAS_F32):
            word = ld_global_u32(bias + u64(row) * u64(4))
        else:
            word = ld_global_u16_u32(bias + u64(row) * u64(2))
    return word


def make_bias_value(dtype: str) -> Callable[..., Any]:
    """Device function (word of `load_bias_word`, flags) -> float32."""
    unpack = unpack_low[dtype]

    def bias_value(word, flags):
        if flags & u32(BIAS_F32):
            return float_of_bits(word)
        return unpack(word)

    return cuda.jit(device=True, forceinline=True)(bias_value)


def make_add_residual(dtype: str, pitch: int) -> Callable[..., Any]:
    """Device function (acc, a, address in shared memory): acc[a], +1 += the two values there; +2, +3 those 8 rows on.

    That is how a thread holds the results of 8 columns of 16 rows; rows in shared memory are `pitch` bytes apart.
    """
    low, high = unpack_low[dtype], unpack_high[dtype]

    def add_residual(acc, a, at):
        first, second = ld_shared_u32(at), ld_shared_u32(u32(at + u32(8 * pitch)))
        acc[a] += low(first)
        acc[a + 1] += high(first)
        acc[a + 2] += low(second)
        acc[a + 3] += high(second)

    return cuda.jit(device=True, forceinline=True)(add_residual)


@cuda.jit(device=True, forceinline=True)
def fetch_chunk(at, row, col, n, residual, ldr, flags):
    """Copy 8 consecutive columns of a residual's row to shared memory, those below n; nothing for `NO_ROW`."""
    if row != u32(NO_ROW) and col < n:
        source = residual + u64(row) * ldr * u64(2) + u64(col) * u64(2)
        room = u32(n - col)
        if room >= u32(8) and flags & u32(ALIGNED):
            w = ld_global_v4(source)
            st_shared_v4(at, w[0], w[1], w[2], w[3])
        else:
            copy_values_g2s(at, source, min(room, u32(8)))


@cuda.jit(device=True, forceinline=True)
def store_chunk(at, row, col, n, out, ldo, flags):
    """Store 8 consecutive columns of an output row from shared memory; skips columns from n on and `NO_ROW`."""
    if row != u32(NO_ROW) and col < n:
        target = out + u64(row) * ldo * u64(2) + u64(col) * u64(2)
        room = u32(n - col)
        if room >= u32(8) and flags & u32(ALIGNED):
            w = ld_shared_v4(at)
            st_global_v4(target, w[0], w[1], w[2], w[3])
        else:
            copy_values_s2g(target, at, min(room, u32(8)))
