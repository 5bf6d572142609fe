"""Few columns on Hopper: packed weights streamed once from device memory, x stitched row by row, wgmma.

    out[row_perm[g*v:(g+1)*v], :] = values[g].T @ x[indices[g], :]          for every group g, up to 64 columns

The bytes of the weights are the cost, so a block is small (two to an SM: one stores while the other streams) and does
three things at once:

    last warp    copies packed weights, 64 kept columns a stage, as far ahead as the ring goes. It does not wait for the
                 kernel before this one in the stream: weights are constants. They are the first to leave L2 again, so
                 that x, results and what lies between them stay there
    4 or 8 more  stitch: each takes every so many-th stage and copies the rows of x its columns name, 16 bytes (8
                 tokens) a thread; x is small and stays in L2. Of token-major x, two columns a thread, value by value
    warps 0..3   multiply: D[64 packed rows, 16, 32 or 64 tokens] += W @ x; what D has for rows and tokens that do not
                 exist is anything and goes nowhere

A stitched row has room for 16, 32 or 64 tokens; it stands under the 32-, 64- or 128-byte swizzle of a wgmma operand
that is contiguous along tokens.

With several ranks the blocks of a cluster share a group's kept columns, and send each other their sums through
distributed shared memory (`skinny_exchange.py`). Blocks, or clusters, walk the records of `queue.py`.
Source: PTX ISA, sections on wgmma, mbarrier, cp.async, cp.async.bulk, griddepcontrol and barrier.cluster.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import cuda
from numba.cuda import types

from .config import CORE_BYTES, SWIZZLE_128B
from .ptx import (
    cp_async_16,
    cp_async_16_below,
    cp_async_16_whole,
    cp_async_commit,
    cp_async_mbarrier_arrive_noinc,
    cp_async_wait,
    fence_proxy_async,
    ld_global_nc_v2,
    ld_global_nc_v4,
    ld_shared_u16,
    ld_shared_u32,
    ld_shared_v2,
    ld_shared_v4,
    mad_wide_u32,
    make_wgmma,
    mbarrier_arrive,
    mbarrier_arrive_expect_tx,
    mbarrier_init,
    mbarrier_init_fence,
    mbarrier_wait_parity,
    no_unroll,
    opaque,
    shuffle,
    smem_address,
    st_shared_v4,
    warp_sync,
    wgmma_commit,
    wgmma_fence,
    wgmma_wait,
)
from .ptx_cluster import (
    bulk_copy_g2s_hint,
    bulk_prefetch_l2,
    cluster_arrive_relaxed,
    cluster_wait,
    evict_first,
    grid_launch_dependents,
    grid_wait,
    ld_global_u16_below,
    low_halves,
    nanosleep,
)
from .skinny_config import BARRIER_BYTES, FIRST_PLACES, PACED, TILE_K, SkinnyConfig
from .skinny_exchange import make_finish, make_own_place

__all__ = ["make_skinny_wgmma"]

u32, u64, f32 = types.uint32, types.uint64, types.float32

SWIZZLE_BITS = {2: 3 << 62, 4: 2 << 62, 8: SWIZZLE_128B}
# the swizzle of row r is r % 8 of 8 chunks, r // 2 % 4 of 4, r // 4 % 2 of 2
SWIZZLES = {2: (2, 1), 4: (1, 3), 8: (0, 7)}


def make_own_tiles(config: SkinnyConfig) -> Callable[..., Any]:
    """Device function (first tile, tiles, rank) -> this rank's (first tile, tiles)."""
    shift = config.ranks.bit_length() - 1

    @cuda.jit(device=True, forceinline=True)
    def own_tiles(first, tiles, rank):
        begin = u32((tiles * rank) >> u32(shift))
        return u32(first + begin), u32(u32((tiles * u32(rank + u32(1))) >> u32(shift)) - begin)

    return own_tiles


