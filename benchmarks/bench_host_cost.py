"""What does a call cost the host? Warm calls on the GPU (and the CPU), and the first call of a kernel.

    python benchmarks/bench_host_cost.py --out DIR
    python -m pytest benchmarks/bench_host_cost.py --benchmark-only

The products are so small (m = k = 256, n = 64) that the device is done before the host has prepared the next launch:
the time of a call in a loop is what Python, the library and the launch cost. Writes `<machine>.host.csv`.
Bars: a warm `matmul` on torch tensors at most 12 us (what `torch.matmul` costs on the same machine); the first call of
a new config under 6 s, from the disk cache under 0.3 s.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matrices import dense_of, random_packed, random_tensor
from protocol import ERROR_LIMIT, relative_error
from records import RESULTS, Results, machine, results_name, write_machine

import shflnb
from shflnb.nn import ShflLinear

FIELDS = ("machine", "date", "what", "device", "m", "k", "n", "median_us", "p10_us", "p90_us", "calls", "error", "note")
M, K, N, V = 256, 256, 64, 64
CALLS, BATCHES = 400, 9

# The first product of a process; prints its seconds apart from importing torch and creating the CUDA context.
FIRST_CALL = """
import json, time
import torch
device = {device!r}
x = torch.ones(4096, 512, dtype=torch.float16, device=device)
import shflnb
from matrices import random_packed
packed = random_packed(4096, 4096, 64, 0.75, device=device)
torch.cuda.synchronize() if device == "cuda" else None
start = time.perf_counter()
shflnb.matmul(packed, x)
torch.cuda.synchronize() if device == "cuda" else None
print(json.dumps(time.perf_counter() - start))
"""


def subjects(device: str) -> dict[str, tuple[Callable[[], Any], torch.Tensor, bool]]:
    """Name -> (call, reference, whether the result is (n, m))."""
    dtype = "float16" if device == "cuda" else "float32"
    packed = random_packed(M, K, V, 0.75, dtype, device=device)
    w = dense_of(packed, device)
    x = random_tensor(K, N, dtype, device, 1)
    xt, out, bias = x.t().contiguous(), torch.empty(M, N, dtype=x.dtype, device=device), torch.zeros_like(x[:, 0])
    reference = w.float() @ x.float()
    sparse_layer, feature_layer = (ShflLinear.from_packed(packed, device=device, requires_grad=False) for _ in range(2))
    feature_layer.layout = "feature"
    dense_layer = torch.nn.Linear(K, M, bias=False, device="meta")
    dense_layer.weight = torch.nn.Parameter(w, requires_grad=False)
    found: dict[str, tuple[Callable[[], Any], torch.Tensor, bool]] = {
        "shflnb.matmul": (lambda: shflnb.matmul(packed, x), reference, False),
        "shflnb.matmul, out=": (lambda: shflnb.matmul(packed, x, out=out), reference, False),
        "packed @ x": (lambda: packed @ x, reference, False),
        "shflnb.matmul, bias and relu": (
            lambda: shflnb.matmul(packed, x, bias=bias, activation="relu"), reference.clamp_min(0), False,
        ),
        "shflnb.linear, token-major": (lambda: shflnb.linear(xt, packed), reference, True),
        "shflnb.linear, feature-major": (lambda: shflnb.linear(x.t(), packed, layout="feature"), reference, True),
        "nn.ShflLinear": (lambda: sparse_layer(xt), reference, True),
        "nn.ShflLinear, feature-major": (lambda: feature_layer(x.t()), reference, True),
        "torch nn.Linear": (lambda: dense_layer(xt), reference, True),
        "torch.matmul": (lambda: torch.matmul(w, x), reference, False),
        "F.linear": (lambda: F.linear(xt, w), reference, True),
    }  # fmt: skip
    if device == "cpu":
        a, b = w.numpy(), x.numpy()
        found["shflnb.matmul, NumPy"] = (lambda: torch.from_numpy(shflnb.matmul(packed, b)), reference, False)
        found["numpy.matmul"] = (lambda: torch.from_numpy(np.matmul(a, b)), reference, False)
    return found | peers_of(device, w, x, xt)


def peers_of(device: str, w: torch.Tensor, x: torch.Tensor, xt: torch.Tensor) -> dict[str, Any]:
    """Sparse products of torch, whose host cost is part of what they cost; those that this machine has."""
    found: dict[str, Any] = {}
    if device != "cuda":
        return found
    mask = torch.tensor([1, 1, 0, 0], dtype=w.dtype, device=device).repeat(M, K // 4)
    dense = random_tensor(M, K, "float16", device, 3, 0.05)
    if torch.backends.cusparselt.is_available():
        two_four = torch.sparse.to_sparse_semi_structured((dense * mask).contiguous())
        found["torch 2:4 (cuSPARSELt)"] = (lambda: torch.mm(two_four, x), (dense * mask).float() @ x.float(), False)
    bsr = dense.to_sparse_bsr((64, 64))
    found["torch BSR (Triton)"] = (lambda: F.linear(xt, bsr), dense.float() @ x.float(), True)
    return found


def call_us(call: Callable[[], Any], device: str) -> list[float]:
    """Microseconds of a call in each of BATCHES loops."""
    calls = CALLS if device == "cuda" else 100
    found = []
    for _ in range(BATCHES + 1):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        found.append((time.perf_counter() - start) / calls * 1e6)
    return found[1:]


def first_call_s(device: str, cache: Path) -> float:
    """Seconds of the first product in a fresh process with this kernel cache."""
    folder = Path(__file__).parent
    paths = [str(folder), str(folder.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"SHFLNB_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join(p for p in paths if p)}
    program = FIRST_CALL.format(device=device)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=180, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return float(json.loads(done.stdout.strip().splitlines()[-1]))


def run(device: str, out: Path) -> int:
    """Measure everything on one device; the exit code."""
    start, before, name = time.perf_counter(), machine(device), results_name(device)
    results = Results(out / f"{name}.host.csv", FIELDS)
    common = {"machine": name, "date": datetime.date.today().isoformat(), "device": device, "m": M, "k": K, "n": N}
    wrong = 0
    for what, (call, reference, is_token_major) in subjects(device).items():
        try:
            error = relative_error(call(), reference.t() if is_token_major else reference)
        except Exception as problem:  # noqa: BLE001 (a peer that cannot run says why in the table)
            results.add(common | {"what": what, "note": f"cannot run because {' '.join(str(problem).split())[:160]}"})
            continue
        if not error <= ERROR_LIMIT["float16" if device == "cuda" else "float32"]:
            wrong += 1
            results.add(common | {"what": what, "error": f"{error:.3g}", "note": "wrong result: not timed"})
            continue
        p10, median, p90 = np.percentile(call_us(call, device), (10, 50, 90))
        results.add(common | {"what": what, "median_us": f"{median:.4g}", "p10_us": f"{p10:.4g}",
                              "p90_us": f"{p90:.4g}", "calls": CALLS, "error": f"{error:.3g}"})  # fmt: skip
        print(f"{what:34} {median:8.2f} us  ({p10:.2f} to {p90:.2f})", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for what in ("first call, new kernel", "first call, from the disk cache"):
            try:
                seconds = first_call_s(device, Path(folder))
            except (RuntimeError, subprocess.TimeoutExpired) as problem:
                results.add(common | {"what": what, "note": f"cannot run because {problem}"})
                continue
            row = {"what": what, "median_us": round(seconds * 1e6), "calls": 1, "m": 4096, "k": 4096, "n": 512}
            results.add(common | row)
            print(f"{what:34} {seconds:8.3f} s", flush=True)
    results.close()
    write_machine(out / f"{name}.host.machine.json", before, device, time.perf_counter() - start)
    return 1 if wrong else 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV and the JSON")
    given = parser.parse_args(arguments)
    return run(given.device, given.out)


# -- pytest-benchmark -------------------------------------------------------------------------------------------------

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SUBJECTS = subjects(DEVICE)


@pytest.mark.parametrize("what", list(SUBJECTS))
def test_host_cost(benchmark, what):
    call, reference, is_token_major = SUBJECTS[what]
    error = relative_error(call(), reference.t() if is_token_major else reference)
    assert error <= ERROR_LIMIT["float16" if DEVICE == "cuda" else "float32"]
    benchmark.group = f"host cost of a call, {DEVICE}"
    benchmark.pedantic(call, rounds=BATCHES, iterations=CALLS if DEVICE == "cuda" else 50, warmup_rounds=1)


if __name__ == "__main__":
    sys.exit(main())
