"""What is measured: the layer shapes of `shapes.json`, and the bars that the project set itself.

`shapes.json` is the project's shape set: the benchmark scripts of the Shfl-BW authors (Transformer-big, GNMT,
ResNet-50), BERT-large, and the layers of Llama-3-8B.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

__all__ = ["BARS", "BAR_CARD", "LARGE_LAYERS", "LOADS", "PEER_SHAPES", "REPEAT_ABOVE_US", "REPEAT_SHARE",
           "REPEAT_WITHIN", "SPARSITIES", "V", "Case", "Shape", "all_shapes", "bar_of", "few_bar_of",
           "table_cases"]  # fmt: skip

LOADS = ("burst", "sustained")
"""How busy the GPU is while products are timed, see `protocol.py`; the bars are judged in bursts."""


@dataclass(frozen=True)
class Shape:
    """One product: weight (m, k) times activation (k, n)."""

    name: str
    m: int
    k: int
    n: int

    @property
    def flops(self) -> float:
        """Operations of the dense product."""
        return 2.0 * self.m * self.k * self.n


@dataclass(frozen=True)
class Case:
    """A sparse product to time on a shape."""

    shape: Shape
    sparsity: float
    v: int
    dtype: str = "float16"
    op: str = "matmul"
    """"matmul": feature-major. "linear": token-major in and out."""
    groups: str = "equal"
    """"equal", or "spread": unequal groups of the same total."""
    kernel: str = ""
    """"": what shflnb chooses. "sm80": the best of the mma.sync configs, forced."""
    inputs: str = "warm"

    def __str__(self) -> str:
        s = self.shape
        parts = [f"{s.m}x{s.k}x{s.n}", f"{100 * self.sparsity:g}%", f"v{self.v}"]
        defaults = (("dtype", "float16"), ("op", "matmul"), ("groups", "equal"), ("kernel", ""), ("inputs", "warm"))
        return "-".join(parts + [getattr(self, name) for name, usual in defaults if getattr(self, name) != usual])


_FILE = json.loads((Path(__file__).parent / "shapes.json").read_text(encoding="utf-8"))
SPARSITIES: tuple[float, ...] = tuple(_FILE["sparsity"])
V: tuple[int, ...] = tuple(_FILE["v"])

SQUARE_4096 = Shape("square-4096", 4096, 4096, 4096)
SQUARE_8192 = Shape("square-8192", 8192, 8192, 8192)
WIDE_2048 = Shape("wide-2048", 2048, 2048, 4096)
GATE_UP = Shape("llm/gate-up", 28672, 4096, 4096)
DOWN = Shape("llm/down", 4096, 14336, 4096)

BARS: dict[tuple[str, float, str], dict[int, tuple[float, float | None]]] = {
    ("square-4096", 0.5, "matmul"): {64: (1.2, 1.5), 128: (1.6, 1.9)},
    ("square-4096", 0.75, "matmul"): {32: (1.2, 1.7), 64: (2.2, 2.7), 128: (2.9, 3.5)},
    ("square-4096", 0.875, "matmul"): {32: (2.2, 3.0), 64: (3.7, 4.7), 128: (4.6, 5.8)},
    ("square-8192", 0.75, "matmul"): {32: (1.3, 1.8), 64: (2.4, 2.9), 128: (3.2, 3.8)},
    ("wide-2048", 0.75, "matmul"): {64: (1.9, 2.3), 128: (2.2, 2.8)},
    ("llm/gate-up", 0.75, "matmul"): {32: (1.2, 1.7), 64: (2.3, 2.8), 128: (3.0, 3.6)},
    ("llm/down", 0.75, "matmul"): {32: (1.2, 1.7), 64: (2.3, 2.8), 128: (3.0, 3.6)},
    ("transformer-big", 0.75, "matmul"): {64: (1.3, None), 128: (1.5, None)},
    ("bert-large", 0.75, "matmul"): {64: (1.3, None), 128: (1.5, None)},
    ("square-4096", 0.75, "linear"): {64: (1.6, 2.0), 128: (2.0, 2.5)},
}
"""(shape or family, sparsity, op) -> v -> (speedup that must be met, speedup aimed at), fp16 on one H200."""


BAR_CARD = "H200"
"""The card that the bars were set for."""

REPEAT_ABOVE_US, REPEAT_WITHIN, REPEAT_SHARE = 20.0, 0.03, 0.95
"""From run to run on a card, median times above so many us must agree to within this; this share of them must."""


def all_shapes() -> list[Shape]:
    """Every GEMM shape of shapes.json, and the one of the bars that is not in it; without repeats."""
    found = [Shape(g["name"], g["m"], g["k"], g["n"]) for g in _FILE["gemm"]]
    return list(dict.fromkeys([*found, WIDE_2048]))


def _family(prefix: str) -> list[Shape]:
    return [s for s in all_shapes() if s.name.startswith(prefix + "/") and s.n >= 960]


PEER_SHAPES: list[Shape] = [SQUARE_4096, SQUARE_8192, WIDE_2048, *_family("bert-large")]


def bar_of(shape_name: str, n: int, sparsity: float, op: str, v: int) -> tuple[float, float | None] | None:
    """The bar (must, aim) of a plain fp16 case, or None. Layers of llm are judged at n = 4096, others at n >= 960."""
    if shape_name.startswith("llm/") and n != 4096:
        return None
    for name in (shape_name, shape_name.split("/")[0]):
        bar = BARS.get((name, sparsity, op), {}).get(v)
        if bar is not None:
            return bar if n >= 960 else None
    return None


LARGE_LAYERS = ((28672, 4096), (4096, 14336))


def few_bar_of(m: int, k: int, n: int, sparsity: float, v: int) -> float | None:
    """The speedup that a token-major product with few columns and weights from memory must reach, or None."""
    if v != 64:
        return None
    if (m, k) in LARGE_LAYERS:
        if sparsity == 0.75:
            return 3.3 if n <= 16 else 3.0 if n <= 32 else 2.6
        if sparsity == 0.875 and n <= 16:
            return 5.5
        if sparsity == 0.5 and n <= 32:
            return 1.7
    elif (m, k) in ((4096, 4096), (6144, 4096)) and sparsity == 0.75 and n <= 16:
        return 2.2
    return 1.0 if sparsity >= 0.6 else None


def table_cases() -> list[Case]:
    """The cases that have a bar, and what is compared with them: bfloat16, unequal groups, sm80, cold inputs."""
    named = {s.name: [s] for s in (SQUARE_4096, SQUARE_8192, WIDE_2048, GATE_UP, DOWN)}
    named |= {prefix: _family(prefix) for prefix in ("transformer-big", "bert-large")}
    cases = [
        Case(shape, sparsity, v, op=op)
        for (name, sparsity, op), by_v in BARS.items()
        for shape in named[name]
        for v in by_v
    ]
    cases += [Case(s, sparsity, v) for s in named["bert-large"] for sparsity in (0.5, 0.875) for v in (64, 128)]
    cases += [Case(SQUARE_4096, 0.5, 32), Case(SQUARE_8192, 0.5, 64), Case(SQUARE_8192, 0.875, 64)]
    for v in (64, 128):
        cases += [Case(s, 0.75, v, dtype="bfloat16") for s in (SQUARE_4096, WIDE_2048, *named["bert-large"])]
        cases += [Case(s, 0.75, v, groups="spread") for s in (SQUARE_4096, WIDE_2048)]
        cases += [Case(SQUARE_4096, 0.75, v, kernel="sm80")]
        cases += [Case(s, 0.75, v, inputs="rotated") for s in (SQUARE_4096, WIDE_2048, *named["bert-large"])]
    return list(dict.fromkeys(cases))
