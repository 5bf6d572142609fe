"""The consumer warpgroups of `spmm_sm90.py`: wgmma on the stages of the ring, then epilogue and store of a tile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import cuda
from numba.cuda import types

from .config import ATOM_BYTES, Config
from .epilogue import HAS_RESIDUAL, make_activation, make_load_bias, make_load_residual, store_chunk
from .ptx import (
    bar_sync,
    fence_proxy_async,
    ld_global_nc_u32,
    ld_global_nc_v4,
    ld_shared_v4,
    make_wgmma,
    mbarrier_arrive,
    mbarrier_wait_parity,
    pack_pair,
    setmaxnreg_inc,
    stmatrix_x4,
    stmatrix_x4_trans,
    warp_sync,
    wgmma_commit,
    wgmma_fence,
    wgmma_wait,
)
from .ptx_cluster import grid_wait
from .signals import count_up

__all__ = ["make_consumer"]

u32, u64, f32 = types.uint32, types.uint64, types.float32

CORE_BYTES = 128  # an 8x8 core matrix of 2-byte values
STAGING_PITCH = 144  # bytes: 64 columns and a chunk more, so that 8 rows fall into different banks
SWIZZLE_128B = 1 << 62  # bits 62..63 of a wgmma descriptor


def make_consumer(config: Config) -> Callable[..., Any]:
    """Device function of a consumer warpgroup: multiply and store every tile of this block."""
    return make_consumer_rows(config) if config.weights_are_m else make_consumer_tokens(config)


def make_skip(config: Config) -> Callable[..., Any]:
    """Device function (stage, phase, count): where the ring stands `count` stages further."""
    stages = config.stages

    @cuda.jit(device=True, forceinline=True)
    def skip(stage, phase, count):
        stage = u32(stage + count)
        rounds = u32(stage // u32(stages))
        return u32(stage - u32(rounds * u32(stages))), u32(phase ^ u32(rounds & u32(1)))

    return skip


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
    wait_all, wait_one = wgmma_wait[0], wgmma_wait[1]
    take_registers = setmaxnreg_inc[config.registers[2]]
    has_movers, tiles_of_a_sweep = config.movers > 0, max(1, config.sweep // config.tile_n)
    alternate, skip = config.alternate, make_skip(config)

    def consume(base, full, empty, staging, tid, queue, rows, out, bias, residual, n, ldo, ldr, flags,
                finishing, order):  # fmt: skip
        take_registers()
        grid_wait()
        acc = cuda.local.array(registers, f32)
        targets = cuda.local.array(4, u32)
        who = u32((tid >> u32(7)) - u32(producers))
        lane = u32(tid & u32(31))
        warp = u32((tid >> u32(5)) & u32(3))
        leader = (tid & u32(127)) == u32(0)
        if row_splits == 2:
            row_offset, token_offset = u32(who * u32(64)), u32(0)
            a_offset, b_offset = u32(who * u32(8 * CORE_BYTES)), u32(0)
        else:
            half = u32(0) if alternate else who
            row_offset, token_offset = u32(0), u32(half * u32(warp_n))
            a_offset, b_offset = u32(0), u32(half * u32(warp_n // 64 * tile_k * ATOM_BYTES))
        staging = u32(staging + ((tid >> u32(5)) - u32(4 * producers)) * u32(16 * STAGING_PITCH))
        matrix_at = u32(staging + (lane & u32(15)) * u32(STAGING_PITCH) + (lane >> u32(4)) * u32(16))
        chunk_at = u32(staging + (lane >> u32(3)) * u32(STAGING_PITCH) + (lane & u32(7)) * u32(16))
        stage = u32(0)
        phase = u32(0)
        turn_bytes = u64(cuda.gridDim.x) * u64(16)
        entry = ld_global_nc_v4(queue)
        order_phase = u32(0)
        if alternate and who == u32(1):  # the first tile is the other's, and it may begin
            if leader:
                mbarrier_arrive(order)
            stage, phase = skip(stage, phase, entry[2])
            if entry[2] > u32(0):
                queue += turn_bytes
                entry = ld_global_nc_v4(queue)
        count = entry[2]
        finished = u64(0)  # counter of the tile before, not signalled yet
        while count > u32(0):
            own_counter, signal_at = u64(0), u32(0xFFFFFFFF)
            if has_movers:
                own_counter = finishing + u64(entry[3] // u32(tiles_of_a_sweep)) * u64(4)
                if finished != u64(0) and lane == u32(0):
                    signal_at = u32(1) if count > u32(1) else u32(0)
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
            others = u32(0)
            if alternate:
                others = entry[2]
                if others > u32(0):
                    queue += turn_bytes
                    entry = ld_global_nc_v4(queue)
                # until the other has seen all of its stages full, the parity of ours may be that of a round before
                mbarrier_wait_parity(u32(order + who * u32(8)), order_phase)
                order_phase = u32(order_phase ^ u32(1))
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
                # behind this tile's first products: the stores are done by then, and the fence has nothing to wait for
                if has_movers and u32(kt) == signal_at:
                    count_up(finished)
                release = u32(empty + stage * u32(8))
                stage = u32(stage + u32(1))
                if stage == u32(stages):
                    stage = u32(0)
                    phase = u32(phase ^ u32(1))
            if alternate:
                if leader:
                    mbarrier_arrive(u32(order + (who ^ u32(1)) * u32(8)))
                stage, phase = skip(stage, phase, others)
            wait_all()
            if leader:
                mbarrier_arrive(release)
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
            count = entry[2]
            finished = own_counter
        if has_movers and finished != u64(0) and lane == u32(0):
            count_up(finished)

    return cuda.jit(device=True, forceinline=True)(consume)


def make_finish(config: Config, i: int) -> Callable[..., Any]:
    """Device function that finishes a warp's 16 tokens of atom i and stages them transposed; one function per i, see
    `make_drain`.
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
    wait_all, wait_one = wgmma_wait[0], wgmma_wait[1]
    take_registers = setmaxnreg_inc[config.registers[2]]
    has_movers, tiles_of_a_sweep = config.movers > 0, max(1, config.sweep // config.tile_n)
    alternate, skip = config.alternate, make_skip(config)

    def consume(base, full, empty, staging, tid, queue, rows, out, bias, residual, n, ldo, ldr, flags,
                finishing, order):  # fmt: skip
        take_registers()
        grid_wait()
        acc = cuda.local.array(registers, f32)
        targets = cuda.local.array(stores, u32)
        own = u32(tid & u32(127))
        who = u32((tid >> u32(7)) - u32(producers))
        lane = u32(tid & u32(31))
        warp = u32((tid >> u32(5)) & u32(3))
        leader = own == u32(0)
        half = u32(0) if alternate else who
        staging = u32(staging + who * u32(v * pitch))
        matrix_at = u32(staging + (u32(8) * (lane >> u32(4)) + (lane & u32(7))) * u32(pitch)
                        + (warp * u32(16) + u32(8) * ((lane >> u32(3)) & u32(1))) * u32(2))  # fmt: skip
        stage = u32(0)
        phase = u32(0)
        turn_bytes = u64(cuda.gridDim.x) * u64(16)
        entry = ld_global_nc_v4(queue)
        order_phase = u32(0)
        if alternate and who == u32(1):  # the first tile is the other's, and it may begin
            if leader:
                mbarrier_arrive(order)
            stage, phase = skip(stage, phase, entry[2])
            if entry[2] > u32(0):
                queue += turn_bytes
                entry = ld_global_nc_v4(queue)
        count = entry[2]
        finished = u64(0)  # counter of the tile before, not signalled yet
        while count > u32(0):
            own_counter, signal_at = u64(0), u32(0xFFFFFFFF)
            if has_movers:
                own_counter = finishing + u64(entry[3] // u32(tiles_of_a_sweep)) * u64(4)
                if finished != u64(0) and lane == u32(0):
                    signal_at = u32(1) if count > u32(1) else u32(0)
            row = u32(entry[0] * u32(v))
            column = u32(entry[3] * u32(tile_n) + half * u32(own_n))
            for q in range(stores):
                targets[q] = ld_global_nc_u32(rows + u64(row + u32(own + u32(q * 128)) // u32(row_chunks)) * u64(4))
            queue += turn_bytes
            entry = ld_global_nc_v4(queue)
            others = u32(0)
            if alternate:
                others = entry[2]
                if others > u32(0):
                    queue += turn_bytes
                    entry = ld_global_nc_v4(queue)
                # until the other has seen all of its stages full, the parity of ours may be that of a round before
                mbarrier_wait_parity(u32(order + who * u32(8)), order_phase)
                order_phase = u32(order_phase ^ u32(1))
            for r in range(registers):
                acc[r] = f32(0.0)
            release = u32(0)
            for kt in range(count):
                mbarrier_wait_parity(u32(full + stage * u32(8)), phase)
                fence_proxy_async()
                stage_at = u32(base + stage * u32(stage_bytes))
                desc_a = u64(desc_a0) | (u64(stage_at >> u32(4)) + u64(half) * u64(atoms * atom_step))
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
                # behind this tile's first products: the stores are done by then, and the fence has nothing to wait for
                if has_movers and u32(kt) == signal_at:
                    count_up(finished)
                release = u32(empty + stage * u32(8))
                stage = u32(stage + u32(1))
                if stage == u32(stages):
                    stage = u32(0)
                    phase = u32(phase ^ u32(1))
            if alternate:
                if leader:
                    mbarrier_arrive(u32(order + (who ^ u32(1)) * u32(8)))
                stage, phase = skip(stage, phase, others)
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
                store_chunk(w[0], w[1], w[2], w[3], targets[q], u32(column + index % u32(row_chunks) * u32(8)), n, out,
                            ldo, flags)  # fmt: skip
            bar_sync(u32(who + u32(1)), u32(128))
            count = entry[2]
            finished = own_counter
        if has_movers and finished != u64(0) and lane == u32(0):
            count_up(finished)

    return cuda.jit(device=True, forceinline=True)(consume)
