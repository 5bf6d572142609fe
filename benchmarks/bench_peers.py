"""How do other libraries do on the same shapes and sparsities?

    python benchmarks/bench_peers.py --out DIR                      every group of peers.GROUPS
    python benchmarks/bench_peers.py --out DIR --groups main        one of them
    python benchmarks/bench_peers.py --out DIR --groups tuned --append

First everything that a peer compiles is compiled, on all cores at once, into the caches of Triton and of torch. Then
each group runs in a process of its own, so that a peer that crashes takes no other along, and has its share of the time
budget; what a group leaves goes to the next ones. Only there anything is searched, tuned or timed: alone on the device.
Small shapes come first, and every peer of a group on one shape comes before any on the next. A peer that cannot run has
a row that says why; one whose result is less exact than its dtype allows is timed, and its row says so. Writes
`<gpu>.peers.csv` and `<gpu>.peers.machine.json`.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peers
import pytest
import torch
from bench_spmm import configs_of
from cases import PEER_SHAPES, Case, Shape
from peers import DENSE, DTYPE, GROUPS, PEER_V, Operands, Peer, Variant, expected
from protocol import ERROR_LIMIT, Timing, check, device_clock, eager_us, feed, measure
from records import RESULTS, Budget, Results, machine, prebuild, results_name, write_machine

SPARSITIES = (0.5, 0.75, 0.875)
FIELDS = (
    "gpu", "date", "name", "m", "k", "n", "sparsity", "dtype", "peer", "pattern", "variant", "median_us", "p10_us",
    "p90_us", "samples", "launches", "method", "sm_mhz", "eager_us", "dense_us", "dense_tflops", "speedup",
    "eager_speedup", "tflops", "error", "note",
)  # fmt: skip
SHORT_ROUNDS = 3
ROUNDS = {"cusparse": 5}
"""Samples where 15 take too long: CSR is some twenty times slower than dense."""
SHARES = {"main": 45.0, "searched": 62.0, "cusparse": 47.0, "compile": 30.0, "tuned": 96.0}
"""Seconds that a group is expected to need; the budget is divided in this proportion."""
GRACE_S, START_S = 45.0, 6.0
"""What a group may take longer to finish what it began, and how long its process takes to start."""
COMPILE_S = 80.0
"""Seconds for compiling ahead."""
INEXACT_LIMIT = 1e-2
"""Largest error of a product that was summed with more rounding than `ERROR_LIMIT` allows; above it, it is wrong."""
CPU_SHAPES = [Shape("small", 256, 256, 64)]


def checked_variants(peer: Peer, o: Operands, sparsity: float) -> tuple[list[tuple[Variant, float]], str]:
    """The variants whose result is right (or, if none is, those that are inexact), with their errors; and why none."""
    why = ""
    try:
        variants = peer.prepare(o, sparsity)
    except Exception as problem:  # noqa: BLE001 (whatever keeps a peer from running belongs into the table)
        return [], one_line(problem)
    right: list[tuple[Variant, float]] = []
    inexact: list[tuple[Variant, float]] = []
    references: dict[int, torch.Tensor] = {}
    for variant in variants:
        try:
            if id(variant.weight) not in references:
                references[id(variant.weight)] = variant.weight.float() @ o.x.float()
            reference = references[id(variant.weight)]
            o.out.fill_(float("nan"))
            error, is_right = check(variant.call, reference.t() if variant.is_token_major else reference, DTYPE)
        except Exception as problem:  # noqa: BLE001
            why = one_line(problem)
            continue
        if is_right:
            right.append((variant, error))
        elif error <= INEXACT_LIMIT:
            inexact.append((variant, error))
        else:
            why = f"its result is wrong (relative error {error:.2g}, {variant.name})"
    return right or inexact, why


def one_line(error: BaseException) -> str:
    """An exception as a short text for a table."""
    text = " ".join(str(error).split()) or "no text"
    return f"{type(error).__name__}: {text}"[:200]


def fastest(found: list[tuple[Variant, float]], device: str) -> tuple[Variant, float]:
    """The variant with the least time in a short measurement."""
    if len(found) == 1:
        return found[0]
    subjects = {str(i): variant.call for i, (variant, _) in enumerate(found)}
    no_graph = [str(i) for i, (variant, _) in enumerate(found) if not variant.capture]
    times = measure(subjects, device, rounds=SHORT_ROUNDS, sample_us=200.0, warm_s=0.0, no_graph=no_graph)
    return found[int(min(times, key=lambda i: times[i].median_us))]


def run_shape(group: str, shape: Shape, device: str, results: Results, common: dict[str, Any], budget: Budget) -> None:
    """Prepare, check, choose and time all peers of a group on one shape, dense beside them, in turns."""
    o = Operands(shape, device)
    common = common | {"name": shape.name, "m": shape.m, "k": shape.k, "n": shape.n, "dtype": DTYPE}
    chosen: dict[str, tuple[Peer, float, Variant, float]] = {}
    owed = [(peer, 0.0) for peer in DENSE] + expected(group, SPARSITIES)
    for peer, sparsity in owed:
        row = common | {"sparsity": sparsity, "peer": peer.name, "pattern": peer.pattern}
        if budget.is_spent and peer not in DENSE:
            results.add(row | {"note": f"not run: the time budget of {budget.seconds:.0f} s was spent"})
            continue
        found, why = checked_variants(peer, o, sparsity)
        if found:
            chosen[f"{peer.name} {sparsity}"] = (peer, sparsity, *fastest(found, device))
        else:
            results.add(row | {"note": f"cannot run because {why}"})
    subjects = {name: variant.call for name, (_, _, variant, _) in chosen.items()}
    no_graph = [name for name, (_, _, variant, _) in chosen.items() if not variant.capture]
    timings: dict[str, Timing] = measure(subjects, device, rounds=ROUNDS.get(group, 15), no_graph=no_graph)
    dense_us = min(timings[f"{peer.name} 0.0"].median_us for peer in DENSE)
    eager = {
        name: eager_us(chosen[name][2].eager or subjects[name], device, device_us=timing.median_us)
        for name, timing in timings.items()
    }
    dense_eager = min(eager[f"{peer.name} 0.0"] for peer in DENSE)
    line = []
    for name, (peer, sparsity, variant, error) in chosen.items():
        if peer in DENSE and group != "main":
            continue  # timed for the ratio; the rows of the group "main" speak for it
        us, limit = timings[name].median_us, ERROR_LIMIT[DTYPE]
        note = "" if error <= limit else f"its relative error, {error:.2g}, is above the limit of {limit:g}"
        results.add(
            common | timings[name].row() | {
                "sparsity": sparsity, "peer": peer.name, "pattern": peer.pattern, "variant": variant.name,
                "eager_us": f"{eager[name]:.4g}", "dense_us": round(dense_us, 3),
                "dense_tflops": f"{shape.flops / dense_us / 1e6:.4g}", "speedup": f"{dense_us / us:.4g}",
                "eager_speedup": f"{dense_eager / eager[name]:.4g}", "tflops": f"{shape.flops / us / 1e6:.4g}",
                "error": f"{error:.3g}", "note": note,
            }
        )  # fmt: skip
        line.append(f"{peer.name} {100 * sparsity:g}% {dense_us / us:.2f}x")
    sizes = f"{shape.m}x{shape.k}x{shape.n}"
    print(f"[{budget.used_s:5.1f} s] {group} {sizes}: dense {dense_us:.1f} us | {'; '.join(line)}", flush=True)


def child(group: str, device: str, path: Path, seconds: float) -> int:
    """Run one group in this process and append its rows."""
    if device.startswith("cuda"):
        torch.backends.cuda.matmul.allow_tf32 = False
    budget = Budget(seconds)
    results = Results(path, FIELDS, append=True)
    common = {"gpu": results_name(device), "date": datetime.date.today().isoformat()}
    if group == "main" and device.startswith("cuda"):
        prebuild_ours()
    for shape in shapes_of(device):
        run_shape(group, shape, device, results, common, budget)
    results.close()
    return 0


def tasks_ahead(groups: Sequence[str], device: str) -> list[str]:
    """What is compiled ahead, a process each: "group:number of the peer:number of the shape", or -1 for all shapes."""
    shapes = {"all": range(-1, 0), "shape": range(len(shapes_of(device)))}
    return [
        f"{group}:{number}:{shape}"
        for group in groups
        for number, peer in enumerate(GROUPS[group])
        for shape in shapes.get(peer.compiles, ())
    ]


def compile_ahead(groups: Sequence[str], device: str, seconds: float) -> float:
    """Let every peer that compiles do so, all at once; the seconds it took.

    What is not done by then, or fails, is compiled, or fails, in its group's own time.
    """
    budget = Budget(seconds)
    command = [sys.executable, __file__, "--device", device, "--ahead"]
    environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "4"}
    running = {
        task: subprocess.Popen([*command, task], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
        for task in tasks_ahead(groups, device)
    }
    for task, process in running.items():
        try:
            code = process.wait(max(0.0, budget.seconds - budget.used_s))
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        if code:
            print(f"  compiling ahead: {task} ended with code {code} after {budget.used_s:.0f} s", flush=True)
    return budget.used_s


def compile_one(task: str, device: str) -> int:
    """Call one peer of a group once on its shapes, in this process: nothing is timed, the result is not looked at."""
    group, number, place = task.split(":")
    peer, shapes = GROUPS[group][int(number)], shapes_of(device)
    peers.TUNE_S = peers.TUNE_AHEAD_S
    for shape in shapes if int(place) < 0 else [shapes[int(place)]]:
        o = Operands(shape, device)
        for sparsity in (sparsity for owed, sparsity in expected(group, SPARSITIES) if owed is peer):
            checked_variants(peer, o, sparsity)
    return 0


def shapes_of(device: str) -> list[Shape]:
    """The shapes, in the order in which they are measured: the cheapest first."""
    return CPU_SHAPES if device == "cpu" else sorted(PEER_SHAPES, key=lambda shape: shape.flops)


def prebuild_ours() -> None:
    """Compile the kernels of our own products on all cores at once."""
    cases = [Case(shape, sparsity, v) for shape in PEER_SHAPES for sparsity in SPARSITIES for v in PEER_V]
    properties = torch.cuda.get_device_properties("cuda")
    capability = (properties.major, properties.minor)
    wanted = configs_of(cases, capability, properties.multi_processor_count, properties.name)
    print(f"{len(wanted)} kernels built in {prebuild(wanted, capability):.1f} s", flush=True)


def share_of(groups: Sequence[str], seconds: float) -> float:
    """The seconds of the first of the groups that are still to run, out of those that are left."""
    return max(0.0, seconds) * SHARES[groups[0]] / sum(SHARES[group] for group in groups)


def account(path: Path, group: str, device: str, why: str) -> int:
    """Add a row for every peer of a group that left none; how many there were."""
    with path.open(encoding="utf-8") as file:
        there = {(r["peer"], r["m"], r["k"], r["n"], float(r["sparsity"])) for r in csv.DictReader(file)}
    results = Results(path, FIELDS, append=True)
    for shape in shapes_of(device):
        for peer, sparsity in expected(group, SPARSITIES):
            if (peer.name, str(shape.m), str(shape.k), str(shape.n), sparsity) not in there:
                results.add({
                    "gpu": results_name(device), "date": datetime.date.today().isoformat(), "name": shape.name,
                    "m": shape.m, "k": shape.k, "n": shape.n, "sparsity": sparsity, "dtype": DTYPE, "peer": peer.name,
                    "pattern": peer.pattern, "note": f"cannot run because {why}",
                })  # fmt: skip
    results.close()
    return results.rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", default=",".join(GROUPS), help=f"of {', '.join(GROUPS)}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="folder of the CSV and the JSON; needed with --device cpu")
    parser.add_argument("--append", action="store_true", help="keep the rows of a CSV that is there")
    parser.add_argument(
        "--budget-s", type=float, default=350.0, help="for all groups together; what was begun is finished"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--ahead", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.ahead:
        return compile_one(given.ahead, given.device)
    if given.out is None and given.device == "cpu":
        parser.error("--device cpu needs --out")
    out = given.out or RESULTS
    name = results_name(given.device)
    path = out / f"{name}.peers.csv"
    if given.child:
        return child(given.child, given.device, path, given.budget_s)
    budget, before = Budget(given.budget_s), machine(given.device)
    Results(path, FIELDS, append=given.append).close()
    groups = given.groups.split(",")
    if given.device.startswith("cuda"):
        seconds = compile_ahead(groups, given.device, min(COMPILE_S, budget.seconds))
        print(f"peers compiled in {seconds:.1f} s", flush=True)
    for number, group in enumerate(groups):
        share = share_of(groups[number:], budget.seconds - budget.used_s)
        command = [sys.executable, __file__, "--child", group, "--device", given.device, "--out", str(out)]
        seconds = str(max(0.0, share - START_S))
        try:  # a group may finish what it began, but no more than that
            done = subprocess.run([*command, "--budget-s", seconds], timeout=share + GRACE_S, check=False)
            why = f"its process ended with code {done.returncode}"
        except subprocess.TimeoutExpired:
            why = "its process took longer than the time budget"
        missing = account(path, group, given.device, why)
        if missing:
            print(f"{group}: {missing} results missing: {why}", flush=True)
    write_machine(out / f"{name}.peers.machine.json", before, given.device, budget.used_s)
    print(f"{path}: {budget.used_s:.0f} s")
    return 0


# -- pytest-benchmark -------------------------------------------------------------------------------------------------

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PYTEST_PEERS = [
    (shape, peer, sparsity)
    for shape in (PEER_SHAPES[:1] if DEVICE == "cuda" else CPU_SHAPES)
    for peer, sparsity in [(p, 0.0) for p in DENSE] + expected("main", (0.75,))
]


@pytest.mark.parametrize(("shape", "peer", "sparsity"), PYTEST_PEERS, ids=lambda p: getattr(p, "name", str(p)))
@pytest.mark.benchmark(timer=device_clock)
def test_peer(benchmark, shape, peer, sparsity):
    o = Operands(shape, DEVICE)
    found, why = checked_variants(peer, o, sparsity)
    if not found:
        pytest.skip(f"{peer.name} cannot run because {why}")
    variant, error = fastest(found, DEVICE)
    benchmark.group = f"{shape.m}x{shape.k}x{shape.n} peers"
    benchmark.extra_info.update(error=error, variant=variant.name, pattern=peer.pattern)
    feed(benchmark, variant.call, DEVICE, capture=variant.capture)


if __name__ == "__main__":
    sys.exit(main())
