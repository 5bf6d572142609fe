"""Devices, streams, device memory and kernel launches; the only file that knows cuda.core.

Everything here works on plain addresses and sizes: what an array is, and whose stream is current, is the business of
`views.py`.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import CaptureError, DeviceError, MissingDependencyError
from . import compiler
from .config import smem_limit

__all__ = ["DeviceContext", "DeviceMemory", "KernelSpec", "LoadedKernel", "capture_id", "device_context",
           "is_capturing"]  # fmt: skip


@dataclass(frozen=True)
class KernelSpec:
    """What is needed to build a kernel: a key (names the specialisation), its factory, its arguments and its size."""

    key: str
    name: str
    family: str
    """Which kernel it is: decides the target ("sm90" and "skinny_sm90" are assembled for sm_90a, the rest
    for the device's own sm_XY)."""
    make: Callable[[], Callable[..., Any]]
    arguments: int
    threads: int
    smem_bytes: int = 0
    blocks_per_sm: int = 1

    def signature(self) -> Sequence[Any]:
        """Numba types of the arguments: all of them are uint64, so that a launch can pass plain Python ints."""
        from numba.cuda import types

        return [types.uint64] * self.arguments

    def build(self, arch: str, *, linked: bool = False) -> compiler.Cubin:
        """The kernel's machine code, from the disk cache or compiled now; with `linked` from the linker, not ptxas."""
        return compiler.build(
            self.key, self.make, self.signature, arch, self.name, self.threads, self.blocks_per_sm, linked=linked
        )


@dataclass(frozen=True)
class LoadedKernel:
    """A kernel on a device, ready to launch."""

    spec: KernelSpec
    kernel: Any
    context: DeviceContext
    registers: int
    local_bytes: int
    from_cache: bool

    def config(
        self, grid: int | tuple[int, ...], *, cluster: int = 1, smem_bytes: int | None = None, is_chained: bool = False
    ) -> Any:  # fmt: skip
        """A launch configuration for this many blocks; keep it, it costs as much as the launch.

        With `cluster` above 1 the grid counts clusters of that many blocks; `is_chained` starts the kernel before the
        one ahead of it in the stream is done (programmatic launch), which the kernel must then wait for by itself.
        """
        from cuda.core import LaunchConfig

        extra: dict[str, Any] = {"cluster": cluster} if cluster > 1 else {}
        if is_chained:
            extra["programmatic_stream_serialization"] = True
        size = self.spec.smem_bytes if smem_bytes is None else smem_bytes
        return LaunchConfig(grid=grid, block=self.spec.threads, shmem_size=size, **extra)

    def max_clusters(self, cluster: int) -> int:
        """Clusters of this many blocks that the device holds at once, with the spec's shared memory."""
        stream = self.context.stream(0)  # the default stream: which one makes no difference to the answer
        return int(self.kernel.occupancy.max_active_clusters(self.config(1, cluster=cluster), stream=stream))


class DeviceMemory:
    """Bytes on a device that hold the copies of some host arrays, freed when this object goes."""

    def __init__(self, context: DeviceContext, arrays: Sequence[np.ndarray]) -> None:
        offsets, total = [], 0
        for a in arrays:
            offsets.append(total)
            total += -(-a.nbytes // 256) * 256
        driver = context.driver
        self._relaxed = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        self._exchange = driver.cuThreadExchangeStreamCaptureMode
        # memory of ours is nothing that a graph captured meanwhile, on another stream or thread, could depend on; said
        # aloud, or having it and giving it back spoils that capture
        _, before = self._exchange(self._relaxed)
        try:
            error, pointer = driver.cuMemAlloc(max(total, 256))
            if int(error):
                raise DeviceError(
                    f"{total / 2**20:.0f} MiB for a packed matrix could not be allocated on {context.name} "
                    f"({error.name})"
                )
            self._free, self._pointer = driver.cuMemFree, pointer
            self.nbytes = total
            self.addresses = [int(pointer) + o for o in offsets]
            for a, address in zip(arrays, self.addresses, strict=True):
                if a.nbytes:
                    _check(
                        driver.cuMemcpyHtoD(address, np.ascontiguousarray(a).ctypes.data, a.nbytes),
                        "copy to the device",
                    )
            # a copy from pageable memory may still be on its way when the call returns, and kernels on other streams
            # do not wait for it
            _check(driver.cuStreamSynchronize(driver.CUstream(driver.CU_STREAM_LEGACY)), "copy to the device")
        finally:
            self._return_to(before)

    def _return_to(self, mode: Any) -> None:
        if mode is not None:  # as after a refusal of the driver
            self._exchange(mode)

    def __del__(self) -> None:
        pointer, self._pointer = getattr(self, "_pointer", None), None
        if pointer is not None:
            _, before = self._exchange(self._relaxed)
            self._free(pointer)  # at interpreter exit the driver may already refuse; there is nothing left to free then
            self._return_to(before)


def _check(result: Any, what: str) -> Any:
    error = result[0]
    if int(error):
        raise DeviceError(
            f"{what} failed with {getattr(error, 'name', error)}; run `shflnb doctor` and report its output"
        )
    return result[1] if len(result) > 1 else None


class DeviceContext:
    """One CUDA device: its properties, its loaded kernels and its stream objects. Get one from `device_context`."""

    def __init__(self, ordinal: int) -> None:
        try:
            from cuda.bindings import driver
            from cuda.core import Device, launch
        except ImportError as error:
            raise MissingDependencyError(
                "cuda.core is needed to run on a GPU; install shflnb[cu13] (or shflnb[cu12] for a CUDA 12 driver)"
            ) from error
        self.driver = driver
        self.ordinal = ordinal
        self._launch = launch
        self.device = Device(ordinal)
        self.is_only_device = int(driver.cuDeviceGetCount()[1]) == 1
        self.make_current()
        self.name = str(self.device.name)
        capability = self.device.compute_capability
        self.capability = (int(capability[0]), int(capability[1]))
        self.sm_count = int(self.device.properties.multiprocessor_count)
        self.smem_limit = smem_limit(self.capability)
        self.l2_bytes = int(self.device.properties.l2_cache_size)
        self.has_chaining = self.capability[0] >= 9
        """Whether a kernel may be launched before the one ahead of it is done, and wait for it by itself."""
        self.latest: dict[int, Any] = {}
        """By stream, a weak reference to the last product with few columns (`skinny_ahead.py`)."""
        self.transposes: dict[Any, Any] = {}
        """Launches of the transpose kernel, by size (`spmm_plan.py`)."""
        self._kernels: dict[str, LoadedKernel] = {}
        self._streams: dict[int, Any] = {}
        self._lock = threading.Lock()

    def make_current(self) -> None:
        """Make this device's primary context current in the calling thread."""
        self.device.set_current()
        _THREAD.ordinal = self.ordinal

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Make this device current, and the caller's device again afterwards."""
        if self.is_only_device:
            if getattr(_THREAD, "ordinal", None) is None:
                self.make_current()
            yield
            return
        error, before = self.driver.cuCtxGetCurrent()
        self.make_current()
        try:
            yield
        finally:
            if not int(error) and int(before):
                self.driver.cuCtxSetCurrent(before)

    def launch(self, stream: int, config: Any, kernel: LoadedKernel, *arguments: int) -> None:
        """Enqueue a kernel on a stream, given by its raw handle; arguments are addresses and sizes as Python ints."""
        if self.is_only_device and getattr(_THREAD, "ordinal", None) is not None:
            self._launch(self._streams.get(stream) or self.stream(stream), config, kernel.kernel, *arguments)
        else:
            with self.current():
                self._launch(self.stream(stream), config, kernel.kernel, *arguments)

    def stream(self, handle: int) -> Any:
        """The cuda.core stream of a raw handle; made once, since making one costs 5 us."""
        found = self._streams.get(handle)
        if found is None:
            found = self._streams[handle] = self.device.create_stream(_StreamHandle(handle))
        return found

    def kernel(self, spec: KernelSpec, stream: int) -> LoadedKernel:
        """The loaded kernel of a spec; built and loaded at the first call, which raises `CaptureError` in a capture."""
        found = self._kernels.get(spec.key)
        if found is None:
            self.refuse_capture(stream, f"compile or load the kernel {spec.name}")
            with self._lock:
                found = self._kernels.get(spec.key)
                if found is None:
                    found = self._kernels[spec.key] = self._load(spec)
        return found

    def refuse_capture(self, stream: int, what: str) -> None:
        """Raise `CaptureError` when `stream` is being captured into a graph: `what` cannot be done then."""
        if is_capturing(self, stream):
            raise CaptureError(
                f"the stream is being captured into a CUDA graph, and this call would have to {what}; "
                "make the same call once before the capture to warm it up"
            )

    def arch(self, spec: KernelSpec) -> str:
        """The target a spec is assembled for on this device."""
        return compiler.arch_of(self.capability, spec.family)

    def _load(self, spec: KernelSpec) -> LoadedKernel:
        if spec.smem_bytes > self.smem_limit:
            raise DeviceError(
                f"{spec.name} needs {spec.smem_bytes} bytes of shared memory; "
                f"{self.name} gives a block {self.smem_limit}"
            )
        cubin, kernel = load_cubin(spec, self.arch(spec))
        driver, device = self.driver, self.driver.CUdevice(self.ordinal)
        handle = driver.CUkernel(int(kernel.handle))
        attribute = driver.CUfunction_attribute
        if spec.smem_bytes > 48 * 1024:
            _check(
                driver.cuKernelSetAttribute(
                    attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, spec.smem_bytes, handle, device
                ),
                "raising the shared-memory limit",
            )
        registers = _check(driver.cuKernelGetAttribute(attribute.CU_FUNC_ATTRIBUTE_NUM_REGS, handle, device), "a query")
        local = _check(
            driver.cuKernelGetAttribute(attribute.CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES, handle, device), "a query"
        )
        return LoadedKernel(spec, kernel, self, int(registers), int(local), cubin.from_cache)


def load_cubin(spec: KernelSpec, arch: str) -> tuple[compiler.Cubin, Any]:
    """A kernel's machine code, and the kernel of it that cuda.core has loaded into the current context."""
    from cuda.core import ObjectCode

    cubin = spec.build(arch)
    try:
        return cubin, ObjectCode.from_cubin(cubin.code).get_kernel(cubin.name)
    except Exception as error:  # noqa: BLE001 (cuda.core and the driver have no common base)
        # a ptxas of another CUDA release, found on PATH, may be newer than the driver; the linker is the driver's age
        try:
            cubin = spec.build(arch, linked=True)
            return cubin, ObjectCode.from_cubin(cubin.code).get_kernel(cubin.name)
        except Exception as second:  # noqa: BLE001
            raise DeviceError(
                f"{spec.name} could not be loaded: {type(error).__name__}: {str(error)[:300]}; linked anew: "
                f"{str(second)[:300]}; install the extra of your driver (shflnb[cu12] or shflnb[cu13])"
            ) from error


class _StreamHandle:
    """A raw stream handle as an object that cuda.core takes for a stream."""

    def __init__(self, handle: int) -> None:
        self.handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return (0, self.handle)


_THREAD = threading.local()
"""`ordinal`: the device this thread has made current, on machines with one device; a new thread has no context yet."""

_CONTEXTS: dict[int, DeviceContext] = {}
_CONTEXTS_LOCK = threading.Lock()


def device_context(ordinal: int) -> DeviceContext:
    """The one `DeviceContext` of a device; made at the first call."""
    found = _CONTEXTS.get(ordinal)
    if found is None:
        with _CONTEXTS_LOCK:
            found = _CONTEXTS.get(ordinal)
            if found is None:
                found = _CONTEXTS[ordinal] = DeviceContext(ordinal)
    return found


def is_capturing(context: DeviceContext, stream: int) -> bool:
    """Whether a stream is being captured into a graph."""
    driver = context.driver
    error, status = driver.cuStreamIsCapturing(driver.CUstream(stream))
    return int(error) == 0 and int(status) != 0


def capture_id(context: DeviceContext, stream: int) -> int:
    """The number of the capture that a stream is in, another one for each; 0 outside of captures."""
    driver = context.driver
    error, status, number, *_ = driver.cuStreamGetCaptureInfo(driver.CUstream(stream))
    return int(number) if int(error) == 0 and int(status) != 0 else 0
