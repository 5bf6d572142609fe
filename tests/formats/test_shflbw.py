"""`ShflBWMatrix`: what it says about itself, what it refuses, and its conversions."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import re
import threading

import numpy as np
import pytest
import scipy.sparse as sp
import strategies
from hypothesis import given

from shflnb import errors
from shflnb.arrays import BFLOAT16, DTYPES
from shflnb.formats import ShflBWMatrix, check_block, pack


def dense_by_loops(packed: ShflBWMatrix) -> np.ndarray:
    """The definition of the format, place by place."""
    m, k = packed.shape
    v = packed.block[0]
    out = np.zeros((m, k), dtype=packed.values.dtype)
    for g in range(len(packed.indptr) - 1):
        for j in range(packed.indptr[g], packed.indptr[g + 1]):
            for r in range(v):
                if g * v + r < m:
                    out[packed.row_perm[g * v + r], packed.indices[j]] = packed.values[j, r]
    return out


def small(dtype: str = "float32", m: int = 40, k: int = 24, v: int = 16) -> ShflBWMatrix:
    return pack(strategies.make_patterned(m, k, v, dtype=dtype, density=0.4, seed=3).w, (v, 16))


@given(strategies.packed_matrices(largest=70))
def test_to_dense_is_the_definition(packed: ShflBWMatrix) -> None:
    np.testing.assert_array_equal(packed.to_dense().view(np.uint8), dense_by_loops(packed).view(np.uint8))


@given(strategies.packed_matrices(largest=70))
def test_figures_by_counting(packed: ShflBWMatrix) -> None:
    m, k = packed.shape
    v = packed.block[0]
    stored = sum(
        int(packed.indptr[g + 1] - packed.indptr[g]) * min(v, m - g * v) for g in range(len(packed.indptr) - 1)
    )
    nnz = int((packed.to_dense().astype(np.float64) != 0).sum())
    assert (packed.stored, packed.nnz) == (stored, nnz)
    assert packed.groups == len(packed.indptr) - 1 == -(-m // v)
    assert packed.counts.tolist() == [b - a for a, b in zip(packed.indptr[:-1], packed.indptr[1:], strict=True)]
    assert packed.density == (stored / (m * k) if m * k else 0.0)
    assert packed.fill_in == (stored / nnz if nnz else 1.0)
    arrays = (packed.values, packed.indices, packed.indptr, packed.row_perm)
    assert packed.nbytes == sum(a.size * a.itemsize for a in arrays)


def test_fill_in_of_stored_zeros_only() -> None:
    kept = np.zeros((16, 4), dtype=bool)
    kept[0, 2] = True
    packed = pack(np.zeros((16, 4), dtype=np.float32), (16, 16), mask=kept, fill_in_warning=None)
    assert packed.stored == 16 and packed.nnz == 0 and packed.fill_in == float("inf")


def test_repr_says_what_matters() -> None:
    packed = pack(strategies.make_patterned(128, 64, 64, dtype="float16", unequal=False).w, (64, 32))
    assert repr(packed) == (
        "<ShflBWMatrix 128 x 64 float16, block (64, 32): 2 groups keeping 16 columns, density 0.25, fill-in 1, "
        "4.76 kB (dense 16.4 kB)>"
    )
    assert "keeping" in repr(small()) and ".." in repr(small())
    assert "0 groups keeping 0 columns" in repr(pack(np.zeros((0, 5), dtype=np.float32)))


class TestValidate:
    def broken(self, **changes: object) -> dict:
        packed = small()
        fields = {f.name: getattr(packed, f.name) for f in dataclasses.fields(packed) if f.init}
        return {**fields, **changes}

    @pytest.mark.parametrize(
        ("field", "change", "error", "text"),
        [
            ("indptr", lambda a: a.astype(np.int32), errors.DtypeError, "indptr has dtype int32; expected int64"),
            ("indices", lambda a: a.astype(np.int64), errors.DtypeError, "indices has dtype int64; expected int32"),
            ("row_perm", lambda a: a.tolist(), errors.DtypeError, "row_perm is a list; expected a NumPy array"),
            ("values", lambda a: a.astype(np.int16), errors.DtypeError, "values is int16; expected"),
            ("values", lambda a: a.astype(">f4"), errors.DtypeError, "values is >f4; expected"),
            ("indptr", lambda a: a[:-1], errors.ShapeError, "indptr has 3 entries; 40 rows in groups of 16 need 4"),
            ("indices", lambda a: np.repeat(a, 2)[::2], errors.ShapeError, "expected one contiguous dimension"),
            ("indptr", lambda a: a + 1, errors.FormatError, "indptr runs from 1 to"),
            ("indptr", lambda a: np.array([0, 5, 3, a[-1]]), errors.FormatError, "indptr falls from 5 to 3 at group 1"),
            ("values", lambda a: a[:-1].copy(), errors.ShapeError, "one row per kept column"),
            ("values", np.asfortranarray, errors.ShapeError, "expected C order"),
            ("values", lambda a: a + 1, errors.FormatError, "8 rows that the last group does not have must be zero"),
            ("indices", lambda a: a - 1 - a.min(), errors.FormatError, "holds column -1; expected columns from 0 to"),
            ("indices", lambda a: a + 24 - a.max(), errors.FormatError, "holds column 24; expected .* below 24"),
            ("row_perm", lambda a: a[:-1], errors.ShapeError, "row_perm has 39 entries; expected 40"),
            ("row_perm", lambda a: np.zeros_like(a), errors.FormatError, "not a permutation: row 1 is missing"),
            ("shape", lambda a: (40,), errors.ShapeError, "expected a pair"),
            ("shape", lambda a: (40, 2**31), errors.ShapeError, "expected sizes in 0..2147483647"),
            ("shape", lambda a: (40, -1), errors.ShapeError, "expected sizes in 0..2147483647"),
            ("block", lambda a: (24, 16), errors.ArgumentError, r"block\[0\] .* is 24; expected one of \(16, 32"),
            ("block", lambda a: (16, 48), errors.ArgumentError, r"block\[1\] .* is 48; expected one of \(16, 32, 64\)"),
            ("block", lambda a: 64, errors.ArgumentError, r"block is 64; expected a pair \(v, tile_k\)"),
        ],
    )
    def test_names_what_is_broken(self, field: str, change: object, error: type[Exception], text: str) -> None:
        given_value = getattr(small(), field)
        with pytest.raises(error, match=text):
            ShflBWMatrix(**self.broken(**{field: change(given_value)}))

    def test_unsorted_and_repeated_columns(self) -> None:
        packed = small()
        g = int(np.argmax(packed.counts))
        at = int(packed.indptr[g]) + 1
        for replacement in (packed.indices[at - 1], packed.indices[at - 1] - 1):
            indices = packed.indices.copy()
            indices[at] = max(replacement, 0)
            with pytest.raises(errors.FormatError, match=f"group {g} are not strictly increasing"):
                dataclasses.replace(packed, indices=indices)

    def test_pieces_of_the_check_meet(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The index check looks at pieces: each fault is found, whatever the size of a piece, and nothing else."""
        packed = pack(strategies.make_patterned(64, 40, 16, density=0.5, seed=5).w, (16, 16))
        for piece in (1, 2, 3, 7):
            monkeypatch.setattr("shflnb.formats.shflbw.CHECKED_AT_ONCE", piece * 16)
            packed.validate()
            for at in range(1, len(packed.indices)):
                if at in packed.indptr:
                    continue
                indices = packed.indices.copy()
                indices[at] = indices[at - 1]
                with pytest.raises(errors.FormatError, match="not strictly increasing"):
                    dataclasses.replace(packed, indices=indices)

    def test_quick_check_skips_the_contents(self) -> None:
        packed = small()
        packed.indices[0] = 99
        packed.validate(full=False)
        with pytest.raises(errors.FormatError, match="holds column 99"):
            packed.validate()

    def test_columns_of_a_matrix_without_columns(self) -> None:
        with pytest.raises(errors.FormatError, match="expected columns from 0 to below 0"):
            ShflBWMatrix(
                (1, 0), (16, 16), np.array([0, 1]), np.zeros(1, np.int32), np.zeros((1, 16), np.float32),
                np.zeros(1, np.int32),
            )  # fmt: skip

    def test_takes_ints_of_any_kind(self) -> None:
        packed = ShflBWMatrix(**self.broken(shape=[np.int64(40), np.int32(24)], block=[np.int64(16), 16]))
        assert packed.shape == (40, 24) and packed.block == (16, 16) and type(packed.shape[0]) is int


