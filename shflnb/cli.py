"""The command line: `shflnb demo | bench | doctor | prune | tune`; with `--json` standard output holds JSON alone."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ._version import __version__
from .errors import ArgumentError, FormatError, ShapeError, ShflnbError

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console

    from .bench import BenchRow
    from .demo import Step

__all__ = ["app", "main"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Shuffled Block-wise (Shfl-BW) sparse weights: prune them, pack them, multiply with them.",
)
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output and nothing else.")]


def main() -> None:
    """Entry point of the `shflnb` command: exit code 0, or 1 with the error in one line on standard error."""
    try:
        app()
    except ShflnbError as error:
        typer.echo(f"shflnb: {error}", err=True)
        sys.exit(1)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"shflnb {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """Options that stand before the command."""


def _console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, markup=False)


def _print_json(report: Any) -> None:
    typer.echo(json.dumps(report, indent=2))


@app.command()
def demo(
    as_json: Json = False,
    seed: Annotated[int, typer.Option(help="Seed of the training and of the searches.")] = 0,
) -> None:
    """Train, prune, pack, multiply, check and time on this machine; exit code 0 only if every check held."""
    from . import demo as steps

    found: list[Step] = []
    console = _console()
    for step in steps.run(seed):
        found.append(step)
        if not as_json:
            _print_step(console, step)
    failed = [check.text for step in found for check in step.checks if not check.passed]
    count = sum(len(step.checks) for step in found)
    if as_json:
        _print_json(
            {
                "version": __version__,
                "passed": not failed,
                "failed": failed,
                "steps": [
                    {"title": s.title, "figures": s.figures, "checks": [asdict(c) for c in s.checks]} for s in found
                ],
                "python": steps.SNIPPET,
            }
        )
    else:
        console.print("\nThe Python that did it", style="bold")
        console.print(steps.SNIPPET, soft_wrap=True)
        if failed:
            console.print(f"{len(failed)} of {count} checks FAILED: {'; '.join(failed)}", style="bold red")
        else:
            console.print(f"All {count} checks held.", style="bold green")
    if failed:
        raise typer.Exit(1)


def _print_step(console: Console, step: Step) -> None:
    from rich.table import Table

    console.print(f"\n{step.title}", style="bold")
    for line in step.lines:
        console.print(f"  {line}", soft_wrap=True)
    if step.table:
        header, *rows = step.table
        table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
        for number, name in enumerate(header):
            table.add_column(f"  {name}" if number == 0 else name, justify="left" if number == 0 else "right")
        for row in rows:
            table.add_row(f"  {row[0]}", *row[1:])
        console.print(table)
    for check in step.checks:
        mark, style = ("ok", "green") if check.passed else ("FAILED", "bold red")
        console.print(f"  {mark} ", style=style, end="")
        console.print(check.text, soft_wrap=True)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Print versions, devices, driver, caches, threads and extras, to read first and to paste into a bug report."""
    from . import doctor as health

    report = health.examine()
    if as_json:
        _print_json(report)
    else:
        health.render(report, _console())


