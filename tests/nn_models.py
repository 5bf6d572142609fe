"""Packed tensors and small models for the tests of `shflnb.nn`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from shflnb.formats import ShflBWMatrix
from shflnb.nn import ShflLinear


def random_packed(
    m: int, k: int, block: tuple[int, int], *, density: float = 0.4, seed: int = 0, integer: bool = False
) -> ShflBWMatrix:
    """A float64 matrix with groups of random, different lengths (the first one empty if there are several)."""
    rng = np.random.default_rng(seed)
    v = block[0]
    groups = -(-m // v)
    columns = [np.flatnonzero(rng.random(k) < density) for _ in range(groups)]
    if groups > 2:
        columns[0] = columns[0][:0]
    indptr = np.concatenate(([0], np.cumsum([len(c) for c in columns]))).astype(np.int64)
    count = int(indptr[-1])
    values = rng.integers(-4, 5, (count, v)).astype(np.float64) if integer else rng.standard_normal((count, v))
    if groups and m % v:
        values[indptr[-2] :, m % v :] = 0.0
    indices = np.concatenate(columns).astype(np.int32) if groups else np.zeros(0, np.int32)
    return ShflBWMatrix((m, k), block, indptr, indices, values, rng.permutation(m).astype(np.int32))


def tensors(packed: ShflBWMatrix, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    """values, indices, indptr, row_perm as torch tensors."""
    return (
        torch.from_numpy(packed.values).to(dtype),
        torch.from_numpy(packed.indices),
        torch.from_numpy(packed.indptr),
        torch.from_numpy(packed.row_perm),
    )


def dense_by_definition(values: Any, indices: Any, indptr: Any, row_perm: Any, k: int) -> torch.Tensor:
    """W as the format defines it, element by element."""
    m, v = len(row_perm), values.shape[1]
    w = torch.zeros(m, k, dtype=values.dtype)
    for g in range(len(indptr) - 1):
        for j in range(int(indptr[g]), int(indptr[g + 1])):
            for r in range(min(v, m - g * v)):
                w[int(row_perm[g * v + r]), int(indices[j])] = values[j, r]
    return w


def make_layer(
    m: int = 80, k: int = 96, block: tuple[int, int] = (16, 16), *, dtype: torch.dtype = torch.float32, seed: int = 0,
    bias: bool = True, activation: str | None = None, name: str = "",
) -> ShflLinear:  # fmt: skip
    """A layer with a random pattern."""
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(m, generator=generator, dtype=dtype) if bias else None
    packed = random_packed(m, k, block, seed=seed).astype(str(dtype)[6:])
    return ShflLinear.from_packed(packed, vector, activation=activation, name=name)


class GatedMLP(nn.Module):
    """`x + down(silu(gate(x)) * up(x))`."""

    def __init__(self, width: int = 32, hidden: int = 64) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)
        self.act = nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.act(self.gate(x)) * self.up(x))


class Attention(nn.Module):
    """Self-attention with four projections."""

    def __init__(self, width: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.heads = heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, s, w = x.shape
        q, k, v = (f(x).view(b, s, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.o(y.transpose(1, 2).reshape(b, s, w))


class TinyLM(nn.Module):
    """Embedding, attention, MLP, norm and an output head."""

    def __init__(self, vocabulary: int = 50, width: int = 32, *, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.attention = Attention(width)
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.out = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.out.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        x = x + self.attention(x)
        return self.out(x + self.mlp(self.norm(x)))
