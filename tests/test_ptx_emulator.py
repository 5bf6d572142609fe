"""The emulator itself: what it computes, and that it sees what kernels do wrong."""

from __future__ import annotations

import re

import numpy as np
import pytest
from ptx_emulator import DeadlockError, Machine, Program, PtxError

HEAD = """.version 8.0
.target sm_90
.address_size 64
.visible .entry kernel(.param .u64 p0, .param .u64 p1)
{
    .reg .pred %p<8>; .reg .b16 %rs<8>; .reg .b32 %r<32>; .reg .f32 %f<8>; .reg .b64 %rd<8>;
    .shared .align 16 .b8 tile[4096];
    ld.param.u64 %rd0, [p0];
    ld.param.u64 %rd1, [p1];
    mov.u32 %r0, %tid.x;
    mul.wide.u32 %rd2, %r0, 4;
    add.s64 %rd3, %rd0, %rd2;
    add.s64 %rd4, %rd1, %rd2;
    mov.u32 %r1, tile;
    shl.b32 %r2, %r0, 2;
    add.s32 %r2, %r1, %r2;
"""


def run(body: str, x: np.ndarray, *, seed: int = 0, threads: int = 64) -> np.ndarray:
    """The uint32 that each thread stores, of the uint32 it loads."""
    machine = Machine(1 << 16, seed)
    source, target = machine.upload(x), machine.reserve(4 * threads)
    machine.run(Program(HEAD + body + "\n ret;\n}"), grid=1, threads=threads, args=[source, target])
    return machine.download(target, 4 * threads).view(np.uint32)


X = np.random.default_rng(0).integers(0, 2**32, 64, dtype=np.uint32)
LOAD, STORE = "ld.global.u32 %r3, [%rd3];", "st.global.u32 [%rd4], %r4;"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("add.s32 %r4, %r3, -7;", lambda x: x - np.uint32(7)),
        ("mul.lo.s32 %r4, %r3, %r3;", lambda x: x * x),
        ("mad.lo.s32 %r4, %r3, 3, %r0;", lambda x: x * np.uint32(3) + np.arange(64, dtype=np.uint32)),
        ("shr.s32 %r4, %r3, 5;", lambda x: (x.view(np.int32) >> 5).view(np.uint32)),
        ("shr.u32 %r4, %r3, 40;", lambda x: x * np.uint32(0)),
        ("min.u32 %r4, %r3, 1000000;", lambda x: np.minimum(x, 1000000)),
        ("setp.lt.s32 %p1, %r3, 0; selp.b32 %r4, 1, 2, %p1;", lambda x: np.where(x.view(np.int32) < 0, 1, 2)),
        ("and.b32 %r5, %r3, 0xff; not.b32 %r4, %r5;", lambda x: ~(x & np.uint32(255))),
        ("cvt.u64.u32 %rd5, %r3; mul.lo.s64 %rd5, %rd5, %rd5; shr.u64 %rd5, %rd5, 32; cvt.u32.u64 %r4, %rd5;",
         lambda x: (x.astype(np.uint64) ** 2 >> np.uint64(32)).astype(np.uint32)),
        ("prmt.b32 %r4, %r3, %r0, 0x5410;", lambda x: (x & 0xFFFF) | np.arange(64, dtype=np.uint32) << 16),
        ("bfi.b32 %r4, %r0, %r3, 8, 6;", lambda x: (x & ~np.uint32(0x3F00)) | np.arange(64, dtype=np.uint32) << 8),
        ("cvt.rn.f16x2.f32 %r4, 0f3F800000, 0fC0000000;", lambda x: x * np.uint32(0) + np.uint32(0x3C00C000)),
        ("{ .reg .b16 lo, hi; mov.b32 {lo, hi}, %r3; mov.b32 %r4, {hi, lo}; }", lambda x: x >> 16 | x << 16),
        ("div.u32 %r4, %r3, 12345;", lambda x: x // 12345),
    ],
)  # fmt: skip
def test_arithmetic(body: str, expected) -> None:
    assert (run(f"{LOAD} {body} {STORE}", X) == expected(X)).all()


