"""Sizes of the kernels that move matrices between layouts (`transpose.py`), for the host and for the kernels."""

from __future__ import annotations

from .config import ceil_div

__all__ = ["COPY_THREADS", "TILE_BYTES", "TILE_COLS", "TILE_ROWS", "TRANSPOSE_THREADS", "WARP_COLS", "WARP_ROWS",
           "stages_of", "transpose_flags", "transpose_grid", "transpose_smem"]  # fmt: skip

WARP_ROWS, WARP_COLS = 32, 64
"""What a warp of the transpose turns at a time."""

TILE_ROWS, TILE_COLS = 2 * WARP_ROWS, 2 * WARP_COLS
"""What the four warps of a block turn at a time."""

TILE_BYTES = WARP_ROWS * WARP_COLS * 2
TRANSPOSE_THREADS = 128

TILES_A_BLOCK = 6
"""So many tiles a block takes at most. In larger matrices each has one: blocks that go on to the end drift apart, the
fast SMs far ahead of the slow ones (16384 x 4096: 94.8 us, all of them side by side 102.4; 4096 x 4096: 24.2 and 23.2;
H100, 2026-11-26)."""

COPY_THREADS = 256


def stages_of(adds: bool) -> tuple[int, int]:
    """(tiles of a warp that have room in shared memory, bytes of each): all but one are on their way while that one is
    turned. With `adds` what is added comes with each tile.
    """
    return (3, 2 * TILE_BYTES) if adds else (4, TILE_BYTES)


def transpose_smem(adds: bool = False) -> int:
    """Bytes of shared memory of a block."""
    stages, stage_bytes = stages_of(adds)
    return TRANSPOSE_THREADS // 32 * stages * stage_bytes


def transpose_grid(
    sm_count: int, smem_limit: int, rows: int, cols: int, smem_bytes: int = transpose_smem()
) -> tuple[int, int]:
    """(blocks, how many of them walk side by side) of the transpose of a (rows, cols) matrix.

    Side by side as many as the device holds, and each goes on through up to `TILES_A_BLOCK` tiles; or a block for every
    tile, whole multiples of those that are held at once.
    """
    tiles = ceil_div(rows, TILE_ROWS) * ceil_div(cols, TILE_COLS)
    per_sm = max(1, (smem_limit + 1024) // (smem_bytes + 1024))  # the driver keeps 1 KB for itself in each
    at_once = min(tiles, sm_count * per_sm)
    rounds = ceil_div(tiles, at_once)
    return at_once * (1 if rounds <= TILES_A_BLOCK else rounds), at_once


def transpose_flags(src_aligned: bool, dst_aligned: bool, *, is_result: bool = False, is_padded: bool = False) -> int:
    """The transpose kernel's flags, see `transpose.py`."""
    return src_aligned | dst_aligned << 1 | is_result << 2 | is_padded << 3
