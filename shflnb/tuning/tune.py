"""`tune`: measure every candidate config on the device, each checked before it is timed, and remember the fastest.

Choosing needs no tuning: without it the committed table or the rule of `kernels/select.py` decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..arrays import DTYPES
from ..errors import ArgumentError, DeviceError, DtypeError
from ..formats.shflbw import ShflBWMatrix
from ..kernels.config import Config, Problem
from ..kernels.select import candidates, choose, roof_us, table_key
from ..machine import find_cuda

__all__ = ["Measured", "TuneReport", "Tuned", "forget_device", "measure_candidates", "tune"]

KEEP_RULE = 1.01
"""The config that would run anyway stays unless another is this much faster: repeats differ by as much."""
SAMPLE = 64
"""Rows and columns of the result that are compared with the definition in float64."""


@dataclass(frozen=True)
class Measured:
    """One config's device time in microseconds, and the largest error of its sampled outputs over their bound."""

    config: Config
    us: float
    worst: float


@dataclass(frozen=True)
class Tuned:
    """What was found for one n."""

    problem: Problem
    key: str
    before: Config
    """What ran until now."""
    measured: tuple[Measured, ...]
    """All candidates that were right, fastest first."""
    rejected: tuple[str, ...]
    """Candidates that could not run or were wrong, with the reason."""
    best: Measured
    roof_us: float

    @property
    def before_us(self) -> float:
        """Time of what ran until now; NaN when it is no candidate any more."""
        return next((m.us for m in self.measured if m.config == self.before), float("nan"))


@dataclass(frozen=True)
class TuneReport:
    """The result of `tune`; printable, and `as_dict` holds plain types."""

    device: str
    results: tuple[Tuned, ...]
    is_on_disk: bool
    """Whether later processes will find it too."""

    def as_dict(self) -> dict[str, Any]:
        """Everything as types that `json.dumps` takes."""
        return {
            "device": self.device,
            "remembered_on_disk": self.is_on_disk,
            "results": [
                {
                    "n": t.problem.n,
                    "before": t.before.name,
                    "before_us": None if np.isnan(t.before_us) else round(t.before_us, 2),
                    "best": t.best.config.name,
                    "best_us": round(t.best.us, 2),
                    "roof_us": round(t.roof_us, 2),
                    "measured": [{"config": m.config.name, "us": round(m.us, 2)} for m in t.measured],
                    "rejected": list(t.rejected),
                }
                for t in self.results
            ],
        }

    def __str__(self) -> str:
        lines = [
            f"tuned on {self.device}"
            + ("" if self.is_on_disk else " (for this process only: the cache cannot be written)")
        ]
        for t in self.results:
            gain = "kept" if t.best.config == t.before else f"{t.before_us / t.best.us:.2f}x over {t.before.name}"
            lines.append(
                f"  n = {t.problem.n}: {t.best.config.name}, {t.best.us:.1f} us ({gain}; roof {t.roof_us:.1f} us)"
            )
            lines += [f"    {m.us:9.1f} us  {m.config.name}" for m in t.measured]
            lines += [f"    left out     {text}" for text in t.rejected]
        return "\n".join(lines)


def tune(
    packed: ShflBWMatrix,
    n: int | Iterable[int],
    *,
    device: int = 0,
    remember: bool = True,
    progress: Callable[[str], None] | None = None,
) -> TuneReport:
    """Measure the candidate kernels for `packed` times n columns and use the fastest from now on.

    Every candidate's result is compared with the product by definition before it is timed; one that is wrong is left
    out and named in the report. Times are medians over replays of a CUDA graph, on a stream of its own.

    Parameters
    ----------
    packed : ShflBWMatrix of float16 or bfloat16
    n : int or several
        Columns of x (tokens). What is found for n serves all n up to the next power of two.
    device : int
        CUDA device.
    remember : bool
        Also keep it for later processes, and for other matrices of this shape and density: in the user's cache
        directory, or `$SHFLNB_CACHE_DIR`.
    progress : callable, optional
        Called with a line of text for each config.

    Returns
    -------
    TuneReport
        Printable; `results[i].measured` has all times.

    Raises
    ------
    ArgumentError, DtypeError
        For n below 1, weights that are not finite, or a dtype without GPU kernels.
    DeviceError
        Without a CUDA GPU, or when no candidate gave the right result.

    Examples
    --------
    >>> import numpy as np, shflnb
    >>> packed = shflnb.pack(np.eye(64, dtype=np.float16), row_perm=np.arange(64), fill_in_warning=None)
    >>> report = shflnb.tune(packed, n=[256, 4096])  # doctest: +SKIP
    >>> print(report)  # doctest: +SKIP
    """
    widths = _widths(n)
    if packed.dtype not in ("float16", "bfloat16"):
        raise DtypeError(
            f"packed is {packed.dtype}; the GPU kernels take float16 and bfloat16 (packed.astype('float16'))"
        )
    if 0 in packed.shape:
        raise ArgumentError(f"packed has shape {packed.shape}; there is nothing to measure")
    if not np.isfinite(packed.values.astype(np.float32)).all():
        raise ArgumentError(
            "packed holds NaN or Inf, with which no result can be checked; tune a matrix of finite weights"
        )
    _device_name(device)
    from ..kernels import remembered
    from ..kernels.launch import device_context

    context = device_context(device)
    results = tuple(measure_candidates(packed, width, context, progress) for width in widths)
    entries = {t.key: remembered.entry_of(t.best.config) for t in results}
    packed.launch_cache["tuned"] = {**packed.launch_cache.get("tuned", {}), **entries}
    for old in [key for key in packed.launch_cache if key[0] in ("plan", "memo")]:
        packed.launch_cache.pop(old, None)
    is_on_disk = remember and remembered.store(context.name, entries)
    return TuneReport(context.name, results, is_on_disk)


