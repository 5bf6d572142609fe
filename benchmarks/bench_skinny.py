"""How fast is the product with 1 to 64 columns? The layers of a language model, as they run token by token.

    python benchmarks/bench_skinny.py --quick --out DIR     the cases that have a bar, about a minute on an H200
    python benchmarks/bench_skinny.py --full --out DIR      every layer, n, sparsity and v
    python benchmarks/bench_skinny.py --full --inputs rotated      of those only with weights from device memory
    python benchmarks/bench_skinny.py --device cpu          a few small cases with the host's clock

`F.linear`'s meaning, token-major x and result, and on the large layers feature-major ones (op "matmul"), too. Weights
"rotated" through copies of eight times the L2 cache come from device memory, as in a model, where each product has the
first of the next one's fetched into L2 (`shflnb/kernels/skinny_ahead.py`); "warm" ones may be in L2. All copies are
multiplied with one x, which is in L2 as in a model, where it has just been written. Dense is the better of `W @ X` and
`F.linear`, timed in turns. GB/s counts the packed matrix once; its share of a copy that was measured in the same run
stands beside it.
Writes `<gpu>.skinny.csv` and `<gpu>.skinny.machine.json`. Exit code 1 if a result was wrong.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from bench_spmm import Weights, checked_dense, config_name, sparse_calls
from cases import LARGE_LAYERS, Case, Shape, all_shapes, few_bar_of
from matrices import random_tensor
from protocol import check, check_chained, measure, rotations
from records import RESULTS, Budget, Results, machine, results_name, write_machine

FIELDS = (
    "gpu", "date", "name", "m", "k", "n", "sparsity", "v", "dtype", "op", "inputs", "what", "config", "median_us",
    "p10_us", "p90_us", "samples", "launches", "method", "sm_mhz", "dense_us", "dense_what", "speedup", "gbps",
    "copy_gbps", "percent_of_copy", "error", "note",
)  # fmt: skip
COLUMNS = (1, 2, 4, 8, 16, 32, 64)
INPUTS = ("rotated", "warm")
COPY_BYTES = 1 << 30
LAYOUTS = {"linear": "token", "matmul": "feature"}
"""Of x and of the result, by the operation of a case."""
ROTATION = 8
"""Times the size of L2 that rotated weights have together, see `protocol.rotations`."""


def bar_of(case: Case) -> float | None:
    """The speedup over dense that a token-major case with rotated weights must reach on an H200, or None."""
    if case.op != "linear" or case.inputs != "rotated" or case.dtype not in ("float16", "bfloat16"):
        return None
    return few_bar_of(case.shape.m, case.shape.k, case.shape.n, case.sparsity, case.v)


def layers() -> list[tuple[str, int, int]]:
    """Name, m and k of every layer of a language model in shapes.json, each size once."""
    found = {(s.m, s.k): s.name for s in all_shapes() if s.name.startswith(("llm/", "llama"))}
    return [(name, m, k) for (m, k), name in found.items()]


def cases_of(level: str, device: str, among: Sequence[str] = INPUTS) -> list[Case]:
    """What a level measures, a (m, k) at a time; `among`: with which inputs."""
    if device == "cpu":
        return [Case(Shape("small", 256, 256, n), 0.75, 64, "float32", op="linear", inputs="rotated") for n in (1, 16)]
    found = []
    for name, m, k in layers():
        for n in COLUMNS if level == "full" else (1, 8, 16, 32, 64):
            shape = Shape(name, m, k, n)
            kinds = [(0.75, 64)]
            if level == "full":
                kinds += [(s, 64) for s in (0.5, 0.6, 0.875)] + [(0.75, 32), (0.75, 128)]
            elif (m, k) in LARGE_LAYERS:
                kinds += [(0.875, 64)] * (n <= 16) + [(0.5, 64)] * (n == 32) + [(0.75, 32), (0.75, 128)] * (n == 8)
            for inputs in among:
                found += [Case(shape, sparsity, v, op="linear", inputs=inputs) for sparsity, v in kinds]
                if (m, k) in LARGE_LAYERS and n >= 8 and inputs == "rotated":
                    found.append(Case(shape, 0.75, 64, op="matmul", inputs=inputs))
                if level == "full" or n == 8:
                    found.append(Case(shape, 0.75, 64, dtype="bfloat16", op="linear", inputs=inputs))
    return found


def copy_gbps(device: str) -> float | None:
    """GB/s (read and written) of a copy that is too large for any cache; None on the CPU.

    The faster of a copy in a graph and one on its own: the driver does not make them by the same means.
    """
    if not device.startswith("cuda"):
        return None
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    ways = dict.fromkeys(("in a graph", "on its own"), lambda: target.copy_(source))
    timings = measure(ways, device, no_graph=["on its own"])
    return 2 * COPY_BYTES / min(timing.median_us for timing in timings.values()) / 1e3


def time_group(
    cases: Sequence[Case], weights: Weights, results: Results, common: dict[str, Any], copy: float | None
) -> tuple[str, int]:
    """Check and time the cases that share a dense product; a line about it, and how many results were wrong."""
    first, device = cases[0], weights.device
    shape, dtype = first.shape, first.dtype

    def sets_of(nbytes: int) -> int:
        return rotations(nbytes, device, times=ROTATION) if first.inputs == "rotated" else 1

    x = random_tensor(shape.n, shape.k, dtype, device, 100)
    out = torch.empty(shape.n, shape.m, dtype=x.dtype, device=device)
    feature_out = torch.empty(shape.m, shape.n, dtype=x.dtype, device=device)
    operands = {"linear": (x, out), "matmul": (x.t().contiguous(), feature_out)}
    subjects, _ = checked_dense(
        shape, dtype, [operands["matmul"][0]] * sets_of(2 * shape.m * shape.k), "matmul", device
    )
    checked, wrong = [], 0
    for case in cases:
        packed = weights.packed(case)
        copies = weights.copies(packed, sets_of(packed.nbytes))
        own_x, own_out = operands[case.op]
        calls = sparse_calls(case, copies, [own_x] * len(copies), [own_out] * len(copies))
        reference = x.float() @ weights.dense(packed).float().t()
        if case.op == "matmul":
            reference = reference.t()
        error, is_right = check(calls[0], reference, dtype, poison=own_out)
        if is_right:
            error, is_right = check_chained(calls, reference, dtype, device, poison=own_out)
        checked.append((case, packed, error))
        wrong += not is_right
        if is_right:
            subjects[str(case)] = calls
    timings = measure(subjects, device)
    best = min((name for name in timings if name.startswith("dense ")), key=lambda name: timings[name].median_us)
    common = common | {"name": shape.name, "m": shape.m, "k": shape.k, "n": shape.n, "dtype": dtype, "op": "linear",
                       "inputs": first.inputs}  # fmt: skip
    for name in (name for name in timings if name.startswith("dense ")):
        results.add(common | timings[name].row() | {"what": name, "sparsity": 0})
    parts = []
    for case, packed, error in checked:
        config = config_name(packed, shape.n, LAYOUTS[case.op])
        label = f"{'feature-major ' if case.op == 'matmul' else ''}v{case.v} {100 * case.sparsity:g}%"
        row = common | {"op": case.op, "sparsity": case.sparsity, "v": case.v, "what": "shflnb",
                        "config": config, "dense_us": round(timings[best].median_us, 3),
                        "dense_what": best.removeprefix("dense "), "error": f"{error:.3g}"}  # fmt: skip
        timing = timings.get(str(case))
        if timing is None:
            results.add(row | {"note": "wrong result: not timed"})
            parts.append(f"{label} WRONG")
            continue
        gbps, speedup = packed.nbytes / timing.median_us / 1e3, timings[best].median_us / timing.median_us
        row |= timing.row() | {"speedup": f"{speedup:.4g}", "gbps": f"{gbps:.4g}"}
        if copy is not None:
            row |= {"copy_gbps": f"{copy:.4g}", "percent_of_copy": f"{100 * gbps / copy:.3g}"}
        results.add(row)
        bar = bar_of(case)
        judged = "" if bar is None else f" (bar {bar}: {'ok' if speedup >= bar else 'MISSED'})"
        parts.append(f"{label} {timing.median_us:.1f} us {speedup:.2f}x{judged}")
    line = f"{shape.name} {shape.m}x{shape.k}x{shape.n} {dtype} {first.inputs}: {best} {timings[best].median_us:.1f} us"
    return f"{line} | {'; '.join(parts)}", wrong


def run(level: str, device: str, out: Path, seconds: float, among: Sequence[str] = INPUTS) -> int:
    """Measure a level, with these inputs; the exit code."""
    budget = Budget(seconds)
    name, before = results_name(device), machine(device)
    copy = copy_gbps(device)
    results = Results(out / f"{name}.skinny.csv", FIELDS)
    common = {"gpu": name, "date": datetime.date.today().isoformat()}
    groups: dict[tuple[Any, ...], list[Case]] = {}
    for case in cases_of(level, device, among):
        groups.setdefault((case.shape, case.dtype, case.inputs), []).append(case)
    weights, matrix, wrong, left_out = Weights(device), None, 0, []
    for (shape, dtype, inputs), members in groups.items():
        if budget.is_spent:
            left_out.append(f"{shape.m}x{shape.k}x{shape.n} {dtype} {inputs}")
            continue
        if (shape.m, shape.k) != matrix:
            weights, matrix = Weights(device), (shape.m, shape.k)
        line, failed = time_group(members, weights, results, common, copy)
        wrong += failed
        print(f"[{budget.used_s:5.1f} s] {line}", flush=True)
    results.close()
    write_machine(out / f"{name}.skinny.machine.json", before, device, budget.used_s)
    print(f"{results.rows} rows in {results.path}, {budget.used_s:.0f} s, {wrong} wrong results")
    if left_out:
        print(f"time budget of {seconds:.0f} s spent; left out: {', '.join(left_out)}")
    return 1 if wrong else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    level = parser.add_mutually_exclusive_group()
    level.add_argument("--quick", action="store_const", dest="level", const="quick", default="quick")
    level.add_argument("--full", action="store_const", dest="level", const="full")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV and the JSON")
    parser.add_argument("--inputs", choices=INPUTS, help="only these; both unless it is given")
    parser.add_argument("--budget-s", type=float, default=300.0, help="begin nothing after so many seconds")
    given = parser.parse_args(arguments)
    among = INPUTS if given.inputs is None else (given.inputs,)
    return run(given.level, given.device, given.out, given.budget_s, among)


if __name__ == "__main__":
    sys.exit(main())
