"""`tune`: measure every candidate config on the device, each checked before it is timed, and remember the fastest.

Choosing needs no tuning: without it the committed table or the rule of `kernels/select.py` decides, for few columns on
Hopper that of `kernels/skinny_select.py`.
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
from ..kernels.select import candidates, choose, has_few_columns, roof_us, table_key
from ..kernels.skinny_config import TILE_K, SkinnyConfig, memory_us
from ..kernels.skinny_select import LAYOUTS, few_candidates, few_key
from ..machine import find_cuda

__all__ = ["Measured", "TuneReport", "Tuned", "forget_device", "measure_candidates", "measure_few", "tune"]

KEEP_RULE = 1.01
"""The config that would run anyway stays unless another is this much faster: repeats differ by as much."""
MOST_COPIES = 24
"""Copies of the weights at most that few columns are measured with."""
SAMPLE = 64
"""Rows and columns of the result that are compared with the definition in float64."""


@dataclass(frozen=True)
class Measured:
    """One config's device time in microseconds, and the largest error of its sampled outputs over their bound."""

    config: Config | SkinnyConfig
    us: float
    worst: float


@dataclass(frozen=True)
class Tuned:
    """What was found for one n; for few columns, for one layout of x as well."""

    problem: Problem
    key: str
    before: Config | SkinnyConfig
    """What ran until now."""
    measured: tuple[Measured, ...]
    """All candidates that were right, fastest first."""
    rejected: tuple[str, ...]
    """Candidates that could not run or were wrong, with the reason."""
    best: Measured
    roof_us: float
    layout: str = ""
    """Of x and the result: "feature" or "token"; empty where it makes no difference to the kernel."""

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
                    "layout": t.layout or None,
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
                f"  n = {t.problem.n}{_of_x(t.layout)}: {t.best.config.name}, {t.best.us:.1f} us ({gain}; "
                f"roof {t.roof_us:.1f} us)"
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
    out and named in the report. Times are medians over replays of a CUDA graph, on a stream of its own. Few columns on
    Hopper are measured twice, with feature-major and with token-major x, and with copies of the weights that exceed L2
    twice, since there the weights come from device memory.

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
        Printable; `results[i].measured` has all times. One result for each n, two for few columns on Hopper.

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
    from ..kernels.spmm_plan import drop_plans

    context = device_context(device)
    results: list[Tuned] = []
    for width in widths:
        if has_few_columns(width, context.capability):
            results += measure_few(packed, width, context, progress)
        else:
            results.append(measure_candidates(packed, width, context, progress))
    entries = {t.key: remembered.entry_of(t.best.config) for t in results}
    packed.launch_cache["tuned"] = {**packed.launch_cache.get("tuned", {}), **entries}
    drop_plans(packed)
    is_on_disk = remember and remembered.store(context.name, entries)
    return TuneReport(context.name, tuple(results), is_on_disk)


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
    from ..kernels.spmm_device import device_matmul
    from ..kernels.spmm_plan import problem_of, tuned_entries
    from ..kernels.timing import Bench

    problem = problem_of(packed, n)
    known = tuned_entries(packed, context.name)
    before = choose(problem, context.capability, context.sm_count, context.name, known).config
    pool = list(configs) if configs is not None else candidates(problem.v, problem.dtype, context.capability)
    check = _Check(packed, n)
    with Bench(context) as bench:
        x = bench.matrix(check.x, packed.dtype)
        out = bench.matrix(np.zeros((packed.shape[0], n), DTYPES[packed.dtype]), packed.dtype)
        found = _Found(bench, check, out, n, "", progress)
        for config in dict.fromkeys([*pool, before]):
            found.add(config, [lambda config=config: device_matmul(packed, x, out=out, config=config)])  # type: ignore[misc]
    roof, _ = roof_us(problem, context.sm_count)
    return found.judged(problem, table_key(problem), before, roof)


