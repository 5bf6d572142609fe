"""Matrices to judge the pattern search on: trained in this process on installed data, planted, and noise.

Nothing is downloaded: the pictures are scikit-learn's bundled digits, the text is the source of Python's own standard
library. Training takes well under a minute on two cores and is seeded.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

import numpy as np

__all__ = ["digits_mlp", "gaussian", "planted", "text_transformer", "trained"]


def digits_mlp(width: int = 512, epochs: int = 40, seed: int = 0) -> dict[str, np.ndarray]:
    """The first two weights of a 64-512-512-10 network trained on scikit-learn's digits."""
    import torch
    from sklearn.datasets import load_digits

    torch.manual_seed(seed)
    data = load_digits()
    x = torch.from_numpy(data.data.astype(np.float32) / 8.0 - 1.0)
    y = torch.from_numpy(data.target.astype(np.int64))
    net = torch.nn.Sequential(
        torch.nn.Linear(64, width),
        torch.nn.ReLU(),
        torch.nn.Linear(width, width),
        torch.nn.ReLU(),
        torch.nn.Linear(width, 10),
    )
    optimiser = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.05)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(128):
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
            optimiser.step()
    return {f"digits_fc{i}": net[2 * i].weight.detach().numpy().copy() for i in range(2)}


def library_text(size: int = 4_000_000) -> np.ndarray:
    """Bytes of the standard library's own modules, in the order of their names."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    return np.frombuffer(text[:size], dtype=np.uint8)


def text_transformer(
    width: int = 384, layers: int = 2, steps: int = 220, context: int = 64, batch: int = 16, seed: int = 0
) -> dict[str, np.ndarray]:
    """Weights of a small byte-level transformer trained on Python's standard library, by layer name."""
    import torch

    torch.manual_seed(seed)
    text = torch.from_numpy(library_text().astype(np.int64))
    block = torch.nn.TransformerEncoderLayer(
        width, width // 64, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    body = torch.nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
    embed = torch.nn.Embedding(256, width)
    place = torch.nn.Parameter(torch.zeros(context, width))
    parameters = [*body.parameters(), *embed.parameters(), place]
    for p in parameters:
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.02)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(context)
    optimiser = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        start = torch.randint(0, len(text) - context - 1, (batch,))
        rows = text[start[:, None] + torch.arange(context + 1)]
        hidden = body(embed(rows[:, :-1]) + place, mask=mask, is_causal=True)
        logits = torch.nn.functional.layer_norm(hidden, (width,)) @ embed.weight.T
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
    found: dict[str, np.ndarray] = {}
    for i, layer in enumerate(body.layers):
        qkv = layer.self_attn.in_proj_weight.detach().numpy()
        for name, part in zip("qkv", np.split(qkv, 3), strict=True):
            found[f"text_{name}{i}"] = part.copy()
        found[f"text_out{i}"] = layer.self_attn.out_proj.weight.detach().numpy().copy()
        found[f"text_up{i}"] = layer.linear1.weight.detach().numpy().copy()
        found[f"text_down{i}"] = layer.linear2.weight.detach().numpy().copy()
    return found


def trained(seed: int = 0) -> dict[str, np.ndarray]:
    """All trained matrices by name."""
    return {**digits_mlp(seed=seed), **text_transformer(seed=seed)}


def planted(m: int, k: int, v: int, density: float = 0.25, noise: float = 0.0, seed: int = 0) -> np.ndarray:
    """A Shfl-BW pattern of unit Gaussian weights plus Gaussian noise everywhere, rows shuffled.

    Groups keep `round(density * k)` columns each; `noise` is the standard deviation of what is added.
    """
    rng = np.random.default_rng(seed)
    w = np.zeros((m, k), dtype=np.float32)
    for start in range(0, m, v):
        columns = rng.choice(k, size=round(density * k), replace=False)
        w[start : start + v, columns] = rng.standard_normal((min(v, m - start), len(columns)))
    return (w + noise * rng.standard_normal((m, k)))[rng.permutation(m)].astype(np.float32)


def gaussian(m: int, k: int, seed: int = 0) -> np.ndarray:
    """Independent Gaussian weights: no structure but that of chance, the worst case for any search."""
    return np.random.default_rng(seed).standard_normal((m, k), dtype=np.float32)
