"""Do two runs on the same card agree? Median times above 20 us should differ by no more than 3 %.

    python benchmarks/compare_runs.py FIRST/nvidia-h200.spmm.csv SECOND/nvidia-h200.spmm.csv --out DIR

Any two CSVs of a kind that have `median_us`; rows are matched by the columns that say what was measured. Prints the
rows that differ by more, and writes `<gpu>.repeat.csv`: one row for each kind, in the place of the kind's last one.
Exit code 1 if fewer than 95 % of the times agree.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cases import REPEAT_ABOVE_US, REPEAT_SHARE, REPEAT_WITHIN
from records import RESULTS, Results

FIELDS = ("gpu", "date", "kind", "rows", "within", "median_percent", "worst_percent", "worst", "below", "unmatched")
IDENTITY = (
    "part", "case", "name", "m", "k", "n", "sparsity", "v", "dtype", "op", "groups", "kernel", "inputs", "load",
    "device", "what", "peer", "pattern",
)  # fmt: skip
"""What says which product a row is about. A peer's `variant` does not: it is what was fastest in its own run."""

Row = dict[str, str]


@dataclass(frozen=True)
class Comparison:
    """Relative differences of the times above the limit, the largest first, each with what was measured."""

    differences: list[tuple[float, str]]
    below: int
    """Rows with shorter times."""
    unmatched: int
    """Rows that only one of the runs has."""

    @property
    def within(self) -> float:
        """Share of the times that agree."""
        return sum(difference <= REPEAT_WITHIN for difference, _ in self.differences) / len(self.differences)

    @property
    def median(self) -> float:
        """The median difference."""
        return statistics.median(difference for difference, _ in self.differences)


def read(path: Path) -> list[Row]:
    """The rows that have a time."""
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if "median_us" not in (reader.fieldnames or ()):
            raise ValueError(f"{path} has no column median_us")
        return [row for row in reader if row["median_us"]]


def named(rows: Sequence[Row]) -> dict[tuple[str, ...], Row]:
    """Rows by what they measure; a forced kernel is measured with each of its configs, so their names count as well."""
    found: dict[tuple[str, ...], Row] = {}
    seen: Counter[tuple[str, ...]] = Counter()
    for row in rows:
        key = (*(row.get(column, "") for column in IDENTITY), row["config"] if row.get("kernel") else "")
        numbered = (*key, str(seen[key]))
        found[numbered] = row
        seen[key] += 1
    return found


def title(row: Row) -> str:
    """What a row measures, to read: "4096 x 4096, n = 8, 75 %, v = 64, float16, linear, rotated, shflnb"."""
    parts = [row.get("part", ""), row.get("case", "")]
    if row.get("m"):
        parts += [f"{row['m']} x {row['k']}", f"n = {row['n']}"]
    if row.get("sparsity") and float(row["sparsity"]):
        parts.append(f"{100 * float(row['sparsity']):g} %")
    parts.append(f"v = {row['v']}" if row.get("v") else "")
    parts += [row.get(column, "") for column in ("dtype", "op", "groups", "inputs", "load", "what", "peer")]
    parts.append(row["config"] if row.get("kernel") else "")
    return ", ".join(part for part in parts if part)


def compare(first: Sequence[Row], second: Sequence[Row]) -> Comparison:
    """Match the rows of two runs; times are compared if the mean of both is above the limit."""
    here, there = named(first), named(second)
    differences: list[tuple[float, str]] = []
    below = 0
    for key in (key for key in here if key in there):
        a, b = float(here[key]["median_us"]), float(there[key]["median_us"])
        if (a + b) / 2 <= REPEAT_ABOVE_US:
            below += 1
            continue
        differences.append((max(a, b) / min(a, b) - 1, title(here[key])))
    return Comparison(sorted(differences, reverse=True), below, len(here.keys() ^ there.keys()))


def write(path: Path, row: dict[str, str]) -> None:
    """Put a kind's row into the CSV, in the place of an older one of the kind."""
    kept: list[Row] = []
    if path.is_file():
        with path.open(newline="", encoding="utf-8") as file:
            kept = [old for old in csv.DictReader(file) if old["kind"] != row["kind"]]
    results = Results(path, FIELDS)
    for one in [*kept, row]:
        results.add(one)
    results.close()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs=2, metavar="CSV", help="of two runs, named <gpu>.<kind>.csv")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV")
    given = parser.parse_args(arguments)
    try:
        first, second = (read(path) for path in given.runs)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    cards = {row.get("gpu") or row.get("machine", "") for row in (*first, *second)}
    kinds = {path.stem.rpartition(".")[2] for path in given.runs}
    if len(cards) != 1 or len(kinds) != 1:
        parser.error(f"two runs of one kind on one card are needed; these are {sorted(kinds)} on {sorted(cards)}")
    (card,), (kind,) = cards, kinds
    found = compare(first, second)
    if not found.differences:
        parser.error(f"no product is in both runs with a time above {REPEAT_ABOVE_US:g} us")
    largest, worst = found.differences[0]
    for difference, name in found.differences:
        if difference > REPEAT_WITHIN:
            print(f"{100 * difference:5.1f} %  {name}")
    print(
        f"{card} {kind}: {len(found.differences)} times above {REPEAT_ABOVE_US:g} us, {100 * found.within:.1f} % of "
        f"them within {100 * REPEAT_WITHIN:g} %; difference {100 * found.median:.2f} % in the median, "
        f"{100 * largest:.1f} % at most ({worst}); {found.below} shorter, {found.unmatched} in one run only"
    )
    date = max(row.get("date", "") for row in second) or datetime.date.today().isoformat()
    write(given.out / f"{card}.repeat.csv", {
        "gpu": card, "date": date, "kind": kind, "rows": str(len(found.differences)), "within": f"{found.within:.4g}",
        "median_percent": f"{100 * found.median:.3g}", "worst_percent": f"{100 * largest:.3g}", "worst": worst,
        "below": str(found.below), "unmatched": str(found.unmatched),
    })  # fmt: skip
    return 0 if found.within >= REPEAT_SHARE else 1


if __name__ == "__main__":
    sys.exit(main())
