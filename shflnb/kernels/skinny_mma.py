"""Shfl-BW product with few columns (n <= 64), bound by the bytes of the weights: they are read once, front to back.

    out[row_perm[g*v:(g+1)*v], :] = values[g].T @ x[indices[g], :]          for every group g

    block = rank of a team     +-- window of x, shared memory: [row][8 tokens, 16 B], swizzled, and a row of zeros
      warp 0  ring of records  |   every record: weights straight into operand A,
      warp 1  ring of records  |                 places -> ldmatrix.trans rows -> operand B;
      ...                      |   sums stay in registers until a piece ends, then go to its slot
                               +-- slots; barrier of the team; every warp adds the slots of some 16 x 8 tiles

Each warp streams its records (see `formats.skinny_layout`) through a private ring of cp.async stages, so the main loop
has no barrier; what a lane copies it reads itself, except for the column places. x and out are read and written through
two strides, so token-major and feature-major are the same to this kernel.
Needs capability 8.0; finish="cluster" and chained launches need 9.0.
Source: PTX ISA, "Matrix fragments for mma.m16n8k16", ldmatrix, cp.async, barrier.cluster, griddepcontrol.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import cuda
from numba.cuda import types

from .ptx import (
    cp_async_commit,
    cp_async_wait,
    div_u32,
    ld_global_nc_u32,
    ld_global_nc_v4,
    ld_global_u16,
    ld_shared_u16,
    ld_shared_v4,
    ldmatrix_x2_trans,
    ldmatrix_x4_trans,
    make_mma_m16n8k16,
    smem_address,
    st_shared_v4,
    warp_sync,
)
from .ptx_cluster import (
    cluster_arrive,
    cluster_wait,
    cp_async_16_if,
    cp_async_16_streamed,
    grid_launch_dependents,
    grid_wait,
    high_halves,
    ld_global_nc_v4_if,
    low_halves,
    min_u32,
)
from .skinny_choice import SkinnyConfig
from .skinny_sum import make_copy_table, make_flush, make_load_rows, make_sum_slots

__all__ = ["FEATURE_CHUNKS", "TOKEN_CHUNKS", "make_skinny"]

u16, u32, u64, f32 = types.uint16, types.uint32, types.uint64, types.float32

# bits of `flags` beside those of epilogue.py
TOKEN_CHUNKS = 16  # x: features contiguous, tokens start at 16-byte boundaries
FEATURE_CHUNKS = 32  # x: tokens contiguous, features start at 16-byte boundaries
LAST_STEP, PLACE = 0x8000, 0x7FFF


def make_load_window(config: SkinnyConfig) -> Callable[..., Any]:
    """Device function that brings rows k0 .. k0 + rows - 1 of x into shared memory, 8 rows x 8 tokens a thread.

    Row r of the window stands at place p (see `place_of_row`): line p / (8 / chunks) of 128 bytes, and token chunk c of
    it in 16-byte slot (p % 8) ^ (c * 8 / chunks), so that 8 neighbouring rows, as well as rows 8 apart, never share a
    bank.
    """
    chunks, threads = config.chunks, config.threads
    shift = {1: 3, 2: 2, 4: 1, 8: 0}[chunks]  # log2 of the rows in a line of 128 bytes

    @cuda.jit(device=True, forceinline=True)
    def word_of(x, k0, token, xt, xf, inside, n):
        """Two tokens of one row, 2 bytes at a time; zeros outside of x."""
        low, high = u32(0), u32(0)
        if inside:
            if token < n:
                low = u32(ld_global_u16(x + (u64(k0) * xf + u64(token) * xt) * u64(2)))
            if u32(token + u32(1)) < n:
                high = u32(ld_global_u16(x + (u64(k0) * xf + u64(token + u32(1)) * xt) * u64(2)))
        return low_halves(low, high)

    def load_window(base, tid, x, k0, rows, k, n, xt, xf, flags):
        units = u32(((rows + u32(7)) >> u32(3)) * u32(chunks))
        t = cuda.local.array(32, u32)
        i = tid
        while i < units:
            eight = u32(i // u32(chunks))
            c = u32(i % u32(chunks))
            row = u32(k0 + eight * u32(8))
            token = u32(c * u32(8))
            column = u32(c << u32(shift))
            is_whole = u32(row + u32(8)) <= k
            if is_whole and (flags & u32(TOKEN_CHUNKS)) != u32(0):
                at = x + (u64(token) * xt + u64(row)) * u64(2)
                for j in range(8):
                    four = ld_global_nc_v4_if(at, u32(1) if u32(token + u32(j)) < n else u32(0))
                    at += xt * u64(2)
                    t[4 * j] = four[0]
                    t[4 * j + 1] = four[1]
                    t[4 * j + 2] = four[2]
                    t[4 * j + 3] = four[3]
                for j in range(4):
                    for odd in range(2):
                        p = u32(eight * u32(8) + (u32(2 * j + odd) ^ (eight & u32(7))))
                        to = u32(base + ((p >> u32(shift)) << u32(7)) + (((p & u32(7)) ^ column) << u32(4)))
                        if odd == 0:
                            st_shared_v4(to, low_halves(t[j], t[4 + j]), low_halves(t[8 + j], t[12 + j]),
                                         low_halves(t[16 + j], t[20 + j]),
                                         low_halves(t[24 + j], t[28 + j]))  # fmt: skip
                        else:
                            st_shared_v4(to, high_halves(t[j], t[4 + j]), high_halves(t[8 + j], t[12 + j]),
                                         high_halves(t[16 + j], t[20 + j]),
                                         high_halves(t[24 + j], t[28 + j]))  # fmt: skip
            elif is_whole and (flags & u32(FEATURE_CHUNKS)) != u32(0) and u32(token + u32(8)) <= n:
                at = x + (u64(row) * xf + u64(token)) * u64(2)
                for j in range(8):
                    four = ld_global_nc_v4(at)
                    at += xf * u64(2)
                    t[4 * j] = four[0]
                    t[4 * j + 1] = four[1]
                    t[4 * j + 2] = four[2]
                    t[4 * j + 3] = four[3]
                for j in range(8):
                    p = u32(eight * u32(8) + (u32(j) ^ (eight & u32(7))))
                    to = u32(base + ((p >> u32(shift)) << u32(7)) + (((p & u32(7)) ^ column) << u32(4)))
                    st_shared_v4(to, t[4 * j], t[4 * j + 1], t[4 * j + 2], t[4 * j + 3])
            else:
                for j in range(u32(8)):
                    p = u32(eight * u32(8) + (u32(j) ^ (eight & u32(7))))
                    to = u32(base + ((p >> u32(shift)) << u32(7)) + (((p & u32(7)) ^ column) << u32(4)))
                    r = u32(row + u32(j))
                    inside = r < k
                    st_shared_v4(to, word_of(x, r, token, xt, xf, inside, n),
                                 word_of(x, r, u32(token + u32(2)), xt, xf, inside, n),
                                 word_of(x, r, u32(token + u32(4)), xt, xf, inside, n),
                                 word_of(x, r, u32(token + u32(6)), xt, xf, inside, n))  # fmt: skip
            i = u32(i + u32(threads))

    return cuda.jit(device=True, forceinline=True)(load_window)


def make_copy_record(config: SkinnyConfig) -> Callable[..., Any]:
    """Device function that starts the copy of a record; every lane has 16 bytes of each strip, two have the places."""
    strips = config.strips
    copy = cp_async_16_streamed[config.prefetch]

    def copy_record(to, source, has_places):
        for i in range(strips):
            copy(u32(to + u32(512 * i)), source + u64(512 * i))
        cp_async_16_if(u32(to + u32(512 * strips)), source + u64(512 * strips), has_places)

    return cuda.jit(device=True, forceinline=True)(copy_record)


def make_multiply_step(config: SkinnyConfig) -> Callable[..., Any]:
    """Device function: acc += weights @ x of one record; sums of (strip i, chunk c) start at acc[4 (i chunks + c)]."""
    strips, chunks = config.strips, config.chunks
    shift = {1: 3, 2: 2, 4: 1, 8: 0}[chunks]
    mma = make_mma_m16n8k16(config.dtype)

    def multiply_step(acc, a, window, place, lane):
        # lanes 0..15 name the 16 rows of an even chunk, lanes 16..31 those of the odd chunk after it
        line = u32(((place >> u32(shift)) << u32(7)) | ((place & u32(7)) << u32(4)))
        if chunks == 1:
            b = ldmatrix_x2_trans(u32(window + line))
            for i in range(strips):
                mma(acc, 4 * i, a[4 * i], a[4 * i + 1], a[4 * i + 2], a[4 * i + 3], b[0], b[1])
        else:
            odd = u32((lane >> u32(4)) << u32(4 + shift))
            for pair in range(chunks // 2):
                four = ldmatrix_x4_trans(u32(window + (line ^ odd ^ u32(pair << (5 + shift)))))
                for i in range(strips):
                    at = 4 * (i * chunks + 2 * pair)
                    mma(acc, at, a[4 * i], a[4 * i + 1], a[4 * i + 2], a[4 * i + 3], four[0], four[1])
                    mma(acc, at + 4, a[4 * i], a[4 * i + 1], a[4 * i + 2], a[4 * i + 3], four[2], four[3])

    return cuda.jit(device=True, forceinline=True)(multiply_step)


def make_skinny(config: SkinnyConfig) -> Callable[..., Any]:
    """The kernel function of a config; one block for every rank of every team.

    Arguments, all uint64: addresses of the layout's arrays (records, warps, windows, team_table, rows), of x, out,
    bias, residual and the slots in global memory; token and feature strides of x, out and residual in values; `sizes` =
    n | flags << 16 | k << 32; `shape` = ranks | phases << 16 | window rows << 32 | slots << 48; words of a team.
    """
    strips, chunks, warps, depth = config.strips, config.chunks, config.warps, config.depth
    record_bytes, slot_bytes, ring_bytes = config.record_bytes, config.slot_bytes, config.depth * config.record_bytes
    all_rings, registers, fragment = config.ring_bytes, config.accumulators, 4 * config.strips
    is_cluster, is_block = config.finish == "cluster", config.finish == "block"
    is_shared, is_last = config.slots == "shared", config.slots == "window"
    is_chained = config.is_chained
    # more threads, or more sums a thread, leave too few registers to hold the rows
    is_early = (is_cluster or is_block) and config.threads <= 256 and chunks < 8
    load_window, copy_record, copy_table = make_load_window(config), make_copy_record(config), make_copy_table(config)
    multiply_step, flush, sum_slots = make_multiply_step(config), make_flush(config), make_sum_slots(config)
    wait_oldest, wait_all, load_rows = cp_async_wait[depth - 2], cp_async_wait[0], make_load_rows(config)
    tiles_of_item = strips * chunks

    def skinny(records, warp_table, windows, team_table, rows, x, out, bias, residual, work,
               xt, xf, ot, of, rt, rf, sizes, shape, team_words):  # fmt: skip
        smem = cuda.shared.array(0, types.uint8)
        base = smem_address(smem)
        tid = u32(cuda.threadIdx.x)
        lane, warp, block = u32(tid & u32(31)), u32(tid >> u32(5)), u32(cuda.blockIdx.x)
        n, flags, k = u32(sizes & u64(0xFFFF)), u32((sizes >> u64(16)) & u64(0xFFFF)), u32(sizes >> u64(32))
        ranks, phases = u32(shape & u64(0xFFFF)), u32((shape >> u64(16)) & u64(0xFFFF))
        zero_place, slots = u32((shape >> u64(32)) & u64(0xFFFF)), u32(shape >> u64(48))
        table_at = warp_table + u64(u32(block * u32(warps) + warp)) * u64(u32(((phases + u32(6)) >> u32(2)) << u32(4)))
        head = ld_global_nc_v4(table_at)
        window = ld_global_nc_v4(windows + u64(u32(block * phases)) * u64(16))
        team = div_u32(block, ranks)
        tile = u32(u32(block - team * ranks) * u32(warps) + warp)
        table = u32(base + (zero_place + u32(8)) * u32(16 * chunks))
        rings = u32(table + u32(team_words) * u32(4))
        slot_at = u32(rings + u32(all_rings))
        if is_last:
            slot_at = base
        if is_cluster or is_block:
            team_at = team_table + u64(team) * team_words * u64(4)
            copy_table(table, team_at, u32(team_words), tid)
            if is_early:
                first, items = ld_global_nc_u32(team_at), ld_global_nc_u32(team_at + u64(4))
        ring = u32(rings + warp * u32(ring_bytes) + lane * u32(16))
        source = records + u64(head[0]) * u64(record_bytes) + u64(lane) * u64(16)
        has_places = u32(1) if lane < u32(2) else u32(0)
        left = head[2]
        for d in range(depth - 1):
            if left > u32(0):
                copy_record(u32(ring + u32(d * record_bytes)), source, has_places)
                source += u64(record_bytes)
                left = u32(left - u32(1))
            cp_async_commit()
        if is_early:  # rows may come from device memory: asked for long before they are needed
            own_rows = load_rows(rows, first, tile, u32(items * u32(tiles_of_item)), lane)
        if is_chained:
            grid_launch_dependents()
            grid_wait()
        if tid < u32(8 * chunks):
            st_shared_v4(u32(base + zero_place * u32(16 * chunks) + tid * u32(16)), u32(0), u32(0), u32(0), u32(0))
        a = cuda.local.array(fragment, u32)
        acc = cuda.local.array(registers, f32)
        for r in range(registers):
            acc[r] = f32(0.0)
        places = u32(ring - lane * u32(16) + u32(512 * strips) + (lane & u32(15)) * u32(2))
        to_shared = u32(slot_at + head[1] * u32(slot_bytes) + lane * u32(16))
        to_global = work + u64(u32(block * slots + head[1])) * u64(slot_bytes) + u64(lane) * u64(16)
        use, fill = u32(0), u32((depth - 1) * record_bytes)
        steps = head[3]
        for phase in range(phases):
            if u32(phase) > u32(0):
                window = ld_global_nc_v4(windows + u64(u32(block * phases + u32(phase))) * u64(16))
            if window[1] > u32(0):
                if u32(phase) > u32(0):
                    cuda.syncthreads()
                load_window(base, tid, x, window[0], window[1], k, n, xt, xf, flags)
                cuda.syncthreads()
            if u32(phase) > u32(0):
                steps = ld_global_nc_u32(table_at + u64(12) + u64(phase) * u64(4))
            for _ in range(steps):
                wait_oldest()
                warp_sync()
                mark = u32(ld_shared_u16(u32(places + use)))
                for i in range(strips):
                    four = ld_shared_v4(u32(ring + use + u32(512 * i)))
                    a[4 * i] = four[0]
                    a[4 * i + 1] = four[1]
                    a[4 * i + 2] = four[2]
                    a[4 * i + 3] = four[3]
                if left > u32(0):
                    copy_record(u32(ring + fill), source, has_places)
                    source += u64(record_bytes)
                    left = u32(left - u32(1))
                cp_async_commit()
                fill = use
                use = u32(use + u32(record_bytes))
                if use == u32(ring_bytes):
                    use = u32(0)
                multiply_step(acc, a, base, min_u32(u32((mark & u32(PLACE)) + window[2]), zero_place), lane)
                if not is_last:  # noqa: SIM102 (a condition on its own is known when the kernel is compiled)
                    if mark & u32(LAST_STEP):
                        flush(acc, to_shared, to_global)
                        to_shared = u32(to_shared + u32(slot_bytes))
                        to_global += u64(slot_bytes)
        if is_last:
            cuda.syncthreads()  # no warp reads the window any more
            if head[2] > u32(0):
                flush(acc, to_shared, to_global)
        if is_cluster or is_block:
            wait_all()
            if not is_early:
                first = ld_global_nc_u32(team_table + u64(team) * team_words * u64(4))
                items = ld_global_nc_u32(team_table + u64(team) * team_words * u64(4) + u64(4))
                own_rows = load_rows(rows, first, tile, u32(items * u32(tiles_of_item)), lane)
            if is_cluster:
                cluster_arrive()
                cluster_wait()
            else:
                cuda.syncthreads()
            work_at = work + u64(u32(team * ranks * slots)) * u64(slot_bytes)
            sum_slots(table, tile, own_rows[0], own_rows[1], ranks, lane, rows, slot_at, work_at, slots, n, out, ot, of,
                      bias, residual, rt, rf, flags)  # fmt: skip
            if is_cluster and (is_shared or is_last):
                cluster_arrive()  # a block's slots stay until the last rank has read them
                cluster_wait()

    return skinny
