"""The producer warpgroup of `spmm_sm90.py`: stitched x and packed weights into the ring, stage after stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import cuda
from numba.cuda import types

from .config import ATOM_BYTES, Config
from .ptx import (
    bulk_copy_g2s,
    cp_async_16,
    cp_async_16_unless_negative,
    cp_async_16_whole,
    cp_async_commit,
    cp_async_mbarrier_arrive_noinc,
    cp_async_wait,
    ld_global_nc_v4,
    ld_shared_u32,
    ld_shared_v4,
    mad_wide_u32,
    mbarrier_arrive_expect_tx,
    mbarrier_wait_parity,
    setmaxnreg_dec,
    warp_sync,
)
from .ptx_cluster import grid_wait

__all__ = ["make_producer"]

u32, u64, i32 = types.uint32, types.uint64, types.int32

ID_SLOTS = 8  # stages of column ids that a producer warp keeps in shared memory, a power of two
IDS_AHEAD = 6  # of its stages between the fetch of ids and their use; the slots must outnumber it by two


def make_producer(config: Config) -> Callable[..., Any]:
    """Device function of the producer warpgroup: fill the ring, stage after stage, for every tile of this block."""
    tile_n, tile_k, stages, row_lanes = config.tile_n, config.tile_k, config.stages, config.head_n // 8
    x_bytes, w_bytes, stage_bytes = config.x_stage_bytes, config.w_stage_bytes, config.stage_bytes
    tail_rows, tail_lanes, tail_atoms = config.tail_copies, config.tail_n // 8, config.head_n // 64
    parts = max(1, row_lanes // 32)  # warps that share a row
    subs = max(1, 32 // row_lanes)  # rows that one warp instruction covers
    team, teams = config.team, config.teams
    rows_per_warp = config.producer_rows
    # copies, and ids in registers, at a time; with 32 copies, two times 16 ids no longer fit the producers' registers
    batch = 8 if config.copies_per_stage == 32 else min(16, config.copies_per_stage)
    batches = config.copies_per_stage // batch
    thread_rows, batch_bytes = config.copies_per_stage, batch * ATOM_BYTES
    lanes_per_row = min(32, row_lanes)
    id_lanes = rows_per_warp // 4  # lanes that fetch a stage's ids, 16 bytes each
    slot_bytes, ring_bytes = rows_per_warp * 4, ID_SLOTS * rows_per_warp * 4
    give_registers = setmaxnreg_dec[config.registers[0]]
    wait_ids = cp_async_wait[IDS_AHEAD - 2]

    def make_copies(rows):
        """Device functions (load_ids, copy_batch) for so many rows of a thread at a time."""

        @cuda.jit(device=True, forceinline=True)
        def load_ids(ids, address):
            for q in range(rows // 4):
                four = ld_shared_v4(u32(address + u32(q * 16)))
                ids[4 * q] = four[0]
                ids[4 * q + 1] = four[1]
                ids[4 * q + 2] = four[2]
                ids[4 * q + 3] = four[3]
            for q in range(rows // 4 * 4, rows):
                ids[q] = ld_shared_u32(u32(address + u32(q * 4)))

        @cuda.jit(device=True, forceinline=True)
        def copy_batch(to, first_row_bytes, ids, row_bytes, x_at, cut, room, beyond):
            """Start the copies of a batch of a stage's rows, which begin so many bytes behind `to`."""
            if cut:
                for j in range(rows):
                    size = room if i32(ids[j]) >= i32(0) else u32(0)
                    cp_async_16(
                        u32((to ^ u32((j & 7) << 4)) + u32(first_row_bytes + u32(j * ATOM_BYTES))),
                        mad_wide_u32(ids[j] & u32(0x7FFFFFFF), row_bytes, x_at),
                        size,
                    )
            else:
                for j in range(rows):
                    cp_async_16_unless_negative(
                        u32((to ^ u32((j & 7) << 4)) + u32(first_row_bytes + u32(j * ATOM_BYTES))),
                        mad_wide_u32(ids[j], row_bytes, x_at),
                        u32(ids[j] | beyond),
                    )

        return load_ids, copy_batch

    load_ids, copy_batch = make_copies(batch)
    load_tail_ids, copy_tail = make_copies(tail_rows)

    @cuda.jit(device=True, forceinline=True)
    def bounds(column, x, n):
        """(address, bytes, 0 or 2**31) of the chunk of x at a column: what of it there is, and whether it is none."""
        room, beyond = u32(0), u32(0)
        if column < n:
            room = u32(u32(n - column) * u32(2))
            if room > u32(16):
                room = u32(16)
        else:
            column, beyond = u32(0), u32(0x80000000)
        return x + u64(column) * u64(2), room, beyond

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
        if tail_rows > 0:
            tail_chunk = u32(row_lanes + lane % u32(tail_lanes))
            tail_row = u32((lane // u32(tail_lanes)) * u32(tail_rows))
            tail_ids_at = u32(ids_ring + tail_row * u32(4))
            tail_row = u32(warp_row + tail_row)
            tail_target = u32(u32(tail_atoms * tile_k * ATOM_BYTES) + tail_row * u32(ATOM_BYTES)
                              + (((tail_chunk & u32(7)) ^ (tail_row & u32(7))) << u32(4)))  # fmt: skip
            tail_ids = cuda.local.array(tail_rows, u32)
            tail_x_at, tail_room, tail_beyond = x, u32(0), u32(0)
        row_bytes = u32(ldx * u64(2))
        ids = cuda.local.array(batch, u32)
        next_ids = cuda.local.array(batch, u32)
        stage, phase = own_team, u32(1)
        # two walks over this team's stages (every teams-th): that of the ids is IDS_AHEAD of them ahead of the copies',
        # so that no copy waits for its id. `step` is the k tile inside the queue's current record, of `count`.
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
                    column = u32(entry[3] * u32(tile_n))
                    # a column tile that n cuts inside a chunk copies by byte counts; elsewhere a chunk is whole, or
                    # beyond n and zeroed: letting it read column 0 instead doubled such a tile's time (H200, 2026-11)
                    cut = u32(entry[3] + u32(1)) * u32(tile_n) > n and (n & u32(7)) != u32(0)
                    x_at, room, beyond = bounds(u32(column + column_chunk * u32(8)), x, n)
                    if tail_rows > 0:
                        tail_x_at, tail_room, tail_beyond = bounds(u32(column + tail_chunk * u32(8)), x, n)
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
                # shared memory is read in order with the copies' issue, so the next ids are read before these copies:
                # read after them, they wait for the whole queue to drain (400 clocks a stage; H200, 2026-11)
                ids_now = u32(own_ids + slot)
                if tail_rows > 0:
                    tail_ids_now = u32(tail_ids_at + slot)
                slot = u32((slot + u32(slot_bytes)) & u32(ring_bytes - 1))
                if batches > 1:
                    load_ids(next_ids, u32(ids_now + u32(batch * 4)))
                    copy_batch(to, u32(0), ids, row_bytes, x_at, cut, room, beyond)
                    for j in range(batch):
                        ids[j] = next_ids[j]
                if batches > 2:
                    load_ids(next_ids, u32(ids_now + u32(2 * batch * 4)))
                    copy_batch(to, u32(batch_bytes), ids, row_bytes, x_at, cut, room, beyond)
                    for j in range(batch):
                        ids[j] = next_ids[j]
                    load_ids(next_ids, u32(ids_now + u32(3 * batch * 4)))
                    copy_batch(to, u32(2 * batch_bytes), ids, row_bytes, x_at, cut, room, beyond)
                    for j in range(batch):
                        ids[j] = next_ids[j]
                if tail_rows > 0:
                    load_tail_ids(tail_ids, tail_ids_now)
                    copy_batch(to, u32((batches - 1) * batch_bytes), ids, row_bytes, x_at, cut, room, beyond)
                wait_ids()
                warp_sync()
                load_ids(next_ids, u32(own_ids + slot))
                if tail_rows > 0:
                    copy_tail(u32(stage_at + tail_target), u32(0), tail_ids, row_bytes, tail_x_at, cut, tail_room,
                              tail_beyond)  # fmt: skip
                else:
                    copy_batch(to, u32((batches - 1) * batch_bytes), ids, row_bytes, x_at, cut, room, beyond)
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