def test_check_block() -> None:
    assert check_block((64, 32)) == (64, 32)
    with pytest.raises(errors.ArgumentError, match=re.escape("expected a pair (v, tile_k) such as (64, 64)")):
        check_block("none")


class TestCopies:
    def test_launch_cache_stays_behind(self) -> None:
        packed = small("bfloat16")
        packed.launch_cache["device 0"] = threading.Lock()  # cannot be pickled, as a kernel cannot
        for other in (pickle.loads(pickle.dumps(packed)), copy.copy(packed), copy.deepcopy(packed)):
            assert other.launch_cache == {}
            other.validate()
            assert other.dtype == "bfloat16" and other.shape == packed.shape and other.block == packed.block
            np.testing.assert_array_equal(other.to_dense(), packed.to_dense())
        assert list(packed.launch_cache) == ["device 0"]

    def test_frozen(self) -> None:
        with pytest.raises(dataclasses.FrozenInstanceError):
            small().shape = (1, 1)  # type: ignore[misc]


class TestAstype:
    @pytest.mark.parametrize("source", strategies.DTYPE_NAMES)
    @pytest.mark.parametrize("target", strategies.DTYPE_NAMES)
    def test_every_pair(self, source: str, target: str) -> None:
        packed = small(source)
        cast = packed.astype(target)
        assert cast.dtype == target
        np.testing.assert_array_equal(cast.to_dense(), packed.to_dense().astype(DTYPES[target]))
        assert (cast is packed) == (source == target)

    def test_names_of_frameworks(self) -> None:
        torch = pytest.importorskip("torch")
        assert small().astype(torch.bfloat16).dtype == "bfloat16"
        assert small().astype(np.float64).dtype == "float64"
        assert small().astype(BFLOAT16).dtype == "bfloat16"
        for wrong in ("int8", np.int32, torch.int8, "nonsense", None.__class__):
            with pytest.raises(errors.DtypeError, match="is not a weight dtype; expected one of float16, bfloat16"):
                small().astype(wrong)

    def test_overflow_is_inf_without_a_warning(self) -> None:
        packed = pack(np.full((16, 1), 1e6, dtype=np.float32), (16, 16))
        assert np.isinf(packed.astype("float16").values).all()


