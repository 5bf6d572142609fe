"""The whole idea in seconds: train, prune, pack, multiply, check, time. `shflnb demo` prints what this yields.

The weight is real: the hidden layer of a small network trained here and now on scikit-learn's bundled digits.
"""

from __future__ import annotations

import functools
import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from .digits import Digits, Network, load_digits
from .formats import ShflBWMatrix, load, pack, save
from .machine import cpu_name, find_cuda, usable_cores
from .ops import matmul
from .patterns import PruneResult, prune

__all__ = ["SNIPPET", "Check", "Step", "run"]

SPARSITY = 0.75
BLOCK = (32, 64)
HIDDEN = 512
EPOCHS, EPOCHS_AFTER = 8, 3
COLUMNS = 1024
LARGE = 2048
LARGE_BLOCK = (64, 64)
GPU_LARGE = 4096

SNIPPET = """\
import shflnb

pruned = shflnb.prune(w, sparsity=0.75, block=(32, 64))  # w: (512, 512)
packed = pruned.pack()                                   # lossless
y = shflnb.matmul(packed, x, bias=b, activation="relu")  # relu(w @ x + b)
shflnb.save(packed, "layer.safetensors")
"""


@dataclass(frozen=True)
class Check:
    """One statement that must hold, and whether it does."""

    text: str
    passed: bool


@dataclass
class Step:
    """One part of the demo: what was found (`lines`, `table`), what must hold (`checks`), and numbers (`figures`)."""

    title: str
    lines: list[str] = field(default_factory=list)
    table: list[tuple[str, ...]] = field(default_factory=list)
    """Rows of text, the first one the header; empty for none."""
    checks: list[Check] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)


def run(seed: int = 0) -> Iterator[Step]:
    """Yield the steps of the demo, each with its checks; the same seed gives the same weights and searches."""
    yield _machine_step()
    digits = load_digits(seed=seed)
    network = Network.random([64, HIDDEN, HIDDEN, 10], seed)
    yield _train_step(network, digits, seed)
    step, pruned = _prune_step(network.weights[1], seed)
    yield step
    step, packed = _pack_step(pruned)
    yield step
    hidden = network.activations(digits.x_test)[1]
    yield _multiply_step(packed, pruned.weight, network.biases[1], hidden, seed)
    yield _accuracy_step(network, digits, pruned, seed)
    yield _time_step(packed, pruned.weight, seed)
    cuda = find_cuda()
    if cuda.devices:
        missing = _missing_for_gpu()
        yield _skip_gpu_step(missing) if missing else _gpu_step(packed, hidden, seed)


def _machine_step() -> Step:
    cuda = find_cuda()
    gpu = ", ".join(device.name for device in cuda.devices) or f"none: {cuda.problem}"
    figures = {"cpu": cpu_name(), "cores": usable_cores(), "gpus": [device.name for device in cuda.devices]}
    return Step("This machine", [f"CPU  {cpu_name()}, {usable_cores()} cores", f"GPU  {gpu}"], figures=figures)


def _train_step(network: Network, digits: Digits, seed: int) -> Step:
    start = time.perf_counter()
    network.train(digits, epochs=EPOCHS, seed=seed)
    seconds, accuracy = time.perf_counter() - start, network.accuracy(digits)
    return Step(
        "A weight with real structure",
        [
            f"trained 64 -> {HIDDEN} -> {HIDDEN} -> 10 on scikit-learn's digits in {seconds:.1f} s: "
            f"{accuracy:.1%} of the test images right"
        ],
        checks=[Check("the network has learnt its task (more than 90 % right)", accuracy > 0.9)],
        figures={"accuracy": accuracy, "train_s": seconds},
    )


def _prune_step(w: np.ndarray, seed: int) -> tuple[Step, PruneResult]:
    found: dict[str, PruneResult] = {}
    seconds: dict[str, float] = {}
    with threadpool_limits(1, "blas"):  # a layer this small gains nothing from a second thread
        for search in ("identity", "paper", "refined"):
            start = time.perf_counter()
            found[search] = prune(w, sparsity=SPARSITY, block=BLOCK, search=search, seed=seed)
            seconds[search] = time.perf_counter() - start
    magnitudes = np.sort(np.abs(w), axis=None)
    kept = round(w.size * (1 - SPARSITY))
    bound = float(magnitudes[-kept:].sum() / magnitudes.sum())
    refined = found["refined"]
    names = {
        "identity": "rows as they are",
        "paper": "the paper's row shuffle",
        "refined": "shflnb's row shuffle (default)",
    }
    others = max(found["identity"].retained, found["paper"].retained)
    step = Step(
        f"Pruned to {SPARSITY:.0%} zeros in groups of {BLOCK[0]} rows",
        table=[
            ("row groups", "sum of |w| kept", "search"),
            *((names[s], f"{found[s].retained:.1%}", f"{seconds[s]:.2f} s") for s in names),
            ("(single weights, no pattern: the limit)", f"{bound:.1%}", ""),
        ],
        checks=[
            Check(
                "no search keeps more weights than were asked for",
                all(np.count_nonzero(r.weight) <= kept for r in found.values()),
            ),
            Check("the default search keeps at least as much as the other two", refined.retained >= others - 1e-6),
        ],
        figures={
            "retained": {s: r.retained for s, r in found.items()},
            "retained_unstructured": bound,
            "search_s": seconds,
        },
    )
    return step, refined


