"""Sparse times dense on the CPU: `out[row_perm] = act(packed_rows @ x + bias) + residual`, two kernels, one arithmetic.

    feature kernel (n contiguous)                        token kernel (k contiguous, or n small)

          x slab (k, width), copied once                       x slab (width, k), copied once
          ┌───────────────────┐                                ┌───────────────┐
    idx ─▶│ row of one column │ = vectors                idx ─▶│ . x[t, idx] . │ = numbers, broadcast
          └───────────────────┘                                └───────────────┘
    values[j, r] broadcast, r = 0 .. v                   values[j, 0:v] = vectors, streamed once

A *slab* is a block of columns of x, copied to the thread's workspace as float32 (float64). For each group and slab the
kept columns are taken `CHUNK` at a time: while the chunk's slab rows and weights are in the first-level cache, register
tiles (`cpu_simd.make_tile`) add their product to the group's accumulators (v x width), which the epilogue then sends to
the rows `row_perm[g*v:(g+1)*v]`. Only rows of x named by `indices` are ever multiplied.

Each number of the result is a sum of chunk sums, both taken in the order of the columns. So its bits depend neither on
the kernel, nor on the slab width, nor on which thread did it, nor on the other columns of x.

No BLAS: a tile reaches 110 GFLOP/s on one Zen 4 core where OpenBLAS sgemm reaches 102 (2026-11), it reads the packed
weights as they are, and there is no thread setting of a library to change and restore.

Workspace: per thread one slab of at most `SLAB_BYTES`, or of one register panel (192 bytes times k with AVX-512) where
that is more, two chunks of weights and the accumulators (together under 1 MiB).
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numba
import numpy as np
from numba import njit, types

from ..errors import ArgumentError
from . import cpu_pool
from .cpu_cache import attach
from .cpu_math import ACTIVATION_CODES, FLOAT16
from .cpu_runs import make_runs
from .cpu_simd import Machine, fetch_add, machine, make_tile

__all__ = ["CHUNK", "SLAB_BYTES", "Config", "choose", "spmm"]

CHUNK = 64
"""Kept columns per chunk. Short chains of additions keep the rounding error next to a blocked dense product's."""
SLAB_BYTES = 4 << 20
"""Largest slab of x in a thread's workspace, unless one register panel of all k rows is larger."""
TOKENS = 48
"""Most columns of x in a slab of the token kernel."""
PANELS = 4
"""Most register panels in a slab of the feature kernel: rows of 768 bytes are gathered and stored at memory speed."""
PAD = 16
"""Numbers between the tokens of a slab beyond k: a power of two as distance would crowd them into a few cache sets."""
SPAN_WORK = 1 << 21
"""Multiply-adds that are worth a thread of their own: about 40 microseconds, against 15 to wake a worker."""

_FAST = {"error_model": "numpy", "nogil": True}


@dataclass(frozen=True)
class Config:
    """How a product is answered: which kernel, and the shape of its register tile.

    `scalars` rows by `vectors` vectors of columns in the feature kernel, `scalars` tokens by `vectors` vectors of rows
    in the token kernel. `storage` is "float32", "float64" or "half" (float16 and bfloat16, accumulated in float32).
    """

    kernel: str
    storage: str
    vectors: int
    scalars: int
    vector_bytes: int

    @property
    def accumulate(self) -> str:
        """The dtype of slab, tile and epilogue."""
        return "float64" if self.storage == "float64" else "float32"

    @property
    def lanes(self) -> int:
        """Numbers in a vector."""
        return self.vector_bytes // (8 if self.storage == "float64" else 4)

    @property
    def name(self) -> str:
        """The kernel's name in a profile and in the disk cache."""
        return f"spmm_{self.kernel}_{self.storage}_{self.vectors}x{self.scalars}_{8 * self.vector_bytes}"


