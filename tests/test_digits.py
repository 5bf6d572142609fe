"""The demo's data and network, against scikit-learn's own loader and against finite differences."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from shflnb import digits

datasets = pytest.importorskip("sklearn.datasets")


def test_reads_what_scikit_learn_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = datasets.load_digits(return_X_y=True)
    direct = digits._read_bundled()
    monkeypatch.setattr(Path, "is_file", lambda path: False)  # another layout of scikit-learn: its own loader is used
    for found in (direct, digits._read_bundled()):
        assert np.array_equal(found[0], images) and np.array_equal(found[1], labels)


def test_split_shares_no_image_and_loses_none() -> None:
    found = digits.load_digits(test_share=0.25, seed=4)
    assert found.x.shape == (64, 1348) and found.x_test.shape == (64, 449)
    every = np.concatenate([found.x, found.x_test], axis=1)
    assert every.dtype == np.float32 and every.min() == 0 and every.max() == 1
    images, labels = datasets.load_digits(return_X_y=True)
    assert np.array_equal(np.sort(every.sum(0)), np.sort((images.astype(np.float32) / 16).sum(1)))
    assert np.array_equal(np.bincount(np.concatenate([found.labels, found.labels_test])), np.bincount(labels))


def test_gradients_are_those_of_the_mean_cross_entropy() -> None:
    found = digits.load_digits()
    network = digits.Network.random([64, 12, 9, 10], seed=1)
    network.weights = [w.astype(np.float64) for w in network.weights]
    network.biases = [b + 0.1 for b in network.biases]
    picked = np.arange(7)

    def loss() -> float:
        logits = network.activations(found.x[:, picked])[-1].astype(np.float64)
        return float((np.log(np.exp(logits).sum(0)) - logits[found.labels[picked], picked]).mean())

    parameters = network.weights + network.biases
    rng = np.random.default_rng(2)
    for p, gradient in zip(parameters, network._gradients(found, picked), strict=True):
        assert gradient.shape == p.shape
        direction = rng.standard_normal(p.shape)
        before, step = p.copy(), 1e-4
        p[...] = before + step * direction
        above = loss()
        p[...] = before - step * direction
        below = loss()
        p[...] = before
        assert (above - below) / (2 * step) == pytest.approx(float((gradient * direction).sum()), rel=2e-2, abs=1e-4)


def test_training_with_a_mask_keeps_zeros_zero() -> None:
    found = digits.load_digits()
    network = digits.Network.random([64, 32, 32, 10], seed=0)
    mask = np.random.default_rng(0).random((32, 32)) < 0.25
    before = network.accuracy(found)
    network.train(found, epochs=6, seed=0, masks={1: mask})
    assert not network.weights[1][~mask].any()
    assert network.weights[1][mask].all()
    assert network.accuracy(found) > before + 0.3
    again = digits.Network.random([64, 32, 32, 10], seed=0)
    again.train(found, epochs=6, seed=0, masks={1: mask})
    assert np.array_equal(again.weights[1], network.weights[1])


def test_missing_scikit_learn_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(digits.MissingDependencyError, match=r"pip install 'shflnb\[demo\]'"):
        digits.load_digits()
