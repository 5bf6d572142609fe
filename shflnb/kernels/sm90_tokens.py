"""Tokens on the M side of wgmma, v = 16 and 32: one consumer's multiplication and store, for `sm90_consumer.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import cuda
from numba.cuda import types

from .config import ATOM_BYTES, CORE_BYTES, SWIZZLE_128B, Config
from .epilogue import HAS_RESIDUAL, fetch_chunk, make_activation, make_bias_value, store_chunk
from .ptx import (
    bar_sync,
    ld_global_nc_u32,
    ld_global_nc_v2,
    ld_shared_u16,
    make_wgmma,
    pack_pair,
    stmatrix_x4_trans,
    unpack_low,
)

__all__ = ["make_tokens_side"]

u32, u64, f32 = types.uint32, types.uint64, types.float32


def make_finish(config: Config, i: int) -> Callable[..., Any]:
    """Device function that finishes a warp's 16 tokens of atom i and stages them transposed; one function per i, since
    accumulators that are indexed at run time go to local memory.
    """
    v, own_n = config.v, config.consumer_n
    per_atom, pitch = v // 2, own_n * 2 + 16
    plain = config.epilogue == "plain"
    activation, bias_value = make_activation(config.epilogue), make_bias_value(config.dtype)
    low, pack = unpack_low[config.dtype], pack_pair[config.dtype]

    def finish(acc, words, own_at, matrix_at, flags):
        for j in range(v // 16):
            a = i * per_atom + j * 8
            if not plain:
                for e in range(4):  # element e is row 8 * (e / 2) + e % 2 of the group's 16, for tokens t and t + 8
                    own_bias = bias_value(words[4 * j + e], flags)
                    first, second = a + 4 * (e // 2) + e % 2, a + 4 * (e // 2) + e % 2 + 2
                    acc[first] = activation(acc[first] + own_bias)
                    acc[second] = activation(acc[second] + own_bias)
                    if flags & u32(HAS_RESIDUAL):
                        at = u32(own_at + u32((16 * j + 8 * (e // 2) + e % 2) * pitch + 128 * i))
                        acc[first] += low(u32(ld_shared_u16(at)))
                        acc[second] += low(u32(ld_shared_u16(u32(at + u32(16)))))
            stmatrix_x4_trans(u32(matrix_at + u32(16 * j * pitch + 128 * i)), pack(acc[a], acc[a + 1]),
                              pack(acc[a + 2], acc[a + 3]), pack(acc[a + 4], acc[a + 5]),
                              pack(acc[a + 6], acc[a + 7]))  # fmt: skip

    return cuda.jit(device=True, forceinline=True)(finish)


def make_tokens_side(config: Config) -> tuple[int, int, Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """(values of `targets`, of `owners`, ask, multiply, store) for `make_consumer`."""
    v, tile_n, tile_k, alternate = config.v, config.tile_n, config.tile_k, config.alternate
    x_bytes, own_n, steps, atoms = config.x_stage_bytes, config.consumer_n, tile_k // 16, config.consumer_n // 64
    per_atom = v // 2
    wgmmas = [make_wgmma(v, config.dtype, first=min(i, atoms - 1) * per_atom, a_mn_major=True) for i in range(4)]
    wgmma0, wgmma1, wgmma2, wgmma3 = wgmmas
    step_a = 16 * ATOM_BYTES >> 4
    step_b = 2 * (v // 8) * CORE_BYTES >> 4
    atom_step = tile_k * ATOM_BYTES >> 4
    # halves of descriptors; nothing is carried from the lower ones, whose sums are made in uniform registers
    low_a0, high_a = atom_step << 16, (8 * ATOM_BYTES >> 4) << 32 | SWIZZLE_128B
    low_b0, high_b = ((v // 8) * CORE_BYTES >> 4) << 16, (CORE_BYTES >> 4) << 32
    finish0, finish1, finish2, finish3 = (make_finish(config, min(i, atoms - 1)) for i in range(4))
    pitch = own_n * 2 + 16
    row_chunks = own_n // 8
    stores = v * row_chunks // 128  # 16-byte chunks that a thread stores

    plain = config.epilogue == "plain"

    @cuda.jit(device=True, forceinline=True)
    def ask(targets, owners, group, who, tid, rows):
        own, lane, row = u32(tid & u32(127)), u32(tid & u32(31)), u32(group * u32(v))
        for q in range(stores):
            targets[q] = ld_global_nc_u32(rows + u64(row + u32(own + u32(q * 128)) // u32(row_chunks)) * u64(4))
        if not plain:
            for pair in range(v // 8):
                two = ld_global_nc_v2(rows + u64(row + u32(8 * pair) + u32(2) * (lane & u32(3))) * u64(4))
                owners[2 * pair], owners[2 * pair + 1] = two[0], two[1]

    @cuda.jit(device=True, forceinline=True)
    def multiply(acc, stage_at, who):
        a_at = u32(stage_at >> u32(4))
        if not alternate:
            a_at = u32(a_at + who * u32(atoms * atom_step))
        low_a, low_b = u32(a_at | u32(low_a0)), u32(u32(u32(stage_at + u32(x_bytes)) >> u32(4)) | u32(low_b0))
        for step in range(steps):
            at, own_b = u32(low_a + u32(step * step_a)), u64(u32(low_b + u32(step * step_b))) | u64(high_b)
            wgmma0(acc, u64(at) | u64(high_a), own_b)
            if atoms > 1:
                wgmma1(acc, u64(u32(at + u32(atom_step))) | u64(high_a), own_b)
            if atoms > 2:
                wgmma2(acc, u64(u32(at + u32(2 * atom_step))) | u64(high_a), own_b)
                wgmma3(acc, u64(u32(at + u32(3 * atom_step))) | u64(high_a), own_b)

    @cuda.jit(device=True, forceinline=True)
    def store(acc, targets, words, column_tile, staging, who, tid, n, out, residual, ldo, ldr, flags):
        own, lane, warp = u32(tid & u32(127)), u32(tid & u32(31)), u32((tid >> u32(5)) & u32(3))
        column = u32(column_tile * u32(tile_n))
        if not alternate:
            column = u32(column + who * u32(own_n))
        staging = u32(staging + who * u32(v * pitch))
        matrix_at = u32(staging + (u32(8) * (lane >> u32(4)) + (lane & u32(7))) * u32(pitch)
                        + (warp * u32(16) + u32(8) * ((lane >> u32(3)) & u32(1))) * u32(2))  # fmt: skip
        own_at = u32(staging + u32(2) * (lane & u32(3)) * u32(pitch) + (warp * u32(16) + (lane >> u32(2))) * u32(2))
        if not plain:  # noqa: SIM102 (a condition on its own is known when the kernel is compiled)
            if flags & u32(HAS_RESIDUAL):  # it comes through the shared memory that the results go through
                for q in range(stores):
                    line, chunk = u32(u32(own + u32(q * 128)) // u32(row_chunks)), u32(own % u32(row_chunks))
                    fetch_chunk(u32(staging + line * u32(pitch) + chunk * u32(16)), targets[q],
                                u32(column + chunk * u32(8)), n, residual, ldr, flags)  # fmt: skip
                bar_sync(u32(who + u32(1)), u32(128))
        finish0(acc, words, own_at, matrix_at, flags)
        if atoms > 1:
            finish1(acc, words, own_at, matrix_at, flags)
        if atoms > 2:
            finish2(acc, words, own_at, matrix_at, flags)
            finish3(acc, words, own_at, matrix_at, flags)
        bar_sync(u32(who + u32(1)), u32(128))
        for q in range(stores):
            line, chunk = u32(u32(own + u32(q * 128)) // u32(row_chunks)), u32(own % u32(row_chunks))
            store_chunk(u32(staging + line * u32(pitch) + chunk * u32(16)), targets[q], u32(column + chunk * u32(8)), n,
                        out, ldo, flags)  # fmt: skip
        bar_sync(u32(who + u32(1)), u32(128))

    return stores, v // 4, ask, multiply, store
