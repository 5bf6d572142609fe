"""Fill the tables of README.md and docs/performance.md from the CSVs, and draw the figures; no figure is typed by hand.

    python benchmarks/report.py            writes what has changed
    python benchmarks/report.py --check    writes nothing; exit code 1 if something would change

A table stands between `<!-- table:NAME -->` and `<!-- /table:NAME -->`, a figure between markers named `figure_NAME`.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from plots import FIGURES, draw
from tables import Data
from tables_more import ALL_TABLES

__all__ = ["fill", "load", "update"]

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/performance.md")
KINDS = {
    "spmm": "*.spmm.csv", "peers": "*.peers.csv", "host": "*.host.csv", "cpu": "cpu_*.csv", "tradeoff": "tradeoff.csv",
    "prune_quality": "prune_quality*.csv", "prune_time": "prune_time_*.csv", "models": "*.models.csv",
    "skinny": "*.skinny.csv", "ncu": "*.ncu.csv", "repeat": "*.repeat.csv",
}  # fmt: skip
"""Kind of CSV -> the names of its files in `results/`."""
BLOCK = re.compile(r"<!-- table:(\w+) -->\n(.*?)<!-- /table:\1 -->", flags=re.DOTALL)


def load(folder: Path) -> Data:
    """Every CSV and every machine's JSON of a results folder; a row without a date gets that of its machine's JSON."""
    data = Data()
    for path in sorted(folder.glob("*.machine.json")):
        data.machines[path.name.removesuffix(".machine.json")] = json.loads(path.read_text(encoding="utf-8"))
    for kind, pattern in KINDS.items():
        rows = []
        for path in sorted(folder.glob(pattern)):
            date = data.machines.get(path.stem, {}).get("date", "")[:10]
            with path.open(newline="", encoding="utf-8") as file:
                rows += [row if row.get("date") else row | {"date": date} for row in csv.DictReader(file)]
        if rows:
            data.rows[kind] = rows
    return data


def fill(text: str, data: Data, images: Path, *, write: bool) -> tuple[str, list[str]]:
    """The page with its blocks made anew, and the names of figures whose files are out of date."""
    stale: list[str] = []

    def block(match: re.Match[str]) -> str:
        name = match.group(1)
        if name.startswith("figure_"):
            figure = name.removeprefix("figure_")
            if figure not in FIGURES:
                raise ValueError(f"the page asks for figure {figure!r}; there are {', '.join(FIGURES)}")
            content, is_current = draw(figure, data, images, write=write)
            if not is_current:
                stale.append(figure)
        elif name in ALL_TABLES:
            content = ALL_TABLES[name](data)
        else:
            raise ValueError(f"the page asks for table {name!r}; there are {', '.join(ALL_TABLES)}")
        return f"<!-- table:{name} -->\n{content}<!-- /table:{name} -->"

    return BLOCK.sub(block, text), stale


def update(root: Path = ROOT, *, write: bool = True) -> list[str]:
    """Make pages and figures equal what the CSVs say, or with `write=False` only look; what was, or is, out of date."""
    data, changed = load(root / "benchmarks" / "results"), []
    for name in PAGES:
        path = root / name
        if not path.is_file():
            continue
        before = path.read_text(encoding="utf-8")
        after, stale = fill(before, data, root / "docs" / "img", write=write)
        changed += [f"docs/img/{figure}.svg" for figure in stale]
        if after != before:
            changed.append(name)
            if write:
                path.write_text(after, encoding="utf-8")
    return changed


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if something would change")
    given = parser.parse_args(arguments)
    changed = update(write=not given.check)
    if changed:
        print(("out of date: " if given.check else "written: ") + ", ".join(changed))
    return 1 if given.check and changed else 0


if __name__ == "__main__":
    sys.exit(main())
