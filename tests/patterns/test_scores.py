from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from shflnb.errors import ArgumentError, DtypeError, ShapeError
from shflnb.patterns import input_norm, score_matrix

W = np.array([[1.0, -2.0, 3.0], [-4.0, 0.5, -0.25]])


def test_named_scores() -> None:
    norm, grad = np.array([1.0, 2.0, 0.0]), np.array([[1.0, -1.0, 2.0], [0.5, 0.0, 4.0]])
    np.testing.assert_array_equal(score_matrix(W), [[1, 2, 3], [4, 0.5, 0.25]])
    np.testing.assert_array_equal(score_matrix(W, "squared"), [[1, 4, 9], [16, 0.25, 0.0625]])
    np.testing.assert_array_equal(score_matrix(W, "activation", norm=norm), [[1, 4, 0], [4, 1, 0]])
    np.testing.assert_array_equal(score_matrix(W, "gradient", grad=grad), [[1, 2, 6], [2, 0, 1]])


def test_callable_and_array_scores() -> None:
    np.testing.assert_array_equal(score_matrix(W, lambda w: abs(w) ** 3), abs(W) ** 3)
    np.testing.assert_array_equal(score_matrix(W, abs(W) + 1), abs(W) + 1)
    mine = np.array([[-0.0, 1.0, 2.0], [0.0, 1.0, 2.0]], dtype=np.float32)
    s = score_matrix(W, mine)
    assert not np.signbit(s).any() and not np.shares_memory(s, mine)


def test_activation_from_calibration_data_of_any_rank() -> None:
    inputs = np.random.default_rng(0).standard_normal((4, 5, 3))
    expected = np.sqrt((inputs.reshape(20, 3) ** 2).sum(0))
    np.testing.assert_allclose(input_norm(inputs), expected, rtol=1e-6)
    np.testing.assert_allclose(score_matrix(W, "activation", inputs=inputs), abs(W) * expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
def test_every_dtype_and_order_becomes_float32_rows(dtype: type) -> None:
    s = score_matrix(np.asfortranarray(W.astype(dtype)))
    assert s.dtype == np.float32 and s.flags.c_contiguous
    np.testing.assert_array_equal(s, abs(W))


def test_torch_weights_of_every_dtype() -> None:
    torch = pytest.importorskip("torch")
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        s = score_matrix(torch.tensor(W, dtype=dtype, requires_grad=True).T.contiguous().T)
        assert isinstance(s, np.ndarray)
        np.testing.assert_array_equal(s, abs(W))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_the_first_value_that_is_not_finite_is_named(bad: float) -> None:
    w = np.ones((5, 7))
    w[3, 4] = w[4, 0] = bad
    with pytest.raises(ArgumentError, match=r"w\[3, 4\] is -?(nan|inf) \(2 such values\)"):
        score_matrix(w)


def test_a_score_that_is_not_finite_is_named_as_such() -> None:
    with pytest.raises(ArgumentError, match=r"score\[0, 1\] is inf"):
        score_matrix(W, np.array([[1, np.inf, 1], [1, 1, 1]]))


def test_finite_values_whose_sum_overflows_are_no_error() -> None:
    s = score_matrix(np.full((4, 4), 3e38, dtype=np.float32))
    assert np.isfinite(s).all()


def test_bad_operands_are_refused() -> None:
    with pytest.raises(ArgumentError, match="negative"):
        score_matrix(W, W)
    with pytest.raises(ArgumentError, match="needed is one of magnitude"):
        score_matrix(W, "size")
    with pytest.raises(ArgumentError, match="norm="):
        score_matrix(W, "activation")
    with pytest.raises(ArgumentError, match="grad="):
        score_matrix(W, "gradient")
    with pytest.raises(ShapeError, match=r"norm has shape \(2,\); w needs \(3,\)"):
        score_matrix(W, "activation", norm=np.ones(2))
    with pytest.raises(ShapeError, match="grad has shape"):
        score_matrix(W, "gradient", grad=np.ones((2, 2)))
    with pytest.raises(ShapeError, match="flatten filters"):
        score_matrix(np.ones((2, 3, 4)))
    with pytest.raises(DtypeError, match="int64"):
        score_matrix(np.ones((2, 3), dtype=np.int64))
    with pytest.raises(ShapeError, match="calibration"):
        input_norm(np.ones(3))
