"""The figures of docs/performance.md, drawn from the CSVs in `results/` as SVG files that hold a digest of their data.

The digest, not the bytes of the file, says whether a figure is up to date: another version of matplotlib draws the same
data with other bytes. A figure shows one card, the one whose products were measured most, and names it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tables import V_SHOWN, Data, Row, card_name, find, fullest, is_comparable, plain

__all__ = ["FIGURES", "digest_in", "draw"]

Points = list[tuple[float, float]]
Series = dict[str, Points]
COLOURS = {32: "#d95f02", 64: "#1b9e77", 128: "#7570b3", 16: "#e7298a"}
SHAPES = ((4096, 4096, 4096), (8192, 8192, 8192), (4096, 1024, 4096))
LLM = ((4096, 4096), (28672, 4096), (4096, 14336))
PEER_STYLES = {"torch BSR 64, tuned": "x", "torch BSR 128, tuned": "+", "torch BSR 64": "1", "torch BSR 128": "2",
               "Triton gather v = 64": "^", "Triton gather v = 128": "v", "cuSPARSELt 2:4, searched": "s",
               "cuSPARSE CSR": ".", "cuSPARSE Blocked-ELL 64": "*"}  # fmt: skip


# -- data -------------------------------------------------------------------------------------------------------------


def products(data: Data) -> list[Row]:
    """The plain products of the card that was measured most."""
    return plain(fullest(data.of("spmm")))


def speedup_data(data: Data) -> dict[str, Series]:
    """Shape -> series (v = ..., or a peer) -> (sparsity, speed-up)."""
    found: dict[str, Series] = {}
    rows = [r for r in products(data) if r["speedup"]]
    others = [r for r in data.of("peers") if rows and r["gpu"] == rows[0]["gpu"] and is_comparable(r)]
    for m, k, n in SHAPES:
        here: Series = {}
        for r in rows:
            if (int(r["m"]), int(r["k"]), int(r["n"])) == (m, k, n):
                here.setdefault(f"v = {r['v']}", []).append((float(r["sparsity"]), float(r["speedup"])))
        for r in others:
            if (int(r["m"]), int(r["k"]), int(r["n"])) == (m, k, n) and r["peer"] in PEER_STYLES:
                here.setdefault(r["peer"], []).append((float(r["sparsity"]), float(r["speedup"])))
        if here:
            found[f"{m} x {k}, n = {n}"] = {name: sorted(points) for name, points in here.items()}
    return found


def roof_data(data: Data) -> Series:
    """v = ... -> (TFLOP/s on kept weights at the roof, reached)."""
    found: Series = {}
    for r in products(data):
        if r["speedup"] and r["roof_us"]:
            kept = 2e-6 * float(r["m"]) * float(r["k"]) * float(r["n"]) * (1 - float(r["sparsity"]))
            found.setdefault(f"v = {r['v']}", []).append((kept / float(r["roof_us"]), kept / float(r["median_us"])))
    return {name: sorted(points) for name, points in found.items()}


def small_n_data(data: Data) -> dict[str, Series]:
    """Layer -> v -> (n, GB/s of weights and activations moved once)."""
    found: dict[str, Series] = {}
    rows = [r for r in products(data) if r["gbps"] and int(r["n"]) <= 64 and float(r["sparsity"]) == 0.75]
    for m, k in LLM:
        here: Series = {}
        for r in rows:
            if (int(r["m"]), int(r["k"])) == (m, k):
                here.setdefault(f"v = {r['v']}", []).append((float(r["n"]), float(r["gbps"])))
        if here:
            found[f"{m} x {k}"] = {name: sorted(points) for name, points in here.items()}
    return found


def tradeoff_data(data: Data) -> Series:
    """v = ... -> (retained score of the default search, speed-up at 4096^3 with the same sparsity)."""
    found: Series = {}
    rows = [r for r in products(data) if r["speedup"]]
    kept: dict[tuple[int, float], list[float]] = {}
    for r in data.of("tradeoff"):
        if r["search"] == "refined":
            kept.setdefault((int(r["v"]), float(r["sparsity"])), []).append(float(r["retained"]))
    for (v, sparsity), scores in sorted(kept.items()):
        row = find(rows, 4096, 4096, 4096, sparsity, v)
        if row is not None:
            found.setdefault(f"v = {v}", []).append((sum(scores) / len(scores), float(row["speedup"])))
    return {name: sorted(points) for name, points in found.items()}


# -- drawing ----------------------------------------------------------------------------------------------------------


def _axes(columns: int = 1) -> tuple[Any, list[Any]]:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams.update({"svg.hashsalt": "shflnb", "svg.fonttype": "none", "font.size": 9, "axes.grid": True,
                         "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False})  # fmt: skip
    figure = Figure(figsize=(4.4 * columns + (0.4 if columns == 1 else 0.0), 3.6), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def _colour(name: str) -> str | None:
    return COLOURS.get(int(name.removeprefix("v = "))) if name.startswith("v = ") else None


def draw_speedup(found: dict[str, Series]) -> Any:
    figure, axes = _axes(len(found))
    for ax, (shape, series) in zip(axes, found.items(), strict=True):
        for name, points in series.items():
            x, y = [100 * p for p, _ in points], [q for _, q in points]
            if name.startswith("v = "):
                ax.plot(x, y, "o-", color=_colour(name), label=f"shflnb {name}")
            else:
                ax.plot(x, y, PEER_STYLES[name] + ":", color="0.35", linewidth=0.8, markersize=6, label=name)
        ax.axhline(1.0, color="black", linewidth=0.8)
        ax.set(title=shape, xlabel="zeros, %", yscale="log")
        ax.set_yticks([0.5, 1, 2, 4, 8, 16], ["0.5", "1", "2", "4", "8", "16"])
    axes[0].set_ylabel("speed-up over the dense library")
    axes[0].legend(fontsize=7)
    return figure


def draw_roof(found: Series) -> Any:
    figure, (ax,) = _axes()
    most = max(x for points in found.values() for x, _ in points)
    for name, points in found.items():
        ax.plot(
            [x for x, _ in points],
            [y for _, y in points],
            "o",
            markersize=3,
            alpha=0.6,
            color=_colour(name),
            label=name,
        )
    ax.plot([0, most], [0, most], color="black", linewidth=0.8, label="roof")
    ax.plot([0, most], [0, most / 2], color="black", linewidth=0.8, linestyle=":", label="half of it")
    ax.set(xlabel="TFLOP/s on kept weights at the roof", ylabel="TFLOP/s reached", xlim=(0, None), ylim=(0, None))
    ax.legend(fontsize=7)
    return figure


def draw_small_n(found: dict[str, Series]) -> Any:
    figure, axes = _axes(len(found))
    for ax, (layer, series) in zip(axes, found.items(), strict=True):
        for name, points in series.items():
            ax.plot([x for x, _ in points], [y for _, y in points], "o-", color=_colour(name), label=name)
        ax.set(title=f"{layer}, 75 % zeros", xlabel="n", xscale="log", ylim=(0, None))
        ax.set_xticks([1, 2, 4, 8, 16, 32, 64], ["1", "2", "4", "8", "16", "32", "64"])
    axes[0].set_ylabel("GB/s, weights and activations once")
    axes[0].legend(fontsize=7)
    return figure


def draw_tradeoff(found: Series) -> Any:
    figure, (ax,) = _axes()
    for name, points in found.items():
        ax.plot([100 * x for x, _ in points], [y for _, y in points], "o-", color=_colour(name), label=name)
    ax.axhline(1.0, color="black", linewidth=0.8)
    ax.set(xlabel="kept share of the score, %", ylabel="speed-up over the dense library, 4096 x 4096, n = 4096")
    ax.legend(fontsize=7)
    return figure


FIGURES: dict[str, tuple[str, Callable[[Data], Any], Callable[[Any], Any]]] = {
    "speedup": ("Speed-up against sparsity, by v, with other libraries (a 2:4 pattern has exactly half zeros)",
                speedup_data, draw_speedup),
    "roof": ("Rate on kept weights against the roof of the same product", roof_data, draw_roof),
    "tradeoff": ("Kept score of the default search against speed-up, by v", tradeoff_data, draw_tradeoff),
    "small_n": ("Bandwidth at few columns", small_n_data, draw_small_n),
}  # fmt: skip
"""Name of the SVG -> (caption, data, drawing)."""

assert set(COLOURS) >= set(V_SHOWN), "every v needs a colour"


def _digest(found: Any) -> str:
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]


def digest_in(path: Path) -> str | None:
    """The digest that an SVG of ours holds."""
    if not path.is_file():
        return None
    match = re.search(r"data digest ([0-9a-f]{16})", path.read_text(encoding="utf-8"))
    return match.group(1) if match else None


def draw(name: str, data: Data, folder: Path, *, write: bool) -> tuple[str, bool]:
    """(the Markdown for a figure, whether its file is up to date); with `write` the file is made up to date."""
    caption, select, paint = FIGURES[name]
    path, found = folder / f"{name}.svg", select(data)
    if not found:
        return "*No figure yet: the CSVs that it is drawn from do not exist.*\n", True
    card = card_name(products(data)[0]["gpu"], data)
    digest = _digest([card, found])
    is_current = digest_in(path) == digest
    if write and not is_current:
        folder.mkdir(parents=True, exist_ok=True)
        figure = paint(found)
        figure.suptitle(card, x=0.995, ha="right", fontsize=7)
        figure.savefig(path, metadata={"Date": None, "Description": f"data digest {digest}"})
        is_current = True
    return f"![{caption}; {card}](img/{name}.svg)\n", is_current
