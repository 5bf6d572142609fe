"""The mover warpgroup of `linear_sm90.py`: token-major x becomes feature-major, feature-major results token-major.

One unit of work is 64 rows x 128 columns of the source, 256 contiguous bytes a row. All of it is requested at once (32
registers a thread), then each half of 64 x 64 values passes through one tile of shared memory: rows in,
`ldmatrix.trans` turns 8x8 blocks in registers, the turned rows out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import cuda
from numba.cuda import types

from .config import Config
from .ptx import (
    bar_sync,
    instruction,
    ld_shared_v4,
    ldmatrix_x4_trans,
    setmaxnreg_dec,
    st_global_stream_v4,
    st_global_v4,
    st_shared_u32,
    st_shared_v4,
)
from .signals import count_up, wait_for
from .sweeps import UNIT_COLS, UNIT_ROWS, make_walk, warps_done

__all__ = ["make_mover"]

u32, u64 = types.uint32, types.uint64

PITCH = 144  # bytes of a row of the tile: 64 values and a chunk more, so that 8 rows fall into different banks
BARRIER = 3  # the consumers have 1 and 2

_load_if = instruction(
    "Load 16 bytes from L2 if the last argument is not 0; zeros otherwise.",
    "{ .reg .pred p; setp.ne.u32 p, $5, 0; mov.u32 $0, 0; mov.u32 $1, 0; mov.u32 $2, 0; mov.u32 $3, 0; "
    "@p ld.global.cg.v4.u32 {$0,$1,$2,$3}, [$4]; }",
    (u64, u32), "=&r,=&r,=&r,=&r,l,r,~{memory}", types.UniTuple(u32, 4))  # fmt: skip


def make_mover(config: Config) -> Callable[..., Any]:
    """Device function of the mover warpgroup: the block's units in the order of `sweeps.py`.

    turning, finishing: the counters of the sweeps. x (n, k) and out (n, m) are token-major with leading dimensions ldx,
    ldo; turned (k, n) and product (m, n) feature-major, both with ld. Leading dimensions, k and m are multiples of 8
    and all addresses of 16 bytes.
    """
    give_registers = setmaxnreg_dec[config.registers[1]]
    walk, all_warps = make_walk(config.sweep), warps_done(config.sweep, config.tile_n)

    @cuda.jit(device=True, forceinline=True)
    def together():
        bar_sync(u32(BARRIER), u32(128))

    def move(tile, tid, turning, finishing, sweeps, x, ldx, turned, product, ld, out, ldo, n, k, m, groups):
        give_registers()
        own, lane, warp = u32(tid & u32(127)), u32(tid & u32(31)), u32((tid >> u32(5)) & u32(3))
        leader = own == u32(0)
        chunk, first_row = u32(own & u32(15)), u32(own >> u32(4))
        in_at = u32(tile + first_row * u32(PITCH) + (chunk & u32(7)) * u32(16))
        matrix_at = u32(tile + lane * u32(PITCH) + warp * u32(16))
        turned_at = u32(tile + (warp * u32(8) + (lane >> u32(2))) * u32(PITCH) + (lane & u32(3)) * u32(4))
        out_at = u32(tile + (own >> u32(3)) * u32(PITCH) + (own & u32(7)) * u32(16))
        words = cuda.local.array(32, u32)
        done = u64(0)  # counter of the unit before, not counted yet
        seen = u32(0xFFFFFFFF)  # the sweep whose results are known to be there
        part, place = u32(0), u32(cuda.blockIdx.x)
        while True:
            found, part, place, is_x, sweep, row_unit, col_unit = walk(place, part, n, k, m, sweeps)
            if not found:
                break
            place = u32(place + u32(cuda.gridDim.x))
            src, lds, dst, ldd, rows, cols = x, ldx, turned, ld, n, k
            if not is_x:
                src, lds, dst, ldd, rows, cols = product, ld, out, ldo, m, n
                if sweep != seen:
                    if leader:
                        if done != u64(0):
                            count_up(done)  # somebody may have to see that before what this waits for can happen
                        wait_for(finishing + u64(sweep) * u64(4), all_warps(sweep, n, groups))
                    done = u64(0)
                    seen = sweep
                    together()
            row0, col0 = u32(row_unit * u32(UNIT_ROWS)), u32(col_unit * u32(UNIT_COLS))
            col = u32(col0 + chunk * u32(8))
            at = src + (u64(row0 + first_row) * lds + u64(col)) * u64(2)
            for p in range(8):
                row = u32(row0 + first_row + u32(8 * p))
                w = _load_if(at, u32(1) if row < rows and col < cols else u32(0))
                at += u64(16) * lds
                words[4 * p] = w[0]
                words[4 * p + 1] = w[1]
                words[4 * p + 2] = w[2]
                words[4 * p + 3] = w[3]
            if leader and done != u64(0):
                count_up(done)  # the stores of the unit before have had the time of these loads
            done = turning + u64(sweep) * u64(4) if is_x else u64(0)
            for half in range(2):
                if u32(chunk >> u32(3)) == u32(half):
                    for p in range(8):
                        st_shared_v4(u32(in_at + u32(8 * p * PITCH)), words[4 * p], words[4 * p + 1], words[4 * p + 2],
                                     words[4 * p + 3])  # fmt: skip
                together()
                # warp w turns the column blocks w and w + 4: 8 columns of all 64 rows each
                a0 = ldmatrix_x4_trans(matrix_at)
                a1 = ldmatrix_x4_trans(u32(matrix_at + u32(32 * PITCH)))
                b0 = ldmatrix_x4_trans(u32(matrix_at + u32(64)))
                b1 = ldmatrix_x4_trans(u32(matrix_at + u32(64 + 32 * PITCH)))
                together()
                for q in range(4):
                    st_shared_u32(u32(turned_at + u32(16 * q)), a0[q])
                    st_shared_u32(u32(turned_at + u32(16 * q + 64)), a1[q])
                    st_shared_u32(u32(turned_at + u32(16 * q + 32 * PITCH)), b0[q])
                    st_shared_u32(u32(turned_at + u32(16 * q + 64 + 32 * PITCH)), b1[q])
                together()
                row = u32(row0 + (own & u32(7)) * u32(8))
                for p in range(4):
                    w = ld_shared_v4(u32(out_at + u32(16 * p * PITCH)))
                    col = u32(col0 + u32(64 * half + 16 * p) + (own >> u32(3)))
                    if row < rows and col < cols:
                        to = dst + (u64(col) * ldd + u64(row)) * u64(2)
                        if is_x:
                            st_global_v4(to, w[0], w[1], w[2], w[3])
                        else:
                            st_global_stream_v4(to, w[0], w[1], w[2], w[3])
                together()
        if leader and done != u64(0):
            count_up(done)

    return cuda.jit(device=True, forceinline=True)(move)
