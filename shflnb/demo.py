"""The whole idea in seconds: train, prune, pack, multiply, check, time. `shflnb demo` prints what this yields.

The weight is real: the hidden layer of a small network trained here and now on scikit-learn's bundled digits.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .errors import MissingDependencyError
from .formats import ShflBWMatrix, load, pack, save
from .machine import cpu_name, find_cuda, usable_cores
from .ops import matmul
from .patterns import PruneResult, prune

__all__ = ["SNIPPET", "Check", "Network", "Step", "load_digits", "run"]

SPARSITY = 0.75
BLOCK = (32, 64)
HIDDEN = 512
EPOCHS, EPOCHS_AFTER = 15, 3
COLUMNS = 2048
LARGE = 2048
LARGE_BLOCK = (64, 64)

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


@dataclass
class Digits:
    """Images as columns, like all activations here: x (64, images) float32 in 0..1, labels (images,)."""

    x: np.ndarray
    labels: np.ndarray
    x_test: np.ndarray
    labels_test: np.ndarray


def load_digits(*, test_share: float = 0.2, seed: int = 0) -> Digits:
    """Scikit-learn's 1797 bundled images of digits (nothing is downloaded), shuffled and split."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise MissingDependencyError("the demo trains on scikit-learn's digits; pip install 'shflnb[demo]'") from error
    images, labels = datasets.load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    x, labels = np.ascontiguousarray(images[order].T / 16, dtype=np.float32), labels[order]
    cut = round(len(labels) * (1 - test_share))
    return Digits(x[:, :cut], labels[:cut], x[:, cut:], labels[cut:])


@dataclass
class Network:
    """A multilayer perceptron with ReLU between its layers; weights (m, k) and biases (m,), float32."""

    weights: list[np.ndarray]
    biases: list[np.ndarray]

    @classmethod
    def random(cls, widths: list[int], seed: int) -> Network:
        """He's initial weights, zero biases."""
        rng = np.random.default_rng(seed)
        pairs = list(itertools.pairwise(widths))
        scale = [np.float32(np.sqrt(2 / k)) for k, _ in pairs]
        weights = [s * rng.standard_normal((m, k), dtype=np.float32) for s, (k, m) in zip(scale, pairs, strict=True)]
        return cls(weights, [np.zeros(m, np.float32) for _, m in pairs])

    def activations(self, x: np.ndarray) -> list[np.ndarray]:
        """The input, every hidden activation, and the logits."""
        found = [x]
        for w, b in zip(self.weights[:-1], self.biases[:-1], strict=True):
            found.append(np.maximum(w @ found[-1] + b[:, None], 0))
        return [*found, self.weights[-1] @ found[-1] + self.biases[-1][:, None]]

    def accuracy(self, digits: Digits) -> float:
        """Share of the test images that are named rightly."""
        return float((self.activations(digits.x_test)[-1].argmax(0) == digits.labels_test).mean())

    def train(self, digits: Digits, *, epochs: int, seed: int, masks: dict[int, np.ndarray] | None = None) -> None:
        """AdamW in place, 128 images a step; `masks[layer]` keeps pruned weights of that layer at zero."""
        rng = np.random.default_rng(seed)
        rate, decay, batch, step = 2e-3, 5.0, 128, 0
        parameters = self.weights + self.biases
        first, second = [np.zeros_like(p) for p in parameters], [np.zeros_like(p) for p in parameters]
        for _ in range(epochs):
            order = rng.permutation(len(digits.labels))
            for start in range(0, len(order) - batch + 1, batch):
                picked = order[start : start + batch]
                step += 1
                for p, g, m1, m2 in zip(parameters, self._gradients(digits, picked), first, second, strict=True):
                    m1 += np.float32(0.1) * (g - m1)
                    m2 += np.float32(0.001) * (g * g - m2)
                    p -= rate * (m1 / (1 - 0.9**step)) / (np.sqrt(m2 / (1 - 0.999**step)) + 1e-8)
                for layer, w in enumerate(self.weights):
                    w *= np.float32(1 - rate * decay)
                    if masks and layer in masks:
                        w *= masks[layer]

    def _gradients(self, digits: Digits, picked: np.ndarray) -> list[np.ndarray]:
        """Gradient of the mean cross-entropy, weights first, then biases."""
        *hidden, logits = self.activations(digits.x[:, picked])
        share = np.exp(logits - logits.max(0))
        share /= share.sum(0)
        share[digits.labels[picked], np.arange(len(picked))] -= 1
        flow = share / np.float32(len(picked))
        of_weights, of_biases = [], []
        for layer in reversed(range(len(self.weights))):
            of_weights.append(flow @ hidden[layer].T)
            of_biases.append(flow.sum(1))
            if layer:
                flow = (self.weights[layer].T @ flow) * (hidden[layer] > 0)
        return of_weights[::-1] + of_biases[::-1]


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
            Check(
                "packed.to_dense() equals the pruned weight everywhere", _equal(packed.to_dense(), pruned.weight)
            ),
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
            lambda a=dense, b=x, o=y_dense: np.matmul(a, b, out=o), lambda a=sparse, b=x, o=y: matmul(a, b, out=o)
        )
        checks.append(Check(f"what was timed is right ({name})", bool(np.allclose(y, y_dense, rtol=1e-4, atol=1e-3))))
        speedup = dense_ms / sparse_ms
        table.append(
            (f"{name} {m} x {k}", f"{k} x {COLUMNS}", f"{dense_ms:.2f} ms", f"{sparse_ms:.2f} ms", f"{speedup:.2f}x")
        )
        figures[f"{name}_{m}x{k}x{COLUMNS}"] = {"dense_ms": dense_ms, "sparse_ms": sparse_ms, "speedup": speedup}
    title = f"Timed on this machine's CPU (float32, {SPARSITY:.0%} zeros, medians)"
    return Step(title, table=table, checks=checks, figures=figures)


def _alternating_ms(first: Callable[[], Any], second: Callable[[], Any], *, rounds: int = 7) -> tuple[float, float]:
    """Median milliseconds of two calls, in turns, so that a disturbance meets both; the first round only warms up."""
    times = np.empty((rounds + 1, 2))
    for number in range(rounds + 1):
        for place, call in enumerate((first, second)):
            start = time.perf_counter()
            call()
            times[number, place] = time.perf_counter() - start
    medians = np.median(times[1:], axis=0) * 1e3
    return float(medians[0]), float(medians[1])


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and np.array_equal(a, b)
