"""Everything there is to ask of a GPU, one script after the other, within a quarter of an hour.

    python benchmarks/bench_all.py --out DIR             15 minutes
    python benchmarks/bench_all.py --quick --out DIR     2 minutes: the cases that have a bar

Each script runs in a process of its own and gets what is left of the time, less what those after it need, and never
more than it can use. The last one, `bench_spmm.py --full`, measures what matters most first, and names what it had no
time for. Exit code 1 if a script failed, by a wrong result for one.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from records import RESULTS, Budget

SECONDS = {"full": 900.0, "quick": 120.0}
GRACE_S = 30.0
"""What a script may take longer than its time budget, to finish what it began, before it is ended."""


@dataclass(frozen=True)
class Part:
    """A script with its arguments, the seconds that it needs at least and can use at most, and its option for them."""

    command: tuple[str, ...]
    least_s: float
    most_s: float
    option: str = "--budget-s"


PARTS = {
    "full": (
        Part(("bench_models.py",), 140.0, 200.0, "--seconds"),
        Part(("bench_skinny.py", "--quick"), 45.0, 80.0),
        Part(("bench_host_cost.py",), 30.0, 60.0, ""),
        Part(("bench_peers.py",), 290.0, 350.0),
        Part(("bench_spmm.py", "--full"), 200.0, 400.0),
    ),
    "quick": (
        Part(("bench_skinny.py", "--quick"), 30.0, 40.0),
        Part(("bench_spmm.py", "--quick"), 50.0, 85.0),
    ),
}
"""In the order of the run: `bench_models.py` wants a machine on which nothing was compiled just before."""


def share_of(parts: Sequence[Part], seconds: float) -> float:
    """The seconds of the first of the parts that are still to run, out of those that are left."""
    first, *later = parts
    return min(first.most_s, max(0.0, seconds - sum(part.least_s for part in later)))


def run(level: str, out: Path, seconds: float) -> int:
    """Run the scripts of a level; the exit code."""
    budget, parts, failed = Budget(seconds), PARTS[level], []
    lines = []
    for number, part in enumerate(parts):
        start, share = budget.used_s, share_of(parts[number:], budget.seconds - budget.used_s)
        script, *arguments = part.command
        command = [sys.executable, str(Path(__file__).parent / script), *arguments, "--out", str(out)]
        command += [part.option, f"{share:.0f}"] if part.option else []
        try:
            code: int | str = subprocess.run(command, timeout=share + GRACE_S, check=False).returncode
        except subprocess.TimeoutExpired:
            code = "ended: it took longer than its time"
        failed += [script] if code else []
        lines.append(f"{' '.join(part.command):28} {budget.used_s - start:5.0f} s of {share:.0f} s, exit code {code}")
        print(lines[-1], flush=True)
    print("\n".join(["", *lines, f"{budget.used_s:.0f} s of {seconds:.0f} s"]))
    return 1 if failed else 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only what has a bar, in two minutes")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSVs and the JSONs")
    parser.add_argument("--budget-s", type=float, help="for all scripts together")
    given = parser.parse_args(arguments)
    level = "quick" if given.quick else "full"
    return run(level, given.out, given.budget_s or SECONDS[level])


if __name__ == "__main__":
    sys.exit(main())
