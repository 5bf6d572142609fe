"""`save` and `load`: a packed matrix as one safetensors file.

Loading trusts nothing: the header is parsed here, with limits, and every size in it is compared with the size of the
file before anything is allocated; then the arrays are read and `validate(full=True)` looks at every index. No code in
a file is ever run. What a load allocates is at most the size of the file, one byte per row (the check of row_perm) and
1 MiB.

`docs/format.md` describes the file. Any safetensors reader can open it.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import stat
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from ..arrays import BFLOAT16
from ..errors import FormatError, ShflnbError
from .shflbw import ShflBWMatrix

__all__ = ["FORMAT_VERSION", "load", "save"]

FORMAT_NAME = "shflbw"
FORMAT_VERSION = 1
"""Version that `save` writes and the newest that `load` reads."""

MAX_HEADER_BYTES = 1 << 14
"""Our headers have about 450 bytes. The parser makes up to 37 bytes of each byte of a hostile one (measured)."""

_HEADER_ALIGN = 64
_LARGEST = np.iinfo(np.int64).max

_DTYPES = {
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "F16": np.dtype(np.float16),
    "BF16": BFLOAT16,
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
_TENSORS = {  # in the order in which they are written: every array starts at a multiple of its item size
    "indptr": ("I64",),
    "values": ("F16", "BF16", "F32", "F64"),
    "indices": ("I32",),
    "row_perm": ("I32",),
}
_RANKS = {"indptr": 1, "values": 2, "indices": 1, "row_perm": 1}


class _Tensor(NamedTuple):
    """A checked entry of the header; begin and end count bytes from the end of the header."""

    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def save(packed: ShflBWMatrix, path: str | os.PathLike[str]) -> None:
    """Write `packed` to `path` as safetensors, bit for bit; an existing file is replaced in one step or not at all.

    Parameters
    ----------
    packed : ShflBWMatrix
    path : str or path
        The file is written beside it under a temporary name first, then moved; a link is followed.

    Raises
    ------
    FormatError, ShapeError, DtypeError
        When `packed` breaks an invariant (its arrays were changed in place).
    OSError
        From the file system.

    Examples
    --------
    >>> import numpy as np, os, tempfile
    >>> from shflnb.formats import load, pack, save
    >>> packed = pack(np.eye(16, dtype=np.float16), block=(16, 16), fill_in_warning=None)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(packed, os.path.join(folder, "w.safetensors"))
    ...     again = load(os.path.join(folder, "w.safetensors"))
    >>> bool((again.values == packed.values).all())
    True
    """
    packed.validate(full=True)
    target = os.path.realpath(os.fspath(path))
    if os.path.isdir(target):
        raise IsADirectoryError(f"{target} is a directory; name a file in it")
    arrays = {name: getattr(packed, name) for name in _TENSORS}
    header = _make_header(packed, arrays)
    temporary = os.path.join(os.path.dirname(target), f".{os.path.basename(target)}.{secrets.token_hex(6)}.tmp")
    try:
        with open(temporary, "xb") as f:
            f.write(len(header).to_bytes(8, "little"))
            f.write(header)
            for a in arrays.values():
                f.write(a.reshape(-1).view(np.uint8).data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, target)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise


def load(path: str | os.PathLike[str]) -> ShflBWMatrix:
    """Read a matrix written by `save`.

    Raises
    ------
    FormatError
        When the file is damaged, hostile, of another format or of a newer version; the text names the file and the
        fault.
    OSError
        When there is no such file, it is a directory, or it cannot be read.
    """
    name = os.fspath(path)
    if not stat.S_ISREG(os.stat(name).st_mode) and not os.path.isdir(name):
        raise FormatError(f"cannot load {name}: it is no regular file; expected a safetensors file")
    with open(name, "rb") as f:
        try:
            return _read(f, os.fstat(f.fileno()).st_size)
        except ShflnbError as error:
            raise FormatError(f"cannot load {name}: {error}") from None


def _make_header(packed: ShflBWMatrix, arrays: dict[str, np.ndarray]) -> bytes:
    """The JSON header, padded with spaces so that the data starts at a multiple of 64 bytes."""
    metadata = {
        "format": FORMAT_NAME,
        "version": str(FORMAT_VERSION),
        "shape": f"{packed.shape[0]},{packed.shape[1]}",
        "block": f"{packed.block[0]},{packed.block[1]}",
    }
    header: dict[str, Any] = {"__metadata__": metadata}
    names = {dtype: name for name, dtype in _DTYPES.items()}
    offset = 0
    for name, a in arrays.items():
        header[name] = {"dtype": names[a.dtype], "shape": list(a.shape), "data_offsets": [offset, offset + a.nbytes]}
        offset += a.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-(8 + len(text)) % _HEADER_ALIGN)


def _read(f: BinaryIO, size: int) -> ShflBWMatrix:
    """Check the header against the size of the file, then read and check the arrays."""
    header_size = _header_size(f, size)
    header = _parse_json(_read_exactly(f, header_size).tobytes())
    shape, block = _check_metadata(header.pop("__metadata__", None))
    tensors = _check_tensors(header, size - 8 - header_size)
    arrays = {}
    for name, t in tensors.items():
        f.seek(8 + header_size + t.begin)
        arrays[name] = _read_exactly(f, t.end - t.begin).view(t.dtype).reshape(t.shape)
    return ShflBWMatrix(shape, block, **arrays)


def _header_size(f: BinaryIO, size: int) -> int:
    if size < 8:
        raise FormatError(f"the file has {size} bytes; a safetensors file has at least 8")
    header_size = int.from_bytes(_read_exactly(f, 8).tobytes(), "little")
    if header_size > size - 8:
        raise FormatError(f"the header should have {header_size} bytes, but {size - 8} follow; the file is truncated "
                          f"or is no safetensors file")  # fmt: skip
    if header_size > MAX_HEADER_BYTES:
        raise FormatError(f"the header has {header_size} bytes; expected at most {MAX_HEADER_BYTES}")
    return header_size


def _read_exactly(f: BinaryIO, count: int) -> np.ndarray:
    """The next `count` bytes as uint8; the caller has compared `count` with the size of the file."""
    out = np.empty(count, dtype=np.uint8)
    view, got = out.data, 0
    while got < count:
        more = f.readinto(view[got:])  # type: ignore[attr-defined]
        if not more:
            raise FormatError(f"the file ended after {got} of {count} bytes; it changed while it was read")
        got += more
    return out


def _parse_json(raw: bytes) -> dict[str, Any]:
    """The header as a dict of what a header may hold: no duplicate keys, no floats, no numbers beyond int64."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(items)
        if len(out) != len(items):
            twice = next(key for i, (key, _) in enumerate(items) if key in dict(items[:i]))
            raise FormatError(f"the header holds the key {_quote(twice)} twice")
        return out

    def no_number(text: str) -> None:
        raise FormatError(f"the header holds the number {_quote(text)}; expected whole numbers only")

    def whole_number(text: str) -> int:
        if len(text) > 19:
            raise FormatError(f"the header holds a number of {len(text)} digits; expected at most 19")
        return int(text)

    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=pairs, parse_float=no_number,
                            parse_constant=no_number, parse_int=whole_number)  # fmt: skip
    except RecursionError:
        raise FormatError("the header is nested too deeply") from None
    except ValueError as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"the header is no JSON text: {error}") from None
    if not isinstance(header, dict):
        raise FormatError(f"the header is a JSON {type(header).__name__}; expected an object")
    return header


