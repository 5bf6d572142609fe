"""What limits a product, by the hardware's counters.

    ncu --csv --clock-control none --page details --section SpeedOfLight --section MemoryWorkloadAnalysis \\
        --section SchedulerStats -k regex:shflbw python benchmarks/profile_spmm.py > ncu.csv
    python benchmarks/profile_spmm.py --summarise ncu.csv --out DIR      writes DIR/<gpu>.ncu.csv

The first form runs each product of `PRODUCTS` once under Nsight Compute; the second keeps the counters that matter.
"""

from __future__ import annotations

import argparse
import csv
import datetime
from pathlib import Path

from cases import Case, Shape

PRODUCTS = [
    Case(Shape("square-4096", 4096, 4096, 4096), 0.75, 32),
    Case(Shape("square-4096", 4096, 4096, 4096), 0.75, 64),
    Case(Shape("square-4096", 4096, 4096, 4096), 0.75, 128),
    Case(Shape("transformer-big/qkvo", 1024, 1024, 960), 0.75, 64),
    Case(Shape("transformer-big/fc2", 1024, 4096, 1056), 0.75, 64),
]
METRICS = {
    "Duration": "duration", "SM Frequency": "sm_frequency", "L2 Cache Throughput": "l2_percent",
    "L1/TEX Cache Throughput": "l1_percent", "Compute (SM) Throughput": "sm_percent", "DRAM Throughput": "dram_percent",
    "Issued Warp Per Scheduler": "issued_per_cycle", "L2 Hit Rate": "l2_hit_percent",
}  # fmt: skip


def run() -> None:
    """Launch every product once."""
    import torch
    from matrices import random_packed, random_tensor

    from shflnb.kernels.spmm_device import device_matmul

    for case in PRODUCTS:
        shape = case.shape
        packed = random_packed(shape.m, shape.k, case.v, case.sparsity)
        device_matmul(packed, random_tensor(shape.k, shape.n, "float16", "cuda", 0))
    torch.cuda.synchronize()


def summarise(source: Path, folder: Path) -> Path:
    """One row a product, in the order of `PRODUCTS`, from Nsight Compute's CSV."""
    lines = [line for line in source.read_text().splitlines() if line.startswith('"')]
    found: dict[str, dict[str, str]] = {}
    for row in csv.DictReader(lines):
        name = METRICS.get(row["Metric Name"])
        if name:
            unit = {"ms": 1e3, "ns": 1e-3, "Mhz": 1e-3}.get(row["Metric Unit"], 1.0)
            entry = found.setdefault(row["ID"], {"kernel": row["Kernel Name"]})
            entry[name] = f"{float(row['Metric Value'].replace(',', '')) * unit:.4g}"
    import torch

    gpu = torch.cuda.get_device_name().lower().replace(" ", "-")
    target = folder / f"{gpu}.ncu.csv"
    fields = ["gpu", "date", "m", "k", "n", "sparsity", "v", "kernel", *METRICS.values()]
    with target.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        for case, entry in zip(PRODUCTS, found.values(), strict=True):
            shape = case.shape
            about = {"gpu": gpu, "date": datetime.date.today().isoformat(), "m": shape.m, "k": shape.k, "n": shape.n}
            writer.writerow({**about, "sparsity": case.sparsity, "v": case.v, **entry})
    return target


def main() -> None:
    """Run the products, or summarise what Nsight Compute said of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--summarise", type=Path, help="Nsight Compute's CSV")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    if options.summarise:
        print(summarise(options.summarise, options.out))
    else:
        run()


if __name__ == "__main__":
    main()