def measure_few(
    packed: ShflBWMatrix, n: int, context: Any, progress: Callable[[str], None] | None = None
) -> list[Tuned]:
    """Check and time the few-column kernels for one n on a device, for either layout of x and the result."""
    from ..kernels.skinny_plan import chosen_config
    from ..kernels.spmm_device import device_linear, device_matmul
    from ..kernels.spmm_plan import problem_of, weight_copies
    from ..kernels.timing import Bench

    problem, m, dtype = problem_of(packed, n), packed.shape[0], packed.dtype
    check = _Check(packed, n)
    sets = min(MOST_COPIES, max(2, -(-2 * context.l2_bytes // max(1, packed.values.nbytes))))
    copies = weight_copies(packed, context, "sm90", TILE_K, sets)
    results = []

    def calls_of(config: SkinnyConfig, x: Any, out: Any, layout: str) -> list[Callable[[], Any]]:
        if layout == "token":
            return [lambda one=one: device_linear(x, one, out=out, config=config) for one in copies]  # type: ignore[misc]
        return [lambda one=one: device_matmul(one, x, out=out, config=config) for one in copies]  # type: ignore[misc]

    with Bench(context) as bench:
        for layout in LAYOUTS:
            is_token = layout == "token"
            x = bench.matrix(np.ascontiguousarray(check.x.T) if is_token else check.x, dtype)
            out = bench.matrix(np.zeros((n, m) if is_token else (m, n), DTYPES[dtype]), dtype)
            before = chosen_config(packed, context, n, layout, bench.stream)
            found = _Found(bench, check, out, n, layout, progress)
            for config in dict.fromkeys([*few_candidates(problem.v, n, dtype, layout), before]):
                found.add(config, calls_of(config, x, out, layout))
            roof = memory_us(packed.values.nbytes, context.sm_count)
            results.append(found.judged(problem, few_key(problem, layout), before, roof))
    return results


class _Found:
    """The candidates of one n and layout: those that were right, with their times, and the others, with the reason."""

    def __init__(
        self, bench: Any, check: _Check, out: Any, n: int, layout: str, progress: Callable[[str], None] | None
    ) -> None:
        self.bench, self.check, self.out, self.n, self.layout = bench, check, out, n, layout
        self.progress = progress
        self.measured: list[Measured] = []
        self.rejected: list[str] = []

    def add(self, config: Config | SkinnyConfig, calls: Sequence[Callable[[], Any]]) -> None:
        """Check what a config's first call leaves in `out` and, if it is right, time all calls in turns."""
        self.bench.poison(self.out)
        try:
            calls[0]()
            y = self.bench.fetch(self.out, DTYPES[self.out.dtype])
            worst = self.check.worst(y.T if self.layout == "token" else y)
            if not worst <= 1.0:
                self.rejected.append(f"{config.name}: wrong by {worst:.3g} of the bound")
                return
            us = self.bench.median_us(calls)
        except DeviceError as error:
            self.rejected.append(f"{config.name}: {error}")
            return
        self.measured.append(Measured(config, us, worst))
        if self.progress is not None:
            self.progress(f"n = {self.n}{_of_x(self.layout)}: {config.name} {us:.1f} us")

    def judged(self, problem: Problem, key: str, before: Config | SkinnyConfig, roof: float) -> Tuned:
        """What was found; the best is what ran until now, unless another is clearly faster."""
        if not self.measured:
            raise DeviceError(
                f"no candidate ran right for n = {self.n}: {'; '.join(self.rejected)}; "
                "please report this with `shflnb doctor`"
            )
        measured = sorted(self.measured, key=lambda m: m.us)
        best = next((m for m in measured if m.config == before and m.us <= KEEP_RULE * measured[0].us), measured[0])
        return Tuned(problem, key, before, tuple(measured), tuple(self.rejected), best, roof, self.layout)


def _of_x(layout: str) -> str:
    return f", {layout}-major x" if layout else ""


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
