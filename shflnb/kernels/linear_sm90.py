"""The product for Hopper on token-major arrays: `spmm_sm90.py` with a warpgroup that turns x and the results meanwhile.

    out[t, row_perm[g*v:(g+1)*v]] = act(values[g].T @ x[t, indices[g]] + bias)       for every token t and group g

A transpose is bound by device memory, a product by L2 and the tensor cores; one after the other they wait for each
other's unit. Here each block has a fourth warpgroup, the movers. They turn x into a feature-major workspace, one sweep
of column tiles after the other; the producers start a sweep as soon as its part of x is there, and the movers turn its
results while the next sweep is computed. Workspaces of a sweep are still in L2 when they are read.

    movers       x0 x1 x2 . y0 x3 . y1 . y2 . y3           xs: x of sweep s    ys: results of sweep s
    producers,         s0 s1 s2 s3                          wait for the movers' counter of sweep s
    consumers             s0 s1 s2 s3                       count the tiles that are done for the movers

Blocks wait for one another, so all of them must be on the device at once: a cooperative launch. Needs capability 9.0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import cuda
from numba.cuda import types

from .config import Config
from .ptx import mbarrier_init, mbarrier_init_fence, smem_address
from .sm90_consumer import make_consumer
from .sm90_mover import make_mover
from .sm90_producer import make_producer

__all__ = ["make_linear_sm90"]

u32, u64 = types.uint32, types.uint64


def make_linear_sm90(config: Config) -> Callable[..., Any]:
    """The kernel function of a config with movers; every argument is uint64 (addresses in bytes, sizes in elements).

    values, columns, queue, rows: as for `spmm_sm90`, with `groups` row groups; the queue's sweeps are of `config.sweep`
    tokens. counters: uint32, two for each of `sweeps` sweeps, all zero at the start; see `sweeps.py`.
    x (n, k) with ldx, out (n, m) with ldo: token-major. turned (k, n), product (m, n): workspaces, feature-major, with
    ld. flags: see `epilogue.py`.
    """
    stages, stage_bytes = config.stages, config.stage_bytes
    barriers, copiers, team_threads = stages * stage_bytes, 128 * config.producers, 32 * config.team
    consumers_end = copiers + 256
    tile_at = barriers + 256 + config.ids_bytes
    staging = config.smem_bytes - config.staging_bytes
    produce, consume, move = make_producer(config), make_consumer(config), make_mover(config)

    def linear_sm90(values, columns, queue, rows, counters, sweeps, x, ldx, turned, product, ld, out, ldo, bias, n, k,
                    m, groups, flags):  # fmt: skip
        smem = cuda.shared.array(0, types.uint8)
        base = smem_address(smem)
        full = u32(base + u32(barriers))
        empty = u32(full + u32(8 * stages))
        tid = u32(cuda.threadIdx.x)
        own_queue = queue + u64(cuda.blockIdx.x) * u64(16)
        finishing = counters + sweeps * u64(4)
        if tid == u32(0):
            for stage in range(stages):
                # full: a team's threads and the weights' bytes; empty: one leader of each consumer warpgroup
                mbarrier_init(u32(full + u32(8 * stage)), u32(team_threads + 1))
                mbarrier_init(u32(empty + u32(8 * stage)), u32(2))
            mbarrier_init_fence()
        cuda.syncthreads()
        if tid < u32(copiers):
            produce(base, full, empty, u32(base + u32(barriers + 256)), tid, values, columns, own_queue, turned, u32(n),
                    ld, counters, u32(k))  # fmt: skip
        elif tid < u32(consumers_end):
            consume(base, full, empty, u32(base + u32(staging)), tid, own_queue, rows, product, bias, u64(0), u32(n),
                    ld, u64(0), u32(flags), finishing, u32(0))  # fmt: skip
        else:
            move(u32(base + u32(tile_at)), tid, counters, finishing, u32(sweeps), x, ldx, turned, product, ld, out, ldo,
                 u32(n), u32(k), u32(m), u32(groups))  # fmt: skip

    return linear_sm90
