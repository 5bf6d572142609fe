"""Kernel function -> PTX (Numba) -> cubin (ptxas, or a linker), with a disk cache; the only file that knows the
compiler.

Cache entries are keyed by the kernel's key (kernel, config, dtype), the architecture, the versions of the tools and a
fingerprint of the sources in this folder. They are sealed files (`disk_cache.py`): whatever happens to one means a
recompute, and any number of processes may build the same kernel at once.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import json
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ..errors import DeviceError, MissingDependencyError
from .disk_cache import cache_dir, read_sealed, write_sealed

__all__ = ["Cubin", "arch_of", "assembler", "build", "collector_paused", "compile_ptx", "find_tool",
           "ptxas_assemble"]  # fmt: skip

_MAGIC = b"shflnb-cubin-1\n"
_COMPILE_LOCK = threading.RLock()


@dataclass(frozen=True)
class Cubin:
    """An assembled kernel: the entry point's name and the machine code for one architecture."""

    name: str
    arch: str
    code: bytes
    from_cache: bool = False


def arch_of(capability: tuple[int, int], kernel: str) -> str:
    """Target of a kernel family on a device: "sm_90a" for the wgmma ones, plain "sm_XY" for the portable ones."""
    return f"sm_{capability[0]}{capability[1]}" + ("a" if kernel.endswith("sm90") else "")


@functools.cache
def _fingerprint() -> str:
    """Digest of the kernel sources and of the versions of every tool that shapes the machine code."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if not path.name.startswith(("spmm_cpu", "cpu_")):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    names = ("numba", "numba-cuda", "llvmlite", "cuda-core", "cuda-bindings", "nvidia-nvvm", "nvidia-nvjitlink",
             "nvidia-cuda-nvcc")  # fmt: skip
    for name in names:
        try:
            digest.update(f"{name}={metadata.version(name)};".encode())
        except metadata.PackageNotFoundError:
            digest.update(f"{name}=none;".encode())
    program = find_tool("ptxas")
    if program is not None:
        about = Path(program).stat()
        digest.update(f"{program} {about.st_size} {about.st_mtime_ns}".encode())
    return digest.hexdigest()


def _cache_path(key: str, arch: str) -> Path:
    digest = hashlib.sha256(f"{key}|{arch}|{_fingerprint()}".encode()).hexdigest()
    return cache_dir() / digest[:2] / f"{digest}.cubin"


def _read_cache(path: Path, arch: str) -> Cubin | None:
    body = read_sealed(path, _MAGIC)
    if body is None:
        return None
    head, _, code = body.partition(b"\n")
    try:
        name = json.loads(head)["name"]
    except (ValueError, TypeError, KeyError):
        return None
    return Cubin(name, arch, code, from_cache=True) if code.startswith(b"\x7fELF") and isinstance(name, str) else None


def _write_cache(path: Path, cubin: Cubin) -> None:
    write_sealed(path, _MAGIC, json.dumps({"name": cubin.name}).encode() + b"\n" + cubin.code)


def compile_ptx(
    kernel: Callable[..., Any], signature: Sequence[Any], arch: str, name: str, threads: int, blocks_per_sm: int = 1
) -> str:
    """PTX of a kernel function for `arch` ("sm_90a", ...), with the entry point renamed to `name`. Needs no GPU."""
    try:
        from numba import cuda
        from numba.cuda import types
    except ImportError as error:
        raise MissingDependencyError(
            "numba-cuda is needed to compile GPU kernels; install shflnb[cu13] (or shflnb[cu12])"
        ) from error
    digits = arch[3:].rstrip("a")
    capability: tuple[Any, ...] = (int(digits[:-1]), int(digits[-1]))
    if arch.endswith("a"):
        capability += ("a",)
    with _target_device(capability), collector_paused():
        ptx, _ = cuda.compile(
            kernel, types.void(*signature), cc=capability, device=False, abi="numba", fastmath=False,
            launch_bounds=(threads, blocks_per_sm),
        )  # fmt: skip
    match = re.search(r"\.entry\s+(\S+?)\(", ptx)
    if match is None:
        raise DeviceError(f"Numba gave no entry point for {name}; please report this with `shflnb doctor`")
    return ptx.replace(match.group(1), name)


@contextlib.contextmanager
def _target_device(capability: tuple[Any, ...]) -> Iterator[None]:
    """Have Numba compile device functions for the target instead of asking the current device, which may not exist.

    `cuda.compile` takes the target for the kernel, but numba-cuda 0.30 types calls to `@cuda.jit(device=True)`
    functions against `get_current_device()`, which creates a context or fails without a GPU.
    """
    from numba.cuda import dispatcher

    with _COMPILE_LOCK:
        original = dispatcher.get_current_device
        dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=capability)
        try:
            yield
        finally:
            dispatcher.get_current_device = original


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Without Python's garbage collection: what else the process has made decides how long that takes.

    With all of torch imported it is a tenth of the time of a compile.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def find_tool(tool: str) -> str | None:
    """Path of a CUDA program (ptxas, cuobjdump, nvdisasm): the installed wheels first, then PATH."""
    home = "nvidia-cuda-nvcc" if tool == "ptxas" else f"nvidia-cuda-{tool}"
    for distribution in (home, f"{home}-cu12"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            for file in metadata.files(distribution) or ():
                path = Path(str(file.locate()))
                if file.name == tool and path.exists():
                    return str(path)
    return shutil.which(tool)


def ptxas_assemble(ptx: str, arch: str) -> tuple[bytes, str]:
    """Assemble with ptxas: (cubin, the text of `ptxas -v`: registers, spills, stack). Needs no GPU."""
    program = find_tool("ptxas")
    if program is None:
        raise MissingDependencyError("ptxas was not found; install nvidia-cuda-nvcc or the CUDA toolkit")
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(ptx)
        done = subprocess.run(
            [program, f"-arch={arch}", "-v", str(source), "-o", str(target)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise DeviceError(f"ptxas refused the kernel for {arch}: {done.stderr.strip()[:2000]}")
        return target.read_bytes(), done.stderr


def _link(ptx: str, arch: str) -> bytes:
    """Assemble with cuda.core: nvJitLink, or the driver's own linker."""
    from cuda.core import Program, ProgramOptions

    return bytes(Program(ptx, "ptx", ProgramOptions(arch=arch)).compile("cubin").code)


