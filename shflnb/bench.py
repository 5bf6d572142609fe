"""`shflnb bench`: a short comparison with the dense library on this machine. Each result is checked before it is timed.

On a GPU: float16, device times by CUDA graphs, dense by torch (cuBLAS). On the CPU: float32, dense by NumPy,
with all threads or one. The long comparison, with peers, is `benchmarks/` in the source tree.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .arrays import DTYPES
from .errors import ArgumentError, DeviceError, MissingDependencyError
from .formats import ShflBWMatrix
from .machine import cpu_name, find_cuda
from .ops import matmul

__all__ = ["BenchRow", "cases", "choose_device", "random_packed", "run"]

GPU_SIZES = ((4096, 4096, 4096), (2048, 2048, 4096), (4096, 1024, 4096))
CPU_SIZES = ((1024, 1024, 1024), (2048, 2048, 16))
SPARSITIES = {"cuda": (0.5, 0.75, 0.875), "cpu": (0.5, 0.75, 0.9)}
HEIGHTS = {"cuda": (32, 64, 128), "cpu": (32, 64)}
ERROR_LIMIT = {"cuda": 1e-3, "cpu": 1e-5}
"""Largest ||error|| / ||result||: what the rounding of float16 and float32 explains, and some."""
STATISTIC = {"cuda": "median device", "cpu": "least"}
"""What a time is: on the CPU whatever else runs only ever makes a call longer."""
ROUNDS = 9
PAUSE_S = 0.06
"""The threads of a BLAS spin for some 25 ms after a call and would take a core from the product timed next."""


@dataclass(frozen=True)
class BenchRow:
    """One product: sizes, times in microseconds, and where its time stands between dense and the roof."""

    m: int
    k: int
    n: int
    sparsity: float
    v: int
    dtype: str
    sparse_us: float
    dense_us: float
    dense_what: str
    speedup: float
    roof_us: float
    roof: str
    """What sets the roof."""
    percent_of_roof: float
    error: float
    is_right: bool


def choose_device(device: str | None) -> tuple[str, str]:
    """("cuda" or "cpu", the name of the processor), for "cuda", "cpu" or None: a GPU if there is one.

    Raises
    ------
    ArgumentError, DeviceError, MissingDependencyError
        For another name, for "cuda" without a GPU, and where torch, which brings the dense library, is missing.
    """
    if device not in (None, "cpu", "cuda"):
        raise ArgumentError(f"device is {device!r}; expected 'cpu' or 'cuda'")
    found = find_cuda()
    if device == "cpu" or (device is None and found.problem is not None):
        return "cpu", cpu_name()
    if found.problem is not None:
        raise DeviceError(f"no GPU to measure on: {found.problem}; `shflnb bench --device cpu` measures the CPU")
    try:
        from .nn.product import product_times  # noqa: F401 (only whether it is there)
    except ImportError as error:
        raise MissingDependencyError(
            "the comparison on a GPU takes the dense product from torch; install shflnb[torch], or use --device cpu"
        ) from error
    return "cuda", found.devices[0].name


def cases(
    device: str,
    sizes: Sequence[tuple[int, int, int]] = (),
    sparsities: Sequence[float] = (),
    heights: Sequence[int] = (),
) -> list[tuple[tuple[int, int, int], float, int]]:
    """The (m, k, n), sparsity and v to measure: what is given, else a short list that suits the device."""
    for size in sizes:
        if len(size) != 3 or min(size) < 1:
            raise ArgumentError(f"size is {size}; expected m, k and n of at least 1, such as 4096,4096,4096")
    for sparsity in sparsities:
        if not 0 <= sparsity < 1:
            raise ArgumentError(f"sparsity is {sparsity}; expected a share from 0 to below 1")
    usual = GPU_SIZES if device == "cuda" else CPU_SIZES
    return list(itertools.product(sizes or usual, sparsities or SPARSITIES[device], heights or HEIGHTS[device]))


def random_packed(m: int, k: int, v: int, sparsity: float, dtype: str, *, seed: int = 0) -> ShflBWMatrix:
    """A packed matrix with equally many random columns in every group and a random row order.

    Examples
    --------
    >>> packed = random_packed(96, 64, 32, 0.75, "float32")
    >>> packed.groups, packed.counts.tolist(), packed.density
    (3, [16, 16, 16], 0.25)
    """
    rng = np.random.default_rng(seed)
    groups, keep = -(-m // v), max(1, round(k * (1 - sparsity)))
    columns = np.sort(rng.random((groups, k), dtype=np.float32).argsort(axis=1)[:, :keep], axis=1).astype(np.int32)
    values = (rng.standard_normal((groups * keep, v), dtype=np.float32) * np.float32(0.05)).astype(DTYPES[dtype])
    if m % v:
        values[-keep:, m % v :] = 0
    indptr = np.arange(groups + 1, dtype=np.int64) * keep
    return ShflBWMatrix((m, k), (v, 64), indptr, columns.ravel(), values, rng.permutation(m).astype(np.int32))


def run(device: str, wanted: Sequence[tuple[tuple[int, int, int], float, int]]) -> Iterator[BenchRow]:
    """Measure cases of `cases` one after the other."""
    for (m, k, n), sparsity, v in wanted:
        packed = random_packed(m, k, v, sparsity, "float16" if device == "cuda" else "float32")
        yield (_on_gpu if device == "cuda" else _on_cpu)(packed, n, sparsity)


def _row(packed: ShflBWMatrix, n: int, sparsity: float, times: tuple[float, float, str], roof: tuple[float, str],
         error: float, limit: float) -> BenchRow:  # fmt: skip
    sparse_us, dense_us, dense_what = times
    return BenchRow(
        *packed.shape, n, sparsity, packed.v, packed.dtype, sparse_us, dense_us, dense_what, dense_us / sparse_us,
        *roof, 100 * roof[0] / sparse_us, error, error <= limit,
    )  # fmt: skip


def _on_gpu(packed: ShflBWMatrix, n: int, sparsity: float) -> BenchRow:
    from .kernels.select import roof_us
    from .kernels.spmm_plan import problem_of
    from .nn.product import product_times

    found = product_times(packed, n)
    roof = roof_us(problem_of(packed, n), find_cuda().devices[0].multiprocessors)
    times = (found.sparse_us, found.dense_us, f"torch {found.dense_what}")
    return _row(packed, n, sparsity, times, roof, found.error, ERROR_LIMIT["cuda"])


def _on_cpu(packed: ShflBWMatrix, n: int, sparsity: float) -> BenchRow:
    """The roof of the CPU: the kept weights at the rate that the dense library reaches on this product."""
    from threadpoolctl import threadpool_limits

    m, k = packed.shape
    rng = np.random.default_rng(1)
    x = rng.standard_normal((k, n), dtype=np.float32)
    w = packed.to_dense()
    out, dense_out = np.full((m, n), np.nan, np.float32), np.empty((m, n), np.float32)
    exact = w.astype(np.float64) @ x.astype(np.float64)
    error = float(np.linalg.norm(matmul(packed, x, out=out) - exact) / max(np.linalg.norm(exact), 1e-30))
    dense = {"NumPy": _least_us(lambda: np.matmul(w, x, out=dense_out))}
    with threadpool_limits(1, "blas"):  # a BLAS whose threads wait for a busy core is no fair baseline
        dense["NumPy, one thread"] = _least_us(lambda: np.matmul(w, x, out=dense_out))
    sparse_us = _least_us(lambda: matmul(packed, x, out=out))
    best = min(dense, key=lambda name: dense[name])
    roof = (dense[best] * packed.density, "the dense library's rate on the kept weights")
    return _row(packed, n, sparsity, (sparse_us, dense[best], best), roof, error, ERROR_LIMIT["cpu"])


def _least_us(call: Callable[[], Any]) -> float:
    """Least microseconds of a call, in a block of its own behind a pause."""
    time.sleep(PAUSE_S)
    call()
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds) * 1e6
