"""x of up to 64 tokens and any strides -> rows of 16-byte chunks, for `skinny_wgmma.py`: dst[f, t] = src[t, f].

A thread has two neighbouring features of eight tokens at a time. It takes no shared memory and few registers, so that
all blocks of a launch find room beside those of the product and wait there for the kernel before them: the kernel after
them cannot begin to copy its weights before they all stand there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import cuda
from numba.cuda import types

from .ptx import ld_global_u16, ld_global_u32, st_global_v4
from .ptx_cluster import grid_launch_dependents, grid_wait, high_halves, low_halves

__all__ = ["PAIRS", "TURN_THREADS", "make_turn_in"]

u32, u64 = types.uint32, types.uint64

TURN_THREADS = 128
PAIRS = 1  # flag: features of src are contiguous, and even ones start at 4-byte boundaries


def make_turn_in() -> Callable[..., Any]:
    """The kernel (src, token stride, feature stride, dst, ld, tokens, features, flags); strides in values.

    dst[f, t] is written for all t below the next multiple of 8, with zeros beyond the last token.
    """

    def turn_in(src, stride, step, dst, ld, tokens, features, flags):
        grid_launch_dependents()
        pairs = u32((u32(features) + u32(1)) >> u32(1))
        units = u32(pairs * u32((u32(tokens) + u32(7)) >> u32(3)))
        i = u32(u32(cuda.blockIdx.x) * u32(TURN_THREADS) + u32(cuda.threadIdx.x))
        grid_wait()
        while i < units:
            chunk = u32(i // pairs)
            feature = u32(u32(i - chunk * pairs) * u32(2))
            i = u32(i + u32(cuda.gridDim.x) * u32(TURN_THREADS))
            has_second = u32(feature + u32(1)) < u32(features)
            w = cuda.local.array(8, u32)
            at = src + (u64(chunk) * u64(8) * stride + u64(feature) * step) * u64(2)
            for t in range(8):
                w[t] = u32(0)
                if u32(chunk * u32(8) + u32(t)) < u32(tokens):
                    if has_second and (flags & u64(PAIRS)) != u64(0):
                        w[t] = ld_global_u32(at)
                    else:
                        w[t] = u32(ld_global_u16(at))
                        if has_second:
                            w[t] |= u32(ld_global_u16(at + step * u64(2))) << u32(16)
                at += stride * u64(2)
            to = dst + (u64(feature) * ld + u64(chunk) * u64(8)) * u64(2)
            st_global_v4(to, low_halves(w[0], w[1]), low_halves(w[2], w[3]), low_halves(w[4], w[5]),
                         low_halves(w[6], w[7]))  # fmt: skip
            if has_second:
                st_global_v4(to + ld * u64(2), high_halves(w[0], w[1]), high_halves(w[2], w[3]),
                             high_halves(w[4], w[5]), high_halves(w[6], w[7]))  # fmt: skip

    return turn_in
