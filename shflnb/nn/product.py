"""One sparse product against the dense library on a CUDA device: checked, then timed by CUDA graphs. `shflnb bench`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..formats import ShflBWMatrix
from ..ops import matmul
from .measure import call_us

__all__ = ["ProductTimes", "product_times"]


@dataclass(frozen=True)
class ProductTimes:
    """Device microseconds of both products, and the sparse one's ||error|| / ||result|| against float32."""

    sparse_us: float
    dense_us: float
    dense_what: str
    error: float


def product_times(packed: ShflBWMatrix, n: int, *, ordinal: int = 0, seed: int = 0) -> ProductTimes:
    """Multiply `packed` (float16 or bfloat16) by a random x (k, n) on a device; dense is the better of two layouts.

    The dense weight is random and without zeros, which multiply faster than data does.
    """
    device = torch.device("cuda", ordinal)
    dtype = getattr(torch, packed.dtype)
    m, k = packed.shape
    with torch.cuda.device(device), torch.no_grad():
        generator = torch.Generator(device).manual_seed(seed)
        x = torch.randn(k, n, device=device, generator=generator).to(dtype)
        w = (torch.randn(m, k, device=device, generator=generator) * 0.05).to(dtype)
        xt, out = x.t().contiguous(), torch.full((m, n), float("nan"), device=device, dtype=dtype)
        reference = torch.from_numpy(packed.astype("float32").to_dense()).to(device) @ x.float()
        difference = torch.linalg.vector_norm(matmul(packed, x, out=out).float() - reference)
        error = float(difference / torch.linalg.vector_norm(reference).clamp_min(1e-30))
        dense_out = torch.empty_like(out)
        dense = {
            "W @ X": call_us([lambda: torch.matmul(w, x, out=dense_out)], device, "graph"),
            "F.linear": call_us([lambda: F.linear(xt, w)], device, "graph"),
        }
        sparse_us = call_us([lambda: matmul(packed, x, out=out)], device, "graph")
    best = min(dense, key=lambda name: dense[name])
    return ProductTimes(sparse_us, dense[best], best, error)
