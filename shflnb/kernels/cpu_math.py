"""Scalar functions that the CPU kernels call on every number: half precision to and from float32, and the activations.

They have no branch and no table, so that LLVM turns the loops around them into vector code.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit, types
from numba.extending import overload

from .cpu_simd import as_bits, as_float

__all__ = ["ACTIVATION_CODES", "FLOAT16", "activate", "narrow_bfloat16", "narrow_float16", "widen_bfloat16",
           "widen_float16"]  # fmt: skip

ACTIVATION_CODES = {None: 0, "relu": 1, "gelu": 2, "silu": 3}
FLOAT16 = 1
"""Value of a kernel's `form` argument for float16 storage; anything else that is 16 bits wide is bfloat16."""

_u32, _f32 = np.uint32, np.float32
# division by zero must give Inf, and a call or a raised error inside a loop would keep LLVM from vectorising it
_FAST = {"error_model": "numpy", "forceinline": True}


@njit(**_FAST)
def widen_bfloat16(bits):
    """uint16 holding a bfloat16 -> float32 (exact)."""
    return as_float(_u32(_u32(bits) << _u32(16)))


@njit(**_FAST)
def narrow_bfloat16(number):
    """float32 -> uint16 holding the nearest bfloat16, ties to even; a NaN stays a (quiet) NaN."""
    bits = as_bits(number)
    rounded = _u32(bits + _u32(0x7FFF) + ((bits >> _u32(16)) & _u32(1))) >> _u32(16)
    quiet = (bits >> _u32(16)) | _u32(0x40)
    is_nan = (bits & _u32(0x7FFFFFFF)) > _u32(0x7F800000)
    return np.uint16(quiet if is_nan else rounded)


@njit(**_FAST)
def widen_float16(bits):
    """uint16 holding a float16 -> float32 (exact, subnormals too, whatever the denormal mode of the processor)."""
    half = _u32(bits)
    sign = _u32((half & _u32(0x8000)) << _u32(16))
    body = half & _u32(0x7FFF)
    normal = _u32((body << _u32(13)) + _u32(0x38000000))  # exponent bias 15 -> 127
    special = _u32((body << _u32(13)) + _u32(0x70000000))  # Inf and NaN: exponent 31 -> 255
    tiny = as_bits(_f32(np.int32(body)) * _f32(2.0**-24))  # subnormal: an integer count of 2**-24
    magnitude = tiny if body < _u32(0x0400) else (special if body >= _u32(0x7C00) else normal)
    return as_float(_u32(magnitude | sign))


@njit(**_FAST)
def narrow_float16(number):
    """float32 -> uint16 holding the nearest float16, ties to even; too large becomes Inf, a NaN stays a (quiet) NaN."""
    bits = as_bits(number)
    sign = (bits >> _u32(16)) & _u32(0x8000)
    body = bits & _u32(0x7FFFFFFF)
    rebased = _u32(body - _u32(0x38000000))
    normal = _u32(rebased + _u32(0xFFF) + ((rebased >> _u32(13)) & _u32(1))) >> _u32(13)
    # subnormal result: adding 1.5 * 2**23 rounds the count of 2**-24 to an integer, which is then the low bits
    tiny = _u32(as_bits(as_float(body) * _f32(2.0**24) + _f32(12582912.0)) - _u32(0x4B400000))
    nan = _u32(0x7E00)
    finite = tiny if body < _u32(0x38800000) else normal
    large = nan if body > _u32(0x7F800000) else _u32(0x7C00)
    return np.uint16(sign | (large if body >= _u32(0x477FF000) else finite))


