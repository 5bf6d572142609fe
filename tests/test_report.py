"""The pages show what the CSVs say: no more, no less, and nothing that was typed by hand."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import cases
import plots
import pytest
import report
import tables
import tables_more
from bench_host_cost import FIELDS as HOST_FIELDS
from bench_models import FIELDS as MODEL_FIELDS
from bench_peers import FIELDS as PEER_FIELDS
from bench_prune import QUALITY_FIELDS, TIME_FIELDS
from bench_skinny import FIELDS as SKINNY_FIELDS
from bench_spmm import FIELDS as SPMM_FIELDS
from bench_tradeoff import FIELDS as TRADEOFF_FIELDS
from compare_runs import FIELDS as REPEAT_FIELDS

ROOT = Path(__file__).parents[1]
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in report.PAGES}
# What a measurement looks like, as in test_readme.py.
FIGURE = re.compile(r"\b\d+(\.\d+)?( ?x\b(?!\d)|[  ](us|ms|s|[GT]B/s|[GT]FLOP/s|times)\b)")


H100, H200 = "nvidia-h100-80gb-hbm3", "nvidia-h200"


def write_csv(path: Path, fields: tuple[str, ...], rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows(rows)


def spmm(m: int, k: int, n: int, sparsity: float, v: int, speedup: float, **other: Any) -> dict[str, Any]:
    name = {(4096, 4096, 4096): "square-4096", (2048, 2048, 4096): "wide-2048"}.get((m, k, n), "llm/o")
    return {
        "gpu": "testgpu", "date": "2026-01-02", "name": name, "m": m, "k": k, "n": n, "sparsity": sparsity, "v": v,
        "dtype": "float16", "op": "matmul", "groups": "equal", "kernel": "", "inputs": "warm", "load": "burst",
        "what": "shflnb", "median_us": 180.0 / speedup, "dense_us": 180.0, "dense_tflops": 763,
        "speedup": speedup, "roof_us": 40,
        "roof_by": "tensor cores", "percent_of_roof": 66, "gbps": 1234, "error": "2e-4",
    } | other  # fmt: skip


def peer(name: str, sparsity: float, speedup: float | None, note: str = "") -> dict[str, Any]:
    row = {"gpu": "testgpu", "date": "2026-01-02", "name": "square-4096", "m": 4096, "k": 4096, "n": 4096,
           "sparsity": sparsity, "dtype": "float16", "peer": name, "pattern": "any", "note": note}  # fmt: skip
    if speedup is not None:
        row |= {"median_us": 180 / speedup, "dense_us": 180, "speedup": speedup, "eager_us": 300, "error": "3e-4"}
    return row


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository with the pages of this one and CSVs of known content."""
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    for name, text in PAGES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    rows = [
        spmm(4096, 4096, 4096, 0.75, 64, 2.718), spmm(4096, 4096, 4096, 0.75, 128, 2.5),
        spmm(4096, 4096, 4096, 0.5, 32, 0.8), spmm(2048, 2048, 4096, 0.75, 128, 2.25),
        spmm(4096, 4096, 1, 0.75, 64, 1.9), spmm(4096, 4096, 4096, 0.75, 64, 2.432, load="sustained"),
        spmm(4096, 4096, 4096, 0.75, 64, 2.6, dtype="bfloat16", median_us=68.0),
        spmm(4096, 4096, 4096, 0.75, 64, 1.4, kernel="sm80", median_us=130.0),
        spmm(4096, 4096, 4096, 0.75, 64, 1.5, kernel="sm80", median_us=120.0),
        {"gpu": "testgpu", "date": "2026-01-02", "name": "square-4096", "m": 4096, "k": 4096, "n": 4096, "sparsity": 0,
         "dtype": "float16", "op": "matmul", "inputs": "warm", "what": "dense W @ X", "median_us": 180},
    ]  # fmt: skip
    write_csv(results / "testgpu.spmm.csv", SPMM_FIELDS, rows)
    write_csv(results / "testgpu.peers.csv", PEER_FIELDS, [
        peer("torch BSR 128, tuned", 0.75, 1.6789), peer("cuSPARSE CSR", 0.75, 0.02), peer("shflnb v = 64", 0.75, 9.0),
        peer("cuSPARSE Blocked-ELL 32", 0.75, None, "cannot run because OSError: libcusparse was not found"),
    ])  # fmt: skip
    tradeoff = [
        {"v": v, "sparsity": s, "search": search, "retained": kept, "matrix": "text_q0"}
        for v, s, search, kept in ((64, 0.75, "refined", 0.4), (64, 0.75, "paper", 0.3), (128, 0.75, "refined", 0.35))
    ]
    few = {
        "gpu": "testgpu",
        "date": "2026-01-02",
        "m": 28672,
        "k": 4096,
        "sparsity": 0.75,
        "v": 64,
        "dtype": "float16",
        "inputs": "rotated",
        "what": "shflnb",
        "median_us": 17,
        "dense_us": 57,
        "gbps": 3500,
        "percent_of_copy": 85,
    }
    write_csv(results / "testgpu.skinny.csv", SKINNY_FIELDS, [
        few | {"n": 1, "speedup": 3.353}, few | {"n": 16, "speedup": 2.5},
        few | {"n": 16, "op": "matmul", "speedup": 2.25}, few | {"n": 1, "inputs": "warm", "speedup": 9},
        few | {"n": 1, "what": "dense F.linear"},
    ])  # fmt: skip
    write_csv(results / "tradeoff.csv", TRADEOFF_FIELDS, tradeoff)
    quality = [
        {"matrix": name, "m": 384, "k": 384, "v": 32, "unstructured": 0.5, "default": kept, "paper": 0.25}
        for name, kept in (("text_q0", 0.4), ("text_q1", 0.1), ("gaussian", 0.9))
    ]
    write_csv(results / "prune_quality.csv", tuple(QUALITY_FIELDS), quality)
    write_csv(results / "prune_time_test.csv", tuple(TIME_FIELDS), [
        {"device": "testgpu", "m": 4096, "k": 4096, "v": 64, "search": "refined", "quality": "fast", "retained": 0.3456,
         "seconds": 1.234, "memory_x": 3.21}
    ])  # fmt: skip
    models = [
        {
            "gpu": "testgpu",
            "part": "bert",
            "case": "32 x 512",
            "what": "sparse",
            "dtype": "float16",
            "median_us": 5e4,
            "speedup": 1.777,
            "bar": 1.5,
        },
        {"gpu": "testgpu", "part": "slower", "case": "one of many layers", "what": "sparse", "speedup": 1.1},
    ]
    write_csv(results / "testgpu.models.csv", MODEL_FIELDS, models)
    write_csv(results / "testgpu.host.csv", HOST_FIELDS, [
        {"machine": "testgpu", "what": "shflnb.matmul", "median_us": 11.25, "p10_us": 11, "p90_us": 12},
        {"machine": "testgpu", "what": "torch 2:4 (cuSPARSELt)", "note": "cannot run because of a test"},
    ])  # fmt: skip
    write_csv(results / "testgpu.repeat.csv", REPEAT_FIELDS, [
        {"gpu": "testgpu", "date": "2026-01-02", "kind": "spmm", "rows": 123, "within": 0.975, "median_percent": 0.431,
         "worst_percent": 4.56, "worst": "4096 x 4096, n = 64"}
    ])  # fmt: skip
    machine = {"date": "2026-01-03T10:00:00+00:00", "cpu": {"name": "a CPU", "cores": 4}, "packages": {"torch": "2.0"},
               "gpu": {"name": "testgpu", "nvidia_smi": {"driver_version": "1.2.3"}}}  # fmt: skip
    (results / "testgpu.models.machine.json").write_text(json.dumps(machine), encoding="utf-8")
    return tmp_path


