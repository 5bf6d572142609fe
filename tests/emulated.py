"""A GPU that `ptx_emulator.py` plays: `device_matmul` and `device_linear` run on it from the checks to the last store.

It takes the place of `launch.DeviceContext`; arrays are `EmulatedArray`s, records of an address in its memory.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ptx_emulator import Machine, Program

from shflnb.arrays import DTYPES
from shflnb.kernels import compiler, device_call, launch, spmm_device
from shflnb.kernels.config import smem_limit
from shflnb.kernels.launch import KernelSpec, LoadedKernel
from shflnb.kernels.views import DeviceView

GAP = 3  # values between rows that belong to nobody, beyond what alignment needs


@dataclass(frozen=True)
class EmulatedArray(DeviceView):
    """A strided array in the memory of an `EmulatedDevice`."""

    requires_grad: bool = False

    def reshape(self, *shape: int) -> EmulatedArray:
        """The same array: what the products reshape is a matrix already."""
        assert len(self.shape) == 2 and shape in ((-1, self.shape[1]), self.shape)
        return self


class EmulatedKernel(LoadedKernel):
    """A kernel as the emulator runs it; `kernel` is a `Program`."""

    def config(self, grid: int | tuple[int, ...], *, cluster: int = 1, smem_bytes: int | None = None,
               is_chained: bool = False) -> Any:  # fmt: skip
        """A launch configuration without the driver, which cuda.core asks about clusters."""
        grid = (grid, 1, 1) if isinstance(grid, int) else (*grid, 1, 1)[:3]
        smem = self.spec.smem_bytes if smem_bytes is None else smem_bytes
        assert min(grid) > 0 and grid[2] == 1 and smem <= self.context.smem_limit
        return SimpleNamespace(grid=grid, cluster=cluster, smem=smem)

    def max_clusters(self, cluster: int) -> int:
        """Clusters of this many blocks that run at once."""
        return self.context.sm_count // cluster


class EmulatedDevice:
    """What the code of `shflnb.kernels` needs of a `DeviceContext`."""

    has_chaining, ordinal, name, is_only_device = True, 0, "emulated", True
    _programs: dict[tuple[str, str], Program] = {}  # noqa: RUF012 (of all devices: compiling takes seconds)

    def __init__(self, seed: int = 0, *, capability: tuple[int, int] = (9, 0), sm_count: int = 3) -> None:
        self.machine = Machine(1 << 23, seed)
        self.capability, self.sm_count = capability, sm_count
        self.has_chaining = capability[0] >= 9
        self.smem_limit, self.l2_bytes = smem_limit(capability), 50 << 20
        self.launched: list[str] = []
        self.latest: dict[int, Any] = {}
        self.transposes: dict[Any, Any] = {}
        ok = type("Ok", (), {"__int__": lambda self: 0, "name": "CUDA_SUCCESS"})()
        self.driver = SimpleNamespace(
            cuMemAlloc=lambda count: (ok, self.machine.reserve(count)), cuMemFree=lambda pointer: (ok,),
            cuMemcpyHtoD=lambda to, source, count: self._fill(ok, to, source, count),
            cuStreamSynchronize=lambda stream: (ok,), cuStreamIsCapturing=lambda stream: (ok, 0),
            CUstream=lambda handle: handle, CU_STREAM_LEGACY=1,
            CUstreamCaptureMode=SimpleNamespace(CU_STREAM_CAPTURE_MODE_RELAXED="relaxed"),
            cuThreadExchangeStreamCaptureMode=lambda mode: (ok, self._exchange(mode)),
        )  # fmt: skip
        self.capture_mode = "global"

    def _exchange(self, mode: str) -> str:
        before, self.capture_mode = self.capture_mode, mode
        return before

    def _fill(self, ok: Any, to: int, source: int, count: int) -> tuple[Any]:
        raw = np.frombuffer((ctypes.c_uint8 * count).from_address(source), np.uint8)
        at = to - self.machine.memory.base
        self.machine.memory.data[at : at + count] = raw
        self.machine.memory.written[at : at + count] = True
        return (ok,)

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """There is only one."""
        yield

    def refuse_capture(self, stream: int, what: str) -> None:
        """Nothing is ever captured."""

    def arch(self, spec: KernelSpec) -> str:
        """The target of a kernel."""
        return compiler.arch_of(self.capability, spec.family)

    def kernel(self, spec: KernelSpec, stream: int) -> EmulatedKernel:
        """The kernel of a spec; compiled once in this process."""
        key = (spec.key, self.arch(spec))
        if key not in self._programs:
            ptx = compiler.compile_ptx(
                spec.make(), spec.signature(), key[1], spec.name, spec.threads, spec.blocks_per_sm
            )
            self._programs[key] = Program(ptx)
        return EmulatedKernel(spec, self._programs[key], self, 0, 0, True)  # type: ignore[arg-type]

    def launch(self, stream: int, config: Any, kernel: EmulatedKernel, *arguments: int) -> None:
        """Run a kernel to its end."""
        wide, high, _ = config.grid
        self.launched.append(kernel.spec.name)
        self.machine.run(kernel.kernel, grid=(wide * config.cluster, high), threads=kernel.spec.threads,
                         smem=config.smem, cluster=config.cluster, args=arguments)  # fmt: skip

    # --- arrays ------------------------------------------------------------------------------------------------------
    def empty(self, rows: int, cols: int, dtype: str, *, pitch: int | None = None, shift: int = 0) -> EmulatedArray:
        """A matrix whose rows are `pitch` values apart (tight without); `shift` values behind an aligned address."""
        size = np.dtype(DTYPES[dtype]).itemsize
        pitch = cols if pitch is None else pitch
        address = self.machine.reserve((rows * pitch + shift) * size) + shift * size
        start = address - self.machine.memory.base
        room = self.machine.memory.open[start : start + rows * pitch * size].reshape(rows, pitch * size)
        room[:, cols * size :] = False  # what lies between the rows belongs to nobody
        self.machine.memory.open[start - shift * size : start] = False
        return EmulatedArray(address, (rows, cols), (pitch, 1), dtype, 0, None)

    def array(self, a: np.ndarray, *, pitch: int | None = None, shift: int = 0) -> EmulatedArray:
        """A copy of a vector or matrix."""
        matrix = np.atleast_2d(a)
        made = self.empty(*matrix.shape, str(a.dtype), pitch=pitch, shift=shift)
        rows = self._places(made)
        self.machine.memory.data[rows] = np.ascontiguousarray(matrix).view(np.uint8)
        self.machine.memory.written[rows] = True
        return made if a.ndim == 2 else EmulatedArray(made.address, a.shape, (1,), made.dtype, 0, None)

    def _places(self, view: DeviceView) -> np.ndarray:
        size = np.dtype(DTYPES[view.dtype]).itemsize
        start = view.address - self.machine.memory.base
        rows, cols = view.shape
        return start + (np.arange(rows) * view.strides[0] * size)[:, None] + np.arange(cols * size)

    def read(self, view: DeviceView) -> np.ndarray:
        """A copy on the host; every value must have been written."""
        if view.strides[1] != 1:
            return self.read(turned(view)).T
        places = self._places(view)
        unwritten = int((~self.machine.memory.written[places]).sum())
        assert unwritten == 0, f"{unwritten} bytes of the result were never written"
        return np.ascontiguousarray(self.machine.memory.data[places]).view(DTYPES[view.dtype])


def turned(view: DeviceView) -> EmulatedArray:
    """The transposed view of a matrix."""
    return EmulatedArray(view.address, view.shape[::-1], view.strides[::-1], view.dtype, 0, None)


def install(monkeypatch: pytest.MonkeyPatch, device: EmulatedDevice) -> EmulatedDevice:
    """Let the device take the place of GPU 0."""

    def new_matrix(rows: int, cols: int, like: Any, dtype: str) -> EmulatedArray:
        return device.empty(rows, cols, dtype)

    monkeypatch.setattr(launch, "_CONTEXTS", {0: device})
    for module in (device_call, spmm_device):
        monkeypatch.setattr(module, "new_matrix", new_matrix)
    return device