@app.command()
def prune(
    source: Annotated[Path, typer.Argument(help="A weight (m, k): .npy, or a tensor of a .safetensors file.")],
    target: Annotated[Path, typer.Argument(help="The packed matrix to write (.safetensors).")],
    key: Annotated[
        str | None, typer.Option(help="Name of the tensor in a .safetensors file; needed if it has several.")
    ] = None,
    sparsity: Annotated[float, typer.Option(help="Share of the weights to remove, 0 to 1.")] = 0.75,
    block: Annotated[
        str, typer.Option(help="Rows per group x stitched columns per tile: 16|32|64|128 x 16|32|64.")
    ] = "64x64",
    score: Annotated[str, typer.Option(help="What a weight is worth: magnitude or squared.")] = "magnitude",
    search: Annotated[str, typer.Option(help="How rows are grouped: refined, paper or identity.")] = "refined",
    budget: Annotated[
        str, typer.Option(help="layer: groups may keep different numbers of columns; group: equal ones.")
    ] = "layer",
    quality: Annotated[str, typer.Option(help="Effort of the refined search: fast, default or best.")] = "default",
    seed: Annotated[int, typer.Option(help="Seed of the search.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace the target if it exists.")] = False,
    as_json: Json = False,
) -> None:
    """Prune a weight from a file and write it packed."""
    if target.exists() and not force:
        raise ArgumentError(f"{target} exists; choose another name, or replace it with --force")
    w = _read_weight(source, key)
    shape = _parse_block(block)
    from . import patterns
    from .formats import save

    console = _console(stderr=True)
    with console.status(f"searching row groups of {source.name}"):
        pruned = patterns.prune(
            w, sparsity=sparsity, block=shape, score=score, search=search, budget=budget, quality=quality, seed=seed
        )
    packed = pruned.pack()
    save(packed, target)
    report = {
        "source": str(source),
        "target": str(target),
        "shape": list(w.shape),
        "dtype": packed.dtype,
        "block": list(shape),
        "search": search,
        "score": score,
        "density": packed.density,
        "retained": pruned.retained,
        "columns_per_group": {
            "least": int(packed.counts.min(initial=w.shape[1])),
            "most": int(packed.counts.max(initial=0)),
        },
        "dense_bytes": w.nbytes,
        "packed_bytes": packed.nbytes,
        "file_bytes": target.stat().st_size,
    }
    if as_json:
        _print_json(report)
    else:
        _print_pairs(_console(), _prune_pairs(report))


