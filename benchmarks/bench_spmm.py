"""How much faster than the dense library is the sparse product? GEMM shapes x sparsity x v.

    python benchmarks/bench_spmm.py --quick --out DIR     the cases that have a bar, about a minute on an H200
    python benchmarks/bench_spmm.py --full --out DIR      these, then all of shapes.json, in bursts, fewer samples
    python benchmarks/bench_spmm.py --device cpu          a few small cases with the host's clock
    python -m pytest benchmarks/bench_spmm.py --benchmark-only

Dense is the better of `W @ X` and `F.linear(X.T, W)`, timed in turns with the sparse products of the same shape.
Writes `<gpu>.spmm.csv` and `<gpu>.spmm.machine.json`. Exit code 1 if a result was wrong.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import LOADS, SPARSITIES, Case, Shape, V, all_shapes, bar_of, table_cases
from matrices import dense_of, random_packed, random_tensor
from protocol import ROUNDS, STEADY_S, Timing, check, device_clock, eager_us, feed, measure, rotations
from records import RESULTS, Budget, Results, machine, prebuild, results_name, write_machine

import shflnb
from shflnb.formats import ShflBWMatrix

FIELDS = (
    "gpu", "date", "name", "m", "k", "n", "sparsity", "v", "dtype", "op", "groups", "kernel", "inputs", "load",
    "what", "config", "median_us", "p10_us", "p90_us", "samples", "launches", "method", "sm_mhz", "eager_us",
    "dense_us", "dense_what", "dense_tflops", "speedup", "tflops", "roof_us", "roof_by", "percent_of_roof", "gbps",
    "error", "note",
)  # fmt: skip
SPREAD = 0.25
L2_BYTES_PER_US, MEMORY_BYTES_PER_US = 9.4e6, 4.3e6
"""Measured on one H200 (2026-10): gathering 32 MB out of L2, and copying far more than L2 holds."""
TABLE = frozenset(table_cases())
REST_ROUNDS = 9
"""Samples of a case without a bar: with as many as the others have, half of them would not fit into the time."""
FEW_COLUMNS = 64
FEW_FIRST = ((4096, 14336), (6144, 4096), (4096, 4096), (28672, 4096))
"""Layers (m, k) of the language model, in the order in which their products with few columns are measured."""
CPU_CASES = [Case(Shape("small", 256, 256, n), 0.75, v, "float32") for n, v in ((64, 32), (64, 64), (1, 64))]
CPU_CASES += [
    Case(Shape("small", 200, 192, 40), 0.5, 32, "float16"),
    Case(Shape("small", 256, 256, 64), 0.75, 64, "bfloat16", op="linear"),
    Case(Shape("small", 256, 256, 64), 0.75, 64, "float32", groups="spread"),
    Case(Shape("small", 256, 256, 64), 0.75, 64, "float32", inputs="rotated"),
]


def kept_columns(case: Case) -> int:
    """Columns that each group of an equal-length case keeps."""
    return round(case.shape.k * (1 - case.sparsity))


# -- what is timed ----------------------------------------------------------------------------------------------------


class Weights:
    """The packed matrices of one (m, k), each made once, with the dense equal that its results are checked against."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._packed: dict[tuple[Any, ...], ShflBWMatrix] = {}
        self._dense: dict[int, torch.Tensor] = {}
        self._copies: dict[int, list[ShflBWMatrix]] = {}

    def dense(self, packed: ShflBWMatrix) -> torch.Tensor:
        """The dense equal of one of the matrices, on the device."""
        if id(packed) not in self._dense:
            self._dense[id(packed)] = dense_of(packed, self.device)
        return self._dense[id(packed)]

    def packed(self, case: Case) -> ShflBWMatrix:
        """The matrix of a case."""
        spread = SPREAD if case.groups == "spread" else 0.0
        key = (case.shape.m, case.shape.k, case.v, case.sparsity, case.dtype, spread)
        if key not in self._packed:
            self._packed[key] = random_packed(
                case.shape.m, case.shape.k, case.v, case.sparsity, case.dtype, device=self.device, spread=spread
            )
        return self._packed[key]

    def copies(self, packed: ShflBWMatrix, count: int) -> list[ShflBWMatrix]:
        """So many of the same matrix, the first of them itself; each has memory of its own on the device."""
        found = self._copies.setdefault(id(packed), [packed])
        found += [replace(packed) for _ in range(count - len(found))]
        return found[:count]


