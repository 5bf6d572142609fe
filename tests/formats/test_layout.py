"""Kernel layouts: against plain loops written from the PTX ISA's tables, and back again."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import strategies
from hypothesis import given, settings
from hypothesis import strategies as st

from shflnb import errors
from shflnb.arrays import DTYPES
from shflnb.formats import KernelLayout, ShflBWMatrix, from_mma, from_wgmma, pack, to_mma, to_wgmma


def slabs_by_loops(packed: ShflBWMatrix, tile_k: int) -> tuple[list[dict], list[int], list[int]]:
    """Tile by tile the weights `{(column in tile, row in group): bits}`, the column ids, and tile_ptr."""
    bits = packed.values.view(np.uint16)
    slabs: list[dict] = []
    ids: list[int] = []
    tile_ptr = [0]
    for g in range(packed.groups):
        kept = range(packed.indptr[g], packed.indptr[g + 1])
        for first in range(0, len(kept), tile_k):
            slab = {}
            for c in range(tile_k):
                inside = first + c < len(kept)
                ids.append(int(packed.indices[kept[first + c]]) if inside else -1)
                for r in range(packed.v):
                    slab[c, r] = int(bits[kept[first + c], r]) if inside else 0
            slabs.append(slab)
        tile_ptr.append(len(slabs))
    return slabs, ids, tile_ptr


def wgmma_by_loops(slabs: list[dict], tile_k: int, v: int) -> list[int]:
    return [
        slab[8 * i + c, 8 * j + r]
        for slab in slabs
        for i in range(tile_k // 8)
        for j in range(v // 8)
        for r in range(8)
        for c in range(8)
    ]


def mma_by_loops(slabs: list[dict], tile_k: int, v: int) -> list[int]:
    """PTX ISA, mma.m16n8k16 with 16-bit types: row and column of a_i for groupID and threadID_in_group."""
    out = []
    for slab in slabs:
        for step in range(tile_k // 16):
            for block in range(v // 16):
                for lane in range(32):
                    group_id, thread_in_group = lane >> 2, lane % 4
                    for i in range(8):
                        row = group_id if i in (0, 1, 4, 5) else group_id + 8
                        column = thread_in_group * 2 + (i & 1) + (8 if i >= 4 else 0)
                        out.append(slab[16 * step + column, 16 * block + row])
    return out


KINDS = {"wgmma": (to_wgmma, from_wgmma, wgmma_by_loops), "mma": (to_mma, from_mma, mma_by_loops)}
kinds = st.sampled_from(tuple(KINDS))


@settings(max_examples=25)
@given(strategies.packed_matrices(dtypes=strategies.HALF_NAMES, largest=66), kinds, st.sampled_from((16, 32, 48, 64)))
def test_against_loops(packed: ShflBWMatrix, kind: str, tile_k: int) -> None:
    to_layout, _, by_loops = KINDS[kind]
    layout = to_layout(packed, tile_k)
    slabs, ids, tile_ptr = slabs_by_loops(packed, tile_k)
    assert layout.values.view(np.uint16).tolist() == by_loops(slabs, tile_k, packed.v)
    assert layout.columns.tolist() == ids and layout.tile_ptr.tolist() == tile_ptr
    assert (layout.tile_k, layout.v, layout.kind, layout.tiles) == (tile_k, packed.v, kind, len(slabs))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("v", [16, 32, 64, 128])
@pytest.mark.parametrize("dtype", strategies.HALF_NAMES)
def test_every_height_against_loops(kind: str, v: int, dtype: str) -> None:
    to_layout, _, by_loops = KINDS[kind]
    packed = pack(strategies.make_patterned(2 * v + 3, 70, v, density=0.5, dtype=dtype, seed=v).w, (v, 32))
    layout = to_layout(packed)
    slabs, ids, tile_ptr = slabs_by_loops(packed, 32)
    assert layout.tile_k == 32 and layout.values.dtype == DTYPES[dtype]
    assert layout.values.view(np.uint16).tolist() == by_loops(slabs, 32, v)
    assert layout.columns.tolist() == ids and layout.tile_ptr.tolist() == tile_ptr


@given(strategies.packed_matrices(dtypes=strategies.HALF_NAMES), kinds, st.sampled_from((None, 16, 32, 64, 128)))
def test_round_trip(packed: ShflBWMatrix, kind: str, tile_k: int | None) -> None:
    to_layout, from_layout, _ = KINDS[kind]
    layout = to_layout(packed, tile_k)
    for a, dtype in ((layout.values, packed.values.dtype), (layout.columns, np.int32), (layout.tile_ptr, np.int32)):
        assert a.ndim == 1 and a.flags.c_contiguous and a.dtype == dtype
    assert len(layout.values) == layout.tiles * layout.tile_k * layout.v
    assert layout.nbytes == 2 * len(layout.values) + 4 * len(layout.columns) + 4 * (packed.groups + 1)
    indices, values, indptr = from_layout(layout)
    for got, expected in ((indices, packed.indices), (values, packed.values), (indptr, packed.indptr)):
        assert got.dtype == expected.dtype
        np.testing.assert_array_equal(got, expected)
    again = dataclasses.replace(packed, indices=indices, values=values, indptr=indptr)
    np.testing.assert_array_equal(again.to_dense(), packed.to_dense())


@pytest.mark.parametrize("kind", KINDS)
def test_layout_owns_its_arrays(kind: str) -> None:
    packed = pack(np.ones((16, 16), dtype=np.float16), (16, 16))
    layout = KINDS[kind][0](packed)
    layout.values[:] = 0
    layout.columns[:] = 7
    assert (packed.values == 1).all() and packed.indices.tolist() == list(range(16))


def test_refusals() -> None:
    packed = pack(np.ones((16, 16), dtype=np.float32), (16, 16))
    with pytest.raises(errors.DtypeError, match=r"the values are float32; .* use packed.astype\('float16'\)"):
        to_wgmma(packed)
    half = packed.astype("float16")
    for tile_k in (0, -16, 8, 24):
        with pytest.raises(errors.ArgumentError, match=f"tile_k is {tile_k}; expected a positive multiple of 16"):
            to_mma(half, tile_k)
    layout: KernelLayout = to_mma(half)
    with pytest.raises(errors.ArgumentError, match="kind 'mma'; expected 'wgmma'; use from_mma"):
        from_wgmma(layout)
