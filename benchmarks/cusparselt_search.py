"""Which algorithm of cuSPARSELt is fastest for a 2:4 product? A process of its own for each layout of the operands.

    python benchmarks/cusparselt_search.py LAYOUT < order.json     what `search` starts; says each step in JSON

In torch 2.11 on an H200 cuSPARSELt's own search ended in an internal error and took the CUDA context with it
(2026-11-22). No report of that was found. torch gives the search a workspace of the size that the default algorithm
needs, while NVIDIA's sample gives it none, so that one of the searched algorithms may want more. Hence two ways: the
library's search and, where that fails for every layout, every algorithm by its number, checked and timed here (without
split-k). The process says what it tries before it tries it; if it dies of that, the next one leaves it out.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from cases import Shape
from peer_operands import DTYPE, Operands, two_of_four
from protocol import check, measure
from records import Budget

__all__ = ["LAYOUTS", "Choice", "found_for", "layouts", "run", "search_layout"]

LAYOUTS = ("W @ X", "W @ X, transposed result", "W @ X.T.t()", "W @ X.T.t(), transposed result")
LIBRARY = "library"
NUMBERS, FAILURES = tuple(map(str, range(64))), 3
"""Algorithms that are tried one by one, and failures in a row that mean that there are no more."""
SEARCH_S, RESTARTS = 60.0, 4
"""Seconds for all layouts together; processes that may die for one layout."""


@dataclass(frozen=True)
class Choice:
    """What `torch._cslt_sparse_mm` is given for a product, and how it was found."""

    options: dict[str, int]
    text: str


def layouts(o: Operands) -> dict[str, tuple[torch.Tensor, bool]]:
    """Layout -> x, and whether the result is transposed."""
    return dict(zip(LAYOUTS, [(x, t) for x in (o.x, o.xt.t()) for t in (False, True)], strict=True))


def run(packed: torch.Tensor, x: torch.Tensor, is_transposed: bool, options: dict[str, int]) -> torch.Tensor:
    """The product by a chosen algorithm."""
    return torch._cslt_sparse_mm(packed, x, transpose_result=is_transposed, **options)


# -- the process that tries -------------------------------------------------------------------------------------------


def library_search(packed: torch.Tensor, x: torch.Tensor, is_transposed: bool) -> dict[str, int]:
    """cuSPARSELt's own search; newer versions of torch let it choose split-k as well."""
    search = getattr(getattr(torch._C, "_cusparselt", None), "mm_search", None)
    if search is None:
        return {"alg_id": int(torch._cslt_sparse_mm_search(packed, x, transpose_result=is_transposed))}
    algorithm, split_k, mode, _ = search(packed, x, None, None, None, is_transposed)
    return {"alg_id": int(algorithm), "split_k": int(split_k), "split_k_mode": int(mode)}


def is_alive(device: str) -> bool:
    """Whether the CUDA context can still be used."""
    try:
        if device.startswith("cuda"):
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def attempts(
    layout: str, shape: Shape, steps: Sequence[str], skip: Sequence[str], device: str
) -> Iterator[dict[str, Any]]:
    """Try each step, `LIBRARY` or an algorithm's number, on one product: what is tried, what failed, what is best."""
    o = Operands(shape, device)
    x, is_transposed = layouts(o)[layout]
    sparse, dense = two_of_four(o)
    reference = dense.float() @ o.x.float()
    reference = reference.t() if is_transposed else reference
    times: dict[str, tuple[float, dict[str, int]]] = {}
    failures = 0
    for step in steps:
        if step in skip:
            continue
        yield {"try": step}
        try:
            options = library_search(sparse.packed, x, is_transposed) if step == LIBRARY else {"alg_id": int(step)}
            call = functools.partial(run, sparse.packed, x, is_transposed, options)
            error, is_right = check(call, reference, DTYPE)
            if not is_right:
                raise RuntimeError(f"its result is wrong (relative error {error:.2g})")
            timing = measure({step: call}, device, rounds=3, sample_us=200.0, warm_s=0.0, no_graph=[step])[step]
        except RuntimeError as problem:
            yield {"failed": step, "why": " ".join(str(problem).split())[:160], "is_alive": is_alive(device)}
            failures += step != LIBRARY
            if failures == FAILURES:
                break
            continue
        failures = 0
        times[step] = timing.median_us, options
        if step == LIBRARY:  # it has seen all algorithms
            break
    if times:
        best = min(times, key=lambda step: times[step][0])
        options = times[best][1]
        text = f"algorithm {options['alg_id']}, the fastest of {len(times)} tried one by one"
        if best == LIBRARY:
            text = f"algorithm {options['alg_id']}, split-k {options.get('split_k', 1)}, by its own search"
        yield {"shape": astuple(shape), "options": options, "text": text}


