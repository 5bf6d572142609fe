"""Canonical order <-> the order that a kernel wants, in NumPy and both ways, so that a round trip is a test.

Every layout cuts a group's kept columns into tiles of `tile_k`, the last one padded with zero weights and column id -1
(a kernel must not read an activation for it). `tile_ptr[g]` is the first tile of group g; tile t owns
`columns[t * tile_k : (t + 1) * tile_k]` and `values[t * tile_k * v : (t + 1) * tile_k * v]`. Both layouts cut the same
(tile_k, v) slab of a tile into small cubes; with c the column in the tile and r the row in the group:

    wgmma   [c / 8][r / 8][r % 8][c % 8]          8x8 core matrices, K-major operand A, no swizzle
    mma     [c / 16][r / 16][lane][register]      m16n8k16 operand A, the 8 halves of a lane side by side (16 bytes)

Source: PTX ISA, "Matrix fragments for mma.m16n8k16" and "Shared memory matrix layout" (wgmma, no swizzle).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import ArgumentError, DtypeError
from .shflbw import ShflBWMatrix

__all__ = ["KernelLayout", "from_mma", "from_wgmma", "to_mma", "to_wgmma"]


@dataclass(frozen=True, eq=False)
class KernelLayout:
    """A packed matrix in a kernel's order, on the host.

    Parameters
    ----------
    values : array, shape (tiles * tile_k * v,), 2-byte dtype
        The weights, tile after tile, in the order that `kind` names; zero at padded columns.
    columns : int32 array, shape (tiles * tile_k,)
        Column ids of the activation rows to stitch; -1 marks padding.
    tile_ptr : int32 array, shape (groups + 1,)
        Tiles of group g are `tile_ptr[g]` .. `tile_ptr[g + 1] - 1`.
    tile_k, v : int
        Stitched columns per tile and rows per group.
    kind : "wgmma" or "mma"
        The order inside a tile, see the module's docstring.
    """

    values: np.ndarray
    columns: np.ndarray
    tile_ptr: np.ndarray
    tile_k: int
    v: int
    kind: str

    @property
    def tiles(self) -> int:
        """Number of tiles of all groups together."""
        return int(self.tile_ptr[-1])

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays together."""
        return self.values.nbytes + self.columns.nbytes + self.tile_ptr.nbytes


