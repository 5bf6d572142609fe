"""More tables: CPU, host cost, pattern search, models, few columns, repeatability, machines. See `tables.py`."""

from __future__ import annotations

import math
from collections.abc import Callable

from cases import REPEAT_ABOVE_US, REPEAT_WITHIN, few_bar_of
from tables import TABLES, Data, Row, absent, bars_of, card_name, fullest, markdown, micros, per_card, percent, ratio

__all__ = ["ALL_TABLES"]


def host(data: Data) -> str:
    """Host cost of a call."""
    return per_card(data, "host", host_part, absent("bench_host_cost.py"), key="machine")


def host_part(rows: list[Row], about: str) -> str:
    """Host cost of a call on one machine."""
    lines = [[r["what"], micros(r["median_us"]) if r["median_us"] else r["note"],
              f"{micros(r['p10_us'])} to {micros(r['p90_us'])}" if r["p10_us"] else "-"] for r in rows]  # fmt: skip
    return f"{about}.\n\n{markdown(['call', 'median', '10th to 90th percentile'], lines)}"


def cpu(data: Data) -> str:
    """README: the CPU table."""
    rows = fullest(data.of("cpu"), key="processor")
    if not rows:
        return absent("bench_cpu.py")
    first = rows[0]
    features = " with AVX-512" if "avx512f" in first.get("features", "") else ""
    lines = []
    for r in rows:
        times = [float(r[key]) for key in ("numpy_ms", "torch_ms") if r.get(key)]
        lines.append([
            f"{r['m']} x {r['k']}, n = {r['n']}", percent(r["sparsity"]), r["v"], r["dtype"], r["layout"],
            micros(str(1e3 * min(times))), micros(str(1e3 * float(r["sparse_ms"]))), ratio(r["speedup"]),
        ])  # fmt: skip
    header = ["product", "zeros", "v", "dtype", "layout", "dense", "shflnb", "speed-up"]
    return (
        f"Against the better of NumPy and torch on the same dtype; {first['processor']}{features}, {first['threads']} "
        f"threads, {first['date']}.\n\n{markdown(header, lines)}"
    )


def search(data: Data) -> str:
    """What each search keeps, as a share of the sum of |w|, on trained matrices."""
    rows = [r for r in data.of("prune_quality") if r["matrix"].startswith(("text", "digits"))]
    if not rows:
        return absent("bench_prune.py")
    patterns = {"unstructured": "single weights (the limit)", "n_m_1_4": "1 of 4", "block_wise": "blocks",
                "identity": "rows as given", "paper": "the paper's search", "fast": 'shflnb, `quality="fast"`',
                "default": "shflnb (default)", "best": 'shflnb, `quality="best"`'}  # fmt: skip
    heights = sorted({int(r["v"]) for r in rows})
    lines = []
    for column, name in patterns.items():
        by_v = [[float(r[column]) for r in rows if int(r["v"]) == v and r.get(column)] for v in heights]
        if any(by_v):
            lines.append([name, *(f"{100 * _geometric_mean(kept):.1f} %" if kept else "-" for kept in by_v)])
    count = len({r["matrix"] for r in rows})
    return (
        f"Kept share of the sum of |w| with three quarters of zeros, geometric mean over {count} trained matrices.\n\n"
        + markdown(["pattern or search", *(f"v = {v}" for v in heights)], lines)
    )


def search_time(data: Data) -> str:
    """How long the search takes, and how much memory."""
    rows = data.of("prune_time")
    if not rows:
        return absent("bench_prune.py")
    lines = []
    for r in rows:
        name = f"{r['search']}, {r['quality']}" if r["search"] == "refined" else r["search"]
        kept, memory = f"{100 * float(r['retained']):.1f} %", f"{float(r['memory_x']):.1f}x"
        weight = f"{r['m']} x {r['k']}, v = {r['v']}"
        lines.append([card_name(r["device"], data), weight, name, f"{float(r['seconds']):.3g} s", kept, memory])
    header = ["device", "weight", "search", "time", "kept score", "memory over the weight's"]
    return markdown(header, lines, left=3)


def _geometric_mean(values: list[float]) -> float:
    return math.exp(sum(math.log(value) for value in values) / len(values))


def models(data: Data) -> str:
    """Whole models and layers: time, speed-up over the dense model, and the bar where there is one."""
    return per_card(data, "models", models_part, absent("bench_models.py", " on a GPU"))


def models_part(measured: list[Row], about: str) -> str:
    """Whole models and layers on one card."""
    rows = [r for r in measured if r["median_us"] or r["speedup"] or r["note"]]
    lines = [
        [
            r["part"],
            r["case"],
            r["dtype"],
            r["what"],
            micros(r["median_us"]),
            ratio(r["speedup"]),
            r["bar"] or "-",
            r["note"],
        ]
        for r in rows
        if r["part"] not in ("slower", "estimate")
        or r["bar"]  # hundreds of layers: the CSV has them, the bar judges them
    ]
    if not lines:
        return ""
    header = ["part", "case", "dtype", "what", "time", "speed-up", "bar", "note"]
    return f"{about}{bars_of(rows)}.\n\n{markdown(header, lines, left=4)}"