def try_layout(layout: str, order: dict[str, Any], device: str, say: Callable[[dict[str, Any]], None]) -> int:
    """Try one layout on all shapes of an order; 1 as soon as nothing more can be tried in this process."""
    skip = list(order["skip"])
    for shape in order["shapes"]:
        for event in attempts(layout, Shape(*shape), order["steps"], skip, device):
            say(event)
            if "failed" in event:
                if not event["is_alive"]:
                    return 1
                if event["failed"] == LIBRARY:  # what fails on one product is not tried on the next
                    skip.append(LIBRARY)
    return 0


# -- the process that asks --------------------------------------------------------------------------------------------


def events_of(command: Sequence[str], order: dict[str, Any], seconds: float) -> tuple[list[dict[str, Any]], int | None]:
    """What a process said, and its exit code; None if its time was over."""
    given = json.dumps(order).encode()
    code: int | None = None
    try:
        done = subprocess.run(command, input=given, stdout=subprocess.PIPE, timeout=seconds, check=False)
        said, code = done.stdout, done.returncode
    except subprocess.TimeoutExpired as late:
        said = late.stdout or b""
    lines = said.decode(errors="replace").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}\n")], code


def search_layout(
    layout: str,
    shapes: Sequence[Shape],
    steps: Sequence[str],
    seconds: float,
    command: Sequence[str] = (sys.executable, __file__),
) -> tuple[dict[Shape, Choice], list[str]]:
    """The best algorithm of each shape for one layout, as far as there is time; and what failed."""
    budget = Budget(seconds)
    found: dict[Shape, Choice] = {}
    skip: list[str] = []
    why: list[str] = []
    for _ in range(1 + RESTARTS):
        left = [astuple(shape) for shape in shapes if shape not in found]
        if not left or budget.is_spent or set(steps) <= set(skip):
            break
        order = {"shapes": left, "steps": list(steps), "skip": skip}
        events, code = events_of([*command, layout], order, budget.seconds - budget.used_s)
        trying = ""
        for event in events:
            trying = event.get("try", "" if "shape" in event else trying)
            if "shape" in event:
                found[Shape(*event["shape"])] = Choice(event["options"], event["text"])
            if "failed" in event and event["failed"] == LIBRARY:
                why.append(f"{layout}: its own search: {event['why']}")
        if code == 0:
            break
        ending = f"its process ended with code {code}" if code is not None else f"not done within {seconds:.0f} s"
        why.append(f"{layout}{', ' + trying if trying else ''}: {ending}")
        if not trying:  # it did not come as far as to try something
            break
        skip.append(trying)
    return found, why


@functools.cache
def search(shapes: tuple[Shape, ...]) -> tuple[dict[str, dict[Shape, Choice]], list[str]]:
    """Layout -> shape -> the best algorithm; and what failed."""
    budget = Budget(SEARCH_S)
    found: dict[str, dict[Shape, Choice]] = {}
    why: list[str] = []
    cheap_first = sorted(shapes, key=lambda shape: shape.flops)
    for steps in ((LIBRARY,), NUMBERS):
        for number, layout in enumerate(LAYOUTS):
            share = max(0.0, budget.seconds - budget.used_s) / (len(LAYOUTS) - number)
            found[layout], failed = search_layout(layout, cheap_first, steps, share)
            why += failed
        if any(found.values()):  # one by one is a search without split-k, and takes a minute
            break
    for line in why:
        print(f"  cuSPARSELt search: {line}", file=sys.stderr)
    return found, why


def found_for(shape: Shape, shapes: tuple[Shape, ...]) -> dict[str, Choice]:
    """Layout -> the best algorithm for one shape; all of `shapes` are searched at once, at the first call."""
    found, why = search(shapes)
    here = {layout: by_shape[shape] for layout, by_shape in found.items() if shape in by_shape}
    if not here:
        raise RuntimeError("; ".join(dict.fromkeys(why)) or "no algorithm gave the right result")
    return here


def main(arguments: Sequence[str]) -> int:
    """Try one layout; the order comes on the standard input."""
    return try_layout(arguments[0], json.load(sys.stdin), "cuda", lambda event: print(json.dumps(event), flush=True))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