def test_lanes_that_part_meet_again() -> None:
    """A loop of a length of its own for every lane, then a barrier and a shuffle that need all of them."""
    body = """
        mov.u32 %r4, 0; and.b32 %r5, %r0, 7;
        AGAIN: setp.eq.u32 %p1, %r5, 0; @%p1 bra DONE;
        add.s32 %r4, %r4, %r5; sub.s32 %r5, %r5, 1; bra AGAIN;
        DONE: bar.warp.sync 0xffffffff;
        xor.b32 %r6, %r0, 1;
        shfl.sync.idx.b32 %r4, %r4, %r6, 31, 0xffffffff;"""
    steps = (np.arange(64) ^ 1) % 8
    assert (run(body + STORE, X) == steps * (steps + 1) // 2).all()


SWAP = "{load} st.shared.u32 [%r2], %r3; {wait} xor.b32 %r5, %r0, 63; shl.b32 %r5, %r5, 2; add.s32 %r5, %r1, %r5; " \
       "ld.shared.u32 %r4, [%r5]; {store}"  # fmt: skip


def test_a_missing_barrier_shows() -> None:
    for seed in range(5):
        assert (run(SWAP.format(load=LOAD, wait="bar.sync 0;", store=STORE), X, seed=seed) == X[::-1]).all()
    found = [run(SWAP.format(load=LOAD, wait="", store=STORE), X, seed=seed) for seed in range(10)]
    assert any((y != X[::-1]).any() for y in found)


def test_a_copy_nobody_waits_for_shows() -> None:
    """cp.async of 16 bytes by every fourth thread, read by all."""
    body = """
        and.b32 %r5, %r0, 3; setp.eq.u32 %p1, %r5, 0;
        @%p1 cp.async.cg.shared.global [%r2], [%rd3], 16;
        cp.async.commit_group; WAIT bar.sync 0; ld.shared.u32 %r4, [%r2];"""
    for seed in range(5):
        assert (run(body.replace("WAIT", "cp.async.wait_group 0;") + STORE, X, seed=seed) == X).all()
    found = [run(body.replace("WAIT", "cp.async.wait_group 1;") + STORE, X, seed=seed) for seed in range(10)]
    assert any((y != X).any() for y in found)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ld.global.u32 %r4, [%rd3+4];", "leaves its array in global memory"),
        ("ld.global.u32 %r4, [%rd3+2];", "misaligned"),
        ("st.shared.u32 [%r2+8192], %r0; mov.u32 %r4, 0;", "outside shared memory"),
        ("mbarrier.arrive.shared::cta.b64 _, [%r1]; mov.u32 %r4, 0;", "no mbarrier was set up"),
        ("st.shared.u32 [%r1], %r0; mov.u32 %r4, 0;", "two lanes store different values"),
    ],
)
def test_errors_are_named(body: str, message: str) -> None:
    with pytest.raises(PtxError, match=message):
        run(body + STORE, X)


def test_what_is_unknown_is_refused() -> None:
    with pytest.raises(PtxError, match="does not know: popc"):
        run(f"{LOAD} popc.b32 %r4, %r3; {STORE}", X)


def test_endless_waits_are_seen() -> None:
    wait = "mbarrier.init.shared::cta.b64 [%r1], 65; bar.sync 0; mbarrier.arrive.shared::cta.b64 _, [%r1]; " \
           "{ .reg .pred p; W: mbarrier.try_wait.parity.shared::cta.b64 p, [%r1], 0; @p bra D; bra W; D: } " \
           "mov.u32 %r4, 1;"  # fmt: skip
    with pytest.raises(DeadlockError, match="nothing moves any more"):
        run(wait + STORE, X)
    assert (run(wait.replace("65", "64") + STORE, X) == 1).all()


# --- a real kernel, spoiled ------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def product() -> tuple[str, list[np.ndarray], np.ndarray]:
    """PTX of a Hopper product, its arguments' arrays and the right result: one block, two tiles, a short ring."""
    pytest.importorskip("numba_cuda", reason="needs numba-cuda (extra cu12 or cu13)")
    from gpu_cases import random_packed

    from shflnb.formats.layout import to_wgmma
    from shflnb.kernels import compiler
    from shflnb.kernels.config import Config
    from shflnb.kernels.queue import tile_queue
    from shflnb.kernels.spmm_plan import _kernel_arrays, kernel_spec

    config = Config("sm90", 64, 128, 32, 2, team=4)
    spec = kernel_spec(config)
    ptx = compiler.compile_ptx(spec.make(), spec.signature(), "sm_90a", spec.name, spec.threads, 1)
    packed = random_packed(128, 200, 64, [200, 170], integers=True)
    (values, columns, rows), first, counts = _kernel_arrays(to_wgmma(packed, 32), packed)
    x = np.random.default_rng(0).integers(-2, 3, (200, 128)).astype(np.float16)
    want = packed.to_dense().astype(np.float32) @ x.astype(np.float32)
    return ptx, [values, columns, tile_queue(first, counts, 1, 1, 1), rows, x], want.astype(np.float16)


def multiply(ptx: str, arrays: list[np.ndarray], seed: int) -> np.ndarray:
    machine = Machine(1 << 20, seed)
    at = [machine.upload(a) for a in arrays]
    out = machine.reserve(128 * 128 * 2)
    machine.run(Program(ptx), grid=1, threads=384, smem=80_000, args=[*at, out, 0, 0, 128, 128, 128, 0, 1])
    return machine.download(out, 128 * 128 * 2).view(np.float16).reshape(128, 128)