@pytest.fixture
def cards(root: Path) -> Path:
    """The same, measured on an H200 and, some days later and with other speed-ups, on an H100."""
    results = root / "benchmarks" / "results"
    for path in [*results.glob("testgpu.*.csv"), *results.glob("testgpu.*.json")]:
        text = path.read_text(encoding="utf-8")
        newer = text.replace("2026-01-02", "2026-02-03").replace("2026-01-03", "2026-02-04")
        for old, new in (("2.718", "2.222"), ("3.353", "3.111"), ("1.6789", "1.3456"), ("1.777", "1.444")):
            newer = newer.replace(old, new)
        for card, content, name in ((H200, text, "NVIDIA H200"), (H100, newer, "NVIDIA H100 80GB HBM3")):
            content = content.replace('"name": "testgpu"', f'"name": "{name}"').replace("testgpu", card)
            (results / path.name.replace("testgpu", card)).write_text(content, encoding="utf-8")
        path.unlink()
    return root


def block(text: str, name: str) -> str:
    found = [match.group(2) for match in report.BLOCK.finditer(text) if match.group(1) == name]
    assert len(found) == 1, name
    return found[0]


def test_the_committed_pages_and_figures_are_up_to_date() -> None:
    assert report.update(write=False) == [], "run: python benchmarks/report.py"
    assert report.main(["--check"]) == 0


