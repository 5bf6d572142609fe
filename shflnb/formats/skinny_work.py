"""How the few-column layout divides its work: steps of 16 columns, and who does each. See `skinny_layout.py`."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

from .shflbw import ShflBWMatrix

__all__ = ["Steps", "Work", "share_items"]

ALIGN = 8  # windows start at multiples of this column: 16 bytes of token-major x
PHASE_ALIGN = 64  # phases start at multiples of this row of their rank's window, which `place_of_row` respects


@dataclass(frozen=True)
class Steps:
    """The 16-column steps of every group: `columns` (steps, 16) are positions in `indices`, -1 for padding."""

    columns: np.ndarray
    group: np.ndarray
    first: np.ndarray
    last: np.ndarray
    steps_of_group: np.ndarray

    @classmethod
    def of(cls, packed: ShflBWMatrix, span: int) -> Steps:
        """Consecutive kept columns, 16 a step; groups with steps wider than `span` are cut at its multiples first."""
        total, counts = len(packed.indices), packed.counts
        group = np.repeat(np.arange(packed.groups), counts)
        at = np.arange(total) - packed.indptr[:-1].astype(np.int64)[group]
        heads = np.flatnonzero(at % 16 == 0)
        tails = np.append(heads[1:], total)[: len(heads)] - 1
        too_wide = packed.indices[tails].astype(np.int64) - packed.indices[heads] >= span
        is_wide = np.zeros(packed.groups, bool)
        is_wide[group[heads[too_wide]]] = True
        bins = np.where(is_wide[group], packed.indices // span, 0)
        starts = np.ones(total, bool)
        starts[1:] = (group[1:] != group[:-1]) | (bins[1:] != bins[:-1])
        run_at = np.flatnonzero(starts)
        run = np.cumsum(starts) - 1
        run_steps = -(-np.diff(np.append(run_at, total)) // 16)
        in_run = np.arange(total) - run_at[run] if total else np.zeros(0, np.int64)
        step = (np.cumsum(run_steps) - run_steps)[run] + in_run // 16 if total else np.zeros(0, np.int64)
        columns = np.full((int(run_steps.sum()), 16), -1, np.int64)
        columns[step, in_run % 16] = np.arange(total)
        last = np.zeros(len(columns), np.int64)
        np.maximum.at(last, step, packed.indices)
        step_group = group[columns[:, 0]]
        return cls(columns, step_group, packed.indices[columns[:, 0]].astype(np.int64), last,
                   np.bincount(step_group, minlength=packed.groups))  # fmt: skip


def share_items(steps: np.ndarray, teams: int) -> np.ndarray:
    """Team of each item: longest first, each to the team that has least so far (ties: lowest number)."""
    team = np.zeros(len(steps), np.int64)
    heap = [(0, 0, t) for t in range(teams)]  # steps, items, team
    for item in np.argsort(-steps, kind="stable"):
        load, items, t = heap[0]
        team[item] = t
        heapq.heapreplace(heap, (load + int(steps[item]), items + 1, t))
    return team


@dataclass(frozen=True)
class Work:
    """Every (step, item) pair in its final order: which step, item (in team order), block, warp and phase."""

    step: np.ndarray
    item: np.ndarray
    item_id: np.ndarray
    block: np.ndarray
    warp: np.ndarray
    phase: np.ndarray
    phases: int
    windows: np.ndarray

    @classmethod
    def of(cls, cut: Steps, parts: int, team_of_item: np.ndarray, order_of_item: np.ndarray,
           counts: tuple[int, int, int], window: int, is_owned: bool) -> Work:  # fmt: skip
        """Share the steps of every item out; `counts` are teams, ranks and warps."""
        teams, ranks, warps = counts
        step = np.tile(np.arange(len(cut.group)), parts)
        item_id = cut.group[step] * parts + np.repeat(np.arange(parts), len(cut.group))
        team = team_of_item[item_id]
        order = np.lexsort((item_id, cut.first[step], team))
        step, item_id, team = step[order], item_id[order], team[order]
        rank, _ = _equal_parts(team, ranks)
        block = team * ranks + rank
        phase, phases, windows = _phases(cut, step, block, teams * ranks, window)
        order = np.lexsort((cut.first[step], order_of_item[item_id], phase, block))
        step, item_id, block, phase = step[order], item_id[order], block[order], phase[order]
        if is_owned:
            warp = _own_items(block, order_of_item[item_id], warps)
        else:
            warp, _ = _equal_parts(block * phases + phase, warps)
        order = np.lexsort((np.arange(len(step)), phase, warp, block))
        step, item_id, block, phase, warp = step[order], item_id[order], block[order], phase[order], warp[order]
        return cls(step, order_of_item[item_id], item_id, block, warp, phase, phases, windows)


def _equal_parts(key: np.ndarray, parts: int) -> tuple[np.ndarray, np.ndarray]:
    """For sorted keys: which of `parts` equal consecutive parts of its key's run an element is in; the run's start."""
    _, start, count = np.unique(key, return_index=True, return_counts=True)
    at = np.arange(len(key)) - np.repeat(start, count)
    return at * parts // np.maximum(np.repeat(count, count), 1), start


def _own_items(block: np.ndarray, item: np.ndarray, warps: int) -> np.ndarray:
    """Warp of each step (sorted by block, phase and item) when a warp may work on one item only.

    Each item of a block gets a warp, and the next warp always goes to the item whose warps have most steps; an item's
    steps go to its warps in turns.
    """
    if not len(block):
        return np.zeros(0, np.int64)
    cells, cell, steps = np.unique(block * (int(item.max()) + 1) + item, return_inverse=True, return_counts=True)
    block_of = cells // (int(item.max()) + 1)
    owners, first = np.ones(len(cells), np.int64), np.zeros(len(cells), np.int64)
    bounds = np.flatnonzero(np.append(np.append(True, block_of[1:] != block_of[:-1]), True))
    for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        for _ in range(warps - (end - begin)):
            owners[begin + int(np.argmax(steps[begin:end] / owners[begin:end]))] += 1
        first[begin:end] = np.cumsum(owners[begin:end]) - owners[begin:end]
    cell = cell.reshape(-1)
    order = np.argsort(cell, kind="stable")
    turn = np.empty(len(cell), np.int64)
    turn[order] = np.arange(len(cell)) - np.repeat(np.cumsum(steps) - steps, steps)
    return first[cell] + turn % owners[cell]


def _phases(
    cut: Steps, step: np.ndarray, block: np.ndarray, blocks: int, window: int
) -> tuple[np.ndarray, int, np.ndarray]:
    """Phase of each step (sorted by block and column), their number, and the windows both ways."""
    first, last = cut.first[step], cut.last[step]
    low = np.full(blocks, np.iinfo(np.int64).max)
    np.minimum.at(low, block, first)
    low = np.where(low == np.iinfo(np.int64).max, 0, low // ALIGN * ALIGN)
    phases = 1
    while True:
        phase, _ = _equal_parts(block, phases)
        cell = block * phases + phase
        start = np.full(blocks * phases, np.iinfo(np.int64).max)
        np.minimum.at(start, cell, first)
        end = np.zeros(blocks * phases, np.int64)
        np.maximum.at(end, cell, last + 1)
        is_empty = end == 0
        base = np.repeat(low, phases)
        start = np.where(is_empty, base, base + (start - base) // PHASE_ALIGN * PHASE_ALIGN)
        rows = np.where(is_empty, 0, end - start)
        if rows.max(initial=0) <= window:
            break
        phases += 1
    windows = np.zeros((2, blocks, phases, 4), np.uint32)
    windows[0, :, :, 0] = start.reshape(blocks, phases)
    windows[0, :, :, 1] = rows.reshape(blocks, phases)
    windows[1, :, :, 0] = low[:, None]
    windows[1, :, 0, 1] = np.maximum(end.reshape(blocks, phases).max(axis=1) - low, 0)
    windows[1, :, :, 2] = (start - base).reshape(blocks, phases)
    return phase, phases, windows