_LOG2_E = _f32(1.4426950408889634)
_LN2_HIGH, _LN2_LOW = _f32(0.693359375), _f32(-2.12194440054690583e-4)  # the high part has 9 bits: n * high is exact
_ROUND = _f32(12582912.0)
# least-squares fits at Chebyshev nodes, relative weight: exp on |r| <= ln(2)/2 (error 2e-9) ...
_EXP = tuple(_f32(c) for c in (1.0, 1.00000004, 0.49999991, 0.166664109, 0.0416684265, 0.00837559895, 0.00138282276))
# ... and exp(a*a/2) * (1 - Phi(a)) for a = 0 .. 14.5 in t = (a - 3) / (a + 3), where Phi is the normal CDF (error 1e-8)
_TAIL = tuple(_f32(c) for c in (0.121513947, -0.206402618, 0.12322504, -0.046213311, 0.00613198647, 0.00290465237,
                                -0.000983490609, -0.000339574698, 0.000115250635, 5.35880596e-05))  # fmt: skip


@njit(**_FAST)
def _power_of_2(n):
    return as_float(_u32((n + np.int32(127)) << np.int32(23)))


@njit(**_FAST)
def _exp32(x, low):
    """exp(x + low) in float32, |low| << |x|, to 2 units in the last place; 0 below -104, Inf above 89, NaN for NaN."""
    x = _f32(-105.0) if x < _f32(-105.0) else (_f32(89.5) if x > _f32(89.5) else x)
    n = (x * _LOG2_E + _ROUND) - _ROUND
    r = x - n * _LN2_HIGH - (n * _LN2_LOW - low)
    c = _EXP
    p = c[0] + r * (c[1] + r * (c[2] + r * (c[3] + r * (c[4] + r * (c[5] + r * c[6])))))
    whole = np.int32(n) if n == n else np.int32(0)
    half = np.int32(whole >> np.int32(1))  # two steps: 2**n itself leaves the range of normal numbers
    return p * _power_of_2(half) * _power_of_2(np.int32(whole - half))


@njit(**_FAST)
def _gelu32(x):
    """x * Phi(x), from the tail 1 - Phi(|x|), which keeps its relative accuracy where Phi itself is next to 0."""
    a = -x if x < _f32(0.0) else x
    b = _f32(14.5) if a > _f32(14.5) else a  # the tail is 0 there in float32
    t = (b - _f32(3.0)) / (b + _f32(3.0))
    c = _TAIL
    p = c[5] + t * (c[6] + t * (c[7] + t * (c[8] + t * c[9])))
    p = c[0] + t * (c[1] + t * (c[2] + t * (c[3] + t * (c[4] + t * p))))
    high = as_float(as_bits(b) & _u32(0xFFFFF000))  # 12 bits: high * high is exact, so the rounding of b * b is known
    square = b * b
    error = (high * high - square) + (b - high) * (b + high)
    tail = p * _exp32(_f32(-0.5) * square, _f32(-0.5) * error)
    return x * (tail if x < _f32(0.0) else _f32(1.0) - tail)


def _activate(number, code):
    raise NotImplementedError("device code: only Numba calls it")


@overload(_activate, jit_options=_FAST)
def _activate_overload(number, code):
    """float32 takes the vector code above, float64 the correctly rounded library functions."""
    if number == types.float32:

        def single(number, code):
            if code == 1:
                return _f32(0.0) if number < _f32(0.0) else number
            if code == 2:
                return _gelu32(number)
            return number / (_f32(1.0) + _exp32(-number, _f32(0.0)))

        return single

    def double(number, code):
        if code == 1:
            return 0.0 if number < 0.0 else number
        if code == 2:
            return 0.5 * number * math.erfc(-number * math.sqrt(0.5))
        return number / (1.0 + math.exp(-number))

    return double


@njit(**_FAST)
def activate(row, code):
    """Apply an activation in place to a contiguous run of numbers; `code` is one of `ACTIVATION_CODES`."""
    if code == 1:
        for i in range(row.shape[0]):
            row[i] = _activate(row[i], 1)
    elif code == 2:
        for i in range(row.shape[0]):
            row[i] = _activate(row[i], 2)
    elif code == 3:
        for i in range(row.shape[0]):
            row[i] = _activate(row[i], 3)
