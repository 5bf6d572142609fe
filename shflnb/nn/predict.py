"""Times from a roofline, for a GPU that is not there: arithmetic, memory and launch, whichever is longest.

The rates were measured on that GPU (2026-11), they are not from its data sheet. A prediction is
always called one: `Report.basis` says so.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import DeviceError

__all__ = ["Gpu", "known_gpus", "predicted_us"]


@dataclass(frozen=True)
class Gpu:
    """Rates of one GPU for 16-bit products.

    Attributes
    ----------
    name : str
    dense_tflops : float
        What the dense library reaches on large layers.
    gather_tbs : float
        Bytes per second (1e12) that all multiprocessors together gather from the cache.
    memory_tbs : float
        Streaming memory bandwidth (1e12 bytes per second).
    launch_us : float
        Least time of a kernel in a stream of kernels.
    dense_call_us, sparse_call_us : float
        Host time of one eager call.
    """

    name: str
    dense_tflops: float
    gather_tbs: float
    memory_tbs: float
    launch_us: float
    dense_call_us: float
    sparse_call_us: float


_GPUS = (Gpu("NVIDIA H200", 700.0, 8.2, 4.3, 4.0, 12.0, 14.0),)


def known_gpus() -> tuple[str, ...]:
    """Names of the GPUs that can be predicted."""
    return tuple(gpu.name for gpu in _GPUS)


def gpu_named(name: str) -> Gpu:
    """The GPU whose name contains `name`, whatever the case; `DeviceError` otherwise."""
    for gpu in _GPUS:
        if name.lower() in gpu.name.lower():
            return gpu
    raise DeviceError(f"device {name!r} is neither here nor known; a prediction exists for {', '.join(known_gpus())}")


def predicted_us(
    gpu: Gpu, m: int, k: int, n: int, density: float, v: int, *, timing: str = "eager", transposes: float = 0.0
) -> tuple[float, float]:
    """Microseconds of the dense and of the sparse layer, 16-bit values and activations.

    Parameters
    ----------
    gpu : Gpu
    m, k, n, v : int
    density : float
    timing : "eager" or "graph"
    transposes : float
        Activations (k or m times n) transposed for this layer, in elements.
    """
    flops, traffic = 2.0 * m * k * n, 2.0 * (k * n + m * n)
    dense = max(flops / gpu.dense_tflops, (2.0 * m * k + traffic) / gpu.memory_tbs) / 1e6
    # A tile of v rows and up to 256 columns fetches 2 (v + 256) bytes per kept column for 2 v 256 operations.
    columns = min(n, 256)
    gathered = flops * density * (v + columns) / (v * columns)
    weights = 2.0 * m * k * density * (1.0 + 2.0 / v)
    sparse = (
        max(flops * density / gpu.dense_tflops, gathered / gpu.gather_tbs, (weights + traffic) / gpu.memory_tbs) / 1e6
    )
    sparse += 4.0 * transposes / gpu.memory_tbs / 1e6
    floor = (gpu.dense_call_us, gpu.sparse_call_us) if timing == "eager" else (gpu.launch_us, gpu.launch_us)
    return max(dense, floor[0]), max(sparse, floor[1])