@functools.cache
def choose(storage: str, v: int, n: int, feature_major: bool, unit: Machine) -> Config:
    """The config for a product: the feature kernel from one full vector of columns on, if the result is feature-major.

    24 accumulators out of 32 registers, or 12 out of 16, leave room for the operands of the next step.
    """
    lanes = unit.lanes(8 if storage == "float64" else 4)
    sums = 24 if unit.registers == 32 else 12
    if feature_major and n >= lanes:
        return Config("feature", storage, 3, sums // 3, unit.vector_bytes)
    vectors = min(v // lanes, 4 if unit.registers == 32 else 2)
    return Config("token", storage, vectors, min(sums // vectors, 8), unit.vector_bytes)


@njit(**_FAST)
def _first_group(indptr, position):
    """The first group g with `indptr[g] + g >= position`: a group costs its kept columns, and one for the epilogue."""
    low, high = 0, indptr.shape[0] - 1
    while low < high:
        middle = (low + high) // 2
        if indptr[middle] + middle >= position:
            high = middle
        else:
            low = middle + 1
    return low


class Side(NamedTuple):
    """What differs between the two kernels: how a slab is filled, multiplied by one chunk of a group, and finished."""

    load_slab: Any
    add_chunk: Any
    finish: Any


def _own(config: Config) -> Callable[[Callable[..., Any]], Any]:
    """`njit` under a name of the config's own.

    Numba names machine code by qualified name, argument types and a counter that starts anew in every process. Kernels
    of two configs that two processes put into the disk cache would share the names of their inner functions, and a
    third process that loads both would run one of them for either.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        function.__name__ = function.__qualname__ = f"{function.__name__}_{config.name}"
        return njit(**_FAST)(function)

    return decorate


def make_feature_side(config: Config) -> Side:
    """Slabs (k, width), vectors along n, accumulators (v, width)."""
    scalars, lanes = config.scalars, config.lanes
    tile_1, tile_2, tile_3 = (make_tile(p, scalars, config.vector_bytes, True) for p in (1, 2, 3))
    runs = make_runs(config.storage == "half")
    load_block, finish_rows = runs.load_block, runs.finish_rows

    @_own(config)
    def load_slab(slab, width, x, c0, cols, form):
        load_block(slab, width, x, 0, x.shape[0], c0, cols, form)
        for i in range(x.shape[0] if cols % lanes else 0):
            slab[i * width + cols : i * width + (cols + lanes - 1) // lanes * lanes] = 0

    @_own(config)
    def add_chunk(slab, width, x, cols, source, at, v, rows, kept, acc, fresh):
        """acc[r, c] += the chunk's product (= if fresh), panel by panel of 3, 2 or 1 vectors."""
        c = 0
        while c < cols:
            vectors = min((cols - c + lanes - 1) // lanes, 3)
            x_rows = (slab, c, width)
            for r in range(0, rows, scalars):
                weights, to = (source, at + r, v, 1), (acc, r * width + c, width)
                if vectors == 3:
                    tile_3(x_rows, weights, kept, to, fresh)
                elif vectors == 2:
                    tile_2(x_rows, weights, kept, to, fresh)
                else:
                    tile_1(x_rows, weights, kept, to, fresh)
            c += vectors * lanes

    @_own(config)
    def finish(acc, width, v, cols, places, c0, out, bias, residual, activation, form):
        finish_rows(acc, width, cols, places, c0, out, bias, residual, activation, form)

    return Side(load_slab, add_chunk, finish)


def make_token_side(config: Config) -> Side:
    """Slabs (width, k), or (k, width) where n is contiguous in x; vectors along a group's rows, acc (width, v)."""
    scalars, span = config.scalars, config.vectors * config.lanes
    tile_most, tile_4, tile_2, tile_1 = (
        make_tile(config.vectors, q, config.vector_bytes, False) for q in (scalars, 4, 2, 1)
    )
    runs = make_runs(config.storage == "half")
    load_block, finish_columns = runs.load_block, runs.finish_columns

    @_own(config)
    def slab_steps(x, cols):
        """Distances in the slab between the kept columns and between the tokens."""
        by_token = x.shape[1] == 1 or abs(x.strides[0]) <= abs(x.strides[1])
        return (1, x.shape[0] + PAD) if by_token else (cols, 1)

    @_own(config)
    def load_slab(slab, width, x, c0, cols, form):
        column_step, token_step = slab_steps(x, cols)
        if column_step == 1:
            load_block(slab, token_step, x.T, c0, cols, 0, x.shape[0], form)
        else:
            load_block(slab, column_step, x, 0, x.shape[0], c0, cols, form)

    @_own(config)
    def add_chunk(slab, width, x, cols, source, at, v, rows, kept, acc, fresh):
        """acc[t, r] += the chunk's product (= if fresh), a few tokens at a time."""
        column_step, token_step = slab_steps(x, cols)
        for r in range(0, rows, span):
            weights = (source, at + r, v)
            t = 0
            while t < cols:
                x_rows, to = (slab, t * token_step, column_step, token_step), (acc, t * v + r, v)
                if cols - t >= scalars:
                    tile_most(weights, x_rows, kept, to, fresh)
                    t += scalars
                elif cols - t >= 4:
                    tile_4(weights, x_rows, kept, to, fresh)
                    t += 4
                elif cols - t >= 2:
                    tile_2(weights, x_rows, kept, to, fresh)
                    t += 2
                else:
                    tile_1(weights, x_rows, kept, to, fresh)
                    t += 1

    @_own(config)
    def finish(acc, width, v, cols, places, c0, out, bias, residual, activation, form):
        finish_columns(acc, v, cols, places, c0, out, bias, residual, activation, form)

    return Side(load_slab, add_chunk, finish)


def make_spmm(config: Config) -> Any:
    """The kernel. Work is the list of (slab, group) pairs, slab by slab, cut into `pieces` of about equal weight."""
    load_slab, add_chunk, finish = {"feature": make_feature_side, "token": make_token_side}[config.kernel](config)
    load_weights = make_runs(config.storage == "half").load_weights

    def spmm_cpu(counters, pieces, indptr, indices, values, v, row_perm, x, out, bias, residual, activation, form,
                 width, work):  # fmt: skip
        k, n, m = x.shape[0], x.shape[1], out.shape[0]
        groups = indptr.shape[0] - 1
        a, b = (k + PAD) * width, (k + PAD) * width + CHUNK * v
        slab, weights, acc = work[:a], work[a:b], work[b : b + v * width]
        per_slab = indptr[groups] + groups
        total = per_slab * ((n + width - 1) // width)
        loaded, last = -1, False
        while True:
            piece = fetch_add(counters, 0, 1)
            if piece >= pieces:
                return last
            begin, end = piece * total // pieces, (piece + 1) * total // pieces
            for s in range(begin // per_slab, (end - 1) // per_slab + 1):
                first, after = _first_group(indptr, begin - s * per_slab), _first_group(indptr, end - s * per_slab)
                c0 = s * width
                cols = min(width, n - c0)
                if s != loaded and first < after:
                    load_slab(slab, width, x, c0, cols, form)
                    loaded = s
                for g in range(first, after):
                    rows = min(v, m - g * v)
                    if indptr[g] == indptr[g + 1]:
                        acc[:] = 0
                    for start in range(indptr[g], indptr[g + 1], CHUNK):
                        count = min(CHUNK, indptr[g + 1] - start)
                        source, at = load_weights(values, weights, start * v, count * v, form)
                        kept, fresh = (indices, start, count), start == indptr[g]
                        add_chunk(slab, width, x, cols, source, at, v, rows, kept, acc, fresh)
                    places = row_perm[g * v : g * v + rows]
                    finish(acc, width, v, cols, places, c0, out, bias, residual, activation, form)
            last = fetch_add(counters, 1, 1) == pieces - 1

    spmm_cpu.__name__ = spmm_cpu.__qualname__ = config.name
    return njit(**_FAST)(spmm_cpu)


_kernels: dict[Config, Any] = {}
_compile_lock = threading.Lock()


def compiled(config: Config) -> Any:
    """The compiled kernel of a config: from memory, from the disk cache, or from Numba (seconds, once per machine)."""
    found = _kernels.get(config)
    if found is None:
        with _compile_lock:
            found = _kernels.get(config) or _compile(config)
            _kernels[config] = found
    return found


def _compile(config: Config) -> Any:
    if numba.config.DISABLE_JIT:
        raise ArgumentError("NUMBA_DISABLE_JIT is set; the CPU kernels exist as machine code only: unset it")
    kernel = make_spmm(config)
    attach(kernel, config.name)
    stored = {"float32": types.float32, "float64": types.float64, "half": types.uint16}[config.storage]
    number = getattr(types, config.accumulate)

    def given(dtype: Any, ndim: int, layout: str = "C") -> Any:
        return types.Array(dtype, ndim, layout, readonly=True)

    i = types.int64
    kernel.compile((i[::1], i, given(i, 1), given(types.int32, 1), given(stored, 1), i, given(types.int32, 1),
                    given(stored, 2, "A"), stored[:, :], given(number, 1), given(stored, 2, "A"), i, i, i,
                    number[::1]))  # fmt: skip
    kernel.disable_compile()
    return kernel


@dataclass(frozen=True)
class _Packed:
    """A packed matrix as the kernels take it; kept in `ShflBWMatrix.launch_cache`."""

    indptr: np.ndarray
    indices: np.ndarray
    values: np.ndarray
    row_perm: np.ndarray
    v: int
    storage: str
    form: int


def _prepare(packed: Any) -> _Packed:
    half = packed.dtype in ("float16", "bfloat16")
    # arrays of a loaded file may be unaligned views of its bytes
    indptr, indices, values, row_perm = (
        np.require(a, requirements=["C", "A"]) for a in (packed.indptr, packed.indices, packed.values, packed.row_perm)
    )
    made = _Packed(indptr, indices, (values.view(np.uint16) if half else values).reshape(-1), row_perm, packed.block[0],
                   "half" if half else packed.dtype, FLOAT16 if packed.dtype == "float16" else 0)  # fmt: skip
    packed.launch_cache["cpu"] = made
    return made


def _width(config: Config, k: int, n: int) -> int:
    """Columns of x in a slab, from the bound on the workspace."""
    itemsize = 8 if config.storage == "float64" else 4
    if config.kernel == "feature":
        panel = config.vectors * config.lanes
        panels = min(max(SLAB_BYTES // max(k * panel * itemsize, 1), 1), PANELS)
        return min(panels * panel, -(-n // config.lanes) * config.lanes)
    tokens = min(max(SLAB_BYTES // ((k + PAD) * itemsize), config.scalars), TOKENS)
    return min(tokens // config.scalars * config.scalars, n)


def spmm(packed: Any, x: np.ndarray, out: np.ndarray, *, bias: np.ndarray | None = None, activation: str | None = None,
         residual: np.ndarray | None = None) -> None:  # fmt: skip
    """`out[...] = act(packed @ x + bias[:, None]) + residual` on checked arrays (see `shflnb.ops.matmul`).

    Parameters
    ----------
    packed : ShflBWMatrix
        Weights (m, k).
    x, out, residual : arrays (k, n), (m, n), (m, n)
        Any strides, the dtype of `packed`; `residual` may be `out` itself.
    bias : array (m,)
        The dtype of `packed`, or float32.
    activation : None, "relu", "gelu" or "silu"
    """
    (m, k), n = packed.shape, x.shape[1]
    if m == 0 or n == 0:
        return
    ready = packed.launch_cache.get("cpu") or _prepare(packed)
    config = choose(ready.storage, ready.v, n, n == 1 or abs(out.strides[1]) <= abs(out.strides[0]), machine())
    kernel = compiled(config)
    width = _width(config, k, n)
    slabs, groups = -(-n // width), len(ready.indptr) - 1
    work = len(ready.indices) * ready.v * n
    workers = min(cpu_pool.get_num_threads(), max(work // SPAN_WORK, 1), slabs * groups)
    pieces = 1 if workers == 1 else min(4 * workers, slabs * groups)
    size = (k + PAD) * width + (CHUNK + width) * ready.v
    half, number = ready.storage == "half", config.accumulate
    if bias is None:
        bias = _nothing(number, 1)
    elif bias.dtype != number or not (bias.flags.c_contiguous and bias.flags.aligned):
        room = cpu_pool.workspace(m, number, "bias")[:m]
        room[:] = bias
        bias = room
    if half:
        x, out = x.view(np.uint16), out.view(np.uint16)
    if residual is None:
        residual = _nothing("uint16" if half else ready.storage, 2)
    elif half:
        residual = residual.view(np.uint16)
    counters = np.zeros(2, np.int64)
    code = ACTIVATION_CODES[activation]

    def call() -> bool:
        work = cpu_pool.workspace(size, number)
        return kernel(counters, pieces, ready.indptr, ready.indices, ready.values, ready.v, ready.row_perm, x, out,
                      bias, residual, code, ready.form, width, work)  # fmt: skip

    cpu_pool.run(call, workers - 1)


@functools.cache
def _nothing(dtype: str, ndim: int) -> np.ndarray:
    return np.zeros((0,) * ndim, dtype)
