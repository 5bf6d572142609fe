"""`save` and `load`: a round trip for everything, one error for whatever is wrong, no allocation beyond the file."""

from __future__ import annotations

import json
import os
import stat
import tempfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import strategies
from formats import fuzz_io
from hypothesis import given, settings

from shflnb import errors
from shflnb.arrays import BFLOAT16
from shflnb.formats import ShflBWMatrix, load, pack, save

posix_only = pytest.mark.skipif(os.name != "posix", reason=f"needs POSIX file modes and pipes; found: {os.name}")

FIELDS = ("indptr", "indices", "values", "row_perm")


def small(dtype: str = "float16") -> ShflBWMatrix:
    return pack(strategies.make_patterned(40, 24, 16, dtype=dtype, density=0.4, seed=3).w, (16, 32))


def assert_equal(a: ShflBWMatrix, b: ShflBWMatrix) -> None:
    assert a.shape == b.shape and a.block == b.block and a.dtype == b.dtype
    for name in FIELDS:
        one, other = getattr(a, name), getattr(b, name)
        assert one.dtype == other.dtype and one.shape == other.shape
        np.testing.assert_array_equal(one.view(np.uint8), other.view(np.uint8))


def parts(path: Path) -> tuple[dict, bytes]:
    """Header and data of a file, read without our code."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write(path: Path, header: dict | str | bytes, data: bytes) -> None:
    text = json.dumps(header).encode() if isinstance(header, dict) else header
    text = text.encode() if isinstance(text, str) else text
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


class TestRoundTrip:
    @settings(max_examples=60)
    @given(strategies.packed_matrices())
    def test_every_matrix(self, packed: ShflBWMatrix) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "w.safetensors"
            save(packed, path)
            loaded = load(path)
        assert_equal(loaded, packed)
        for name in FIELDS:
            a = getattr(loaded, name)
            assert a.flags.aligned and a.flags.c_contiguous and a.flags.writeable

    @pytest.mark.parametrize("dtype", strategies.DTYPE_NAMES)
    def test_special_values_bit_for_bit(self, dtype: str, tmp_path: Path) -> None:
        packed = small(dtype)
        packed.values[0, :4] = [np.nan, np.inf, -np.inf, -0.0]
        save(packed, tmp_path / "w")
        assert_equal(load(str(tmp_path / "w")), packed)

    @pytest.mark.parametrize("dtype", strategies.DTYPE_NAMES)
    def test_safetensors_reads_it(self, dtype: str, tmp_path: Path) -> None:
        safetensors = pytest.importorskip("safetensors")
        packed = small(dtype)
        save(packed, tmp_path / "w")
        raw = (tmp_path / "w").read_bytes()
        tensors = dict(safetensors.deserialize(raw))
        assert set(tensors) == set(FIELDS)
        for name in FIELDS:
            a = getattr(packed, name)
            assert tuple(tensors[name]["shape"]) == a.shape and bytes(tensors[name]["data"]) == a.tobytes()
        names = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}
        assert tensors["values"]["dtype"] == names[dtype]

    def test_loads_what_safetensors_writes(self, tmp_path: Path) -> None:
        numpy_writer = pytest.importorskip("safetensors.numpy")
        packed = small("float32")
        metadata = {"format": "shflbw", "version": "1", "shape": "40,24", "block": "16,32", "made by": "a test"}
        numpy_writer.save_file({name: getattr(packed, name) for name in FIELDS}, tmp_path / "w", metadata)
        assert_equal(load(tmp_path / "w"), packed)

    def test_header(self, tmp_path: Path) -> None:
        """What docs/format.md says, so that a change of the file needs a new version."""
        save(small("bfloat16"), tmp_path / "w")
        header, data = parts(tmp_path / "w")
        assert header["__metadata__"] == {"format": "shflbw", "version": "1", "shape": "40,24", "block": "16,32"}
        assert list(header) == ["__metadata__", "indptr", "values", "indices", "row_perm"]
        assert [header[name]["dtype"] for name in FIELDS] == ["I64", "I32", "BF16", "I32"]
        assert len(data) == header["row_perm"]["data_offsets"][1]
        assert ((tmp_path / "w").stat().st_size - len(data)) % 64 == 0


class TestSave:
    def test_replaces_and_leaves_nothing_behind(self, tmp_path: Path) -> None:
        target = tmp_path / "w.safetensors"
        target.write_bytes(b"old")
        save(small(), target)
        assert os.listdir(tmp_path) == ["w.safetensors"]
        load(target)

    def test_a_failure_keeps_the_old_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        target = tmp_path / "w.safetensors"
        target.write_bytes(b"old")

        def refuse(*_: object) -> None:
            raise OSError("no")

        monkeypatch.setattr(os, "replace", refuse)
        with pytest.raises(OSError, match="no"):
            save(small(), target)
        assert os.listdir(tmp_path) == ["w.safetensors"] and target.read_bytes() == b"old"

    @posix_only
    def test_follows_links_and_the_umask(self, tmp_path: Path) -> None:
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "real" / "w")
        old = os.umask(0o027)
        try:
            save(small(), tmp_path / "link")
        finally:
            os.umask(old)
        assert (tmp_path / "link").is_symlink()
        assert stat.S_IMODE((tmp_path / "real" / "w").stat().st_mode) == 0o640

    def test_refuses_broken_matrices(self, tmp_path: Path) -> None:
        packed = small()
        packed.indices[0] = 1000
        with pytest.raises(errors.FormatError, match="holds column 1000"):
            save(packed, tmp_path / "w")
        assert os.listdir(tmp_path) == []

    def test_file_system_errors_come_through(self, tmp_path: Path) -> None:
        with pytest.raises(IsADirectoryError, match="is a directory; name a file in it"):
            save(small(), tmp_path)
        with pytest.raises(FileNotFoundError):
            save(small(), tmp_path / "none" / "w")


class TestLoadErrors:
    """Every kind of damage by itself; the text names the file and the fault."""

    def refuse(self, path: Path, text: str) -> None:
        with pytest.raises(errors.FormatError, match=text) as caught:
            load(path)
        assert str(caught.value).startswith(f"cannot load {path}: ") and len(str(caught.value)) < 500

    def test_no_file_and_directory(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            load(tmp_path / "none")
        with pytest.raises(IsADirectoryError):
            load(tmp_path)

    @posix_only
    def test_special_files_are_not_opened(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        self.refuse(tmp_path / "pipe", "no regular file")
        self.refuse(Path(os.devnull), "no regular file")

    @pytest.mark.parametrize(
        ("raw", "text"),
        [
            (b"", "the file has 0 bytes; a safetensors file has at least 8"),
            (b"1234567", "has 7 bytes"),
            (b"\xff" * 8, "header should have 18446744073709551615 bytes, but 0 follow; .* truncated"),
            ((2**40).to_bytes(8, "little") + b"{}", "should have 1099511627776 bytes, but 2 follow"),
            ((16_385).to_bytes(8, "little") + b" " * 16_385, "has 16385 bytes; expected at most 16384"),
            (bytes(8), "no JSON text"),
            ((2).to_bytes(8, "little") + b"[]", "JSON list; expected an object"),
            ((1).to_bytes(8, "little") + b"7", "JSON int; expected an object"),
            ((4).to_bytes(8, "little") + b"\xff\xfe{}", "no JSON text"),
            ((16_000).to_bytes(8, "little") + b"[" * 16_000, "nested too deeply"),
            ((15_000).to_bytes(8, "little") + b'{"a":' * 3_000, "nested too deeply"),
            ((16_000).to_bytes(8, "little") + b"9" * 16_000, "a number of 16000 digits"),
            ((5).to_bytes(8, "little") + b'{"a":NaN}', "no JSON text"),
            ((9).to_bytes(8, "little") + b'{"a":NaN}', "the number 'NaN'; expected whole numbers"),
            ((15).to_bytes(8, "little") + b'{"a":-Infinity}', "the number '-Infinity'"),
            ((11).to_bytes(8, "little") + b'{"a":1e999}', "the number '1e999'"),
            ((3).to_bytes(8, "little") + b"{}", "should have 3 bytes, but 2 follow"),
            ((26).to_bytes(8, "little") + b'{"a":18446744073709551616}', "a number of 20 digits; expected at most 19"),
            ((13).to_bytes(8, "little") + b'{"a":1,"a":2}', "the key 'a' twice"),
            ((2).to_bytes(8, "little") + b"{}", "has no __metadata__"),
        ],
    )
    def test_no_header(self, raw: bytes, text: str, tmp_path: Path) -> None:
        (tmp_path / "w").write_bytes(raw)
        self.refuse(tmp_path / "w", text)

    METADATA: ClassVar[dict[str, list[tuple[object, str]]]] = {
        "format": [(None, "format is missing; expected 'shflbw'"), ("pt", "format is 'pt'; expected 'shflbw'")],
        "version": [
            (None, "version is ''"),
            ("2", "version is 2; this shflnb reads versions up to 1; update shflnb"),
            ("0", "version is '0'; expected a number from 1"),
            ("1.0", "version is '1.0'"),
            ("٣", "version is"),
            ("9" * 5000, "version is '9999999999999999999999999999999999999...'"),
            (1, "no __metadata__ of strings"),
        ],
        "shape": [
            (None, "metadata shape is ''; expected two whole numbers"),
            ("40", "metadata shape is '40'"),
            ("-40,24", "metadata shape is '-40,24'"),
            ("40,24\n", "metadata shape"),
            ("9999999999,24", "expected sizes in 0..2147483647"),
            ("41,24", "row_perm has 40 entries; expected 41"),
            ("2147483647,24", "indptr has 4 entries; 2147483647 rows in groups of 16 need"),
            ("40,20", "expected columns from 0 to below 20"),
        ],
        "block": [
            (None, "metadata block is ''"),
            ("24,16", "is 24; expected one of"),
            ("32,32", "indptr has 4 entries; 40 rows in groups of 32 need 3"),
            ("0,0", "is 0; expected one of"),
        ],
    }

    @pytest.mark.parametrize(
        ("key", "value", "text"), [(key, value, text) for key, cases in METADATA.items() for value, text in cases]
    )
    def test_metadata(self, key: str, value: object, text: str, tmp_path: Path) -> None:
        save(small(), tmp_path / "w")
        header, data = parts(tmp_path / "w")
        if value is None:
            del header["__metadata__"][key]
        else:
            header["__metadata__"][key] = value
        write(tmp_path / "w", header, data)
        self.refuse(tmp_path / "w", text)

    TENSORS: ClassVar[dict[str, tuple[Callable[[dict], object], str]]] = {
        "missing": (lambda h: h.pop("indices"), "the tensor 'indices' is missing; expected indptr, values"),
        "unknown": (lambda h: h.update(more=h["indptr"]), "an unknown tensor 'more'"),
        "no entry": (lambda h: h.update(indptr=3), "entry of tensor 'indptr' must hold dtype, shape and data_offsets"),
        "no dtype": (lambda h: h["indptr"].pop("dtype"), "must hold dtype, shape and data_offsets"),
        "extra key": (lambda h: h["indptr"].update(strides=[8]), "must hold dtype, shape and data_offsets"),
        "wrong dtype": (lambda h: h["indptr"].update(dtype="I32"), "dtype of tensor 'indptr' is 'I32'; expected I64"),
        "value dtype": (lambda h: h["values"].update(dtype="F8_E4M3"), "is 'F8_E4M3'; expected F16 or BF16 or F32"),
        "dtype type": (lambda h: h["values"].update(dtype=[1]), "is a JSON list; expected F16"),
        "rank": (lambda h: h["indices"].update(shape=[2, 11]), "shape of tensor 'indices' must be 1 whole numbers"),
        "shape type": (lambda h: h["indices"].update(shape=[True]), "shape of tensor 'indices' must be"),
        "negative": (lambda h: h["indices"].update(shape=[-1]), "shape of tensor 'indices' must be"),
        "string": (lambda h: h["indices"].update(shape="22"), "shape of tensor 'indices' must be"),
        "offsets": (lambda h: h["indices"].update(data_offsets=[0]), "data_offsets of tensor 'indices' must be 2"),
        "huge": (lambda h: h["values"].update(shape=[2**50, 16]), "needs 36028797018963968 bytes, but its"),
        "too large": (lambda h: h["values"].update(shape=[2**62, 16]), "the shape .* of tensor 'values' is too large"),
        "small": (lambda h: h["row_perm"].update(shape=[39]), r"\[39\] and dtype I32 needs 156 bytes, .* hold 160"),
        "backwards": (lambda h: h["row_perm"]["data_offsets"].reverse(), "needs 160 bytes, but .* hold -160"),
        "overlap": (
            lambda h: h["row_perm"].update(data_offsets=[h["indices"]["data_offsets"][0]] * 2, shape=[0]),
            "after its header; it is truncated or has bytes too many",
        ),
        "shift": (
            lambda h: h["row_perm"].update(data_offsets=[at - 8 for at in h["row_perm"]["data_offsets"]]),
            "the tensor 'row_perm' begins at byte .* without gaps",
        ),
        "beyond": (
            lambda h: h["row_perm"].update(data_offsets=[at + 8 for at in h["row_perm"]["data_offsets"]]),
            "the tensor 'row_perm' begins at byte",
        ),
    }

    @pytest.mark.parametrize("case", TENSORS)
    def test_tensors(self, case: str, tmp_path: Path) -> None:
        change, text = self.TENSORS[case]
        save(small(), tmp_path / "w")
        header, data = parts(tmp_path / "w")
        change(header)
        write(tmp_path / "w", header, data)
        self.refuse(tmp_path / "w", text)

    @pytest.mark.parametrize("columns", [2**31, 2**62, 2**63 - 1])
    def test_no_elements_of_an_impossible_shape(self, columns: int, tmp_path: Path) -> None:
        """Found by `fuzz_io.py`: [0, 2**62] has no elements and needs no bytes, but NumPy cannot make it."""
        save(pack(np.zeros((16, 4), dtype=np.float16), (16, 16)), tmp_path / "w")
        header, data = parts(tmp_path / "w")
        header["values"]["shape"] = [0, columns]
        write(tmp_path / "w", header, data)
        self.refuse(tmp_path / "w", "is too large" if columns > 2**31 else "expected .*one row per kept column")

    def test_same_bytes_twice(self, tmp_path: Path) -> None:
        """Two tensors of equal size on the same bytes."""
        w = np.ones((16, 16), dtype=np.float16)
        save(pack(w, (16, 16)), tmp_path / "w")
        header, data = parts(tmp_path / "w")
        header["row_perm"]["data_offsets"] = header["indices"]["data_offsets"]
        write(tmp_path / "w", header, data)
        self.refuse(tmp_path / "w", "begins at byte 528 of the data; expected 592")

    @pytest.mark.parametrize(
        ("field", "change", "text"),
        [
            ("indptr", lambda a: a[::-1], "indptr runs from 22 to 0"),
            ("indptr", lambda a: np.array([0, 2**40, 5, a[-1]]), "indptr falls from 1099511627776 to 5"),
            ("indptr", lambda a: np.array([0, -5, 5, a[-1]]), "indptr falls from 0 to -5"),
            ("indices", lambda a: a + 100, "expected columns from 0 to below 24"),
            ("indices", lambda a: -a - 1, "expected columns from 0 to below 24"),
            ("indices", lambda a: np.sort(a)[::-1], "are not strictly increasing"),
            ("indices", lambda a: a * 0, "are not strictly increasing"),
            ("row_perm", lambda a: a * 0, "row_perm is not a permutation"),
            ("row_perm", lambda a: a + 1, "row_perm holds 40; expected rows in 0..39"),
            ("row_perm", lambda a: np.full_like(a, -(2**31)), "row_perm holds -2147483648"),
            ("values", lambda a: a * 0 + 1, "8 rows that the last group does not have must be zero"),
        ],
    )
    def test_contents(self, field: str, change: Callable, text: str, tmp_path: Path) -> None:
        packed = small()
        save(packed, tmp_path / "w")
        header, data = parts(tmp_path / "w")
        begin, end = header[field]["data_offsets"]
        a = getattr(packed, field)
        new = np.ascontiguousarray(change(a)).astype(a.dtype).tobytes()
        write(tmp_path / "w", header, data[:begin] + new + data[end:])
        self.refuse(tmp_path / "w", text)

    def test_every_truncation(self, tmp_path: Path) -> None:
        save(small(), tmp_path / "w")
        raw = (tmp_path / "w").read_bytes()
        for size in range(0, len(raw), 7):
            (tmp_path / "w").write_bytes(raw[:size])
            self.refuse(tmp_path / "w", "has|have|file")
        (tmp_path / "w").write_bytes(raw + b"\0")
        self.refuse(tmp_path / "w", "has bytes too many")

    def test_hostile_keys_are_escaped(self, tmp_path: Path) -> None:
        save(small(), tmp_path / "w")
        header, data = parts(tmp_path / "w")
        header["\x1b[31m" + "x" * 5000] = 1
        write(tmp_path / "w", header, data)
        self.refuse(tmp_path / "w", r"an unknown tensor '\\x1b\[31mxxx")

    def test_file_that_shrinks_meanwhile(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        save(small(), tmp_path / "w")
        real = (tmp_path / "w").stat()
        os.truncate(tmp_path / "w", real.st_size - 100)
        monkeypatch.setattr(os, "fstat", lambda _: real)
        self.refuse(tmp_path / "w", "the file ended after .* bytes; it changed while it was read")


class TestAllocation:
    def peak(self, path: Path) -> int:
        tracemalloc.start()
        try:
            load(path)
        except errors.FormatError:
            pass
        finally:
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
        return peak

    def test_a_load_takes_the_file_and_little_more(self, tmp_path: Path) -> None:
        w = strategies.make_patterned(2048, 4096, 16, dtype="bfloat16", density=0.2).w
        save(pack(w, (16, 16)), tmp_path / "w")
        assert w.dtype == BFLOAT16
        size = (tmp_path / "w").stat().st_size
        load(tmp_path / "w")
        assert size > 3_000_000
        assert self.peak(tmp_path / "w") <= size + 2048 + (1 << 20)

    def test_a_claim_takes_nothing(self, tmp_path: Path) -> None:
        """A header that claims 2**40 bytes, or 2**31 rows, in a file of 2 kB."""
        save(small(), tmp_path / "w")
        header, data = parts(tmp_path / "w")
        claims = [("values", [2**36, 16], 2**41), ("row_perm", [2**31 - 1], 2**33 - 4), ("indptr", [2**30], 2**33)]
        for name, shape, nbytes in claims:
            claim = json.loads(json.dumps(header))
            claim[name]["shape"] = shape
            claim[name]["data_offsets"] = [header[name]["data_offsets"][0], header[name]["data_offsets"][0] + nbytes]
            claim["__metadata__"]["shape"] = "2147483647,24"
            write(tmp_path / "w", claim, data)
            assert self.peak(tmp_path / "w") < 200_000

    @pytest.mark.parametrize("filler", ["[],", "{},", '"",', "[[[]]],", '{"":1},', "1,"])
    def test_a_full_header_takes_a_bounded_amount(self, filler: str, tmp_path: Path) -> None:
        body = '{"a":[' + filler * (16_300 // len(filler)) + "0]}"
        write(tmp_path / "w", body, b"")
        assert self.peak(tmp_path / "w") < fuzz_io.HEADER_LIMIT


def test_mutated_files() -> None:
    """A smaller run of `fuzz_io.py`: every mutant loads as a valid matrix or raises `FormatError`."""
    outcome = fuzz_io.fuzz(3_000, seed=20_261_122)
    assert outcome.failures == [], outcome.failures[0]
    assert outcome.refused + outcome.loaded == 3_000
    assert outcome.refused > 2_000 and outcome.loaded > 10, "the mutations have lost their bite"
