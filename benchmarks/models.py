"""The models of `bench_models.py`: an MLP block, a BERT encoder and a Llama decoder layer, by their published sizes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["BertEncoder", "DecoderLayer", "mlp_block"]


def mlp_block(width: int, hidden: int) -> nn.Sequential:
    """Linear, GELU, Linear."""
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


class BertLayer(nn.Module):
    """Post-norm encoder layer: 4 projections of attention, 2 of the MLP, as in BERT."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.dense = (nn.Linear(width, width) for _ in range(4))
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-12), nn.LayerNorm(width, eps=1e-12)
        self.intermediate, self.act, self.output = nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, width) -> the same."""
        b, s, w = x.shape
        q, k, v = (f(x).view(b, s, self.heads, -1).transpose(1, 2) for f in (self.query, self.key, self.value))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, s, w)
        x = self.norm1(x + self.dense(y))
        return self.norm2(x + self.output(self.act(self.intermediate(x))))


class BertEncoder(nn.Sequential):
    """Layers of BERT; BERT-large is (24, 1024, 16, 4096)."""

    def __init__(self, layers: int, width: int, heads: int, hidden: int) -> None:
        super().__init__(*(BertLayer(width, heads, hidden) for _ in range(layers)))


class DecoderLayer(nn.Module):
    """Decoder layer that adds one token per sequence to a cache of `context` tokens, as in Llama.

    Llama-3-8B is (4096, 32, 8, 14336).
    """

    def __init__(self, width: int, heads: int, kv_heads: int, hidden: int, batch: int, context: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = heads, kv_heads, width // heads
        kv = kv_heads * self.size
        self.q_proj, self.o_proj = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.k_proj, self.v_proj = nn.Linear(width, kv, bias=False), nn.Linear(width, kv, bias=False)
        self.gate_proj, self.up_proj = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down_proj, self.act_fn = nn.Linear(hidden, width, bias=False), nn.SiLU()
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        for name in ("keys", "cache"):
            self.register_buffer(name, torch.randn(batch, kv_heads, context, self.size))
        angles = torch.outer(torch.arange(context).float(), 5e5 ** -(torch.arange(0, self.size, 2) / self.size))
        self.register_buffer("cos", angles.cos()[-1].repeat(2))
        self.register_buffer("sin", angles.sin()[-1].repeat(2))

    def _rotated(self, x: torch.Tensor) -> torch.Tensor:
        left, right = x.chunk(2, dim=-1)
        return x * self.cos + torch.cat((-right, left), dim=-1) * self.sin

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, 1, width) -> the same; writes the last place of the cache."""
        b = x.shape[0]
        h = self.norm1(x)
        q = self._rotated(self.q_proj(h).view(b, 1, self.heads, self.size).transpose(1, 2))
        k = self._rotated(self.k_proj(h).view(b, 1, self.kv_heads, self.size).transpose(1, 2))
        self.keys[:, :, -1:] = k
        self.cache[:, :, -1:] = self.v_proj(h).view(b, 1, self.kv_heads, self.size).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, self.keys, self.cache, enable_gqa=True)
        x = x + self.o_proj(y.transpose(1, 2).reshape(b, 1, -1))
        h = self.norm2(x)
        return x + self.down_proj(self.act_fn(self.gate_proj(h)) * self.up_proj(h))
