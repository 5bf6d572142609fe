"""What `shflnb doctor` reports, for a bug report or a first look: versions, devices, caches, threads, extras."""

from __future__ import annotations

import os
import platform
import re
import sys
import time
from dataclasses import asdict
from importlib import metadata
from typing import TYPE_CHECKING, Any

import numpy as np

from ._version import __version__
from .formats import pack
from .kernels.compiler import assembler
from .kernels.cpu_pool import get_num_threads
from .kernels.disk_cache import cache_dir
from .machine import CudaDriver, cpu_features, cpu_name, find_cuda, usable_cores
from .ops import matmul

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["examine", "render"]

PACKAGES = (
    "numpy",
    "scipy",
    "numba",
    "llvmlite",
    "ml_dtypes",
    "safetensors",
    "threadpoolctl",
    "torch",
    "numba-cuda",
    "cuda-core",
    "cuda-bindings",
    "nvidia-nvvm",
    "nvidia-nvjitlink",
    "nvidia-cuda-nvcc",
    "matplotlib",
    "scikit-learn",
)
VARIABLES = (
    "SHFLNB_CACHE_DIR",
    "SHFLNB_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "NUMBA_DISABLE_JIT",
    "NUMBA_NUM_THREADS",
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
)


def examine() -> dict[str, Any]:
    """Everything the report says, as plain types that `json.dumps` takes."""
    cuda = find_cuda()
    return {
        "shflnb": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": {
            "name": cpu_name(),
            "usable_cores": usable_cores(),
            "features": cpu_features(),
        },
        "cuda": asdict(cuda),
        "packages": {name: _version(name) for name in PACKAGES},
        "extras": _extras(cuda),
        "assembler": assembler(),
        "product": _product(),
        "threads": get_num_threads(),
        "pools": _pools(),
        "caches": _caches(),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _extras(cuda: CudaDriver) -> dict[str, dict[str, Any]]:
    """Every extra of the installed shflnb: what of it is missing, and the line that installs it."""
    try:
        requirements = metadata.requires("shflnb") or []
    except metadata.PackageNotFoundError:
        return {}  # run from a source tree that was never installed
    wanted: dict[str, set[str]] = {}
    for requirement in requirements:
        extra = re.search(r"""extra == ["']([\w-]+)["']""", requirement)
        name = re.match(r"[\w.-]+", requirement)
        if extra and name and not (sys.platform == "darwin" and "darwin" in requirement):
            wanted.setdefault(extra.group(1), set()).add(name.group())
    report = {}
    for extra_name, names in sorted(wanted.items()):
        missing = sorted(name for name in names if _version(name) is None)
        report[extra_name] = {
            "installed": not missing,
            "missing": missing,
            "install": f"pip install 'shflnb[{extra_name}]'",
        }
    major = cuda.version[0] if cuda.version else None
    for extra_name, needed in (("cu12", 12), ("cu13", 13)):
        if extra_name in report:
            # A newer driver runs what an older toolkit wrote, never the other way round.
            report[extra_name]["fits_driver"] = major is not None and needed <= major
    return report


def _product() -> dict[str, Any]:
    """Multiply once on the CPU, small but through every part of it, and say whether the result is right."""
    start = time.perf_counter()
    w = np.diag(np.arange(1, 65, dtype=np.float32))
    x = np.arange(64 * 3, dtype=np.float32).reshape(64, 3)
    y = matmul(pack(w, block=(64, 64), row_perm=np.arange(64), fill_in_warning=None), x)
    return {"right": bool(np.array_equal(y, w @ x)), "first_call_s": round(time.perf_counter() - start, 3)}


def _pools() -> list[dict[str, Any]]:
    """The loaded BLAS libraries and thread pools of others; the CPU kernels have their own threads."""
    from threadpoolctl import threadpool_info

    keys = ("user_api", "internal_api", "version", "num_threads", "threading_layer", "architecture")
    return [{key: pool.get(key) for key in keys} for pool in threadpool_info()]


def _caches() -> dict[str, dict[str, Any]]:
    report = {}
    for name, path in (("kernels", cache_dir()),):
        sizes = [file.stat().st_size for file in path.rglob("*") if file.is_file()] if path.is_dir() else []
        parent = next(p for p in (path, *path.parents) if p.exists())
        report[name] = {
            "path": str(path),
            "files": len(sizes),
            "bytes": sum(sizes),
            "writable": os.access(parent, os.W_OK),
        }
    return report


def render(report: dict[str, Any], console: Console) -> None:
    """Print what `examine` found, for people."""
    sections: dict[str, list[tuple[str, str]]] = {
        "shflnb": _machine_pairs(report),
        "Packages": [(name, version or "-") for name, version in report["packages"].items()],
        "Extras": [(name, _extra_text(extra)) for name, extra in report["extras"].items()],
        "Libraries with threads": [
            (pool["user_api"], " ".join(f"{key}={value}" for key, value in pool.items() if key != "user_api" and value))
            for pool in report["pools"]
        ],
        "Caches": [
            (name, f"{c['path']}: {c['files']} files, {c['bytes']:,} bytes{'' if c['writable'] else ', NOT writable'}")
            for name, c in report["caches"].items()
        ],
        "Environment": list(report["environment"].items()),
    }
    for title, pairs in sections.items():
        if not pairs:
            continue
        console.print(title, style="bold")
        width = max(len(name) for name, _ in pairs)
        for name, text in pairs:
            console.print(f"  {name:<{width}}  {text}", soft_wrap=True)


def _machine_pairs(report: dict[str, Any]) -> list[tuple[str, str]]:
    cpu, cuda, product = report["cpu"], report["cuda"], report["product"]
    features = " ".join(cpu["features"]) or "features unknown"
    pairs = [
        ("shflnb", report["shflnb"]),
        ("Python", f"{report['python']} on {report['platform']}"),
        ("CPU", f"{cpu['name']}, {cpu['usable_cores']} usable cores ({features})"),
        (
            "product",
            f"{'right' if product['right'] else 'WRONG'} on the CPU with up to {report['threads']} threads, "
            f"first call {product['first_call_s']} s",
        ),
        ("CUDA driver", ".".join(map(str, cuda["version"])) if cuda["version"] else "none"),
    ]
    made = report["assembler"]
    pairs.append(
        (
            "GPU code",
            f"assembled by {made['used'] or 'nothing here'}" + (f" ({made['problem']})" if made["problem"] else ""),
        )
    )
    for number, gpu in enumerate(cuda["devices"]):
        capability = ".".join(map(str, gpu["capability"]))
        memory = f"{gpu['memory'] / 2**30:.0f} GiB"
        pairs.append(
            (f"GPU {number}", f"{gpu['name']}, capability {capability}, {gpu['multiprocessors']} SMs, {memory}")
        )
    if cuda["problem"]:
        pairs.append(("GPU", cuda["problem"]))
    return pairs


def _extra_text(extra: dict[str, Any]) -> str:
    if extra["installed"]:
        return "installed"
    if extra.get("fits_driver") is False:
        return "not installed (no driver here that could use it)"
    return f"not installed; {extra['install']} adds {', '.join(extra['missing'])}"
