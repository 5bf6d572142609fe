"""Weights on the M side of wgmma, v = 64 and 128: one consumer's multiplication and store, for `sm90_consumer.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import cuda
from numba.cuda import types

from .config import ATOM_BYTES, CORE_BYTES, SWIZZLE_128B, Config
from .epilogue import HAS_RESIDUAL, make_activation, make_load_bias, make_load_residual, store_chunk
from .ptx import ld_global_nc_u32, ld_shared_v4, make_wgmma, pack_pair, stmatrix_x4, warp_sync

__all__ = ["make_rows_side"]

u32, u64, f32 = types.uint32, types.uint64, types.float32

STAGING_PITCH = 144  # bytes: 64 columns and a chunk more, so that 8 rows fall into different banks


def make_drain(config: Config, h: int) -> Callable[..., Any]:
    """Device function that finishes and stores columns 64h..64h+63 of a warp's 16 rows.

    One function per h: as a loop, the body with an activation is more than the optimiser unrolls, and accumulators that
    are indexed at run time go to local memory.
    """
    plain = config.epilogue == "plain"
    activation, pack = make_activation(config.epilogue), pack_pair[config.dtype]
    load_residual = make_load_residual(config.dtype)

    def drain(acc, targets, matrix_at, chunk_at, lane, row_low, row_high, bias_low, bias_high, column, n, out,
              residual, ldo, ldr, flags):  # fmt: skip
        if not plain:  # all 32 at once: nothing between them that keeps the scheduler from overlapping them
            for e in range(8):
                a = (h * 8 + e) * 4
                acc[a] = activation(acc[a] + bias_low)
                acc[a + 1] = activation(acc[a + 1] + bias_low)
                acc[a + 2] = activation(acc[a + 2] + bias_high)
                acc[a + 3] = activation(acc[a + 3] + bias_high)
            if flags & u32(HAS_RESIDUAL):
                for e in range(8):
                    a = (h * 8 + e) * 4
                    col = u32(column + u32(64 * h + 8 * e) + (lane & u32(3)) * u32(2))
                    r0, r1 = load_residual(residual, row_low, col, n, ldr, flags)
                    r2, r3 = load_residual(residual, row_high, col, n, ldr, flags)
                    acc[a] += r0
                    acc[a + 1] += r1
                    acc[a + 2] += r2
                    acc[a + 3] += r3
        for j in range(4):
            a = (h * 8 + j * 2) * 4
            stmatrix_x4(u32(matrix_at + u32(32 * j)), pack(acc[a], acc[a + 1]), pack(acc[a + 2], acc[a + 3]),
                        pack(acc[a + 4], acc[a + 5]), pack(acc[a + 6], acc[a + 7]))  # fmt: skip
        warp_sync()
        for q in range(4):
            w = ld_shared_v4(u32(chunk_at + u32(q * 4 * STAGING_PITCH)))
            col = u32(column + u32(64 * h) + (lane & u32(7)) * u32(8))
            store_chunk(w[0], w[1], w[2], w[3], targets[q], col, n, out, ldo, flags)
        warp_sync()

    return cuda.jit(device=True, forceinline=True)(drain)


def make_rows_side(config: Config) -> tuple[int, Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """(values of `targets`, begin, multiply, store) for `make_consumer`."""
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
    plain = config.epilogue == "plain"
    load_bias = make_load_bias(config.dtype)
    drain0, drain1, drain2, drain3 = (make_drain(config, min(h, warp_n // 64 - 1)) for h in range(4))

    @cuda.jit(device=True, forceinline=True)
    def begin(targets, group, column_tile, who, tid, rows, bias, flags):
        lane, warp = u32(tid & u32(31)), u32((tid >> u32(5)) & u32(3))
        row = u32(group * u32(v) + warp * u32(16))
        column = u32(column_tile * u32(tile_n))
        if row_splits == 2:
            row = u32(row + who * u32(64))
        elif not alternate:
            column = u32(column + who * u32(warp_n))
        for q in range(4):
            targets[q] = ld_global_nc_u32(rows + u64(row + u32(4 * q) + (lane >> u32(3))) * u64(4))
        row_low, row_high, bias_low, bias_high = u32(0), u32(0), f32(0.0), f32(0.0)
        if not plain:
            row_low = ld_global_nc_u32(rows + u64(row + (lane >> u32(2))) * u64(4))
            row_high = ld_global_nc_u32(rows + u64(row + (lane >> u32(2)) + u32(8)) * u64(4))
            bias_low, bias_high = load_bias(bias, row_low, flags), load_bias(bias, row_high, flags)
        return row, column, row_low, row_high, bias_low, bias_high

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
    def store(acc, targets, begun, staging, who, tid, n, out, rows, bias, residual, ldo, ldr, flags):
        lane = u32(tid & u32(31))
        own = u32(staging + ((tid >> u32(5)) - u32(4 * producers)) * u32(16 * STAGING_PITCH))
        matrix_at = u32(own + (lane & u32(15)) * u32(STAGING_PITCH) + (lane >> u32(4)) * u32(16))
        chunk_at = u32(own + (lane >> u32(3)) * u32(STAGING_PITCH) + (lane & u32(7)) * u32(16))
        column, row_low, row_high, bias_low, bias_high = begun[1], begun[2], begun[3], begun[4], begun[5]
        drain0(acc, targets, matrix_at, chunk_at, lane, row_low, row_high, bias_low, bias_high, column, n, out,
               residual, ldo, ldr, flags)  # fmt: skip
        if warp_n > 64:
            drain1(acc, targets, matrix_at, chunk_at, lane, row_low, row_high, bias_low, bias_high, column, n, out,
                   residual, ldo, ldr, flags)  # fmt: skip
        if warp_n > 128:
            drain2(acc, targets, matrix_at, chunk_at, lane, row_low, row_high, bias_low, bias_high, column, n, out,
                   residual, ldo, ldr, flags)  # fmt: skip
            drain3(acc, targets, matrix_at, chunk_at, lane, row_low, row_high, bias_low, bias_high, column, n, out,
                   residual, ldo, ldr, flags)  # fmt: skip

    return 4, begin, multiply, store
