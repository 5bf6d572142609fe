"""Make a model sparse where that makes it faster, and read what was done: `python examples/sparsify_model.py`."""

import argparse

import torch
from torch import nn

import shflnb


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attention and MLP, each with its residual."""
        h = self.norm1(x)
        q, k, v = (f(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.o(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


def main() -> None:
    """Forecast, convert, compare, save and load."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="small sizes, for a quick look")
    short = parser.parse_args().short
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    torch.manual_seed(0)
    width, tokens = (64, 32) if short else (768, 256)
    model = nn.Sequential(*(Block(width, 8) for _ in range(2))).to(device, dtype).eval()
    x = torch.randn(4, tokens, width, device=device, dtype=dtype)
    block = (16, 16) if short else (64, 64)

    shflnb.estimate(model, x, 0.75, block).print()  # before any pruning
    report = shflnb.sparsify_(model, 0.75, block, example_inputs=x, policy="always" if short else "never_slower")
    report.print()
    with torch.no_grad():
        y = model(x)

    # What is saved are plain tensors; a model that went through the same sparsify_ takes them.
    state = model.state_dict()
    model.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(model(x), y)
    print(f"{len(report.sparse)} of {len(report.rows)} layers sparse, {len(state)} tensors saved and loaded")


if __name__ == "__main__":
    main()
