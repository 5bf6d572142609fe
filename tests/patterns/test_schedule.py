from __future__ import annotations

import numpy as np
import pytest

from shflnb.errors import ArgumentError, ShapeError
from shflnb.patterns import cubic_sparsity, prune, update_mask

W = np.random.default_rng(0).standard_normal((64, 96)).astype(np.float32)
BLOCK = (16, 16)


def test_cubic_sparsity() -> None:
    at = [cubic_sparsity(step, start=10, end=110, final=0.8, initial=0.2) for step in range(130)]
    assert at[0] == at[10] == pytest.approx(0.2) and at[110] == at[129] == pytest.approx(0.8)
    assert at[60] == pytest.approx(0.8 - 0.6 * 0.125)
    steps = np.diff(at[10:111])
    assert (steps > 0).all() and (np.diff(steps) < 0).all()
    with pytest.raises(ArgumentError, match="start < end"):
        cubic_sparsity(0, start=5, end=5, final=0.5)
    with pytest.raises(ArgumentError, match=r"final is 1\.2"):
        cubic_sparsity(0, start=0, end=5, final=1.2)


def test_the_same_weights_keep_the_same_mask() -> None:
    first = prune(W, block=BLOCK)
    for hysteresis in (0.0, 0.3):
        again = update_mask(W, first, sparsity=0.75, hysteresis=hysteresis)
        np.testing.assert_array_equal(again.mask, first.mask)
        np.testing.assert_array_equal(again.row_perm, first.row_perm)


def test_hysteresis_holds_the_mask_against_small_changes() -> None:
    first = prune(W, block=BLOCK, round_to_tile=False)
    moved = W + 0.2 * np.random.default_rng(1).standard_normal(W.shape).astype(np.float32)

    def changed(hysteresis: float) -> int:
        new = update_mask(moved, first, sparsity=0.75, hysteresis=hysteresis, regroup=None, round_to_tile=False)
        assert new.mask.sum() == first.mask.sum()
        return int((new.mask != first.mask).sum())

    flicker = [changed(h) for h in (0.0, 0.05, 0.2, 10.0)]
    assert flicker == sorted(flicker, reverse=True) and flicker[0] > flicker[2] and flicker[-1] == 0


def test_a_new_grouping_must_be_worth_it() -> None:
    first = prune(W, block=BLOCK)
    other = np.random.default_rng(5).standard_normal(W.shape).astype(np.float32)
    stay = update_mask(other, first, sparsity=0.75, regroup=0.9)
    np.testing.assert_array_equal(stay.row_perm, first.row_perm)
    assert stay.search == "kept groups"
    go = update_mask(other, first, sparsity=0.75, regroup=0.01)
    assert go.search == "refined" and go.retained > 1.01 * stay.retained


def test_the_sparsity_may_rise_and_torch_stays_torch() -> None:
    torch = pytest.importorskip("torch")
    w = torch.from_numpy(W)
    first = prune(w, sparsity=0.5, block=BLOCK)
    later = update_mask(w, first, sparsity=0.75, hysteresis=0.0)
    assert later.density == 0.25 and isinstance(later.mask, torch.Tensor)
    assert not bool((later.mask & ~first.mask).any())


def test_bad_arguments() -> None:
    first = prune(W, block=BLOCK, quality="fast")
    with pytest.raises(ArgumentError, match="negative"):
        update_mask(W, first, sparsity=0.75, hysteresis=-0.1)
    with pytest.raises(ShapeError, match="previous mask"):
        update_mask(W[:32], first, sparsity=0.75)
    with pytest.raises(ArgumentError, match="sparsity"):
        update_mask(W, first, sparsity=7)
