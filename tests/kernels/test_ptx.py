"""Each PTX intrinsic compiles alone and its text is in the PTX; the index arithmetic of the kernels proved in NumPy."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba.cuda", reason="needs numba-cuda (extra cu12 or cu13)")

from gpu_cases import random_lengths, random_packed
from numba import cuda
from numba.cuda import types

from shflnb.formats.layout import to_mma, to_wgmma
from shflnb.kernels import compiler, ptx
from shflnb.kernels.queue import DRAIN_TILES, tile_queue
from shflnb.kernels.spmm_plan import _kernel_arrays

u16, u32, u64, f32 = types.uint16, types.uint32, types.uint64, types.float32


def ptx_of(kernel: Callable[..., Any], signature: list[Any], arch: str = "sm_90a") -> str:
    return compiler.compile_ptx(kernel, signature, arch, "probe", 128)


# --- instructions ----------------------------------------------------------------------------------------------------
VOID = {
    "mbarrier_init": ("mbarrier.init.shared::cta.b64", [u32, u32]),
    "mbarrier_init_fence": ("fence.mbarrier_init.release.cluster;", []),
    "mbarrier_arrive": ("mbarrier.arrive.shared::cta.b64 _", [u32]),
    "mbarrier_arrive_expect_tx": ("mbarrier.arrive.expect_tx.shared::cta.b64 _", [u32, u32]),
    "mbarrier_wait_parity": ("mbarrier.try_wait.parity.shared::cta.b64", [u32, u32]),
    "cp_async_16": ("cp.async.cg.shared.global", [u32, u64, u32]),
    "cp_async_16_unless_negative": ("setp.lt.s32 skip", [u32, u64, u32]),
    "cp_async_16_below": ("setp.ge.u32 skip", [u32, u64, u32, u32]),
    "cp_async_16_whole": ("cp.async.cg.shared.global", [u32, u64]),
    "cp_async_commit": ("cp.async.commit_group;", []),
    "cp_async_mbarrier_arrive_noinc": ("cp.async.mbarrier.arrive.noinc.shared::cta.b64", [u32]),
    "bulk_copy_g2s": ("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes", [u32, u64, u32, u32]),
    "fence_proxy_async": ("fence.proxy.async.shared::cta;", []),
    "st_global_v4": ("st.global.v4.u32", [u64, u32, u32, u32, u32]),
    "st_global_u16": ("st.global.u16", [u64, u16]),
    "st_global_f32": ("st.global.f32", [u64, f32]),
    "st_shared_u32": ("st.shared.u32", [u32, u32]),
    "st_shared_v4": ("st.shared.v4.u32", [u32, u32, u32, u32, u32]),
    "stmatrix_x4": ("stmatrix.sync.aligned.m8n8.x4.shared.b16", [u32] * 5),
    "stmatrix_x4_trans": ("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16", [u32] * 5),
    "bar_sync": ("bar.sync", [u32, u32]),
    "warp_sync": ("bar.warp.sync 0xffffffff;", []),
    "wgmma_fence": ("wgmma.fence.sync.aligned;", []),
    "wgmma_commit": ("wgmma.commit_group.sync.aligned;", []),
}
VALUE = {
    "ld_global_u16": ("ld.global.u16", [u64], u16),
    "ld_global_nc_u32": ("ld.global.nc.u32", [u64], u32),
    "ld_global_nc_f32": ("ld.global.nc.f32", [u64], f32),
    "mad_wide_u32": ("mad.wide.u32", [u32, u32, u64], u64),
    "div_u32": ("div.u32", [u32, u32], u32),
    "shuffle": ("shfl.sync.idx.b32", [u32, u32], u32),
}
QUARTET = {
    "ld_global_nc_v4": ("ld.global.nc.v4.u32", [u64]),
    "ld_shared_v4": ("ld.shared.v4.u32", [u32]),
    "ldmatrix_x4_trans": ("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16", [u32]),
}
PAIR = {"ld_shared_v2": ("ld.shared.v2.u32", [u32])}
TABLES = {
    "cp_async_wait": [("cp.async.wait_group {};", range(8))],
    "wgmma_wait": [("wgmma.wait_group.sync.aligned {};", (0, 1))],
    "setmaxnreg_dec": [("setmaxnreg.dec.sync.aligned.u32 {};", (40, 80))],
    "setmaxnreg_inc": [("setmaxnreg.inc.sync.aligned.u32 {};", (208,))],
}


def wrapped(names: list[str], body: str, scope: dict[str, Any]) -> Callable[..., Any]:
    """A kernel of as many arguments as an instruction has; Numba wants the argument names in the source."""
    exec(f"def kernel({', '.join(names)}):\n    {body}\n", scope)
    return scope["kernel"]


def test_every_instruction_without_a_result() -> None:
    """All in one kernel each: the text is there, and ptxas takes it for sm_90a."""
    for name, (text, arguments) in VOID.items():
        names = [f"a{i}" for i in range(len(arguments))]
        kernel = wrapped(names, f"instruction({', '.join(names)})", {"instruction": getattr(ptx, name)})
        assert text in ptx_of(kernel, arguments), name


def test_every_instruction_with_a_result() -> None:
    for name, (text, arguments, ret) in VALUE.items():
        names = [f"a{i}" for i in range(len(arguments))]
        store = {u16: "st16(out, r)", u32: "st4(out, r, r, r, r)", f32: "stf(out, r)", u64: "st4(r, a0, a0, a0, a0)"}[
            ret
        ]
        scope = {
            "instruction": getattr(ptx, name),
            "st16": ptx.st_global_u16,
            "stf": ptx.st_global_f32,
            "st4": ptx.st_global_v4,
        }
        kernel = wrapped([*names, "out"], f"r = instruction({', '.join(names)}); {store}", scope)
        assert text in ptx_of(kernel, [*arguments, u64]), name
    for count, instructions in ((2, PAIR), (4, QUARTET)):
        for name, (text, arguments) in instructions.items():
            scope = {"instruction": getattr(ptx, name), "st4": ptx.st_global_v4}
            words = ", ".join(f"r[{i % count}]" for i in range(4))
            kernel = wrapped(["a", "out"], f"r = instruction(a); st4(out, {words})", scope)
            assert text in ptx_of(kernel, [*arguments, u64]), name


def test_the_tables_of_instructions() -> None:
    for name, forms in TABLES.items():
        for text, keys in forms:
            table = getattr(ptx, name)
            for key in keys:
                kernel = wrapped([], "instruction()", {"instruction": table[key]})
                assert text.format(key) in ptx_of(kernel, []), (name, key)


@pytest.mark.parametrize(("dtype", "kind"), [("float16", "f16"), ("bfloat16", "bf16")])
def test_conversions(dtype: str, kind: str) -> None:
    pack, low, high, st4 = ptx.pack_pair[dtype], ptx.unpack_low[dtype], ptx.unpack_high[dtype], ptx.st_global_v4

    def kernel(a, b, word, out):
        w = pack(a, b)
        st4(out, w, pack(low(word), high(word)), w, w)

    text = ptx_of(kernel, [f32, f32, u32, u64])
    # the second source is the lower half: (a, b) must arrive as cvt d, b, a
    assert len(re.findall(rf"cvt\.rn\.{kind}x2\.f32", text)) == 2
    assert ("cvt.f32.f16" in text) == (dtype == "float16")


@pytest.mark.parametrize("n", [16, 32, 64, 128, 256])
@pytest.mark.parametrize(("dtype", "kind"), [("float16", "f16"), ("bfloat16", "bf16")])
def test_wgmma_ties_its_accumulators(n: int, dtype: str, kind: str) -> None:
    wgmma, st = ptx.make_wgmma(n, dtype, b_mn_major=True), ptx.st_global_f32
    count = n // 2

    def kernel(a, b, out):
        acc = cuda.local.array(count, f32)
        for i in range(count):
            acc[i] = f32(0.0)
        wgmma(acc, a, b)
        for i in range(count):
            st(out + u64(4 * i), acc[i])

    text = ptx_of(kernel, [u64, u64, u64])
    call = re.search(
        rf"wgmma\.mma_async\.sync\.aligned\.m64n{n}k16\.f32\.{kind}\.{kind} \{{(.*?)\}}, (\S+), (\S+), (.*?);", text
    )
    assert call is not None
    assert len(set(call.group(1).split(", "))) == count, "as many accumulators, each a register of its own"
    assert call.group(4) == "1, 1, 1, 0, 1"
    assert ".local" not in text


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_mma_of_a_warp(dtype: str) -> None:
    mma, st4 = ptx.make_mma_m16n8k16(dtype), ptx.st_global_f32

    def kernel(a, b, out):
        acc = cuda.local.array(8, f32)
        for i in range(8):
            acc[i] = f32(0.0)
        mma(acc, 4, a, a, a, a, b, b)
        for i in range(8):
            st4(out + u64(4 * i), acc[i])

    kind = {"float16": "f16", "bfloat16": "bf16"}[dtype]
    text = ptx_of(kernel, [u32, u32, u64], "sm_80")
    assert f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32" in text
    assert ".local" not in text


def test_shared_addresses_are_32_bit() -> None:
    address, st4 = ptx.smem_address, ptx.st_global_v4

    def kernel(out):
        smem = cuda.shared.array(256, types.uint8, alignment=128)
        at = address(smem)
        st4(out, at, at, at, at)

    assert "cvta.to.shared.u64" in ptx_of(kernel, [u64])


# --- index arithmetic, proved in NumPy -------------------------------------------------------------------------------
def wgmma_128_byte_swizzle(byte: np.ndarray) -> np.ndarray:
    """PTX ISA, "Shared memory matrix layout": bits 4..6 of the address are exclusive-ored with bits 7..9."""
    return byte ^ ((byte >> 7 & 7) << 4)


@pytest.mark.parametrize(("tile_n", "tile_k"), [(64, 64), (128, 64), (256, 64), (512, 32), (256, 32)])
def test_stitched_rows_stand_in_the_128_byte_swizzle(tile_n: int, tile_k: int) -> None:
    """The kernels' place of (row r, 16-byte chunk c) against the definition; an atom has 64 tokens."""
    r, c = np.meshgrid(np.arange(tile_k), np.arange(tile_n // 8), indexing="ij")
    place = (c >> 3) * (tile_k * 128) + r * 128 + (((c & 7) ^ (r & 7)) << 4)
    plain = (c // 8) * (tile_k * 128) + r * 128 + (c % 8) * 16
    assert np.array_equal(place, wgmma_128_byte_swizzle(plain))
    assert np.array_equal(np.sort(place.ravel()), np.arange(place.size) * 16), "every 16 bytes of the stage once"
    # the producer's form: the place of its first row, an exclusive or for row j, and 128 bytes a row
    for first in range(0, tile_k, 8):
        for j in range(8):
            start = (c[0] >> 3) * (tile_k * 128) + first * 128 + (((c[0] & 7) ^ (first & 7)) << 4)
            assert np.array_equal((start ^ (j & 7) << 4) + j * 128, place[first + j])
    # the 8 rows of an ldmatrix fall into 8 different quads of banks
    banks = place.reshape(tile_k // 8, 8, -1) // 16 % 8
    assert all(len(np.unique(banks[i, :, k])) == 8 for i in range(banks.shape[0]) for k in range(banks.shape[2]))


def run_queue(queue: np.ndarray, block: int) -> list[tuple[int, int, int, int]]:
    """What a block does: its column of the queue until a record without tiles."""
    done = []
    for turn in range(queue.shape[0]):
        record = tuple(int(value) for value in queue[turn, block])
        if record[2] == 0:
            return done
        done.append(record)
    raise AssertionError("a block found no end")


CASES = [
    (groups, n_tiles, grid, sweep, kind)
    for groups, n_tiles in ((1, 1), (1, 7), (2, 3), (5, 1), (33, 9), (64, 16), (257, 5))
    for grid in (1, 2, 7, 132, 10**6)
    for sweep in (1, 2, 4)
    for kind in ("equal", "unequal", "one long")
]


@pytest.mark.parametrize("kind", ["equal", "unequal", "one long"])
def test_the_queue_covers_every_tile_once(kind: str) -> None:
    rng = np.random.default_rng(0)
    for groups, n_tiles, wanted, sweep, each in CASES:
        if each != kind:
            continue
        counts = {
            "equal": np.full(groups, 6),
            "unequal": rng.integers(1, 60, groups),
            "one long": np.ones(groups, int),
        }[kind]
        if kind == "one long":
            counts[groups // 2] = 500
        first = np.concatenate([[0], np.cumsum(counts)[:-1]])
        total = groups * n_tiles
        grid = min(wanted, total)
        queue = tile_queue(first, counts, n_tiles, grid, min(sweep, n_tiles))
        assert queue.dtype == np.uint32 and queue.shape[1:] == (grid, 4)
        work = [run_queue(queue, block) for block in range(grid)]
        tiles = [(record[0], record[3]) for records in work for record in records]
        assert len(tiles) == total and len(set(tiles)) == total
        assert set(tiles) == {(g, t) for g in range(groups) for t in range(n_tiles)}
        assert all(
            record[1] == first[record[0]] and record[2] == counts[record[0]] for records in work for record in records
        )
        assert all(work), "no block is started for nothing"
        costs = np.array([sum(record[2] + DRAIN_TILES for record in records) for records in work])
        # no block has more than the mean and one longest tile: what greedy matching guarantees
        assert costs.max() <= costs.mean() + counts.max() + DRAIN_TILES + 1e-9, (groups, n_tiles, grid, sweep)


def test_unequal_groups_are_evened_out() -> None:
    """64 groups of 16 tiles on average, 8 column tiles, 132 blocks: four tiles a block, the longest near the mean."""
    rng = np.random.default_rng(3)
    counts = np.clip(rng.normal(16.5, 4, 64).round().astype(int), 4, 28)
    queue = tile_queue(np.cumsum(counts) - counts, counts, 8, 132, 1)
    costs = np.array([sum(r[2] + DRAIN_TILES for r in run_queue(queue, block)) for block in range(132)])
    assert costs.max() <= 1.03 * costs.mean(), (costs.max(), costs.mean())
    columns = [[record[3] for record in run_queue(queue, block)] for block in range(132)]
    assert all(list(c) == sorted(c) for c in columns), "blocks walk the column tiles in order"


def test_the_queue_sweeps_column_tiles_together() -> None:
    """With equal groups, all groups meet the first `sweep` column tiles before anyone starts the next."""
    queue = tile_queue(np.arange(0, 120, 6), np.full(20, 6), n_tiles=10, grid=4, sweep=4)
    in_order = [tuple(record) for record in queue.reshape(-1, 4) if record[2]]
    columns = np.array([record[3] for record in in_order])
    assert np.array_equal(columns // 4, np.sort(columns // 4))


@pytest.mark.parametrize("kind", ["wgmma", "mma"])
@pytest.mark.parametrize(("m", "k", "v"), [(130, 70, 64), (16, 5, 16), (300, 200, 128), (33, 1, 32)])
def test_empty_groups_get_a_tile_of_padding(kind: str, m: int, k: int, v: int) -> None:
    """The arrays of a launch, taken apart again, are the packed matrix; padding has id -1 and zero weights."""
    rng = np.random.default_rng(1)
    groups = -(-m // v)
    lengths = random_lengths(rng, groups, k)
    lengths[0] = 0
    packed = random_packed(m, k, v, lengths, seed=2)
    for tile_k in (32, 64):
        layout = (to_wgmma if kind == "wgmma" else to_mma)(packed, tile_k)
        (values, columns, rows), first, counts = _kernel_arrays(layout, packed)
        assert values.dtype == np.uint16 and len(values) == len(columns) * v
        assert (counts >= 1).all()
        for g in range(groups):
            ids = columns[first[g] * tile_k : (first[g] + counts[g]) * tile_k]
            weights = values[first[g] * tile_k * v : (first[g] + counts[g]) * tile_k * v]
            assert np.array_equal(ids[ids >= 0], packed.indices[packed.indptr[g] : packed.indptr[g + 1]])
            assert np.array_equal(ids[ids < 0], np.full((ids < 0).sum(), -1))
            if not lengths[g]:
                assert not weights.any() and (ids == -1).all()
        assert np.array_equal(rows[:m], packed.row_perm) and (rows[m:] == 0xFFFFFFFF).all() and len(rows) == groups * v
