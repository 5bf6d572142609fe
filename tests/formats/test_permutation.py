"""Row permutations: the laws of a group, and the words of the refusals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shflnb import errors
from shflnb.formats import (
    apply_permutation,
    check_permutation,
    compose_permutations,
    identity_permutation,
    invert_permutation,
    undo_permutation,
)

permutations = (
    st.integers(0, 40).flatmap(lambda m: st.permutations(range(m))).map(lambda p: np.array(p, dtype=np.int32))
)
pairs = st.integers(0, 40).flatmap(lambda m: st.tuples(st.permutations(range(m)), st.permutations(range(m))))


@given(permutations)
def test_inverse_undoes(perm: np.ndarray) -> None:
    inverse = invert_permutation(perm)
    m = len(perm)
    assert all(inverse[perm[i]] == i for i in range(m))
    np.testing.assert_array_equal(compose_permutations(perm, inverse), identity_permutation(m))
    np.testing.assert_array_equal(compose_permutations(inverse, perm), identity_permutation(m))
    np.testing.assert_array_equal(invert_permutation(inverse), perm)


@given(permutations)
def test_apply_and_undo(perm: np.ndarray) -> None:
    rows = np.arange(3 * len(perm)).reshape(len(perm), 3)
    packed = apply_permutation(rows, perm)
    for i, original in enumerate(perm):
        np.testing.assert_array_equal(packed[i], rows[original])
    np.testing.assert_array_equal(undo_permutation(packed, perm), rows)
    np.testing.assert_array_equal(apply_permutation(packed, invert_permutation(perm)), rows)


@given(pairs)
def test_compose_applies_inner_first(pair: tuple[list[int], list[int]]) -> None:
    outer, inner = (np.array(p, dtype=np.int32) for p in pair)
    rows = np.arange(len(outer)) * 10
    composed = compose_permutations(outer, inner)
    np.testing.assert_array_equal(rows[composed], rows[inner][outer])
    both = compose_permutations(invert_permutation(inner), invert_permutation(outer))
    np.testing.assert_array_equal(both, invert_permutation(composed))


@given(permutations)
def test_check_accepts_every_integer_dtype(perm: np.ndarray) -> None:
    for dtype in (np.int64, np.uint8, np.int32):
        checked = check_permutation(perm.astype(dtype), len(perm))
        assert checked.dtype == np.int32 and checked.flags.c_contiguous
        np.testing.assert_array_equal(checked, perm)


@pytest.mark.parametrize(
    ("perm", "m", "error", "text"),
    [
        ([0, 1], 3, errors.ShapeError, r"row_perm has shape \(2,\); expected \(3,\)"),
        ([[0, 1]], 2, errors.ShapeError, r"expected \(2,\)"),
        ([0, 2], 2, errors.FormatError, r"row_perm holds 2; expected rows in 0\.\.1"),
        ([-1, 0], 2, errors.FormatError, r"row_perm holds -1"),
        ([0, 0, 2], 3, errors.FormatError, r"row 1 is missing"),
        ([0.0, 1.0], 2, errors.FormatError, r"dtype float64; expected integers"),
        ([True, False], 2, errors.FormatError, r"dtype bool; expected integers"),
    ],
)
def test_refusals(perm: list, m: int, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        check_permutation(np.array(perm), m)


def test_compose_refuses_other_lengths() -> None:
    with pytest.raises(errors.ShapeError, match="2 and 3 rows"):
        compose_permutations(np.arange(2), np.arange(3))