def _pack_step(pruned: PruneResult) -> tuple[Step, ShflBWMatrix]:
    start = time.perf_counter()
    packed = pruned.pack()
    seconds = time.perf_counter() - start
    found = pack(pruned.weight, block=BLOCK)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layer.safetensors"
        save(packed, path)
        file_bytes, loaded = path.stat().st_size, load(path)
    dense_bytes = pruned.weight.nbytes
    step = Step(
        "Packed",
        [
            repr(packed),
            f"{dense_bytes / packed.nbytes:.2f}x smaller than dense; file {file_bytes / 1e3:.0f} kB; "
            f"packing took {seconds * 1e3:.0f} ms",
        ],
        checks=[
            Check("packed.to_dense() equals the pruned weight everywhere", _equal(packed.to_dense(), pruned.weight)),
            Check(
                "pack finds the row groups again without being told",
                _equal(found.to_dense(), pruned.weight) and found.stored <= packed.stored,
            ),
            Check("what was saved is what is loaded", _equal(loaded.to_dense(), pruned.weight)),
            Check("packed is smaller than dense", packed.nbytes < dense_bytes),
        ],
        figures={
            "dense_bytes": dense_bytes,
            "packed_bytes": packed.nbytes,
            "file_bytes": file_bytes,
            "pack_s": seconds,
        },
    )
    return step, packed


def _multiply_step(packed: ShflBWMatrix, w: np.ndarray, bias: np.ndarray, x: np.ndarray, seed: int) -> Step:
    exact = w.astype(np.float64) @ x.astype(np.float64)
    error = float(np.abs(matmul(packed, x) - exact).max())
    dense_error = float(np.abs(w @ x - exact).max())
    fused = matmul(packed, x, bias=bias, activation="relu")
    apart = np.maximum(exact + bias[:, None], 0)
    rng = np.random.default_rng(seed)
    small = rng.integers(-4, 5, size=w.shape).astype(np.float32) * (w != 0)
    integers = rng.integers(-8, 9, size=x.shape).astype(np.float32)
    small_packed = pack(small, block=BLOCK, row_perm=packed.row_perm)
    return Step(
        "Multiplied",
        [f"largest error against float64: sparse {error:.1e}, NumPy's dense product {dense_error:.1e}"],
        checks=[
            Check("the error is at most twice that of the dense product", error <= 2 * dense_error),
            Check("bias and ReLU in the same pass give the same", bool(np.abs(fused - apart).max() <= 3 * dense_error)),
            Check("small integers come out exactly", _equal(matmul(small_packed, integers), small @ integers)),
        ],
        figures={"max_error": error, "max_error_dense": dense_error},
    )


def _accuracy_step(network: Network, digits: Digits, pruned: PruneResult, seed: int) -> Step:
    before = network.accuracy(digits)
    sparse = Network([network.weights[0], np.array(pruned.weight), network.weights[2]], list(network.biases))
    after = sparse.accuracy(digits)
    sparse.weights, sparse.biases = [w.copy() for w in sparse.weights], [b.copy() for b in sparse.biases]
    sparse.train(digits, epochs=EPOCHS_AFTER, seed=seed + 1, masks={1: pruned.mask})
    tuned = sparse.accuracy(digits)
    packed = pack(sparse.weights[1], block=BLOCK, row_perm=pruned.row_perm)
    hidden = matmul(packed, sparse.activations(digits.x_test)[1], bias=sparse.biases[1], activation="relu")
    logits = sparse.weights[2] @ hidden + sparse.biases[2][:, None]
    with_packed = float((logits.argmax(0) == digits.labels_test).mean())
    return Step(
        "The network's test accuracy",
        table=[
            ("", "right"),
            ("dense", f"{before:.1%}"),
            ("pruned", f"{after:.1%}"),
            (f"pruned, then {EPOCHS_AFTER} epochs of training what is left", f"{tuned:.1%}"),
            ("the same, computed by shflnb.matmul", f"{with_packed:.1%}"),
        ],
        # One image may sit on the fence between two digits; more than one would be a wrong product.
        checks=[
            Check("shflnb and NumPy name the same digits", abs(with_packed - tuned) * len(digits.labels_test) <= 1.5)
        ],
        figures={"dense": before, "pruned": after, "tuned": tuned, "tuned_packed": with_packed},
    )


