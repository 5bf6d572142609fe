"""`pack`: never loses a value, finds a pattern that is there, and groups the rest well."""

from __future__ import annotations

import importlib
import warnings

import numpy as np
import pytest
import scipy.sparse as sp
import strategies
from hypothesis import given, settings
from hypothesis import strategies as st

from shflnb import errors
from shflnb.arrays import BFLOAT16, DTYPES
from shflnb.formats import V_CHOICES, ShflBWMatrix, pack
from shflnb.formats.grouping import find_row_order, group_union, stored_places
from shflnb.formats.pack import support_bits


def assert_same_values(packed: ShflBWMatrix, w: np.ndarray) -> None:
    """Equal everywhere, NaN where NaN was; and the same bits, but for negative zeros."""
    packed.validate()
    dense = packed.to_dense()
    assert dense.dtype == w.dtype and dense.shape == w.shape
    np.testing.assert_array_equal(dense.astype(np.float64), np.asarray(w, dtype=np.float64))


def stored_by_counting(w: np.ndarray, v: int, order: np.ndarray) -> int:
    rows = [w[order[start : start + v]] for start in range(0, len(w), v)]
    return sum(int((group != 0).any(axis=0).sum()) * len(group) for group in rows)


class TestLossless:
    @given(strategies.scattered_matrices(), strategies.blocks())
    def test_scattered(self, w: np.ndarray, block: tuple[int, int]) -> None:
        assert_same_values(pack(w, block, fill_in_warning=None), w)

    @given(strategies.patterned_matrices())
    def test_patterned(self, made: strategies.Patterned) -> None:
        assert_same_values(pack(made.w, made.block, fill_in_warning=None), made.w)

    @given(strategies.scattered_matrices(largest=70), strategies.blocks(), strategies.seeds)
    def test_with_any_order(self, w: np.ndarray, block: tuple[int, int], seed: int) -> None:
        perm = np.random.default_rng(seed).permutation(len(w))
        packed = pack(w, block, row_perm=perm, fill_in_warning=None)
        np.testing.assert_array_equal(packed.row_perm, perm)
        assert_same_values(packed, w)
        assert packed.stored == stored_by_counting(w.astype(np.float64), block[0], perm)

    @given(strategies.scattered_matrices(largest=70), strategies.blocks(), strategies.seeds)
    def test_mask_stores_zeros_and_loses_nothing(self, w: np.ndarray, block: tuple[int, int], seed: int) -> None:
        mask = np.random.default_rng(seed).random(w.shape) < 0.05
        packed = pack(w, block, mask=mask, fill_in_warning=None)
        assert_same_values(packed, w)
        place = np.empty(len(w), dtype=int)
        place[packed.row_perm] = np.arange(len(w))
        for row, column in np.argwhere(mask):
            g = place[row] // block[0]
            assert column in packed.indices[packed.indptr[g] : packed.indptr[g + 1]]

    @pytest.mark.parametrize("dtype", strategies.DTYPE_NAMES)
    def test_special_values(self, dtype: str) -> None:
        w = np.zeros((20, 9), dtype=DTYPES[dtype])
        w[3, 1], w[4, 2], w[5, 3], w[6, 4] = np.nan, np.inf, -np.inf, -0.0
        smallest = {"float16": 2.0**-24, "bfloat16": 2.0**-133, "float32": 2.0**-149, "float64": 2.0**-1074}[dtype]
        w[7, 5] = smallest
        packed = pack(w, (16, 16), fill_in_warning=None)
        assert_same_values(packed, w)
        assert packed.nnz == 4 and float(packed.to_dense()[7, 5]) == smallest
        kept = set(packed.indices.tolist())
        assert kept == {1, 2, 3, 5}, "-0.0 is a zero"

    @pytest.mark.parametrize("m", [0, 1, 2, 3, 15, 16, 17, 127, 128, 129])
    @pytest.mark.parametrize("k", [0, 1, 3, 63, 64, 65])
    def test_odd_sizes(self, m: int, k: int) -> None:
        for density in (0.0, 0.3, 1.0):
            w = strategies.make_scattered(m, k, density=density, dtype="float16", seed=m * 1000 + k)
            for v in V_CHOICES:
                assert_same_values(pack(w, (v, 16), fill_in_warning=None), w)


