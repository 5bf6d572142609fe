"""Shfl-BW product for Hopper: a producer warpgroup stitches, two consumer warpgroups multiply with wgmma.

    out[row_perm[g*v:(g+1)*v], :] = values[g].T @ x[indices[g], :]          for every group g

One persistent block per SM walks (group, column tile) tiles. Shared memory is a ring of stages; one stage is

    stitched x      [tile_n / 64 atoms][tile_k rows][128 B]   16-byte chunk c of row r stands at c ^ (r % 8): the
                                                              128-byte swizzle of a wgmma operand that is contiguous
                                                              along tokens
    packed weights  [tile_k / 8][v / 8][8 rows][8 columns]    8x8 core matrices, no swizzle, contiguous along k

    v = 128: consumers split the rows      v = 64: they split the tokens     v = 16, 32: tokens are the M side of wgmma
        +----------------+                     +-------+-------+                 D.T[tokens, v] = x.T @ W.T, so that a
        | rows 0..63     |                     | tok.  | tok.  |                 64-row instruction wastes nothing; the
        | rows 64..127   |                     | 0..   | n/2.. |                 result is transposed on its way out
        +----------------+                     +-------+-------+

With `config.alternate` they do not share a tile: each takes every second one whole, and stores its results while the
other multiplies. The ring goes through the tiles in order, so a barrier for each says whose stages come next.

The producer is in `sm90_producer.py`, the consumers are in `sm90_consumer.py`; the kernel here sets up the barriers
and sends every warpgroup to its work.

Launched to overlap the end of the kernel before it (programmatic launch): until `grid_wait` nothing is read but ids,
queue and rows, which the host wrote long ago. Needs capability 9.0 (assembled as sm_90a). Padded columns have id -1:
they are zero-filled and read nothing of x.
Source: PTX ISA, sections on wgmma, mbarrier, cp.async and setmaxnreg; tile shapes by measurement (docs/performance.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import cuda
from numba.cuda import types

from .config import Config
from .ptx import mbarrier_init, mbarrier_init_fence, smem_address
from .ptx_cluster import grid_launch_dependents
from .sm90_consumer import make_consumer
from .sm90_producer import make_producer

__all__ = ["make_spmm_sm90"]

u32, u64 = types.uint32, types.uint64


def make_spmm_sm90(config: Config) -> Callable[..., Any]:
    """The kernel function of a config; every argument is uint64 (addresses in bytes, sizes in elements).

    queue: for every turn and block a record of four uint32, (group, first k tile, k tiles, column tile); a block walks
    its column of the queue until a record with no tiles, reading ahead of that (`queue.EMPTY_TURNS`). rows: the output
    row of every packed row, `NO_ROW` for rows that do not exist. flags: see `epilogue.py`.
    """
    stages, stage_bytes = config.stages, config.stage_bytes
    barriers, copiers, team_threads = stages * stage_bytes, 128 * config.producers, 32 * config.team
    staging, alternate = config.smem_bytes - config.staging_bytes, config.alternate
    produce = make_producer(config)
    consume = make_consumer(config)

    def spmm_sm90(values, columns, queue, rows, x, out, bias, residual, n, ldx, ldo, ldr, flags):
        smem = cuda.shared.array(0, types.uint8)
        base = smem_address(smem)
        full = u32(base + u32(barriers))
        empty = u32(full + u32(8 * stages))
        order = u32(empty + u32(8 * stages))  # with alternate: whose turn it is
        tid = u32(cuda.threadIdx.x)
        own_queue = queue + u64(cuda.blockIdx.x) * u64(16)
        if tid == u32(0):
            for stage in range(stages):
                # full: a team's threads and the weights' bytes; empty: the leaders of the consumers that read it
                mbarrier_init(u32(full + u32(8 * stage)), u32(team_threads + 1))
                mbarrier_init(u32(empty + u32(8 * stage)), u32(1 if alternate else 2))
            if alternate:
                mbarrier_init(order, u32(4))
                mbarrier_init(u32(order + u32(8)), u32(4))
            mbarrier_init_fence()
        cuda.syncthreads()
        grid_launch_dependents()  # a kernel launched in the same way may set up as soon as blocks of this one end
        if tid < u32(copiers):
            produce(base, full, empty, u32(base + u32(barriers + 256)), tid, values, columns, own_queue, x, u32(n), ldx)
        else:
            consume(base, full, empty, u32(base + u32(staging)), tid, own_queue, rows, out, bias, residual, u32(n), ldo,
                    ldr, u32(flags), order)  # fmt: skip

    return spmm_sm90
