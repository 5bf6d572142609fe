"""The second half of the few-column product: slots of partial sums -> results. See `skinny_mma.py`.

A slot holds the sums of one piece, [strip][chunk][lane][4 values], as mma.m16n8k16 leaves them in registers. The slots
of an item are added in the order of its entries, whoever adds them, so that the result never changes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import cuda
from numba.cuda import types

from .epilogue import HAS_RESIDUAL, NO_ROW, make_activation, make_load_bias
from .ptx import (
    cp_async_16_whole,
    cp_async_commit,
    cp_async_wait,
    div_u32,
    ld_global_nc_u32,
    ld_global_u16,
    ld_shared_u32,
    pack_pair,
    smem_address,
    st_global_u16,
    unpack_low,
)
from .ptx_cluster import (
    ld_cluster_v4_f32_if,
    ld_global_cg_v4_f32_if,
    ld_shared_v4_f32_if,
    min_u32,
    rank_address,
    st_global_u32,
    st_global_v4_f32,
    st_shared_v4_f32,
)
from .skinny_choice import SkinnyConfig

__all__ = ["OUT_PAIRS", "make_copy_table", "make_flush", "make_load_rows", "make_skinny_sum", "make_sum_slots"]

u16, u32, u64, f32 = types.uint16, types.uint32, types.uint64, types.float32

OUT_PAIRS = (
    64  # bit of `flags` beside those of epilogue.py: tokens of out are contiguous, features start at 4-byte boundaries
)


def make_flush(config: SkinnyConfig) -> Callable[..., Any]:
    """Device function that moves the sums of a piece to its slot and starts again at 0."""
    tiles, is_shared = config.strips * config.chunks, config.slots != "global"

    def flush(acc, to_shared, to_global):
        for t in range(tiles):
            if is_shared:
                st_shared_v4_f32(
                    u32(to_shared + u32(512 * t)), acc[4 * t], acc[4 * t + 1], acc[4 * t + 2], acc[4 * t + 3]
                )
            else:
                st_global_v4_f32(to_global + u64(512 * t), acc[4 * t], acc[4 * t + 1], acc[4 * t + 2], acc[4 * t + 3])
            acc[4 * t] = f32(0.0)
            acc[4 * t + 1] = f32(0.0)
            acc[4 * t + 2] = f32(0.0)
            acc[4 * t + 3] = f32(0.0)

    return cuda.jit(device=True, forceinline=True)(flush)


def make_store_pair(config: SkinnyConfig) -> Callable[..., Any]:
    """Device function that adds the residual to two tokens of a row, rounds, and stores those that exist."""
    pack, low = pack_pair[config.dtype], unpack_low[config.dtype]
    plain = config.epilogue == "plain"

    def store_pair(first, second, row, token, n, out, ot, of, residual, rt, rf, flags):
        if row != u32(NO_ROW) and token < n:
            has_second = u32(token + u32(1)) < n
            if not plain:  # noqa: SIM102 (a condition on its own is known when the kernel is compiled)
                if flags & u32(HAS_RESIDUAL):
                    at = residual + (u64(row) * rf + u64(token) * rt) * u64(2)
                    first = first + low(u32(ld_global_u16(at)))
                    if has_second:
                        second = second + low(u32(ld_global_u16(at + rt * u64(2))))
            halves = pack(first, second)
            to = out + (u64(row) * of + u64(token) * ot) * u64(2)
            if has_second and (flags & u32(OUT_PAIRS)) != u32(0):
                st_global_u32(to, halves)
            else:
                st_global_u16(to, u16(halves & u32(0xFFFF)))
                if has_second:
                    st_global_u16(to + ot * u64(2), u16(halves >> u32(16)))

    return cuda.jit(device=True, forceinline=True)(store_pair)


def make_load_slot(config: SkinnyConfig) -> Callable[..., Any]:
    """Device function: the 4 values of this lane in a tile of the slot that an entry names; zeros unless `exists`."""
    slot_bytes, is_shared, is_cluster = config.slot_bytes, config.slots != "global", config.finish == "cluster"

    def load_slot(entry, exists, shared_at, global_at, slots):
        rank, slot = u32(entry >> u32(16)), u32(entry & u32(0xFFFF))
        if is_shared:
            at = u32(shared_at + slot * u32(slot_bytes))
            if is_cluster:
                return ld_cluster_v4_f32_if(rank_address(at, rank), exists)
            return ld_shared_v4_f32_if(at, exists)
        return ld_global_cg_v4_f32_if(global_at + u64(u32(rank * slots + slot)) * u64(slot_bytes), exists)

    return cuda.jit(device=True, forceinline=True)(load_slot)


def make_load_rows(config: SkinnyConfig) -> Callable[..., Any]:
    """Device function: rows of this lane in a 16 x 8 tile, NO_ROW beyond the last; `first` is the team's first item."""
    tiles_of_item, chunks, item_rows = config.strips * config.chunks, config.chunks, 16 * config.strips

    def load_rows(rows, first, tile, tiles, lane):
        low, high = u32(NO_ROW), u32(NO_ROW)
        if tile < tiles:
            item, part = u32(first + u32(tile // u32(tiles_of_item))), u32(tile % u32(tiles_of_item))
            at = rows + u64(u32(item * u32(item_rows) + u32(part // u32(chunks)) * u32(16) + (lane >> u32(2)))) * u64(4)
            low = ld_global_nc_u32(at)
            high = ld_global_nc_u32(at + u64(32))
        return low, high

    return cuda.jit(device=True, forceinline=True)(load_rows)


def make_sum_slots(config: SkinnyConfig) -> Callable[..., Any]:
    """Device function: a warp adds the slots of every ranks * warps-th 16 x 8 tile, in order, and stores the result.

    `table` is the team's row of the layout's `team_table` in shared memory, `tile` the warp's first. Eight slots are
    asked for at a time: one after the other, their latencies were three quarters of a product with 64 columns (H200,
    2026-11).
    """
    tiles_of_item, chunks, warps = config.strips * config.chunks, config.chunks, config.warps
    plain = config.epilogue == "plain"
    activation, load_bias = make_activation(config.epilogue), make_load_bias(config.dtype)
    store_pair, load_slot, load_rows = make_store_pair(config), make_load_slot(config), make_load_rows(config)

    def sum_slots(table, tile, low_row, high_row, ranks, lane, rows, slot_at, work_at, slots, n, out, ot, of, bias,
                  residual,
                  rt, rf, flags):  # fmt: skip
        first = ld_shared_u32(table)
        tiles = u32(ld_shared_u32(u32(table + u32(4))) * u32(tiles_of_item))
        values = cuda.local.array(32, f32)
        while tile < tiles:
            item = u32(tile // u32(tiles_of_item))
            part = u32(tile % u32(tiles_of_item))
            tile = u32(tile + ranks * u32(warps))
            next_rows = load_rows(rows, first, tile, tiles, lane)  # asked for early: they may come from device memory
            entry = u32(table + ld_shared_u32(u32(table + u32(8) + item * u32(4))) * u32(4))
            end = u32(table + ld_shared_u32(u32(table + u32(12) + item * u32(4))) * u32(4))
            offset = u32(part * u32(512) + lane * u32(16))
            s0, s1, s2, s3 = f32(0.0), f32(0.0), f32(0.0), f32(0.0)
            while entry < end:
                for j in range(8):
                    at = min_u32(u32(entry + u32(4 * j)), u32(end - u32(4)))
                    exists = u32(1) if u32(entry + u32(4 * j)) < end else u32(0)
                    four = load_slot(ld_shared_u32(at), exists, u32(slot_at + offset), work_at + u64(offset), slots)
                    values[4 * j] = four[0]
                    values[4 * j + 1] = four[1]
                    values[4 * j + 2] = four[2]
                    values[4 * j + 3] = four[3]
                for j in range(8):
                    s0 += values[4 * j]
                    s1 += values[4 * j + 1]
                    s2 += values[4 * j + 2]
                    s3 += values[4 * j + 3]
                entry = u32(entry + u32(32))
            token = u32(u32(part % u32(chunks)) * u32(8) + (lane & u32(3)) * u32(2))
            low_bias, high_bias = f32(0.0), f32(0.0)
            if not plain:
                low_bias, high_bias = load_bias(bias, low_row, flags), load_bias(bias, high_row, flags)
            store_pair(
                activation(s0 + low_bias),
                activation(s1 + low_bias),
                low_row,
                token,
                n,
                out,
                ot,
                of,
                residual,
                rt,
                rf,
                flags,
            )
            store_pair(
                activation(s2 + high_bias),
                activation(s3 + high_bias),
                high_row,
                token,
                n,
                out,
                ot,
                of,
                residual,
                rt,
                rf,
                flags,
            )
            low_row, high_row = next_rows[0], next_rows[1]

    return cuda.jit(device=True, forceinline=True)(sum_slots)


def make_copy_table(config: SkinnyConfig) -> Callable[..., Any]:
    """Device function that starts the copy of a team's table to shared memory."""
    threads = config.threads

    def copy_table(to, source, words, tid):
        i = u32(tid * u32(4))
        while i < words:
            cp_async_16_whole(u32(to + i * u32(4)), source + u64(i) * u64(4))
            i = u32(i + u32(4 * threads))

    return cuda.jit(device=True, forceinline=True)(copy_table)


def make_skinny_sum(config: SkinnyConfig) -> Callable[..., Any]:
    """The second kernel of finish="none": slots in global memory -> results; arguments and grid as for the first."""
    slot_bytes = config.slot_bytes
    warps, tiles_of_item = config.warps, config.strips * config.chunks
    sum_slots, copy_table, wait_all = make_sum_slots(config), make_copy_table(config), cp_async_wait[0]
    load_rows = make_load_rows(config)

    def skinny_sum(records, warp_table, windows, team_table, rows, x, out, bias, residual, work,
                   xt, xf, ot, of, rt, rf, sizes, shape, team_words):  # fmt: skip
        table = smem_address(cuda.shared.array(0, types.uint8))
        tid = u32(cuda.threadIdx.x)
        lane, warp, block = u32(tid & u32(31)), u32(tid >> u32(5)), u32(cuda.blockIdx.x)
        n, flags = u32(sizes & u64(0xFFFF)), u32((sizes >> u64(16)) & u64(0xFFFF))
        ranks, slots = u32(shape & u64(0xFFFF)), u32(shape >> u64(48))
        team = div_u32(block, ranks)
        tile = u32(u32(block - team * ranks) * u32(warps) + warp)
        copy_table(table, team_table + u64(team) * team_words * u64(4), u32(team_words), tid)
        cp_async_commit()
        wait_all()
        cuda.syncthreads()
        own_rows = load_rows(
            rows, ld_shared_u32(table), tile, u32(ld_shared_u32(u32(table + u32(4))) * u32(tiles_of_item)), lane
        )
        work_at = work + u64(u32(team * ranks * slots)) * u64(slot_bytes)
        sum_slots(table, tile, own_rows[0], own_rows[1], ranks, lane, rows, u32(0), work_at, slots, n, out, ot, of,
                  bias,
                  residual, rt, rf, flags)  # fmt: skip

    return skinny_sum
