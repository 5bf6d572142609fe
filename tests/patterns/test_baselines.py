"""The patterns to compare with, each against a slow and plain way of finding it."""

from __future__ import annotations

import numpy as np
import pytest

from shflnb.errors import ArgumentError, ShapeError
from shflnb.patterns import block_wise, n_m, n_m_in_vectors, prune, unstructured, vector_wise

S = np.random.default_rng(0).random((37, 50))


def test_unstructured_keeps_the_largest() -> None:
    mask, retained = unstructured(S, 0.7)
    assert mask.sum() == 555 and S[mask].min() >= S[~mask].max()
    assert retained == pytest.approx(S[mask].sum() / S.sum())
    assert unstructured(np.ones((4, 4)), 0.5).mask.sum() == 8
    assert unstructured(np.zeros((4, 4)), 0.5).retained == 1.0


@pytest.mark.parametrize("width", [1, 8])
def test_blocks_are_whole_and_the_best(width: int) -> None:
    s = S[:32, :48]
    mask, retained = block_wise(s, 0.75, v=8, width=width)
    blocks = mask.reshape(4, 8, 48 // width, width)
    kept = blocks.all(axis=(1, 3))
    np.testing.assert_array_equal(kept, blocks.any(axis=(1, 3)))
    sums = s.reshape(4, 8, 48 // width, width).sum(axis=(1, 3))
    assert kept.sum() == kept.size // 4 and sums[kept].min() >= sums[~kept].max()
    assert retained == pytest.approx(s[mask].sum() / s.sum())


def test_blocks_at_the_edges_count_by_their_size() -> None:
    mask, _ = block_wise(S, 0.5, v=16, width=16)
    assert mask.sum() <= 0.5 * S.size
    assert block_wise(S, 0.0, v=16).mask.all() and not block_wise(S, 1.0, v=16).mask.any()


def test_vector_wise_is_prune_without_the_shuffle() -> None:
    s = S[:32]
    ours, theirs = vector_wise(s, 0.75, v=16), prune(s, block=(16, 16), search="identity", round_to_tile=False)
    np.testing.assert_array_equal(ours.mask, theirs.mask)
    assert ours.retained == pytest.approx(theirs.retained)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 4)])
def test_n_of_m(n: int, m: int) -> None:
    mask, retained = n_m(S, n, m)
    for row, kept in zip(S, mask, strict=True):
        for start in range(0, 50, m):
            piece, some = row[start : start + m], kept[start : start + m]
            assert some.sum() == min(n, len(piece))
            assert piece[some].sum() == pytest.approx(np.sort(piece)[::-1][:n].sum())
    assert retained == pytest.approx(S[mask].sum() / S.sum())


def test_n_of_m_inside_kept_vectors() -> None:
    order = np.random.default_rng(1).permutation(37)
    mask, retained = n_m_in_vectors(S, 0.75, v=16, row_perm=order)
    for start in range(0, 37, 16):
        rows = order[start : start + 16]
        columns = np.flatnonzero(mask[rows].any(0))
        best = np.sort(np.argsort(-S[rows].sum(0))[:24])
        assert set(columns) <= set(best)
        np.testing.assert_array_equal(mask[np.ix_(rows, best)], n_m(S[np.ix_(rows, best)]).mask)
    assert retained < vector_wise(S, 0.5, v=16).retained


def test_a_finer_pattern_keeps_more() -> None:
    s = np.random.default_rng(2).random((64, 64)) ** 3
    kept = [
        unstructured(s, 0.75).retained,
        n_m(s, 1, 4).retained,
        vector_wise(s, 0.75, v=16).retained,
        block_wise(s, 0.75, v=16).retained,
    ]
    assert kept == sorted(kept, reverse=True)


def test_bad_arguments() -> None:
    with pytest.raises(ShapeError):
        unstructured(np.ones(4))
    with pytest.raises(ArgumentError, match="sparsity is 2"):
        unstructured(S, 2)
    with pytest.raises(ArgumentError, match="not finite"):
        unstructured(S * np.nan)
    with pytest.raises(ArgumentError, match="5:4"):
        n_m(S, 5, 4)
    with pytest.raises(ArgumentError, match=r"alone has 0\.5"):
        n_m_in_vectors(S, 0.25)
    with pytest.raises(ArgumentError, match="at least 1"):
        block_wise(S, v=0)
