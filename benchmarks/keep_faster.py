"""Other libraries at their best: what an earlier run of a search found, where the later one ended in something slower.

    python benchmarks/keep_faster.py EARLIER/<gpu>.peers.csv LATER/<gpu>.peers.csv

Peers that are searched, tuned or compiled have a few seconds for it in `bench_peers.py`, and do not find the same each
time. Rows of theirs that were faster in the earlier run, with its date and its own dense time, replace those of the
later CSV; all other rows stay. Both runs are on the same kind of card.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path

from bench_peers import FIELDS
from peers import GROUPS
from records import Results

SEARCHED = ("searched", "compile", "tuned")
"""Groups of peers that are kept."""
IDENTITY = ("peer", "m", "k", "n", "dtype", "sparsity")

Row = dict[str, str]


def read(path: Path) -> list[Row]:
    """All rows of a CSV of `bench_peers.py`."""
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != FIELDS:
            raise SystemExit(f"{path} is not a CSV of bench_peers.py")
        return list(reader)


def is_faster(row: Row, than: Row) -> bool:
    """Whether a row has a time, and the other one none or a longer one."""
    return bool(row["median_us"]) and (not than["median_us"] or float(row["median_us"]) < float(than["median_us"]))


def faster_rows(earlier: Sequence[Row], later: Sequence[Row]) -> tuple[list[Row], int]:
    """The later rows with what was faster before in their place, and how many those are."""
    names = {peer.name for group in SEARCHED for peer in GROUPS[group]}
    before = {tuple(row[key] for key in IDENTITY): row for row in earlier if row["peer"] in names}
    rows, kept = [], 0
    for row in later:
        other = before.get(tuple(row[key] for key in IDENTITY))
        if other is not None and is_faster(other, row):
            rows.append(other)
            kept += 1
        else:
            rows.append(row)
    return rows, kept


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("earlier", type=Path)
    parser.add_argument("later", type=Path, help="the CSV that is changed")
    given = parser.parse_args(arguments)
    earlier, later = read(given.earlier), read(given.later)
    cards = {row["gpu"] for row in (*earlier, *later)}
    if len(cards) > 1:
        raise SystemExit(f"the runs are on different cards: {', '.join(sorted(cards))}")
    rows, kept = faster_rows(earlier, later)
    results = Results(given.later, FIELDS)
    for row in rows:
        results.add(row)
    results.close()
    print(f"{kept} of {len(rows)} rows are those of {given.earlier}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
