"""What stands before and after `skinny_wgmma.py` where its operands are token-major: x of up to 64 tokens and any
strides -> rows of 16-byte chunks, and a result in such rows -> token-major.

    turn_in:  dst[f, t] = src[t, f]      four neighbouring features of eight tokens a thread
    turn_out: dst[t, f] = src[f, t]      eight features of eight tokens a thread

Neither takes shared memory, and few registers, so that all blocks of a launch find room beside those of the product:
they wait there for the kernel before them, and the kernel after them cannot begin to copy its weights before they all
stand there. A thread turns its values by itself: there is nothing to wait for but the loads, all of them at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import cuda
from numba.cuda import types

from .ptx import ld_global_u16, ld_global_v2, ld_global_v4, st_global_u16, st_global_v4
from .ptx_cluster import grid_launch_dependents, grid_wait, high_halves, ld_global_l2_u16_below, low_halves
from .skinny_config import FOURS, TURN_CHUNKS, TURN_THREADS

__all__ = ["make_turn_in", "make_turn_out"]

u16, u32, u64 = types.uint16, types.uint32, types.uint64


@cuda.jit(device=True, forceinline=True)
def _spread(tokens, pieces):
    """(shift, units): 2**shift neighbouring units are chunks of the same of so many pieces, a few features each.

    There may be units for chunks that do not exist.
    """
    chunks, shift = u32((tokens + u32(7)) >> u32(3)), u32(0)
    while u32(1) << shift < min(chunks, u32(TURN_CHUNKS)):
        shift = u32(shift + u32(1))
    rounds = u32(u32(chunks + (u32(1) << shift) - u32(1)) >> shift)
    return shift, u32(u32(rounds * pieces) << shift)


@cuda.jit(device=True, forceinline=True)
def _unit(i, shift, pieces):
    """(chunk, piece) of a unit."""
    rest = u32(i >> shift)
    turn = u32(rest // pieces)
    return u32(u32(turn << shift) + u32(i & u32((u32(1) << shift) - u32(1)))), u32(rest - turn * pieces)


@cuda.jit(device=True, forceinline=True)
def _load_features(at, step, left):
    """Up to four values `step` bytes apart, as two words; 0 for those beyond `left`."""
    first, second = u32(0), u32(0)
    if left > u32(0):
        first = u32(ld_global_u16(at))
    if left > u32(1):
        first |= u32(ld_global_u16(at + step)) << u32(16)
    if left > u32(2):
        second = u32(ld_global_u16(at + step * u64(2)))
    if left > u32(3):
        second |= u32(ld_global_u16(at + step * u64(3))) << u32(16)
    return first, second


def make_turn_in() -> Callable[..., Any]:
    """The kernel (src, token stride, feature stride, dst, ld, tokens, features, flags); strides in values.

    dst[f, t] is written for all t below the next multiple of 8; beyond the last token with what another token has.
    """

    def turn_in(src, stride, step, dst, ld, tokens, features, flags):
        grid_launch_dependents()
        fours = u32(u32(u32(features) + u32(3)) >> u32(2))
        shift, units = _spread(u32(tokens), fours)
        i = u32(u32(cuda.blockIdx.x) * u32(TURN_THREADS) + u32(cuda.threadIdx.x))
        grid_wait()
        while i < units:
            chunk, four = _unit(i, shift, fours)
            i = u32(i + u32(cuda.gridDim.x) * u32(TURN_THREADS))
            if u32(chunk * u32(8)) >= u32(tokens):
                continue
            feature = u32(four * u32(4))
            left = u32(u32(features) - feature)
            low, high = cuda.local.array(8, u32), cuda.local.array(8, u32)
            column, last = src + u64(feature) * step * u64(2), u32(u32(tokens) - u32(1))
            if flags & u64(FOURS):  # two loops: with the choice inside, each load would wait for the one before
                for t in range(8):
                    own = min(u32(chunk * u32(8) + u32(t)), last)
                    two = ld_global_v2(column + u64(own) * stride * u64(2))
                    low[t], high[t] = two[0], two[1]
            else:
                for t in range(8):
                    own = min(u32(chunk * u32(8) + u32(t)), last)
                    two = _load_features(column + u64(own) * stride * u64(2), step * u64(2), left)
                    low[t], high[t] = two[0], two[1]
            to = dst + (u64(feature) * ld + u64(chunk) * u64(8)) * u64(2)
            st_global_v4(to, low_halves(low[0], low[1]), low_halves(low[2], low[3]), low_halves(low[4], low[5]),
                         low_halves(low[6], low[7]))  # fmt: skip
            if left > u32(1):
                st_global_v4(to + ld * u64(2), high_halves(low[0], low[1]), high_halves(low[2], low[3]),
                             high_halves(low[4], low[5]), high_halves(low[6], low[7]))  # fmt: skip
            if left > u32(2):
                st_global_v4(to + ld * u64(4), low_halves(high[0], high[1]), low_halves(high[2], high[3]),
                             low_halves(high[4], high[5]), low_halves(high[6], high[7]))  # fmt: skip
            if left > u32(3):
                st_global_v4(to + ld * u64(6), high_halves(high[0], high[1]), high_halves(high[2], high[3]),
                             high_halves(high[4], high[5]), high_halves(high[6], high[7]))  # fmt: skip

    return turn_in


@cuda.jit(device=True, forceinline=True)
def _store_features(at, w0, w1, w2, w3, left, is_aligned):
    """Eight consecutive values, those that `left` are."""
    if is_aligned and left >= u32(8):
        st_global_v4(at, w0, w1, w2, w3)
    else:
        words = cuda.local.array(4, u32)
        words[0], words[1], words[2], words[3] = w0, w1, w2, w3
        for q in range(4):
            if left > u32(2 * q):
                st_global_u16(at + u64(4 * q), u16(words[q] & u32(0xFFFF)))
            if left > u32(2 * q + 1):
                st_global_u16(at + u64(4 * q + 2), u16(words[q] >> u32(16)))


def make_turn_out() -> Callable[..., Any]:
    """The kernel (src, ld, dst, token stride, tokens, features, aligned); strides in values.

    Rows of src start at 16-byte boundaries. aligned: tokens of dst do, too.
    """

    def turn_out(src, ld, dst, stride, tokens, features, aligned):
        grid_launch_dependents()
        octets = u32(u32(u32(features) + u32(7)) >> u32(3))
        shift, units = _spread(u32(tokens), octets)
        i = u32(u32(cuda.blockIdx.x) * u32(TURN_THREADS) + u32(cuda.threadIdx.x))
        grid_wait()
        while i < units:
            chunk, octet = _unit(i, shift, octets)
            i = u32(i + u32(cuda.gridDim.x) * u32(TURN_THREADS))
            if u32(chunk * u32(8)) >= u32(tokens):
                continue
            feature = u32(octet * u32(8))
            left = u32(u32(features) - feature)
            w = cuda.local.array(32, u32)  # word q of feature f: tokens 2q and 2q + 1
            at = src + (u64(feature) * ld + u64(chunk) * u64(8)) * u64(2)
            there = u32(u32(tokens) - u32(chunk * u32(8)))
            if left >= u32(8) and there >= u32(8):  # two loops: no choice inside, so all loads are on their way at once
                for f in range(8):
                    four = ld_global_v4(at + u64(f) * ld * u64(2))
                    w[4 * f], w[4 * f + 1], w[4 * f + 2], w[4 * f + 3] = four[0], four[1], four[2], four[3]
            else:
                for f in range(8):
                    row, own = at + u64(f) * ld * u64(2), there if u32(f) < left else u32(0)
                    for q in range(4):
                        low = ld_global_l2_u16_below(row + u64(4 * q), u32(2 * q), own)
                        high = ld_global_l2_u16_below(row + u64(4 * q + 2), u32(2 * q + 1), own)
                        w[4 * f + q] = low_halves(low, high)
            to = dst + (u64(chunk) * u64(8) * stride + u64(feature)) * u64(2)
            for q in range(4):
                token = u32(chunk * u32(8) + u32(2 * q))
                if token < u32(tokens):
                    _store_features(to, low_halves(w[q], w[4 + q]), low_halves(w[8 + q], w[12 + q]),
                                    low_halves(w[16 + q], w[20 + q]), low_halves(w[24 + q], w[28 + q]), left,
                                    aligned != u64(0))  # fmt: skip
                if u32(token + u32(1)) < u32(tokens):
                    _store_features(to + stride * u64(2), high_halves(w[q], w[4 + q]), high_halves(w[8 + q], w[12 + q]),
                                    high_halves(w[16 + q], w[20 + q]), high_halves(w[24 + q], w[28 + q]), left,
                                    aligned != u64(0))  # fmt: skip
                to += stride * u64(4)

    return turn_out
