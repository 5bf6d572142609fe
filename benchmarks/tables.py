"""The tables of README.md and docs/performance.md, made from the CSVs in `results/`; Markdown text and nothing else.

Every function takes the rows of all CSVs and returns the block between two markers. Where a CSV is absent the block
says which program would write it. No table mixes cards: docs/performance.md has a sub-table for each, README shows the
newest.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from cases import BAR_CARD, BARS, LOADS, PEER_SHAPES, bar_of

__all__ = ["TABLES", "Data", "absent", "bars_of", "by_card", "card_name", "fullest", "is_comparable", "markdown",
           "per_card"]  # fmt: skip

Row = dict[str, str]
V_SHOWN = (32, 64, 128)
README_CASES = [
    (4096, 4096, 4096, (0.5, 0.75, 0.875)), (8192, 8192, 8192, (0.75,)), (2048, 2048, 4096, (0.75,)),
    (28672, 4096, 4096, (0.75,)), (4096, 14336, 4096, (0.75,)), (3072, 1024, 4096, (0.75,)),
    (4096, 1024, 4096, (0.75,)), (1024, 4096, 4096, (0.75,)),
]  # fmt: skip
BASELINE = "Speed-up over the better of `W @ X` and `F.linear`"
N_RANGES = ((1, 8), (9, 64), (65, 512), (513, 2048), (2049, 10**9))


@dataclass
class Data:
    """All rows by kind of CSV ("spmm", "peers", "host", "cpu", ...), and the machines' JSONs by "<machine>.<kind>"."""

    rows: dict[str, list[Row]] = field(default_factory=dict)
    machines: dict[str, dict[str, Any]] = field(default_factory=dict)

    def of(self, kind: str) -> list[Row]:
        """Rows of a kind; empty where no CSV of it exists."""
        return self.rows.get(kind, [])


def by_card(rows: Iterable[Row], key: str = "gpu") -> list[list[Row]]:
    """The rows of each card (the column `key`) apart, the largest measurement first; of equally large ones the newest.

    A quick run on another card does not take the place of a full one.
    """
    cards: dict[str, list[Row]] = {}
    for r in rows:
        cards.setdefault(r[key], []).append(r)
    largest = [(len(mine), max(r.get("date") or "" for r in mine), mine) for mine in cards.values()]
    return [mine for *_, mine in sorted(largest, key=lambda found: found[:2], reverse=True)]


def fullest(rows: Iterable[Row], key: str = "gpu") -> list[Row]:
    """The rows of the card that was measured most."""
    return next(iter(by_card(rows, key)), [])


def card_name(card: str, data: Data) -> str:
    """How to call a card, or a processor, whose files are called "nvidia-h100-80gb-hbm3"."""
    machine = next((found for name, found in data.machines.items() if name.rpartition(".")[0] == card), {})
    name = machine.get("gpu", {}).get("name") or (machine.get("cpu", {}).get("name") if "gpu" not in machine else None)
    name = name or (card.upper().replace("-", " ") if card.startswith("nvidia-") else card)
    return re.sub(r"(\d)GB\b", r"\1 GB", re.sub(r"[ -]HBM\w*", "", name))