@cuda.jit(device=True, forceinline=True)
def first_place(group, count):
    """Which of a block's `count` k tiles comes first: for each group at another place of x.

    Blocks that all begin at the same place ask the same few lines of L2 for x at the same time.
    """
    return u32((u64(u32(group * u32(FIRST_PLACES))) * u64(count)) >> u64(32))


def make_read_record(config: SkinnyConfig) -> Callable[..., Any]:
    """Device function (place in the queue, equal) -> its record.

    With `equal`, see `skinny_plan.equal_groups`, places are numbers of groups, and nothing is read: the ids and weights
    that a block begins with would wait for it.
    """
    if config.parts:

        def read_record(place, equal):
            return ld_global_nc_v4(place)

    else:

        def read_record(place, equal):
            if equal == u64(0):
                return ld_global_nc_v4(place)
            tiles, group = u32(equal), u32(place)
            if place >= equal >> u64(32):
                tiles = u32(0)
            return group, u32(group * tiles), tiles, u32(0)

    return cuda.jit(device=True, forceinline=True)(read_record)


def make_own_origin(config: SkinnyConfig, place: int) -> Callable[..., Any]:
    """Device function (address of a queue record, origin) -> where its k tiles count from.

    `origin`, or with parts an address in the record: of the values (`place` 0) or the columns (1) of the record's part.
    """
    if config.parts:

        def own_origin(record, origin):
            two = ld_global_nc_v2(record + u64(16 + 8 * place))
            return u64(two[1]) << u64(32) | u64(two[0])

    else:

        def own_origin(record, origin):
            return origin

    return cuda.jit(device=True, forceinline=True)(own_origin)


def make_stream_weights(config: SkinnyConfig) -> Callable[..., Any]:
    """Device function of one thread: the weights of every stage."""
    stages, stage_bytes, x_bytes, w_bytes = config.stages, config.stage_bytes, config.x_bytes, config.w_bytes
    own_tiles, own_origin, pace_ns = make_own_tiles(config), make_own_origin(config, 0), config.pace_ns
    read_record = make_read_record(config)

    @cuda.jit(device=True, forceinline=True)
    def stream_weights(base, full, empty, values, queue, step, equal, rank, flags):
        stage, phase, read_once = u32(0), u32(1), evict_first()
        pauses = u32(stages - 1) if flags & u64(PACED) else u32(0)
        entry, origin = read_record(queue, equal), own_origin(queue, values)
        while entry[2] > u32(0):
            own = own_tiles(entry[1], entry[2], rank)
            place = first_place(entry[0], own[1])
            source = origin + u64(u32(own[0] + place)) * u64(w_bytes)
            queue += step
            entry, origin = read_record(queue, equal), own_origin(queue, values)
            for _ in range(own[1]):
                mbarrier_wait_parity(u32(empty + stage * u32(8)), phase)
                full_at = u32(full + stage * u32(8))
                mbarrier_arrive_expect_tx(full_at, u32(w_bytes))
                bulk_copy_g2s_hint(u32(base + stage * u32(stage_bytes) + u32(x_bytes)), source, u32(w_bytes), full_at,
                                   read_once)  # fmt: skip
                if pauses > u32(0):
                    pauses = u32(pauses - u32(1))
                    nanosleep(u32(pace_ns))
                source += u64(w_bytes)
                place = u32(place + u32(1))
                if place == own[1]:  # the tiles before the first one come last
                    source -= u64(own[1]) * u64(w_bytes)
                stage = u32(stage + u32(1))
                if stage == u32(stages):
                    stage = u32(0)
                    phase = u32(phase ^ u32(1))

    return stream_weights


@cuda.jit(device=True, forceinline=True)
def fetch_ahead(ahead, aheads, block, blocks):
    """Of one thread: ask L2 for what the next product reads first, its table's records in turns with other blocks."""
    entry = block
    while entry < aheads:
        span = ld_global_nc_v4(ahead + u64(entry) * u64(16))
        bulk_prefetch_l2(u64(span[1]) << u64(32) | u64(span[0]), span[2])
        entry = u32(entry + blocks)


