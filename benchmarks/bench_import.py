"""How long does `import shflnb` take, in a fresh interpreter? Bar: 0.3 s.

Run: python -m pytest benchmarks/bench_import.py
Each round starts an interpreter that measures the import alone; the start of Python itself is not counted.
"""

from __future__ import annotations

import statistics
import subprocess
import sys

import pytest

BAR_S = 0.3
PROGRAM = "import time; start = time.perf_counter(); import {name}; print(time.perf_counter() - start)"


def import_seconds(name: str) -> float:
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(name=name)], capture_output=True, text=True, check=True)
    return float(done.stdout)


@pytest.mark.parametrize("name", ["shflnb", "shflnb.formats, shflnb.patterns", "numpy"])
def test_import_time(benchmark, name):
    inner = []
    benchmark.extra_info["name"] = name
    benchmark.pedantic(lambda: inner.append(import_seconds(name)), rounds=7, iterations=1, warmup_rounds=1)
    benchmark.extra_info["import_s"] = statistics.median(inner)
    if name == "shflnb":
        assert statistics.median(inner) <= BAR_S
