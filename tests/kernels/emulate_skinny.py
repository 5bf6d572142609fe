"""The few-column kernel on NumPy: the same tables, places, fragments and order of additions, one lane's rule at a
time."""

from __future__ import annotations

import numpy as np

from shflnb.formats.skinny_layout import LAST_STEP, NO_ROW, PADDING, SkinnyLayout

LANE = np.arange(32)
Q, T = LANE >> 2, LANE & 3
HALF = np.arange(8)
A_ROW = Q[:, None] + 8 * ((HALF >> 1) & 1)  # PTX ISA, mma.m16n8k16: row and column of a lane's 8 halves of A
A_COL = 2 * T[:, None] + (HALF & 1) + 8 * (HALF >> 2)
D_ROW = Q[:, None] + np.array([0, 0, 8, 8])
D_COL = 2 * T[:, None] + np.array([0, 1, 0, 1])


def load_window(chunks: int, zero: int, x: np.ndarray, first: int, rows: int) -> np.ndarray:
    """Shared memory in units of 16 bytes (8 tokens); what the kernel never wrote is NaN."""
    shift = {1: 3, 2: 2, 4: 1, 8: 0}[chunks]
    smem = np.full(((zero + 8) * chunks, 8), np.nan)
    n, k = x.shape
    for r in range(-(-rows // 8) * 8):
        place = (r & ~7) | ((r & 7) ^ ((r >> 3) & 7))
        for c in range(chunks):
            tokens = np.zeros(8)
            if first + r < k:
                inside = min(8, max(0, n - 8 * c))
                tokens[:inside] = x[8 * c : 8 * c + inside, first + r]
            smem[((place >> shift) << 3) + ((place & 7) ^ (c << shift))] = tokens
    smem[zero * chunks : zero * chunks + 8 * chunks] = 0
    return smem


def operand_b(chunks: int, smem: np.ndarray, place: np.ndarray) -> np.ndarray:
    """The (chunks, 16, 8) fragments that ldmatrix brings for the 16 places that lanes 0..15 (and again 16..31) name."""
    shift = {1: 3, 2: 2, 4: 1, 8: 0}[chunks]
    line = ((place >> shift) << 7) | ((place & 7) << 4)
    if chunks == 1:
        return smem[line[:16] >> 4][None]
    b = np.empty((chunks, 16, 8))
    for pair in range(chunks // 2):
        address = line ^ ((LANE >> 4) << (4 + shift)) ^ (pair << (5 + shift))
        b[2 * pair], b[2 * pair + 1] = smem[address[:16] >> 4], smem[address[16:] >> 4]
    return b


def stream(layout: SkinnyLayout, chunks: int, x: np.ndarray, merged: bool) -> np.ndarray:
    """The slots (blocks, slots, strips, chunks, lane, 4) after all warps have streamed their records; NaN where
    unwritten."""
    strips, blocks, warps = layout.item_rows // 16, *layout.warps.shape[:2]
    zero = layout.window_rows(merged)
    slots = np.full((blocks, max(1, layout.slots), strips, chunks, 32, 4), np.nan)
    for block in range(blocks):
        at, slot = layout.warps[block, :, 0].astype(int), layout.warps[block, :, 1].astype(int)
        acc = np.zeros((warps, strips, chunks, 32, 4))
        smem = np.full(((zero + 8) * chunks, 8), np.nan)
        for phase in range(layout.phases):
            first, rows, base, _ = (int(word) for word in layout.windows[int(merged), block, phase])
            if rows:
                smem = load_window(chunks, zero, x, first, rows)
            for warp in range(warps):
                for _ in range(int(layout.warps[block, warp, 3 + phase])):
                    record = layout.records[at[warp]]
                    at[warp] += 1
                    mark = record[strips * 256 :][LANE & 15].astype(int)
                    b = operand_b(chunks, smem, np.minimum((mark & PADDING) + base, zero))
                    a = np.zeros((strips, 16, 16))
                    a[:, A_ROW, A_COL] = record[: strips * 256].view(layout.dtype).reshape(strips, 32, 8).astype(float)
                    acc[warp] += (a[:, None] @ b[None])[:, :, D_ROW, D_COL]
                    if mark[0] & LAST_STEP:
                        slots[block, slot[warp]] = acc[warp]
                        acc[warp] = 0
                        slot[warp] += 1
        assert not acc.any(), "a piece was not closed"
    return slots


def emulate(layout: SkinnyLayout, chunks: int, x: np.ndarray, m: int, merged: bool) -> np.ndarray:
    """out (n, m) of x (n, k), float64; a value that no lane stores stays NaN, one that is stored twice is an error."""
    slots, n = stream(layout, chunks, x, merged), len(x)
    out = np.full((n, m), np.nan)
    stored = np.zeros((n, m), int)
    for team, table in enumerate(layout.team_table):
        first, items = int(table[0]), int(table[1])
        for item in range(first, first + items):
            total = np.zeros(slots.shape[2:])
            for entry in table[int(table[2 + item - first]) : int(table[3 + item - first])]:
                total += slots[team * layout.ranks + (int(entry) >> 16), int(entry) & 0xFFFF]
            rows = layout.rows[item * layout.item_rows : (item + 1) * layout.item_rows].astype(np.int64)
            for strip in range(layout.item_rows // 16):
                for c in range(chunks):
                    row, token = rows[16 * strip + D_ROW], 8 * c + D_COL
                    kept = (row != NO_ROW) & (token < n)
                    out[token[kept], row[kept]] = total[strip, c][kept]
                    np.add.at(stored, (token[kept], row[kept]), 1)
    assert (stored == 1).all(), "a result is stored more than once, or never"
    return out