def test_no_figure_on_the_page_was_typed_by_hand() -> None:
    assert FIGURE.search(report.BLOCK.sub("", PAGES["docs/performance.md"])) is None


def test_every_table_and_figure_is_on_a_page() -> None:
    named = {match.group(1) for text in PAGES.values() for match in report.BLOCK.finditer(text)}
    assert named == set(tables_more.ALL_TABLES) | {f"figure_{name}" for name in plots.FIGURES}


def test_an_update_changes_only_blocks_and_is_stable(root: Path) -> None:
    changed = report.update(root)
    assert set(report.PAGES) <= set(changed)
    for name, before in PAGES.items():
        after = (root / name).read_text(encoding="utf-8")
        assert report.BLOCK.sub("", after) == report.BLOCK.sub("", before)
    assert report.update(root, write=False) == []
    assert report.update(root) == []


def test_a_changed_csv_is_noticed(root: Path) -> None:
    report.update(root)
    path = root / "benchmarks/results/testgpu.spmm.csv"
    path.write_text(path.read_text(encoding="utf-8").replace("2.718", "2.818"), encoding="utf-8")
    assert set(report.update(root, write=False)) >= {"README.md", "docs/performance.md", "docs/img/speedup.svg"}
    (root / "README.md").write_text((root / "README.md").read_text(encoding="utf-8").replace("2.50x", "3.50x"))
    assert "README.md" in report.update(root, write=False)


def test_headline_table(root: Path) -> None:
    report.update(root)
    text = block((root / "README.md").read_text(encoding="utf-8"), "gpu")
    assert (
        "| 4096 x 4096, n = 4096 | 75 % | 180 us, 763 TFLOP/s | - | 2.72x (2.43x) | 2.50x "
        "| 1.68x (torch BSR 128, tuned) |" in text
    )
    assert "| 4096 x 4096, n = 4096 | 50 % | 180 us, 763 TFLOP/s | 0.80x | - | - | - |" in text
    assert "in brackets: without a pause" in text and "testgpu" in text and "2026-01-02" in text and "9.00x" not in text


def test_bars_are_judged(root: Path) -> None:
    report.update(root)
    text = block((root / "docs/performance.md").read_text(encoding="utf-8"), "bars")
    assert text.startswith("2 of 3 bars met")
    assert re.search(r"4096 x 4096, n = 4096 \| 75 % \| 64 \| 66\.2 us \| 2\.72x \| 2\.2x / 2\.7x \| aim \| 66 %", text)
    assert re.search(r"75 % \| 128 \|.*2\.50x \| 2\.9x / 3\.5x \| \*\*missed\*\*", text)
    assert re.search(r"2048 x 2048, n = 4096 .*2\.25x \| 2\.2x / 2\.8x \| met", text)


