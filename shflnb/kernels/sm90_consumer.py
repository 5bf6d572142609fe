"""The consumer warpgroups of `spmm_sm90.py`: they walk the tiles, multiply each stage of the ring, and store results.

What depends on which side of wgmma the weights are is in `sm90_rows.py` (v = 64, 128) and `sm90_tokens.py` (16, 32).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import cuda
from numba.cuda import types

from .config import Config
from .epilogue import load_bias_word
from .ptx import (
    fence_proxy_async,
    ld_global_nc_v4,
    mbarrier_arrive,
    mbarrier_wait_parity,
    no_unroll,
    opaque,
    setmaxnreg_inc,
    shuffle,
    wgmma_commit,
    wgmma_fence,
    wgmma_wait,
)
from .ptx_cluster import grid_wait
from .sm90_rows import make_rows_side
from .sm90_tokens import make_tokens_side

__all__ = ["make_consumer"]

u32, u64, f32 = types.uint32, types.uint64, types.float32


def make_skip(config: Config) -> Callable[..., Any]:
    """Device function (stage, phase, count): where the ring stands `count` stages further."""
    stages = config.stages

    @cuda.jit(device=True, forceinline=True)
    def skip(stage, phase, count):
        stage = u32(stage + count)
        rounds = u32(stage // u32(stages))
        return u32(stage - u32(rounds * u32(stages))), u32(phase ^ u32(rounds & u32(1)))

    return skip


def make_consumer(config: Config) -> Callable[..., Any]:
    """Device function of a consumer warpgroup: multiply and store every tile of this block, or every second one.

    order (with `alternate`): two mbarriers, one for each consumer, that say whose turn it is. Each warp of the other
    one arrives: a warp that has not yet seen its turn would otherwise miss it, where tiles are so short that nothing
    else makes the warps of a consumer wait for each other.
    """
    stages, stage_bytes, producers = config.stages, config.stage_bytes, config.producers
    registers, take_registers = config.accumulators, setmaxnreg_inc[config.registers[1]]
    alternate, skip = config.alternate, make_skip(config)
    wait_all, wait_one = wgmma_wait[0], wgmma_wait[1]
    make_side = make_rows_side if config.weights_are_m else make_tokens_side
    stores, owned, ask, multiply, store = make_side(config)
    plain = config.epilogue == "plain"  # then nobody owns a bias, and these arrays are not used
    stride = 2 if alternate else 1  # turns between tiles of a consumer

    def consume(base, full, empty, staging, tid, queue, rows, out, bias, residual, n, ldo, ldr, flags, order):
        take_registers()
        grid_wait()
        acc = cuda.local.array(registers, f32)
        targets, coming = cuda.local.array(stores, u32), cuda.local.array(stores, u32)
        words, owners = cuda.local.array(owned, u32), cuda.local.array(owned, u32)
        who = u32((tid >> u32(7)) - u32(producers))
        lane, leader = u32(tid & u32(31)), (tid & u32(127)) == u32(0)
        stage, phase, order_phase = u32(0), u32(0), u32(0)
        turn_bytes = u64(cuda.gridDim.x) * u64(16)
        if alternate and who == u32(1):  # the first tile is the other's, and it may begin
            if lane == u32(0):
                mbarrier_arrive(order)
            stage, phase = skip(stage, phase, ld_global_nc_v4(queue)[2])
            queue += turn_bytes
        # a trip to L2 takes as long as a stage: what a tile needs is asked for while the one before it is multiplied,
        # its place in the queue two tiles ahead
        entry = ld_global_nc_v4(queue)
        others = ld_global_nc_v4(queue + turn_bytes)[2] if alternate else u32(0)
        queue += turn_bytes * u64(stride)
        upcoming = ld_global_nc_v4(queue)
        ask(coming, owners, entry[0], who, tid, rows)
        while entry[2] > u32(0):
            for q in range(stores):
                targets[q] = coming[q]
            if not plain:
                for q in range(owned):
                    words[q] = load_bias_word(bias, owners[q], flags)
            ask(coming, owners, upcoming[0], who, tid, rows)
            count, column_tile, skipped = entry[2], entry[3], others
            entry = upcoming
            if alternate:
                others = ld_global_nc_v4(queue + turn_bytes)[2]
                # until the other has seen all of its stages full, the parity of ours may be that of a round before
                mbarrier_wait_parity(u32(order + who * u32(8)), order_phase)
                order_phase = u32(order_phase ^ u32(1))
            queue += turn_bytes * u64(stride)
            upcoming = ld_global_nc_v4(queue)
            for r in range(registers):
                acc[r] = f32(0.0)
            release, kt = u32(0), u32(0)
            while kt < count:
                no_unroll()
                stage_at = shuffle(u32(base + stage * u32(stage_bytes)), u32(0))  # one value for the warp
                mbarrier_wait_parity(u32(full + stage * u32(8)), phase)
                fence_proxy_async()
                wgmma_fence()
                multiply(acc, stage_at, who)
                wgmma_commit()
                wait_one()
                if leader and kt > u32(0):
                    mbarrier_arrive(release)
                release = u32(empty + stage * u32(8))
                stage = u32(stage + u32(1))
                if stage == u32(stages):
                    stage = u32(0)
                    phase = u32(phase ^ u32(1))
                kt = opaque(u32(kt + u32(1)))
            if alternate:
                if lane == u32(0):
                    mbarrier_arrive(u32(order + (who ^ u32(1)) * u32(8)))
                stage, phase = skip(stage, phase, skipped)
            wait_all()
            if leader:
                mbarrier_arrive(release)
            store(acc, targets, words, column_tile, staging, who, tid, n, out, residual, ldo, ldr, flags)

    return cuda.jit(device=True, forceinline=True)(consume)
