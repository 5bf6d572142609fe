"""Moving 2-byte matrices between layouts: token-major <-> feature-major, and any strides -> aligned rows.

    transpose:     dst[c, r] = src[r, c]        each warp by itself, 16-byte accesses on both sides
                   (+ addend[c, r])
    copy_strided:  dst[r, c] = src[r, c]        any strides, one value a thread; the road for misaligned arrays

A warp of the transpose turns 32 rows x 64 columns at a time, from a ring of shared memory that no other warp touches:

    src (rows, cols)                    four stages of 4 KB                  dst (cols, rows)
    +--------+--------+                 +----+----+----+----+                +----+----+----+----+
    | warp 0 | warp 1 |  --cp.async-->  |turn|  on their way|  --ldmatrix->  | 0  | 2  |         |  64 columns
    +--------+--------+  128 B a row    +----+----+----+----+     .trans     +----+----+         |
    | warp 2 | warp 3 |                                                      | 1  | 3  |         |
    +--------+--------+                                                      +----+----+----+----+
      a tile of 64 x 128 for a block                                          64 B a row and warp

The transpose of an 8x8 block is `ldmatrix.trans`: the values never pass through one thread at a time, and they go from
its registers to dst. Three tiles are on their way while one is turned, and nothing waits for another warp. H100,
2026-11-26, 4096 x 4096: 23.4 us, where a device-to-device copy takes 24.4 and a tile a block, turned in shared memory
between block barriers, took 27.4. Needs capability 8.0 or newer; `ldmatrix` sees 2-byte values of any type.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import cuda
from numba.cuda import types

from .ptx import (
    cp_async_16_whole,
    cp_async_commit,
    cp_async_wait,
    div_u32,
    ld_global_u16,
    ld_shared_v4,
    ldmatrix_x4_trans,
    pack_pair,
    smem_address,
    st_global_stream_v4,
    st_global_u16,
    st_global_v4,
    st_shared_v4,
    unpack_high,
    unpack_low,
    warp_sync,
)
from .ptx_cluster import grid_launch_dependents, grid_wait
from .transpose_config import (
    COPY_THREADS,
    TILE_BYTES,
    TILE_COLS,
    TILE_ROWS,
    WARP_COLS,
    WARP_ROWS,
    stages_of,
)

__all__ = ["make_copy_strided", "make_transpose"]

u8, u16, u32, u64 = types.uint8, types.uint16, types.uint32, types.uint64


# --- single values, at the edges and for misaligned rows -------------------------------------------------------------
@cuda.jit(device=True, forceinline=True)
def _load_pair(src, room):
    """Two consecutive values as one word; values at `room` and beyond are zero and are not read."""
    low = u32(0)
    high = u32(0)
    if room > u64(0):
        low = u32(ld_global_u16(src))
    if room > u64(1):
        high = u32(ld_global_u16(src + u64(2)))
    return u32(low | (high << u32(16)))


@cuda.jit(device=True, forceinline=True)
def _store_pair(dst, word, room):
    if room > u64(0):
        st_global_u16(dst, u16(word & u32(0xFFFF)))
    if room > u64(1):
        st_global_u16(dst + u64(2), u16(word >> u32(16)))


@cuda.jit(device=True, forceinline=True)
def _beyond(room, count):
    return room - u64(count) if room > u64(count) else u64(0)


# --- the phases of the transpose -------------------------------------------------------------------------------------
@cuda.jit(device=True, forceinline=True)
def _place(number, tiles, fast_tiles, flags):
    """(first row, first column) of what this warp has of a tile."""
    warp = u32(u32(cuda.threadIdx.x) >> u32(5))
    back = u32(tiles - u32(1) - number)
    slow = div_u32(back, fast_tiles)
    fast = u32(back - slow * fast_tiles)
    if flags & u64(4):
        row, col = fast, slow
    else:
        row, col = slow, fast
    return (u64(row) * u64(TILE_ROWS) + u64(u32(warp >> u32(1)) * u32(WARP_ROWS)),
            u64(col) * u64(TILE_COLS) + u64(u32(warp & u32(1)) * u32(WARP_COLS)))  # fmt: skip


@cuda.jit(device=True, forceinline=True)
def _fetch(stage, src, lds, row0, col0, rows, cols, flags):
    """Start the copies of a warp's tile to its stage; zeros for what lies outside of src.

    Chunk c of row r stands at c ^ f(r), where f takes bits 0, 3 and 4 of r: eight lanes that write a row, or read the
    rows of one matrix in `make_turn`, fall into different banks.
    """
    lane = u32(u32(cuda.threadIdx.x) & u32(31))
    r, c = u32(lane >> u32(3)), u32(lane & u32(7))
    row, col = row0 + u64(r), col0 + u64(u32(c * u32(8)))
    at = src + (row * lds + col) * u64(2)
    to = u32(stage + r * u32(128) + ((c ^ (r & u32(1))) << u32(4)))
    if row0 + u64(WARP_ROWS) <= rows and col0 + u64(WARP_COLS) <= cols and flags & u64(1):
        for i in range(8):
            cp_async_16_whole(u32((to + u32(512 * i)) ^ u32(16 * (i & 6))), at)
            at += lds * u64(8)
    else:
        for i in range(8):
            here = u32((to + u32(512 * i)) ^ u32(16 * (i & 6)))
            room = cols - col if row + u64(4 * i) < rows and col < cols else u64(0)
            if room >= u64(8) and flags & u64(1):
                cp_async_16_whole(here, at)
            else:
                st_shared_v4(here, _load_pair(at, room), _load_pair(at + u64(4), _beyond(room, 2)),
                             _load_pair(at + u64(8), _beyond(room, 4)),
                             _load_pair(at + u64(12), _beyond(room, 6)))  # fmt: skip
            at += lds * u64(8)


@cuda.jit(device=True, forceinline=True)
def _store_chunk(to, w, room, flags):
    """Eight values of a row of dst, of which `room` have a place."""
    if room >= u64(8) and flags & u64(2):
        if flags & u64(4):
            st_global_stream_v4(to, w[0], w[1], w[2], w[3])
        else:
            st_global_v4(to, w[0], w[1], w[2], w[3])
    else:
        _store_pair(to, w[0], room)
        _store_pair(to + u64(4), w[1], _beyond(room, 2))
        _store_pair(to + u64(8), w[2], _beyond(room, 4))
        _store_pair(to + u64(12), w[3], _beyond(room, 6))


@cuda.jit(device=True, forceinline=True)
def _fetch_addend(at, addend, lda, row0, col0, rows, cols):
    """Start the copies of what is added to a warp's tile: row c of it are 32 values of row `col0 + c` of the addend."""
    lane = u32(u32(cuda.threadIdx.x) & u32(31))
    row, col = row0 + u64(u32((lane & u32(3)) * u32(8))), col0 + u64(u32(lane >> u32(2)))
    source = addend + (col * lda + row) * u64(2)
    for i in range(8):
        if row < rows and col + u64(8 * i) < cols:
            cp_async_16_whole(u32(at + u32(512 * i) + lane * u32(16)), source)
        source += lda * u64(16)