def _device_name(device: int) -> str:
    found = find_cuda()
    if found.problem is not None:
        raise DeviceError(
            f"tune measures on a CUDA GPU; found: {found.problem}; shflnb.explain says what would run on one"
        )
    if not 0 <= device < len(found.devices):
        raise DeviceError(f"device is {device}; this machine has {len(found.devices)} CUDA devices")
    return found.devices[device].name


def forget_device(device: int = 0) -> None:
    """Drop what `tune` remembers of a CUDA device in the user's cache; packed matrices in use keep their kernels."""
    from ..kernels import remembered

    remembered.forget(_device_name(device))


def _widths(n: int | Iterable[int]) -> list[int]:
    given: Sequence[Any] = [n] if isinstance(n, (int, np.integer)) else list(n)
    if not given or not all(isinstance(width, (int, np.integer)) and 1 <= width < 2**31 for width in given):
        raise ArgumentError(f"n is {n!r}; expected a number of columns from 1 on, or several of them")
    return list(dict.fromkeys(int(width) for width in given))


def measure_candidates(
    packed: ShflBWMatrix,
    n: int,
    context: Any,
    progress: Callable[[str], None] | None = None,
    configs: Sequence[Config] | None = None,
) -> Tuned:
    """Check and time the candidates (or `configs`) for one n on a device."""
    from ..kernels import remembered
    from ..kernels.spmm_device import device_matmul
    from ..kernels.spmm_plan import problem_of
    from ..kernels.timing import Bench

    problem = problem_of(packed, n)
    table = {**remembered.load(context.name), **packed.launch_cache.get("tuned", {})}
    before = choose(problem, context.capability, context.sm_count, context.name, table).config
    pool = list(configs) if configs is not None else candidates(problem.v, problem.dtype, context.capability)
    measured, rejected = [], []
    check = _Check(packed, n)
    with Bench(context) as bench:
        x = bench.matrix(check.x, packed.dtype)
        out = bench.matrix(np.zeros((packed.shape[0], n), DTYPES[packed.dtype]), packed.dtype)
        for config in dict.fromkeys([*pool, before]):
            bench.poison(out)
            try:
                device_matmul(packed, x, out=out, config=config)
                worst = check.worst(bench.fetch(out, DTYPES[packed.dtype]))
                if not worst <= 1.0:
                    rejected.append(f"{config.name}: wrong by {worst:.3g} of the bound")
                    continue
                us = bench.median_us(lambda config=config: device_matmul(packed, x, out=out, config=config))  # type: ignore[misc]
            except DeviceError as error:
                rejected.append(f"{config.name}: {error}")
                continue
            measured.append(Measured(config, us, worst))
            if progress is not None:
                progress(f"n = {n}: {config.name} {us:.1f} us")
    if not measured:
        raise DeviceError(
            f"no candidate ran right for n = {n}: {'; '.join(rejected)}; please report this with `shflnb doctor`"
        )
    measured.sort(key=lambda m: m.us)
    best = next((m for m in measured if m.config == before and m.us <= KEEP_RULE * measured[0].us), measured[0])
    roof, _ = roof_us(problem, context.sm_count)
    return Tuned(problem, table_key(problem), before, tuple(measured), tuple(rejected), best, roof)


class _Check:
    """Random activations, and the product by definition at some rows and columns."""

    def __init__(self, packed: ShflBWMatrix, n: int) -> None:
        m, k = packed.shape
        rng = np.random.default_rng(0)
        largest = float(np.abs(packed.values.astype(np.float32)).max(initial=0.0))
        terms = max(1, int(packed.counts.max(initial=0)))
        scale = min(1.0, 100.0 / max(1e-30, largest * terms**0.5))  # far from overflow in float16
        numbers = (rng.standard_normal(min(k * n, 1 << 20), np.float32) * scale).astype(DTYPES[packed.dtype])
        self.x = np.resize(numbers, (k, n))
        self.rows = np.sort(rng.choice(m, min(m, SAMPLE), replace=False))
        self.columns = np.unique(np.concatenate([rng.integers(0, n, SAMPLE), [0, n - 1]]))
        part = self.x[:, self.columns].astype(np.float64)
        place = np.argsort(packed.row_perm)
        self.want = np.zeros((len(self.rows), len(self.columns)))
        size = np.zeros_like(self.want)
        for i, row in enumerate(self.rows):
            g, r = divmod(int(place[row]), packed.v)
            kept = slice(packed.indptr[g], packed.indptr[g + 1])
            weights = packed.values[kept, r].astype(np.float64)
            self.want[i] = weights @ part[packed.indices[kept]]
            size[i] = np.abs(weights) @ np.abs(part[packed.indices[kept]])
        unit = {"float16": 2.0**-11, "bfloat16": 2.0**-8}[packed.dtype]
        self.bound = 2 * (unit * np.abs(self.want) + terms**0.5 * 2.0**-24 * size + 2.0**-24)

    def worst(self, y: np.ndarray) -> float:
        """The largest error of the sampled outputs in units of its bound; infinite when any output is not finite."""
        if not np.isfinite(y.astype(np.float32)).all():
            return float("inf")
        error = np.abs(y[np.ix_(self.rows, self.columns)].astype(np.float64) - self.want)
        return float((error / self.bound).max(initial=0.0))
