"""Build the kernels whose (config, architecture) pairs come pickled on standard input, into the disk cache.

A program of its own, run by `records.prebuild`: its worker processes import no torch and so start at once.
"""

from __future__ import annotations

import multiprocessing
import pickle
import sys
from concurrent.futures import ProcessPoolExecutor
from typing import Any


def build(task: tuple[Any, str]) -> str | None:
    """Build one kernel; what went wrong, if anything did."""
    config, arch = task
    from shflnb.kernels.spmm_plan import kernel_spec

    try:
        kernel_spec(config).build(arch)
    except Exception as error:  # noqa: BLE001 (any failure is reported, and the others go on)
        return f"{config}: {error}"
    return None


if __name__ == "__main__":
    tasks = pickle.load(sys.stdin.buffer)
    with ProcessPoolExecutor(int(sys.argv[1]), mp_context=multiprocessing.get_context("spawn")) as pool:
        problems = [problem for problem in pool.map(build, tasks) if problem is not None]
    for problem in problems:
        print(f"  could not be built: {problem}", file=sys.stderr)
    sys.exit(1 if problems else 0)
