"""Make the committed table of the GPU at hand: `python -m shflnb.tuning.make_table [--shapes FILE] [--out FILE]`.

Every candidate is checked and timed on random patterns of each shape; an entry is written only where the best one
beats the rule by more than `WORTH`, so that the table stays small and says where the rule is wrong. n counts in
buckets (up to the next power of two): an entry is the config with the least total loss over the widths of its bucket.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ..formats.shflbw import ShflBWMatrix
from ..kernels.config import Config
from ..kernels.remembered import entry_of
from ..kernels.select import candidates, choose
from ..kernels.skinny_config import SkinnyConfig
from .tune import Tuned, measure_candidates

__all__ = ["loss_of", "main", "pick", "random_pattern", "shapes_in"]

WORTH = 1.03
HEIGHTS = (128, 64, 32)
SPARSITIES = (0.75, 0.5, 0.875)
SHAPES = (
    (1024, 1024, 960), (4096, 1024, 960), (1024, 4096, 960), (1024, 1024, 1056), (4096, 1024, 1056), (1024, 4096, 1056),
    (4096, 1024, 128), (4096, 1024, 320), (4096, 1024, 640), (4096, 1024, 3200), (4096, 1024, 6400),
    (4096, 2048, 128), (4096, 2048, 640), (4096, 2048, 6400), (2048, 2048, 4096), (1024, 1024, 4096),
    (4096, 4096, 512), (4096, 4096, 4096), (8192, 8192, 8192), (14336, 4096, 4096), (4096, 14336, 4096),
    (28672, 4096, 4096), (4096, 1024, 16384), (1024, 4096, 16384), (1024, 1024, 16384),
)  # fmt: skip
"""(m, k, n) when no file is given: the sizes of Transformer, GNMT, Llama and BERT layers."""


def shapes_in(path: Path) -> list[tuple[int, int, int]]:
    """The GEMM shapes with n >= 64 of a file like `benchmarks/shapes.json`."""
    entries = json.loads(path.read_text(encoding="utf-8"))["gemm"]
    return list(dict.fromkeys((e["m"], e["k"], e["n"]) for e in entries if e["n"] >= 64))


def random_pattern(m: int, k: int, v: int, kept: int) -> ShflBWMatrix:
    """A float16 matrix with shuffled rows whose groups each keep `kept` random columns."""
    rng = np.random.default_rng(0)
    groups = -(-m // v)
    order = np.argpartition(rng.random((groups, k), np.float32), kept - 1, axis=1)[:, :kept]
    indices = np.sort(order, axis=1).astype(np.int32).reshape(-1)
    values = np.resize(rng.standard_normal(1 << 20, np.float32).astype(np.float16), (groups * kept, v))
    if m % v:
        values[(groups - 1) * kept :, m % v :] = 0
    indptr = np.arange(groups + 1, dtype=np.int64) * kept
    return ShflBWMatrix((m, k), (v, 64), indptr, indices, values, rng.permutation(m).astype(np.int32))


def loss_of(found: Tuned, config: Config | SkinnyConfig) -> float:
    """How much slower a config is than the best; a config that did not run counts as ten times slower."""
    us = next((m.us for m in found.measured if m.config == config), 10 * found.measured[0].us)
    return us / found.measured[0].us


def pick(found: Sequence[Tuned], rule: Sequence[Config | SkinnyConfig]) -> Config | SkinnyConfig | None:
    """The config with the least total loss over the widths of one key, or None where the rule's are good enough."""
    pool = {m.config for t in found for m in t.measured}
    best = min(pool, key=lambda config: (sum(loss_of(t, config) for t in found), repr(config)))
    by_rule = sum(loss_of(t, config) for t, config in zip(found, rule, strict=True))
    return best if by_rule > WORTH * sum(loss_of(t, best) for t in found) else None


def _build(job: tuple[Config, tuple[int, int]]) -> None:
    from ..kernels import compiler
    from ..kernels.spmm_plan import kernel_spec

    spec = kernel_spec(job[0])
    spec.build(compiler.arch_of(job[1], spec.family))


def _prebuild(capability: tuple[int, int]) -> None:
    jobs = [(config, capability) for v in HEIGHTS for config in candidates(v, "float16", capability)]
    with ProcessPoolExecutor(
        max(1, (os.cpu_count() or 2) - 1), mp_context=multiprocessing.get_context("spawn")
    ) as pool:
        list(pool.map(_build, jobs))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write; returns the process's exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", type=Path, help="JSON with a list 'gemm' of m, k, n")
    parser.add_argument("--out", type=Path, help="file to write; the default is the committed table of this device")
    parser.add_argument(
        "--seconds",
        type=float,
        default=150.0,
        help="stop measuring after this long; what is missing is left to the rule",
    )
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    from ..kernels.launch import device_context

    context = device_context(0)
    _prebuild(context.capability)
    shapes = shapes_in(options.shapes) if options.shapes else list(SHAPES)
    found: dict[str, list[tuple[Tuned, Config]]] = {}
    measured, total = 0, len(shapes) * len(HEIGHTS) * len(SPARSITIES)
    for sparsity in SPARSITIES:
        for v in HEIGHTS:
            for m, k in sorted({(m, k) for m, k, _ in shapes}, key=lambda shape: shape[0] * shape[1]):
                if time.perf_counter() - start > options.seconds:
                    break
                packed = random_pattern(m, k, v, max(1, round(k * (1 - sparsity))))
                for n in sorted(n for a, b, n in shapes if (a, b) == (m, k)):
                    pool = candidates(v, packed.dtype, context.capability)
                    pool = [c for c in pool if c.kernel == "sm90"] if context.capability[0] == 9 else pool
                    result = measure_candidates(packed, n, context, configs=pool)
                    rule = choose(result.problem, context.capability, context.sm_count, context.name, only=pool).config
                    found.setdefault(result.key, []).append((result, rule))
                    measured += 1
    entries, gains = {}, {}
    for key, results in found.items():
        best = pick([t for t, _ in results], [rule for _, rule in results])
        if best is not None:
            entries[key] = entry_of(best)
            gains[key] = round(max(loss_of(t, rule) for t, rule in results), 3)
    losses = [loss_of(t, rule) - 1 for results in found.values() for t, rule in results]
    report: dict[str, Any] = {
        "format": 1, "device": context.name, "date": time.strftime("%Y-%m-%d"),
        "made_by": "python -m shflnb.tuning.make_table", "products_measured": measured,
        "rule_within_10_percent": round(float(np.mean([loss <= 0.1 for loss in losses])), 4) if losses else None,
        "entries": dict(sorted(entries.items())), "rule_over_best": dict(sorted(gains.items())),
    }  # fmt: skip
    name = context.name.lower().replace(" ", "-") + ".json"
    target = options.out or Path(__file__).parent / "data" / name
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(
        f"{measured} of {total} products measured in {time.perf_counter() - start:.0f} s; rule within 10 % of the "
        f"best in {report['rule_within_10_percent']}, worst {max(losses, default=0):.0%}; {len(entries)} in {target}\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