def to_wgmma(packed: ShflBWMatrix, tile_k: int | None = None) -> KernelLayout:
    """Tiles of 8x8 core matrices, `[tile_k / 8][v / 8][8 rows][8 columns]`: wgmma operand A, K-major, without swizzle.

    For the shared-memory descriptor: the next core matrix along k is `v * 16` bytes on, along the rows 128 bytes.

    Parameters
    ----------
    packed : ShflBWMatrix of float16 or bfloat16
    tile_k : int, optional
        A positive multiple of 16; the default is `packed.tile_k`.

    Raises
    ------
    DtypeError
        When the values are not 2 bytes wide.
    ArgumentError
        When tile_k is not a positive multiple of 16.

    Examples
    --------
    >>> import numpy as np
    >>> from shflnb.formats import pack
    >>> packed = pack(np.arange(1, 129, dtype=np.float16).reshape(16, 8), block=(16, 16))
    >>> layout = to_wgmma(packed)
    >>> layout.values[:64].tolist() == packed.to_dense()[:8].ravel().tolist(), layout.columns.tolist()[7:10]
    (True, [7, -1, -1])
    """
    slabs, columns, tile_ptr, tile_k = _tiles(packed, tile_k)
    cut = slabs.reshape(len(slabs), tile_k // 8, 8, packed.v // 8, 8)
    values = np.ascontiguousarray(cut.transpose(0, 1, 3, 4, 2)).reshape(-1).view(packed.values.dtype)
    return KernelLayout(values, columns, tile_ptr, tile_k, packed.v, "wgmma")


def from_wgmma(layout: KernelLayout) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The canonical `(indices, values, indptr)` of a layout made by `to_wgmma`."""
    _check_kind(layout, "wgmma")
    cut = layout.values.view(np.uint16).reshape(layout.tiles, layout.tile_k // 8, layout.v // 8, 8, 8)
    return _canonical(layout, cut.transpose(0, 1, 4, 2, 3))


def to_mma(packed: ShflBWMatrix, tile_k: int | None = None) -> KernelLayout:
    """Tiles of `mma.m16n8k16` A fragments, `[tile_k / 16][v / 16][32 lanes][8 halves]`: one 16-byte load a lane.

    Lane `4 * q + t` (q = 0..7, t = 0..3) holds, as registers a0..a7 in the order of the PTX ISA, the weights at

        rows     q    q    q+8   q+8   q     q     q+8   q+8
        columns  2t   2t+1 2t    2t+1  2t+8  2t+9  2t+8  2t+9

    of its 16 x 16 block. Parameters, errors and result as for `to_wgmma`.

    Examples
    --------
    >>> import numpy as np
    >>> from shflnb.formats import pack
    >>> packed = pack(np.arange(256, dtype=np.float16).reshape(16, 16) + 1, block=(16, 16))
    >>> to_mma(packed).values[8:16].tolist()  # lane 1
    [3.0, 4.0, 131.0, 132.0, 11.0, 12.0, 139.0, 140.0]
    """
    slabs, columns, tile_ptr, tile_k = _tiles(packed, tile_k)
    # A column of a k16 step is (upper half, t, odd) and a row of a 16-row block is (upper half, q), slowest first.
    cut = slabs.reshape(len(slabs), tile_k // 16, 2, 4, 2, packed.v // 16, 2, 8)
    values = np.ascontiguousarray(cut.transpose(0, 1, 5, 7, 3, 2, 6, 4)).reshape(-1).view(packed.values.dtype)
    return KernelLayout(values, columns, tile_ptr, tile_k, packed.v, "mma")


def from_mma(layout: KernelLayout) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The canonical `(indices, values, indptr)` of a layout made by `to_mma`."""
    _check_kind(layout, "mma")
    cut = layout.values.view(np.uint16).reshape(layout.tiles, layout.tile_k // 16, layout.v // 16, 8, 4, 2, 2, 2)
    return _canonical(layout, cut.transpose(0, 1, 5, 4, 7, 2, 6, 3))


def _tiles(packed: ShflBWMatrix, tile_k: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Slabs (tiles, tile_k, v) of the values as uint16, padded with zeros; column ids; tile_ptr; tile_k."""
    if packed.values.itemsize != 2:
        raise DtypeError(f"the values are {packed.dtype}; kernel layouts hold float16 or bfloat16; use "
                         f"packed.astype('float16')")  # fmt: skip
    tile_k = packed.tile_k if tile_k is None else int(tile_k)
    if tile_k <= 0 or tile_k % 16:
        raise ArgumentError(f"tile_k is {tile_k}; expected a positive multiple of 16")
    counts = packed.counts
    tile_ptr = np.zeros(packed.groups + 1, dtype=np.int32)
    np.cumsum(-(-counts // tile_k), out=tile_ptr[1:])
    places = int(tile_ptr[-1]) * tile_k
    canonical = packed.values.view(np.uint16)
    if places == len(packed.indices):
        return canonical.reshape(-1, tile_k, packed.v), packed.indices.copy(), tile_ptr, tile_k
    shift = tile_ptr[:-1].astype(np.int64) * tile_k - packed.indptr[:-1]
    place = np.arange(len(packed.indices)) + np.repeat(shift, counts)
    columns = np.full(places, -1, dtype=np.int32)
    columns[place] = packed.indices
    slabs = np.zeros((places, packed.v), dtype=np.uint16)
    slabs[place] = canonical
    return slabs.reshape(-1, tile_k, packed.v), columns, tile_ptr, tile_k


def _canonical(layout: KernelLayout, slabs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Drop the padding of slabs whose axes are, flattened, (tiles * tile_k, v)."""
    kept = layout.columns >= 0
    values = np.ascontiguousarray(slabs).reshape(-1, layout.v)[kept].view(layout.values.dtype)
    kept_before = np.zeros(len(kept) + 1, dtype=np.int64)
    np.cumsum(kept, out=kept_before[1:])
    indptr = kept_before[layout.tile_ptr.astype(np.int64) * layout.tile_k]
    return layout.columns[kept], values, indptr


def _check_kind(layout: KernelLayout, kind: str) -> None:
    if layout.kind != kind:
        raise ArgumentError(f"the layout is of kind {layout.kind!r}; expected {kind!r}; use from_{layout.kind}")