class TestInputs:
    w = strategies.make_patterned(64, 40, 16, dtype="float32", seed=11).w

    def check(self, given_w: object, dtype: str = "float32") -> None:
        packed = pack(given_w, (16, 16))
        assert packed.dtype == dtype
        np.testing.assert_array_equal(packed.to_dense(), self.w.astype(DTYPES[dtype]))

    def test_strides(self) -> None:
        self.check(np.asfortranarray(self.w))
        self.check(np.repeat(self.w, 3, axis=1)[:, ::3])
        self.check(np.repeat(self.w, 2, axis=0)[::2])
        self.check(self.w[::-1, ::-1].copy()[::-1, ::-1])
        half = self.w.astype(np.float16)
        self.check(np.repeat(half, 3, axis=1)[:, ::3], "float16")
        self.check(np.asfortranarray(half), "float16")

    def test_byte_order_and_read_only(self) -> None:
        self.check(self.w.astype(">f4"))
        self.check(self.w.astype(">f2"), "float16")
        frozen = self.w.copy()
        frozen.flags.writeable = False
        self.check(frozen)

    def test_the_argument_is_not_kept(self) -> None:
        w = self.w.copy()
        packed = pack(w, (16, 16))
        perm = packed.row_perm.copy()
        again = pack(w, (16, 16), row_perm=perm)
        w[:] = 0
        perm[:] = 0
        np.testing.assert_array_equal(packed.to_dense(), self.w)
        np.testing.assert_array_equal(again.to_dense(), self.w)

    @pytest.mark.parametrize("dtype", strategies.DTYPE_NAMES)
    def test_torch(self, dtype: str) -> None:
        torch = pytest.importorskip("torch")
        t = torch.from_numpy(self.w).to(getattr(torch, dtype))
        self.check(t, dtype)
        self.check(t.t().contiguous().t(), dtype)
        self.check(torch.nn.Parameter(t), dtype)
        self.check(torch.repeat_interleave(t, 2, dim=1)[:, ::2], dtype)

    def test_torch_mask_and_order(self) -> None:
        torch = pytest.importorskip("torch")
        perm = torch.from_numpy(pack(self.w, (16, 16)).row_perm.copy())
        packed = pack(torch.from_numpy(self.w), (16, 16), row_perm=perm, mask=torch.from_numpy(self.w != 0))
        np.testing.assert_array_equal(packed.to_dense(), self.w)
        assert packed.fill_in == 1.0

    @pytest.mark.parametrize("format", ["csr", "csc", "coo", "lil", "dok", "dia", "bsr"])
    def test_scipy(self, format: str) -> None:
        a = sp.coo_array(self.w).asformat(format)
        self.check(a)
        self.check(a.astype(np.float64), "float64")
        packed = pack(a, (16, 16), mask=sp.csr_array(self.w != 0))
        np.testing.assert_array_equal(packed.to_dense(), self.w)

    def test_scipy_duplicates_and_explicit_zeros(self) -> None:
        a = sp.coo_array(([1.0, 2.0, 0.0, 3.0, -3.0], ([0, 0, 1, 2, 2], [1, 1, 0, 2, 2])), shape=(3, 4))
        packed = pack(a, (16, 16), fill_in_warning=None)
        assert packed.indices.tolist() == [1]
        np.testing.assert_array_equal(packed.to_dense(), a.toarray())
        csr = sp.csr_array((np.array([1.0, -1.0, 2.0, 5.0]), np.array([3, 3, 1, 1]), np.array([0, 4])), shape=(1, 4))
        packed = pack(csr, (16, 16))
        assert packed.indices.tolist() == [1] and packed.to_dense().tolist() == [[0.0, 7.0, 0.0, 0.0]]
        assert csr.nnz == 4, "the argument was changed"

    def test_sparse_in_bands(self, monkeypatch: pytest.MonkeyPatch) -> None:
        module = importlib.import_module("shflnb.formats.pack")  # the package's attribute `pack` is the function
        monkeypatch.setattr(module, "BAND_ELEMENTS", 100)
        self.check(sp.csr_array(self.w))
        self.check(self.w)

    @pytest.mark.parametrize(
        ("arguments", "error", "text"),
        [
            ({"dense_w": np.ones((4, 4), dtype=np.int64)}, errors.DtypeError, "dtype int64; expected one of float16"),
            ({"dense_w": np.ones((4, 4), dtype=bool)}, errors.DtypeError, "dtype bool"),
            ({"dense_w": np.ones((4, 4), dtype=complex)}, errors.DtypeError, "dtype complex128"),
            ({"dense_w": np.ones((4, 4), dtype=object)}, errors.DtypeError, "dtype object"),
            ({"dense_w": sp.csr_array(np.eye(4, dtype=np.int8))}, errors.DtypeError, "dtype int8"),
            ({"dense_w": [[1.0, 2.0]]}, errors.DtypeError, "is a list; expected a NumPy array, a torch tensor or"),
            ({"dense_w": np.ones(4)}, errors.ShapeError, r"shape \(4,\); expected two dimensions \(m, k\)"),
            ({"dense_w": np.ones((2, 3, 3, 3))}, errors.ShapeError, r"flatten convolution filters to \(f, r\*s\*c\)"),
            ({"block": (63, 64)}, errors.ArgumentError, r"is 63; expected one of \(16, 32, 64, 128\)"),
            ({"row_perm": [0, 1]}, errors.ShapeError, r"row_perm has shape \(2,\); expected \(4,\)"),
            ({"row_perm": [0, 1, 2, 2]}, errors.FormatError, "row 3 is missing"),
            ({"mask": np.ones((4, 4))}, errors.DtypeError, "mask has dtype float64; expected bool"),
            ({"mask": np.ones((4, 3), dtype=bool)}, errors.ShapeError, r"mask has shape \(4, 3\); expected .*\(4, 4\)"),
            ({"mask": "yes"}, errors.DtypeError, "mask is a str"),
        ],
    )
    def test_refusals(self, arguments: dict, error: type[Exception], text: str) -> None:
        with pytest.raises(error, match=text):
            pack(**{"dense_w": np.ones((4, 4)), **arguments})

    def test_sparse_torch_tensor(self) -> None:
        torch = pytest.importorskip("torch")
        with pytest.raises(errors.DtypeError, match=r"sparse torch tensor .*call \.to_dense\(\) first"):
            pack(torch.eye(4).to_sparse())