def make_add(dtype: str) -> Callable[..., Any]:
    """Device function: 8 values plus the 8 at a shared address, each sum in float32 and rounded once."""
    low, high, pack = unpack_low[dtype], unpack_high[dtype], pack_pair[dtype]

    @cuda.jit(device=True, forceinline=True)
    def add(w, at):
        a = ld_shared_v4(at)
        return (pack(low(w[0]) + low(a[0]), high(w[0]) + high(a[0])),
                pack(low(w[1]) + low(a[1]), high(w[1]) + high(a[1])),
                pack(low(w[2]) + low(a[2]), high(w[2]) + high(a[2])),
                pack(low(w[3]) + low(a[3]), high(w[3]) + high(a[3])))  # fmt: skip

    return add


@cuda.jit(device=True, forceinline=True)
def _add_nothing(w, at):
    return w


def make_turn(adds: str) -> Callable[..., Any]:
    """Device function that transposes a warp's tile from its stage to dst, and with a dtype `adds` what came with it.

    Matrix j of an `ldmatrix` has rows 8q + 2j and 8q + 2j + 1, q = 0..3, of eight columns: then the four words of lane
    l are rows 8q..8q + 7 of column l // 4, q = l % 4, one chunk of a row of dst. Inside, all eight are loaded before
    the first is stored.
    """
    add = make_add(adds) if adds else _add_nothing

    @cuda.jit(device=True, forceinline=True)
    def turn(stage, dst, ldd, row0, col0, rows, cols, flags):
        lane = u32(u32(cuda.threadIdx.x) & u32(31))
        i = u32(lane & u32(7))
        line = u32(stage + (((i >> u32(1)) << u32(3)) + ((lane >> u32(3)) << u32(1)) + (i & u32(1))) * u32(128))
        row, col = row0 + u64(u32((lane & u32(3)) * u32(8))), col0 + u64(u32(lane >> u32(2)))
        to, addends = dst + (col * ldd + row) * u64(2), u32(stage + u32(TILE_BYTES) + lane * u32(16))
        if row0 + u64(WARP_ROWS) <= rows and col0 + u64(WARP_COLS) <= cols and flags & u64(2):
            for c in range(8):
                w = add(ldmatrix_x4_trans(u32(line + ((u32(c) ^ i) << u32(4)))), u32(addends + u32(512 * c)))
                _store_chunk(to, w, u64(8), u64(flags | u64(2)))
                to += ldd * u64(16)
        else:
            room = rows - row if row < rows else u64(0)
            if room > u64(0) and flags & u64(8):  # what lies beyond was fetched as zeros
                room = u64(8)
            for c in range(8):
                w = ldmatrix_x4_trans(u32(line + ((u32(c) ^ i) << u32(4))))
                if col + u64(8 * c) < cols and room > u64(0):
                    _store_chunk(to, add(w, u32(addends + u32(512 * c))), room, flags)
                warp_sync()  # before the next ldmatrix, which takes all lanes
                to += ldd * u64(16)

    return turn


