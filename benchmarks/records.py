"""What a benchmark leaves behind: a CSV that grows row by row, and a JSON of the machine. And kernels built ahead."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import json
import os
import pickle
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import shflnb
from shflnb.machine import cpu_features, cpu_name, find_cuda, usable_cores

__all__ = ["RESULTS", "Budget", "Results", "machine", "prebuild", "results_name", "write_machine"]

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("numpy", "torch", "triton", "numba", "numba-cuda", "cuda-core", "cuda-bindings", "cupy-cuda13x", "scipy")


def prebuild(configs: Iterable[Any], capability: tuple[int, int]) -> float:
    """Compile kernels into the disk cache, on all cores but two, in processes without torch; the seconds it took.

    A kernel that cannot be built is named; the launch that needs it will raise the same error with its traceback.
    """
    from shflnb.kernels.compiler import arch_of

    start = time.perf_counter()
    tasks = [(config, arch_of(capability, config.kernel)) for config in sorted(set(configs), key=repr)]
    program = Path(__file__).parent / "build_kernels.py"
    workers = str(max(1, min(len(tasks), usable_cores() - 2)))
    done = subprocess.run([sys.executable, str(program), workers], input=pickle.dumps(tasks), check=False)
    if done.returncode:
        print(f"  building ahead ended with code {done.returncode}; kernels are built when needed", file=sys.stderr)
    return time.perf_counter() - start


class Budget:
    """Seconds that a run may take; what does not fit is left out and named."""

    def __init__(self, seconds: float) -> None:
        self.start, self.seconds = time.perf_counter(), seconds

    @property
    def used_s(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.start

    @property
    def is_spent(self) -> bool:
        """Whether nothing more should be begun."""
        return self.used_s >= self.seconds


class Results:
    """A CSV that grows row by row; columns are given once, a row may leave some empty."""

    def __init__(self, path: Path, fields: Sequence[str], *, append: bool = False) -> None:
        self.path, self.fields, self.rows = path, list(fields), 0
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = not (append and path.exists())
        self._file = path.open("w" if fresh else "a", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, self.fields, lineterminator="\n")
        if fresh:
            self._writer.writeheader()

    def add(self, row: Mapping[str, Any]) -> None:
        """Write one row now; unknown columns are an error."""
        self._writer.writerow(row)
        self._file.flush()
        self.rows += 1

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def results_name(device: str) -> str:
    """Name of the machine in file names: "nvidia-h200", or the processor's."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else cpu_name()
    return re.sub(r"[^a-z0-9]+", "-", name.lower().split("@")[0]).strip("-")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _nvidia_smi() -> dict[str, str]:
    keys = (
        "driver_version",
        "clocks.sm",
        "clocks.mem",
        "clocks.max.sm",
        "power.draw",
        "power.limit",
        "temperature.gpu",
    )
    try:
        done = subprocess.run(["nvidia-smi", f"--query-gpu={','.join(keys)}", "--format=csv,noheader", "--id=0"],
                              capture_output=True, text=True, timeout=20, check=True)  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(keys, (part.strip() for part in done.stdout.strip().split(",")), strict=False))


def machine(device: str) -> dict[str, Any]:
    """Everything about the machine that a reader of the figures may ask for, as plain types."""
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "shflnb": shflnb.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": {"name": cpu_name(), "cores": usable_cores(), "features": cpu_features()},
        "packages": {name: _version(name) for name in PACKAGES},
        # without the folders of the machine that it ran on
        "command": " ".join(Path(word).name if word.startswith("/") else word for word in sys.argv),
    }
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        driver = find_cuda()
        found["gpu"] = {
            "name": properties.name, "capability": [properties.major, properties.minor],
            "multiprocessors": properties.multi_processor_count, "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size, "cuda_driver": list(driver.version or ()),
            "cuda_torch": torch.version.cuda, "nvidia_smi": _nvidia_smi(),
        }  # fmt: skip
    else:
        found["threads"] = torch.get_num_threads()
        found["load"] = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return found


def write_machine(path: Path, before: Mapping[str, Any], device: str, seconds: float) -> None:
    """The JSON beside a CSV: the machine before and, for clocks and power, after the run."""
    report = dict(before)
    report["seconds"] = round(seconds, 1)
    if device.startswith("cuda"):
        report["nvidia_smi_after"] = _nvidia_smi()
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