def test_the_sound_kernel_is_right(product: tuple[str, list[np.ndarray], np.ndarray]) -> None:
    ptx, arrays, want = product
    for seed in range(4):
        assert (multiply(ptx, arrays, seed) == want).all()


SPOILED = {
    "stages are released too early": (r"wgmma\.wait_group\.sync\.aligned 1;", "wgmma.wait_group.sync.aligned 2;"),
    "ids are not waited for": (r"cp\.async\.wait_group \d;", "cp.async.wait_group 7;"),
    "full stages are not announced": (r"cp\.async\.mbarrier\.arrive\.noinc\S+ \[[^\]]*\];", ""),
    "stages are not released": (r"mbarrier\.arrive\.shared::cta\.b64 _, \[[^\]]*\];", ""),
    "no stage is waited for": (r"\{[^{}]*mbarrier\.try_wait[^{}]*\}", ""),
    "the weights do not come": (r"cp\.async\.bulk\S+ [^;]*;", ""),
    "results leave without staging": (r"stmatrix\S+ [^;]*;", ""),
}


@pytest.mark.parametrize("what", SPOILED)
def test_a_spoiled_kernel_is_noticed(what: str, product: tuple[str, list[np.ndarray], np.ndarray]) -> None:
    ptx, arrays, want = product
    spoiled, count = re.subn(*SPOILED[what], ptx)
    assert count > 0
    noticed = 0
    for seed in range(6):
        try:
            noticed += int((multiply(spoiled, arrays, seed) != want).any())
        except PtxError:
            noticed += 1
    assert noticed > 0


# --- a kernel of clusters, spoiled -----------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def team() -> tuple[str, list[np.ndarray], np.ndarray]:
    """The same for the few-column kernel: one cluster of four blocks, three groups."""
    pytest.importorskip("numba_cuda", reason="needs numba-cuda (extra cu12 or cu13)")
    from gpu_cases import random_packed

    from shflnb.kernels import compiler
    from shflnb.kernels.queue import tile_queue
    from shflnb.kernels.skinny_config import SkinnyConfig
    from shflnb.kernels.skinny_plan import kernel_spec
    from shflnb.kernels.spmm_plan import _arrays_for

    spec = kernel_spec(SkinnyConfig(32, 4, 4, 4))
    ptx = compiler.compile_ptx(spec.make(), spec.signature(), "sm_90a", spec.name, spec.threads, 2)
    packed = random_packed(96, 300, 32, [300, 130, 200], integers=True)
    (values, _, rows, ids), first, counts = _arrays_for(packed, "sm90", 64)
    x = np.random.default_rng(0).integers(-2, 3, (300, 24)).astype(np.float16)
    want = packed.to_dense().astype(np.float32) @ x.astype(np.float32)
    return ptx, [values, ids, tile_queue(first, counts, 1, 1, 1), rows, x], want.astype(np.float16)


def multiply_together(ptx: str, arrays: list[np.ndarray], seed: int) -> np.ndarray:
    machine = Machine(1 << 20, seed)
    at = [machine.upload(a) for a in arrays]
    out = machine.reserve(96 * 24 * 2)
    sizes = (24, 24, 1, 24, 0, 0, 0)
    args = [*at, out, 0, 0, *sizes, 0, 0, 0]
    machine.run(Program(ptx), grid=4, threads=288, smem=80_000, cluster=4, args=args)
    return machine.download(out, 96 * 24 * 2).view(np.float16).reshape(96, 24)


SPOILED_TEAM = {
    "nothing": (r"\Z", ""),
    "descriptors name the block in its cluster": (r"and\.b32\s+(%r\d+), (%r\d+), 262143;", r"mov.u32 \1, \2;"),
    "sums do not come": (r"st\.async\S+ [^;]*;", ""),
    "every rank keeps its sums": (r"mapa\.shared::cluster\.u32 (%r\d+), (%r\d+), [^;]*;", r"mov.u32 \1, \2;"),
}


@pytest.mark.parametrize("what", SPOILED_TEAM)
def test_a_spoiled_cluster_is_noticed(what: str, team: tuple[str, list[np.ndarray], np.ndarray]) -> None:
    ptx, arrays, want = team
    spoiled, count = re.subn(*SPOILED_TEAM[what], ptx)
    assert count > 0
    noticed = 0
    for seed in range(1 if what == "nothing" else 6):
        try:
            noticed += int((multiply_together(spoiled, arrays, seed) != want).any())
        except PtxError:
            noticed += 1
    assert (noticed > 0) == (what != "nothing")


def test_a_wrong_number_of_arguments_is_the_callers_mistake(team: tuple[str, list[np.ndarray], np.ndarray]) -> None:
    """And no `PtxError`, which the tests of spoiled kernels take for a fault that was noticed."""
    with pytest.raises(TypeError, match="takes 18 arguments, not 16"):
        Machine(1 << 16, 0).run(Program(team[0]), grid=4, threads=288, smem=80_000, cluster=4, args=[0] * 16)
