"""What the movers of `linear_sm90.py` turn, in which order, and who waits for whom: made on the host in NumPy.

A sweep is a few column tiles over all row groups. For sweep s there are units of x to turn (before its product) and
units of results (after it). The order over all blocks: x of sweeps 0 and 1, then x of sweep s + 2 and the results of
sweep s, for s = 0, 1, ...: x is always two sweeps ahead, and what a unit waits for never waits for a later unit.

Counters, one uint32 each, count down to 0:

    turning[s]      units of x of sweep s that are still to be turned        the producers of sweep s wait for it
    finishing[s]    tiles of sweep s, times consumer warps, still to be done  the movers of its results wait for it
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .config import ceil_div
from .queue import COLUMN_TILE_MASK, SWEEP_SHIFT

__all__ = ["CONSUMER_WARPS", "MOVE_IN", "MOVE_OUT", "UNIT_COLS", "UNIT_ROWS", "Moves", "add_sweeps", "plan_moves"]

MOVE_IN, MOVE_OUT = 1, 2
UNIT_ROWS, UNIT_COLS = 64, 128
"""Rows and columns of the source in one unit: tokens and features of x, features and tokens of the results."""
CONSUMER_WARPS = 8
MOST_SWEEPS = 1 << (32 - SWEEP_SHIFT)


@dataclass(frozen=True)
class Moves:
    """The movers' work for one launch."""

    records: np.ndarray
    """uint32, shape (turns + 1, grid, 4): (MOVE_IN or MOVE_OUT, sweep, row unit, column unit); zeros after the last."""
    counters: np.ndarray
    """uint32, shape (2, sweeps): `turning` and `finishing` at the start."""


def plan_moves(m: int, k: int, n: int, groups: int, tile_n: int, sweep: int, grid: int) -> Moves:
    """The units of a product of (m, k) with n tokens, in sweeps of `sweep` column tiles, for `grid` blocks in turns.

    `sweep * tile_n` must be a multiple of 128, so that no unit belongs to two sweeps.
    """
    tokens = sweep * tile_n
    if tokens % UNIT_COLS:
        raise ValueError(f"a sweep of {tokens} tokens would share units with its neighbours")
    sweeps = ceil_div(n, tokens)
    if sweeps > MOST_SWEEPS or ceil_div(n, tile_n) > COLUMN_TILE_MASK:
        raise ValueError(f"{n} tokens are {sweeps} sweeps; at most {MOST_SWEEPS} fit a record")

    def units(kind: int, s: int) -> np.ndarray:
        first, last = s * tokens, min(n, (s + 1) * tokens)
        if kind == MOVE_IN:  # rows of the source are tokens
            rows = np.arange(first // UNIT_ROWS, ceil_div(last, UNIT_ROWS))
            cols = np.arange(ceil_div(k, UNIT_COLS))
        else:
            rows = np.arange(ceil_div(m, UNIT_ROWS))
            cols = np.arange(first // UNIT_COLS, ceil_div(last, UNIT_COLS))
        pairs = np.stack(np.meshgrid(rows, cols, indexing="ij"), -1).reshape(-1, 2)
        return np.concatenate([np.full_like(pairs, [kind, s]), pairs], axis=1)

    parts = [units(MOVE_IN, s) for s in range(min(2, sweeps))]
    for s in range(sweeps):
        if s + 2 < sweeps:
            parts.append(units(MOVE_IN, s + 2))
        parts.append(units(MOVE_OUT, s))
    every = np.concatenate(parts).astype(np.uint32)
    turns = ceil_div(len(every), grid)
    records = np.zeros((turns + 1, grid, 4), np.uint32)
    records.reshape(-1, 4)[: len(every)] = every
    counters = np.zeros((2, sweeps), np.uint32)
    counters[0] = np.bincount(every[every[:, 0] == MOVE_IN, 1], minlength=sweeps)
    tiles = np.bincount(np.arange(ceil_div(n, tile_n)) // sweep, minlength=sweeps) * groups
    counters[1] = tiles * CONSUMER_WARPS
    return Moves(records, counters)


def add_sweeps(queue: np.ndarray, sweep: int) -> np.ndarray:
    """A `tile_queue` with the sweep of each record above its column tile, as a kernel with movers wants it."""
    marked = queue.copy()
    marked[..., 3] |= (queue[..., 3] // np.uint32(sweep)) << np.uint32(SWEEP_SHIFT)
    return marked