def skinny(data: Data) -> str:
    """Few columns with the weights in device memory, the token-major ones against their bars."""
    return per_card(data, "skinny", skinny_part, absent("bench_skinny.py", " on a GPU"))


def skinny_part(measured: list[Row], about: str) -> str:
    """Few columns on one card."""
    wanted = {"what": "shflnb", "inputs": "rotated", "dtype": "float16"}
    rows = [r for r in measured if r["speedup"] and all(r[key] == value for key, value in wanted.items())]
    if not rows:
        return ""
    lines, met, judged = [], 0, 0

    def order(r: Row) -> tuple[float, ...]:
        return int(r["m"]), int(r["k"]), r["op"] == "matmul", float(r["sparsity"]), int(r["v"]), int(r["n"])

    for r in sorted(rows, key=order):
        is_token, n = r["op"] != "matmul", int(r["n"])
        bar = few_bar_of(int(r["m"]), int(r["k"]), n, float(r["sparsity"]), int(r["v"])) if is_token else None
        is_met = bar is not None and float(r["speedup"]) >= bar
        judged, met = judged + (bar is not None), met + is_met
        lines.append([
            f"{r['m']} x {r['k']}, n = {n}{'' if is_token else ', feature-major'}", percent(r["sparsity"]), r["v"],
            micros(r["dense_us"]), micros(r["median_us"]), ratio(r["speedup"]), "-" if bar is None else f"{bar:g}x",
            "-" if bar is None else "met" if is_met else "**missed**", f"{float(r['gbps']):.0f} GB/s",
            f"{float(r['percent_of_copy']):.0f} %",
        ])  # fmt: skip
    header = ["layer", "zeros", "v", "dense", "shflnb", "speed-up", "bar", "verdict", "packed bytes", "of a copy"]
    return f"{met} of {judged} bars met; {about}{bars_of(rows)}.\n\n{markdown(header, lines)}"


def repeat(data: Data) -> str:
    """How well two runs on a card agree."""
    return per_card(data, "repeat", repeat_part, absent("compare_runs.py A.csv B.csv", " on a GPU"))


def repeat_part(rows: list[Row], about: str) -> str:
    """How well two runs agree on one card."""
    within = f"{100 * REPEAT_WITHIN:g} %"
    lines = [
        [r["kind"], r["rows"], percent(r["within"]), f"{float(r['median_percent']):.2f} %",
         f"{float(r['worst_percent']):.1f} %", r["worst"]]
        for r in rows
    ]  # fmt: skip
    header = ["run", "times compared", f"within {within}", "median difference", "largest", "which is"]
    return f"Two runs one after the other, median times above {REPEAT_ABOVE_US:g} us; {about}.\n\n" + markdown(
        header, lines
    )


def limits(data: Data) -> str:
    """What the hardware's counters say of a product."""
    return per_card(data, "ncu", limits_part, absent("profile_spmm.py", " under Nsight Compute"))


def limits_part(rows: list[Row], about: str) -> str:
    """What the counters of one card say."""
    shares = ("l2_percent", "l1_percent", "sm_percent", "dram_percent", "l2_hit_percent")
    lines = [
        [f"{r['m']} x {r['k']}, n = {r['n']}", percent(r["sparsity"]), r["v"], micros(r["duration"]),
         *(f"{float(r[key]):.0f} %" for key in shares)]
        for r in rows
    ]  # fmt: skip
    header = ["product", "zeros", "v", "time", "L2", "L1 and shared memory", "SM", "device memory", "hits in L2"]
    return f"{about}, one launch each, cold.\n\n{markdown(header, lines)}"


def machines(data: Data) -> str:
    """Where and with what each CSV was measured."""
    if not data.machines:
        return absent("bench_spmm.py")
    lines = []
    for name, found in sorted(data.machines.items()):
        gpu_found, smi = found.get("gpu", {}), found.get("gpu", {}).get("nvidia_smi", {})
        after = found.get("nvidia_smi_after", {})
        card, _, run = name.rpartition(".")
        where = card_name(card, data) if gpu_found else f"{found['cpu']['name']}, {found['cpu']['cores']} cores"
        versions = ", ".join(f"{n} {v}" for n, v in found["packages"].items() if v and n in
                             ("torch", "triton", "numba", "numba-cuda", "cuda-core", "numpy"))  # fmt: skip
        clocks = f"SM {after.get('clocks.sm', '-')} after, {smi.get('clocks.max.sm', '-')} at most" if smi else "-"
        driver = smi.get("driver_version", "-")
        lines.append([run, where, driver, clocks, versions, found["date"][:10], f"{found.get('seconds', 0):.0f} s"])
    return markdown(["run", "machine", "driver", "clocks", "versions", "date", "took"], lines, left=7)


ALL_TABLES: dict[str, Callable[[Data], str]] = TABLES | {
    "cpu": cpu, "host": host, "search": search, "search_time": search_time, "models": models,
    "machines": machines, "limits": limits, "skinny": skinny, "repeat": repeat,
}  # fmt: skip
