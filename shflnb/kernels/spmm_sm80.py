"""Shfl-BW product with mma.sync: every warp copies and multiplies; runs on capability 8.0 and everything newer.

    out[row_perm[g*v:(g+1)*v], :] = values[g].T @ x[indices[g], :]          for every group g

One block computes one (group, column tile) tile; blocks are started in the order of the queue, longest group first, so
the hardware's own scheduler evens out unequal groups. Shared memory is a ring of cp.async stages; one stage is

    stitched x      [tile_n / 64 atoms][tile_k rows][128 B]   16-byte chunk c of row r stands at c ^ (r % 8), so that
                                                              the 8 rows of an ldmatrix fall into different banks
    packed weights  [tile_k / 16][v / 16][32 lanes][16 B]     operand A in fragment order: a lane's 8 halves side by
                                                              side

    warps of a block, v = 128, tile_n = 128:   +----+----+----+----+   each 64 x 32: 4 x 4 instructions of m16n8k16
                                               | w0 | w1 | w2 | w3 |   a step of k
                                               | w4 | w5 | w6 | w7 |
                                               +----+----+----+----+
Source: PTX ISA, "Matrix fragments for mma.m16n8k16", ldmatrix, cp.async.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import cuda
from numba.cuda import types

from .config import ATOM_BYTES, Config
from .epilogue import HAS_RESIDUAL, fetch_chunk, make_activation, make_add_residual, make_load_bias, store_chunk
from .ptx import (
    cp_async_16,
    cp_async_16_unless_negative,
    cp_async_16_whole,
    cp_async_commit,
    cp_async_wait,
    ld_global_nc_u32,
    ld_global_nc_v4,
    ld_shared_v4,
    ldmatrix_x4_trans,
    mad_wide_u32,
    make_mma_m16n8k16,
    pack_pair,
    smem_address,
    st_shared_u32,
    warp_sync,
)

__all__ = ["make_spmm_sm80"]

u32, u64, i32, f32 = types.uint32, types.uint64, types.int32, types.float32
FRAGMENT_BYTES = 512  # a 16x16 operand A of a warp


def make_copy_stage(config: Config) -> Callable[..., Any]:
    """Device function that starts the copies of one stage, with the ids of this thread's rows given."""
    threads, tile_k, w_bytes, x_bytes = config.threads, config.tile_k, config.w_stage_bytes, config.x_stage_bytes
    chunks = config.tile_n // 8
    copies = tile_k * chunks // threads
    step = threads // chunks  # rows between a thread's copies
    w_chunks = w_bytes // 16

    def copy_stage(stage_at, tid, ids, row_bytes, x_at, w_at, cut, room, beyond):
        c = u32(tid % u32(chunks))
        first = u32(tid // u32(chunks))
        for j in range(copies):
            r = u32(first + u32(j * step))
            to = u32(stage_at + (c >> u32(3)) * u32(tile_k * ATOM_BYTES) + r * u32(ATOM_BYTES)
                     + (((c & u32(7)) ^ (r & u32(7))) << u32(4)))  # fmt: skip
            if cut:
                size = room if i32(ids[j]) >= i32(0) else u32(0)
                cp_async_16(to, mad_wide_u32(ids[j] & u32(0x7FFFFFFF), row_bytes, x_at), size)
            else:
                cp_async_16_unless_negative(to, mad_wide_u32(ids[j], row_bytes, x_at), u32(ids[j] | beyond))
        for j in range((w_chunks + threads - 1) // threads):
            i = u32(tid + u32(j * threads))
            if w_chunks % threads == 0 or i < u32(w_chunks):
                cp_async_16_whole(u32(stage_at + u32(x_bytes) + i * u32(16)), w_at + u64(i) * u64(16))

    return cuda.jit(device=True, forceinline=True)(copy_stage)


def make_multiply(config: Config) -> Callable[..., Any]:
    """Device function: acc += weights @ x of one stage, for this warp's part of the tile."""
    v, tile_k, x_bytes = config.v, config.tile_k, config.x_stage_bytes
    m_steps, n_pairs = config.sm80_warp_m // 16, config.sm80_warp_n // 16
    mma = make_mma_m16n8k16(config.dtype)
    fragments = 4 * m_steps

    def multiply(acc, stage_at, lane, warp_row, warp_col):
        a = cuda.local.array(fragments, u32)
        # lane l gives row l % 8 (+ 8 in the second and fourth quarter) and token chunk l / 16 of each 16x16 piece
        row = u32((lane & u32(7)) + u32(8) * ((lane >> u32(3)) & u32(1)))
        for step in range(tile_k // 16):
            a_at = u32(stage_at + u32(x_bytes + step * (v // 16) * FRAGMENT_BYTES) + warp_row * u32(FRAGMENT_BYTES)
                       + lane * u32(16))  # fmt: skip
            for mi in range(m_steps):
                four = ld_shared_v4(u32(a_at + u32(mi * FRAGMENT_BYTES)))
                a[4 * mi] = four[0]
                a[4 * mi + 1] = four[1]
                a[4 * mi + 2] = four[2]
                a[4 * mi + 3] = four[3]
            for pair in range(n_pairs):
                c = u32(warp_col + u32(2 * pair) + (lane >> u32(4)))
                b = ldmatrix_x4_trans(u32(stage_at + (c >> u32(3)) * u32(tile_k * ATOM_BYTES)
                                          + (row + u32(16 * step)) * u32(ATOM_BYTES)
                                          + (((c & u32(7)) ^ (row & u32(7))) << u32(4))))  # fmt: skip
                for mi in range(m_steps):
                    at = (mi * n_pairs + pair) * 8
                    mma(acc, at, a[4 * mi], a[4 * mi + 1], a[4 * mi + 2], a[4 * mi + 3], b[0], b[1])
                    mma(acc, at + 4, a[4 * mi], a[4 * mi + 1], a[4 * mi + 2], a[4 * mi + 3], b[2], b[3])

    return cuda.jit(device=True, forceinline=True)(multiply)


def make_drain(config: Config, mi: int) -> Callable[..., Any]:
    """Device function that finishes and stores 16 rows of a warp; one per mi: accumulators need constant indices."""
    n_pairs, warp_n = config.sm80_warp_n // 16, config.sm80_warp_n
    plain = config.epilogue == "plain"
    activation, load_bias = make_activation(config.epilogue), make_load_bias(config.dtype)
    pitch = warp_n * 2 + 16
    add_residual, pack = make_add_residual(config.dtype, pitch), pack_pair[config.dtype]
    row_chunks = warp_n // 8
    stores = 16 * row_chunks // 32

    def drain(acc, rows, packed_row, staging, lane, column, n, out, bias, residual, ldo, ldr, flags):
        first = u32(packed_row + u32(16 * mi))
        row_low, row_high, bias_low, bias_high = u32(0), u32(0), f32(0.0), f32(0.0)
        chunk, chunk_col = u32(lane // u32(row_chunks)), u32(column + lane % u32(row_chunks) * u32(8))
        chunk_at = u32(staging + chunk * u32(pitch) + lane % u32(row_chunks) * u32(16))
        targets = cuda.local.array(stores, u32)
        for q in range(stores):
            targets[q] = ld_global_nc_u32(rows + u64(first + chunk + u32(q * 32 // row_chunks)) * u64(4))
        at = u32(staging + (lane >> u32(2)) * u32(pitch) + (lane & u32(3)) * u32(4))
        if not plain:
            row_low = ld_global_nc_u32(rows + u64(first + (lane >> u32(2))) * u64(4))
            row_high = ld_global_nc_u32(rows + u64(first + (lane >> u32(2)) + u32(8)) * u64(4))
            bias_low, bias_high = load_bias(bias, row_low, flags), load_bias(bias, row_high, flags)
            if flags & u32(HAS_RESIDUAL):  # it comes through the shared memory that the results go through
                for q in range(stores):
                    fetch_chunk(u32(chunk_at + u32(q * 32 // row_chunks * pitch)), targets[q], chunk_col, n, residual,
                                ldr, flags)  # fmt: skip
                warp_sync()
        for ni in range(2 * n_pairs):
            a = (mi * 2 * n_pairs + ni) * 4
            if not plain:
                acc[a], acc[a + 1] = activation(acc[a] + bias_low), activation(acc[a + 1] + bias_low)
                acc[a + 2], acc[a + 3] = activation(acc[a + 2] + bias_high), activation(acc[a + 3] + bias_high)
                if flags & u32(HAS_RESIDUAL):
                    add_residual(acc, a, u32(at + u32(16 * ni)))
            st_shared_u32(u32(at + u32(16 * ni)), pack(acc[a], acc[a + 1]))
            st_shared_u32(u32(at + u32(16 * ni + 8 * pitch)), pack(acc[a + 2], acc[a + 3]))
        warp_sync()
        for q in range(stores):
            store_chunk(u32(chunk_at + u32(q * 32 // row_chunks * pitch)), targets[q], chunk_col, n, out, ldo, flags)
        warp_sync()

    return cuda.jit(device=True, forceinline=True)(drain)


def make_spmm_sm80(config: Config) -> Callable[..., Any]:
    """The kernel function of a config; the arguments are those of `spmm_sm90`. The grid has a block for every tile."""
    v, tile_n, tile_k, stages = config.v, config.tile_n, config.tile_k, config.stages
    threads, stage_bytes, w_bytes = config.threads, config.stage_bytes, config.w_stage_bytes
    chunks = tile_n // 8
    copies, step = tile_k * chunks // threads, threads // chunks
    warp_m, warp_n = config.sm80_warp_m, config.sm80_warp_n
    col_warps, m_steps = tile_n // warp_n, warp_m // 16
    registers, pitch = config.accumulators, warp_n * 2 + 16
    copy_stage, multiply = make_copy_stage(config), make_multiply(config)
    drain0, drain1, drain2, drain3 = (make_drain(config, min(mi, m_steps - 1)) for mi in range(4))
    wait_oldest, wait_all = cp_async_wait[stages - 2], cp_async_wait[0]

    def spmm_sm80(values, columns, queue, rows, x, out, bias, residual, n, ldx, ldo, ldr, flags):
        smem = cuda.shared.array(0, types.uint8)
        base = smem_address(smem)
        tid = u32(cuda.threadIdx.x)
        lane, warp = u32(tid & u32(31)), u32(tid >> u32(5))
        n = u32(n)
        flags = u32(flags)
        entry = ld_global_nc_v4(queue + u64(cuda.blockIdx.x) * u64(16))
        count, column_tile = entry[2], entry[3]
        column = u32(column_tile * u32(tile_n) + (tid % u32(chunks)) * u32(8))
        cut = u32(column_tile + u32(1)) * u32(tile_n) > n and (n & u32(7)) != u32(0)
        room, beyond = u32(0), u32(0)
        if column < n:
            room = u32(u32(n - column) * u32(2))
            if room > u32(16):
                room = u32(16)
        else:
            column, beyond = u32(0), u32(0x80000000)
        x_at = x + u64(column) * u64(2)
        w_at = values + u64(entry[1]) * u64(w_bytes)
        row_bytes = u32(ldx * u64(2))
        ids_at = columns + (u64(entry[1]) * u64(tile_k) + u64(tid // u32(chunks))) * u64(4)
        ids = cuda.local.array(copies, u32)
        acc = cuda.local.array(registers, f32)
        for r in range(registers):
            acc[r] = f32(0.0)
        for s in range(stages - 1):
            if u32(s) < count:
                for j in range(copies):
                    ids[j] = ld_global_nc_u32(ids_at + u64(j * step * 4))
                copy_stage(u32(base + u32(s * stage_bytes)), tid, ids, row_bytes, x_at, w_at, cut, room, beyond)
                ids_at += u64(tile_k * 4)
                w_at += u64(w_bytes)
            cp_async_commit()
        left = u32(0)
        if count > u32(stages - 1):
            left = u32(count - u32(stages - 1))
            for j in range(copies):
                ids[j] = ld_global_nc_u32(ids_at + u64(j * step * 4))
        warp_row = u32(warp // u32(col_warps) * u32(m_steps))
        warp_col = u32(warp % u32(col_warps) * u32(warp_n // 8))
        use, fill = u32(0), u32(stages - 1)
        for _ in range(count):
            wait_oldest()
            cuda.syncthreads()
            if left > u32(0):
                copy_stage(u32(base + fill * u32(stage_bytes)), tid, ids, row_bytes, x_at, w_at, cut, room, beyond)
                ids_at += u64(tile_k * 4)
                w_at += u64(w_bytes)
                left = u32(left - u32(1))
                if left > u32(0):
                    for j in range(copies):
                        ids[j] = ld_global_nc_u32(ids_at + u64(j * step * 4))
            cp_async_commit()
            multiply(acc, u32(base + use * u32(stage_bytes)), lane, warp_row, warp_col)
            use = u32(use + u32(1))
            if use == u32(stages):
                use = u32(0)
            fill = u32(fill + u32(1))
            if fill == u32(stages):
                fill = u32(0)
        wait_all()
        cuda.syncthreads()
        staging = u32(base + warp * u32(16 * pitch))
        packed_row = u32(entry[0] * u32(v) + warp_row * u32(16))
        column = u32(column_tile * u32(tile_n) + warp_col * u32(8))
        drain0(acc, rows, packed_row, staging, lane, column, n, out, bias, residual, ldo, ldr, flags)
        if m_steps > 1:
            drain1(acc, rows, packed_row, staging, lane, column, n, out, bias, residual, ldo, ldr, flags)
        if m_steps > 2:
            drain2(acc, rows, packed_row, staging, lane, column, n, out, bias, residual, ldo, ldr, flags)
            drain3(acc, rows, packed_row, staging, lane, column, n, out, bias, residual, ldo, ldr, flags)

    return spmm_sm80
