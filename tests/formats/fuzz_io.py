"""Mutate saved files and load them: each loads as a valid matrix or raises `FormatError`, within its allocation limit.

Run by pytest with a few thousand mutants, and by hand with as many as you like:

    python tests/formats/fuzz_io.py --count 100000 --seed 1
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import random
import re
import struct
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import strategies  # on the path only from here on when this runs as a program

from shflnb.errors import FormatError
from shflnb.formats import ShflBWMatrix, load, pack, save

HEADER_LIMIT = 1 << 20
"""Bytes that parsing a header of the largest allowed size may take."""

SECONDS_PER_LOAD = 20.0
"""A load that takes longer counts as a hang."""

INTERESTING = (
    "0", "-1", "1", "15", "16", "64", "255", "65536", "2147483647", "2147483648", "4294967296", "9223372036854775807",
    "9223372036854775808", "18446744073709551616", "1" * 30, "1e3", "1e999", "NaN", "-Infinity", "true", "null", '""',
    "[]", "{}", '"I32"', '"BF16"', '"F64"', "[[0]]", '{"a":0}', '"\\ud800"', '"\\u0000"', "0.5", "00",
    "- 1", "[" * 3000,
)  # fmt: skip


NO_HEADER_LEFT = (
    ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, RecursionError, MemoryError,
    struct.error,
)  # fmt: skip
"""What a mutation may raise when the one before it has wrecked the header."""


def allowed_bytes(size: int, header_size: int) -> int:
    """What loading a file of `size` bytes may allocate: the file, a byte per row, and the parsed header."""
    return size + size // 4 + 48 * min(header_size, 1 << 14) + (128 << 10)


@dataclass
class Outcome:
    """What a run saw."""

    loaded: int = 0
    refused: int = 0
    slowest: float = 0.0
    largest_excess: int = 0
    messages: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)


def originals() -> list[bytes]:
    """Valid files of all dtypes: short last groups, empty groups, no rows, no columns, larger ones."""
    cases = [(40, 24, 16, 0.4), (64, 33, 32, 0.2), (130, 70, 64, 0.5), (16, 5, 16, 1.0), (5, 0, 16, 1.0),
             (0, 9, 16, 1.0), (33, 12, 16, 0.05), (300, 200, 128, 0.3)]  # fmt: skip
    files = []
    with tempfile.TemporaryDirectory() as folder:
        for i, (m, k, v, density) in enumerate(cases):
            dtype = strategies.DTYPE_NAMES[i % 4]
            made = strategies.make_patterned(m, k, v, density=density, dtype=dtype, seed=i)
            save(pack(made.w, made.block), Path(folder) / "w")
            files.append((Path(folder) / "w").read_bytes())
    return files


def split(raw: bytes) -> tuple[bytes, bytes]:
    """Header text and data, as far as the length says so."""
    length = min(int.from_bytes(raw[:8], "little"), len(raw))
    return raw[8 : 8 + length], raw[8 + length :]


def join(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def flip_bits(raw: bytes, rng: random.Random, _: list[bytes]) -> bytes:
    out = bytearray(raw)
    for _i in range(rng.choice((1, 1, 2, 8, 64))):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def flip_header_bits(raw: bytes, rng: random.Random, _: list[bytes]) -> bytes:
    out = bytearray(raw)
    out[rng.randrange(8 + len(split(raw)[0]))] ^= 1 << rng.randrange(8)
    return bytes(out)


def truncate(raw: bytes, rng: random.Random, _: list[bytes]) -> bytes:
    return raw[: rng.randrange(len(raw))]


def extend(raw: bytes, rng: random.Random, _: list[bytes]) -> bytes:
    return raw + rng.randbytes(rng.randrange(1, 300))


def splice(raw: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    """The start of one file and the end of another, or a piece moved within."""
    other = rng.choice([*others, raw])
    return raw[: rng.randrange(len(raw))] + other[rng.randrange(len(other)) :]


def swap_data(raw: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    """One file's header before another's data."""
    return join(split(raw)[0], split(rng.choice(others))[1])


def set_length(raw: bytes, rng: random.Random, _: list[bytes]) -> bytes:
    length = int.from_bytes(raw[:8], "little") + rng.choice((-64, -2, -1, 1, 2, 64, 1 << 16, 1 << 31, 1 << 40, 1 << 63))
    return (length % (1 << 64)).to_bytes(8, "little") + raw[8:]


def replace_token(raw: bytes, rng: random.Random, _: list[bytes]) -> bytes:
    """A number, string or keyword of the header becomes something else."""
    header, data = split(raw)
    text = header.decode()
    for _i in range(rng.choice((1, 1, 2))):
        tokens = list(re.finditer(r'-?\d+|"[^"]*"', text))
        if not tokens:
            break
        token = rng.choice(tokens)
        new = rng.choice((*INTERESTING, *(t.group() for t in tokens)))
        if token.group().isdigit() and rng.random() < 0.5:
            new = str(max(0, int(token.group()) + rng.choice((-16, -8, -1, 1, 2, 8, 16))))
        if token.group().startswith('"') and rng.random() < 0.3:
            new = json.dumps(rng.choice(("1,1", "16,16", "0,0", "128,64", "2147483647,2147483647", "x" * 50, "2")))
        text = text[: token.start()] + new + text[token.end() :]
    return join(text.encode(errors="replace"), data)


def duplicate_key(raw: bytes, rng: random.Random, _: list[bytes]) -> bytes:
    """A member of the header's object a second time, with the same or another name."""
    header, data = split(raw)
    members = [f"{json.dumps(name)}:{json.dumps(value)}" for name, value in json.loads(header).items()]
    again = rng.choice(members)
    if rng.random() < 0.5:
        again = json.dumps("tensor" + str(rng.randrange(9))) + ":" + again.partition(":")[2]
    members.insert(rng.randrange(len(members) + 1), again)
    return join(("{" + ",".join(members) + "}").encode(), data)


