"""The movers' order: every value is turned once, no unit waits for a later one, and the counts add up."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="needs numba-cuda (extra cu12 or cu13)")

from numba import cuda
from numba.cuda import types
from ptx_emulator import Machine, Program

from shflnb.kernels import compiler
from shflnb.kernels.ptx import st_global_v4
from shflnb.kernels.sweeps import UNIT_COLS, UNIT_ROWS, make_walk, units_in, warps_done

u32, u64 = types.uint32, types.uint64
CASES = [
    # m, k, n, tokens of a sweep, width of a tile, groups
    (264, 392, 1700, 512, 256, 5),
    (8, 8, 1, 128, 128, 1),
    (1024, 136, 511, 256, 64, 8),
    (72, 136, 777, 128, 128, 5),
    (128, 128, 1024, 1024, 256, 2),
]


def walked(m: int, k: int, n: int, sweep: int, tile_n: int, groups: int, blocks: int) -> list[list[tuple[int, ...]]]:
    """(is x, sweep, row unit, column unit, all units of x, all warps) of each unit of each block, from the kernel."""
    walk, units, warps = make_walk(sweep), units_in(sweep), warps_done(sweep, tile_n)
    room = 512

    def kernel(out, n, k, m, groups, sweeps):
        n, k, m = u32(n), u32(k), u32(m)
        at = out + u64(cuda.blockIdx.x) * u64(room * 32)
        part, place = u32(0), u32(cuda.blockIdx.x)
        while True:
            found, part, place, is_x, s, row, col = walk(place, part, n, k, m, u32(sweeps))
            if not found:
                break
            place = u32(place + u32(cuda.gridDim.x))
            if u32(cuda.threadIdx.x) == u32(0):
                st_global_v4(at, u32(1) if is_x else u32(2), s, row, col)
                st_global_v4(at + u64(16), units(s, n, k), warps(s, n, u32(groups)), u32(0), u32(0))
            at += u64(32)

    ptx = compiler.compile_ptx(kernel, [types.uint64] * 6, "sm_90", "walked", 32)
    machine = Machine(1 << 22)
    out = machine.upload(np.zeros((blocks, room, 8), np.uint32))
    machine.run(Program(ptx), grid=blocks, threads=32, args=[out, n, k, m, groups, -(-n // sweep)])
    table = machine.download(out, blocks * room * 32).view(np.uint32).reshape(blocks, room, 8)
    return [[(int(r[0] == 1), *map(int, r[1:6])) for r in rows[rows[:, 0] != 0]] for rows in table]


@pytest.mark.parametrize("blocks", [1, 7])
@pytest.mark.parametrize("case", CASES)
def test_every_value_is_turned_once_in_the_right_order(case: tuple[int, ...], blocks: int) -> None:
    m, k, n, sweep, tile_n, groups = case
    lists = walked(*case, blocks)
    every = [lists[place % blocks][place // blocks] for place in range(sum(map(len, lists)))]
    x_seen, y_seen = np.zeros((n, k), int), np.zeros((m, n), int)
    for is_x, s, row, col, _, _ in every:
        seen = x_seen if is_x else y_seen
        rows, cols = slice(row * UNIT_ROWS, (row + 1) * UNIT_ROWS), slice(col * UNIT_COLS, (col + 1) * UNIT_COLS)
        assert seen[rows, cols].size  # no unit lies outside
        seen[rows, cols] += 1
        assert set(np.arange(n)[rows if is_x else cols] // sweep) == {s}
    assert (x_seen == 1).all() and (y_seen == 1).all()
    parts = list(dict.fromkeys((is_x, s) for is_x, s, *_ in every))
    assert len(parts) == len({unit[:2] for unit in parts}) == 2 * -(-n // sweep)
    for place, (is_x, s) in enumerate(parts):  # all of x that the results of a sweep need stands before them
        if not is_x:
            assert {(1, t) for t in range(s + 1)} <= set(parts[:place])
    tiles = np.bincount(np.arange(-(-n // tile_n)) * tile_n // sweep)
    for _, s, _, _, units, warps in every:
        assert units == sum(1 for unit in every if unit[:2] == (1, s))
        assert warps == tiles[s] * groups * 8
