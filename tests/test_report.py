"""The pages show what the CSVs say: no more, no less, and nothing that was typed by hand."""

from __future__ import annotations

import csv
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

ROOT = Path(__file__).parents[1]
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in report.PAGES}
# What a measurement looks like, as in test_readme.py.
FIGURE = re.compile(r"\b\d+(\.\d+)?( ?x\b(?!\d)|[  ](us|ms|s|[GT]B/s|[GT]FLOP/s|times)\b)")


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
        few | {"n": 1, "inputs": "warm", "speedup": 9}, few | {"n": 1, "what": "dense F.linear"},
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
            "part": "bert",
            "case": "32 x 512",
            "what": "sparse",
            "dtype": "float16",
            "median_us": 5e4,
            "speedup": 1.777,
            "bar": 1.5,
        },
        {"part": "slower", "case": "one of many layers", "what": "sparse", "speedup": 1.1},
    ]
    write_csv(results / "testgpu.models.csv", MODEL_FIELDS, models)
    write_csv(results / "testgpu.host.csv", HOST_FIELDS, [
        {"machine": "testgpu", "what": "shflnb.matmul", "median_us": 11.25, "p10_us": 11, "p90_us": 12},
        {"machine": "testgpu", "what": "torch 2:4 (cuSPARSELt)", "note": "cannot run because of a test"},
    ])  # fmt: skip
    return tmp_path


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