def _quote(text: str) -> str:
    """Text of a file for a message: escaped, and not longer than a line."""
    return ascii(text if len(text) <= 40 else text[:37] + "...")


def _check_metadata(metadata: Any) -> tuple[tuple[int, int], tuple[int, int]]:
    """`(shape, block)` from a header's metadata."""
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError("the header has no __metadata__ of strings; was the file written by shflnb.save?")
    if metadata.get("format") != FORMAT_NAME:
        given = _quote(metadata["format"]) if "format" in metadata else "missing"
        raise FormatError(f"the format is {given}; expected '{FORMAT_NAME}'; was the file written by shflnb.save?")
    version = metadata.get("version", "")
    if not re.fullmatch(r"[1-9][0-9]{0,8}", version, re.ASCII):
        raise FormatError(f"the format version is {_quote(version)}; expected a number from 1 to {FORMAT_VERSION}")
    if int(version) > FORMAT_VERSION:
        raise FormatError(f"the format version is {version}; this shflnb reads versions up to {FORMAT_VERSION}; "
                          f"update shflnb")  # fmt: skip
    shape = _pair(metadata, "shape")
    block = _pair(metadata, "block")
    return shape, block


def _pair(metadata: dict[str, str], name: str) -> tuple[int, int]:
    text = metadata.get(name, "")
    match = re.fullmatch(r"([0-9]{1,10}),([0-9]{1,10})", text, re.ASCII)
    if match is None:
        raise FormatError(f"the metadata {name} is {_quote(text)}; expected two whole numbers such as '64,64'")
    return int(match[1]), int(match[2])


