"""How much faster than the dense product is the sparse one on this processor?

Run: python -m pytest benchmarks/bench_cpu.py --benchmark-only
     SHFLNB_BENCH_CSV=name python -m pytest benchmarks/bench_cpu.py   writes benchmarks/results/cpu_<name>.csv

Protocol: each result is checked against float64 before it is timed. Dense is the better of NumPy and torch, on the same
dtype and operands, results written into an array that is there already. All are timed in blocks of their own, with
a pause before each: the worker threads of OpenBLAS and OpenMP spin for some 25 ms after a call and would take a core
from whoever runs next. The dense blocks run before and after the sparse one; medians over all rounds. Warm caches.
Bars (issue 2) hold for 2 cores with AVX-512; without AVX-512 the ratios are reported and not judged.
"""

from __future__ import annotations

import csv
import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

import shflnb
from shflnb.arrays import DTYPES, host_array
from shflnb.formats import ShflBWMatrix
from shflnb.kernels.cpu_pool import get_num_threads
from shflnb.machine import cpu_features, cpu_name
from shflnb.reference import relative_error

PAUSE_S = 0.08
BLOCK_S = 3.0
OVERHEAD_BAR_S = 60e-6
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Case:
    """One product; `layout` "feature" is `matmul`, "token" is `linear`; `bar` is the least allowed speedup."""

    m: int
    k: int
    n: int
    v: int
    sparsity: float
    dtype: str = "float32"
    layout: str = "feature"
    bar: float | None = None

    def __str__(self) -> str:
        return f"{self.m}x{self.k}x{self.n}-v{self.v}-{100 * self.sparsity:g}%-{self.dtype}-{self.layout}"


CASES = [
    Case(2048, 2048, 2048, 64, 0.5, bar=1.7),
    Case(2048, 2048, 2048, 64, 0.75, bar=3.0),
    Case(2048, 2048, 2048, 64, 0.9, bar=6.5),
    Case(2048, 2048, 2048, 32, 0.75, bar=2.5),
    Case(4096, 4096, 1, 64, 0.75, bar=3.0),
    Case(4096, 4096, 16, 64, 0.75, bar=3.0),
    Case(2048, 2048, 2048, 16, 0.75),
    Case(2048, 2048, 2048, 128, 0.75),
    Case(2048, 2048, 2048, 64, 0.75, layout="token"),
    Case(2048, 2048, 2048, 32, 0.75, layout="token"),
    Case(4096, 4096, 4, 64, 0.75),
    Case(4096, 4096, 64, 64, 0.75),
    Case(4096, 4096, 16, 64, 0.75, layout="token"),
    Case(4096, 1024, 1056, 64, 0.75),
    Case(1024, 4096, 960, 64, 0.75),
    Case(2048, 2048, 2048, 64, 0.75, dtype="float64"),
    Case(2048, 2048, 2048, 64, 0.75, dtype="bfloat16"),
    Case(512, 512, 512, 64, 0.75, dtype="float16"),  # torch 2.13 takes minutes for 2048 (Zen 4, 2026-11)
]