def edit_entries(raw: bytes, rng: random.Random, _: list[bytes]) -> bytes:
    """Move offsets and shapes about in ways that keep the JSON well formed."""
    text, data = split(raw)
    header = json.loads(text)
    names = [name for name in header if name != "__metadata__"]
    one, other = rng.choice(names), rng.choice(names)
    kind = rng.randrange(5)
    if kind == 0:
        header[one]["data_offsets"], header[other]["data_offsets"] = (
            header[other]["data_offsets"],
            header[one]["data_offsets"],
        )
    elif kind == 1:
        header[one] = header[other]
    elif kind == 2:
        del header[one]
    elif kind == 3:
        shift = rng.choice((-8, -4, 4, 8, 1 << 40))
        header[one]["data_offsets"] = [offset + shift for offset in header[one]["data_offsets"]]
    else:
        scale = rng.choice((0, 2, 1 << 20, 1 << 60))
        header[one]["shape"][0] *= scale
        begin, end = header[one]["data_offsets"]
        header[one]["data_offsets"][1] = begin + (end - begin) * scale
    return join(json.dumps(header).encode(), data)


def edit_numbers(raw: bytes, rng: random.Random, _: list[bytes]) -> bytes:
    """Integers in the data: a wrong index, a pointer that falls, a row named twice."""
    text, data = split(raw)
    header = json.loads(text)
    name = rng.choice(("indptr", "indices", "row_perm"))
    begin, end = header[name]["data_offsets"]
    wide = name == "indptr"
    width = 8 if wide else 4
    count = (end - begin) // width
    if count == 0:
        return raw
    out = bytearray(data)
    for _i in range(rng.choice((1, 1, 2))):
        at = begin + width * rng.randrange(count)
        old = struct.unpack_from("<q" if wide else "<i", out, at)[0]
        limit = (1 << 63) - 1 if wide else (1 << 31) - 1
        new = rng.choice((old + 1, old - 1, 0, -1, limit, -limit - 1, rng.randrange(300)))
        struct.pack_into("<q" if wide else "<i", out, at, max(-limit - 1, min(limit, new)))
    return join(text, bytes(out))


MUTATIONS: tuple[Callable[[bytes, random.Random, list[bytes]], bytes], ...] = (
    flip_bits, flip_header_bits, truncate, extend, splice, swap_data, set_length, replace_token, replace_token,
    duplicate_key, edit_entries, edit_numbers,
)  # fmt: skip


