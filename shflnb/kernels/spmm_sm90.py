"""Shfl-BW product for Hopper: a producer warpgroup stitches, two consumer warpgroups multiply with wgmma.

    out[row_perm[g*v:(g+1)*v], :] = values[g].T @ x[indices[g], :]          for every group g

One persistent block per SM walks (group, column tile) tiles. Shared memory is a ring of stages; one stage is

    stitched x      [tile_n / 64 atoms][tile_k rows][128 B]   16-byte chunk c of row r stands at c ^ (r % 8): the 128-byte
                                                              swizzle of a wgmma operand that is contiguous along tokens
    packed weights  [tile_k / 8][v / 8][8 rows][8 columns]    8x8 core matrices, no swizzle, contiguous along k

    v = 128: consumers split the rows      v = 64: they split the tokens     v = 16, 32: tokens are the M side of wgmma
        +----------------+                     +-------+-------+                 D.T[tokens, v] = x.T @ W.T, so that a
        | rows 0..63     |                     | tok.  | tok.  |                 64-row instruction wastes nothing; the
        | rows 64..127   |                     | 0..   | n/2.. |                 result is transposed on its way out
        +----------------+                     +-------+-------+

Launched to overlap the end of the kernel before it (programmatic launch): until `grid_wait` nothing is read but ids, queue and
rows, which the host wrote long ago. Needs capability 9.0 (assembled as sm_90a). Padded columns have id -1: they are zero-filled and read nothing of x.
Source: PTX ISA, sections on wgmma, mbarrier, cp.async and setmaxnreg; tile shapes by measurement (docs/performance.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import cuda
from numba.cuda import types

from .config import Config
from .epilogue import HAS_RESIDUAL, make_activation, make_load_bias, make_load_residual, store_chunk
from .ptx import (
    bar_sync,
    bulk_copy_g2s,
    cp_async_16,
    cp_async_16_unless_negative,
    cp_async_16_whole,
    cp_async_commit,
    cp_async_mbarrier_arrive_noinc,
    cp_async_wait,
    fence_proxy_async,
    ld_global_nc_u32,
    ld_global_nc_v4,
    ld_shared_v4,
    mad_wide_u32,
    make_wgmma,
    mbarrier_arrive,
    mbarrier_arrive_expect_tx,
    mbarrier_init,
    mbarrier_init_fence,
    mbarrier_wait_parity,
    pack_pair,
    setmaxnreg_dec,
    setmaxnreg_inc,
    smem_address,
    stmatrix_x4,
    stmatrix_x4_trans,
    warp_sync,
    wgmma_commit,
    wgmma_fence,
    wgmma_wait,
)
from .ptx_cluster import grid_launch_dependents, grid_wait

__all__ = ["make_spmm_sm90"]

u32, u64, i32, f32 = types.uint32, types.uint64, types.int32, types.float32

CORE_BYTES = 128  # an 8x8 core matrix of 2-byte values
ATOM_BYTES = 128  # one row of a 64-token swizzle atom
STAGING_PITCH = 144  # bytes: 64 columns and a chunk more, so that 8 rows fall into different banks
PRODUCER_REGISTERS = {
    1: 72,
    2: 40,
}  # a thread, by producer warpgroups; with the consumers' at most 512 over the warpgroups
CONSUMER_REGISTERS = {1: 216, 2: 208}
ID_SLOTS = 8  # stages of column ids that a producer warp keeps in shared memory, a power of two
IDS_AHEAD = 6  # of its stages between the fetch of ids and their use; the slots must outnumber it by two
SWIZZLE_128B = 1 << 62  # bits 62..63 of a wgmma descriptor


def make_producer(config: Config) -> Callable[..., Any]:
    """Device function of the producer warpgroup: fill the ring, stage after stage, for every tile of this block."""
    tile_n, tile_k, stages = config.tile_n, config.tile_k, config.stages
    x_bytes, w_bytes, stage_bytes = config.x_stage_bytes, config.w_stage_bytes, config.stage_bytes
    chunks = tile_n // 8  # 16-byte chunks of a stitched row
    parts = max(1, chunks // 32)  # warps that share a row
    subs = max(1, 32 // chunks)  # rows that one warp instruction covers
    team, teams = config.team, config.teams
    rows_per_warp = config.producer_rows
    # copies, and ids in registers, at a time; with 32 copies, two times 16 ids no longer fit the producers' registers
    batch = 8 if config.copies_per_stage == 32 else min(16, config.copies_per_stage)
    batches = config.copies_per_stage // batch
    thread_rows = config.copies_per_stage
    quads = batch // 4
    lanes_per_row = min(32, chunks)
    id_lanes = rows_per_warp // 4  # lanes that fetch a stage's ids, 16 bytes each
    slot_bytes, ring_bytes = rows_per_warp * 4, ID_SLOTS * rows_per_warp * 4
    give_registers = setmaxnreg_dec[PRODUCER_REGISTERS[config.producers]]
    wait_ids = cp_async_wait[IDS_AHEAD - 2]

    @cuda.jit(device=True, forceinline=True)
    def load_ids(ids, address):
        for q in range(quads):
            four = ld_shared_v4(u32(address + u32(q * 16)))
            ids[4 * q] = four[0]
            ids[4 * q + 1] = four[1]
            ids[4 * q + 2] = four[2]
            ids[4 * q + 3] = four[3]

    def make_copy_batch(b):
        """Device function that starts the copies of batch b of a stage."""

        @cuda.jit(device=True, forceinline=True)
        def copy_batch(to, ids, row_bytes, x_at, cut, room, beyond):
            if cut:
                for j in range(batch):
                    size = room if i32(ids[j]) >= i32(0) else u32(0)
                    cp_async_16(u32((to ^ u32((j & 7) << 4)) + u32((b * batch + j) * ATOM_BYTES)),
                                mad_wide_u32(ids[j] & u32(0x7FFFFFFF), row_bytes, x_at), size)  # fmt: skip
            else:
                for j in range(batch):
                    cp_async_16_unless_negative(u32((to ^ u32((j & 7) << 4)) + u32((b * batch + j) * ATOM_BYTES)),
                                                mad_wide_u32(ids[j], row_bytes, x_at), u32(ids[j] | beyond))  # fmt: skip

        return copy_batch

    copy0, copy1, copy2, copy3 = (make_copy_batch(min(b, batches - 1)) for b in range(4))

    def produce(base, full, empty, ids_ring, tid, values, columns, queue, x, n, ldx):
        give_registers()
        lane = u32(tid & u32(31))
        warp = u32(tid >> u32(5))
        member = u32(warp % u32(team))
        own_team = u32(warp // u32(team))
        column_chunk = u32((member % u32(parts)) * u32(32) + lane % u32(lanes_per_row))
        warp_row = u32((member // u32(parts)) * u32(rows_per_warp))
        first_row = warp_row
        ids_ring = u32(ids_ring + warp * u32(ring_bytes))
        own_ids = ids_ring
        if subs > 1:
            first_row = u32(first_row + (lane // u32(lanes_per_row)) * u32(thread_rows))
            own_ids = u32(own_ids + (lane // u32(lanes_per_row)) * u32(thread_rows * 4))
        # place of the first row's chunk; the swizzle of row j is an exclusive or of bits 4..6
        target = u32((column_chunk // u32(8)) * u32(tile_k * ATOM_BYTES) + first_row * u32(ATOM_BYTES)
                     + (((column_chunk & u32(7)) ^ (first_row & u32(7))) << u32(4)))  # fmt: skip
        row_bytes = u32(ldx * u64(2))
        ids = cuda.local.array(batch, u32)
        next_ids = cuda.local.array(batch, u32)
        stage, phase = own_team, u32(1)
        # two walks over this team's stages (every teams-th): the ids' is IDS_AHEAD of them ahead of the copies', so that no
        # copy waits for its id. `step` is the k tile inside the queue's current record, `count` how many it has.
        turn_bytes = u64(cuda.gridDim.x) * u64(16)
        entry = ld_global_nc_v4(queue)
        ahead_entry, ahead_queue = entry, queue
        count, ahead_count = u32(0), u32(0)
        step, ahead_step = own_team, own_team
        ahead_slot, slot, lead = u32(0), u32(0), u32(0)
        ids_at, x_at, w_at, cut, room, beyond = columns, x, values, False, u32(0), u32(0)
        while True:
            if lead == u32(IDS_AHEAD):
                if step >= count:
                    step = u32(step - count)
                    count = entry[2]
                    while step >= count and count > u32(0):
                        step = u32(step - count)
                        queue += turn_bytes
                        entry = ld_global_nc_v4(queue)
                        count = entry[2]
                    if count == u32(0):
                        break
                    w_at = values + (u64(entry[1]) + u64(step)) * u64(w_bytes)
                    column = u32(entry[3] * u32(tile_n) + column_chunk * u32(8))
                    # a column tile that n cuts inside a chunk copies by byte counts; elsewhere a chunk is whole, or beyond n
                    # and zeroed: letting it read column 0 instead doubled such a tile's time (H200, 2026-11)
                    cut = u32(entry[3] + u32(1)) * u32(tile_n) > n and (n & u32(7)) != u32(0)
                    room, beyond = u32(0), u32(0)
                    if column < n:
                        room = u32(u32(n - column) * u32(2))
                        if room > u32(16):
                            room = u32(16)
                    else:
                        column, beyond = u32(0), u32(0x80000000)
                    x_at = x + u64(column) * u64(2)
                    queue += turn_bytes
                    entry = ld_global_nc_v4(queue)
                mbarrier_wait_parity(u32(empty + stage * u32(8)), phase)
                stage_at = u32(base + stage * u32(stage_bytes))
                full_at = u32(full + stage * u32(8))
                if lane == u32(0) and member == u32(0):
                    mbarrier_arrive_expect_tx(full_at, u32(w_bytes))
                    bulk_copy_g2s(u32(stage_at + u32(x_bytes)), w_at, u32(w_bytes), full_at)
                w_at += u64(teams * w_bytes)
                to = u32(stage_at + target)
                # shared memory is read in order with the copies' issue, so the next ids are read before these copies: read
                # after them, they wait for the whole queue to drain (400 clocks a stage; H200, 2026-11)
                ids_now = u32(own_ids + slot)
                slot = u32((slot + u32(slot_bytes)) & u32(ring_bytes - 1))
                if batches > 1:
                    load_ids(next_ids, u32(ids_now + u32(batch * 4)))
                    copy0(to, ids, row_bytes, x_at, cut, room, beyond)
                    for j in range(batch):
                        ids[j] = next_ids[j]
                if batches > 2:
                    load_ids(next_ids, u32(ids_now + u32(2 * batch * 4)))
                    copy1(to, ids, row_bytes, x_at, cut, room, beyond)
                    for j in range(batch):
                        ids[j] = next_ids[j]
                    load_ids(next_ids, u32(ids_now + u32(3 * batch * 4)))
                    copy2(to, ids, row_bytes, x_at, cut, room, beyond)
                    for j in range(batch):
                        ids[j] = next_ids[j]
                wait_ids()
                warp_sync()
                load_ids(next_ids, u32(own_ids + slot))
                copy3(to, ids, row_bytes, x_at, cut, room, beyond)
                cp_async_mbarrier_arrive_noinc(full_at)
                for j in range(batch):
                    ids[j] = next_ids[j]
                step = u32(step + u32(teams))
                stage = u32(stage + u32(teams))
                if stage >= u32(stages):
                    stage = u32(stage - u32(stages))
                    phase = u32(phase ^ u32(1))
            else:
                lead = u32(lead + u32(1))
                if lead == u32(IDS_AHEAD):
                    grid_wait()  # x may be the work of the kernel before; ids and queue never are
                    wait_ids()
                    warp_sync()
                    load_ids(ids, own_ids)
            if ahead_step >= ahead_count:
                ahead_step = u32(ahead_step - ahead_count)
                ahead_count = ahead_entry[2]
                while ahead_step >= ahead_count and ahead_count > u32(0):
                    ahead_step = u32(ahead_step - ahead_count)
                    ahead_queue += turn_bytes
                    ahead_entry = ld_global_nc_v4(ahead_queue)
                    ahead_count = ahead_entry[2]
                if ahead_count > u32(0):
                    ids_at = (columns + ((u64(ahead_entry[1]) + u64(ahead_step)) * u64(tile_k) + u64(warp_row)) * u64(4)
                              + u64(lane) * u64(16))  # fmt: skip
                    ahead_queue += turn_bytes
                    ahead_entry = ld_global_nc_v4(ahead_queue)
            if ahead_count > u32(0):
                if lane < u32(id_lanes):
                    cp_async_16_whole(u32(ids_ring + ahead_slot + lane * u32(16)), ids_at)
                ids_at += u64(teams * tile_k * 4)
                ahead_step = u32(ahead_step + u32(teams))
            ahead_slot = u32((ahead_slot + u32(slot_bytes)) & u32(ring_bytes - 1))
            cp_async_commit()

    return cuda.jit(device=True, forceinline=True)(produce)


def make_drain(config: Config, h: int) -> Callable[..., Any]:
    """Device function that finishes and stores columns 64h..64h+63 of a warp's 16 rows.

    One function per h: as a loop, the body with an activation is more than the optimiser unrolls, and accumulators that
    are indexed at run time go to local memory.
    """
    plain = config.epilogue == "plain"
    activation, pack = make_activation(config.epilogue), pack_pair[config.dtype]
    load_residual = make_load_residual(config.dtype)

    def drain(acc, targets, matrix_at, chunk_at, lane, row_low, row_high, bias_low, bias_high, column, n, out, residual, ldo,
              ldr, flags):  # fmt: skip
        for j in range(4):
            a = (h * 8 + j * 2) * 4
            if not plain:
                for e in range(2):
                    acc[a + 4 * e] = activation(acc[a + 4 * e] + bias_low)
                    acc[a + 4 * e + 1] = activation(acc[a + 4 * e + 1] + bias_low)
                    acc[a + 4 * e + 2] = activation(acc[a + 4 * e + 2] + bias_high)
                    acc[a + 4 * e + 3] = activation(acc[a + 4 * e + 3] + bias_high)
                if flags & u32(HAS_RESIDUAL):
                    for e in range(2):
                        col = u32(column + u32(64 * h + 16 * j + 8 * e) + (lane & u32(3)) * u32(2))
                        r0, r1 = load_residual(residual, row_low, col, n, ldr, flags)
                        r2, r3 = load_residual(residual, row_high, col, n, ldr, flags)
                        acc[a + 4 * e] += r0
                        acc[a + 4 * e + 1] += r1
                        acc[a + 4 * e + 2] += r2
                        acc[a + 4 * e + 3] += r3
            stmatrix_x4(u32(matrix_at + u32(32 * j)), pack(acc[a], acc[a + 1]), pack(acc[a + 2], acc[a + 3]),
                        pack(acc[a + 4], acc[a + 5]), pack(acc[a + 6], acc[a + 7]))  # fmt: skip
        warp_sync()
        for q in range(4):
            w = ld_shared_v4(u32(chunk_at + u32(q * 4 * STAGING_PITCH)))
            col = u32(column + u32(64 * h) + (lane & u32(7)) * u32(8))
            store_chunk(w[0], w[1], w[2], w[3], targets[q], col, n, out, ldo, flags)
        warp_sync()

    return cuda.jit(device=True, forceinline=True)(drain)


def make_consumer_rows(config: Config) -> Callable[..., Any]:
    """Device function of a consumer warpgroup for v = 64 and 128: weights are the M side of wgmma."""
    v, tile_n, tile_k, stages = config.v, config.tile_n, config.tile_k, config.stages
    x_bytes, stage_bytes, warp_n = config.x_stage_bytes, config.stage_bytes, config.consumer_n
    steps, registers, row_splits = tile_k // 16, config.accumulators, config.row_splits
    producers = config.producers
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
    wait_all, wait_one, take_registers = (
        wgmma_wait[0],
        wgmma_wait[1],
        setmaxnreg_inc[CONSUMER_REGISTERS[config.producers]],
    )

    def consume(base, full, empty, staging, tid, queue, rows, out, bias, residual, n, ldo, ldr, flags):
        take_registers()
        grid_wait()
        acc = cuda.local.array(registers, f32)
        targets = cuda.local.array(4, u32)
        who = u32((tid >> u32(7)) - u32(producers))
        lane = u32(tid & u32(31))
        warp = u32((tid >> u32(5)) & u32(3))
        leader = (tid & u32(127)) == u32(0)
        if row_splits == 2:
            row_offset, token_offset, a_offset, b_offset = (
                u32(who * u32(64)),
                u32(0),
                u32(who * u32(8 * CORE_BYTES)),
                u32(0),
            )
        else:
            row_offset, token_offset, a_offset = u32(0), u32(who * u32(warp_n)), u32(0)
            b_offset = u32(who * u32(warp_n // 64 * tile_k * ATOM_BYTES))
        staging = u32(staging + ((tid >> u32(5)) - u32(4 * producers)) * u32(16 * STAGING_PITCH))
        matrix_at = u32(staging + (lane & u32(15)) * u32(STAGING_PITCH) + (lane >> u32(4)) * u32(16))
        chunk_at = u32(staging + (lane >> u32(3)) * u32(STAGING_PITCH) + (lane & u32(7)) * u32(16))
        stage = u32(0)
        phase = u32(0)
        turn_bytes = u64(cuda.gridDim.x) * u64(16)
        entry = ld_global_nc_v4(queue)
        count = entry[2]
        while count > u32(0):
            row = u32(entry[0] * u32(v) + row_offset + warp * u32(16))
            column = u32(entry[3] * u32(tile_n) + token_offset)
            # read where the results go before the main loop: loaded in the epilogue, each of these costs a trip to L2
            for q in range(4):
                targets[q] = ld_global_nc_u32(rows + u64(row + u32(4 * q) + (lane >> u32(3))) * u64(4))
            row_low, row_high, bias_low, bias_high = u32(0), u32(0), f32(0.0), f32(0.0)
            if not plain:
                row_low = ld_global_nc_u32(rows + u64(row + (lane >> u32(2))) * u64(4))
                row_high = ld_global_nc_u32(rows + u64(row + (lane >> u32(2)) + u32(8)) * u64(4))
                bias_low, bias_high = load_bias(bias, row_low, flags), load_bias(bias, row_high, flags)
            queue += turn_bytes
            entry = ld_global_nc_v4(queue)
            for r in range(registers):
                acc[r] = f32(0.0)
            release = u32(0)
            for kt in range(count):
                mbarrier_wait_parity(u32(full + stage * u32(8)), phase)
                fence_proxy_async()
                stage_at = u32(base + stage * u32(stage_bytes))
                desc_a = u64(desc_a0) | u64(u32(stage_at + u32(x_bytes) + a_offset) >> u32(4))
                desc_b = u64(desc_b0) | u64(u32(stage_at + b_offset) >> u32(4))
                wgmma_fence()
                for step in range(steps):
                    wgmma(acc, desc_a + u64(step * step_a), desc_b + u64(step * step_b))
                wgmma_commit()
                wait_one()
                if leader and u32(kt) > u32(0):
                    mbarrier_arrive(release)
                release = u32(empty + stage * u32(8))
                stage = u32(stage + u32(1))
                if stage == u32(stages):
                    stage = u32(0)
                    phase = u32(phase ^ u32(1))
            wait_all()
            if leader:
                mbarrier_arrive(release)
            drain0(acc, targets, matrix_at, chunk_at, lane, row_low, row_high, bias_low, bias_high, column, n, out, residual,
                   ldo, ldr, flags)  # fmt: skip
            if warp_n > 64:
                drain1(acc, targets, matrix_at, chunk_at, lane, row_low, row_high, bias_low, bias_high, column, n, out,
                       residual, ldo, ldr, flags)  # fmt: skip
            if warp_n > 128:
                drain2(acc, targets, matrix_at, chunk_at, lane, row_low, row_high, bias_low, bias_high, column, n, out,
                       residual, ldo, ldr, flags)  # fmt: skip
                drain3(acc, targets, matrix_at, chunk_at, lane, row_low, row_high, bias_low, bias_high, column, n, out,
                       residual, ldo, ldr, flags)  # fmt: skip
            count = entry[2]

    return cuda.jit(device=True, forceinline=True)(consume)


def make_finish(config: Config, i: int) -> Callable[..., Any]:
    """Device function that finishes a warp's 16 tokens of atom i and stages them transposed; one function per i, see
    `make_drain`."""
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


def make_consumer_tokens(config: Config) -> Callable[..., Any]:
    """Device function of a consumer warpgroup for v = 16 and 32: tokens are the M side of wgmma."""
    v, tile_n, tile_k, stages = config.v, config.tile_n, config.tile_k, config.stages
    x_bytes, stage_bytes, own_n = config.x_stage_bytes, config.stage_bytes, config.consumer_n
    steps, registers, atoms = tile_k // 16, config.accumulators, config.consumer_n // 64
    per_atom, producers = v // 2, config.producers
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
    wait_all, wait_one, take_registers = (
        wgmma_wait[0],
        wgmma_wait[1],
        setmaxnreg_inc[CONSUMER_REGISTERS[config.producers]],
    )

    def consume(base, full, empty, staging, tid, queue, rows, out, bias, residual, n, ldo, ldr, flags):
        take_registers()
        grid_wait()
        acc = cuda.local.array(registers, f32)
        targets = cuda.local.array(stores, u32)
        own = u32(tid & u32(127))
        who = u32((tid >> u32(7)) - u32(producers))
        lane = u32(tid & u32(31))
        warp = u32((tid >> u32(5)) & u32(3))
        leader = own == u32(0)
        staging = u32(staging + who * u32(v * pitch))
        matrix_at = u32(staging + (u32(8) * (lane >> u32(4)) + (lane & u32(7))) * u32(pitch)
                        + (warp * u32(16) + u32(8) * ((lane >> u32(3)) & u32(1))) * u32(2))  # fmt: skip
        stage = u32(0)
        phase = u32(0)
        turn_bytes = u64(cuda.gridDim.x) * u64(16)
        entry = ld_global_nc_v4(queue)
        count = entry[2]
        while count > u32(0):
            row = u32(entry[0] * u32(v))
            column = u32(entry[3] * u32(tile_n) + who * u32(own_n))
            for q in range(stores):
                targets[q] = ld_global_nc_u32(rows + u64(row + u32(own + u32(q * 128)) // u32(row_chunks)) * u64(4))
            queue += turn_bytes
            entry = ld_global_nc_v4(queue)
            for r in range(registers):
                acc[r] = f32(0.0)
            release = u32(0)
            for kt in range(count):
                mbarrier_wait_parity(u32(full + stage * u32(8)), phase)
                fence_proxy_async()
                stage_at = u32(base + stage * u32(stage_bytes))
                desc_a = u64(desc_a0) | (u64(stage_at >> u32(4)) + u64(who) * u64(atoms * atom_step))
                desc_b = u64(desc_b0) | u64(u32(stage_at + u32(x_bytes)) >> u32(4))
                wgmma_fence()
                for step in range(steps):
                    at = desc_a + u64(step * step_a)
                    wgmma0(acc, at, desc_b + u64(step * step_b))
                    if atoms > 1:
                        wgmma1(acc, at + u64(atom_step), desc_b + u64(step * step_b))
                    if atoms > 2:
                        wgmma2(acc, at + u64(2 * atom_step), desc_b + u64(step * step_b))
                        wgmma3(acc, at + u64(3 * atom_step), desc_b + u64(step * step_b))
                wgmma_commit()
                wait_one()
                if leader and u32(kt) > u32(0):
                    mbarrier_arrive(release)
                release = u32(empty + stage * u32(8))
                stage = u32(stage + u32(1))
                if stage == u32(stages):
                    stage = u32(0)
                    phase = u32(phase ^ u32(1))
            wait_all()
            if leader:
                mbarrier_arrive(release)
            finish0(acc, matrix_at, lane, warp, rows, row, bias, column, n, residual, ldr, flags)
            if atoms > 1:
                finish1(acc, matrix_at, lane, warp, rows, row, bias, column, n, residual, ldr, flags)
            if atoms > 2:
                finish2(acc, matrix_at, lane, warp, rows, row, bias, column, n, residual, ldr, flags)
                finish3(acc, matrix_at, lane, warp, rows, row, bias, column, n, residual, ldr, flags)
            bar_sync(u32(who + u32(1)), u32(128))
            for q in range(stores):
                index = u32(own + u32(q * 128))
                w = ld_shared_v4(
                    u32(staging + index // u32(row_chunks) * u32(pitch) + index % u32(row_chunks) * u32(16))
                )
                store_chunk(w[0], w[1], w[2], w[3], targets[q], u32(column + index % u32(row_chunks) * u32(8)), n, out, ldo,
                            flags)  # fmt: skip
            bar_sync(u32(who + u32(1)), u32(128))
            count = entry[2]

    return cuda.jit(device=True, forceinline=True)(consume)


def make_spmm_sm90(config: Config) -> Callable[..., Any]:
    """The kernel function of a config; every argument is uint64 (addresses in bytes, sizes in elements).

    queue: for every turn and block a record of four uint32, (group, first k tile, k tiles, column tile); a
    block walks its column of the queue until a record with no tiles. rows: the output row of every packed row, `NO_ROW` for
    rows that do not exist. flags: see `epilogue.py`.
    """
    stages, stage_bytes = config.stages, config.stage_bytes
    barriers, copiers, team_threads = stages * stage_bytes, 128 * config.producers, 32 * config.team
    staging = config.smem_bytes - config.staging_bytes
    produce = make_producer(config)
    consume = make_consumer_rows(config) if config.weights_are_m else make_consumer_tokens(config)

    def spmm_sm90(values, columns, queue, rows, x, out, bias, residual, n, ldx, ldo, ldr, flags):
        smem = cuda.shared.array(0, types.uint8)
        base = smem_address(smem)
        full = u32(base + u32(barriers))
        empty = u32(full + u32(8 * stages))
        tid = u32(cuda.threadIdx.x)
        own_queue = queue + u64(cuda.blockIdx.x) * u64(16)
        if tid == u32(0):
            for stage in range(stages):
                mbarrier_init(
                    u32(full + u32(8 * stage)), u32(team_threads + 1)
                )  # a team's threads and the weights' bytes
                mbarrier_init(u32(empty + u32(8 * stage)), u32(2))  # one leader of each consumer warpgroup
            mbarrier_init_fence()
        cuda.syncthreads()
        grid_launch_dependents()  # a kernel launched in the same way may set itself up as soon as blocks of this one end
        if tid < u32(copiers):
            produce(base, full, empty, u32(base + u32(barriers + 256)), tid, values, columns, own_queue, x, u32(n), ldx)
        else:
            consume(base, full, empty, u32(base + u32(staging)), tid, own_queue, rows, out, bias, residual, u32(n), ldo, ldr,
                    u32(flags))  # fmt: skip

    return spmm_sm90
