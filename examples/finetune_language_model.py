"""Train a small language model, prune it to 75 and 87.5 %, fine-tune it: `python examples/finetune_language_model.py`.

The text is the language reference that ships with Python (`pydoc_data.topics`), read byte by byte.
"""

import argparse
import copy
import pydoc_data.topics

import torch
import torch.nn.functional as F
from sparsify_model import Block
from torch import nn

import shflnb.nn

TEXT = torch.frombuffer(bytearray("\n".join(pydoc_data.topics.topics.values()), "utf-8"), dtype=torch.uint8)


class Causal(Block):
    """The block of the other example, each token seeing those before it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Causal attention and MLP."""
        h = self.norm1(x)
        q, k, v = (f(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class LanguageModel(nn.Module):
    """Bytes in, logits of the next byte out."""

    def __init__(self, width: int, layers: int, context: int) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(256, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Causal(width, 4) for _ in range(layers)), nn.LayerNorm(width))
        self.lm_head = nn.Linear(width, 256)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(batch, time) -> (batch, time, 256)."""
        return self.lm_head(self.blocks(self.embed(tokens) + self.place.weight[: tokens.shape[1]]))


def loss_on(model: nn.Module, text: torch.Tensor, batch: int, context: int, seed: int) -> torch.Tensor:
    """Mean cross-entropy on random pieces of the text, in nats per byte."""
    starts = torch.randint(len(text) - context - 1, (batch, 1), generator=torch.Generator().manual_seed(seed))
    pieces = text[starts + torch.arange(context + 1)].long().to(next(model.parameters()).device)
    return F.cross_entropy(model(pieces[:, :-1]).flatten(0, 1), pieces[:, 1:].flatten())


def train(model: nn.Module, steps: int, rate: float, sizes: tuple[int, int], after_step=lambda: None) -> None:
    """AdamW with a linear decay."""
    optimiser = torch.optim.AdamW(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.1, steps)
    for step in range(steps):
        loss_on(model, TEXT[: -len(TEXT) // 10], *sizes, seed=step).backward()
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
        after_step()


@torch.no_grad()
def test_loss(model: nn.Module, sizes: tuple[int, int]) -> float:
    """Loss on the last tenth of the text, which training never sees."""
    return sum(loss_on(model, TEXT[-len(TEXT) // 10 :], *sizes, seed=-s).item() for s in range(1, 9)) / 8


def main() -> None:
    """Dense, then pruned at once, then pruned while training, for both sparsities."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="a few steps of a tiny model")
    short = parser.parse_args().short
    torch.manual_seed(0)
    width, layers, steps, sizes = (32, 1, 6, (4, 16)) if short else (128, 2, 400, (24, 96))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dense = LanguageModel(width, layers, sizes[1]).to(device)
    train(dense, steps, 2e-3, sizes)
    print(f"dense: test loss {test_loss(dense, sizes):.3f} nats per byte", flush=True)
    longer = copy.deepcopy(dense)
    train(longer, steps, 1e-3, sizes)
    print(f"dense, trained as long as those below: {test_loss(longer, sizes):.3f}", flush=True)
    for sparsity in (0.75, 0.875):
        at_once = copy.deepcopy(dense)
        shflnb.nn.prepare(at_once, sparsity, (16, 16), steps=0)
        model = copy.deepcopy(dense)
        preparation = shflnb.nn.prepare(model, sparsity, (16, 16), steps=steps // 2)
        train(model, steps, 1e-3, sizes, preparation.step)
        masked = test_loss(model, sizes)
        report = preparation.finalize() if device == "cpu" else None  # the kernels of a GPU take 16-bit weights
        packed = test_loss(model, sizes)
        kept = f"{len(report.sparse)} layers packed" if report else "masked"
        print(f"{sparsity:.1%} pruned at once: {test_loss(at_once, sizes):.3f}; ", end="")
        print(f"fine-tuned: {masked:.3f}, {kept}: {packed:.3f}", flush=True)


if __name__ == "__main__":
    main()
