"""What `shflnb demo` adds where there is a CUDA GPU: its checks in float16, and a layer timed against cuBLAS.

torch makes the device arrays and brings the dense product to compare with.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..formats import ShflBWMatrix, pack
from ..ops import linear, matmul
from ..patterns import prune

__all__ = ["GpuProduct", "GpuTimes", "is_usable", "multiply", "time_layer"]


@dataclass(frozen=True)
class GpuProduct:
    """A product in float16 on the GPU: largest errors against float64, and two promises."""

    device: str
    error: float
    dense_error: float
    exact_for_integers: bool
    same_bits_again: bool


@dataclass(frozen=True)
class GpuTimes:
    """Median milliseconds of one eager call on a layer; `dense_ms` is the better of `w @ x` and `F.linear`."""

    dense_ms: float
    sparse_ms: float
    is_right: bool


def is_usable() -> bool:
    """Whether torch can use a CUDA device here."""
    return torch.cuda.is_available()


def multiply(packed: ShflBWMatrix, x: np.ndarray, *, seed: int = 0) -> GpuProduct:
    """Multiply on the current CUDA device in float16 and compare with float64 and with small integers.

    packed: any dtype, converted to float16. x: NumPy (k, n), converted likewise.
    """
    device = torch.device("cuda")
    half = packed.astype("float16")
    w = half.to_dense()
    x16 = x.astype(np.float16)
    exact = w.astype(np.float64) @ x16.astype(np.float64)
    x_gpu, w_gpu = torch.from_numpy(x16).to(device), torch.from_numpy(w).to(device)
    y = matmul(half, x_gpu)
    error = float(np.abs(y.cpu().numpy() - exact).max())
    dense_error = float(np.abs((w_gpu @ x_gpu).cpu().numpy() - exact).max())
    rng = np.random.default_rng(seed)
    # Sums of up to 512 products of these stay below 2048, up to which float16 holds every integer.
    small = (rng.integers(-2, 3, size=w.shape) * (w != 0)).astype(np.float16)
    integers = rng.integers(-2, 3, size=x.shape).astype(np.float16)
    small_packed = pack(small, block=packed.block, row_perm=packed.row_perm, fill_in_warning=None)
    found = matmul(small_packed, torch.from_numpy(integers).to(device)).cpu().numpy()
    expected = small.astype(np.float32) @ integers.astype(np.float32)
    return GpuProduct(
        torch.cuda.get_device_name(device),
        error,
        dense_error,
        exact_for_integers=bool((found == expected).all()),
        same_bits_again=bool(torch.equal(y, matmul(half, x_gpu))),
    )


def time_layer(size: int, columns: int, *, sparsity: float, block: tuple[int, int], seed: int = 0) -> GpuTimes:
    """Prune a random `size` x `size` float16 layer, check its product with `columns` columns, and time both roads."""
    device = torch.device("cuda")
    generator = torch.Generator(device).manual_seed(seed)
    w = torch.randn(size, size, generator=generator, device=device, dtype=torch.float16) / size**0.5
    pruned = prune(w, sparsity=sparsity, block=block, search="identity")
    packed, w = pruned.pack(), pruned.weight
    x = torch.randn(size, columns, generator=generator, device=device, dtype=torch.float16)
    tokens = x.T.contiguous()
    out = torch.full((size, columns), float("nan"), device=device, dtype=torch.float16)
    matmul(packed, x, out=out)
    dense = w @ x
    is_right = bool(torch.allclose(out, dense, rtol=1e-2, atol=1e-2))
    is_right &= bool(torch.allclose(linear(tokens, packed).T, dense, rtol=1e-2, atol=1e-2))
    dense_ms = min(_median_ms(lambda: torch.mm(w, x, out=out)), _median_ms(lambda: F.linear(tokens, w)))
    return GpuTimes(dense_ms, _median_ms(lambda: matmul(packed, x, out=out)), is_right)


def _median_ms(call: Callable[[], Any], *, rounds: int = 15, per_round: int = 10) -> float:
    """Milliseconds of one call between events on the current stream: median over rounds of the mean of a round."""
    for _ in range(per_round):
        call()
    times = []
    for _ in range(rounds):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(per_round):
            call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / per_round)
    return statistics.median(times)
