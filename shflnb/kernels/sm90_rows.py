"""Weights on the M side of wgmma, v = 64 and 128: one consumer's multiplication and store, for `sm90_consumer.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import cuda
from numba.cuda import types

from .config import ATOM_BYTES, CORE_BYTES, SWIZZLE_128B, Config
from .epilogue import (
    ALIGNED,
    HAS_RESIDUAL,
    NO_ROW,
    fetch_chunk,
    make_activation,
    make_add_residual,
    make_bias_value,
    store_chunk,
)
from .ptx import (
    ld_global_nc_u32,
    ld_shared_v4,
    make_wgmma,
    no_unroll,
    opaque,
    pack_pair,
    st_global_v4_unless,
    stmatrix_x4,
    warp_sync,
)

__all__ = ["make_rows_side"]

u32, u64, f32 = types.uint32, types.uint64, types.float32

ROUND = 128  # columns that a round of the loop over a tile's results stores; 64 where a tile is not a multiple of them
STAGING_PITCH = 144  # bytes: 64 columns and a chunk more, so that 8 rows fall into different banks


@cuda.jit(device=True, forceinline=True)
def one_of(four, i):
    """Element i of an array of four, which stays in registers."""
    first = four[1] if i & u32(1) else four[0]
    second = four[3] if i & u32(1) else four[2]
    return second if i & u32(2) else first


def make_drain(config: Config) -> Callable[..., Any]:
    """Device function that finishes and stores 64 columns of a warp's 16 rows, from 32 accumulators, `first` and on.

    `targets` are the rows of the four chunks that a thread stores, `places` their addresses. Kept short, for the
    instruction cache: what only unaligned or cut rows need is in loops, and a residual comes through the same shared
    memory as the results go.
    """
    plain, is_partial = config.epilogue == "plain", config.consumer_n % 64 != 0
    activation, pack = make_activation(config.epilogue), pack_pair[config.dtype]
    add_residual = make_add_residual(config.dtype, STAGING_PITCH)

    @cuda.jit(device=True, forceinline=True)
    def drain(acc, first, targets, places, own, lane, bias_low, bias_high, column, n, out, residual, ldo, ldr, flags):
        chunk_at = u32(own + (lane >> u32(3)) * u32(STAGING_PITCH) + (lane & u32(7)) * u32(16))
        col = u32(column + (lane & u32(7)) * u32(8))
        if not plain:  # all 32 at once: nothing between them that keeps the scheduler from overlapping them
            for e in range(8):
                a = first + 4 * e
                acc[a] = activation(acc[a] + bias_low)
                acc[a + 1] = activation(acc[a + 1] + bias_low)
                acc[a + 2] = activation(acc[a + 2] + bias_high)
                acc[a + 3] = activation(acc[a + 3] + bias_high)
            if flags & u32(HAS_RESIDUAL):
                q = u32(0)
                while q < u32(4):
                    no_unroll()
                    fetch_chunk(u32(chunk_at + q * u32(4 * STAGING_PITCH)), one_of(targets, q), col, n, residual, ldr,
                                flags)  # fmt: skip
                    q = opaque(u32(q + u32(1)))
                warp_sync()
                pair_at = u32(own + (lane >> u32(2)) * u32(STAGING_PITCH) + (lane & u32(3)) * u32(4))
                for e in range(8):
                    add_residual(acc, first + 4 * e, u32(pair_at + u32(16 * e)))
                warp_sync()
        matrix_at = u32(own + (lane & u32(15)) * u32(STAGING_PITCH) + (lane >> u32(4)) * u32(16))
        for j in range(4):
            a = first + 8 * j
            stmatrix_x4(u32(matrix_at + u32(32 * j)), pack(acc[a], acc[a + 1]), pack(acc[a + 2], acc[a + 3]),
                        pack(acc[a + 4], acc[a + 5]), pack(acc[a + 6], acc[a + 7]))  # fmt: skip
        warp_sync()
        if is_partial:
            is_whole = flags & u32(ALIGNED) and (n & u32(7)) == u32(0)
        else:
            is_whole = flags & u32(ALIGNED) and u32(column + u32(64)) <= n
        if is_whole:
            w = cuda.local.array(16, u32)
            for q in range(4):
                four = ld_shared_v4(u32(chunk_at + u32(q * 4 * STAGING_PITCH)))
                w[4 * q], w[4 * q + 1], w[4 * q + 2], w[4 * q + 3] = four[0], four[1], four[2], four[3]
            for q in range(4):
                row = targets[q]
                if is_partial:
                    row = row if col < n else u32(NO_ROW)
                st_global_v4_unless(places[q] + u64(col) * u64(2), w[4 * q], w[4 * q + 1], w[4 * q + 2], w[4 * q + 3],
                                    row, u32(NO_ROW))  # fmt: skip
        else:
            q = u32(0)
            while q < u32(4):
                no_unroll()
                store_chunk(u32(chunk_at + q * u32(4 * STAGING_PITCH)), one_of(targets, q), col, n, out, ldo, flags)
                q = opaque(u32(q + u32(1)))
        warp_sync()

    return drain


def make_rows_side(config: Config) -> tuple[int, int, Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """(values of `targets`, of `owners`, ask, multiply, store) for `make_consumer`."""
    v, tile_n, tile_k = config.v, config.tile_n, config.tile_k
    x_bytes, warp_n, row_splits = config.x_stage_bytes, config.consumer_n, config.row_splits
    steps, producers, alternate = tile_k // 16, config.producers, config.alternate
    wgmma = make_wgmma(warp_n, config.dtype, b_mn_major=True)
    step_a = 2 * (v // 8) * CORE_BYTES >> 4
    step_b = 16 * ATOM_BYTES >> 4
    # leading offset: core matrices along k; stride offset: along rows
    desc_a0 = ((v // 8) * CORE_BYTES >> 4) << 16 | (CORE_BYTES >> 4) << 32
    # leading offset: 64-token atoms; stride offset: 8 rows of k
    desc_b0 = (tile_k * ATOM_BYTES >> 4) << 16 | (8 * ATOM_BYTES >> 4) << 32 | SWIZZLE_128B
    drain, drains = make_drain(config), ROUND // 64 if warp_n % ROUND == 0 else 1
    is_partial = warp_n % 64 != 0
    plain, bias_value = config.epilogue == "plain", make_bias_value(config.dtype)

    @cuda.jit(device=True, forceinline=True)
    def ask(targets, owners, group, who, tid, rows):
        lane, warp = u32(tid & u32(31)), u32((tid >> u32(5)) & u32(3))
        row = u32(group * u32(v) + warp * u32(16))
        if row_splits == 2:
            row = u32(row + who * u32(64))
        for q in range(4):
            targets[q] = ld_global_nc_u32(rows + u64(row + u32(4 * q) + (lane >> u32(3))) * u64(4))
        if not plain:
            owners[0] = ld_global_nc_u32(rows + u64(row + (lane >> u32(2))) * u64(4))
            owners[1] = ld_global_nc_u32(rows + u64(row + (lane >> u32(2)) + u32(8)) * u64(4))

    @cuda.jit(device=True, forceinline=True)
    def multiply(acc, stage_at, who):
        a_at, b_at = u32(stage_at + u32(x_bytes)), stage_at
        if row_splits == 2:
            a_at = u32(a_at + who * u32(8 * CORE_BYTES))
        elif not alternate:
            b_at = u32(b_at + who * u32(warp_n // 64 * tile_k * ATOM_BYTES))
        desc_a, desc_b = u64(desc_a0) | u64(a_at >> u32(4)), u64(desc_b0) | u64(b_at >> u32(4))
        for step in range(steps):
            wgmma(acc, desc_a + u64(step * step_a), desc_b + u64(step * step_b))

    @cuda.jit(device=True, forceinline=True)
    def store(acc, targets, words, column_tile, staging, who, tid, n, out, residual, ldo, ldr, flags):
        lane = u32(tid & u32(31))
        own = u32(staging + ((tid >> u32(5)) - u32(4 * producers)) * u32(16 * STAGING_PITCH))
        column = u32(column_tile * u32(tile_n))
        if row_splits == 1 and not alternate:
            column = u32(column + who * u32(warp_n))
        low, high = f32(0.0), f32(0.0)
        if not plain:
            low, high = bias_value(words[0], flags), bias_value(words[1], flags)
        places = cuda.local.array(4, u64)
        for q in range(4):
            places[q] = out + u64(targets[q]) * ldo * u64(2)
        end = min(u32(column + u32(warp_n)), n)
        bound = end if is_partial else n  # what is drained beyond the tile is the next tile's
        while column < end:  # as a loop, since the code of a whole tile is more than the instruction cache holds
            no_unroll()
            for d in range(drains):
                drain(acc, 32 * d, targets, places, own, lane, low, high, u32(column + u32(64 * d)), bound, out,
                      residual, ldo, ldr, flags)  # fmt: skip
            for r in range(warp_n // 2 - 32 * drains):  # constant indices: accumulators stay in registers
                acc[r] = acc[r + 32 * drains]
            column = opaque(u32(column + u32(64 * drains)))

    return 4, 2, ask, multiply, store
