"""What the GPU tests share: packed matrices with odd groups, references on the device in float64, batched verdicts."""

from __future__ import annotations

import functools
import multiprocessing
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from shflnb.arrays import DTYPES
from shflnb.formats import ShflBWMatrix
from shflnb.kernels.config import Config
from shflnb.kernels.select import candidates

DTYPE_NAMES = ("float16", "bfloat16")
ACTIVATION_OF = {"plain": None, "identity": None, "relu": "relu", "gelu": "gelu", "silu": "silu"}
UNIT = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
TINY = {"float16": 2.0**-24, "bfloat16": 2.0**-133}
FLOAT32_EPS = 2.0**-23


# --- matrices --------------------------------------------------------------------------------------------------------
def random_lengths(rng: np.random.Generator, groups: int, k: int) -> list[int]:
    """Kept columns per group: anything from none to all, with some of both."""
    lengths = rng.integers(0, k + 1, groups)
    lengths[rng.random(groups) < 0.15] = 0
    lengths[rng.random(groups) < 0.1] = k
    return [int(length) for length in lengths]


def random_packed(
    m: int, k: int, v: int, lengths: Sequence[int] | None = None, dtype: str = "float16", seed: int = 0, *,
    integers: bool = False,
) -> ShflBWMatrix:  # fmt: skip
    """A packed matrix with shuffled rows and these kept columns per group; about one stored value in 20 is zero."""
    rng = np.random.default_rng(seed)
    groups = -(-m // v)
    lengths = random_lengths(rng, groups, k) if lengths is None else lengths
    indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    kept = [np.sort(rng.choice(k, length, replace=False)) for length in lengths]
    indices = np.concatenate([*kept, np.zeros(0, np.int64)]).astype(np.int32)
    shape = (int(indptr[-1]), v)
    values = rng.integers(-2, 3, shape).astype(np.float32) if integers else rng.standard_normal(shape, np.float32)
    values[rng.random(shape) < 0.05] = 0
    if groups and m % v:
        values[indptr[-2] :, m % v :] = 0
    return ShflBWMatrix(
        (m, k), (v, 64), indptr, indices, values.astype(DTYPES[dtype]), rng.permutation(m).astype(np.int32)
    )


def equal_packed(m: int, k: int, v: int, kept: int, dtype: str = "float16", seed: int = 0) -> ShflBWMatrix:
    """A packed matrix whose groups all keep `kept` columns."""
    return random_packed(m, k, v, [kept] * -(-m // v), dtype, seed)


def dense_of(packed: ShflBWMatrix, what: str = "weights") -> Any:
    """The matrix on the GPU, dense, made from the fields by definition; what="kept" gives 1.0 where a place is kept."""
    import torch

    m, k = packed.shape
    v = packed.block[0]
    group = np.repeat(np.arange(packed.groups), np.diff(packed.indptr))
    place = group[:, None] * v + np.arange(v)
    real = place < m
    rows = torch.from_numpy(packed.row_perm[np.where(real, place, 0)][real].astype(np.int64)).cuda()
    columns = torch.from_numpy(np.broadcast_to(packed.indices[:, None], place.shape)[real].astype(np.int64)).cuda()
    if what == "kept":
        dense = torch.zeros(m, k, dtype=torch.float32, device="cuda")
        dense[rows, columns] = 1.0
        return dense
    dense = torch.zeros(m, k, dtype=getattr(torch, packed.dtype), device="cuda")
    values = torch.from_numpy(packed.values[real].view(np.int16)).cuda().view(dense.dtype)
    dense[rows, columns] = values
    return dense


# --- references and verdicts -----------------------------------------------------------------------------------------
def activate(y: Any, activation: str | None) -> Any:
    import torch

    if activation == "gelu":
        return y * 0.5 * torch.special.erfc(-y / 2**0.5)
    return {None: lambda a: a, "relu": torch.relu, "silu": torch.nn.functional.silu}[activation](y)


@dataclass(frozen=True)
class Expected:
    """The exact product, the dense product of the same dtypes, and the bound of each output."""

    reference: Any
    dense: Any
    bound: Any
    scale: Any


def expected(dense_w: Any, x: Any, bias: Any = None, activation: str | None = None, residual: Any = None) -> Expected:
    """`activation(W @ x + bias) + residual` on the GPU, in float64 and as the dense road rounds it."""
    import torch

    w64, x64, dtype = dense_w.double(), x.double(), str(x.dtype)[6:]
    exact, rough, scale = w64 @ x64, dense_w.float() @ x.float(), w64.abs() @ x64.abs()
    if bias is not None:
        exact, rough = exact + bias.double()[:, None], rough + bias.float()[:, None]
        scale = scale + bias.double().abs()[:, None]
    exact, rough = activate(exact, activation), activate(rough, activation).to(x.dtype)
    size = exact.abs()
    if residual is not None:
        exact, rough = exact + residual.double(), rough + residual
        size = exact.abs() + residual.double().abs()
    terms = max(1.0, float(torch.count_nonzero(dense_w, 1).max()) if dense_w.numel() else 1.0) ** 0.5
    # the activations are good to 1e-6 of their argument's size: below a rounding to 16 bits, but not in tails
    tail = 1e-6 * (1.0 + size) if activation in ("gelu", "silu") else 0.0
    bound = 2 * (UNIT[dtype] * size + terms * FLOAT32_EPS / 2 * scale + TINY[dtype] + tail)
    return Expected(exact, rough.double(), bound, scale)


@dataclass
class Verdicts:
    """Checks that are queued on the GPU and read all at once: one synchronisation for thousands of products."""

    names: list[str] = field(default_factory=list)
    rows: list[Any] = field(default_factory=list)

    def add(self, name: str, y: Any, want: Expected, columns: int | None = None, intact: Any = None) -> None:
        """Promise 2 for y: at most twice the dense error, every output within its bound, and `intact` true."""
        import torch

        pick = slice(None, columns)
        reference, dense = want.reference[:, pick], want.dense[:, pick]
        error = y.double() - reference
        luck = 2 * FLOAT32_EPS * torch.linalg.norm(want.scale[:, pick]) / max(1, reference.numel()) ** 0.5
        row = torch.stack([
            torch.linalg.norm(error),
            2 * torch.linalg.norm(dense - reference) + luck + 1e-30,
            torch.nan_to_num(error.abs() / want.bound[:, pick], nan=float("inf")).amax(),
            torch.ones((), dtype=torch.float64, device="cuda") if intact is None else intact.double(),
        ])  # fmt: skip
        self.names.append(name)
        self.rows.append(row)

    def same(self, name: str, good: Any) -> None:
        """A condition that is a boolean on the GPU."""
        import torch

        zero = torch.zeros((), dtype=torch.float64, device="cuda")
        self.names.append(name)
        self.rows.append(torch.stack([zero, zero, zero, good.double()]))

    def failures(self) -> list[str]:
        """What did not hold, in words."""
        import torch

        if not self.rows:
            return []
        table = torch.stack(self.rows).cpu().numpy()
        bad = ~(table[:, 0] <= table[:, 1]) | ~(table[:, 2] <= 1.0) | (table[:, 3] != 1.0)
        return [
            f"{self.names[i]}: error {table[i, 0]:.3g} (allowed {table[i, 1]:.3g}), worst output {table[i, 2]:.3g} of "
            f"its bound, memory and bits {'right' if table[i, 3] == 1 else 'WRONG'}"
            for i in np.flatnonzero(bad)
        ]

    def check(self) -> None:
        found = self.failures()
        assert not found, f"{len(found)} of {len(self.names)} failed:\n" + "\n".join(found[:20])


# --- guarded memory --------------------------------------------------------------------------------------------------
GUARD = 8  # rows before and behind
MARK = 0x7FC5  # a NaN of both dtypes, told from the NaN of arithmetic by its payload


class Guarded:
    """An (m, n) matrix inside a larger allocation whose every other value is a mark: a stray store shows."""

    def __init__(self, m: int, n: int, dtype: str, *, ld: int | None = None, shift: int = 0) -> None:
        import torch

        self.ld = -(-(n + 8) // 8) * 8 if ld is None else ld
        self.memory = torch.full(((m + 2 * GUARD) * self.ld + 8,), MARK, dtype=torch.int16, device="cuda")
        inner = self.memory[GUARD * self.ld + shift :][: m * self.ld].view(m, self.ld)
        self.matrix = inner[:, :n].view(getattr(torch, dtype))

    def intact(self) -> Any:
        """A boolean on the GPU: nothing outside the matrix was written, all inside was. Marks the inside again."""
        import torch

        inside = self.matrix.view(torch.int16)
        written = (inside != MARK).all()
        inside.fill_(MARK)
        return written & (self.memory == MARK).all()


# --- configs ---------------------------------------------------------------------------------------------------------
def capability() -> tuple[int, int]:
    import torch

    return tuple(torch.cuda.get_device_capability())


def configs(dtype: str = "float16", v: int | None = None) -> list[Config]:
    """Every config that this device can run: both kernels on an H200."""
    return [c for each in ((16, 32, 64, 128) if v is None else (v,)) for c in candidates(each, dtype, capability())]


def _build(job: tuple[Any, tuple[int, int]]) -> str | None:
    from shflnb.errors import ShflnbError
    from shflnb.kernels import compiler, skinny_plan, spmm_plan

    config, device = job
    spec = (spmm_plan if isinstance(config, Config) else skinny_plan).kernel_spec(config)
    try:
        spec.build(compiler.arch_of(device, spec.family))
    except ShflnbError as error:
        return f"{spec.name}: {error}"
    return None


def prebuild(wanted: Iterable[Any]) -> None:
    """Fill the disk cache, on all cores; the tests then only load."""
    jobs = [(config, capability()) for config in dict.fromkeys(wanted)]
    workers = max(1, min(len(os.sched_getaffinity(0)) - 1, len(jobs)))
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        problems = [text for text in pool.map(_build, jobs) if text]
    assert not problems, problems


@functools.cache
def error_cases(v: int) -> tuple[tuple[int, int], ...]:
    """Matrix sizes around everything a kernel cuts by: 1..3, tiles and groups +-1, primes, layers."""
    return (
        (1, 1), (2, 3), (3, 2), (v - 1, 31), (v, 32), (v + 1, 33), (2 * v - 1, 63), (2 * v, 64), (2 * v + 1, 65),
        (97, 127), (251, 129), (3 * v + 5, 211), (384, 768), (1021, 509), (1024, 1024),
    )  # fmt: skip


@functools.cache
def widths(tile_n: int) -> tuple[int, ...]:
    """Numbers of columns: 1..3, around 8 and the tile, primes, layers."""
    return (1, 2, 3, 7, 8, 9, 31, tile_n - 1, tile_n, tile_n + 1, 2 * tile_n + 1, 97, 499, 960)
