"""Weights to time with: exact Shfl-BW patterns of random columns, made on the device; and their dense equal."""

from __future__ import annotations

import numpy as np
import torch

from shflnb.arrays import host_array
from shflnb.formats import ShflBWMatrix

__all__ = ["as_tensor", "dense_of", "group_counts", "random_packed", "random_tensor"]

SCALE = 0.05
"""Standard deviation of the weights: products of float16 stay far from its largest number at every k here."""


def random_tensor(rows: int, cols: int, dtype: str, device: str, seed: int, scale: float = 1.0) -> torch.Tensor:
    """Normal values; never zeros, which multiply faster than data does."""
    generator = torch.Generator(device).manual_seed(seed)
    return (torch.randn(rows, cols, device=device, generator=generator) * scale).to(getattr(torch, dtype))


def as_tensor(a: np.ndarray, device: str) -> torch.Tensor:
    """A NumPy array (bfloat16 included) as a tensor on a device."""
    if str(a.dtype) == "bfloat16":
        return torch.from_numpy(a.view(np.int16)).to(device).view(torch.bfloat16)
    return torch.from_numpy(a).to(device)


def group_counts(groups: int, k: int, sparsity: float, spread: float, seed: int) -> np.ndarray:
    """Kept columns of each group: all round(k * (1 - sparsity)), or spread around it with the same total.

    `spread` is the standard deviation over the mean; a layer-wide budget on a trained weight gives some 0.1 to 0.4.
    """
    keep = round(k * (1 - sparsity))
    counts = np.full(groups, keep, dtype=np.int64)
    if spread and groups > 1:
        normal = np.random.default_rng(seed).standard_normal(groups)
        normal -= normal.mean()
        counts = np.clip(np.rint(keep * (1 + spread * normal)), 1, k).astype(np.int64)
        for g in np.argsort(normal):  # the total decides what the product costs: make it exact
            counts[g] = np.clip(counts[g] + keep * groups - counts.sum(), 1, k)
    return counts


def random_packed(
    m: int,
    k: int,
    v: int,
    sparsity: float,
    dtype: str = "float16",
    *,
    device: str = "cpu",
    spread: float = 0.0,
    seed: int = 0,
) -> ShflBWMatrix:
    """A packed matrix with random distinct columns in every group and a random row order."""
    groups = -(-m // v)
    counts = group_counts(groups, k, sparsity, spread, seed)
    generator = torch.Generator(device).manual_seed(seed)
    order = torch.rand(groups, k, device=device, generator=generator).argsort(1).int()
    kept = torch.arange(k, device=device) < torch.from_numpy(counts).to(device)[:, None]
    columns = torch.where(kept, order, k).sort(1).values
    indices = host_array(columns[columns < k].contiguous())
    values = host_array(random_tensor(int(counts.sum()), v, dtype, device, seed + 1, SCALE))
    if m % v:
        values[len(values) - int(counts[-1]) :, m % v :] = 0
    indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    row_perm = np.random.default_rng(seed).permutation(m).astype(np.int32)
    return ShflBWMatrix((m, k), (v, 64), indptr, indices, values, row_perm)


def dense_of(packed: ShflBWMatrix, device: str) -> torch.Tensor:
    """`packed.to_dense()` as a tensor, scattered on the device."""
    m, k = packed.shape
    rows = np.full(packed.groups * packed.v, -1, dtype=np.int64)
    rows[:m] = packed.row_perm
    group = torch.from_numpy(np.repeat(np.arange(packed.groups), packed.counts)).to(device)
    row_of = torch.from_numpy(rows.reshape(-1, packed.v)).to(device)[group]
    place = row_of * k + torch.from_numpy(packed.indices).to(device).long()[:, None]
    values = as_tensor(packed.values, device)
    dense = torch.zeros(m * k, dtype=values.dtype, device=device)
    real = row_of >= 0
    dense[place[real]] = values[real]
    return dense.view(m, k)