def make_packed(case: Case, rng: np.random.Generator) -> ShflBWMatrix:
    """Random columns per group, equally many in each, rows shuffled."""
    kept, groups = round(case.k * (1 - case.sparsity)), -(-case.m // case.v)
    indices = np.concatenate([np.sort(rng.permutation(case.k)[:kept]) for _ in range(groups)]).astype(np.int32)
    values = rng.standard_normal((groups * kept, case.v)).astype(DTYPES[case.dtype])
    return ShflBWMatrix(
        (case.m, case.k), (case.v, 64), np.arange(groups + 1, dtype=np.int64) * kept, indices, values,
        rng.permutation(case.m).astype(np.int32),
    )  # fmt: skip


def as_tensor(a: np.ndarray) -> torch.Tensor:
    if a.dtype == DTYPES["bfloat16"]:
        return torch.from_numpy(a.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(a)


def make_products(case: Case) -> tuple[dict[str, Callable[[], object]], Callable[[], np.ndarray], np.ndarray]:
    """The dense products by name, the sparse one, and the exact result."""
    rng = np.random.default_rng(0)
    packed = make_packed(case, rng)
    w, x = packed.to_dense(), rng.standard_normal((case.k, case.n)).astype(DTYPES[case.dtype])
    exact = w.astype(np.float64) @ x.astype(np.float64)
    token = case.layout == "token"
    a, b = (np.ascontiguousarray(x.T), w.T) if token else (w, x)
    out = np.empty((case.n, case.m) if token else (case.m, case.n), DTYPES[case.dtype])
    ta, tb, tout = as_tensor(a), as_tensor(b), as_tensor(np.empty_like(out))
    dense: dict[str, Callable[[], object]] = {"torch": lambda: torch.matmul(ta, tb, out=tout)}
    if case.dtype in ("float32", "float64"):  # NumPy has no fast product of 16-bit numbers
        dense_out = np.empty_like(out)
        dense["numpy"] = lambda: np.matmul(a, b, out=dense_out)
    if token:
        return dense, lambda: shflnb.linear(a, packed, out=out), exact.T
    return dense, lambda: shflnb.matmul(packed, x, out=out), exact


def measure(call: Callable[[], object], rounds: int) -> list[float]:
    """Seconds of each round, after a pause and a warm-up; as many rounds as fit into `BLOCK_S`, but at least 3."""
    time.sleep(PAUSE_S)
    call()
    seconds: list[float] = []
    while len(seconds) < rounds and (len(seconds) < 3 or sum(seconds) < BLOCK_S):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds


@pytest.mark.parametrize("case", CASES, ids=str)
def test_speedup(benchmark, case):
    dense, sparse, exact = make_products(case)
    errors = {name: relative_error(call(), exact) for name, call in dense.items()}
    error = relative_error(sparse(), exact)
    assert error <= 2 * max(errors.values()) + np.finfo(np.float32).eps, f"wrong result: {error} against {errors}"
    rounds = 40 if case.n <= 64 else 8
    seconds = {name: measure(call, rounds) for name, call in dense.items()}
    time.sleep(PAUSE_S)
    benchmark.pedantic(sparse, rounds=2 * rounds, warmup_rounds=2)
    for name, call in dense.items():
        seconds[name] += measure(call, rounds)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    sparse_s = statistics.median(benchmark.stats.stats.data)
    speedup = min(medians.values()) / sparse_s
    text = ", ".join(f"{name} {1e3 * value:.3g} ms" for name, value in medians.items())
    bar = "" if case.bar is None else f" (bar {case.bar})"
    print(f"\n{case}: {1e3 * sparse_s:.3g} ms against {text}: {speedup:.2f}x{bar}, of at most {ideal(case):.3g}x")
    benchmark.extra_info.update(
        speedup=speedup, bar=case.bar, **{f"{name}_s": value for name, value in medians.items()}
    )
    write_row(case, medians, sparse_s, speedup, error)
    if case.bar is not None and "avx512f" in cpu_features():
        assert speedup >= case.bar, f"{case}: {speedup:.2f}x, bar {case.bar}x"


def ideal(case: Case) -> float:
    return 1 / (1 - case.sparsity)


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_overhead_of_a_small_call(benchmark, kind):
    """m = k = n = 64: what a warm call costs beside the arithmetic, which takes 3 microseconds."""
    packed = make_packed(Case(64, 64, 64, 64, 0.75), np.random.default_rng(0))
    x = np.ones((64, 64), np.float32)
    given = x if kind == "numpy" else torch.from_numpy(x)
    assert np.allclose(host_array(shflnb.matmul(packed, given)), packed.to_dense() @ x, atol=1e-4)
    benchmark.pedantic(shflnb.matmul, args=(packed, given), rounds=2000, warmup_rounds=10)
    median = statistics.median(benchmark.stats.stats.data)
    print(f"\nwarm call at m = k = n = 64, {kind}: {1e6 * median:.1f} us (bar {1e6 * OVERHEAD_BAR_S:.0f})")
    assert median <= OVERHEAD_BAR_S


_BEGUN: set[Path] = set()


def write_row(case: Case, dense: dict[str, float], sparse_s: float, speedup: float, error: float) -> None:
    """Add to the CSV that SHFLNB_BENCH_CSV names, begun anew by each run, with the conditions in every row."""
    name = os.environ.get("SHFLNB_BENCH_CSV")
    if not name:
        return
    row = {
        "date": datetime.date.today().isoformat(),
        "processor": cpu_name(),
        "threads": get_num_threads(),
        "features": " ".join(cpu_features()),
        "load": f"{os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else "",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch.__version__,
        "numba": __import__("numba").__version__,
        "shflnb": shflnb.__version__,
        "m": case.m, "k": case.k, "n": case.n, "v": case.v, "sparsity": case.sparsity,
        "dtype": case.dtype, "layout": case.layout,
        "numpy_ms": f"{1e3 * dense['numpy']:.4g}" if "numpy" in dense else "",
        "torch_ms": f"{1e3 * dense['torch']:.4g}",
        "sparse_ms": f"{1e3 * sparse_s:.4g}",
        "speedup": f"{speedup:.3f}",
        "bar": case.bar if case.bar is not None else "",
        "relative_error": f"{error:.3g}",
    }  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"cpu_{name}.csv"
    is_first = path not in _BEGUN
    with path.open("w" if is_first else "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, row)
        if is_first:
            writer.writeheader()
        writer.writerow(row)
    _BEGUN.add(path)
