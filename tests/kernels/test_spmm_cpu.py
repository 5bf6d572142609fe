"""The CPU kernels against the definition in float64: every dtype, height, memory order, odd size, thread count."""

from __future__ import annotations

import itertools
import threading
import tracemalloc

import numpy as np
import pytest
import strategies
from hypothesis import given, settings
from hypothesis import strategies as st

from shflnb.arrays import DTYPES
from shflnb.errors import ArgumentError
from shflnb.formats import ShflBWMatrix, pack
from shflnb.kernels import cpu_pool, spmm_cpu
from shflnb.kernels.cpu_simd import Machine, machine
from shflnb.kernels.spmm_cpu import Config, choose, spmm
from shflnb.reference import judge, matmul_definition

ORDERS = ("feature", "token", "strided", "reversed")


def arrange(a: np.ndarray, order: str) -> np.ndarray:
    """A copy in another memory order."""
    rows, columns = a.shape
    if order == "feature":
        return a.copy(order="C")
    if order == "token":
        return a.T.copy(order="C").T
    wide = np.full((3 * rows + 1, 2 * columns + 1), np.nan, a.dtype)
    place = wide[1::3, 1::2] if order == "strided" else wide[-1:0:-3, -1:0:-2]
    place[...] = a
    return place


def poisoned(shape: tuple[int, int], dtype: np.dtype, order: str) -> np.ndarray:
    return arrange(np.full(shape, np.nan, dtype), order)


def make(
    m: int, k: int, v: int, dtype: str = "float32", density: float = 0.3, seed: int = 0, **options
) -> ShflBWMatrix:
    made = strategies.make_patterned(m, k, v, density=density, dtype=dtype, seed=seed, **options)
    return pack(made.w, made.block, row_perm=made.row_perm, fill_in_warning=None)


def product(packed, x, order="feature", **extras):
    out = poisoned((packed.shape[0], x.shape[1]), x.dtype, order)
    guard = out.base.copy() if order in ("strided", "reversed") else None
    spmm(packed, x, out, **extras)
    if guard is not None:  # nothing was written between the places of out
        written = out.base.copy()
        out_places = np.zeros(guard.shape, bool)
        (out_places[1::3, 1::2] if order == "strided" else out_places[-1:0:-3, -1:0:-2])[...] = True
        assert np.isnan(written[~out_places].astype(np.float64)).all()
    return out


@pytest.fixture
def threads():
    before = cpu_pool.get_num_threads()
    yield cpu_pool.set_num_threads
    cpu_pool.set_num_threads(before)


@pytest.fixture
def tiny_pieces(monkeypatch, threads):
    """Four threads even for the smallest product."""
    monkeypatch.setattr(spmm_cpu, "SPAN_WORK", 1)
    threads(4)


# -- right results ----------------------------------------------------------------------------------------------------