def test_few_columns_are_judged(root: Path) -> None:
    report.update(root)
    text = block((root / "docs/performance.md").read_text(encoding="utf-8"), "skinny")
    assert text.startswith("1 of 2 bars met") and "9.00x" not in text
    assert "| 28672 x 4096, n = 1 | 75 % | 64 | 57 us | 17 us | 3.35x | 3.3x | met | 3500 GB/s | 85 % |" in text
    assert re.search(r"n = 16 .* 2\.50x \| 3\.3x \| \*\*missed\*\*", text)
    assert re.search(r"n = 16, feature-major .* 2\.25x \| - \| - ", text), "bars are for token-major x"


def test_variants_are_compared_with_the_plain_case(root: Path) -> None:
    report.update(root)
    text = block((root / "docs/performance.md").read_text(encoding="utf-8"), "variants")
    assert re.search(r"bfloat16 .* \| 68 us \| \+2\.7 % \| 2\.60x", text)
    assert text.count("mma.sync") == 1 and re.search(r"mma\.sync.*\| 120 us .* 1\.50x", text)


def test_a_peer_that_cannot_run_says_why(root: Path) -> None:
    report.update(root)
    text = block((root / "docs/performance.md").read_text(encoding="utf-8"), "peers")
    assert "- cuSPARSE Blocked-ELL 32: cannot run because OSError: libcusparse was not found" in text
    assert re.search(r"\| cuSPARSE Blocked-ELL 32 \| any \| - \| - \| - \|", text)
    assert re.search(r"\| cuSPARSE CSR \| any \| - \| 0\.02x \| - \| 300 us \| 3e-04 \|", text)
    assert "cannot run because of a test" in block((root / "docs/performance.md").read_text(encoding="utf-8"), "host")


def test_a_peer_that_is_less_exact_stands_in_brackets(root: Path) -> None:
    path = root / "benchmarks/results/testgpu.peers.csv"
    note = "its relative error is above the limit"
    write_csv(path, PEER_FIELDS, [
        peer("cuSPARSE CSR", 0.5, 7.77, note) | {"error": 0.0019},
        peer("cuSPARSE CSR", 0.75, 6.66, note) | {"error": 0.001},
        peer("cuSPARSE CSR", 0.875, 0.05), peer("torch BSR 64", 0.75, 1.1),
    ])  # fmt: skip
    report.update(root)
    text = block((root / "docs/performance.md").read_text(encoding="utf-8"), "peers")
    assert "| cuSPARSE CSR | any | (7.77x) | (6.66x) | 0.05x | 300 us | 2e-03 |" in text
    assert "- cuSPARSE CSR: in brackets, since its relative error there (1.0e-03 to 1.9e-03) is more than" in text
    headline = block((root / "README.md").read_text(encoding="utf-8"), "gpu")
    assert "1.10x (torch BSR 64)" in headline and "cuSPARSE" not in headline  # neither there nor in the figure
    found = plots.speedup_data(report.load(path.parent))["4096 x 4096, n = 4096"]
    assert found["cuSPARSE CSR"] == [(0.875, 0.05)]


def test_cards_are_told_apart() -> None:
    rows = [{"gpu": g, "date": d} for g, d in (("a", "1"), ("b", "2"), ("c", "2"), ("c", "1"), ("d", "0"), ("d", "0"))]
    assert [(mine[0]["gpu"], len(mine)) for mine in tables.by_card(rows)] == [("c", 2), ("d", 2), ("b", 1), ("a", 1)]
    assert tables.fullest(rows) == rows[2:4] and tables.fullest([]) == [] and tables.by_card([]) == []


def test_cards_have_readable_names() -> None:
    data = tables.Data(machines={
        "nvidia-h200.spmm": {"gpu": {"name": "NVIDIA H200"}}, "amd.host": {"cpu": {"name": "AMD EPYC"}},
        f"{H100}.spmm": {"gpu": {"name": "NVIDIA H100 80GB HBM3"}, "cpu": {"name": "Xeon"}},
    })  # fmt: skip
    names = {H200: "NVIDIA H200", H100: "NVIDIA H100 80 GB", "amd": "AMD EPYC", "other": "other"}
    assert {card: tables.card_name(card, data) for card in names} == names
    assert tables.card_name(H100, tables.Data()) == "NVIDIA H100 80 GB"


