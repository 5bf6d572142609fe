"""The movers' plan: every unit once, nothing waits for what comes later, counters end at zero."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from shflnb.kernels.moves import (
    CONSUMER_WARPS,
    MOVE_IN,
    MOVE_OUT,
    UNIT_COLS,
    UNIT_ROWS,
    Moves,
    add_sweeps,
    plan_moves,
)
from shflnb.kernels.queue import COLUMN_TILE_MASK, SWEEP_SHIFT, tile_queue

CASES = [
    # m, k, n, v, tile_n, sweep, grid
    (4096, 4096, 4096, 64, 256, 2, 132),
    (128, 64, 64, 64, 256, 2, 4),
    (72, 136, 777, 16, 128, 1, 7),
    (8, 8, 1, 16, 128, 2, 1),
    (320, 1032, 2049, 32, 128, 3, 132),
    (1024, 256, 511, 128, 128, 4, 13),
]


def groups_of(m: int, v: int) -> int:
    return -(-m // v)


@pytest.mark.parametrize(("m", "k", "n", "v", "tile_n", "sweep", "grid"), CASES)
def test_every_value_is_turned_once(m: int, k: int, n: int, v: int, tile_n: int, sweep: int, grid: int) -> None:
    moves = plan_moves(m, k, n, groups_of(m, v), tile_n, sweep, grid)
    assert moves.records.dtype == np.uint32 and moves.records.shape[1:] == (grid, 4) and not moves.records[-1].any()
    x_seen, y_seen = np.zeros((n, k), int), np.zeros((m, n), int)
    for kind, s, row, col in moves.records.reshape(-1, 4):
        if not kind:
            continue
        seen = x_seen if kind == MOVE_IN else y_seen
        rows, cols = slice(row * UNIT_ROWS, (row + 1) * UNIT_ROWS), slice(col * UNIT_COLS, (col + 1) * UNIT_COLS)
        assert seen[rows, cols].size  # no unit lies outside
        seen[rows, cols] += 1
        tokens = np.arange(n)[rows if kind == MOVE_IN else cols]
        assert set(tokens // (sweep * tile_n)) == {s}
    assert (x_seen == 1).all() and (y_seen == 1).all()
    zeros = (moves.records[..., 0] == 0).astype(int)
    assert (np.diff(zeros, axis=0) >= 0).all()  # a block's list ends at its first zero


def play(moves: Moves, queue: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """Run all blocks' movers and products in random order; returns the counters and the steps nobody could take."""
    counters = moves.counters.astype(np.int64).copy()
    grid = moves.records.shape[1]
    mover, worker = np.zeros(grid, int), np.zeros(grid, int)
    stuck = 0
    while True:
        ready = []
        for b in range(grid):
            kind, s = moves.records[mover[b], b, :2]
            if kind == MOVE_IN or (kind == MOVE_OUT and counters[1, s] == 0):
                ready.append(("move", b))
            record = queue[worker[b], b]
            if record[2] and counters[0, record[3] >> SWEEP_SHIFT] == 0:
                ready.append(("tile", b))
        if not ready:
            left = moves.records[mover, np.arange(grid), 0].any() or queue[worker, np.arange(grid), 2].any()
            return counters, stuck + int(left)
        what, b = ready[rng.integers(len(ready))]
        if what == "move":
            kind, s = moves.records[mover[b], b, :2]
            counters[0, s] -= kind == MOVE_IN
            mover[b] += 1
        else:
            counters[1, queue[worker[b], b, 3] >> SWEEP_SHIFT] -= CONSUMER_WARPS
            worker[b] += 1


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("m", "k", "n", "v", "tile_n", "sweep", "grid"), CASES[1:])
def test_no_order_of_events_ends_in_waiting(
    m: int, k: int, n: int, v: int, tile_n: int, sweep: int, grid: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    groups, n_tiles = groups_of(m, v), -(-n // tile_n)
    counts = rng.integers(1, 5, groups)
    queue = add_sweeps(tile_queue(np.cumsum(counts) - counts, counts, n_tiles, grid, min(sweep, n_tiles)), sweep)
    moves = plan_moves(m, k, n, groups, tile_n, sweep, grid)
    counters, stuck = play(moves, queue, rng)
    assert stuck == 0 and not counters.any()
    tiles = Counter((int(r[0]), int(r[3] & COLUMN_TILE_MASK)) for r in queue.reshape(-1, 4) if r[2])
    assert tiles == Counter((g, c) for g in range(groups) for c in range(n_tiles))


def test_a_wrong_order_is_seen() -> None:
    """The play stops where results are asked for before their x is turned: the test above can fail."""
    moves = plan_moves(64, 64, 256, 1, 128, 1, 1)
    queue = add_sweeps(tile_queue(np.zeros(1, int), np.ones(1, int), 2, 1, 1), 1)
    first_out = int(np.argmax(moves.records[:, 0, 0] == MOVE_OUT))
    order = [first_out, *(i for i in range(len(moves.records)) if i != first_out)]
    counters, stuck = play(Moves(moves.records[order], moves.counters), queue, np.random.default_rng(0))
    assert stuck == 1 and counters.any()


def test_limits() -> None:
    with pytest.raises(ValueError, match="share units"):
        plan_moves(64, 64, 256, 1, 64, 1, 1)
    with pytest.raises(ValueError, match="4097 sweeps"):
        plan_moves(8, 8, 4096 * 128 + 1, 1, 128, 1, 1)
