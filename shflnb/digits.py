"""The demo's real weight: a small network in NumPy that learns scikit-learn's bundled digits in under a second."""

from __future__ import annotations

import importlib.util
import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from .errors import MissingDependencyError

__all__ = ["Digits", "Network", "load_digits"]

BATCH = 128
RATE, DECAY = 3e-3, 6.0  # a strong decay, for few steps: it pulls what the task does not need towards zero


@dataclass
class Digits:
    """Images as columns, like all activations here: x (64, images) float32 in 0..1, labels (images,)."""

    x: np.ndarray
    labels: np.ndarray
    x_test: np.ndarray
    labels_test: np.ndarray


def load_digits(*, test_share: float = 0.2, seed: int = 0) -> Digits:
    """Scikit-learn's 1797 bundled images of digits (nothing is downloaded), shuffled and split."""
    images, labels = _read_bundled()
    order = np.random.default_rng(seed).permutation(len(labels))
    x, labels = np.ascontiguousarray(images[order].T / 16.0, dtype=np.float32), labels[order]
    cut = round(len(labels) * (1 - test_share))
    return Digits(x[:, :cut], labels[:cut], x[:, cut:], labels[cut:])


def _read_bundled() -> tuple[np.ndarray, np.ndarray]:
    """Images (1797, 64) with values 0..16, and labels (1797,)."""
    found = importlib.util.find_spec("sklearn")
    if found is None:
        raise MissingDependencyError("the demo trains on scikit-learn's digits; pip install 'shflnb[demo]'")
    for folder in found.submodule_search_locations or ():
        path = Path(folder) / "datasets/data/digits.csv.gz"
        if path.is_file():  # read here, because importing sklearn.datasets takes a second
            table = np.loadtxt(path, delimiter=",", dtype=np.float32)
            return table[:, :-1], table[:, -1].astype(np.int64)
    from sklearn import datasets

    images, labels = datasets.load_digits(return_X_y=True)
    return images.astype(np.float32), labels


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
        parameters = self.weights + self.biases
        moments = [(np.zeros_like(p), np.zeros_like(p)) for p in parameters]
        step = 0
        # Products this small gain nothing from a second thread, and lose 5 times where other work shares the cores.
        with threadpool_limits(1, "blas"):
            for _ in range(epochs):
                order = rng.permutation(len(digits.labels))
                for start in range(0, len(order) - BATCH + 1, BATCH):
                    step += 1
                    gradients = self._gradients(digits, order[start : start + BATCH])
                    for p, g, (first, second) in zip(parameters, gradients, moments, strict=True):
                        first += np.float32(0.1) * (g - first)
                        second += np.float32(0.001) * (g * g - second)
                        p -= RATE * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
                    for layer, w in enumerate(self.weights):
                        w *= np.float32(1 - RATE * DECAY)
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
