"""What `sparsify_` did and `estimate` foresees: one row per layer, totals, and ways to look at them."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ..errors import MissingDependencyError

__all__ = ["LayerReport", "Report"]

_NUMBER = re.compile(r"\d+(\.\d+)?")


@dataclass
class LayerReport:
    """One layer of the model.

    Attributes
    ----------
    name : str
        Its name in the model; further names of a shared module are in `aliases`.
    kind : str
        Class of the module.
    shape : (m, k) or None
        None for what has no matrix.
    n : int or None
        Tokens of the call with the most of them in the example; None without an example.
    calls : int
        Calls in one forward pass of the example.
    sparsity : float
        Part of the weights removed; 0.0 for a dense layer.
    retained : float or None
        Kept score / all score; None where nothing was pruned.
    dense_us, sparse_us : float or None
        Microseconds of all calls of one forward pass on this device, both with the fused activation, and with the sum
        that the result goes into, if there is one.
    decision : "sparse" or "dense"
    reason : str
    layout : str
        For sparse layers, e.g. "token -> feature"; "token -> token (sum)" where a sum turns the result.
    fused : str or None
        Activation computed in the epilogue.
    dense_bytes, sparse_bytes : int
        Memory of the weight (values and indices; no bias).
    """

    name: str
    kind: str
    shape: tuple[int, int] | None
    decision: str
    reason: str
    n: int | None = None
    calls: int = 0
    sparsity: float = 0.0
    retained: float | None = None
    dense_us: float | None = None
    sparse_us: float | None = None
    layout: str = ""
    fused: str | None = None
    aliases: tuple[str, ...] = ()
    dense_bytes: int = 0
    sparse_bytes: int = 0

    @property
    def speedup(self) -> float | None:
        """dense_us / sparse_us."""
        return self.dense_us / self.sparse_us if self.dense_us and self.sparse_us else None

    @property
    def chosen_us(self) -> float | None:
        """Time of what was decided on."""
        return self.sparse_us if self.decision == "sparse" else self.dense_us


@dataclass
class Report:
    """The table of `sparsify_` or `estimate`; `print(report)`, `report.print()`, `to_json()`, `plot()`.

    Attributes
    ----------
    kind : "sparsified" or "estimate"
    rows : list of LayerReport
        Every layer that holds a matrix, sparse or not, in the order of the model.
    device, dtype, timing, basis : str
        Where, in what and how it was measured; `basis` says on what patterns ("the pruned weights", "random patterns",
        or "predicted for <device>, not measured").
    options : dict
        sparsity, block, policy and the other choices.
    model_dense_us, model_sparse_us : float or None
        Measured microseconds of the whole model on the example, before and after.
    """

    kind: str
    rows: list[LayerReport]
    device: str
    dtype: str
    timing: str = "eager"
    basis: str = "the pruned weights"
    options: dict[str, Any] = field(default_factory=dict)
    model_dense_us: float | None = None
    model_sparse_us: float | None = None

    def __getitem__(self, name: str) -> LayerReport:
        """The row of a layer, by any of its names."""
        for row in self.rows:
            if name == row.name or name in row.aliases:
                return row
        raise KeyError(name)

    @property
    def sparse(self) -> list[LayerReport]:
        """Rows of the layers that are sparse now (in an estimate: would be)."""
        return [row for row in self.rows if row.decision == "sparse"]

    @property
    def dense(self) -> list[LayerReport]:
        """Rows of the layers that stay dense."""
        return [row for row in self.rows if row.decision == "dense"]

    @property
    def layers_dense_us(self) -> float | None:
        """Time of all timed layers when all are dense."""
        return _sum(row.dense_us for row in self.rows)

    @property
    def layers_chosen_us(self) -> float | None:
        """Time of all timed layers as decided."""
        return _sum(row.chosen_us for row in self.rows if row.dense_us is not None)

    @property
    def predicted_us(self) -> float | None:
        """Time of the whole model as the rows foretell it: measured dense, less what the sparse layers save.

        None without a measurement of the model, and where its layers alone took longer than all of it did (a machine
        too busy to measure on).
        """
        if self.model_dense_us is None or self.layers_dense_us is None or self.layers_chosen_us is None:
            return None
        rest = self.model_dense_us - self.layers_dense_us
        return rest + self.layers_chosen_us if rest >= -0.2 * self.model_dense_us else None

    @property
    def predicted_speedup(self) -> float | None:
        """model_dense_us / predicted_us."""
        predicted = self.predicted_us
        return self.model_dense_us / predicted if predicted and self.model_dense_us else None

    @property
    def speedup(self) -> float | None:
        """Measured speedup of the whole model on the example."""
        return self.model_dense_us / self.model_sparse_us if self.model_dense_us and self.model_sparse_us else None

    @property
    def totals(self) -> dict[str, Any]:
        """Sums over the rows, and the whole model's times."""
        sparse = self.sparse
        weights = sum(math.prod(row.shape) for row in self.rows if row.shape)
        removed = sum(row.sparsity * math.prod(row.shape) for row in sparse if row.shape)
        scored = [(row.retained, math.prod(row.shape)) for row in sparse if row.retained is not None and row.shape]
        return {
            "layers": len(self.rows),
            "sparse_layers": len(sparse),
            "weights": weights,
            "sparsity": removed / weights if weights else 0.0,
            "retained": sum(r * w for r, w in scored) / sum(w for _, w in scored) if scored else None,
            "dense_bytes": sum(row.dense_bytes for row in self.rows),
            "bytes": sum(row.sparse_bytes if row.decision == "sparse" else row.dense_bytes for row in self.rows),
            "layers_dense_us": self.layers_dense_us,
            "layers_chosen_us": self.layers_chosen_us,
            "model_dense_us": self.model_dense_us,
            "predicted_us": self.predicted_us,
            "model_sparse_us": self.model_sparse_us,
            "predicted_speedup": self.predicted_speedup,
            "speedup": self.speedup,
        }

    # -- ways to look at it -------------------------------------------------------------------------------------------

    def to_json(self, path: str | Path | None = None) -> str:
        """The report as JSON text; with `path` also written there."""
        rows = [{**asdict(row), "speedup": row.speedup} for row in self.rows]
        record = {field: getattr(self, field) for field in ("kind", "device", "dtype", "timing", "basis", "options")}
        text = json.dumps({**record, "rows": rows, "totals": self.totals}, indent=1, default=str)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text

    def print(self, *, console: Any = None, collapse: bool = True) -> None:
        """Print the table with rich; `collapse` shows layers that differ only in numbers of their names as one row."""
        from rich.console import Console
        from rich.table import Table

        if console is None:
            console = Console()
            if not console.is_terminal:
                console = Console(width=160)
        table = Table(title=self._title(), title_justify="left", caption=self._caption(), caption_justify="left",
                      box=None, pad_edge=False, header_style="bold underline")  # fmt: skip
        for header, justify in _COLUMNS:
            table.add_column(
                header, justify=justify, no_wrap=header != "reason", min_width=12 if header == "reason" else None
            )
        for row in _collapsed(self.rows) if collapse else self.rows:
            table.add_row(*_cells(row), style=None if row.decision == "sparse" else "dim")
        console.print(table)

    def __str__(self) -> str:
        from io import StringIO

        from rich.console import Console

        out = StringIO()
        self.print(console=Console(file=out, width=160, no_color=True))
        return out.getvalue()

    def __repr__(self) -> str:
        return f"<Report {self.kind}: {len(self.sparse)} of {len(self.rows)} layers sparse, on {self.device}>"

    def _title(self) -> str:
        what = "What was done" if self.kind == "sparsified" else "What can be expected"
        return f"{what}, on {self.device}, {self.dtype}, {self.timing} ({self.basis})"

    def _caption(self) -> str:
        t = self.totals
        lines = [
            f"{t['sparse_layers']} of {t['layers']} layers sparse; {t['sparsity']:.1%} of all their weights removed; "
            f"{_bytes(t['dense_bytes'])} -> {_bytes(t['bytes'])}"
        ]
        if t["layers_dense_us"] and t["layers_chosen_us"]:
            lines.append(f"layers: {_us(t['layers_dense_us'])} us -> {_us(t['layers_chosen_us'])} us "
                         f"({t['layers_dense_us'] / t['layers_chosen_us']:.2f}x)")  # fmt: skip
        if t["predicted_speedup"]:
            lines.append(f"model: {_us(t['model_dense_us'])} us dense, {_us(t['predicted_us'])} us foretold by the "
                         f"rows ({t['predicted_speedup']:.2f}x)")  # fmt: skip
        if t["speedup"]:
            lines.append(f"model, measured after: {_us(t['model_sparse_us'])} us ({t['speedup']:.2f}x)")
        return "\n".join(lines)

    def plot(self, path: str | Path | None = None) -> Any:
        """Bars of dense and sparse time per layer. Returns the matplotlib figure; with `path` also saves it.

        Raises
        ------
        MissingDependencyError
            matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise MissingDependencyError("plot() needs matplotlib; pip install 'shflnb[plots]'") from error
        rows = [row for row in self.rows if row.dense_us is not None]
        figure = Figure(figsize=(9, 1.5 + 0.3 * max(1, len(rows))), layout="constrained")
        axes = figure.subplots()
        for place, row in enumerate(rows):
            axes.barh(place - 0.2, row.dense_us or 0.0, 0.38, color="0.7", label="dense" if place == 0 else None)
            if row.sparse_us is not None:
                color = "tab:green" if row.decision == "sparse" else "tab:red"
                axes.barh(place + 0.2, row.sparse_us, 0.38, color=color)
        axes.set_yticks(range(len(rows)), [row.name for row in rows])
        axes.invert_yaxis()
        axes.set(xlabel="us per forward pass (grey: dense; green: sparse, chosen; red: sparse, not chosen)",
                 title=self._title())  # fmt: skip
        if path is not None:
            figure.savefig(path)
        return figure


_COLUMNS: tuple[tuple[str, Literal["left", "right"]], ...] = (
    ("layer", "left"), ("m x k", "right"), ("n", "right"), ("calls", "right"), ("sparsity", "right"),
    ("retained", "right"), ("dense us", "right"), ("sparse us", "right"), ("speedup", "right"),
    ("decision", "left"), ("reason", "left"),
)  # fmt: skip


def _cells(row: LayerReport) -> list[str]:
    from rich.markup import escape

    reason = "; ".join(part for part in (row.reason, row.layout, row.fused and f"{row.fused} fused") if part)
    return [
        escape(row.name + (f" (= {', '.join(row.aliases)})" if row.aliases else "")),
        f"{row.shape[0]} x {row.shape[1]}" if row.shape else row.kind,
        "" if row.n is None else str(row.n),
        str(row.calls) if row.calls else "",
        f"{row.sparsity:.1%}" if row.decision == "sparse" else "",
        "" if row.retained is None else f"{row.retained:.1%}",
        _us(row.dense_us),
        _us(row.sparse_us),
        "" if row.speedup is None else f"{row.speedup:.2f}x",
        row.decision,
        escape(reason),
    ]


def _collapsed(rows: list[LayerReport]) -> list[LayerReport]:
    """One row, with summed times and mean retained score, for layers that differ only in numbers of their names."""
    alike: dict[tuple[Any, ...], list[LayerReport]] = {}
    for row in rows:
        key = (_NUMBER.sub("*", row.name), row.kind, row.shape, row.decision, row.n, row.layout, row.fused, row.aliases,
               _NUMBER.sub("*", row.reason))  # fmt: skip
        alike.setdefault(key, []).append(row)
    return [group[0] if len(group) == 1 else _merged(key[0], group) for key, group in alike.items()]


def _merged(name: str, group: list[LayerReport]) -> LayerReport:
    first, count = group[0], len(group)
    retained = [row.retained for row in group if row.retained is not None]
    dense_us, sparse_us = _sum(row.dense_us for row in group), _sum(row.sparse_us for row in group)
    reason = first.reason
    if first.decision == "sparse" and dense_us and sparse_us and reason.endswith("x faster"):
        reason = f"{dense_us / sparse_us:.2f}x faster"
    return replace(
        first, name=f"{name} ({count} layers)", calls=sum(row.calls for row in group), reason=reason,
        sparsity=sum(row.sparsity for row in group) / count, dense_us=dense_us, sparse_us=sparse_us,
        retained=sum(retained) / len(retained) if retained else None,
    )  # fmt: skip


def _us(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _bytes(count: float) -> str:
    return f"{count / 1e6:.3g} MB" if count >= 1e6 else f"{count / 1e3:.3g} kB"


def _sum(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None
