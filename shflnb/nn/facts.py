"""What measuring needs to know of a layer, and random packed layers that stand for one not yet pruned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ..formats import ShflBWMatrix
from ..patterns.columns import rounding_step
from .modules import ShflLinear

__all__ = ["Facts", "compute_dtype", "facts_of", "random_layer", "stand_in", "unsupported"]


@dataclass(frozen=True)
class Facts:
    """What measuring needs to know of a layer: dense tensors (real ones or stand-ins) and the dtype it computes in."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    dtype: torch.dtype


def facts_of(linear: nn.Module) -> Facts:
    """The tensors of a dense layer and the dtype it computes in."""
    weight = linear.weight
    assert isinstance(weight, torch.Tensor), "a layer that find_layers let through"
    return Facts(weight.detach(), linear.bias, compute_dtype(weight))


def compute_dtype(weight: torch.Tensor) -> torch.dtype:
    """The dtype the product runs in: that of the weight, or the autocast dtype."""
    device = weight.device.type
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return weight.dtype


def unsupported(linear: nn.Module) -> str | None:
    """Why the kernels of the layer's device do not take its dtype, or None."""
    dtype = compute_dtype(linear.weight)
    if linear.weight.is_cuda and dtype not in (torch.float16, torch.bfloat16):
        name = str(dtype)[6:]
        return f"{name} on a GPU: the kernels take float16 and bfloat16; convert the model or sparsify under autocast"
    return None


def stand_in(
    facts: Facts, block: tuple[int, int], sparsity: float, known: dict[tuple[Any, ...], ShflLinear]
) -> ShflLinear:
    """A random packed layer of the same shape, one for all layers that are alike."""
    m, k = facts.weight.shape
    key = (m, k, sparsity, facts.dtype, facts.weight.device, facts.bias is not None)
    if key not in known:
        known[key] = random_layer(
            (m, k), block, sparsity, bias=facts.bias is not None, dtype=facts.dtype, device=facts.weight.device
        )
    return known[key]


def random_layer(
    shape: tuple[int, int],
    block: tuple[int, int],
    sparsity: float,
    *,
    bias: bool,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
) -> ShflLinear:
    """A packed layer with random rows and columns and groups as equal as `tile_k` allows."""
    (m, k), (v, tile_k) = shape, block
    rng = np.random.default_rng(seed)
    groups = -(-m // v)
    step = rounding_step(k, tile_k, 1.0 - sparsity)
    steps = min(int((1.0 - sparsity) * k * groups * (1 + 1e-9) / step), groups * -(-k // step))
    counts = np.full(groups, steps // max(1, groups))
    counts[: steps % max(1, groups)] += 1
    counts = np.full(groups, k) if sparsity == 0.0 else np.minimum(counts * step, k)
    indptr = np.concatenate(([0], np.cumsum(counts))).astype(np.int64)
    indices = np.empty(indptr[-1], dtype=np.int32)
    for g in range(groups):
        indices[indptr[g] : indptr[g + 1]] = np.sort(rng.permutation(k)[: counts[g]])
    values = np.zeros((len(indices), v), dtype=np.float32)
    empty = ShflBWMatrix((m, k), block, indptr, indices, values, rng.permutation(m).astype(np.int32))
    vector = torch.zeros(m, device=device, dtype=dtype) if bias else None
    layer = ShflLinear.from_packed(empty, vector, device=device).to(dtype).requires_grad_(False)
    # The places of rows that the last group does not have stay zero.
    last = int(indptr[-2]) if m % v and groups else len(indices)
    with torch.no_grad():
        layer.values[:last].normal_(std=k**-0.5)
    return layer
