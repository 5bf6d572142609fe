"""What would pruning gain? A layer of the size of Llama-3-8B, without its weights: `python
examples/estimate_before_pruning.py`.
"""

import argparse

import torch
from torch import nn

import shflnb


class DecoderLayer(nn.Module):
    """The seven projections of a decoder layer; what lies between them costs little and is left out."""

    def __init__(self, width: int = 4096, hidden: int = 14336, kv: int = 1024) -> None:
        super().__init__()
        self.q_proj, self.o_proj = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.k_proj, self.v_proj = nn.Linear(width, kv, bias=False), nn.Linear(width, kv, bias=False)
        self.gate_proj, self.up_proj = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down_proj, self.act_fn = nn.Linear(hidden, width, bias=False), nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Every projection once."""
        self.k_proj(x), self.v_proj(x)
        x = self.o_proj(self.q_proj(x).softmax(-1))
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def main() -> None:
    """One forecast for each number of tokens."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="H200", help="cuda or cpu: measured; the name of a GPU: predicted")
    parser.add_argument("--short", action="store_true", help="one number of tokens only")
    options = parser.parse_args()
    with torch.device("meta"):
        model = DecoderLayer()
    for tokens in (1,) if options.short else (1, 16, 512, 4096):
        x = torch.empty(tokens, 4096, device="meta")
        forecast = shflnb.estimate(
            model, x, 0.75, (64, 64), device=options.device, timing="graph" if tokens < 64 else "eager",
            dtype=torch.bfloat16 if options.device == "cuda" else None,
        )  # fmt: skip
        forecast.print()


if __name__ == "__main__":
    main()
