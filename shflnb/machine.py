"""What hardware this machine has: processor and GPUs.

Nothing here needs a package, and nothing creates a CUDA context: the driver is asked through its C interface, so a GPU
is seen even where what is needed to use it is not installed.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["CudaDevice", "CudaDriver", "cpu_features", "cpu_name", "find_cuda", "usable_cores"]

CPU_FEATURES = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "sve")

# CUdevice_attribute, CUDA driver API.
_MULTIPROCESSOR_COUNT, _CAPABILITY_MAJOR, _CAPABILITY_MINOR = 16, 75, 76


@dataclass(frozen=True)
class CudaDevice:
    """One GPU as its driver describes it; `memory` in bytes."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    memory: int


@dataclass(frozen=True)
class CudaDriver:
    """The CUDA driver of this machine: the newest CUDA version it runs, its devices, and why there are none."""

    version: tuple[int, int] | None
    devices: tuple[CudaDevice, ...]
    problem: str | None


def find_cuda() -> CudaDriver:
    """Ask the driver which GPUs there are; needs no CUDA package and creates no context."""
    library = {"win32": "nvcuda.dll", "darwin": None}.get(sys.platform, "libcuda.so.1")
    if library is None:
        return CudaDriver(None, (), "CUDA does not exist for macOS")
    try:
        driver = ctypes.CDLL(library)
    except OSError:
        return CudaDriver(None, (), f"no CUDA driver ({library} is not installed)")
    try:
        return _ask_driver(driver)
    except _DriverError as error:
        return CudaDriver(None, (), str(error))


class _DriverError(Exception):
    """A call to the CUDA driver returned an error code."""


def _ask_driver(driver: Any) -> CudaDriver:
    def integer(function: str, *arguments: int) -> int:
        value = ctypes.c_int()
        code = getattr(driver, function)(ctypes.byref(value), *(ctypes.c_int(a) for a in arguments))
        if code:
            raise _DriverError(f"the CUDA driver is installed, but {function} failed with code {code}")
        return value.value

    number = integer("cuDriverGetVersion")
    version = (number // 1000, number % 1000 // 10)
    code = driver.cuInit(ctypes.c_uint(0))
    if code:
        return CudaDriver(
            version, (), f"a driver for CUDA {version[0]}.{version[1]}, but no usable GPU (cuInit: {code})"
        )
    devices = []
    for ordinal in range(integer("cuDeviceGetCount")):
        device = integer("cuDeviceGet", ordinal)
        text, memory = ctypes.create_string_buffer(256), ctypes.c_size_t()
        driver.cuDeviceGetName(text, ctypes.c_int(256), ctypes.c_int(device))
        driver.cuDeviceTotalMem_v2(ctypes.byref(memory), ctypes.c_int(device))
        major, minor, processors = (
            integer("cuDeviceGetAttribute", attribute, device)
            for attribute in (_CAPABILITY_MAJOR, _CAPABILITY_MINOR, _MULTIPROCESSOR_COUNT)
        )
        devices.append(CudaDevice(text.value.decode(errors="replace"), (major, minor), processors, memory.value))
    return CudaDriver(version, tuple(devices), None if devices else "a CUDA driver, but no GPU")


def usable_cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """Which of the instruction sets that matter here the processor has; empty where the system does not say."""
    present = (_cpuinfo("flags") or _cpuinfo("Features")).split()
    return [name for name in CPU_FEATURES if name in present]


def _cpuinfo(key: str) -> str:
    """The first value of `key` in Linux's /proc/cpuinfo, or "" elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    found = re.search(rf"^{key}\s*: (.*)$", text, flags=re.MULTILINE)
    return found.group(1).strip() if found else ""