def absent(script: str, needs: str = "") -> str:
    """What stands where there is nothing to show."""
    return f"*Not measured yet{needs}: `python benchmarks/{script}` writes what this table shows.*\n"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A Markdown table; the first `left` columns are aligned left, the others right."""
    lines = [
        "| " + " | ".join(header) + " |",
        "|" + "".join("---|" if i < left else "--:|" for i in range(len(header))),
    ]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def ratio(text: str) -> str:
    """ "2.3456" -> "2.35x"; nothing for nothing."""
    return f"{float(text):.2f}x" if text else "-"


def micros(text: str) -> str:
    """Microseconds with three digits: "94.7 us", "1.45 ms"."""
    if not text:
        return "-"
    us = float(text)
    if us < 1e3:
        return f"{us:.3g} us"
    return f"{us / 1e3:.3g} ms" if us < 1e6 else f"{us / 1e6:.3g} s"


def percent(text: str) -> str:
    """ "0.875" -> "87.5 %"."""
    return f"{100 * float(text):g} %"


def product_name(row: Row) -> str:
    """ "4096 x 4096 x 4096 (llm/o)"."""
    name = row["name"]
    sizes = f"{row['m']} x {row['k']}, n = {row['n']}"
    return sizes if name.startswith(("square", "wide", "skinny")) else f"{name}, {sizes}"


def plain(rows: Iterable[Row], **wanted: str) -> list[Row]:
    """Sparse rows of warm fp16 `matmul` on equal groups with the kernel that shflnb chooses, but for `wanted`.

    In bursts, where the file has such rows: older files have none, and no column of that name.
    """
    rows = list(rows)
    usual = {"what": "shflnb", "dtype": "float16", "op": "matmul", "groups": "equal", "kernel": "", "inputs": "warm"}
    usual["load"] = "burst" if any(r.get("load") == LOADS[0] for r in rows) else "sustained"
    usual |= wanted
    return [r for r in rows if all(r.get(key, "sustained") == value for key, value in usual.items())]


def find(rows: Iterable[Row], m: int, k: int, n: int, sparsity: float, v: int | None = None) -> Row | None:
    """The first row of a product."""
    for r in rows:
        if (int(r["m"]), int(r["k"]), int(r["n"]), float(r["sparsity"])) == (m, k, n, sparsity) and (
            v is None or int(r["v"]) == v
        ):
            return r
    return None


def conditions(rows: Sequence[Row], data: Data, kind: str, key: str = "gpu") -> str:
    """A few words about the card and the run."""
    found = data.machines.get(f"{rows[0][key]}.{kind}", {})
    smi = found.get("gpu", {}).get("nvidia_smi", {})
    driver = f", driver {smi['driver_version']}" if smi.get("driver_version") else ""
    torch = found.get("packages", {}).get("torch")
    library = f", torch {torch}" if torch else ""
    dates = sorted({r["date"] for r in rows if r.get("date")})
    when = f", {' to '.join(dict.fromkeys((dates[0], dates[-1])))}" if dates else ""
    return f"{card_name(rows[0][key], data)}{driver}{library}{when}"


def per_card(data: Data, kind: str, part: Callable[[list[Row], str], str], missing: str = "", key: str = "gpu") -> str:
    """A sub-table for each card. `part` gets a card's rows and their conditions; it returns "" if it needs others."""
    parts = [part(rows, conditions(rows, data, kind, key)) for rows in by_card(data.of(kind), key)]
    return "\n".join(text for text in parts if text) or missing


def bars_of(rows: Sequence[Row]) -> str:
    """What the line above judged rows adds for a card that the bars were not set for."""
    return "" if BAR_CARD.lower() in rows[0]["gpu"].lower() else f"; bars were set for an {BAR_CARD}"


# -- GPU --------------------------------------------------------------------------------------------------------------


def gpu(data: Data) -> str:
    """README: the headline table."""
    measured = fullest(data.of("spmm"))
    rows = plain(measured)
    if not rows:
        return absent("bench_spmm.py --full", " on a GPU")
    is_burst = rows[0].get("load") == "burst"
    sustained = plain(measured, load="sustained") if is_burst else []
    others = [r for r in data.of("peers") if r["gpu"] == rows[0]["gpu"]]
    lines = []
    for m, k, n, sparsities in README_CASES:
        for sparsity in sparsities:
            by_v = {v: find(rows, m, k, n, sparsity, v) for v in V_SHOWN}
            some = next((r for r in by_v.values() if r), None)
            if some is None:
                continue
            cells = [ratio(r["speedup"]) if r else "-" for r in by_v.values()]
            for place, v in enumerate(by_v):
                long = find(sustained, m, k, n, sparsity, v)
                if long and long["speedup"]:
                    cells[place] += f" ({ratio(long['speedup'])})"
            dense = f"{micros(some['dense_us'])}, {float(some['dense_tflops']):.0f} TFLOP/s"
            lines.append(
                [product_name(some), percent(str(sparsity)), dense, *cells, best_peer(others, m, k, n, sparsity)]
            )
    header = [
        "weight (m x k), columns n",
        "zeros",
        "dense (cuBLAS)",
        *(f"v = {v}" for v in V_SHOWN),
        "best other library",
    ]
    text = markdown(header, lines, left=1)
    load = (
        "in short bursts (in brackets: without a pause, at the card's power limit)" if is_burst else "without a pause"
    )
    return f"{BASELINE}, float16, device time, warm, {load}; {conditions(rows, data, 'spmm')}.\n\n{text}"