def make_transpose(is_chained: bool = False, adds: str = "") -> Callable[..., Any]:
    """The kernel (src, lds, dst, ldd, rows, cols, at_once, flags), for the grid of `transpose_grid`.

    Bits of flags: 0: src rows are 16-byte aligned; 1: dst rows are; 2: dst is a result, not what the next kernel reads,
    and should not push that out of L2; 3: rows of dst are written up to the next multiple of 8, with zeros behind the
    last value. Tiles are taken along the features before the next step along the tokens (rows of src, columns where it
    turns a result), which runs from the last to the first: the product before or after works from the first to the
    last, so each finds in L2 what the other touched most recently. `at_once` blocks walk through a span of tiles side
    by side, and the blocks behind them, as these end, through the next span. `is_chained` kernels (capability 9.0) may
    be launched to overlap the end of the kernel before them.

    With a dtype `adds` two more arguments, an addend of dst's shape and its leading dimension: dst = src.T + addend.
    Rows of the addend start at 16-byte boundaries, and so do those of dst, which have a multiple of 8 values; dst may
    be the addend.
    """
    stages, stage_bytes = stages_of(bool(adds))
    warp_bytes, wait_for_oldest, turn = stages * stage_bytes, cp_async_wait[stages - 1], make_turn(adds)

    @cuda.jit(device=True, forceinline=True)
    def walk(src, lds, dst, ldd, rows, cols, at_once, flags, addend, lda):
        memory = cuda.shared.array(0, u8, alignment=128)
        base = u32(smem_address(memory) + u32(u32(cuda.threadIdx.x) >> u32(5)) * u32(warp_bytes))
        row_tiles = u32((rows + u64(TILE_ROWS - 1)) // u64(TILE_ROWS))
        col_tiles = u32((cols + u64(TILE_COLS - 1)) // u64(TILE_COLS))
        fast_tiles = row_tiles if flags & u64(4) else col_tiles
        tiles = u32(row_tiles * col_tiles)
        step, blocks = u32(at_once), u32(cuda.gridDim.x)
        span = u32(div_u32(u32(tiles + blocks - u32(1)), blocks) * step)
        number = u32(cuda.blockIdx.x)
        first = u32(div_u32(number, step))
        number = u32(first * span + number - first * step)
        end = u32((first + u32(1)) * span)
        end = tiles if tiles < end else end
        if is_chained:
            grid_launch_dependents()
            grid_wait()
        ahead = number
        for stage in range(stages - 1):
            if ahead < end:
                row0, col0 = _place(ahead, tiles, fast_tiles, flags)
                _fetch(u32(base + u32(stage * stage_bytes)), src, lds, row0, col0, rows, cols, flags)
                if adds:
                    _fetch_addend(
                        u32(base + u32(stage * stage_bytes + TILE_BYTES)), addend, lda, row0, col0, rows, cols
                    )
            cp_async_commit()
            ahead = u32(ahead + step)
        at, to = u32(0), u32((stages - 1) * stage_bytes)
        while number < end:
            if ahead < end:
                row0, col0 = _place(ahead, tiles, fast_tiles, flags)
                _fetch(u32(base + to), src, lds, row0, col0, rows, cols, flags)
                if adds:
                    _fetch_addend(u32(base + to + u32(TILE_BYTES)), addend, lda, row0, col0, rows, cols)
            cp_async_commit()
            wait_for_oldest()
            warp_sync()
            row0, col0 = _place(number, tiles, fast_tiles, flags)
            turn(u32(base + at), dst, ldd, row0, col0, rows, cols, flags)
            warp_sync()
            number = u32(number + step)
            ahead = u32(ahead + step)
            to = at
            at = u32(at + u32(stage_bytes)) if at != u32(warp_bytes - stage_bytes) else u32(0)

    if adds:

        def transpose_add(src, lds, dst, ldd, rows, cols, at_once, flags, addend, lda):
            walk(src, lds, dst, ldd, rows, cols, at_once, flags, addend, lda)

        return transpose_add

    def transpose(src, lds, dst, ldd, rows, cols, at_once, flags):
        walk(src, lds, dst, ldd, rows, cols, at_once, flags, u64(0), u64(0))

    return transpose


def make_copy_strided() -> Callable[..., Any]:
    """The kernel (src, row and column strides, dst, row and column strides, rows, cols, columns of dst).

    Strides are in values, any of them, in unsigned arithmetic. Columns of dst beyond `cols` become zero.
    """

    def copy_strided(src, src_row, src_col, dst, dst_row, dst_col, rows, cols, dst_cols):
        col = u64(cuda.blockIdx.x) * u64(COPY_THREADS) + u64(cuda.threadIdx.x)
        if col < dst_cols:
            row = u64(cuda.blockIdx.y)
            while row < rows:
                value = u16(0)
                if col < cols:
                    value = ld_global_u16(src + (row * src_row + col * src_col) * u64(2))
                st_global_u16(dst + (row * dst_row + col * dst_col) * u64(2), value)
                row += u64(cuda.gridDim.y)

    return copy_strided