def test_no_table_mixes_cards(cards: Path) -> None:
    report.update(cards)
    page = (cards / "docs/performance.md").read_text(encoding="utf-8")
    of_cards = ("bars", "variants", "peers", "small_n", "no_help", "models", "skinny", "host")
    for name in of_cards:
        text = block(page, name)
        assert text.count("NVIDIA H100 80 GB") == text.count("NVIDIA H200") == 1, name
        assert text.index("NVIDIA H100 80 GB") < text.index("NVIDIA H200"), name  # the newest first
        assert "H100" not in text[text.index("NVIDIA H200") :], name
        assert "hbm3" not in text.lower() and "nvidia-h" not in text, name
    newer, older = re.split(r"(?=^.*NVIDIA H200)", block(page, "bars"), maxsplit=1, flags=re.MULTILINE)
    assert "2.22x" in newer and "2026-02-03" in newer and "2.72x" not in newer
    assert "2.72x" in older and "2026-01-02" in older and "2.22x" not in older
    newer, older = re.split(r"(?=^.*NVIDIA H200)", block(page, "peers"), maxsplit=1, flags=re.MULTILINE)
    assert "1.35x" in newer and "1.68x" in older and newer.count("libcusparse was not found") == 1
    newer, older = re.split(r"(?=^.*NVIDIA H200)", block(page, "models"), maxsplit=1, flags=re.MULTILINE)
    assert "1.44x" in newer and "2026-02-04" in newer and "1.78x" in older and "2026-01-03" in older


def test_a_card_that_the_bars_were_not_set_for_is_judged_and_told_so(cards: Path) -> None:
    report.update(cards)
    page = (cards / "docs/performance.md").read_text(encoding="utf-8")
    for name, verdict in (("bars", "of 3 bars met; "), ("skinny", "of 2 bars met; "), ("models", "")):
        lines = [line for line in block(page, name).splitlines() if "NVIDIA H" in line]
        newer, older = lines
        assert verdict in newer and verdict in older
        assert newer.endswith("; bars were set for an H200.") and "set for" not in older, name


def test_readme_and_figures_show_the_card_that_was_measured_last(cards: Path) -> None:
    report.update(cards)
    headline = block((cards / "README.md").read_text(encoding="utf-8"), "gpu")
    assert "NVIDIA H100 80 GB" in headline and "H200" not in headline
    assert "2.22x (2.43x)" in headline and "1.35x (torch BSR 128, tuned)" in headline and "2.72x" not in headline
    results = cards / "benchmarks/results"
    found = plots.speedup_data(report.load(results))["4096 x 4096, n = 4096"]
    assert found["v = 64"] == [(0.75, 2.222)] and found["torch BSR 128, tuned"] == [(0.75, 1.3456)]
    assert plots.tradeoff_data(report.load(results))["v = 64"] == [(0.4, 2.222)]
    assert "NVIDIA H100 80 GB" in (cards / "docs/img/roof.svg").read_text(encoding="utf-8")
    assert "; NVIDIA H100 80 GB](img/roof.svg)" in (cards / "docs/performance.md").read_text(encoding="utf-8")
    (results / f"{H100}.peers.csv").unlink()  # another card's peers must not stand beside its products
    report.update(cards)
    headline = block((cards / "README.md").read_text(encoding="utf-8"), "gpu")
    assert "2.22x" in headline and "torch BSR" not in headline
    assert "torch BSR 128, tuned" not in plots.speedup_data(report.load(results))["4096 x 4096, n = 4096"]


def test_all_machines_are_listed(cards: Path) -> None:
    report.update(cards)
    text = block((cards / "docs/performance.md").read_text(encoding="utf-8"), "machines")
    assert "| models | NVIDIA H200 | 1.2.3 |" in text and "| models | NVIDIA H100 80 GB | 1.2.3 |" in text