def _time_step(packed: ShflBWMatrix, w: np.ndarray, seed: int) -> Step:
    rng = np.random.default_rng(seed)
    large = prune(
        rng.standard_normal((LARGE, LARGE), dtype=np.float32), sparsity=SPARSITY, block=LARGE_BLOCK, search="identity"
    )
    table: list[tuple[str, ...]] = [("layer", "x", "dense (NumPy)", "shflnb", "speed-up")]
    checks, figures = [], {}
    layers = (("trained", packed, w), ("random", large.pack(), large.weight))
    for name, sparse, dense in layers:
        m, k = dense.shape
        x = rng.standard_normal((k, COLUMNS), dtype=np.float32)
        y_dense, y = np.empty((m, COLUMNS), np.float32), np.empty((m, COLUMNS), np.float32)
        dense_ms, sparse_ms = _alternating_ms(
            functools.partial(np.matmul, dense, x, out=y_dense), functools.partial(matmul, sparse, x, out=y)
        )
        checks.append(Check(f"what was timed is right ({name})", bool(np.allclose(y, y_dense, rtol=1e-4, atol=1e-3))))
        speedup = dense_ms / sparse_ms
        table.append(
            (f"{name} {m} x {k}", f"{k} x {COLUMNS}", f"{dense_ms:.2f} ms", f"{sparse_ms:.2f} ms", f"{speedup:.2f}x")
        )
        figures[f"{name}_{m}x{k}x{COLUMNS}"] = {"dense_ms": dense_ms, "sparse_ms": sparse_ms, "speedup": speedup}
    title = f"Timed on this machine's CPU (float32, {SPARSITY:.0%} zeros, best of five)"
    return Step(title, table=table, checks=checks, figures=figures)


def _missing_for_gpu() -> str | None:
    """What has to be installed before the demo can use the GPU that is there, or None."""
    if importlib.util.find_spec("numba_cuda") is None:
        return "numba-cuda; pip install 'shflnb[cu13]' (CUDA 12: 'shflnb[cu12]')"
    if importlib.util.find_spec("torch") is None:
        return "torch, for device arrays and a dense product to compare with; pip install 'shflnb[torch]'"
    from .nn.gpu_demo import is_usable

    return None if is_usable() else "a build of torch that can use it (torch.cuda.is_available() is False here)"


def _skip_gpu_step(missing: str) -> Step:
    return Step("The GPU was not used", [f"it needs {missing}"], figures={"gpu_missing": missing})


def _gpu_step(packed: ShflBWMatrix, x: np.ndarray, seed: int) -> Step:
    from .nn.gpu_demo import multiply, time_layer

    product = multiply(packed, x, seed=seed)
    times = time_layer(GPU_LARGE, GPU_LARGE, sparsity=SPARSITY, block=LARGE_BLOCK, seed=seed)
    return Step(
        f"The same on the {product.device} (float16, {SPARSITY:.0%} zeros)",
        [f"largest error against float64: sparse {product.error:.1e}, cuBLAS {product.dense_error:.1e}"],
        table=[
            ("layer", "x", "dense (cuBLAS)", "shflnb", "speed-up"),
            (
                f"random {GPU_LARGE} x {GPU_LARGE}",
                f"{GPU_LARGE} x {GPU_LARGE}",
                f"{times.dense_ms:.3f} ms",
                f"{times.sparse_ms:.3f} ms",
                f"{times.dense_ms / times.sparse_ms:.2f}x",
            ),
        ],
        checks=[
            Check(
                "on the GPU the error is at most twice that of the dense product",
                product.error <= 2 * product.dense_error,
            ),
            Check("on the GPU small integers come out exactly", product.exact_for_integers),
            Check("on the GPU the same call gives the same bits again", product.same_bits_again),
            Check("what was timed on the GPU is right", times.is_right),
        ],
        figures={"gpu": asdict(product), "gpu_times": asdict(times)},
    )


def _alternating_ms(first: Callable[[], Any], second: Callable[[], Any], *, rounds: int = 5) -> tuple[float, float]:
    """Best milliseconds of two calls, in turns; the first round only warms up. (Best, as other work disturbs.)"""
    times = np.empty((rounds + 1, 2))
    for number in range(rounds + 1):
        for place, call in enumerate((first, second)):
            start = time.perf_counter()
            call()
            times[number, place] = time.perf_counter() - start
    best = times[1:].min(axis=0) * 1e3
    return float(best[0]), float(best[1])


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and np.array_equal(a, b)