def sparse_calls(
    case: Case, copies: Sequence[ShflBWMatrix], xs: Sequence[torch.Tensor], outs: Sequence[torch.Tensor]
) -> list:
    """Calls of the product, one for each set of operands."""
    calls: list[Callable[[], torch.Tensor]] = []
    for one, x, out in zip(copies, xs, outs, strict=True):
        if case.op == "linear":
            calls.append(lambda p=one, x=x, y=out: shflnb.linear(x, p, out=y))
        else:
            calls.append(lambda p=one, x=x, y=out: shflnb.matmul(p, x, out=y))
    return calls


def sm80_calls(case: Case, packed: ShflBWMatrix, x: torch.Tensor, out: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """A call for each mma.sync config of this v."""
    from shflnb.kernels.select import candidates
    from shflnb.kernels.spmm_device import device_matmul

    configs = [c for c in candidates(case.v, case.dtype, (8, 0)) if c.kernel == "sm80"]
    return {c.name: (lambda c=c: device_matmul(packed, x, out=out, config=c)) for c in configs}


def dense_calls(shape: Shape, dtype: str, xs: Sequence[torch.Tensor], op: str, device: str) -> dict[str, list]:
    """cuBLAS (or the CPU's library) in both layouts, on a weight without zeros; one call for each set of operands."""
    ws = [random_tensor(shape.m, shape.k, dtype, device, 7 + i, 0.05) for i in range(len(xs))]
    outs = [torch.empty(shape.m, shape.n, dtype=ws[0].dtype, device=device) for _ in xs]
    feature = [x.t().contiguous() for x in xs] if op == "linear" else list(xs)
    token = list(xs) if op == "linear" else [x.t().contiguous() for x in xs]
    found: dict[str, list] = {"F.linear": [lambda w=w, x=x: F.linear(x, w) for w, x in zip(ws, token, strict=True)]}
    if op == "matmul":
        found["W @ X"] = [
            lambda w=w, x=x, y=y: torch.matmul(w, x, out=y) for w, x, y in zip(ws, feature, outs, strict=True)
        ]
    return found


def checked_dense(
    shape: Shape, dtype: str, xs: Sequence[torch.Tensor], op: str, device: str
) -> tuple[dict[str, Any], dict[str, float]]:
    """The dense products whose results are right, and their errors."""
    subjects: dict[str, Any] = {}
    errors: dict[str, float] = {}
    w32 = random_tensor(shape.m, shape.k, dtype, device, 7, 0.05).float()
    reference = w32 @ (xs[0].float().t() if op == "linear" else xs[0].float())
    for name, calls in dense_calls(shape, dtype, xs, op, device).items():
        error, is_right = check(calls[0], reference.t() if name == "F.linear" else reference, dtype)
        if not is_right:
            raise RuntimeError(f"the dense product {name} of {shape} has a relative error of {error:.3g}")
        subjects[f"dense {name}"], errors[f"dense {name}"] = calls, error
    return subjects, errors


def group_key(case: Case) -> tuple[Any, ...]:
    """Cases of equal key share operands and a dense baseline, and are timed in turns."""
    return case.shape.m, case.shape.k, case.shape.n, case.dtype, case.op, case.inputs


def time_group(
    cases: Sequence[Case],
    weights: Weights,
    results: Results,
    common: dict[str, Any],
    loads: Sequence[str],
    rounds: int = ROUNDS,
) -> tuple[str, int]:
    """Check and time the cases of one group under these loads; a line about it, and how many results were wrong."""
    first, device = cases[0], weights.device
    shape, dtype = first.shape, first.dtype
    set_bytes = random_tensor(1, 1, dtype, device, 0).element_size() * (shape.m + shape.k) * shape.n
    sets = rotations(set_bytes + shape.m * shape.k // 2, device) if first.inputs == "rotated" else 1
    rows, cols = (shape.n, shape.k) if first.op == "linear" else (shape.k, shape.n)
    xs = [random_tensor(rows, cols, dtype, device, 100 + i) for i in range(sets)]
    out_shape = (shape.n, shape.m) if first.op == "linear" else (shape.m, shape.n)
    outs = [torch.empty(out_shape, dtype=xs[0].dtype, device=device) for _ in xs]
    x32 = xs[0].float() if first.op == "matmul" else xs[0].float().t()

    subjects, dense_errors = checked_dense(shape, dtype, xs, first.op, device)
    checked: list[tuple[Case, str, ShflBWMatrix, float]] = []
    wrong = 0
    for case in cases:
        packed = weights.packed(case)
        reference = weights.dense(packed).float() @ x32
        reference = reference.t() if case.op == "linear" else reference
        if case.kernel == "sm80":
            calls = {f"{case}: {n}": c for n, c in sm80_calls(case, packed, xs[0], outs[0]).items()}
        else:
            calls = {str(case): sparse_calls(case, weights.copies(packed, len(xs)), xs, outs)}
        for name, call in calls.items():
            error, is_right = check(call[0] if isinstance(call, list) else call, reference, dtype, poison=outs[0])
            checked.append((case, name, packed, error))
            if is_right:
                subjects[name] = call
            else:
                wrong += 1
        del reference
    common = common | {"name": shape.name, "m": shape.m, "k": shape.k, "n": shape.n, "dtype": dtype, "op": first.op,
                       "inputs": first.inputs}  # fmt: skip
    lines = [
        time_load(load, subjects, checked, dense_errors, xs[0], results, common | {"load": load}, rounds)
        for load in loads
    ]
    title = f"{shape.name} {shape.m}x{shape.k}x{shape.n} {dtype} {first.op} {first.inputs}"
    return "\n    ".join([title, *lines]), wrong


def time_load(
    load: str,
    subjects: dict[str, Any],
    checked: Sequence[tuple[Case, str, ShflBWMatrix, float]],
    dense_errors: dict[str, float],
    x: torch.Tensor,
    results: Results,
    common: dict[str, Any],
    rounds: int,
) -> str:
    """Time checked products under one load and write their rows; a line about them."""
    shape, device = checked[0][0].shape, str(x.device)
    timings = measure(subjects, device, load=load, rounds=rounds, warm_s=STEADY_S)
    best = min((n for n in timings if n.startswith("dense ")), key=lambda n: timings[n].median_us)
    for name in (n for n in timings if n.startswith("dense ")):
        tflops = shape.flops / timings[name].median_us / 1e6
        eager = eager_us(subjects[name][0], device, device_us=timings[name].median_us)
        results.add(common | timings[name].row() | {"what": name, "tflops": f"{tflops:.4g}", "sparsity": 0,
                                                    "eager_us": f"{eager:.4g}",
                                                    "error": f"{dense_errors[name]:.3g}"})  # fmt: skip
    parts = []
    for case, name, packed, error in checked:
        row = common | sparse_row(case, name, packed, error, timings.get(name), timings[best], best, device)
        if name in timings and not case.kernel:
            call = eager_call(case, packed, x)
            row["eager_us"] = f"{eager_us(call, device, device_us=timings[name].median_us):.4g}"
        results.add(row)
        parts.append(f"v{case.v} {100 * case.sparsity:g}%{_tag(case)} {row.get('speedup', 'WRONG')}x")
    dense_tflops = shape.flops / timings[best].median_us / 1e6
    return f"{load}: {best} {timings[best].median_us:.1f} us {dense_tflops:.0f} TF | {'; '.join(parts)}"


def _tag(case: Case) -> str:
    return "".join(f" {t}" for t in (case.kernel, case.groups if case.groups != "equal" else "") if t)


def sparse_row(
    case: Case,
    name: str,
    packed: ShflBWMatrix,
    error: float,
    timing: Timing | None,
    dense: Timing,
    dense_what: str,
    device: str,
) -> dict[str, Any]:
    """The CSV row of a sparse product; without times when its result was wrong."""
    row: dict[str, Any] = {
        "sparsity": case.sparsity, "v": case.v, "groups": case.groups, "kernel": case.kernel, "what": "shflnb",
        "config": name.partition(": ")[2] or config_name(packed, case.shape.n), "error": f"{error:.3g}",
        "dense_us": round(dense.median_us, 3), "dense_what": dense_what.removeprefix("dense "),
        "dense_tflops": f"{case.shape.flops / dense.median_us / 1e6:.4g}",
    }  # fmt: skip
    if timing is None:
        return row | {"note": "wrong result: not timed"}
    us = timing.median_us
    moved = packed.nbytes + packed.values.itemsize * (case.shape.k + case.shape.m) * case.shape.n
    row |= timing.row() | {
        "speedup": f"{dense.median_us / us:.4g}", "tflops": f"{case.shape.flops / us / 1e6:.4g}",
        "gbps": f"{moved / us / 1e3:.4g}",
    }  # fmt: skip
    if device.startswith("cuda"):
        least, by = roof_of(packed, case.shape.n, moved, device)
        row |= {"roof_us": f"{least:.4g}", "roof_by": by, "percent_of_roof": f"{100 * least / us:.3g}"}
    return row


def roof_of(packed: ShflBWMatrix, n: int, moved_bytes: int, device: str) -> tuple[float, str]:
    """The least time and what sets it: tensor cores or gather (`select.roof_us`), or every byte moved once."""
    from shflnb.kernels.select import roof_us
    from shflnb.kernels.spmm_plan import problem_of

    properties = torch.cuda.get_device_properties(device)
    is_cached = moved_bytes < properties.L2_cache_size
    by_bytes = moved_bytes / (L2_BYTES_PER_US if is_cached else MEMORY_BYTES_PER_US)
    least, by = roof_us(problem_of(packed, n), properties.multi_processor_count)
    return (least, by) if least >= by_bytes else (by_bytes, "bytes from L2" if is_cached else "bytes from memory")


def config_name(packed: ShflBWMatrix, n: int, layout: str = "feature") -> str:
    """Name of the kernel that the launcher chose for n columns, from its records; "" where it keeps none.

    For few columns of x of this layout it keeps its choice. Else a record's key is (kind of plan, device, columns, ..).
    One for few columns has room for some number of them, or is for n alone, as n or (n,): of those that fit, the one
    for the fewest columns counts, and of these the last.
    """
    from shflnb.kernels.skinny_config import MAX_N, room_for

    found: list[tuple[int, str]] = []
    for key, plan in packed.launch_cache.items():
        kind, *rest = key if isinstance(key, tuple) else (key,)
        if kind == "few choice" and rest[1:] == [n, layout]:
            return str(plan.name)
        if plan is None or not (isinstance(kind, str) and kind.endswith("plan") and len(rest) > 1):
            continue
        is_for_few = kind != "plan"
        if rest[1] in (n, (n,)) and (is_for_few or rest[3] is None):  # a forced config is not the launcher's choice
            found.append((n if is_for_few else n + MAX_N, plan.kernel.spec.name))
        elif is_for_few and n <= MAX_N and rest[1] == room_for(n):
            found.append((room_for(n), plan.kernel.spec.name))
    return min(reversed(found), key=lambda one: one[0])[1] if found else ""


def eager_call(case: Case, packed: ShflBWMatrix, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """The call as users write it: a new result each time."""
    if case.op == "linear":
        return lambda: shflnb.linear(x, packed)
    return lambda: shflnb.matmul(packed, x)


# -- the run ----------------------------------------------------------------------------------------------------------


def cases_of(level: str, device: str) -> list[Case]:
    """What a level measures, in the order of `rank_of`, a (m, k) at a time."""
    if device == "cpu":
        return CPU_CASES
    cases = table_cases()
    if level == "full":
        for shape, sparsity, v in itertools.product(all_shapes(), SPARSITIES, V):
            cases.append(Case(shape, sparsity, v))
    seen: dict[tuple[Any, ...], Case] = {}
    for case in cases:  # two names may stand for one product: the first one keeps it
        seen.setdefault((*group_key(case), case.sparsity, case.v, case.groups, case.kernel), case)
    by_matrix: dict[tuple[int, int, int], list[Case]] = {}
    for case in seen.values():
        by_matrix.setdefault((rank_of(case), case.shape.m, case.shape.k), []).append(case)

    def place(key: tuple[int, int, int]) -> tuple[int, int]:
        rank, *matrix = key
        return rank, FEW_FIRST.index(tuple(matrix)) if rank == 1 else 0

    return [case for key in sorted(by_matrix, key=place) for case in by_matrix[key]]  # a stable sort


def rank_of(case: Case) -> int:
    """Its turn, as time may not do for all: what has a bar, few columns, more of the bars' products, the rest."""
    if case in TABLE:
        return 0
    if case.shape.n <= FEW_COLUMNS and (case.shape.m, case.shape.k) in FEW_FIRST:
        return 1
    return 2 if group_key(case) in {group_key(c) for c in TABLE} else 3


def configs_of(cases: Iterable[Case], capability: tuple[int, int], sm_count: int, gpu: str) -> set[Any]:
    """The kernels that the launcher will choose for the cases."""
    from shflnb.kernels.config import Problem, ceil_div
    from shflnb.kernels.select import candidates, choose

    configs = set()
    for case in cases:
        if case.kernel == "sm80":
            configs |= {c for c in candidates(case.v, case.dtype, (8, 0)) if c.kernel == "sm80"}
            continue
        s, keep = case.shape, kept_columns(case)
        longest = keep if case.groups == "equal" else round(keep * (1 + 2 * SPREAD))
        problem = Problem(s.m, s.k, s.n, case.v, case.dtype, keep * ceil_div(s.m, case.v), longest)
        configs.add(choose(problem, capability, sm_count, gpu).config)
    return configs


def run(level: str, device: str, out: Path, seconds: float) -> int:
    """Measure a level; the exit code."""
    budget = Budget(seconds)
    cases = cases_of(level, device)
    name, before = results_name(device), machine(device)
    if device.startswith("cuda"):
        torch.backends.cuda.matmul.allow_tf32 = False
        properties = torch.cuda.get_device_properties(device)
        capability = (properties.major, properties.minor)
        wanted = configs_of(cases, capability, properties.multi_processor_count, properties.name)
        print(f"{len(wanted)} kernels built in {prebuild(wanted, capability):.1f} s", flush=True)
    results = Results(out / f"{name}.spmm.csv", FIELDS)
    common = {"gpu": name, "date": datetime.date.today().isoformat()}
    groups: dict[tuple[Any, ...], list[Case]] = {}
    for case in cases:
        groups.setdefault((case in TABLE, *group_key(case)), []).append(case)
    weights, matrix, wrong, left_out = Weights(device), None, 0, []
    for (is_table, *key), members in groups.items():
        if budget.is_spent:
            left_out.append("x".join(map(str, key[:3])))
            continue
        if key[:2] != matrix:
            weights, matrix = Weights(device), key[:2]
        loads = LOADS[1:] if not device.startswith("cuda") else LOADS if is_table else LOADS[:1]
        rounds = ROUNDS if is_table else REST_ROUNDS
        line, failed = time_group(members, weights, results, common, loads, rounds)
        wrong += failed
        print(f"[{budget.used_s:5.1f} s] {line}", flush=True)
    results.close()
    write_machine(out / f"{name}.spmm.machine.json", before, device, budget.used_s)
    print(f"{results.rows} rows in {results.path}, {budget.used_s:.0f} s, {wrong} wrong results")
    if left_out:
        print(f"time budget of {seconds:.0f} s spent; left out: {', '.join(left_out)}")
    return 1 if wrong else 0


def judge(path: Path) -> None:
    """Print each case with a bar beside its speedup."""
    import csv

    with path.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["what"] != "shflnb" or row["inputs"] != "warm" or row["dtype"] != "float16" or row["kernel"]:
                continue
            bar = bar_of(row["name"], int(row["n"]), float(row["sparsity"]), row["op"], int(row["v"]))
            if bar is None or row["groups"] != "equal" or not row["speedup"]:
                continue
            verdict = "ok" if float(row["speedup"]) >= bar[0] else "MISSED"
            sizes = f"{row['m']}x{row['k']}x{row['n']} {row['op']} {100 * float(row['sparsity']):g}% v{row['v']}"
            print(
                f"{verdict:6} {row['load']:9} {sizes:42} {float(row['speedup']):.2f}x  "
                f"bar {bar[0]} / {bar[1] or '-'}  {row['median_us']} us  {row['percent_of_roof']} % of roof"
            )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    level = parser.add_mutually_exclusive_group()
    level.add_argument("--quick", action="store_true", help="only the cases that have a bar (default)")
    level.add_argument("--full", action="store_true", help="all of shapes.json as well")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="folder of the CSV and the JSON; needed with --device cpu, which only "
                        "tries the script out (bench_cpu.py measures CPUs)")  # fmt: skip
    parser.add_argument("--budget-s", type=float, default=None, help="begin nothing after so many seconds")
    given = parser.parse_args(arguments)
    if given.out is None and given.device == "cpu":
        parser.error("--device cpu needs --out")
    given.out = given.out or RESULTS
    chosen = "full" if given.full else "quick"
    try:
        return run(chosen, given.device, given.out, given.budget_s or {"quick": 85.0, "full": 400.0}[chosen])
    finally:  # whatever was measured before a failure is worth its verdict
        judge(given.out / f"{results_name(given.device)}.spmm.csv")


# -- pytest-benchmark -------------------------------------------------------------------------------------------------

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PYTEST_CASES = [c for c in cases_of("quick", DEVICE) if not c.kernel and c.inputs == "warm"]


@pytest.mark.parametrize("case", PYTEST_CASES, ids=str)
@pytest.mark.benchmark(timer=device_clock)
def test_spmm(benchmark, case):
    weights = Weights(DEVICE)
    packed = weights.packed(case)
    shape = case.shape
    rows, cols = (shape.n, shape.k) if case.op == "linear" else (shape.k, shape.n)
    x = random_tensor(rows, cols, case.dtype, DEVICE, 100)
    out = torch.empty((shape.n, shape.m) if case.op == "linear" else (shape.m, shape.n), dtype=x.dtype, device=DEVICE)
    (call,) = sparse_calls(case, [packed], [x], [out])
    x32 = x.float().t() if case.op == "linear" else x.float()
    reference = dense_of(packed, DEVICE).float() @ x32
    error, is_right = check(call, reference.t() if case.op == "linear" else reference, case.dtype, poison=out)
    assert is_right, f"{case}: relative error {error}"
    benchmark.group = f"{shape.name} {shape.m}x{shape.k}x{shape.n} {case.dtype} {case.op}"
    dense = measure(dense_calls(shape, case.dtype, [x], case.op, DEVICE), DEVICE)
    feed(benchmark, call, DEVICE)
    best = min(t.median_us for t in dense.values())
    benchmark.extra_info.update(
        error=error, dense_us=best, dense_tflops=shape.flops / best / 1e6, config=config_name(packed, shape.n)
    )
    if benchmark.stats:
        benchmark.extra_info["speedup"] = best * 1e-6 / benchmark.stats.stats.median


if __name__ == "__main__":
    sys.exit(main())