def _assemble(ptx: str, arch: str) -> bytes:
    """The cubin, from ptxas; where it is missing or refuses (older than the PTX), from cuda.core's linker.

    ptxas first, because it sees the program whole. A linker assembles for linking, and then leaves `setmaxnreg` out:
    every warp keeps the registers it started with, and the widest kernels spill (nvJitLink 13.0, 2026-11-26). It is
    also ptxas whose code the tests inspect.
    """
    refused = "ptxas was not found"
    if find_tool("ptxas") is not None:
        try:
            return ptxas_assemble(ptx, arch)[0]
        except DeviceError as error:
            refused = str(error)[:500]
    try:
        return _link(ptx, arch)
    except Exception as error:  # cuda.core raises its own, the driver's and nvJitLink's exceptions: no common base
        raise DeviceError(
            f"the kernel could not be assembled for {arch}: {refused}; cuda.core: {type(error).__name__}: "
            f"{str(error)[:500]}; install the extra of your driver (shflnb[cu12] or shflnb[cu13]), or a CUDA toolkit "
            "whose ptxas is on PATH"
        ) from error


def assembler() -> dict[str, str | None]:
    """Which program assembles PTX here, tried on an empty kernel: {"used", "problem"}; for the doctor."""
    ptx = ".version 7.0\n.target sm_80\n.address_size 64\n.visible .entry empty()\n{ ret; }\n"
    problem = "ptxas was not found: kernels with 128 accumulators a thread will spill"
    if find_tool("ptxas") is not None:
        try:
            ptxas_assemble(ptx, "sm_80")
            return {"used": "ptxas", "problem": None}
        except DeviceError as error:
            problem = next(iter(str(error).splitlines()), "")
    try:
        _link(ptx, "sm_80")
    except Exception as error:  # noqa: BLE001 (see _assemble)
        first_line = next(iter(str(error).strip().splitlines()), "")
        return {"used": None, "problem": f"{problem}; cuda.core cannot: {type(error).__name__}: {first_line}"}
    return {"used": "cuda.core", "problem": problem}


def build(
    key: str,
    make: Callable[[], Callable[..., Any]],
    signature: Callable[[], Sequence[Any]],
    arch: str,
    name: str,
    threads: int,
    blocks_per_sm: int = 1,
    *,
    linked: bool = False,
) -> Cubin:
    """The cubin of a kernel: from the disk cache, or compiled and remembered.

    `make` and `signature` run only to compile. With `linked` cuda.core's linker assembles, also where there is a ptxas.
    """
    path = _cache_path(f"{key}|linked" if linked else key, arch)
    cubin = _read_cache(path, arch)
    if cubin is None:
        ptx = compile_ptx(make(), signature(), arch, name, threads, blocks_per_sm)
        cubin = Cubin(name, arch, _link(ptx, arch) if linked else _assemble(ptx, arch))
        _write_cache(path, cubin)
    return cubin
