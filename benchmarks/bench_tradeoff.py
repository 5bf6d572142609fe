"""How much score does each v keep at each sparsity? The accuracy side of the trade-off figure; CPU, about a minute.

    python benchmarks/bench_tradeoff.py --out DIR

Kept share of the sum of |w| for layers of a small transformer trained here (`prune_matrices.py`), by the default search
and by the paper's; single weights without a pattern are the limit. Each mask is checked to have the pattern. Writes
`tradeoff.csv`.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from prune_matrices import text_transformer
from records import RESULTS, Results

import shflnb

FIELDS = ("date", "matrix", "m", "k", "v", "sparsity", "search", "retained", "unstructured")
SPARSITIES = (0.5, 0.75, 0.875, 0.95)
MATRICES = ("text_q0", "text_out0", "text_up1")


def kept_share(w: np.ndarray, result: shflnb.PruneResult) -> float:
    """Kept share of the sum of |w| in float64, after a look at whether the mask has the pattern."""
    v = result.block[0]
    packed = np.asarray(result.mask, dtype=bool)[result.row_perm]
    for start in range(0, len(packed), v):
        if not (packed[start : start + v] == packed[start]).all():
            raise ValueError("a group has a column that only some of its rows keep")
    score = np.abs(w).astype(np.float64)
    return float(score[np.asarray(result.mask, dtype=bool)].sum() / score.sum())


def run(out: Path, matrices: dict[str, np.ndarray], heights: Sequence[int] = (32, 64, 128)) -> int:
    """Write the CSV for some matrices; the number of rows."""
    results = Results(out / "tradeoff.csv", FIELDS)
    for name, w in matrices.items():
        ordered = np.sort(np.abs(w), axis=None)[::-1].astype(np.float64)
        for sparsity in SPARSITIES:
            limit = ordered[: round(w.size * (1 - sparsity))].sum() / ordered.sum()
            for v in heights:
                for search in ("refined", "paper", "identity"):
                    result = shflnb.prune(w, sparsity=sparsity, block=(v, 16), search=search)
                    results.add({
                        "date": datetime.date.today().isoformat(), "matrix": name, "m": w.shape[0], "k": w.shape[1],
                        "v": v, "sparsity": sparsity, "search": search, "retained": f"{kept_share(w, result):.5f}",
                        "unstructured": f"{limit:.5f}",
                    })  # fmt: skip
    results.close()
    return results.rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV")
    given = parser.parse_args(arguments)
    trained = text_transformer()
    rows = run(given.out, {name: trained[name] for name in MATRICES})
    print(f"{rows} rows in {given.out / 'tradeoff.csv'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
