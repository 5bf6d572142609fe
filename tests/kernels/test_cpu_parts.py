"""The parts of the CPU kernels on their own: register tile, number formats, activations, disk cache, worker threads."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from numba import njit
from scipy.special import erfc

from shflnb.errors import ArgumentError
from shflnb.kernels import cpu_pool
from shflnb.kernels.cpu_cache import KernelCache, attach
from shflnb.kernels.cpu_math import (
    ACTIVATION_CODES,
    activate,
    narrow_bfloat16,
    narrow_float16,
    widen_bfloat16,
    widen_float16,
)
from shflnb.kernels.cpu_simd import Machine, fetch_add, machine, make_tile

# -- register tile ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "vectors", "scalars", "vector_bytes", "stitch_vectors"),
    [
        ("float32", 3, 8, 64, True),
        ("float32", 2, 5, 16, False),
        ("float64", 1, 4, 32, True),
        ("float64", 4, 1, 32, False),
    ],
)
def test_register_tile(dtype, vectors, scalars, vector_bytes, stitch_vectors):
    tile = make_tile(vectors, scalars, vector_bytes, stitch_vectors)

    @njit
    def call(vec, sca, step, indices, start, count, acc, fresh):
        tile((vec, 2, 100), (sca, 1, 50, step), (indices, start, count), (acc, 3, 90), fresh)

    rng = np.random.default_rng(0)
    width = vectors * vector_bytes // np.dtype(dtype).itemsize
    vec, sca = rng.integers(-4, 5, (20, 100)).astype(dtype), rng.integers(-4, 5, (20, 50)).astype(dtype)
    indices = np.array([3, 0, 7, 11, 19, 18], dtype=np.int32)
    for start, count, fresh in ((0, 6, True), (1, 3, False), (5, 1, True), (2, 0, True), (2, 0, False)):
        for step in (1, 3):
            kept, order = indices[start : start + count], np.arange(start, start + count)
            v_rows, s_rows = (kept, order) if stitch_vectors else (order, kept)
            product = sca[s_rows, 1 : 1 + scalars * step : step].T @ vec[v_rows, 2 : 2 + width]
            acc = rng.integers(-9, 9, 90 * scalars + 3).astype(dtype)
            expected = acc.copy()
            place = np.lib.stride_tricks.as_strided(expected[3:], (scalars, width), (90 * acc.itemsize, acc.itemsize))
            place[:] = product if fresh else place + product
            call(vec.ravel(), sca.ravel(), step, indices, start, count, acc, fresh)
            np.testing.assert_array_equal(acc, expected)


def test_machine_is_that_of_numba(monkeypatch):
    found = machine()
    assert found.vector_bytes in (16, 32, 64) and found.registers in (16, 32)
    assert found.lanes(4) == 2 * found.lanes(8)

    class Codegen:
        words = ("x86_64-unknown-linux-gnu", "any", "+sse2,-avx512f,+avx")

        def magic_tuple(self):
            return self.words

    codegen = Codegen()
    context = type("Context", (), {"codegen": lambda self: codegen})()
    monkeypatch.setattr("shflnb.kernels.cpu_simd.cpu_target", type("Target", (), {"target_context": context})())
    assert machine.__wrapped__() == Machine(32, 16)
    codegen.words = ("x86_64-pc-windows-msvc", "any", "+avx512f,+avx")
    assert machine.__wrapped__() == Machine(64, 32)
    codegen.words = ("x86_64-unknown-linux-gnu", "x86-64", "")
    assert machine.__wrapped__() == Machine(16, 16)
    codegen.words = ("aarch64-apple-darwin", "apple-m1", "+neon")
    assert machine.__wrapped__() == Machine(16, 32)


# -- number formats ---------------------------------------------------------------------------------------------------


def each(function, numbers, dtype):
    @njit
    def loop(numbers, out):
        for i in range(numbers.shape[0]):
            out[i] = function(numbers[i])

    out = np.empty(numbers.shape, dtype)
    loop(numbers, out)
    return out


HALVES = [(widen_float16, narrow_float16, np.float16), (widen_bfloat16, narrow_bfloat16, ml_dtypes.bfloat16)]


@pytest.mark.parametrize(("widen", "narrow", "dtype"), HALVES, ids=["float16", "bfloat16"])
def test_every_16_bit_number_is_widened_and_comes_back(widen, narrow, dtype):
    bits = np.arange(1 << 16, dtype=np.uint16)
    wide, expected = each(widen, bits, np.float32), bits.view(dtype).astype(np.float32)
    nan = np.isnan(expected)
    np.testing.assert_array_equal(wide[~nan].view(np.uint32), expected[~nan].view(np.uint32))
    assert np.isnan(wide[nan]).all()
    np.testing.assert_array_equal(each(narrow, wide, np.uint16)[~nan], bits[~nan])


@pytest.mark.parametrize(("widen", "narrow", "dtype"), HALVES, ids=["float16", "bfloat16"])
def test_float32_is_rounded_to_nearest_even(widen, narrow, dtype):
    with np.errstate(invalid="ignore"):
        finite = np.arange(1 << 16, dtype=np.uint16).view(dtype).astype(np.float64)
    finite = np.unique(finite[np.isfinite(finite)])
    ties = ((finite[1:] + finite[:-1]) / 2).astype(np.float32)
    rng = np.random.default_rng(0)
    numbers = np.concatenate([
        ties,
        np.nextafter(ties, np.float32(np.inf)),
        np.nextafter(ties, np.float32(-np.inf)),
        rng.integers(0, 1 << 32, 200_000, dtype=np.uint32).view(np.float32),
        np.array([0.0, -0.0, np.inf, -np.inf, np.nan, -np.nan, 1e-45, 65504, 65519.996, 65520, 3.4e38], np.float32),
    ])  # fmt: skip
    with np.errstate(all="ignore"):
        expected = numbers.astype(dtype).view(np.uint16)
    got, nan = each(narrow, numbers, np.uint16), np.isnan(numbers)
    np.testing.assert_array_equal(got[~nan], expected[~nan])
    assert np.isnan(got[nan].view(dtype).astype(np.float32)).all()


# -- activations ------------------------------------------------------------------------------------------------------

EXACT = {
    "relu": lambda x: np.maximum(x, 0.0),
    "gelu": lambda x: 0.5 * x * erfc(-x / math.sqrt(2.0)),
    "silu": lambda x: x / (1.0 + np.exp(-x)),
}


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_activation_against_float64(name, dtype):
    rng = np.random.default_rng(0)
    x = np.concatenate([np.linspace(-30, 30, 100_001), rng.standard_normal(50_000), [1e-30, -1e-30, 0.0, 1e30, -80.0]])
    x = x.astype(dtype)
    y = x.copy()
    activate(y, ACTIVATION_CODES[name])
    exact = EXACT[name](x.astype(np.float64))
    info = np.finfo(dtype)
    ulps = np.abs(y - exact) / np.maximum(np.abs(exact) * info.eps, info.smallest_normal * info.eps)
    normal = np.abs(exact) > info.smallest_normal * 4
    # far out in a tail exp multiplies the rounding of its argument, in float64 that of the reference here as well
    allowed = 16 + (2 * x[normal] ** 2 if dtype == "float64" else 0)
    assert (ulps[normal] <= allowed).all()
    assert ulps[np.abs(exact) > 1e-3].max() <= (5 if dtype == "float32" else 20)
    assert np.abs(y[~normal] - exact[~normal]).max(initial=0.0) <= 4 * info.smallest_normal


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_activation_of_special_numbers(dtype):
    special = np.array([np.nan, np.inf, 0.0, -np.inf], dtype)
    for name, code in ACTIVATION_CODES.items():
        y = special.copy()
        activate(y, code)
        assert np.isnan(y[0]) and y[1] == np.inf and y[2] == 0.0, name
        assert y[3] == -np.inf if name is None else (y[3] == 0.0 if name == "relu" else np.isnan(y[3])), name


# -- disk cache -------------------------------------------------------------------------------------------------------

SIGNATURE = "int64(int64)"


def compiled_through_cache(addend=1):
    @njit
    def add(a):
        return a + addend

    attach(add, f"test_add_{addend}")
    add.compile(SIGNATURE)
    return add


def hits(function):
    return sum(function.stats.cache_hits.values())


@pytest.fixture
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SHFLNB_CACHE_DIR", str(tmp_path))
    return tmp_path / "kernels" / "cpu"


def test_cache_keeps_the_machine_code(cache_folder):
    first, second = compiled_through_cache(), compiled_through_cache()
    assert (hits(first), hits(second)) == (0, 1)
    assert first(41) == second(41) == 42
    other = compiled_through_cache(addend=2)
    assert hits(other) == 0 and other(40) == 42
    assert len(list(cache_folder.iterdir())) == 2 and Path(first.stats.cache_path) == cache_folder


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "extended", "foreign", "folder"])
def test_damaged_cache_file_means_a_recompute(cache_folder, damage):
    compiled_through_cache()
    (path,) = cache_folder.iterdir()
    blob = path.read_bytes()
    if damage == "folder":
        path.unlink()
        path.mkdir()
    else:
        middle = len(blob) // 2
        path.write_bytes({
            "empty": b"",
            "cut": blob[:middle],
            "flipped": blob[:middle] + bytes([blob[middle] ^ 0x10]) + blob[middle + 1 :],
            "extended": blob + b"\0",
            "foreign": b"cos\nsystem\n(S'false'\ntR.",
        }[damage])  # fmt: skip
    again = compiled_through_cache()
    assert hits(again) == 0 and again(41) == 42
    if damage != "folder":
        assert path.read_bytes()[:13] == blob[:13] and hits(compiled_through_cache()) == 1, "the file was not mended"


def test_cache_folder_that_cannot_be_made(tmp_path, monkeypatch):
    in_the_way = tmp_path / "file"
    in_the_way.write_text("no folder")
    monkeypatch.setenv("SHFLNB_CACHE_DIR", str(in_the_way))
    assert compiled_through_cache()(41) == 42


def test_cache_key_names_processor_and_signature():
    class Codegen:
        def __init__(self, cpu):
            self.cpu = cpu

        def magic_tuple(self):
            return ("triple", self.cpu, "+sse2")

    cache = KernelCache("name")
    paths = {cache.path(sig, Codegen(cpu)) for sig in ("int64(int64)", "int32(int32)") for cpu in ("a", "b")}
    assert len(paths) == 4


# -- worker threads ---------------------------------------------------------------------------------------------------


@pytest.fixture
def threads():
    before = cpu_pool.get_num_threads()
    yield cpu_pool.set_num_threads
    cpu_pool.set_num_threads(before)


def claim_pieces(pieces, seconds, done, failing=()):
    """A call for `cpu_pool.run` that marks each piece in `done`, in Python."""
    counters = np.zeros(2, np.int64)
    lock = threading.Lock()

    def call():
        name = threading.current_thread().name
        if name in failing:
            raise MemoryError
        last = False
        while True:
            with lock:
                piece = counters[0]
                counters[0] += 1
            if piece >= pieces:
                return last
            time.sleep(seconds)
            with lock:
                done.append((int(piece), name))
                counters[1] += 1
                last = counters[1] == pieces

    return call


def test_fetch_add_is_atomic():
    counters = np.zeros(2, np.int64)

    @njit(nogil=True)
    def count(counters, times):
        for _ in range(times):
            fetch_add(counters, 1, 2)
        return fetch_add(counters, 0, 5)

    assert count(counters, 0) == 0 and count(counters, 0) == 5
    workers = [threading.Thread(target=count, args=(counters, 100_000)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert counters.tolist() == [30, 800_000]


@pytest.mark.parametrize("helpers", [0, 1, 3])
def test_run_returns_when_every_piece_is_done(helpers):
    for _ in range(20):
        done = []
        cpu_pool.run(claim_pieces(8, 0.0005, done), helpers)
        assert sorted(piece for piece, _ in done) == list(range(8))


def test_workers_take_part():
    done = []
    cpu_pool.run(claim_pieces(8, 0.01, done), 1)
    assert len({name for _, name in done}) == 2


def test_worker_without_memory_leaves_its_share_to_the_others():
    for _ in range(3):  # and stays alive for the next job
        done = []
        cpu_pool.run(claim_pieces(4, 0.001, done, failing=("shflnb-cpu",)), 2)
        assert sorted(piece for piece, _ in done) == list(range(4))
    done = []
    cpu_pool.run(claim_pieces(8, 0.01, done), 1)
    assert len({name for _, name in done}) == 2


def test_workspace_is_aligned_and_kept(threads):
    a = cpu_pool.workspace(1000, "float32", "test")
    assert a.ctypes.data % 64 == 0 and a.size >= 1000 and a.dtype == np.float32
    assert cpu_pool.workspace(10, "float32", "test") is a
    b = cpu_pool.workspace(2000, "float64", "test")
    assert b.dtype == np.float64 and not np.shares_memory(a, b)
    other = []
    thread = threading.Thread(target=lambda: other.append(cpu_pool.workspace(10, "float32", "test")))
    thread.start()
    thread.join()
    assert not np.shares_memory(a, other[0])


def test_large_workspace_is_not_kept(monkeypatch):
    monkeypatch.setattr(cpu_pool, "KEPT_BYTES", 1000)
    a = cpu_pool.workspace(5000, "float32", "large")
    assert cpu_pool.workspace(5000, "float32", "large") is not a


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"SHFLNB_NUM_THREADS": "3", "OMP_NUM_THREADS": "5"}, 3),
        ({"OMP_NUM_THREADS": "5,2"}, 5),
        ({"NUMBA_NUM_THREADS": "7"}, 7),
        ({"SHFLNB_NUM_THREADS": "0", "OMP_NUM_THREADS": "many", "NUMBA_NUM_THREADS": "2"}, 2),
    ],
)
def test_number_of_threads_from_the_environment(monkeypatch, variables, expected):
    for name in ("SHFLNB_NUM_THREADS", "OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cpu_pool, "_threads", 0)
    assert cpu_pool.get_num_threads() == expected


def test_number_of_threads_is_checked(threads):
    for wrong in (0, -1, 1.5, "2"):
        with pytest.raises(ArgumentError, match=r"threads is .*; expected a positive int"):
            cpu_pool.set_num_threads(wrong)


FORK = """
import os, sys, threading, time
from shflnb.kernels import cpu_pool
def use():
    names, lock, state = set(), threading.Lock(), [0, 0]
    def call():
        last = False
        while True:
            with lock:
                piece = state[0]; state[0] += 1
            if piece >= 8: return last
            time.sleep(0.01)
            with lock:
                names.add(threading.current_thread().name); state[1] += 1; last = state[1] == 8
    cpu_pool.run(call, 1)
    return len(names)
assert use() == 2
child = os.fork()
if child == 0:
    os._exit(use())
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_forked_child_starts_its_own_workers():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", FORK], timeout=60, check=False)
    assert done.returncode == 2, "the child did not see two threads at work"


_ONE_PRODUCT = """
import sys
import numpy as np
import shflnb

rng = np.random.default_rng(0)
for v in map(int, sys.argv[1:]):
    w = np.zeros((512, 512), np.float32)
    for g in range(512 // v):
        w[g * v : (g + 1) * v, rng.permutation(512)[:128]] = rng.standard_normal((v, 128))
    x = rng.standard_normal((512, 512)).astype(np.float32)
    y = shflnb.linear(x, shflnb.pack(w, block=(v, 16)))
    assert np.allclose(y, x @ w.T, atol=1e-2), f"wrong product for v = {v}"
"""


def test_kernels_cached_by_different_processes_do_not_mix(tmp_path):
    """Two processes each compile a token kernel into the cache; a third loads both (inner functions have own names)."""
    environment = {**os.environ, "SHFLNB_CACHE_DIR": str(tmp_path)}
    for heights in (["64"], ["32"], ["64", "32", "64"]):
        done = subprocess.run(
            [sys.executable, "-c", _ONE_PRODUCT, *heights], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
