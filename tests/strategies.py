"""Matrices for all tests: plain builders from a seed, and the hypothesis strategies made of them.

The builders know the pattern from its definition only (groups of rows that share their columns); they share no code
with `shflnb.formats`. Contents come from a drawn seed, so that shrinking works on sizes, where the faults are.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from shflnb.arrays import DTYPES
from shflnb.formats import TILE_K_CHOICES, V_CHOICES, ShflBWMatrix, pack

DTYPE_NAMES = tuple(DTYPES)
HALF_NAMES = ("float16", "bfloat16")

ODD_SIZES = (1, 2, 3, 7, 15, 16, 17, 31, 33, 63, 64, 65, 97, 127, 129, 131)
"""Small sizes, primes, and one beside each height of a group."""


class Patterned(NamedTuple):
    """A dense matrix that has the pattern, and how it was made."""

    w: np.ndarray
    block: tuple[int, int]
    row_perm: np.ndarray
    columns: list[np.ndarray]


def draw_values(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, *, integers: bool = False) -> np.ndarray:
    """Non-zero values; small integers (exact in every dtype) on request."""
    if integers:
        a = rng.integers(1, 4, shape) * rng.choice([-1, 1], shape)
    else:
        a = rng.standard_normal(shape)
        a = np.where(np.abs(a) < 1e-3, 0.5, a)
    return a.astype(DTYPES[dtype])


def make_patterned(
    m: int,
    k: int,
    v: int,
    *,
    density: float = 0.25,
    dtype: str = "float32",
    seed: int = 0,
    tile_k: int = 16,
    shuffle: bool = True,
    unequal: bool = True,
    integers: bool = False,
) -> Patterned:
    """A matrix whose shuffled rows, v at a time, share their columns; every one of those places is non-zero."""
    rng = np.random.default_rng(seed)
    row_perm = rng.permutation(m) if shuffle else np.arange(m)
    w = np.zeros((m, k), dtype=DTYPES[dtype])
    columns = []
    for start in range(0, m, v):
        rows = row_perm[start : start + v]
        share = min(1.0, density * (rng.uniform(0.2, 1.8) if unequal else 1.0))
        kept = np.sort(rng.choice(k, size=round(share * k), replace=False)) if k else np.zeros(0, dtype=np.int64)
        w[np.ix_(rows, kept)] = draw_values(rng, (len(rows), len(kept)), dtype, integers=integers)
        columns.append(kept)
    return Patterned(w, (v, tile_k), row_perm.astype(np.int32), columns)


def make_scattered(m: int, k: int, *, density: float, dtype: str = "float32", seed: int = 0) -> np.ndarray:
    """A matrix with non-zeros anywhere."""
    rng = np.random.default_rng(seed)
    return np.where(rng.random((m, k)) < density, draw_values(rng, (m, k), dtype), DTYPES[dtype].type(0))


def blocks() -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.sampled_from(V_CHOICES), st.sampled_from(TILE_K_CHOICES))


def sizes(largest: int = 150) -> st.SearchStrategy[int]:
    """0 and 1 often, odd sizes often, anything up to `largest` else."""
    odd = [size for size in (0, *ODD_SIZES) if size <= largest]
    return st.one_of(st.sampled_from(odd), st.integers(0, largest))


seeds = st.integers(0, 2**32 - 1)
densities = st.sampled_from((0.0, 0.02, 0.1, 0.25, 0.5, 0.9, 1.0))


@st.composite
def patterned_matrices(
    draw: st.DrawFn, dtypes: tuple[str, ...] = DTYPE_NAMES, largest: int = 150, integers: bool = False
) -> Patterned:
    v, tile_k = draw(blocks())
    return make_patterned(
        draw(sizes(largest)),
        draw(sizes(largest)),
        v,
        density=draw(densities),
        dtype=draw(st.sampled_from(dtypes)),
        seed=draw(seeds),
        tile_k=tile_k,
        shuffle=draw(st.booleans()),
        unequal=draw(st.booleans()),
        integers=integers,
    )


@st.composite
def scattered_matrices(draw: st.DrawFn, dtypes: tuple[str, ...] = DTYPE_NAMES, largest: int = 150) -> np.ndarray:
    return make_scattered(
        draw(sizes(largest)),
        draw(sizes(largest)),
        density=draw(densities),
        dtype=draw(st.sampled_from(dtypes)),
        seed=draw(seeds),
    )


@st.composite
def packed_matrices(
    draw: st.DrawFn, dtypes: tuple[str, ...] = DTYPE_NAMES, largest: int = 150, integers: bool = False
) -> ShflBWMatrix:
    """Packed matrices, patterned ones and such with stored zeros."""
    if draw(st.booleans()) or integers:
        made = draw(patterned_matrices(dtypes, largest, integers))
        return pack(made.w, made.block, fill_in_warning=None)
    return pack(draw(scattered_matrices(dtypes, largest)), draw(blocks()), fill_in_warning=None)


def make_activations(k: int, n: int, dtype: str, seed: int = 0, *, integers: bool = False) -> np.ndarray:
    """A feature-major activation (k, n)."""
    return draw_values(np.random.default_rng(seed), (k, n), dtype, integers=integers)