def _check_tensors(header: dict[str, Any], data_size: int) -> dict[str, _Tensor]:
    """The entries of the header, which must be exactly our arrays, side by side from 0 to `data_size`."""
    missing = [name for name in _TENSORS if name not in header]
    if missing:
        raise FormatError(f"the tensor {missing[0]!r} is missing; expected {', '.join(_TENSORS)}")
    unknown = [name for name in header if name not in _TENSORS]
    if unknown:
        raise FormatError(f"there is an unknown tensor {_quote(unknown[0])}; expected {', '.join(_TENSORS)}")
    tensors = {name: _check_tensor(name, header[name]) for name in _TENSORS}
    at = 0
    for name, t in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if t.begin != at:
            raise FormatError(f"the tensor {name!r} begins at byte {t.begin} of the data; expected {at}, without gaps "
                              f"and overlaps")  # fmt: skip
        at = t.end
    if at != data_size:
        raise FormatError(f"the tensors take {at} bytes, but the file holds {data_size} after its header; it is "
                          f"truncated or has bytes too many")  # fmt: skip
    return tensors


def _check_tensor(name: str, entry: Any) -> _Tensor:
    """One entry: its keys, their types, and its size against its offsets."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"the entry of tensor {name!r} must hold dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in _TENSORS[name]:
        given = _quote(dtype) if isinstance(dtype, str) else f"a JSON {type(dtype).__name__}"
        raise FormatError(f"the dtype of tensor {name!r} is {given}; expected {' or '.join(_TENSORS[name])}")
    for what, numbers, length in (("shape", shape, _RANKS[name]), ("data_offsets", offsets, 2)):
        if not isinstance(numbers, list) or len(numbers) != length or not all(_is_size(number) for number in numbers):
            raise FormatError(f"the {what} of tensor {name!r} must be {length} whole numbers from 0 on")
    begin, end = offsets
    itemsize = _DTYPES[dtype].itemsize
    if math.prod(max(number, 1) for number in shape) * itemsize > _LARGEST:  # NumPy takes no [0, 2**62] either
        raise FormatError(f"the shape {shape} of tensor {name!r} is too large")
    needed = math.prod(shape) * itemsize
    if end - begin != needed:
        raise FormatError(f"the tensor {name!r} of shape {shape} and dtype {dtype} needs {needed} bytes, but its "
                          f"data_offsets {offsets} hold {end - begin}")  # fmt: skip
    return _Tensor(_DTYPES[dtype], tuple(shape), begin, end)


def _is_size(number: Any) -> bool:
    return type(number) is int and number >= 0  # a JSON true is a bool, not a size