SIZES = [(1, 1, 1), (2, 3, 2), (17, 15, 3), (64, 64, 64), (65, 63, 47), (63, 129, 49), (130, 257, 97), (300, 131, 193)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("v", [16, 32, 64, 128])
def test_against_the_definition(dtype, v, tiny_pieces):
    for (m, k, n), order in itertools.product(SIZES, ORDERS):
        packed = make(m, k, v, dtype, seed=m)
        x = strategies.make_activations(k, n, dtype, seed=n)
        for x_order in ("feature", "token") if order in ("feature", "token") else (order,):
            found = judge(product(packed, arrange(x, x_order), order), packed, x)
            assert found.holds, f"{m} x {k} x {n}, x {x_order}, out {order}: {found}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 3, 5, 6, 7, 11, 15, 16, 17, 31, 33, 50])
def test_few_columns(dtype, n):
    packed = make(200, 333, 64, dtype, seed=n)
    x = strategies.make_activations(333, n, dtype)
    for x_order, order in itertools.product(("feature", "token"), repeat=2):
        assert judge(product(packed, arrange(x, x_order), order), packed, x).holds


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("density", [0.0, 0.02, 1.0])
def test_densities(dtype, density, tiny_pieces):
    packed = make(150, 700, 32, dtype, density, unequal=density < 1)
    for n, order in ((100, "feature"), (30, "token"), (1, "feature")):
        x = strategies.make_activations(700, n, dtype)
        assert judge(product(packed, x, order), packed, x).holds


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_integers_are_exact(dtype):
    packed = make(140, 90, 64, dtype, integers=True)
    x = strategies.make_activations(90, 70, dtype, integers=True)
    expected = matmul_definition(packed, x).astype(DTYPES[dtype])
    for order in ORDERS:
        np.testing.assert_array_equal(product(packed, arrange(x, order), order), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [None, "relu", "gelu", "silu"])
def test_epilogue(dtype, activation, monkeypatch):
    monkeypatch.setattr(spmm_cpu, "PANELS", 1)  # several slabs, so that places in the residual count from the right one
    monkeypatch.setattr(spmm_cpu, "TOKENS", 8)
    packed = make(129, 97, 64, dtype)
    rng = np.random.default_rng(1)
    x = strategies.make_activations(97, 53, dtype) * DTYPES[dtype].type(0.25)
    for bias_dtype in {dtype, "float32"}:
        bias = rng.standard_normal(129).astype(DTYPES[bias_dtype])
        for n, order in ((53, "feature"), (53, "token"), (3, "feature"), (20, "strided")):
            residual = rng.standard_normal((129, n)).astype(DTYPES[dtype])
            for given_bias, given_residual in ((bias, None), (None, residual), (bias, residual)):
                part = arrange(x[:, :n], order)
                out = product(packed, part, order, bias=given_bias, activation=activation, residual=given_residual)
                found = judge(out, packed, part, given_bias, activation, given_residual)
                assert found.holds, f"{bias_dtype} {n} {order}: {found}"


def test_residual_may_be_out():
    packed, x = make(100, 50, 32), strategies.make_activations(50, 60, "float32")
    before = strategies.make_activations(100, 60, "float32", seed=5)
    for order in ORDERS:
        out = arrange(before, order)
        spmm(packed, x, out, residual=out)
        assert judge(out, packed, x, residual=before).holds


def test_bias_with_strides_and_read_only_arrays():
    packed, x = make(100, 50, 32), strategies.make_activations(50, 60, "float32")
    bias = np.random.default_rng(0).standard_normal(200).astype(np.float32)[::-2]
    for a in (x, bias, packed.values, packed.indices, packed.indptr, packed.row_perm):
        a.flags.writeable = False
    assert judge(product(packed, x, bias=bias), packed, x, bias).holds


def test_arrays_of_a_file_may_be_unaligned():
    packed, x = make(40, 30, 16), strategies.make_activations(30, 20, "float32")
    raw = np.empty(packed.values.nbytes + 1, np.uint8)
    raw[1:] = packed.values.view(np.uint8).ravel()
    values = raw[1:].view(np.float32).reshape(packed.values.shape)
    assert not values.flags.aligned
    moved = ShflBWMatrix(packed.shape, packed.block, packed.indptr, packed.indices, values, packed.row_perm)
    np.testing.assert_array_equal(product(moved, x), product(packed, x))


@settings(deadline=None, max_examples=60)
@given(
    packed=strategies.packed_matrices(largest=140),
    n=strategies.sizes(110),
    seed=strategies.seeds,
    orders=st.tuples(st.sampled_from(ORDERS), st.sampled_from(ORDERS)),
)
def test_any_matrix(packed, n, seed, orders):
    x = strategies.make_activations(packed.shape[1], n, packed.dtype, seed)
    if min(packed.shape[0], n) == 0:
        return
    found = judge(product(packed, arrange(x, orders[0]), orders[1]), packed, x)
    assert found.holds, str(found)


@pytest.mark.parametrize("density", [0.02, 0.1, 0.5])
@pytest.mark.parametrize("n", [1, 64])
def test_long_sums_keep_the_error_rule(density, n):
    packed = make(64, 6000, 64, "float32", density, unequal=False)
    x = strategies.make_activations(6000, n, "float32") + np.float32(0.5)
    found = judge(product(packed, x), packed, x)
    assert found.holds, str(found)


# -- NaN and Inf ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_numbers_stay_in_the_groups_that_keep_their_column(dtype):
    packed = make(150, 60, 32, dtype, 0.25, seed=3)
    x = strategies.make_activations(60, 40, dtype)
    unused = np.setdiff1d(np.arange(60), packed.indices)
    x[unused[:2]] = np.nan
    x[5], x[7, 3], x[11, 4] = np.nan, np.inf, -np.inf
    for n, order in ((40, "feature"), (40, "token"), (5, "feature"), (1, "feature")):
        found = judge(product(packed, x[:, :n], order), packed, x[:, :n])
        assert found.holds, f"{n} {order}: {found}"
    for g in range(packed.groups):
        rows = packed.row_perm[g * 32 : (g + 1) * 32]
        keeps = 5 in packed.indices[packed.indptr[g] : packed.indptr[g + 1]]
        assert np.isnan(product(packed, x)[rows, 0].astype(np.float64)).all() == keeps


def test_stored_zero_times_nan_is_nan_and_missing_rows_write_nothing():
    w = np.zeros((20, 6), np.float32)
    w[:16, 2], w[16:, 4] = 1.0, 1.0
    w[3, 2] = 0.0
    packed = pack(w, (16, 16), row_perm=np.arange(20), fill_in_warning=None)
    x = np.ones((6, 20), np.float32)
    x[2] = np.nan
    y = product(packed, x)
    assert np.isnan(y[:16]).all() and (y[16:] == 1.0).all()


def test_columns_beside_a_slab_do_not_mix():
    """n just beside the vector: the last vector of a slab is filled up, and what fills it must reach nothing."""
    packed = make(64, 40, 64)
    for n in (17, 47, 49, 193):
        x = strategies.make_activations(40, n, "float32")
        x[:, -1] = np.inf
        y = product(packed, x)
        assert np.isfinite(y[:, :-1]).all() and not np.isfinite(y[:, -1]).any()


# -- one arithmetic ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_depend_on_nothing_but_the_column(dtype, monkeypatch, threads):
    packed = make(200, 500, 64, dtype, 0.5)
    x = strategies.make_activations(500, 230, dtype)
    bias = np.random.default_rng(0).standard_normal(200).astype(np.float32)
    threads(1)
    first = product(packed, x, bias=bias, activation="gelu").tobytes()
    monkeypatch.setattr(spmm_cpu, "SPAN_WORK", 1)
    for count in (1, 2, 3, 5):
        threads(count)
        for panels, tokens in ((1, 8), (2, 48), (4, 96)):
            monkeypatch.setattr(spmm_cpu, "PANELS", panels)
            monkeypatch.setattr(spmm_cpu, "TOKENS", tokens)
            for order in ("feature", "token"):
                out = product(packed, arrange(x, order), order, bias=bias, activation="gelu")
                assert np.ascontiguousarray(out).tobytes() == first, (count, panels, tokens, order)
    parts = [product(packed, x[:, a:b], bias=bias, activation="gelu") for a, b in ((0, 1), (1, 4), (4, 33), (33, 230))]
    assert np.ascontiguousarray(np.hstack(parts)).tobytes() == first


@pytest.mark.parametrize("unit", [Machine(64, 32), Machine(32, 16), Machine(16, 16), Machine(16, 32)], ids=str)
def test_vector_units_of_other_processors(unit, monkeypatch):
    """Their tiles, compiled for this processor: same numbers but for fused roundings, which only FMA units have."""
    monkeypatch.setattr(spmm_cpu, "machine", lambda: unit)
    for v, order in ((16, "feature"), (64, "token")):
        packed = make(150, 70, v)
        for n in (3, 70):
            x = strategies.make_activations(70, n, "float32")
            assert judge(product(packed, x, order), packed, x).holds


def test_choice():
    avx512 = Machine(64, 32)
    assert choose("float32", 64, 16, True, avx512) == Config("feature", "float32", 3, 8, 64)
    assert choose("float32", 64, 15, True, avx512) == Config("token", "float32", 4, 6, 64)
    assert choose("float32", 64, 500, False, avx512).kernel == "token"
    assert choose("float64", 64, 8, True, avx512) == Config("feature", "float64", 3, 8, 64)
    for unit, storage, v in itertools.product(
        (avx512, Machine(32, 16), Machine(16, 16), Machine(16, 32)), ("float32", "float64", "half"), (16, 32, 64, 128)
    ):
        for n, feature in ((1, True), (1000, True), (1000, False)):
            config = choose(storage, v, n, feature, unit)
            registers = config.vectors * config.scalars + config.vectors + 1
            assert registers <= unit.registers, config
            rows = config.scalars if config.kernel == "feature" else config.vectors * config.lanes
            assert v % rows == 0, f"{config} does not cover groups of {v} rows"


# -- workspace --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [0, 1, 1000, 21846, 21847, 100_000, 3_000_000])
@pytest.mark.parametrize("n", [1, 7, 48, 5000])
def test_workspace_is_bounded(k, n):
    for storage, v, feature in itertools.product(("float32", "float64", "half"), (16, 128), (True, False)):
        config = choose(storage, v, n, feature, machine())
        width = spmm_cpu._width(config, k, n)
        itemsize = np.dtype(config.accumulate).itemsize
        panel = config.vectors * config.lanes if config.kernel == "feature" else config.scalars
        assert 1 <= width <= max(n, config.lanes * -(-n // config.lanes))
        assert k * width * itemsize <= max(spmm_cpu.SLAB_BYTES, k * panel * itemsize)
        assert (spmm_cpu.CHUNK + width) * v * itemsize <= 1 << 20


@pytest.mark.parametrize("order", ["feature", "token"])
def test_nothing_is_allocated_when_warm(order, threads):
    threads(2)
    packed = make(512, 512, 64, "float16")
    x = arrange(strategies.make_activations(512, 400, "float16"), order)
    out = arrange(np.empty((512, 400), np.float16), order)
    bias = np.ones(512, np.float16)

    def call():
        spmm(packed, x, out, bias=bias, activation="silu", residual=out)

    def allocated() -> int:
        """Bytes that 20 calls hold at once beyond what was there after the first."""
        tracemalloc.start()
        try:
            call()
            before = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            for _ in range(20):
                call()
            after, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        return max(peak - before, 2 * (after - before))

    for _ in range(20):
        call()
    # a worker makes its workspace when it first gets a turn, which a busy machine may put off: once each and no more
    rounds = [allocated() for _ in range(4)]
    assert sum(grown >= 16_384 for grown in rounds) <= 2 and min(rounds) < 16_384


def test_disabled_compiler_is_named(monkeypatch):
    monkeypatch.setattr("numba.config.DISABLE_JIT", 1)
    monkeypatch.setattr(spmm_cpu, "_kernels", {})
    with pytest.raises(ArgumentError, match="NUMBA_DISABLE_JIT is set"):
        product(make(16, 4, 16), strategies.make_activations(4, 2, "float32"))


def test_launch_record_is_made_once():
    packed, x = make(64, 64, 64), strategies.make_activations(64, 20, "float32")
    product(packed, x)
    record = packed.launch_cache["cpu"]
    product(packed, x)
    assert packed.launch_cache["cpu"] is record and np.shares_memory(record.values, packed.values)


# -- threads ----------------------------------------------------------------------------------------------------------


def test_many_threads_at_once(tiny_pieces):
    """Each caller multiplies a matrix of its own or one that several share; the bits are those of a lone call."""
    shared = make(256, 300, 64, "float32", seed=100)
    work = []
    for i in range(6):
        dtype = ("float32", "float16", "float64")[i % 3]
        packed = shared if i % 2 and dtype == "float32" else make(100 + 30 * i, 200 + 11 * i, 32, dtype, seed=i)
        x = strategies.make_activations(packed.shape[1], 40 + 17 * i, dtype, seed=i)
        work.append((packed, x, ("feature", "token")[i % 2]))
    alone = [product(*each).tobytes("A") for each in work]
    wrong, barrier = [], threading.Barrier(len(work))

    def call(i):
        barrier.wait()
        for _ in range(15):
            if product(*work[i]).tobytes("A") != alone[i]:
                wrong.append(i)

    callers = [threading.Thread(target=call, args=(i,)) for i in range(len(work))]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


@pytest.mark.parametrize("pieces", [1, 2, 7, 64, 1000])
def test_every_piece_is_done_once(pieces):
    """Pieces of any number and size, also more than there are (slab, group) pairs, with empty and with long groups."""
    packed = make(400, 90, 16, density=0.5, seed=4)
    x = strategies.make_activations(90, 120, "float32")
    config = choose("float32", 16, 120, True, machine())
    ready = spmm_cpu._prepare(packed)
    out, width = np.full((400, 120), np.nan, np.float32), config.vectors * config.lanes
    counters = np.zeros(2, np.int64)
    nothing, no_residual = np.zeros(0, np.float32), np.zeros((0, 0), np.float32)
    work = cpu_pool.workspace((90 + spmm_cpu.PAD) * width + (spmm_cpu.CHUNK + width) * 16, "float32")
    last = spmm_cpu.compiled(config)(
        counters, pieces, ready.indptr, ready.indices, ready.values, 16, ready.row_perm, x, out, nothing, no_residual,
        0, 0, width, work,
    )  # fmt: skip
    assert last and counters[1] == pieces and judge(out, packed, x).holds
