"""How much faster do whole models become, and does the report tell the truth about it?

    python benchmarks/bench_models.py --out DIR               all parts, about four minutes on an H200
    python benchmarks/bench_models.py --only mlp decode       some of them
    python benchmarks/bench_models.py --device cpu            the same parts at toy sizes, to try the script

mlp      4096 -> 14336 -> 4096 with GELU, 4096 tokens, token-major in and out, over eager and compiled dense
bert     BERT-large encoder, 32 x 512 tokens, end to end over eager dense; the report's forecast against the measurement
decode   Llama-3-8B decoder layer, one token per sequence, batch 1..16, in a CUDA graph
estimate times by `estimate` against those measured after pruning real weights
slower   40 layer shapes x 8 numbers of tokens: is any layer that `never_slower` chooses slower than dense?
         (measured anew; below 512 tokens with the weights out of the cache, as they are in a model)

Every sparse model is compared with the dense model of the same zeros before it is timed. Weights are random, the
search is the quickest one: what a pattern retains does not change what it costs. The directory is $OUT without --out.
A part that fails is named, with its traceback, and the others go on. Exit code 1 if one failed or a result was wrong.
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from models import BertEncoder, DecoderLayer, mlp_block
from protocol import eager_us, measure, relative_error
from records import RESULTS, Budget, Results, machine, prebuild, results_name, write_machine
from torch import nn

import shflnb
from shflnb.nn import Report, ShflLinear
from shflnb.nn.decide import Options, Timer, Times, decide
from shflnb.nn.facts import facts_of, random_layer
from shflnb.nn.measure import COLD_BELOW, call_us
from shflnb.nn.observe import Observation
from shflnb.nn.planner import Plan

FIELDS = ("gpu", "part", "case", "dtype", "v", "sparsity", "what", "median_us", "p10_us", "p90_us", "samples",
          "launches", "method", "sm_mhz", "eager_us", "speedup", "bar", "error", "note")  # fmt: skip
ERROR_LIMIT = {torch.float16: 6e-3, torch.bfloat16: 4e-2, torch.float32: 1e-4}
BATCHES = (1, 2, 8, 32, 128, 512, 2048, 8192)
# A plain loop over BERT comes first: what torch.compile leaves running in the background slows the host for a while
# (1.41x became 1.17x behind the first compilation of the day). The last part takes the time that is left.
PARTS = ("bert", "mlp", "decode", "estimate", "slower")
TURNS, MORE_TURNS = 2, 4


@dataclass
class Run:
    """What all parts share."""

    device: str
    name: str
    results: Results
    budget: Budget
    lines: list[str] = field(default_factory=list)
    wrong: int = 0

    @property
    def is_toy(self) -> bool:
        return self.device == "cpu"

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        return (torch.float32,) if self.is_toy else (torch.bfloat16, torch.float16)

    def row(self, part: str, case: str, what: str, **more: Any) -> None:
        """One row of the CSV."""
        dtype = more.pop("dtype", None)
        self.results.add({"gpu": self.name, "part": part, "case": case, "what": what, "sparsity": 0.75,
                          **({"dtype": str(dtype)[6:]} if dtype else {}), **more})  # fmt: skip

    def judge(self, text: str, value: float, bar: float, *, at_most: bool = False) -> None:
        """One line of the table at the end."""
        good = value <= bar if at_most else value >= bar
        verdict = "ok" if good else "MISSED"
        self.lines.append(f"{verdict:6} {text:70} {value:7.3f}  bar {'<=' if at_most else '>='} {bar:g}")

    def made(self, make: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
        """A model with random weights, on the device."""
        torch.manual_seed(0)
        with torch.device(self.device):
            return make().to(dtype).eval()

    def checked(self, sparse: nn.Module, dense: nn.Module, x: torch.Tensor) -> float:
        """Error of the sparse model against the dense one with the same zeros; restores the dense weights."""
        before = {}
        for name, module in sparse.named_modules():
            if isinstance(module, ShflLinear):
                linear = dense.get_submodule(name)
                before[name] = linear.weight
                linear.weight = nn.Parameter(module.dense_weight().detach())
        with torch.no_grad():
            error = self.compared(sparse(x), dense(x))
        for name, weight in before.items():
            dense.get_submodule(name).weight = weight
        return error

    def compared(self, out: torch.Tensor, reference: torch.Tensor) -> float:
        """Error of a result, which is wrong above the limit of its dtype."""
        error = relative_error(out, reference)
        if not error <= ERROR_LIMIT[out.dtype]:
            self.wrong += 1
            self.lines.append(f"WRONG  error {error:.3g} above {ERROR_LIMIT[out.dtype]:g}")
        return error


def sparsified(model: nn.Module, x: torch.Tensor, v: int, **options: Any) -> tuple[nn.Module, Report]:
    """A sparse copy of the model, and its report."""
    twin = copy.deepcopy(model)
    block = (v, 16 if v == 16 else 64)
    return twin, shflnb.sparsify_(twin, 0.75, block, example_inputs=x, search="identity", **options)


def call(model: Callable[[torch.Tensor], Any], x: torch.Tensor) -> Callable[[], Any]:
    """The model on its input, without gradients."""

    def run() -> Any:
        with torch.no_grad():
            return model(x)

    return run


def compiled(run: Run, model: nn.Module, x: torch.Tensor) -> Callable[[], Any] | None:
    """The model under torch.compile, or None (said) where there is no compiler."""
    function = call(torch.compile(model, fullgraph=True), x)
    try:
        function()
    except (RuntimeError, ImportError, OSError) as error:
        run.lines.append(f"left out: torch.compile ({type(error).__name__}: {str(error).partition(chr(10))[0][:80]})")
        return None
    return function


# -- parts ------------------------------------------------------------------------------------------------------------


def bench_mlp(run: Run) -> None:
    width, hidden, tokens = (64, 128, 96) if run.is_toy else (4096, 14336, 4096)
    bars = {64: (1.9, 1.7), 128: (2.3, 2.1), 16: (0.0, 0.0)}
    for dtype in run.dtypes:
        model = run.made(lambda: mlp_block(width, hidden), dtype)
        x = torch.randn(tokens, width, device=run.device, dtype=dtype)
        torch._dynamo.reset()  # once for all models of a dtype: it forgets those compiled before
        subjects = {"dense eager": call(model, x)}
        dense_compiled = compiled(run, model, x)
        if dense_compiled is not None:
            subjects["dense compiled"] = dense_compiled
        errors: dict[str, float] = {}
        for v in (16,) if run.is_toy else (64, 128):
            sparse, _ = sparsified(model, x, v, policy="always", measure_model=False)
            errors[f"sparse v{v}"] = run.checked(sparse, model, x)
            subjects[f"sparse v{v}"] = call(sparse, x)
            if v == 64 and dense_compiled is not None:
                again = compiled(run, sparse, x)
                if again is not None:
                    subjects["sparse v64 compiled"] = again
                    errors["sparse v64 compiled"] = run.compared(again(), subjects["sparse v64"]())
        times = measure(subjects, run.device)
        eager = {name: eager_us(f, run.device, device_us=times[name].median_us) for name, f in subjects.items()}
        for name, timing in times.items():
            speedup = times["dense eager"].median_us / timing.median_us
            v, _, form = name.removeprefix("sparse v").partition(" ")
            bar = bars[int(v)][0] if v.isdigit() and not form else ""
            run.row("mlp", f"{width}-{hidden}-{width} n={tokens}", name, dtype=dtype, error=errors.get(name, ""),
                    bar=bar or "", v=v if v.isdigit() else "", eager_us=round(eager[name], 1),
                    speedup=round(speedup, 3), **timing.row())  # fmt: skip
        for v, (over_eager, over_compiled) in bars.items():
            name = f"sparse v{v}"
            if name in times:
                text = f"MLP {str(dtype)[6:]} v={v} ({times[name].median_us:.0f} us)"
                run.judge(f"{text} over eager", times["dense eager"].median_us / times[name].median_us, over_eager)
                run.judge(f"{text} over eager, in a plain loop", eager["dense eager"] / eager[name], over_eager)
                if dense_compiled is not None:
                    ratio = times["dense compiled"].median_us / times[name].median_us
                    run.judge(f"{text} over compiled", ratio, over_compiled)


def bench_bert(run: Run) -> None:
    sizes, batch, tokens = ((2, 64, 4, 128), 2, 48) if run.is_toy else ((24, 1024, 16, 4096), 32, 512)
    v, dtype = 16 if run.is_toy else 64, run.dtypes[0]
    model = run.made(lambda: BertEncoder(*sizes), dtype)
    x = torch.randn(batch, tokens, sizes[1], device=run.device, dtype=dtype)
    start = time.perf_counter()
    sparse, report = sparsified(model, x, v, policy="always" if run.is_toy else "never_slower")
    seconds = time.perf_counter() - start
    error = run.checked(sparse, model, x)
    subjects = {"dense eager": call(model, x), "sparse eager": call(sparse, x)}
    times = measure(subjects, run.device, rounds=7, no_graph=subjects)
    eager = {name: eager_us(f, run.device, device_us=times[name].median_us) for name, f in subjects.items()}
    for name, timing in times.items():
        note = f"sparsify_ took {seconds:.1f} s; {len(report.sparse)} layers" if name.startswith("sparse") else ""
        run.row("bert", f"{sizes} {batch}x{tokens}", name, dtype=dtype, v=v, eager_us=round(eager[name], 1), note=note,
                error=error if note else "", bar=1.35 if note else "",
                speedup=round(eager["dense eager"] / eager[name], 3), **timing.row())  # fmt: skip
    run.judge(f"BERT encoder, eager, {len(report.sparse)} layers sparse ({eager['sparse eager'] / 1e3:.2f} ms)",
              eager["dense eager"] / eager["sparse eager"], 1.35)  # fmt: skip
    for row in report.rows[: len(report.rows) // sizes[0]]:  # the first layer of the encoder; the others are like it
        run.row("bert", row.name, "one linear layer, measured by sparsify_", dtype=dtype, v=v,
                median_us=row.sparse_us, note=f"dense {row.dense_us:.1f} us: {row.decision}, {row.reason}")  # fmt: skip
        run.lines.append(
            f"       BERT {row.name}: dense {row.dense_us:.1f} us, sparse {row.sparse_us:.1f} us, {row.reason}"
        )
    for text, told in (
        ("foretold by the rows", report.predicted_us),
        ("measured by the report", report.model_sparse_us),
    ):
        if told is not None:
            off = abs(told / eager["sparse eager"] - 1)
            run.row("bert", "report", text, dtype=dtype, v=v, median_us=round(told, 1), error=round(off, 4))
            run.judge(f"BERT encoder, time {text} ({told / 1e3:.2f} ms) off by", off, 0.10, at_most=True)


def bench_decode(run: Run) -> None:
    sizes, context = ((64, 4, 2, 128), 32) if run.is_toy else ((4096, 32, 8, 14336), 512)
    v, dtype = 16 if run.is_toy else 64, run.dtypes[0]
    batches = (1, 4) if run.is_toy else (1, 2, 4, 8, 16)
    model = run.made(lambda: DecoderLayer(*sizes, max(batches), context), dtype)
    tokens = torch.randn(max(batches), 1, sizes[0], device=run.device, dtype=dtype)
    sparse, _ = sparsified(model, tokens, v, policy="always", timing="graph", measure_model=False)
    caches = {name: buffer for name, buffer in model.named_buffers() if name in ("keys", "cache")}
    for batch in batches:
        x = tokens[:batch].contiguous()
        for layer in (model, sparse):
            for name, buffer in caches.items():
                setattr(layer, name, buffer[:batch].clone())
        error = run.checked(sparse, model, x)
        subjects = {"dense": call(model, x), "sparse": call(sparse, x)}
        if batch in (1, 16) and not run.budget.is_spent:  # compiling takes 10 s each
            for name, layer in (("dense", model), ("sparse", sparse)):
                function = compiled(run, layer, x)
                if function is not None:
                    subjects[f"{name} compiled"] = function
        times = measure(subjects, run.device)
        for name, timing in times.items():
            base = times[name.replace("sparse", "dense")].median_us
            run.row("decode", f"batch {batch}", name, dtype=dtype, v=v, error="" if "dense" in name else error,
                    bar="" if "dense" in name else 2.0, **timing.row(),
                    speedup=round(base / timing.median_us, 3))  # fmt: skip
            if "sparse" in name:
                how = name.replace("sparse", "graph").replace("graph compiled", "graph, both compiled")
                run.judge(f"Llama-3-8B decoder layer, batch {batch}, {how} ({timing.median_us:.0f} us)",
                          base / timing.median_us, 2.0)  # fmt: skip


def sweep_shapes(toy: bool) -> list[tuple[int, int]]:
    """40 shapes (m, k) of linear layers, small to large, square, wide and tall."""
    if toy:
        return [(64, 64), (128, 64)]
    sizes = (512, 768, 1024, 1536, 2048, 3072, 4096, 5120, 8192)
    shapes = [(s, s) for s in sizes] + [(4 * s, s) for s in sizes[:7]] + [(s, 4 * s) for s in sizes[:7]]
    shapes += [(3 * s, s) for s in sizes[:8]] + [
        (14336, 4096),
        (4096, 14336),
        (1024, 4096),
        (6144, 4096),
        (28672, 4096),
    ]
    shapes += [(1000, 2048), (2304, 768), (640, 1280), (11008, 4096), (1280, 1280), (5120, 1280)]
    shapes = list(dict.fromkeys(shapes))
    assert len(shapes) == 40
    return [shape for first in range(5) for shape in shapes[first::5]]  # so that a part of them has some of each kind


def in_turns(
    dense: Callable[[], Any], sparse: Callable[[], Any], n: int, device: str, turns: int
) -> list[tuple[float, float]]:
    """Device microseconds of both, cold for few tokens, in as many turns."""
    if n >= COLD_BELOW:
        times = measure({"dense": dense, "sparse": sparse}, device, rounds=3 * turns, warm_s=0.005)
        return [(times["dense"].median_us, times["sparse"].median_us)] * turns
    place = torch.device(device)
    found = [[call_us([f], place, "graph", is_cold=True) for f in (dense, sparse)] for _ in range(turns)]
    return [(d, s) for d, s in found]


def estimated(model: nn.Module, layer: ShflLinear, n: int) -> Times:
    """What `estimate` measures of a model of one linear layer, and decides by; one random pattern for every n."""
    seen, facts, timer = Observation(calls={"0": [n]}, escaped={"0"}), facts_of(model[0]), Timer("graph")

    def measured(name: str, layout: Plan) -> Times:
        return timer.times(name, facts, layer, seen.tokens(name), layout)

    return decide(seen, {"0"}, Options(timing="graph"), measured)[1]["0"]


def bench_slower(run: Run) -> None:
    """As `estimate` decides; then chosen layers and dense ones are timed again, in turns, and compared."""
    dtype, v = run.dtypes[0], 16 if run.is_toy else 64
    block, batches = (v, 16 if run.is_toy else 64), BATCHES[:3] if run.is_toy else BATCHES
    worst, chosen, total, slower = 0.0, 0, 0, []
    shapes = sweep_shapes(run.is_toy)
    for (m, k), n in itertools.product(shapes, batches):
        if run.budget.is_spent:
            left = len(shapes) * len(batches) - total
            run.lines.append(f"left out: never_slower of {left} layers, from {m}x{k}, n={n} on (time budget)")
            break
        if n == batches[0]:
            gc.collect()  # the memory of a packed matrix must not be freed in the middle of a later capture
            layer = random_layer((m, k), block, 0.75, bias=True, dtype=dtype, device=torch.device(run.device), seed=1)
            model = run.made(lambda: nn.Sequential(nn.Linear(k, m)), dtype)  # noqa: B023 (called at once)
            layer.layout = "token"
        total += 1
        told = estimated(model, layer, n)
        if not told.is_worth_it:
            run.row("slower", f"{m}x{k} n={n}", "dense chosen", dtype=dtype, v=v,
                    speedup=round(told.dense / told.sparse, 3))  # fmt: skip
            continue
        x = torch.randn(n, k, device=run.device, dtype=dtype)
        pair = call(model, x), call(layer, x)
        turns = in_turns(*pair, n, run.device, TURNS)
        if sum(s for _, s in turns) > 1.03 * sum(d for d, _ in turns):  # measured better before it is said
            turns += in_turns(*pair, n, run.device, MORE_TURNS)
        dense_us, sparse_us = (statistics.median(side) for side in zip(*turns, strict=True))
        ratio = sparse_us / dense_us
        chosen, worst = chosen + 1, max(worst, ratio)
        if ratio > 1.03:
            slower.append(f"{m}x{k} n={n} {ratio:.2f}")
        run.row("slower", f"{m}x{k} n={n}", "sparse chosen", dtype=dtype, v=v, speedup=round(1 / ratio, 3),
                median_us=round(sparse_us, 3), note=f"estimate {told.dense / told.sparse:.3f}")  # fmt: skip
    text = f"worst of {chosen} chosen of {total} layers, time over dense"
    run.judge(f"never_slower: {text}", worst, 1.03, at_most=True)
    run.row("slower", "all", text, dtype=dtype, v=v, bar="at most 1.03", note=f"{worst:.3f}; {len(slower)} above")
    if slower:
        run.lines.append(f"       slower than 3 %: {', '.join(slower[:12])}")


def estimate_cases(toy: bool) -> Iterator[tuple[int, int, int]]:
    """(m, k, n) of the layers whose estimate is checked."""
    if toy:
        yield from ((64, 64, 32), (128, 64, 8))
        return
    for m, k in ((1024, 1024), (4096, 1024), (1024, 4096), (4096, 4096), (14336, 4096), (4096, 14336), (3072, 768)):
        for n in (16, 512, 4096):
            yield m, k, n


def bench_estimate(run: Run) -> None:
    """Forecast, then prune weights with heavy tails (groups of unequal length) and time the packed layer."""
    dtype, v = run.dtypes[0], 16 if run.is_toy else 64
    block, off = (v, 16 if run.is_toy else 64), []
    packed: dict[tuple[int, int], ShflLinear] = {}
    for m, k, n in estimate_cases(run.is_toy):
        if run.budget.is_spent:
            run.lines.append(f"left out: estimate from {m}x{k}, n={n} on (time budget)")
            break
        model = run.made(lambda: nn.Sequential(nn.Linear(k, m)), dtype)  # noqa: B023 (called at once)
        with torch.no_grad():
            model[0].weight.mul_(torch.randn(m, 1, device=run.device).exp())
        x = torch.randn(n, k, device=run.device, dtype=dtype)
        told = shflnb.estimate(model, x, 0.75, block, timing="graph", policy="always").rows[0].sparse_us
        if (m, k) not in packed:
            packed[m, k] = ShflLinear.from_dense(model[0], 0.75, block, quality="fast")
        layer = packed[m, k]
        layer.layout = "token"
        found = statistics.median(
            call_us([call(layer, x)], torch.device(run.device), "graph", is_cold=n < COLD_BELOW) for _ in range(3)
        )
        off.append(abs((told or 0.0) / found - 1))
        counts = layer.to_packed().counts
        run.row("estimate", f"{m}x{k} n={n}", "estimate against measured", dtype=dtype, v=v, error=round(off[-1], 4),
                median_us=round(found, 3),
                note=f"estimate {told:.2f} us; groups keep {counts.min()}..{counts.max()}")  # fmt: skip
    if off:
        good = sum(o <= 0.10 for o in off) / len(off)
        run.judge(f"estimate: part of {len(off)} layers within 10 %", good, 0.9)
        run.row("estimate", "all", f"part of {len(off)} layers within 10 %", dtype=dtype, v=v, bar="at least 0.9",
                note=f"{good:.2f}; median {statistics.median(off):.1%} off, worst {max(off):.1%}")  # fmt: skip
        run.lines.append(f"       estimate: median {statistics.median(off):.1%} off, worst {max(off):.1%}")


def kernels_of(parts: Sequence[str]) -> set[Any]:
    """The kernels of many columns that the parts may launch; those of few are built when needed, a few of each height.

    Building takes seconds each, which the parts would spend one after the other.
    """
    from shflnb.kernels.select import candidates

    wanted: set[Any] = set()
    capability = torch.cuda.get_device_capability()
    for v, dtype, epilogues, needed_by in (
        (64, "bfloat16", ("plain", "identity", "gelu"), PARTS),
        (64, "float16", ("identity", "gelu"), ("mlp",)),
        (128, "bfloat16", ("identity", "gelu"), ("mlp",)),
        (128, "float16", ("identity", "gelu"), ("mlp",)),
    ):
        if set(parts) & set(needed_by):
            found = [c for c in candidates(v, dtype, capability) if capability[0] != 9 or c.kernel == "sm90"]
            wanted |= {config.with_epilogue(name) for config in found for name in epilogues}
    return wanted


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", RESULTS)))
    parser.add_argument("--seconds", type=float, default=240.0, help="time budget; what does not fit is named")
    options = parser.parse_args(arguments)
    name, before = results_name(options.device), machine(options.device)
    results = Results(options.out / f"{name}.models.csv", FIELDS)
    run = Run(options.device, name, results, Budget(options.seconds))
    parts = {
        "mlp": bench_mlp,
        "bert": bench_bert,
        "decode": bench_decode,
        "slower": bench_slower,
        "estimate": bench_estimate,
    }
    if options.device == "cuda":
        wanted = kernels_of(options.only)
        seconds = prebuild(wanted, torch.cuda.get_device_capability())
        print(f"{len(wanted)} kernels built in {seconds:.1f} s", flush=True)
    for part in (p for p in PARTS if p in options.only):
        if run.budget.is_spent:
            run.lines.append(f"left out: {part} (time budget)")
            continue
        try:
            parts[part](run)
        except Exception as error:  # noqa: BLE001 (the other parts are worth having)
            traceback.print_exc()
            run.wrong += 1
            run.lines.append(f"FAILED {part}: {type(error).__name__}: {str(error).partition(chr(10))[0][:120]}")
        print(f"[{run.budget.used_s:5.1f} s] {part} ended", flush=True)
        gc.collect()
        if options.device == "cuda":
            torch.cuda.empty_cache()
    results.close()
    write_machine(options.out / f"{name}.models.machine.json", before, options.device, run.budget.used_s)
    print("\n".join(run.lines))
    return 1 if run.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