@app.command()
def tune(
    source: Annotated[Path, typer.Argument(help="A packed matrix (.safetensors), as `shflnb prune` writes it.")],
    n: Annotated[list[int], typer.Option("--n", help="Columns of x (tokens); may be given several times.")],
    device: Annotated[int, typer.Option(help="CUDA device.")] = 0,
    forget: Annotated[
        bool, typer.Option("--forget", help="First drop everything that is remembered of this device.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure the GPU kernels for a packed matrix, each checked first, and remember the fastest on this machine."""
    from .formats import load
    from .tuning import forget_device
    from .tuning import tune as measure

    packed = load(source)
    if forget:
        forget_device(device)
    console = _console(stderr=True)
    report = measure(packed, n, device=device, progress=lambda text: console.print(f"  {text}", soft_wrap=True))
    if as_json:
        _print_json(report.as_dict())
    else:
        typer.echo(str(report))


@app.command()
def bench(
    device: Annotated[str | None, typer.Option(help="cuda or cpu; the default is a GPU if there is one.")] = None,
    size: Annotated[
        list[str] | None, typer.Option(help="m,k,n of a product (weight m x k, n columns); may be given several times.")
    ] = None,
    sparsity: Annotated[list[float] | None, typer.Option(help="Share of zeros; may be given several times.")] = None,
    v: Annotated[list[int] | None, typer.Option("--v", help="Rows per group; may be given several times.")] = None,
    as_json: Json = False,
) -> None:
    """Compare with the dense library on this machine, each result checked first; exit code 0 only if all were right."""
    from . import bench as steps

    kind, name = steps.choose_device(device)
    wanted = steps.cases(kind, [_parse_size(text) for text in size or ()], sparsity or (), v or ())
    console = _console()
    if not as_json:
        console.print(f"{name}; {steps.STATISTIC[kind]} microseconds", soft_wrap=True)
        header = ("weight", "n", "zeros", "v", "dense", "shflnb", "ratio", "roof", "of roof")
        console.print(_BENCH_LINE.format(*header), soft_wrap=True)
    rows = []
    for row in steps.run(kind, wanted):
        rows.append(row)
        if not as_json:
            console.print(_BENCH_LINE.format(*_bench_cells(row)) + _bench_mark(row), soft_wrap=True)
    if as_json:
        _print_json({"device": name, "kind": kind, "version": __version__, "rows": [asdict(row) for row in rows]})
    elif rows:
        limits = ", ".join(dict.fromkeys(row.roof for row in rows))
        dense = "; ".join(dict.fromkeys(row.dense_what for row in rows))
        error = max(row.error for row in rows)
        console.print(f"Dense: {dense}. The roof is set by: {limits}. Largest error: {error:.1e}.", soft_wrap=True)
    if not all(row.is_right for row in rows):
        raise typer.Exit(1)


_BENCH_LINE = "{:>14} {:>6} {:>6} {:>4} {:>10} {:>10} {:>7} {:>9} {:>8}"


def _bench_cells(row: BenchRow) -> tuple[Any, ...]:
    times = (f"{row.dense_us:.1f}", f"{row.sparse_us:.1f}", f"{row.speedup:.2f}x")
    roof = (f"{row.roof_us:.1f}", f"{row.percent_of_roof:.0f} %")
    return (f"{row.m} x {row.k}", row.n, f"{row.sparsity:.1%}", row.v, *times, *roof)


def _bench_mark(row: BenchRow) -> str:
    return "" if row.is_right else f"  WRONG (error {row.error:.1e})"


def _parse_size(text: str) -> tuple[int, int, int]:
    try:
        m, k, n = (int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        raise ArgumentError(f"--size is {text!r}; needed is m,k,n, for example 4096,4096,512") from None
    return m, k, n


def _prune_pairs(report: dict[str, Any]) -> list[tuple[str, str]]:
    m, k = report["shape"]
    columns = report["columns_per_group"]
    return [
        ("weight", f"{report['source']}: {m} x {k} {report['dtype']}"),
        (
            "row groups",
            f"{report['block'][0]} rows each, keeping {columns['least']} to {columns['most']} of {k} columns",
        ),
        ("kept weights", f"{report['density']:.2%}"),
        ("kept score", f"{report['retained']:.2%} ({report['score']}, search {report['search']})"),
        (
            "bytes",
            f"{report['dense_bytes']:,} dense, {report['packed_bytes']:,} packed, {report['file_bytes']:,} in the file",
        ),
        ("written", report["target"]),
    ]


def _print_pairs(console: Console, pairs: list[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in pairs)
    for name, text in pairs:
        console.print(f"{name:<{width}}  {text}", soft_wrap=True)


def _parse_block(text: str) -> tuple[int, int]:
    try:
        v, tile_k = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise ArgumentError(f"--block is {text!r}; needed is rows x columns, for example 64x64") from None
    return v, tile_k


def _read_weight(path: Path, key: str | None) -> np.ndarray:
    """The matrix in a .npy file, or the tensor `key` (or the only matrix) of a .safetensors file; runs no code."""
    if not path.is_file():
        raise ArgumentError(f"{path} is not a file; give a .npy or .safetensors file")
    if path.suffix == ".npy":
        w = _read_npy(path)
    elif path.suffix == ".safetensors":
        w = _read_safetensors(path, key)
    else:
        raise ArgumentError(f"{path} is neither .npy nor .safetensors; convert the weight to one of them")
    if w.ndim != 2:
        raise ShapeError(f"{path} holds an array of shape {w.shape}; needed is a matrix (m, k), so reshape it first")
    return w


def _read_npy(path: Path) -> np.ndarray:
    import numpy as np

    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise FormatError(f"{path} cannot be read as .npy: {error}") from error


def _read_safetensors(path: Path, key: str | None) -> np.ndarray:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            matrices = [name for name in file.keys() if len(file.get_slice(name).get_shape()) == 2]  # noqa: SIM118 (no dict)
            if key is None and len(matrices) == 1:
                key = matrices[0]
            if key is None or key not in file.keys():  # noqa: SIM118
                asked = f"has no tensor {key!r}" if key else f"holds {len(matrices)} matrices"
                raise ArgumentError(f"{path} {asked}; choose one with --key: {', '.join(matrices[:20]) or '(none)'}")
            return file.get_tensor(key)
    except SafetensorError as error:
        raise FormatError(f"{path} cannot be read as .safetensors: {error}") from error