class TestSciPy:
    @given(strategies.packed_matrices(largest=70))
    def test_csr_has_the_original_order(self, packed: ShflBWMatrix) -> None:
        csr = packed.to_scipy("csr")
        assert csr.format == "csr" and csr.shape == packed.shape
        assert csr.dtype == ("float64" if packed.dtype == "float64" else "float32")
        np.testing.assert_array_equal(csr.toarray(), packed.to_dense().astype(csr.dtype))
        assert csr.nnz == packed.nnz

    @given(strategies.packed_matrices(dtypes=("float32", "float64"), largest=70))
    def test_bsr_and_back_is_the_same_matrix(self, packed: ShflBWMatrix) -> None:
        bsr = packed.to_scipy("bsr")
        m, k = packed.shape
        assert bsr.format == "bsr" and bsr.blocksize == (packed.v, 1) and bsr.shape == (packed.groups * packed.v, k)
        np.testing.assert_array_equal(bsr.toarray()[:m], packed.to_dense()[packed.row_perm])
        assert not bsr.toarray()[m:].any()
        again = ShflBWMatrix.from_scipy(bsr, packed.block, row_perm=packed.row_perm)
        for name in ("indptr", "indices", "values", "row_perm"):
            np.testing.assert_array_equal(getattr(again, name), getattr(packed, name))
        assert again.shape == packed.shape and again.block == packed.block

    def test_the_copy_is_a_copy(self) -> None:
        packed = small()
        before = packed.to_dense()
        packed.to_scipy("bsr").data[:] = 7
        packed.to_scipy("csr").data[:] = 7
        np.testing.assert_array_equal(packed.to_dense(), before)

    @pytest.mark.parametrize("format", ["csr", "csc", "coo", "lil", "dia", "bsr"])
    @pytest.mark.parametrize("make", [sp.csr_array, sp.csr_matrix])
    def test_from_every_format(self, format: str, make: type) -> None:
        w = strategies.make_patterned(48, 20, 16, dtype="float64").w
        packed = ShflBWMatrix.from_scipy(make(w).asformat(format), (16, 16))
        np.testing.assert_array_equal(packed.to_dense(), w)
        assert packed.fill_in == 1.0

    def test_bsr_of_another_height_is_packed(self) -> None:
        w = strategies.make_patterned(64, 20, 16, shuffle=False).w
        packed = ShflBWMatrix.from_scipy(sp.bsr_array(w, blocksize=(32, 1)), (16, 16))
        np.testing.assert_array_equal(packed.to_dense(), w)

    def test_unsorted_and_duplicate_blocks(self) -> None:
        data = np.arange(1, 49, dtype=np.float32).reshape(3, 16, 1)
        bsr = sp.bsr_array((data, np.array([5, 2, 5]), np.array([0, 3])), shape=(16, 8))
        packed = ShflBWMatrix.from_scipy(bsr, (16, 16))
        assert packed.indices.tolist() == [2, 5]
        np.testing.assert_array_equal(packed.to_dense(), bsr.toarray())
        assert bsr.indices.tolist() == [5, 2, 5], "the argument was changed"

    def test_refusals(self) -> None:
        packed = small()
        bsr = packed.to_scipy("bsr")
        with pytest.raises(errors.ArgumentError, match="format is 'coo'; expected 'csr' or 'bsr'"):
            packed.to_scipy("coo")
        with pytest.raises(errors.DtypeError, match="expected a SciPy sparse array, got ndarray"):
            ShflBWMatrix.from_scipy(packed.to_dense(), (16, 16))
        with pytest.raises(errors.DtypeError, match="bsr array has dtype int64"):
            ShflBWMatrix.from_scipy(bsr.astype(np.int64), (16, 16))
        with pytest.raises(errors.ShapeError, match="48 packed rows in groups of 16 need 33 to 48 entries"):
            ShflBWMatrix.from_scipy(bsr, (16, 16), row_perm=np.arange(32))
        with pytest.raises(errors.FormatError, match="the last 15 rows of the bsr array are not zero"):
            ShflBWMatrix.from_scipy(bsr, (16, 16), row_perm=np.arange(33))
        with pytest.raises(errors.FormatError, match="not a permutation"):
            ShflBWMatrix.from_scipy(bsr, (16, 16), row_perm=np.zeros(40, dtype=int))


def test_numpy_leaves_the_operator_alone() -> None:
    with pytest.raises(TypeError, match="unsupported operand"):
        np.ones((3, 40), dtype=np.float32) @ small()