def best_peer(rows: Iterable[Row], m: int, k: int, n: int, sparsity: float) -> str:
    """The fastest other sparse library at the same sparsity."""
    found = [
        r for r in rows
        if (int(r["m"]), int(r["k"]), int(r["n"]), float(r["sparsity"])) == (m, k, n, sparsity)
        and is_comparable(r) and not r["peer"].startswith(("shflnb", "Triton gather"))
    ]  # fmt: skip
    if not found:
        return "-"
    best = max(found, key=lambda r: float(r["speedup"]))
    return f"{ratio(best['speedup'])} ({best['peer']})"


def is_comparable(row: Row) -> bool:
    """Whether a peer's row may stand beside others; one with a time and a note is less exact than its dtype allows."""
    return bool(row["speedup"]) and not row["note"]


def bars(data: Data) -> str:
    """Every case with a bar: what was reached, of which roof, and whether it holds."""
    return per_card(data, "spmm", bars_part, absent("bench_spmm.py --quick", " on a GPU"))


def bars_part(measured: list[Row], about: str) -> str:
    """The bars of one card."""
    rows = [r for op in ("matmul", "linear") for r in plain(measured, op=op)]
    lines, missed = [], 0
    wanted = {sparsity for _, sparsity, _ in BARS}
    for r in rows:
        bar = bar_of(r["name"], int(r["n"]), float(r["sparsity"]), r["op"], int(r["v"]))
        if bar is None or float(r["sparsity"]) not in wanted or not r["speedup"]:
            continue
        must, aim = bar
        reached = float(r["speedup"])
        verdict = "aim" if aim is not None and reached >= aim else "met" if reached >= must else "**missed**"
        missed += reached < must
        operation = " (`linear`, token-major)" if r["op"] == "linear" else ""
        lines.append([
            product_name(r) + operation, percent(r["sparsity"]), r["v"], micros(r["median_us"]), ratio(r["speedup"]),
            f"{must:g}x / {aim:g}x" if aim else f"{must:g}x", verdict,
            f"{float(r['percent_of_roof']):.0f} %, {r['roof_by']}",
        ])  # fmt: skip
    if not lines:
        return ""
    header = ["product", "zeros", "v", "time", "speed-up", "bar / aim", "verdict", "of the roof, set by"]
    text = f"{len(lines) - missed} of {len(lines)} bars met; {about}{bars_of(rows)}."
    return f"{text}\n\n{markdown(header, lines)}"


def variants(data: Data) -> str:
    """What bfloat16, unequal groups, the portable kernel and cold inputs cost, against the plain case."""
    return per_card(data, "spmm", variants_part, absent("bench_spmm.py --quick", " on a GPU"))


def variants_part(rows: list[Row], about: str) -> str:
    """The variants on one card."""
    base = plain(rows)
    kinds = {
        "bfloat16": plain(rows, dtype="bfloat16"),
        "unequal groups, same total": plain(rows, groups="spread"),
        "`spmm_sm80` (mma.sync), forced": plain(rows, kernel="sm80"),
        "inputs rotated past L2": plain(rows, inputs="rotated"),
    }
    lines = []
    for kind, found in kinds.items():
        best: dict[tuple[str, ...], Row] = {}
        for r in found:  # of several forced configs the fastest counts
            key = (r["m"], r["k"], r["n"], r["sparsity"], r["v"])
            if r["median_us"] and (key not in best or float(r["median_us"]) < float(best[key]["median_us"])):
                best[key] = r
        for r in best.values():
            usual = find(base, int(r["m"]), int(r["k"]), int(r["n"]), float(r["sparsity"]), int(r["v"]))
            against = "-"
            if usual and usual["median_us"]:
                against = f"{100 * (float(r['median_us']) / float(usual['median_us']) - 1):+.1f} %"
            lines.append([kind, product_name(r), percent(r["sparsity"]), r["v"], micros(r["median_us"]), against,
                          ratio(r["speedup"])])  # fmt: skip
    if not lines:
        return ""
    header = ["variant", "product", "zeros", "v", "time", "against the plain case", "over its own dense"]
    return f"{about}.\n\n{markdown(header, lines, left=2)}"


def peers(data: Data) -> str:
    """Every peer on every shape; why one is missing."""
    return per_card(data, "peers", peers_part, absent("bench_peers.py", " on a GPU"))