def load_one(path: str, raw: bytes, outcome: Outcome, what: str) -> None:
    """Load one mutant and hold it to the rules."""
    with open(path, "wb") as f:
        f.write(raw)
    tracemalloc.reset_peak()
    before, _ = tracemalloc.get_traced_memory()
    started = time.perf_counter()
    packed = None
    try:
        packed = load(path)
    except FormatError as error:
        outcome.refused += 1
        kind = re.sub(r"'[^']*'|0x\w+|-?\d+", "#", str(error).removeprefix(f"cannot load {path}: "))[:60]
        outcome.messages[kind] = outcome.messages.get(kind, 0) + 1
        if path not in str(error) or len(str(error)) > 600:
            outcome.failures.append(f"{what}: the message does not name the path or is too long: {error!s:.200}")
    except Exception as error:  # noqa: BLE001  (any other error is what this program looks for)
        outcome.failures.append(f"{what}: {type(error).__name__}: {error!s:.300}")
    seconds = time.perf_counter() - started
    peak = tracemalloc.get_traced_memory()[1] - before
    limit = allowed_bytes(len(raw), len(split(raw)[0]))
    outcome.slowest = max(outcome.slowest, seconds)
    outcome.largest_excess = max(outcome.largest_excess, peak - len(raw))
    if peak > limit:
        outcome.failures.append(f"{what}: {peak} bytes allocated for a file of {len(raw)}; the limit is {limit}")
    if seconds > SECONDS_PER_LOAD:
        outcome.failures.append(f"{what}: took {seconds:.1f} s")
    if packed is not None:
        outcome.loaded += 1
        check_loaded(packed, outcome, what)


def check_loaded(packed: ShflBWMatrix, outcome: Outcome, what: str) -> None:
    """A mutant that loads must be safe to use: every index in range, by plain NumPy, not by `validate`."""
    m, k = packed.shape
    v = packed.block[0]
    fine = (
        packed.indptr[0] == 0
        and packed.indptr[-1] == len(packed.indices) == len(packed.values)
        and (np.diff(packed.indptr) >= 0).all()
        and len(packed.indptr) == -(-m // v) + 1
        and packed.values.shape[1] == v
        and ((packed.indices >= 0) & (packed.indices < k)).all()
        and np.array_equal(np.sort(packed.row_perm), np.arange(m))
    )
    if not fine:
        outcome.failures.append(f"{what}: loaded, but breaks the format")


def fuzz(count: int, seed: int) -> Outcome:
    """Load `count` mutants; the same seed gives the same mutants."""
    rng = random.Random(seed)
    files = originals()
    outcome = Outcome()
    was_tracing = tracemalloc.is_tracing()
    tracemalloc.start()
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "mutant.safetensors")
            for i in range(count):
                faulthandler.dump_traceback_later(2 * SECONDS_PER_LOAD, exit=True)
                raw = rng.choice(files)
                mutations = [rng.choice(MUTATIONS) for _ in range(rng.choice((1, 1, 1, 2)))]
                try:
                    for mutate in mutations:
                        raw = mutate(raw, rng, files)
                except NO_HEADER_LEFT:
                    pass  # the second mutation found no header left to mutate; the mutant of the first will do
                names = ", ".join(mutate.__name__ for mutate in mutations)
                load_one(path, raw, outcome, f"mutant {i} of seed {seed} ({names})")
    finally:
        faulthandler.cancel_dump_traceback_later()
        if not was_tracing:
            tracemalloc.stop()
    return outcome


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    started = time.perf_counter()
    outcome = fuzz(arguments.count, arguments.seed)
    for kind, times in sorted(outcome.messages.items(), key=lambda item: -item[1]):
        print(f"{times:8d}  {kind}")
    for failure in outcome.failures[:20]:
        print("FAILED", failure)
    print(
        f"{arguments.count} mutants in {time.perf_counter() - started:.1f} s: {outcome.refused} refused, "
        f"{outcome.loaded} loaded as valid, {len(outcome.failures)} failures; slowest load {outcome.slowest * 1e3:.1f} "
        f"ms, at most {outcome.largest_excess} bytes allocated beyond the size of a file"
    )
    return 1 if outcome.failures else 0


if __name__ == "__main__":
    sys.exit(main())