class TestRecovery:
    """A pattern that is present comes back with nothing stored but its values."""

    @given(strategies.patterned_matrices())
    def test_exact_pattern(self, made: strategies.Patterned) -> None:
        packed = pack(made.w, made.block)
        counted = sum(
            len(columns) * min(made.block[0], len(made.w) - made.block[0] * g) for g, columns in enumerate(made.columns)
        )
        assert packed.stored == packed.nnz == counted and packed.fill_in == 1.0

    @pytest.mark.parametrize("v", V_CHOICES)
    def test_groups_of_equal_support(self, v: int) -> None:
        """Several groups keep the same columns, others none; the last group is short."""
        rng = np.random.default_rng(v)
        choices = [np.array([1, 5, 9]), np.array([1, 5, 9]), np.array([0, 2]), np.zeros(0, dtype=int), np.array([5])]
        m = 4 * v + v // 2
        w = np.zeros((m, 12), dtype=np.float32)
        perm = rng.permutation(m)
        for g, columns in enumerate(choices):
            rows = perm[g * v : (g + 1) * v]
            w[np.ix_(rows, columns)] = 1 + rng.random((len(rows), len(columns)))
        packed = pack(w, (v, 16))
        assert packed.fill_in == 1.0
        assert sorted(packed.counts.tolist()) == [0, 1, 2, 3, 3] and packed.counts[-1] == 1, "the short group is last"
        np.testing.assert_array_equal(packed.to_dense(), w)

    @pytest.mark.parametrize("m", [256, 261, 320 - 1])
    @pytest.mark.parametrize("v", [16, 32, 64])
    @pytest.mark.parametrize("zeros", ["weights", "many weights", "rows", "both"])
    def test_pattern_with_accidental_zeros(self, m: int, v: int, zeros: str) -> None:
        """Weights or whole rows that happen to be zero do not hide the groups: no more is stored than was kept."""
        rng = np.random.default_rng(m + v)
        made = strategies.make_patterned(m, 256, v, seed=m * v, unequal=False)
        w = made.w
        places = sum(len(columns) * min(v, m - v * g) for g, columns in enumerate(made.columns))
        if zeros in ("weights", "both"):
            w[rng.random(w.shape) < 0.05] = 0
        if zeros == "many weights":
            w[rng.random(w.shape) < 0.4] = 0
        if zeros in ("rows", "both"):
            w[rng.choice(m, m // 10, replace=False)] = 0
        packed = pack(w, (v, 16), fill_in_warning=None)
        assert packed.stored <= places
        np.testing.assert_array_equal(packed.to_dense(), w)

    def test_given_order_is_kept_when_it_fits(self) -> None:
        made = strategies.make_patterned(100, 50, 16, shuffle=False)
        np.testing.assert_array_equal(pack(made.w, (16, 16)).row_perm, np.arange(100))

    def test_taller_pattern_fits_lower_groups(self) -> None:
        made = strategies.make_patterned(256, 64, 128, seed=2)
        for v in V_CHOICES:
            assert pack(made.w, (v, 16)).fill_in == 1.0


class TestGrouping:
    @settings(max_examples=50)
    @given(strategies.scattered_matrices(dtypes=("float32",)), st.sampled_from(V_CHOICES))
    def test_never_worse_than_the_given_order(self, w: np.ndarray, v: int) -> None:
        bits = support_bits(w)
        order = find_row_order(bits, v)
        assert order.dtype == np.int32 and sorted(order.tolist()) == list(range(len(w)))
        stored = stored_by_counting(w, v, order)
        assert stored <= stored_by_counting(w, v, np.arange(len(w)))
        assert stored == stored_places(bits, v, order)

    def test_the_given_order_may_be_best(self) -> None:
        """Four of five weights are missing, so rows of a group look like strangers; the order as given knows better."""
        made = strategies.make_patterned(256, 64, 32, shuffle=False, unequal=False, seed=1)
        w = made.w
        w[np.random.default_rng(1).random(w.shape) < 0.8] = 0
        np.testing.assert_array_equal(pack(w, (32, 16), fill_in_warning=None).row_perm, np.arange(256))

    def test_low_groups_inside_high_ones(self) -> None:
        """Groups of 16 packed at v = 32: pairs that share columns find each other."""
        rng = np.random.default_rng(0)
        w = np.zeros((256, 120), dtype=np.float32)
        perm = rng.permutation(256)
        for pair in range(8):
            common = rng.choice(120, 24, replace=False)
            for half, columns in enumerate((common[:20], common[4:])):
                rows = perm[32 * pair + 16 * half :][:16]
                w[np.ix_(rows, columns)] = 1
        assert pack(w, (32, 16)).stored == 256 * 24

    def test_outliers_do_not_spoil_the_pattern(self) -> None:
        made = strategies.make_patterned(512, 256, 32, density=0.2, unequal=False, seed=9)
        w = made.w
        w[7] = 1.0  # one full row: its group stores all columns, the others nothing new
        packed = pack(w, (32, 16), fill_in_warning=None)
        assert packed.stored <= 32 * 256 + 15 * 32 * 51 + 32 * 51

    def test_deterministic(self) -> None:
        w = strategies.make_scattered(300, 200, density=0.1, seed=4)
        first, second = (pack(w, (32, 16), fill_in_warning=None) for _ in range(2))
        np.testing.assert_array_equal(first.row_perm, second.row_perm)

    @pytest.mark.parametrize("budget", [0, 500, 5_000])
    def test_a_spent_budget_still_gives_an_order(self, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("shflnb.formats.grouping.SCAN_BUDGET", budget)
        monkeypatch.setattr("shflnb.formats.grouping.LONELY_SEEDS", 3)
        for m in (200, 211):
            w = strategies.make_patterned(m, 128, 32, seed=6).w
            w[np.random.default_rng(0).random(w.shape) < 0.1] = 0
            packed = pack(w, (32, 16), fill_in_warning=None)
            assert_same_values(packed, w)
            assert packed.stored <= stored_by_counting(w, 32, np.arange(m))

    @pytest.mark.parametrize("words", [1, 2, 5])
    def test_a_sketch_of_the_columns_is_enough(self, words: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Large matrices are clustered by some of their columns; what is stored is judged by all of them."""
        monkeypatch.setattr("shflnb.formats.grouping.SKETCH_WORDS", (words, words))
        made = strategies.make_patterned(192, 640, 32, density=0.3, unequal=False, seed=words)
        w = made.w
        w[np.random.default_rng(0).random(w.shape) < 0.02] = 0
        packed = pack(w, (32, 16), fill_in_warning=None)
        assert_same_values(packed, w)
        assert packed.stored <= 6 * 32 * 192

    def test_union_of_supports(self) -> None:
        w = strategies.make_scattered(50, 70, density=0.05, seed=1)
        union = np.unpackbits(group_union(support_bits(w), 16).view(np.uint8), axis=1, count=70).astype(bool)
        for g in range(4):
            np.testing.assert_array_equal(union[g], (w[16 * g : 16 * g + 16] != 0).any(axis=0))


class TestFillInWarning:
    def test_names_the_figure_and_the_next_step(self) -> None:
        w = np.zeros((16, 8), dtype=np.float32)
        w[:, 0] = 1
        w[0, 1:4] = 1
        with pytest.warns(errors.FillInWarning) as caught:
            packed = pack(w, (16, 16))
        text = str(caught[0].message)
        assert packed.fill_in == 64 / 19 and "3.37 times the 19 non-zeros" in text and "16 x 8" in text
        assert "shflnb.prune(w, sparsity=0.75, block=(16, 16)).pack()" in text and "fill_in_warning=None" in text
        assert caught[0].filename == __file__, "the warning points at the caller"

    @pytest.mark.parametrize(("limit", "warns"), [(3.36, True), (3.37, False), (None, False)])
    def test_limit(self, limit: float | None, warns: bool) -> None:
        w = np.zeros((16, 8), dtype=np.float32)
        w[:, 0] = 1
        w[0, 1:4] = 1
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            pack(w, (16, 16), fill_in_warning=limit)
        assert bool(caught) == warns

    def test_masked_zeros_are_wanted(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            packed = pack(np.zeros((16, 8), dtype=np.float32), (16, 16), mask=np.ones((16, 8), dtype=bool))
            assert packed.stored == 128
            pack(np.zeros((20, 8), dtype=np.float32), (16, 16))
            pack(np.zeros((0, 8), dtype=BFLOAT16), (16, 16))
