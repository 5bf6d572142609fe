"""Which block computes which tile, and when: the work queue of a launch, made on the host in NumPy.

A tile is a (group, column tile) pair and costs its k tiles plus a drain. Tiles are listed in sweeps of a few column
tiles over all groups, longest group first, so that the activations in use stay inside L2. `grid` persistent blocks take
them in turns. With equal groups block b simply takes every grid-th tile; with unequal ones each turn's tiles are
matched to the blocks, the longest tile to the block with the least work so far, and then the block with the most work
swaps tiles of a turn with others, as long as that helps. No atomics, no counters: a launch depends on nothing but its
arguments, and the same product runs in the same order every time.
"""

from __future__ import annotations

import numpy as np

__all__ = ["DRAIN_TILES", "EMPTY_TURNS", "tile_queue"]

DRAIN_TILES = 2.0  # what storing a tile's results costs, in k tiles (1.25 us against 0.55 us at v = 64; H200, 2026-11)

SWAPS_A_BLOCK, EVEN_ENOUGH = 4, 1.002
"""Most swaps, and how much above the mean the longest block may be before any are tried."""

EMPTY_TURNS = 4  # turns without tiles at the end of a queue: kernels read that far beyond a block's last tile


def tile_queue(first: np.ndarray, counts: np.ndarray, n_tiles: int, grid: int, sweep: int) -> np.ndarray:
    """The queue for `grid` blocks: uint32, shape (turns + EMPTY_TURNS, grid, 4).

    A record is (group, first k tile, k tiles, column tile).

    Parameters
    ----------
    first, counts : int arrays, shape (groups,)
        First k tile and number of k tiles (at least 1) of each group.
    n_tiles : int
        Column tiles.
    grid : int
        Blocks; at most groups * n_tiles.
    sweep : int
        Column tiles of a sweep.

    The records after a block's last tile hold no k tiles; the extra turns make sure that there are some.
    """
    groups = len(counts)
    total = groups * n_tiles
    order = np.argsort(-counts, kind="stable")
    tile = np.arange(total)
    start = tile // (sweep * groups) * sweep  # first column tile of the sweep
    width = np.minimum(sweep, n_tiles - start)
    rest = tile - start * groups
    group = order[rest // width]
    column = start + rest % width
    turns = -(-total // grid)
    queue = np.zeros((turns + EMPTY_TURNS, grid, 4), np.uint32)
    records = np.stack([group, first[group], counts[group], column], axis=1).astype(np.uint32)
    if counts.min(initial=1) == counts.max(initial=1):
        queue.reshape(-1, 4)[:total] = records
        return queue
    cost = counts[group] + DRAIN_TILES
    work = np.zeros(grid)
    for turn in range(turns):
        mine = slice(turn * grid, min((turn + 1) * grid, total))
        longest = np.argsort(-cost[mine], kind="stable")
        block = np.argsort(work, kind="stable")[: len(longest)]
        queue[turn, block] = records[mine][longest]
        work[block] += cost[mine][longest]
    _even_out(queue[:turns])
    return queue


def _even_out(queue: np.ndarray) -> None:
    """Swap records of a turn between blocks, so that the block with the most work has less; in place.

    Only the last turn has places without a tile, so a tile that moves to one is still followed by none.
    """
    grid = queue.shape[1]
    cost = queue[..., 2] + DRAIN_TILES * (queue[..., 2] > 0)
    work = cost.sum(axis=0)
    for _ in range(SWAPS_A_BLOCK * grid):
        longest = int(work.argmax())
        if work[longest] <= EVEN_ENOUGH * work.mean():
            return
        less = cost[:, longest, None] - cost  # what a swap takes from the longest, by turn and block
        after = np.maximum(work[longest] - less, work + less)
        turn, other = divmod(int(after.argmin()), grid)
        if after[turn, other] >= work[longest]:
            return
        work[longest] -= less[turn, other]
        work[other] += less[turn, other]
        pair = [longest, other]
        queue[turn, pair], cost[turn, pair] = queue[turn, pair[::-1]], cost[turn, pair[::-1]]