def test_repeatability(root: Path) -> None:
    text = tables_more.ALL_TABLES["repeat"](report.load(root / "benchmarks" / "results"))
    assert text.startswith("Two runs one after the other, median times above 20 us; testgpu, 2026-01-02.\n\n")
    assert "| run | times compared | within 3 % | median difference | largest | which is |" in text
    assert "| spmm | 123 | 97.5 % | 0.43 % | 4.6 % | 4096 x 4096, n = 64 |" in text


def test_where_it_does_not_help(root: Path) -> None:
    report.update(root)
    text = block((root / "docs/performance.md").read_text(encoding="utf-8"), "no_help")
    assert text.startswith("1 of 5 measured products are slower")
    assert "| 2049 and more | 32 | **0.80** / 0.80 | - |" in text and "| 1 to 8 | 64 | - | 1.90 / 1.90 |" in text


def test_search_tables(root: Path) -> None:
    report.update(root)
    page = (root / "docs/performance.md").read_text(encoding="utf-8")
    text = block(page, "search")
    assert "over 2 trained matrices" in text and "| shflnb (default) | 20.0 % |" in text  # sqrt(0.4 * 0.1)
    assert "| single weights (the limit) | 50.0 % |" in text and "best" not in text
    row = "| testgpu | 4096 x 4096, v = 64 | refined, fast | 1.23 s | 34.6 % | 3.2x |"
    assert row in block(page, "search_time")


def test_models_table(root: Path) -> None:
    report.update(root)
    text = block((root / "docs/performance.md").read_text(encoding="utf-8"), "models")
    assert "| bert | 32 x 512 | float16 | sparse | 50 ms | 1.78x | 1.5 |" in text and "one of many" not in text


def test_tradeoff_joins_kept_score_and_speed(root: Path) -> None:
    found = plots.tradeoff_data(report.load(root / "benchmarks" / "results"))
    assert found == {"v = 64": [(0.4, 2.718)], "v = 128": [(0.35, 2.5)]}


def test_without_csvs_every_block_says_what_is_missing(tmp_path: Path) -> None:
    data = report.load(tmp_path)
    for name, table in tables_more.ALL_TABLES.items():
        assert re.search(r"Not measured yet.*`python benchmarks/\w+\.py", table(data)), name
    for name in plots.FIGURES:
        text, is_current = plots.draw(name, data, tmp_path, write=True)
        assert "No figure yet" in text and is_current
    assert not list(tmp_path.glob("*.svg"))


def test_programs_named_by_empty_tables_exist() -> None:
    texts = [table(tables.Data()) for table in tables_more.ALL_TABLES.values()]
    for script in {name for text in texts for name in re.findall(r"benchmarks/(\w+\.py)", text)}:
        assert (ROOT / "benchmarks" / script).is_file(), script


def test_figures_hold_their_data(root: Path) -> None:
    report.update(root)
    for name in ("speedup", "roof", "small_n", "tradeoff"):
        text = (root / f"docs/img/{name}.svg").read_text(encoding="utf-8")
        assert "<svg" in text and plots.digest_in(root / f"docs/img/{name}.svg")
    assert "torch BSR 128, tuned" in (root / "docs/img/speedup.svg").read_text(encoding="utf-8")


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="table 'nothing'"):
        report.fill("<!-- table:nothing -->\n<!-- /table:nothing -->", tables.Data(), tmp_path, write=False)
    with pytest.raises(ValueError, match="figure 'nothing'"):
        report.fill(
            "<!-- table:figure_nothing -->\n<!-- /table:figure_nothing -->", tables.Data(), tmp_path, write=False
        )


def test_every_bar_is_measured() -> None:
    judged = {
        (c.shape.name.split("/")[0], c.sparsity, c.op, c.v)
        for c in cases.table_cases()
        if (c.dtype, c.groups, c.kernel, c.inputs) == ("float16", "equal", "", "warm")
        and cases.bar_of(c.shape.name, c.shape.n, c.sparsity, c.op, c.v)
    }
    wanted = {(name.split("/")[0], s, op, v) for (name, s, op), by_v in cases.BARS.items() for v in by_v}
    assert judged == wanted
