"""Tokens on the M side of wgmma, v = 16 and 32: one consumer's multiplication and store, for `sm90_consumer.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import cuda
from numba.cuda import types

from .config import ATOM_BYTES, CORE_BYTES, SWIZZLE_128B, Config
from .epilogue import HAS_RESIDUAL, make_activation, make_load_bias, make_load_residual, store_chunk
from .ptx import bar_sync, ld_global_nc_u32, ld_shared_v4, make_wgmma, pack_pair, stmatrix_x4_trans

__all__ = ["make_tokens_side"]

u32, u64, f32 = types.uint32, types.uint64, types.float32


def make_finish(config: Config, i: int) -> Callable[..., Any]:
    """Device function that finishes a warp's 16 tokens of atom i and stages them transposed; one function per i, see
    `make_drain` in `sm90_rows.py`.
    """
    v, own_n = config.v, config.consumer_n
    per_atom, pitch = v // 2, own_n * 2 + 16
    plain = config.epilogue == "plain"
    activation, load_bias = make_activation(config.epilogue), make_load_bias(config.dtype)
    load_residual, pack = make_load_residual(config.dtype), pack_pair[config.dtype]

    def finish(acc, matrix_at, lane, warp, rows, row, bias, column, n, residual, ldr, flags):
        for j in range(v // 16):
            a = i * per_atom + j * 8
            if not plain:
                for e in range(4):  # element e is row 8 * (e / 2) + e % 2 of the group's 16, for tokens t and t + 8
                    packed_row = u32(row + u32(16 * j + 8 * (e // 2) + e % 2) + u32(2) * (lane & u32(3)))
                    own_row = ld_global_nc_u32(rows + u64(packed_row) * u64(4))
                    own_bias = load_bias(bias, own_row, flags)
                    first, second = a + 4 * (e // 2) + e % 2, a + 4 * (e // 2) + e % 2 + 2
                    acc[first] = activation(acc[first] + own_bias)
                    acc[second] = activation(acc[second] + own_bias)
                    if flags & u32(HAS_RESIDUAL):
                        col = u32(column + u32(64 * i) + warp * u32(16) + (lane >> u32(2)))
                        acc[first] += load_residual(residual, own_row, col, n, ldr, flags)[0]
                        acc[second] += load_residual(residual, own_row, u32(col + u32(8)), n, ldr, flags)[0]
            stmatrix_x4_trans(u32(matrix_at + u32(16 * j * pitch + 128 * i)), pack(acc[a], acc[a + 1]),
                              pack(acc[a + 2], acc[a + 3]), pack(acc[a + 4], acc[a + 5]),
                              pack(acc[a + 6], acc[a + 7]))  # fmt: skip

    return cuda.jit(device=True, forceinline=True)(finish)


def make_tokens_side(config: Config) -> tuple[int, Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """(values of `targets`, begin, multiply, store) for `make_consumer`."""
    v, tile_n, tile_k, alternate = config.v, config.tile_n, config.tile_k, config.alternate
    x_bytes, own_n, steps, atoms = config.x_stage_bytes, config.consumer_n, tile_k // 16, config.consumer_n // 64
    per_atom = v // 2
    wgmmas = [make_wgmma(v, config.dtype, first=min(i, atoms - 1) * per_atom, a_mn_major=True) for i in range(4)]
    wgmma0, wgmma1, wgmma2, wgmma3 = wgmmas
    step_a = 16 * ATOM_BYTES >> 4
    step_b = 2 * (v // 8) * CORE_BYTES >> 4
    atom_step = tile_k * ATOM_BYTES >> 4
    desc_a0 = atom_step << 16 | (8 * ATOM_BYTES >> 4) << 32 | SWIZZLE_128B
    desc_b0 = ((v // 8) * CORE_BYTES >> 4) << 16 | (CORE_BYTES >> 4) << 32
    finish0, finish1, finish2, finish3 = (make_finish(config, min(i, atoms - 1)) for i in range(4))
    pitch = own_n * 2 + 16
    row_chunks = own_n // 8
    stores = v * row_chunks // 128  # 16-byte chunks that a thread stores

    @cuda.jit(device=True, forceinline=True)
    def begin(targets, group, column_tile, who, tid, rows, bias, flags):
        own, row, column = u32(tid & u32(127)), u32(group * u32(v)), u32(column_tile * u32(tile_n))
        if not alternate:
            column = u32(column + who * u32(own_n))
        for q in range(stores):
            targets[q] = ld_global_nc_u32(rows + u64(row + u32(own + u32(q * 128)) // u32(row_chunks)) * u64(4))
        return row, column, u32(0), u32(0), f32(0.0), f32(0.0)

    @cuda.jit(device=True, forceinline=True)
    def multiply(acc, stage_at, who):
        a_at = u64(stage_at >> u32(4))
        if not alternate:
            a_at += u64(who) * u64(atoms * atom_step)
        desc_a = u64(desc_a0) | a_at
        desc_b = u64(desc_b0) | u64(u32(stage_at + u32(x_bytes)) >> u32(4))
        for step in range(steps):
            at = desc_a + u64(step * step_a)
            wgmma0(acc, at, desc_b + u64(step * step_b))
            if atoms > 1:
                wgmma1(acc, at + u64(atom_step), desc_b + u64(step * step_b))
            if atoms > 2:
                wgmma2(acc, at + u64(2 * atom_step), desc_b + u64(step * step_b))
                wgmma3(acc, at + u64(3 * atom_step), desc_b + u64(step * step_b))

    @cuda.jit(device=True, forceinline=True)
    def store(acc, targets, begun, staging, who, tid, n, out, rows, bias, residual, ldo, ldr, flags):
        own, lane, warp = u32(tid & u32(127)), u32(tid & u32(31)), u32((tid >> u32(5)) & u32(3))
        row, column = begun[0], begun[1]
        staging = u32(staging + who * u32(v * pitch))
        matrix_at = u32(staging + (u32(8) * (lane >> u32(4)) + (lane & u32(7))) * u32(pitch)
                        + (warp * u32(16) + u32(8) * ((lane >> u32(3)) & u32(1))) * u32(2))  # fmt: skip
        finish0(acc, matrix_at, lane, warp, rows, row, bias, column, n, residual, ldr, flags)
        if atoms > 1:
            finish1(acc, matrix_at, lane, warp, rows, row, bias, column, n, residual, ldr, flags)
        if atoms > 2:
            finish2(acc, matrix_at, lane, warp, rows, row, bias, column, n, residual, ldr, flags)
            finish3(acc, matrix_at, lane, warp, rows, row, bias, column, n, residual, ldr, flags)
        bar_sync(u32(who + u32(1)), u32(128))
        for q in range(stores):
            index = u32(own + u32(q * 128))
            w = ld_shared_v4(u32(staging + index // u32(row_chunks) * u32(pitch) + index % u32(row_chunks) * u32(16)))
            store_chunk(w[0], w[1], w[2], w[3], targets[q], u32(column + index % u32(row_chunks) * u32(8)), n, out, ldo,
                        flags)  # fmt: skip
        bar_sync(u32(who + u32(1)), u32(128))

    return stores, begin, multiply, store