def peers_part(rows: list[Row], about: str) -> str:
    """The peers on one card."""
    parts = [f"{BASELINE}, float16, device time; {about}.\n"]
    names = list(dict.fromkeys(r["peer"] for r in rows))
    for shape in PEER_SHAPES:
        lines = []
        for name in names:
            mine = [r for r in rows if r["peer"] == name and (int(r["m"]), int(r["k"]), int(r["n"])) ==
                    (shape.m, shape.k, shape.n)]  # fmt: skip
            if not mine:
                continue
            cells = []
            for sparsity in (0.5, 0.75, 0.875):
                r = next((r for r in mine if float(r["sparsity"]) in (sparsity, 0.0) and r["speedup"]), None)
                shown = ratio(r["speedup"]) if r else "-"
                cells.append(shown if r is None or is_comparable(r) else f"({shown})")
            timed = [r for r in mine if r["speedup"]]
            eager = max((float(r["eager_us"]) for r in timed), default=None)
            error = max((float(r["error"]) for r in timed), default=None)
            lines.append([name, mine[0]["pattern"], *cells, "-" if eager is None else micros(str(eager)),
                          "-" if error is None else f"{error:.0e}"])  # fmt: skip
        if lines:
            header = ["", "pattern", "50 %", "75 %", "87.5 %", "eager call, slowest", "error"]
            parts.append(
                f"**{shape.m} x {shape.k}, n = {shape.n}** ({shape.name})\n\n{markdown(header, lines, left=2)}"
            )
    why = list(dict.fromkeys(f"- {r['peer']}: {r['note']}" for r in rows if r["note"] and not r["speedup"]))
    for name in names:
        loose = [float(r["error"]) for r in rows if r["peer"] == name and r["speedup"] and r["note"]]
        if loose:
            why.append(
                f"- {name}: in brackets, since its relative error there ({min(loose):.1e} to {max(loose):.1e}) is more "
                "than the rounding of a float16 result explains"
            )
    if why:
        parts.append("\n".join(why) + "\n")
    return "\n".join(parts)


def small_n(data: Data) -> str:
    """Few columns: time, speed-up and bandwidth."""
    return per_card(data, "spmm", small_n_part, absent("bench_spmm.py --full", " on a GPU"))


def small_n_part(measured: list[Row], about: str) -> str:
    """Few columns on one card."""
    rows = [r for r in plain(measured) if int(r["n"]) <= 64 and float(r["sparsity"]) == 0.75 and r["speedup"]]
    if not rows:
        return ""
    keys = list(dict.fromkeys((r["m"], r["k"], r["n"]) for r in rows))
    lines = []
    for m, k, n in keys:
        by_v = {v: find(rows, int(m), int(k), int(n), 0.75, v) for v in V_SHOWN}
        some = next(r for r in by_v.values() if r)
        cells = [f"{ratio(r['speedup'])}, {float(r['gbps']):.0f} GB/s" if r else "-" for r in by_v.values()]
        lines.append([f"{m} x {k}, n = {n}", micros(some["dense_us"]), *cells])
    return f"{about}.\n\n{markdown(['product, 75 %', 'dense', *(f'v = {v}' for v in V_SHOWN)], lines)}"


def no_help(data: Data) -> str:
    """Where the sparse product is slow: the least and the median speed-up by columns, sparsity and v."""
    return per_card(data, "spmm", no_help_part, absent("bench_spmm.py --full", " on a GPU"))


def no_help_part(measured: list[Row], about: str) -> str:
    """Where the sparse product is slow on one card."""
    rows = [r for r in plain(measured) if r["speedup"]]
    if not rows:
        return ""
    sparsities = sorted({float(r["sparsity"]) for r in rows})
    lines = []
    for low, high in N_RANGES:
        for v in V_SHOWN:
            cells = []
            for sparsity in sparsities:
                here = [r for r in rows if low <= int(r["n"]) <= high and int(r["v"]) == v]
                found = [float(r["speedup"]) for r in here if float(r["sparsity"]) == sparsity]
                if not found:
                    cells.append("-")
                    continue
                least = f"{min(found):.2f}"
                cells.append(f"{f'**{least}**' if min(found) < 1 else least} / {statistics.median(found):.2f}")
            if any(c != "-" for c in cells):
                lines.append([f"{low} to {high}" if high < 10**9 else f"{low} and more", str(v), *cells])
    slow = [r for r in rows if float(r["speedup"]) < 1]
    text = f"{len(slow)} of {len(rows)} measured products are slower than dense (least speed-up below 1 in bold)"
    return f"{text}; {about}.\n\n{markdown(['n', 'v', *(percent(str(s)) for s in sparsities)], lines)}"


TABLES: dict[str, Callable[[Data], str]] = {
    "gpu": gpu, "bars": bars, "variants": variants, "peers": peers, "small_n": small_n, "no_help": no_help,
}  # fmt: skip
