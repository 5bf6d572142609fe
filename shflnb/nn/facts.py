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


UNEQUAL = 2.0
"""Spread of the rows' sums over what it would be if all weights were alike, from which groups are unequal."""


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
    facts: Facts, block: tuple[int, int], sparsity: float, known: dict[tuple[Any, ...], ShflLinear],
    budget: str = "group",
) -> ShflLinear:  # fmt: skip
    """A random packed layer of the same shape, one for all layers that are alike.

    With a budget that is shared by all groups, its groups are as unequal as the rows of the weight let expect.
    """
    m, k = facts.weight.shape
    lengths = None if budget == "group" or facts.weight.is_meta else group_lengths(facts.weight, block[0], sparsity)
    spread = None if lengths is None else lengths.tobytes()
    key = (m, k, sparsity, facts.dtype, facts.weight.device, facts.bias is not None, spread)
    if key not in known:
        known[key] = random_layer(
            (m, k), block, sparsity, bias=facts.bias is not None, dtype=facts.dtype, device=facts.weight.device,
            lengths=lengths,
        )  # fmt: skip
    return known[key]


def group_lengths(weight: torch.Tensor, v: int, sparsity: float) -> np.ndarray | None:
    """Columns that groups of v rows will keep, roughly, or None where they will be about equal.

    Where rows differ in magnitude, a search puts like ones together, and a shared budget goes to the columns of groups
    with the largest sums; so these are counted for groups of the rows sorted by their sums.
    """
    m, k = weight.shape
    groups = -(-m // v)
    if min(m, k) == 0 or not 0.0 < sparsity < 1.0:
        return None
    size = weight.detach().abs()
    sums = size.sum(1, dtype=torch.float32)
    alike = k**0.5 * size[:: max(1, m // 256)].float().std(1).mean()
    if m == 1 or not sums.std() > UNEQUAL * alike:
        return None
    order = torch.nn.functional.pad(sums.argsort(), (0, groups * v - m), value=-1)
    scores = torch.stack([size[rows[rows >= 0]].sum(0, dtype=torch.float32) for rows in order.view(groups, v)])
    keep = max(1, round((1.0 - sparsity) * scores.numel()))
    threshold = scores.reshape(-1).kthvalue(scores.numel() - keep + 1).values
    return (scores >= threshold).sum(1).cpu().numpy().astype(np.float64)


def random_layer(
    shape: tuple[int, int],
    block: tuple[int, int],
    sparsity: float,
    *,
    bias: bool,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
    lengths: np.ndarray | None = None,
) -> ShflLinear:
    """A packed layer with random rows and columns and groups as equal as `tile_k` allows, or of about these lengths."""
    (m, k), (v, tile_k) = shape, block
    rng = np.random.default_rng(seed)
    groups = -(-m // v)
    step = rounding_step(k, tile_k, 1.0 - sparsity)
    steps = min(int((1.0 - sparsity) * k * groups * (1 + 1e-9) / step), groups * -(-k // step))
    counts = np.full(groups, steps // max(1, groups))
    counts[: steps % max(1, groups)] += 1
    counts = np.full(groups, k) if sparsity == 0.0 else np.minimum(counts * step, k)
    if lengths is not None:
        counts = np.minimum(np.round(lengths / step).astype(np.int64) * step, k)
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
