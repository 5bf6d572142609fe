"""Moving 2-byte matrices between layouts: token-major <-> feature-major, and any strides -> aligned rows.

    transpose:     dst[c, r] = src[r, c]        64x64 tiles through shared memory, 16-byte accesses on both sides
    copy_strided:  dst[r, c] = src[r, c]        any strides, one value a thread; the road for misaligned arrays

The transpose of an 8x8 block is `ldmatrix.trans`: the values never pass through one thread at a time.
Needs capability 7.5 or newer; `ldmatrix` sees 2-byte values of any type.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import cuda
from numba.cuda import types

from .ptx import (
    div_u32,
    ld_global_stream_v4,
    ld_global_u16,
    ld_shared_v4,
    ldmatrix_x4_trans,
    smem_address,
    st_global_stream_v4,
    st_global_u16,
    st_global_v4,
    st_shared_u32,
    st_shared_v4,
)
from .ptx_cluster import grid_launch_dependents, grid_wait

__all__ = ["COPY_THREADS", "TILE", "TRANSPOSE_THREADS", "make_copy_strided", "make_transpose"]

u16, u32, u64 = types.uint16, types.uint32, types.uint64

TILE = 64
TRANSPOSE_THREADS = 256
COPY_THREADS = 256
PITCH = 144  # bytes of a tile row: 128 and a chunk, so that 8 rows fall into different banks
TILE_BYTES = TILE * PITCH


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


def make_transpose(is_chained: bool = False) -> Callable[..., Any]:
    """The kernel (src, lds, dst, ldd, rows, cols, fast_tiles, flags); one block a tile.

    Bits of flags: 0: src rows are 16-byte aligned; 1: dst rows are; 2: dst is a result, not what the next kernel reads,
    and should not push that out of L2. `fast_tiles` tiles are taken along one side before the next step along the
    other, tokens (rows, or with bit 3 columns), which runs from the last to the first: the product before or after
    works from the first to the last, so each finds in L2 what the other touched most recently. With bit 4 rows of dst
    are written up to the next multiple of 8, with zeros behind the last value. `is_chained` kernels
    (capability 9.0) may be launched to overlap the end of the kernel before them.
    """

    def transpose(src, lds, dst, ldd, rows, cols, fast_tiles, flags):
        tile = cuda.shared.array(TILE_BYTES, types.uint8, alignment=128)
        base = smem_address(tile)
        tid = u32(cuda.threadIdx.x)
        lane, warp = u32(tid & u32(31)), u32(tid >> u32(5))
        if is_chained:
            grid_launch_dependents()
            grid_wait()
        block = u32(u32(cuda.gridDim.x) - u32(1) - u32(cuda.blockIdx.x))
        slow = div_u32(block, u32(fast_tiles))
        fast = u32(block - slow * u32(fast_tiles))
        if flags & u64(8):
            row0, col0 = u64(fast) * u64(TILE), u64(slow) * u64(TILE)
        else:
            row0, col0 = u64(slow) * u64(TILE), u64(fast) * u64(TILE)
        for part in range(2):
            r = u32((tid >> u32(3)) + u32(32 * part))
            c = u32((tid & u32(7)) * u32(8))
            row, col = row0 + u64(r), col0 + u64(c)
            w0, w1, w2, w3 = u32(0), u32(0), u32(0), u32(0)
            if row < rows and col < cols:
                at = src + (row * lds + col) * u64(2)
                room = cols - col
                if room >= u64(8) and flags & u64(1):
                    w = ld_global_stream_v4(at)
                    w0, w1, w2, w3 = w[0], w[1], w[2], w[3]
                else:
                    w0 = _load_pair(at, room)
                    w1 = _load_pair(at + u64(4), _beyond(room, 2))
                    w2 = _load_pair(at + u64(8), _beyond(room, 4))
                    w3 = _load_pair(at + u64(12), _beyond(room, 6))
            st_shared_v4(u32(base + r * u32(PITCH) + c * u32(2)), w0, w1, w2, w3)
        cuda.syncthreads()
        # warp w turns the column block w: 8 columns of all 64 rows, as two quartets of 8x8 blocks
        first = ldmatrix_x4_trans(u32(base + lane * u32(PITCH) + warp * u32(16)))
        second = ldmatrix_x4_trans(u32(base + (lane + u32(32)) * u32(PITCH) + warp * u32(16)))
        cuda.syncthreads()
        turned = u32(base + (warp * u32(8) + (lane >> u32(2))) * u32(PITCH) + (lane & u32(3)) * u32(4))
        for block in range(4):
            st_shared_u32(u32(turned + u32(16 * block)), first[block])
            st_shared_u32(u32(turned + u32(64 + 16 * block)), second[block])
        cuda.syncthreads()
        for part in range(2):
            c = u32((tid >> u32(3)) + u32(32 * part))
            r = u32((tid & u32(7)) * u32(8))
            row, col = row0 + u64(r), col0 + u64(c)
            if col < cols and row < rows:
                w = ld_shared_v4(u32(base + c * u32(PITCH) + r * u32(2)))
                at = dst + (col * ldd + row) * u64(2)
                room = rows - row
                if flags & u64(16):  # what lies beyond was loaded as zeros
                    room = u64(8)
                if room >= u64(8) and flags & u64(2):
                    if flags & u64(4):
                        st_global_stream_v4(at, w[0], w[1], w[2], w[3])
                    else:
                        st_global_v4(at, w[0], w[1], w[2], w[3])
                else:
                    _store_pair(at, w[0], room)
                    _store_pair(at + u64(4), w[1], _beyond(room, 2))
                    _store_pair(at + u64(8), w[2], _beyond(room, 4))
                    _store_pair(at + u64(12), w[3], _beyond(room, 6))

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
