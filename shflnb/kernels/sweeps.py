"""What the movers of `linear_sm90.py` do, in which order, and how much of it others wait for.

A sweep is `config.sweep` tokens, for all row groups. Its x is turned in units of 64 tokens x 128 features before its
product, its results in units of 64 features x 128 tokens after it. The units of all sweeps stand in one order,

    x of sweep 0, x of sweep 1, x of sweep 2, results of sweep 0, x of sweep 3, results of sweep 1, ...

dealt to the blocks in turns: x is always two sweeps ahead, and no unit waits for one behind it.

Two counters for each sweep, in global memory: units of x turned (`units_in` are all; the producers wait for them), and
tiles done times consumer warps (`warps_done` are all; the movers of the results wait for them).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import cuda
from numba.cuda import types

__all__ = ["UNIT_COLS", "UNIT_ROWS", "make_walk", "tokens_in", "units_in", "warps_done"]

u32 = types.uint32

UNIT_ROWS, UNIT_COLS = 64, 128
"""Rows and columns of the source in one unit."""
CONSUMER_WARPS = 8


def tokens_in(sweep_tokens: int) -> Callable[..., Any]:
    """Device function (sweep, n): the tokens of a sweep; 0 for sweeps that do not exist, -1 (as uint32) among them."""

    def count(sweep, n):
        first = u32(sweep * u32(sweep_tokens))
        if sweep > u32(0x7FFFFFFF) or first >= n:
            return u32(0)
        rest = u32(n - first)
        return rest if rest < u32(sweep_tokens) else u32(sweep_tokens)

    return cuda.jit(device=True, forceinline=True)(count)


def units_in(sweep_tokens: int) -> Callable[..., Any]:
    """Device function (sweep, n, k): the units of x in a sweep."""
    tokens = tokens_in(sweep_tokens)

    def count(sweep, n, k):
        rows = u32(u32(tokens(sweep, n) + u32(UNIT_ROWS - 1)) // u32(UNIT_ROWS))
        return u32(rows * u32(u32(k + u32(UNIT_COLS - 1)) // u32(UNIT_COLS)))

    return cuda.jit(device=True, forceinline=True)(count)


def warps_done(sweep_tokens: int, tile_n: int) -> Callable[..., Any]:
    """Device function (sweep, n, groups): tiles of a sweep times consumer warps."""
    tokens = tokens_in(sweep_tokens)

    def count(sweep, n, groups):
        tiles = u32(u32(tokens(sweep, n) + u32(tile_n - 1)) // u32(tile_n))
        return u32(tiles * groups * u32(CONSUMER_WARPS))

    return cuda.jit(device=True, forceinline=True)(count)


def make_walk(sweep_tokens: int) -> Callable[..., Any]:
    """Device function (place, part, n, k, m, sweeps): the unit at a place behind the beginning of a part.

    Parts are numbered in the order above: 0 is x of sweep 0, 2 i + 1 is x of sweep i + 1, 2 i + 2 the results of sweep
    i - 1. Returns (whether there is such a unit, its part, its place in it, is it x, sweep, row unit, column unit).
    """
    tokens = tokens_in(sweep_tokens)

    def walk(place, part, n, k, m, sweeps):
        while True:
            is_x = part == u32(0) or (part & u32(1)) != u32(0)
            sweep = u32(u32(part + u32(1)) >> u32(1)) if is_x else u32(u32(part >> u32(1)) - u32(2))
            count = tokens(sweep, n)
            if is_x:
                rows = u32(u32(count + u32(UNIT_ROWS - 1)) // u32(UNIT_ROWS))
                cols = u32(u32(k + u32(UNIT_COLS - 1)) // u32(UNIT_COLS))
            else:
                rows = u32(u32(m + u32(UNIT_ROWS - 1)) // u32(UNIT_ROWS))
                cols = u32(u32(count + u32(UNIT_COLS - 1)) // u32(UNIT_COLS))
            units = u32(rows * cols)
            if place < units:
                row = u32(place // cols)
                col = u32(place - u32(row * cols))
                if is_x:
                    row = u32(row + u32(sweep * u32(sweep_tokens // UNIT_ROWS)))
                else:
                    col = u32(col + u32(sweep * u32(sweep_tokens // UNIT_COLS)))
                return True, part, place, is_x, sweep, row, col
            if part > u32(sweeps + sweeps + u32(2)):
                return False, part, place, is_x, sweep, u32(0), u32(0)
            place = u32(place - units)
            part = u32(part + u32(1))

    return cuda.jit(device=True, forceinline=True)(walk)