def make_load_tokens(octets: int) -> Callable[..., Any]:
    """Device function: `half` = so many times eight tokens of one column, then of another; those below n.

    Tokens are `stride` bytes apart, the first of them at `at`; the columns lie `first` and `second` bytes behind that.
    """
    count = 8 * octets

    @cuda.jit(device=True, forceinline=True)
    def load_tokens(half, at, first, second, token, n, stride):
        for t in range(count):
            half[t] = ld_global_u16_below(at + u64(first), u32(token + u32(t)), n)
            half[count + t] = ld_global_u16_below(at + u64(second), u32(token + u32(t)), n)
            at += stride

    return load_tokens


def make_store_tokens(config: SkinnyConfig, octets: int) -> Callable[..., Any]:
    """Device function: what `make_load_tokens` loaded into a stage, from chunk `chunk` on, under a mask by column."""
    count, row_bytes = 8 * octets, config.row_bytes

    @cuda.jit(device=True, forceinline=True)
    def store_tokens(half, to, chunk, swizzle, first_mask, second_mask):
        for c in range(octets):
            chunk_at = u32(to + ((u32(chunk + c) ^ swizzle) << u32(4)))
            for j in range(2):
                h, mask = count * j + 8 * c, second_mask if j else first_mask
                st_shared_v4(u32(chunk_at + u32(32 * j * row_bytes)), low_halves(half[h], half[h + 1]) & mask,
                             low_halves(half[h + 2], half[h + 3]) & mask, low_halves(half[h + 4], half[h + 5]) & mask,
                             low_halves(half[h + 6], half[h + 7]) & mask)  # fmt: skip

    return store_tokens


def make_read_id(config: SkinnyConfig) -> Callable[..., Any]:
    """Device function: the column id at a shared address."""
    if config.wide:

        def read_id(at):
            return ld_shared_u32(at)

    else:

        def read_id(at):
            return u32(ld_shared_u16(at))

    return cuda.jit(device=True, forceinline=True)(read_id)


