"""What the peers of a product share, and the 2:4 weights of those that take them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from cases import Shape
from matrices import random_tensor

__all__ = ["DTYPE", "Operands", "two_of_four"]

DTYPE = "float16"


@dataclass
class Operands:
    """What all peers of a shape share: x (k, n), its transpose, the dense weight, and an output buffer (m, n)."""

    shape: Shape
    device: str
    x: torch.Tensor = field(init=False)
    xt: torch.Tensor = field(init=False)
    w: torch.Tensor = field(init=False)
    out: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        s = self.shape
        self.x = random_tensor(s.k, s.n, DTYPE, self.device, 100)
        self.xt = self.x.t().contiguous()
        self.w = random_tensor(s.m, s.k, DTYPE, self.device, 7, 0.05)
        self.out = torch.empty(s.m, s.n, dtype=self.w.dtype, device=self.device)


def two_of_four(o: Operands) -> tuple[Any, torch.Tensor]:
    """A weight with a random two of every four kept, compressed by cuSPARSELt, and its dense equal."""
    from torch.sparse import SparseSemiStructuredTensor, to_sparse_semi_structured

    if not torch.backends.cusparselt.is_available():
        raise RuntimeError("this torch is built without cuSPARSELt")
    SparseSemiStructuredTensor._FORCE_CUTLASS = False
    noise = torch.rand(o.shape.m, o.shape.k // 4, 4, device=o.device)
    mask = torch.zeros_like(noise, dtype=torch.bool).scatter_(2, noise.topk(2, dim=2).indices, True)
    dense = (o.w.view_as(mask) * mask).view_as(o.w).contiguous()
    return to_sparse_semi_structured(dense), dense