def make_read_ids(config: SkinnyConfig, count: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Device functions: `words` = so many neighbouring ids (4, 8 or 16) from a shared address on; id j of them."""
    words_of_ids = count if config.wide else count // 2

    def read_ids(words, at):
        if words_of_ids == 2:
            words[0], words[1] = ld_shared_v2(at)
        else:
            for q in range(words_of_ids // 4):
                words[4 * q], words[4 * q + 1], words[4 * q + 2], words[4 * q + 3] = ld_shared_v4(u32(at + u32(16 * q)))

    if config.wide:

        def id_of(words, j):
            return words[j]

    else:

        def id_of(words, j):
            return u32(words[j // 2] >> u32(16)) if j % 2 else u32(words[j // 2] & u32(0xFFFF))

    return cuda.jit(device=True, forceinline=True)(read_ids), cuda.jit(device=True, forceinline=True)(id_of)


def make_stitch_tokens(config: SkinnyConfig) -> Callable[..., Any]:
    """Device function of a warp: a stage of stitched x from token-major x; lane l has the stage's columns l and l + 32.

    Neighbouring lanes have neighbouring kept columns, so a load of a warp touches few sectors. All loads are on their
    way before the first value is stored, and before the stage is empty.
    """
    chunks, row_bytes = config.chunks, config.row_bytes
    coarse, mask = SWIZZLES[chunks]
    load_one, load_two = make_load_tokens(1), make_load_tokens(2)
    store_one, store_two = make_store_tokens(config, 1), make_store_tokens(config, 2)
    read_id, id_bytes, no_column = make_read_id(config), config.id_bytes, config.no_column

    @cuda.jit(device=True, forceinline=True)
    def stitch_tokens(stage_at, own_ids, lane, x, n, stride, empty_at, phase):
        first, second = read_id(own_ids), read_id(u32(own_ids + u32(32 * id_bytes)))
        first_mask = u32(0) if first == u32(no_column) else u32(0xFFFFFFFF)
        second_mask = u32(0) if second == u32(no_column) else u32(0xFFFFFFFF)
        first, second = u32((first & first_mask) << u32(1)), u32((second & second_mask) << u32(1))
        swizzle = u32((lane >> u32(coarse)) & u32(mask))
        to = u32(stage_at + lane * u32(row_bytes))
        for pair in range(chunks // 2):
            if u32(16 * pair + 8) < n:
                half = cuda.local.array(32, u32)
                load_two(half, x + u64(16 * pair) * stride, first, second, u32(16 * pair), n, stride)
                if pair == 0:
                    mbarrier_wait_parity(empty_at, phase)
                store_two(half, to, 2 * pair, swizzle, first_mask, second_mask)
            elif u32(16 * pair) < n:
                few = cuda.local.array(16, u32)
                load_one(few, x + u64(16 * pair) * stride, first, second, u32(16 * pair), n, stride)
                if pair == 0:
                    mbarrier_wait_parity(empty_at, phase)
                store_one(few, to, 2 * pair, swizzle, first_mask, second_mask)

    return stitch_tokens


def make_stitch(config: SkinnyConfig) -> Callable[..., Any]:
    """Device function of a warp: the stitched x of its stages, every so many-th of the block's."""
    chunks, row_bytes, stages, stage_bytes = config.chunks, config.row_bytes, config.stages, config.stage_bytes
    own_tiles, own_origin = make_own_tiles(config), make_own_origin(config, 1)
    lane_rows = 2 * chunks  # rows of a stage that a lane copies a chunk of
    coarse, mask = SWIZZLES[chunks]
    token_major, stitch_tokens, read_record = config.token_major, make_stitch_tokens(config), make_read_record(config)
    stitchers, ids_ahead = config.stitchers, config.ids_ahead
    id_bytes, no_column = config.id_bytes, config.no_column
    slot_bytes, wait_ids = TILE_K * id_bytes, cp_async_wait[ids_ahead - 1]
    ring_bytes = config.id_slots * slot_bytes
    read_ids, id_of = make_read_ids(config, lane_rows)

    def make_copies(cut):
        """Device function that starts the copies of a stage; `cut`: n ends inside a chunk."""

        @cuda.jit(device=True, forceinline=True)
        def copies(to, ids, pitch, x_at, room, below):
            for j in range(lane_rows):
                at, own = u32((to ^ u32((j >> coarse & mask) << 4)) + u32(j * row_bytes)), id_of(ids, j)
                if cut:
                    cp_async_16(at, mad_wide_u32(own, pitch, x_at), room if own < below else u32(0))
                else:
                    cp_async_16_below(at, mad_wide_u32(own, pitch, x_at), own, below)

        return copies

    copy_cut, copy_whole = make_copies(True), make_copies(False)

    @cuda.jit(device=True, forceinline=True)
    def stitch(base, full, empty, id_rings, columns, queue, turn, equal, rank, member, lane, x, n, ldx):
        chunk, first_row = u32(lane % u32(chunks)), u32(lane // u32(chunks) * u32(lane_rows))
        swizzled = u32(chunk ^ ((first_row >> u32(coarse)) & u32(mask)))
        target = u32(base + first_row * u32(row_bytes) + (swizzled << u32(4)))
        id_ring = u32(id_rings + member * u32(ring_bytes))
        own_ids = u32(id_ring + first_row * u32(id_bytes))
        pitch = u32(ldx * u64(2))
        token = u32(chunk * u32(8))
        cut = (n & u32(7)) != u32(0)
        room, below, x_at = u32(0), u32(0), x  # ids below that are of columns, of which this lane has tokens
        if token < n:
            room = u32(u32(n - token) * u32(2))
            if room > u32(16):
                room = u32(16)
            below, x_at = u32(no_column), x + u64(token) * u64(2)
        ids = cuda.local.array(lane_rows, u32)
        stage, phase = member, u32(1)
        # the ids of a stage are asked for ids_ahead of this warp's stages before their use. `coming`: stages whose ids
        # are on their way; `step`: the next one, inside a record of `count`
        entry, origin = read_record(queue, equal), own_origin(queue, columns)
        following, next_origin = entry, origin  # of the record after it, asked for early
        if entry[2] > u32(0):
            queue += turn
            following, next_origin = read_record(queue, equal), own_origin(queue, columns)
        own = own_tiles(entry[1], entry[2], rank)
        count, step, tiles = own[1], member, entry[2]
        before = first_place(entry[0], count)
        ids_at = origin + u64(own[0]) * u64(slot_bytes) + u64(lane) * u64(16)
        to_slot, slot, lead, coming = u32(0), u32(0), u32(0), u32(0)
        while lead < u32(ids_ahead) or coming > u32(0):
            while step >= count and tiles > u32(0):  # this warp's next stage: in one of the records that follow
                step = u32(step - count)
                entry, origin = following, next_origin
                tiles = entry[2]
                if tiles > u32(0):
                    queue += turn
                    following, next_origin = read_record(queue, equal), own_origin(queue, columns)
                own = own_tiles(entry[1], tiles, rank)
                count = own[1]
                before = first_place(entry[0], count)
                ids_at = origin + u64(own[0]) * u64(slot_bytes) + u64(lane) * u64(16)
            if tiles > u32(0):
                place = u32(step + before)
                if place >= count:
                    place = u32(place - count)
                if lane < u32(slot_bytes // 16):
                    cp_async_16_whole(u32(id_ring + to_slot + lane * u32(16)), ids_at + u64(place) * u64(slot_bytes))
                to_slot = u32((to_slot + u32(slot_bytes)) & u32(ring_bytes - 1))
                step = u32(step + u32(stitchers))
                coming = u32(coming + u32(1))
            cp_async_commit()
            if lead < u32(ids_ahead):
                lead = u32(lead + u32(1))
                if lead == u32(ids_ahead):
                    grid_wait()  # x may be the work of the kernel before; ids and queue never are
            if lead == u32(ids_ahead) and coming > u32(0):
                coming = u32(coming - u32(1))
                wait_ids()
                warp_sync()
                if token_major:
                    stitch_tokens(u32(base + stage * u32(stage_bytes)), u32(id_ring + slot + lane * u32(id_bytes)),
                                  lane, x, n, ldx * u64(2), u32(empty + stage * u32(8)), phase)  # fmt: skip
                    fence_proxy_async()
                    warp_sync()
                    if lane == u32(0):
                        mbarrier_arrive(u32(full + stage * u32(8)))
                else:
                    read_ids(ids, u32(own_ids + slot))
                    mbarrier_wait_parity(u32(empty + stage * u32(8)), phase)
                    to = u32(target + stage * u32(stage_bytes))
                    if cut:
                        copy_cut(to, ids, pitch, x_at, room, below)
                    else:
                        copy_whole(to, ids, pitch, x_at, room, below)
                    cp_async_mbarrier_arrive_noinc(u32(full + stage * u32(8)))
                slot = u32((slot + u32(slot_bytes)) & u32(ring_bytes - 1))
                stage = u32(stage + u32(stitchers))
                if stage >= u32(stages):
                    stage = u32(stage - u32(stages))
                    phase = u32(phase ^ u32(1))

    return stitch


def make_multiply(config: SkinnyConfig) -> Callable[..., Any]:
    """Device function of the consumer warpgroup: acc += the product of a stage, 64 packed rows after 64.

    Of smaller groups the instruction also takes what lies behind the weights, for rows that do not exist.
    """
    v, tokens, row_bytes, x_bytes = config.v, 8 * config.chunks, config.row_bytes, config.x_bytes
    first = make_wgmma(tokens, config.dtype, b_mn_major=True)
    second = make_wgmma(tokens, config.dtype, first=tokens // 2, b_mn_major=True) if v == 128 else first
    step_w, step_x = 2 * (v // 8) * CORE_BYTES >> 4, 16 * row_bytes >> 4
    # weights: leading offset: core matrices along k; stride offset: along packed rows
    leading_w, high_w = ((v // 8) * CORE_BYTES >> 4) << 16, (CORE_BYTES >> 4) << 32
    # x: one atom holds all tokens; stride offset: 8 rows of k
    high_x = (8 * row_bytes >> 4) << 32 | SWIZZLE_BITS[config.chunks]

    @cuda.jit(device=True, forceinline=True)
    def multiply(acc, stage_at):
        at = u32(stage_at & u32(0x3FFFF))  # bits from 24 up name the block in its cluster, not part of a descriptor
        low_w, low_x = u32(u32(at + u32(x_bytes)) >> u32(4) | u32(leading_w)), u32(at >> u32(4))
        for step in range(TILE_K // 16):  # sums of 32 bits, since nothing is carried to the upper halves
            own_x = u64(u32(low_x + u32(step * step_x))) | u64(high_x)
            first(acc, u64(u32(low_w + u32(step * step_w))) | u64(high_w), own_x)
            if v == 128:
                second(acc, u64(u32(low_w + u32(step * step_w + (8 * CORE_BYTES >> 4)))) | u64(high_w), own_x)

    return multiply


def make_skinny_wgmma(config: SkinnyConfig) -> Callable[..., Any]:
    """The kernel function of a config; every argument is uint64 (addresses in bytes, sizes and strides in elements).

    values, columns: as for `spmm_sm90.py` with tile_k 64, but ids of 2 bytes unless `wide`. queue: for every turn and
    cluster a record of four uint32, (group, first k tile, k tiles, 0); a cluster walks its column of the queue until a
    record with no tiles. rows: the output row of every packed row, `NO_ROW` for rows that do not exist. x: feature-
    major, rows `ldx` apart start at 16-byte boundaries; or with `token_major` tokens `ldx` apart, anywhere. out and
    residual: any token and feature strides. flags: see `epilogue.py`, and `PACED`. equal: see `make_read_record`, or 0;
    not used with parts. ahead: `aheads` records of four uint32, (address, low and high, bytes, 0), of what is fetched
    into L2 for the product that follows.

    With `parts` values, columns, bias and residual are not used. A record of the queue goes on with two addresses, of
    the values and columns of its part, and its fourth uint32 is the number of the part; groups and k tiles count within
    the part. rows is the table of `make_own_place`.
    """
    stages, stage_bytes, ranks, row_warps = config.stages, config.stage_bytes, config.ranks, config.row_warps
    registers, barriers, streamer = config.sums, stages * stage_bytes, 4 + config.stitchers
    id_rings = barriers + BARRIER_BYTES
    exchange = id_rings + config.ids_bytes
    own_tiles, stream_weights, stitch = make_own_tiles(config), make_stream_weights(config), make_stitch(config)
    multiply, (begin, finish, row_values) = make_multiply(config), make_finish(config)
    own_place, record_bytes = make_own_place(config), 32 if config.parts else 16
    read_record, token_major, fillers = make_read_record(config), config.token_major, 2 if config.token_major else 33
    wait_all, wait_one = wgmma_wait[0], wgmma_wait[1]

    def skinny_wgmma(
        values, columns, queue, rows, x, out, bias, residual, n, ldx, ot, of, rt, rf, flags, equal, ahead, aheads
    ):
        smem = cuda.shared.array(0, types.uint8)
        base = smem_address(smem)
        full = u32(base + u32(barriers))
        empty = u32(full + u32(8 * stages))
        arrived = u32(empty + u32(8 * stages))
        tid = u32(cuda.threadIdx.x)
        lane, warp, block = u32(tid & u32(31)), u32(tid >> u32(5)), u32(cuda.blockIdx.x)
        rank = u32(block & u32(ranks - 1))
        own_queue, step = u64(block // u32(ranks)), u64(u32(cuda.gridDim.x) // u32(ranks))
        if equal == u64(0):
            own_queue, step = queue + own_queue * u64(record_bytes), step * u64(record_bytes)
        if tid == u32(0):
            for stage in range(stages):
                # full: a stitching warp (its lanes where their copies arrive) and the weights; empty: the consumers
                mbarrier_init(u32(full + u32(8 * stage)), u32(fillers))
                mbarrier_init(u32(empty + u32(8 * stage)), u32(1))
            for w in range(2 * row_warps):
                mbarrier_init(u32(arrived + u32(8 * w)), u32(1))
            mbarrier_init_fence()
        cuda.syncthreads()
        if ranks > 1:
            cluster_arrive_relaxed()  # the others' barriers are set up once this has been waited for
        grid_launch_dependents()
        if warp == u32(streamer):
            if lane == u32(0):
                stream_weights(base, full, empty, values, own_queue, step, equal, rank, flags)
                fetch_ahead(ahead, u32(aheads), block, u32(cuda.gridDim.x))
            warp_sync()
            if ranks > 1:
                cluster_wait()
        elif warp >= u32(4):
            stitch(base, full, empty, u32(base + u32(id_rings)), columns, own_queue, step, equal, rank,
                   u32(warp - u32(4)), lane, x, u32(n), ldx)  # fmt: skip
            if ranks > 1:
                cluster_wait()
        else:
            acc = cuda.local.array(registers, f32)
            targets = cuda.local.array(row_values, u32)
            stage, phase, turn = u32(0), u32(0), u32(0)
            entry = read_record(own_queue, equal)
            if ranks > 1:
                cluster_wait()
            grid_wait()  # before anything is stored: the kernel before may still read it
            while entry[2] > u32(0):
                own_rows, to, to_token, own_bias, own_flags = own_place(entry[3], rows, n, out, ot, of, bias, flags)
                begin(targets, own_rows, entry[0], warp, lane, rank)
                count = own_tiles(entry[1], entry[2], rank)[1]
                own_queue += step
                entry = read_record(own_queue, equal)
                for r in range(registers):
                    acc[r] = f32(0.0)
                release = u32(0)
                left = count
                while left > u32(0):  # one copy of it: descriptors are made in uniform registers only in the first
                    no_unroll()
                    left = opaque(u32(left - u32(1)))
                    stage_at = shuffle(u32(base + stage * u32(stage_bytes)), u32(0))  # one value for the warp
                    mbarrier_wait_parity(u32(full + stage * u32(8)), phase)
                    if not token_major:  # who stitches token-major x fences itself; copies cannot
                        fence_proxy_async()
                    wgmma_fence()
                    multiply(acc, stage_at)
                    wgmma_commit()
                    wait_one()
                    if tid == u32(0) and release > u32(0):
                        mbarrier_arrive(release)
                    release = u32(empty + stage * u32(8))
                    stage = u32(stage + u32(1))
                    if stage == u32(stages):
                        stage = u32(0)
                        phase = u32(phase ^ u32(1))
                wait_all()
                if tid == u32(0) and count > u32(0):
                    mbarrier_arrive(release)
                finish(acc, targets, u32(base + u32(exchange)), arrived, turn, rank, warp, lane, u32(n), to, to_token,
                       of, own_bias, residual, rt, rf, own_flags)  # fmt: skip
                turn = u32(turn + u32(1))

    return skinny_wgmma
