"""Runs the PTX of a kernel without a GPU: slow, exact about what it models, and hostile about time.

    machine = Machine()
    x_at, out_at = machine.upload(x), machine.reserve(out.nbytes)
    machine.run(Program(ptx), grid=3, threads=384, smem=200_000, args=[x_at, out_at, n])
    y = machine.download(out_at, out.nbytes)

Modelled: the integer, float and predicate instructions that Numba emits for shflnb, divergence (of a warp's lanes the
ones that are furthest behind run), shared and global memory byte by byte with bounds, alignment and never-written
bytes, barriers, mbarriers, clusters, cp.async, bulk copies, ldmatrix, stmatrix, mma.sync and wgmma with their layouts.

Time is hostile: warps run in random order for random spells. Copies land at a random moment between their start and the
wait that covers them; what wgmma reads from shared memory must be the same when it is issued and when it is waited for.
A kernel that forgets a wait gives wrong results for some seed; one whose warps wait for each other ends in
`DeadlockError`.

Not modelled: the proxy fences, the visibility of writes between blocks (every write is seen at once), registers, time.
Layouts and meanings: PTX ISA 9, sections on the instructions named.
"""

from __future__ import annotations

import functools
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

LANES = 32
GENERIC_SHARED = 1 << 40  # where generic addresses of shared memory begin
RANK_SHIFT = 24  # bits of a shared address above which stands the rank of the block in its cluster, as on the device
DTYPES = {"pred": np.bool_, "b16": np.uint16, "b32": np.uint32, "f32": np.float32, "b64": np.uint64}
CLASS_OF = {"pred": "pred", "f32": "f32", **{k + b: "b" + b for k in "bus" for b in ("16", "32", "64")}}
KINDS = {"u16": np.uint16, "s16": np.int16, "b16": np.uint16, "u32": np.uint32, "s32": np.int32, "b32": np.uint32,
         "u64": np.uint64, "s64": np.int64, "b64": np.uint64, "f32": np.float32, "pred": np.bool_}  # fmt: skip
STAY = "stay"


class PtxError(AssertionError):
    """The kernel did what PTX does not allow, or what the emulator does not know."""


class DeadlockError(PtxError):
    """Every warp waits."""


# --- text ------------------------------------------------------------------------------------------------------------
@dataclass
class Statement:
    guard: tuple[str, bool] | None
    op: list[str]
    args: list[str]
    text: str


def _statements(body: str) -> list[str]:
    """Statements and "label:" entries of a function body; registers of inner scopes get names of their own."""
    found: list[str] = []
    scopes: list[dict[str, str]] = []
    at, scope_number = 0, 0
    label = re.compile(r"\s*([$A-Za-z_][\w$]*)\s*:(?!:)")
    while at < len(body):
        rest = body[at:].lstrip()
        at = len(body) - len(rest)
        if not rest:
            break
        if rest[0] == "{":
            scopes.append({})
            scope_number += 1
            at += 1
        elif rest[0] == "}":
            scopes.pop()
            at += 1
        elif (match := label.match(rest)) is not None:
            found.append(match[1] + ":")
            at += match.end()
        else:
            end = body.index(";", at)
            text = " ".join(body[at:end].split())
            at = end + 1
            if scopes and text.startswith(".reg"):
                kind, names = text.split(None, 2)[1:]
                for name in names.replace(",", " ").split():
                    scopes[-1][name] = f"%s{scope_number}_{name}"
                text = f".reg {kind} " + ", ".join(scopes[-1][name] for name in names.replace(",", " ").split())
            else:
                for scope in reversed(scopes):
                    for name, unique in scope.items():
                        text = re.sub(rf"(?<![\w%$.]){re.escape(name)}(?![\w$.:])", unique, text)
            found.append(text)
    return found


def _split(text: str) -> list[str]:
    """Operands, not split inside braces and brackets."""
    parts, depth, now = [], 0, ""
    for char in text:
        depth += (char in "{[") - (char in "}]")
        if char == "," and depth == 0:
            parts.append(now.strip())
            now = ""
        else:
            now += char
    return [*parts, now.strip()] if now.strip() else parts


class Program:
    """A kernel's PTX, ready to run."""

    def __init__(self, ptx: str) -> None:
        ptx = re.sub(r"//[^\n]*", "", ptx)
        match = re.search(r"\.entry\s+([\w$]+)\s*\((.*?)\)(.*?)\{", ptx, re.DOTALL)
        if match is None:
            raise PtxError("no kernel in this text")
        self.name = match[1]
        self.params = {name: i for i, name in enumerate(re.findall(r"\.param\s+\.\w+\s+([\w$]+)", match[2]))}
        body = ptx[match.end() : ptx.rindex("}")]
        self.registers: dict[str, tuple[str, int]] = {}
        self.counts = dict.fromkeys(DTYPES, 0)
        self.labels: dict[str, int] = {}
        self.shared: dict[str, int] = {}
        self.static_bytes = 0
        for head in re.findall(r"\.shared[^;]*", ptx):
            self._declare_shared(head)
        self.code: list[Statement] = []
        for text in _statements(body):
            if text.endswith(":") and " " not in text:
                self.labels[text[:-1]] = len(self.code)
            elif text.startswith(".reg"):
                self._declare(text)
            elif not text.startswith("."):
                self.code.append(self._statement(text))
        self.steps = [self._build(s) for s in self.code]

    def _declare_shared(self, text: str) -> None:
        match = re.search(r"\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d*)\]", text)
        if match is None or match[2] in self.shared:
            return
        align = max(int(match[1]), 16) if match[3] else 1024
        self.static_bytes = -(-self.static_bytes // align) * align
        self.shared[match[2]] = self.static_bytes
        self.static_bytes += int(match[3] or 0)

    def _declare(self, text: str) -> None:
        kind, names = text.split(None, 2)[1:]
        cls = CLASS_OF[kind[1:]]
        for name in _split(names):
            match = re.fullmatch(r"(%\w+)<(\d+)>", name)
            each = [f"{match[1]}{i}" for i in range(int(match[2]))] if match else [name]
            for one in each:
                self.registers[one] = (cls, self.counts[cls])
                self.counts[cls] += 1

    def _statement(self, text: str) -> Statement:
        guard = None
        match = re.match(r"@(!?)(\S+)\s+(.*)", text)
        body = text
        if match:
            guard, body = (match[2], match[1] == "!"), match[3]
        op, _, args = body.partition(" ")
        return Statement(guard, op.split("."), _split(args), text)

    # --- operands ----------------------------------------------------------------------------------------------------
    def read(self, arg: str, kind: str) -> Callable[[Warp], np.ndarray]:
        """The values of an operand in all lanes, as a dtype of the register's own size."""
        dtype = np.dtype(KINDS[kind])
        if arg in self.registers:
            cls, i = self.registers[arg]
            if np.dtype(DTYPES[cls]) == dtype:
                return lambda w: w.files[cls][i]
            return lambda w: w.files[cls][i].view(dtype)
        if arg.startswith("%"):
            return lambda w: w.special[arg]
        if arg in self.shared:
            place = self.shared[arg]
            return lambda w: np.full(LANES, place | w.block.rank << RANK_SHIFT, dtype)
        if arg.startswith("0f"):
            value: Any = struct.unpack(">f", bytes.fromhex(arg[2:]))[0]
            return _constant(np.full(LANES, value, np.float32).view(dtype))
        number = int(arg.rstrip("U"), 0)
        if dtype == np.bool_:
            return _constant(np.full(LANES, number != 0))
        bits = number & ((1 << (8 * dtype.itemsize)) - 1)
        return _constant(np.full(LANES, bits, np.dtype(f"u{dtype.itemsize}")).view(dtype))

    def write(self, arg: str) -> Callable[[Warp, np.ndarray | None, np.ndarray], None]:
        """Put values of the register's own size into the active lanes of a register."""
        if arg == "_":
            return lambda w, m, value: None
        cls, i = self.registers[arg]
        dtype = np.dtype(DTYPES[cls])

        def put(w: Warp, m: np.ndarray | None, value: np.ndarray) -> None:
            if value.dtype != dtype:
                value = value.view(dtype) if value.dtype.itemsize == dtype.itemsize else value.astype(dtype)
            if m is None:
                w.files[cls][i][:] = value
            else:
                np.copyto(w.files[cls][i], value, where=m)

        return put

    def address(self, arg: str, kind: str) -> Callable[[Warp], np.ndarray]:
        """The addresses of an operand in brackets, as int64."""
        base, _, offset = arg.strip("[]").partition("+")
        more = int(offset, 0) if offset else 0
        get = self.read(base.strip(), kind)
        return lambda w: get(w).astype(np.int64) + more

    # --- instructions ------------------------------------------------------------------------------------------------
    def _build(self, s: Statement) -> tuple[str, Any, Any]:
        """(what kind of step, guard, action) of a statement."""
        guard = None
        if s.guard is not None:
            get, negated = self.read(s.guard[0], "pred"), s.guard[1]
            guard = (lambda w: ~get(w)) if negated else get
        if s.op[0] == "bra":
            return "bra", guard, self.labels[s.args[0]]
        if s.op[0] in ("ret", "exit"):
            return "ret", guard, None
        try:
            return "do", guard, _action(self, s)
        except PtxError:
            raise
        except (KeyError, ValueError, IndexError) as error:
            raise PtxError(f"the emulator does not know: {s.text} ({error!r})") from error


def _constant(value: np.ndarray) -> Callable[[Any], np.ndarray]:
    return lambda w: value


@functools.cache
def _steps(count: int) -> np.ndarray:
    return np.arange(count)


# --- machine ---------------------------------------------------------------------------------------------------------
class Memory:
    """Bytes with bounds, alignment and a record of what was ever written."""

    def __init__(self, name: str, base: int, size: int, *, is_open: bool) -> None:
        self.name, self.base = name, base
        self.data = np.full(size, 0xCB, np.uint8)
        self.open = None if is_open else np.zeros(size, bool)  # None: all of it
        self.written = np.zeros(size, bool)
        self.unwritten_reads = 0

    def _places(self, addresses: np.ndarray, count: int, what: str) -> np.ndarray:
        at = addresses - self.base
        if len(at) == 0:
            return at[:, None] + _steps(count)
        if at.min() < 0 or at.max() + count > self.data.size:
            bad = addresses[(at < 0) | (at + count > self.data.size)][0]
            raise PtxError(f"{what} of {count} bytes at {bad:#x}, outside {self.name} memory")
        if count > 1 and np.bitwise_or.reduce(at % count):
            raise PtxError(f"{what} of {count} bytes at {addresses[at % count != 0][0]:#x} is misaligned")
        places = at[:, None] + _steps(count)
        if self.open is not None and not self.open[places].all():
            bad = addresses[~self.open[places].all(1)][0]
            raise PtxError(f"{what} of {count} bytes at {bad:#x} leaves its array in {self.name} memory")
        return places

    def load(self, addresses: np.ndarray, count: int) -> np.ndarray:
        """uint8, shape (addresses, count)."""
        places = self._places(addresses, count, "load")
        self.unwritten_reads += int((~self.written[places]).any())
        return self.data[places]

    def store(self, addresses: np.ndarray, values: np.ndarray) -> None:
        """Store rows of bytes; two lanes must not store different values to one place."""
        places = self._places(addresses, values.shape[1], "store")
        self.data[places] = values
        if not (self.data[places] == values).all():
            raise PtxError(f"two lanes store different values to one address of {self.name} memory")
        self.written[places] = True


@dataclass
class Mbarrier:
    """One mbarrier object."""

    count: int
    pending: int
    phase: int = 0
    bytes: int = 0

    def arrive(self, times: int = 1, expect: int = 0) -> None:
        self.bytes += expect
        self.pending -= times
        if self.pending < 0:
            raise PtxError("more arrivals at an mbarrier than its count")
        self.settle()

    def complete(self, done: int) -> None:
        self.bytes -= done
        self.settle()

    def settle(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.phase += 1
            self.pending = self.count


@dataclass
class Rendezvous:
    """A barrier of warps: named, or of a cluster."""

    arrived: int = 0
    generation: int = 0

    def arrive(self, need: int) -> None:
        self.arrived += 1
        if self.arrived > need:
            raise PtxError("more warps at a barrier than it is for")
        if self.arrived == need:
            self.arrived, self.generation = 0, self.generation + 1


@dataclass
class Block:
    shared: Memory
    cluster: Cluster
    warps: int
    rank: int = 0
    members: list[Warp] = field(default_factory=list)
    barriers: dict[int, Rendezvous] = field(default_factory=dict)
    mbarriers: dict[int, Mbarrier] = field(default_factory=dict)

    @property
    def is_running(self) -> bool:
        """Whether a warp has not ended; a block's shared memory is its own until then."""
        return any(w.groups for w in self.members)

    def mbarrier(self, at: int) -> Mbarrier:
        if at not in self.mbarriers:
            raise PtxError(f"no mbarrier was set up at shared address {at}")
        return self.mbarriers[at]


@dataclass
class Cluster:
    blocks: list[Block] = field(default_factory=list)
    barrier: Rendezvous = field(default_factory=Rendezvous)


_SPARE: dict[int, list[np.ndarray]] = {}  # registers of launches that are over, by size: fresh memory costs page faults
_MOST_SPARE = 512


def _take_registers(size: int) -> np.ndarray:
    """Bytes with anything in them."""
    size = -(-size // (1 << 16)) << 16
    return _SPARE[size].pop() if _SPARE.get(size) else np.empty(size, np.uint8)


def _give_registers(registers: np.ndarray) -> None:
    kept = _SPARE.setdefault(registers.size, [])
    if sum(map(len, _SPARE.values())) < _MOST_SPARE:
        kept.append(registers)


class Warp:
    """Registers, position and unfinished business of 32 lanes."""

    def __init__(self, machine: Machine, program: Program, block: Block, number: int, special: dict[str, Any]) -> None:
        self.machine, self.program, self.block, self.number = machine, program, block, number
        # what is read before it is written is not zero by luck; in the thousands of float registers it is anything
        sizes = {cls: count * LANES * np.dtype(DTYPES[cls]).itemsize for cls, count in program.counts.items()}
        self.registers, end, self.files = _take_registers(sum(sizes.values())), 0, {}
        for cls, size in sizes.items():
            self.files[cls] = self.registers[end : end + size].view(DTYPES[cls]).reshape(-1, LANES)
            end += size
        for cls in ("b16", "b32", "b64"):
            self.files[cls].view(np.uint8)[...] = 0xA5
        self.files["pred"][...] = False
        self.special, self.args = special, machine.args
        self.live = special["alive"].copy()
        self.everyone = np.ones(LANES, bool)
        self.groups: list[list[Any]] = [[0, self.everyone if self.live.all() else self.live.copy()]]
        self.blocked: Callable[[], bool] | None = None
        self.group = 0
        self.copies: list[list[Any]] = []  # [group, action, is an arrival]
        self.wgmma_groups: list[int] = []  # committed and not waited for: instructions issued until then
        self.wgmma_checks: list[tuple[int, Callable[[], None]]] = []  # of each instruction in flight
        self.wgmma_issued = 0
        self.token = 0

    # --- asynchronous copies -----------------------------------------------------------------------------------------
    def land(self, upto: int) -> None:
        """Let the copy at a place of the list happen; an arrival only after all copies before it."""
        if self.copies[upto][2]:
            for entry in self.copies[:upto]:
                entry[1]()
            self.copies[upto][1]()
            del self.copies[: upto + 1]
        else:
            self.copies.pop(upto)[1]()
        self.machine.progress()

    def wait_copies(self, pending: int) -> None:
        due = [e for e in self.copies if e[0] <= self.group - 1 - pending and not e[2]]
        for entry in due:
            entry[1]()
        self.copies = [e for e in self.copies if e not in due]

    # --- running -----------------------------------------------------------------------------------------------------
    def run(self, steps: int) -> None:
        """Go on for at most this many instructions."""
        program = self.program.steps
        while steps > 0 and self.groups:
            steps -= 1
            if len(self.groups) == 1:
                group = self.groups[0]
            else:
                ready = [g for g in self.groups if not g[2:]] or self._all_wait()
                group = min(ready, key=lambda g: g[0])
            pc, lanes = group[0], group[1]
            kind, guard, action = program[pc]
            if guard is None:
                mask = lanes
                count = LANES if lanes is self.everyone else int(np.count_nonzero(lanes))
                taken = True
            else:
                mask = lanes & guard(self)
                count = int(np.count_nonzero(mask))
                taken = count > 0
            if not taken:
                group[0] = pc + 1
            elif kind == "do":
                try:
                    signal = action(self, None if count == LANES else mask)
                except PtxError as error:
                    raise type(error)(f"{error}\n  in: {self.program.code[pc].text}") from error
                if signal is not None:
                    if signal is STAY:
                        return
                    if signal == "gather":
                        group.append("waits")
                        if len(self.groups) == 1:
                            self._all_wait()
                        continue
                group[0] = pc + 1
                if self.blocked is not None:
                    self._merge()
                    return
            elif kind == "ret":
                self.live &= ~mask
                group[0], group[1] = pc + 1, lanes & ~mask
                if not group[1].any():
                    self.groups.remove(group)
                self.machine.progress()
            elif guard is None or (mask == lanes).all():
                group[0] = action
            else:
                group[0], group[1] = pc + 1, lanes & ~mask
                self.groups.append([action, mask.copy()])
            if len(self.groups) > 1:
                self._merge()

    def _all_wait(self) -> list[list[Any]]:
        raise PtxError("lanes of a warp wait for each other at different instructions")

    def _merge(self) -> None:
        if len(self.groups) < 2:
            return
        by_pc: dict[int, list[Any]] = {}
        for group in self.groups:
            same = by_pc.get(group[0])
            if same is None:
                by_pc[group[0]] = group
            else:
                same[1] = same[1] | group[1]
                if same[1].all():
                    same[1] = self.everyone
                del same[2:]
        self.groups = list(by_pc.values())


class Machine:
    """Global memory, and one launch at a time."""

    def __init__(self, size: int = 64 << 20, seed: int = 0) -> None:
        self.memory = Memory("global", 1 << 32, size, is_open=False)
        self.rng = np.random.default_rng(seed)
        self.next = 4096
        self.args: list[int] = []
        self.prefetched: list[tuple[int, int]] = []  # address and bytes of what was asked into L2
        self.idle = 0

    def reserve(self, count: int) -> int:
        """Address of new bytes, with room that nobody may touch around them."""
        at = self.next
        self.next = at + -(-count // 256) * 256 + 512
        self.memory.open[at : at + count] = True
        return self.memory.base + at

    def upload(self, a: np.ndarray) -> int:
        """Address of a copy of an array."""
        raw = np.frombuffer(np.ascontiguousarray(a).tobytes(), np.uint8)
        address = self.reserve(raw.size)
        at = address - self.memory.base
        self.memory.data[at : at + raw.size] = raw
        self.memory.written[at : at + raw.size] = True
        return address

    def download(self, address: int, count: int) -> np.ndarray:
        """A copy of bytes; all of them must have been written."""
        at = address - self.memory.base
        if not self.memory.written[at : at + count].all():
            raise PtxError(f"{int((~self.memory.written[at : at + count]).sum())} of {count} bytes were never written")
        return self.memory.data[at : at + count].copy()

    def progress(self) -> None:
        """Something happened that others may wait for."""
        self.idle = 0

    def run(self, program: Program, *, grid: int | tuple[int, int], threads: int, args: Sequence[int], smem: int = 0,
            cluster: int = 1) -> None:  # fmt: skip
        """Launch, and return when all blocks are done. All of them are on the device at once."""
        with np.errstate(all="ignore"):  # a GPU says nothing about overflow or NaN either
            self._run(program, grid, threads, args, smem, cluster)

    def _run(self, program: Program, grid: int | tuple[int, int], threads: int, args: Sequence[int], smem: int,
             cluster: int) -> None:  # fmt: skip
        self.args = [int(a) & ((1 << 64) - 1) for a in args]
        if len(self.args) != len(program.params):
            # the caller's mistake, not the kernel's: a test that waits for a PtxError must not take it for one
            raise TypeError(f"{program.name} takes {len(program.params)} arguments, not {len(self.args)}")
        wide, high = (grid, 1) if isinstance(grid, int) else grid
        warps, bulk = [], self.bulk = [], []
        group = Cluster()
        for number in range(wide * high):
            if number % cluster == 0:
                group = Cluster()
            block = Block(Memory("shared", 0, program.static_bytes + smem, is_open=True), group, -(-threads // LANES),
                          number % cluster)  # fmt: skip
            group.blocks.append(block)
            for w in range(block.warps):
                tid = np.arange(w * LANES, (w + 1) * LANES, dtype=np.uint32)
                fixed = {
                    "%ntid.x": threads, "%ctaid.x": number % wide, "%ctaid.y": number // wide, "%nctaid.x": wide,
                    "%nctaid.y": high, "%cluster_ctarank": number % cluster, "%dynamic_smem_size": smem,
                    "%tid.y": 0, "%tid.z": 0,
                }  # fmt: skip
                special = {name: np.full(LANES, value, np.uint32) for name, value in fixed.items()}
                place = special | {"%tid.x": tid, "alive": tid < threads, "%laneid": tid % 32}
                block.members.append(Warp(self, program, block, w, place))
            warps += block.members
        self.idle = 0
        while any(w.groups for w in warps):
            self.idle += 1
            if self.idle > 400:
                where = {w.program.code[min(g[0] for g in w.groups)].text for w in warps if w.groups}
                raise DeadlockError(f"{program.name}: nothing moves any more; warps stand at {sorted(where)}")
            for w in self.rng.permutation(np.array(warps, dtype=object)):
                if bulk and self.rng.random() < 0.3:
                    bulk.pop(int(self.rng.integers(len(bulk))))()
                    self.progress()
                if w.copies and self.rng.random() < 0.5:
                    w.land(int(self.rng.integers(len(w.copies))))
                if not w.groups:
                    continue
                if w.blocked is not None:
                    if w.blocked():
                        continue
                    w.blocked = None
                    self.progress()
                w.run(int(self.rng.integers(1, 400)))
        for land in bulk:
            land()
        for w in warps:
            for entry in w.copies:  # nobody waited for these, but they happen
                if not entry[2]:
                    entry[1]()
            if w.wgmma_checks:
                raise PtxError(f"{program.name} ends with a wgmma nobody waited for")
        for w in warps:
            _give_registers(w.registers)


# --- what instructions do --------------------------------------------------------------------------------------------
def _lanes(m: np.ndarray | None) -> Any:
    return slice(None) if m is None else np.flatnonzero(m)


def _full(w: Warp, m: np.ndarray | None) -> bool:
    """Whether all live lanes of the warp take part."""
    return m is None or bool((m == w.live).all())


_BINARY: dict[str, Any] = {
    "add": np.add, "sub": np.subtract, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    "min": np.minimum, "max": np.maximum,
}  # fmt: skip
_COMPARE: dict[str, Any] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


def _f16_bits(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return values.astype(np.float16).view(np.uint16)


def _bf16_bits(values: np.ndarray) -> np.ndarray:
    bits = values.view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded)


def _floats(bits: np.ndarray, kind: str) -> np.ndarray:
    """float32 of 16-bit patterns."""
    if kind == "f16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _action(p: Program, s: Statement) -> Callable[[Warp, np.ndarray | None], Any]:
    """The function (warp, mask or None for all lanes) of a statement."""
    name = s.op[0]
    whole = ".".join(s.op)
    special = {
        "ld": _load, "st": _store, "cvt": _convert, "mov": _move, "bar": _barrier,
        "barrier": _cluster_barrier, "mbarrier": _mbarrier, "cp": _copy, "ldmatrix": _ldmatrix, "stmatrix": _stmatrix,
        "mma": _mma, "wgmma": _wgmma, "mapa": _mapa, "shfl": _shuffle,
    }  # fmt: skip
    if name in special:
        return special[name](p, s)
    if whole.startswith(("griddepcontrol", "fence", "setmaxnreg", "membar", "nanosleep")):
        return lambda w, m: None
    out, kind = p.write(s.args[0]), s.op[-1]
    if name == "createpolicy":  # of a cache that is not emulated
        return lambda w, m: out(w, m, np.zeros(LANES, np.uint64))
    if name in _BINARY:
        f, a, b = _BINARY[name], p.read(s.args[1], kind), p.read(s.args[2], kind)
        return lambda w, m: out(w, m, f(a(w), b(w)))
    if name in ("mul", "mad", "fma"):
        return _multiply(p, s)
    if name == "setp":
        f, a, b = _COMPARE[s.op[1]], p.read(s.args[1], kind), p.read(s.args[2], kind)
        if s.op[2] == "and":
            c = p.read(s.args[3], "pred")
            return lambda w, m: out(w, m, f(a(w), b(w)) & c(w))
        assert s.op[2] == kind, f"not known: {s.text}"
        return lambda w, m: out(w, m, f(a(w), b(w)))
    if name == "selp":
        a, b, c = p.read(s.args[1], kind), p.read(s.args[2], kind), p.read(s.args[3], "pred")
        return lambda w, m: out(w, m, np.where(c(w), a(w), b(w)))
    if name in ("shl", "shr"):
        bits = KINDS[kind](0).itemsize * 8
        a, b = p.read(s.args[1], kind), p.read(s.args[2], "u32")
        shift = np.left_shift if name == "shl" else np.right_shift

        def move_bits(w: Warp, m: np.ndarray | None) -> None:
            by = b(w)
            value = shift(a(w), np.minimum(by, bits - 1).astype(a(w).dtype))
            gone = by >= bits
            out(w, m, np.where(gone & (kind[0] != "s"), a(w).dtype.type(0), value) if gone.any() else value)

        return move_bits
    a = p.read(s.args[1], kind)
    if name == "cvta":
        to = np.uint64(GENERIC_SHARED)
        return lambda w, m: out(w, m, a(w) - to if "to" in s.op else a(w) + to)
    if name == "not":
        return lambda w, m: out(w, m, ~a(w))
    if name == "neg":
        return lambda w, m: out(w, m, -a(w))
    if name == "abs":
        return lambda w, m: out(w, m, np.abs(a(w)))
    if name == "ex2":
        return lambda w, m: out(w, m, np.exp2(a(w)))
    if name == "rcp":
        return lambda w, m: out(w, m, np.reciprocal(a(w)))
    if name == "tanh":
        return lambda w, m: out(w, m, np.tanh(a(w)))
    if name in ("div", "rem"):
        b = p.read(s.args[2], kind)
        divide = np.floor_divide if name == "div" else np.remainder
        if kind[0] != "u":
            raise PtxError(f"the emulator does not know: {s.text}")
        return lambda w, m: out(w, m, divide(a(w), np.maximum(b(w), 1)))
    if name == "prmt":
        b, c = p.read(s.args[2], "b32"), p.read(s.args[3], "b32")

        def permute(w: Warp, m: np.ndarray | None) -> None:
            pool = np.concatenate([a(w)[:, None].view(np.uint8), b(w)[:, None].view(np.uint8)], axis=1)
            nibbles = (c(w)[:, None] >> (4 * np.arange(4, dtype=np.uint32))) & np.uint32(7)
            if ((c(w)[:, None] >> (4 * np.arange(4, dtype=np.uint32))) & np.uint32(8)).any():
                raise PtxError("prmt with sign replication")
            out(w, m, np.ascontiguousarray(np.take_along_axis(pool, nibbles.astype(np.int64), 1)).view(np.uint32)[:, 0])

        return permute
    if name == "bfi":
        b, at, length = p.read(s.args[2], kind), p.read(s.args[3], "u32"), p.read(s.args[4], "u32")

        def insert(w: Warp, m: np.ndarray | None) -> None:
            mask = ((np.uint64(1) << length(w).astype(np.uint64)) - np.uint64(1)) << at(w).astype(np.uint64)
            value = (b(w).astype(np.uint64) & ~mask) | ((a(w).astype(np.uint64) << at(w).astype(np.uint64)) & mask)
            out(w, m, value.astype(b(w).dtype))

        return insert
    raise PtxError(f"the emulator does not know: {s.text}")


def _multiply(p: Program, s: Statement) -> Any:
    kind = s.op[-1]
    out, a, b = p.write(s.args[0]), p.read(s.args[1], kind), p.read(s.args[2], kind)
    is_wide = "wide" in s.op
    twice = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}.get(kind, kind) if is_wide else kind
    dtype = KINDS[twice]
    c = p.read(s.args[3], twice) if len(s.args) > 3 else None
    if "hi" in s.op:
        raise PtxError(f"the emulator does not know: {s.text}")

    def multiply(w: Warp, m: np.ndarray | None) -> None:
        value = a(w).astype(dtype) * b(w).astype(dtype)
        if c is not None:
            value = value + c(w)
        out(w, m, value)

    def fused(w: Warp, m: np.ndarray | None) -> None:
        assert c is not None
        out(w, m, (a(w).astype(np.float64) * b(w) + c(w)).astype(np.float32))

    return fused if s.op[0] == "fma" else multiply


def _move(p: Program, s: Statement) -> Any:
    kind = s.op[-1]
    to, source = s.args
    if to.startswith("{"):
        low, high = (p.write(name) for name in _split(to.strip("{}")))
        get = p.read(source, kind)

        def unpack(w: Warp, m: np.ndarray | None) -> None:
            halves = get(w)[:, None].view(np.uint16 if kind[1:] == "32" else np.uint32)
            low(w, m, np.ascontiguousarray(halves[:, 0]))
            high(w, m, np.ascontiguousarray(halves[:, 1]))

        return unpack
    out = p.write(to)
    if source.startswith("{"):
        small = "b16" if kind[1:] == "32" else "b32"
        parts = [p.read(name, small) for name in _split(source.strip("{}"))]
        return lambda w, m: out(w, m, np.ascontiguousarray(np.stack([g(w) for g in parts], 1)).view(KINDS[kind])[:, 0])
    get = p.read(source, kind)
    return lambda w, m: out(w, m, get(w))


def _convert(p: Program, s: Statement) -> Any:
    to, source = s.op[-2], s.op[-1]
    out = p.write(s.args[0])
    if to in ("f16x2", "bf16x2"):
        high, low = p.read(s.args[1], "f32"), p.read(s.args[2], "f32")
        bits = _f16_bits if to == "f16x2" else _bf16_bits
        return lambda w, m: out(w, m, bits(low(w)).astype(np.uint32) | bits(high(w)).astype(np.uint32) << np.uint32(16))
    if source == "f16" and to == "f32":
        get = p.read(s.args[1], "b16")
        return lambda w, m: out(w, m, _floats(get(w), "f16"))
    if to in KINDS and source in KINDS and "f32" not in (to, source):
        get, dtype = p.read(s.args[1], source), KINDS[to]
        return lambda w, m: out(w, m, get(w).astype(dtype))
    raise PtxError(f"the emulator does not know: {s.text}")


# --- memory ----------------------------------------------------------------------------------------------------------
def _space(s: Statement) -> str:
    spaces = [part for part in s.op if part.startswith(("global", "shared", "param"))]
    if len(spaces) != 1:
        raise PtxError(f"the emulator does not know: {s.text}")
    return spaces[0]


def _own(w: Warp, addresses: Any) -> Any:
    """Places in this block's shared memory."""
    if (np.asarray(addresses) >> RANK_SHIFT != w.block.rank).any():
        raise PtxError("an address of another block's shared memory, or of none")
    return addresses & ((1 << RANK_SHIFT) - 1)


def _resolve(w: Warp, space: str, addresses: np.ndarray) -> tuple[Memory, np.ndarray]:
    if space == "global":
        return w.machine.memory, addresses
    if space == "shared::cluster":
        ranks = np.unique(addresses >> RANK_SHIFT)
        if len(ranks) > 1:
            raise PtxError("one access to the shared memory of several blocks")
        block = w.block.cluster.blocks[int(ranks[0])]
        return block.shared, addresses & ((1 << RANK_SHIFT) - 1)
    return w.block.shared, _own(w, addresses)


def _vector(arg: str) -> list[str]:
    return _split(arg.strip("{}")) if arg.startswith("{") else [arg]


def _load(p: Program, s: Statement) -> Any:
    kind, space = s.op[-1], _space(s)
    outs = [p.write(name) for name in _vector(s.args[0])]
    if space == "param":
        place = p.params[s.args[1].strip("[]")]
        dtype = KINDS[kind]
        return lambda w, m: outs[0](w, m, np.full(LANES, w.args[place] & (2 ** (8 * dtype(0).itemsize) - 1), dtype))
    at = p.address(s.args[1], "u64" if space == "global" else "u32")
    dtype = np.dtype(KINDS[kind])
    count = dtype.itemsize * len(outs)

    def load(w: Warp, m: np.ndarray | None) -> None:
        lanes = _lanes(m)
        memory, places = _resolve(w, space, at(w)[lanes])
        found = memory.load(places, count).view(dtype)
        for i, out in enumerate(outs):
            value = np.zeros(LANES, dtype)
            value[lanes] = found[:, i]
            out(w, m, value)

    return load


def _store(p: Program, s: Statement) -> Any:
    if s.op[1] == "async":
        return _store_async(p, s)
    kind, space = s.op[-1], _space(s)
    values = [p.read(name, kind) for name in _vector(s.args[1])]
    at = p.address(s.args[0], "u64" if space == "global" else "u32")

    def store(w: Warp, m: np.ndarray | None) -> None:
        lanes = _lanes(m)
        memory, places = _resolve(w, space, at(w)[lanes])
        rows = np.stack([v(w)[lanes] for v in values], axis=1)
        memory.store(places, np.ascontiguousarray(rows).view(np.uint8))
        w.machine.progress()

    return store


def _store_async(p: Program, s: Statement) -> Any:
    """A store to a block of the cluster that lands some time later and then completes its bytes on a barrier there."""
    values = [p.read(name, s.op[-1]) for name in _vector(s.args[1])]
    at, signal = p.address(s.args[0], "u32"), p.address(s.args[2], "u32")

    def store(w: Warp, m: np.ndarray | None) -> None:
        lanes = _lanes(m)
        memory, places = _resolve(w, "shared::cluster", at(w)[lanes])
        signals = np.unique(signal(w)[lanes])
        block = w.block.cluster.blocks[int(signals[0]) >> RANK_SHIFT]
        if len(signals) > 1 or block.shared is not memory:
            raise PtxError("an asynchronous store that signals another block than it writes to, or several barriers")
        rows = np.ascontiguousarray(np.stack([v(w)[lanes] for v in values], axis=1)).view(np.uint8)

        def land() -> None:
            if not block.is_running:
                raise PtxError("a store to the shared memory of a block that has ended")
            memory.store(places, rows)
            block.mbarrier(int(signals[0]) & ((1 << RANK_SHIFT) - 1)).complete(rows.size)

        w.machine.bulk.append(land)
        w.machine.progress()

    return store


def _mapa(p: Program, s: Statement) -> Any:
    out, at, rank = p.write(s.args[0]), p.read(s.args[1], "u32"), p.read(s.args[2], "u32")

    def mapa(w: Warp, m: np.ndarray | None) -> None:
        _own(w, at(w)[_lanes(m)])
        out(w, m, at(w) & np.uint32((1 << RANK_SHIFT) - 1) | rank(w) << np.uint32(RANK_SHIFT))

    return mapa


def _shuffle(p: Program, s: Statement) -> Any:
    out, value, lane = p.write(s.args[0]), p.read(s.args[1], "b32"), p.read(s.args[2], "u32")
    if s.op[1:3] != ["sync", "idx"]:
        raise PtxError(f"the emulator does not know: {s.text}")
    return lambda w, m: out(w, m, value(w)[lane(w) % 32]) if _full(w, m) else "gather"


# --- barriers --------------------------------------------------------------------------------------------------------
def _barrier(p: Program, s: Statement) -> Any:
    if s.op[1] == "warp":
        return lambda w, m: None if _full(w, m) else "gather"
    number = p.read(s.args[0], "u32")
    threads = p.read(s.args[1], "u32") if len(s.args) > 1 else None

    def meet(w: Warp, m: np.ndarray | None) -> Any:
        if not _full(w, m):
            return "gather"
        need = w.block.warps if threads is None else int(threads(w)[0]) // LANES
        barrier = w.block.barriers.setdefault(int(number(w)[0]), Rendezvous())
        generation = barrier.generation
        barrier.arrive(need)
        w.machine.progress()
        w.blocked = lambda: barrier.generation == generation
        return None

    return meet


def _cluster_barrier(p: Program, s: Statement) -> Any:
    def arrive(w: Warp, m: np.ndarray | None) -> Any:
        if not _full(w, m):
            return "gather"
        cluster = w.block.cluster
        w.token = cluster.barrier.generation
        cluster.barrier.arrive(sum(b.warps for b in cluster.blocks))
        w.machine.progress()
        return None

    def wait(w: Warp, m: np.ndarray | None) -> Any:
        if not _full(w, m):
            return "gather"
        w.blocked = lambda: w.block.cluster.barrier.generation == w.token
        return None

    return {"arrive": arrive, "wait": wait}[s.op[2]]


def _mbarrier(p: Program, s: Statement) -> Any:
    what = s.op[1]
    places = [i for i, arg in enumerate(s.args) if arg.startswith("[")]
    at = p.address(s.args[places[0]], "u32")
    value = p.read(s.args[places[0] + 1], "u32") if len(s.args) > places[0] + 1 else None

    def init(w: Warp, m: np.ndarray | None) -> None:
        assert value is not None
        for lane in np.arange(LANES)[_lanes(m)]:
            count = int(value(w)[lane])
            w.block.mbarriers[_own(w, int(at(w)[lane]))] = Mbarrier(count, count)

    def arrive(w: Warp, m: np.ndarray | None) -> None:
        for lane in np.arange(LANES)[_lanes(m)]:
            expect = int(value(w)[lane]) if value is not None and "expect_tx" in s.op else 0
            place, block = int(at(w)[lane]), w.block
            if "shared::cluster" in s.op:
                block = w.block.cluster.blocks[place >> RANK_SHIFT]
            else:
                _own(w, place)
            if not block.is_running:
                raise PtxError("an arrival at a barrier of a block that has ended")
            block.mbarrier(place & ((1 << RANK_SHIFT) - 1)).arrive(1, expect)
        w.machine.progress()

    def wait(w: Warp, m: np.ndarray | None) -> Any:
        assert value is not None
        lanes = np.arange(LANES)[_lanes(m)]
        where, parity = {int(a) for a in at(w)[lanes]}, {int(v) & 1 for v in value(w)[lanes]}
        if len(where) != 1 or len(parity) != 1:
            raise PtxError("lanes of a warp wait for different mbarriers")
        barrier, wanted = w.block.mbarrier(_own(w, where.pop())), parity.pop()
        if barrier.phase & 1 == wanted:
            w.blocked = lambda: barrier.phase & 1 == wanted
            return STAY
        out(w, m, np.ones(LANES, bool))
        return None

    if what in ("try_wait", "test_wait"):
        out = p.write(s.args[0])
        if "parity" not in s.op:
            raise PtxError(f"the emulator does not know: {s.text}")
        return wait
    return {"init": init, "arrive": arrive}[what]


# --- copies ----------------------------------------------------------------------------------------------------------
def _copy(p: Program, s: Statement) -> Any:
    whole = ".".join(s.op)
    if whole == "cp.async.commit_group":

        def commit(w: Warp, m: np.ndarray | None) -> Any:
            if not _full(w, m):
                return "gather"
            w.group += 1
            return None

        return commit
    if whole == "cp.async.wait_group":
        pending = int(s.args[0])
        return lambda w, m: w.wait_copies(pending) if _full(w, m) else "gather"
    if whole.startswith("cp.async.mbarrier.arrive.noinc"):
        at = p.address(s.args[0], "u32")

        def arrive_later(w: Warp, m: np.ndarray | None) -> None:
            places = [int(a) for a in at(w)[_lanes(m)]]

            def arrive() -> None:
                for place in places:
                    w.block.mbarrier(_own(w, place)).arrive()

            w.copies.append([w.group, arrive, True])

        return arrive_later
    if whole == "cp.async.bulk.prefetch.L2.global":
        spans = p.address(s.args[0], "u64"), p.read(s.args[1], "u32")

        def prefetch(w: Warp, m: np.ndarray | None) -> None:
            for lane in np.arange(LANES)[_lanes(m)]:
                origin, count = (int(f(w)[lane]) for f in spans)
                if count % 16 or origin % 16:
                    raise PtxError("a bulk prefetch that is not of 16-byte units")
                w.machine.memory.load(origin + 16 * np.arange(count // 16), 16)  # fails outside of what is allocated
                w.machine.prefetched.append((origin, count))

        return prefetch
    to, source = p.address(s.args[0], "u32"), p.address(s.args[1], "u64")
    if "bulk" in s.op:
        size, barrier = p.read(s.args[2], "u32"), p.address(s.args[3], "u32")

        def bulk(w: Warp, m: np.ndarray | None) -> None:
            for lane in np.arange(LANES)[_lanes(m)]:
                at, origin, count, signal = (int(f(w)[lane]) for f in (to, source, size, barrier))
                if count % 16 or at % 16 or origin % 16:
                    raise PtxError("a bulk copy that is not of 16-byte units")

                def land(at: int = at, origin: int = origin, count: int = count, signal: int = signal) -> None:
                    steps = 16 * np.arange(count // 16)
                    w.block.shared.store(_own(w, at) + steps, w.machine.memory.load(origin + steps, 16))
                    w.block.mbarrier(_own(w, signal)).complete(count)

                w.machine.bulk.append(land)

        return bulk
    if not whole.startswith("cp.async.cg.shared.global") or s.args[2] != "16":
        raise PtxError(f"the emulator does not know: {s.text}")
    sized = None
    if len(s.args) > 3:
        is_predicate = p.registers.get(s.args[3], ("", 0))[0] == "pred"
        flag = p.read(s.args[3], "pred" if is_predicate else "u32")
        sized = (lambda w: np.where(flag(w), 0, 16)) if is_predicate else (lambda w: flag(w).astype(np.int64))

    def start(w: Warp, m: np.ndarray | None) -> None:
        lanes = _lanes(m)
        at, origin = to(w)[lanes], source(w)[lanes]
        sizes = np.full(len(at), 16) if sized is None else sized(w)[lanes]

        def land() -> None:
            rows = np.zeros((len(at), 16), np.uint8)
            if (origin % 16).any():
                raise PtxError("cp.async from a misaligned address")
            for count in np.unique(sizes):
                for b in range(int(count)):
                    mine = sizes == count
                    rows[mine, b] = w.machine.memory.load(origin[mine] + b, 1)[:, 0]
            w.block.shared.store(_own(w, at), rows)

        def land_whole() -> None:
            w.block.shared.store(_own(w, at), w.machine.memory.load(origin, 16))

        w.copies.append([w.group, land_whole if (sizes == 16).all() else land, False])

    return start


# --- matrices --------------------------------------------------------------------------------------------------------
def _ldmatrix(p: Program, s: Statement) -> Any:
    outs = [p.write(name) for name in _vector(s.args[0])]
    at = p.address(s.args[1], "u32")
    is_turned = "trans" in s.op

    def load(w: Warp, m: np.ndarray | None) -> Any:
        if not _full(w, m):
            return "gather"
        rows = w.block.shared.load(_own(w, at(w)[: 8 * len(outs)]), 16).view(np.uint16).reshape(len(outs), 8, 8)
        for i, out in enumerate(outs):
            matrix = np.ascontiguousarray(rows[i].T if is_turned else rows[i])
            out(w, m, matrix.reshape(LANES, 2).view(np.uint32)[:, 0])
        return None

    return load


def _stmatrix(p: Program, s: Statement) -> Any:
    values = [p.read(name, "b32") for name in _vector(s.args[1])]
    at = p.address(s.args[0], "u32")
    is_turned = "trans" in s.op

    def store(w: Warp, m: np.ndarray | None) -> Any:
        if not _full(w, m):
            return "gather"
        parts = [v(w)[:, None].view(np.uint16).reshape(8, 8) for v in values]
        rows = np.concatenate([part.T if is_turned else part for part in parts])
        w.block.shared.store(_own(w, at(w)[: 8 * len(values)]), np.ascontiguousarray(rows).view(np.uint8))
        return None

    return store


def _mma(p: Program, s: Statement) -> Any:
    if s.op[3] != "m16n8k16" or s.op[4:6] != ["row", "col"]:
        raise PtxError(f"the emulator does not know: {s.text}")
    kind = s.op[7]
    outs = [p.write(name) for name in _vector(s.args[0])]
    a, b = ([p.read(name, "b32") for name in _vector(s.args[i])] for i in (1, 2))
    c = [p.read(name, "f32") for name in _vector(s.args[3])]

    def halves(get: Any, w: Warp) -> np.ndarray:
        """(8, 4, 2): row or column lane // 4, pair lane % 4, value of the pair."""
        return _floats(np.ascontiguousarray(get(w)[:, None].view(np.uint16)), kind).reshape(8, 4, 2)

    def multiply(w: Warp, m: np.ndarray | None) -> Any:
        if not _full(w, m):
            return "gather"
        left = np.zeros((16, 16), np.float32)
        for i, get in enumerate(a):  # a0: rows 0..7, k 0..7; a1: rows 8..15; a2: k 8..15; a3: both
            left[8 * (i % 2) : 8 * (i % 2) + 8, 8 * (i // 2) : 8 * (i // 2) + 8] = halves(get, w).reshape(8, 8)
        right = np.zeros((16, 8), np.float32)
        for i, get in enumerate(b):
            right[8 * i : 8 * i + 8] = halves(get, w).reshape(8, 8).T
        product = left @ right
        for i, (out, old) in enumerate(zip(outs, c, strict=True)):
            part = product[8 * (i // 2) : 8 * (i // 2) + 8].reshape(8, 4, 2)[:, :, i % 2].reshape(LANES)
            out(w, m, old(w) + part)
        return None

    return multiply


SWIZZLED_BYTES = {1: 128, 2: 64, 3: 32}  # by a descriptor's swizzle: bytes of a row whose 16-byte chunks change places


@functools.cache
def _operand_places(descriptor_high: int, is_mn_major: bool, across: int) -> np.ndarray:
    """Byte offsets, before the swizzle, of the elements (across, 16 along k) of a wgmma operand; from bits 16 up."""
    leading, stride = (descriptor_high & 0x3FFF) << 4, (descriptor_high >> 16 & 0x3FFF) << 4
    swizzle = descriptor_high >> 46
    i, k = np.meshgrid(np.arange(across), np.arange(16), indexing="ij")
    if is_mn_major:
        if swizzle not in SWIZZLED_BYTES:
            raise PtxError("an operand contiguous along m or n without a swizzle")
        row = SWIZZLED_BYTES[swizzle]
        return i // (row // 2) * leading + k // 8 * stride + k % 8 * row + i % (row // 2) * 2
    if swizzle != 0:
        raise PtxError("an operand contiguous along k with a swizzle")
    return k // 8 * leading + i // 8 * stride + i % 8 * 16 + k % 8 * 2


def _wgmma(p: Program, s: Statement) -> Any:
    if s.op[1] == "fence":
        return lambda w, m: None
    if s.op[1] == "commit_group":

        def commit(w: Warp, m: np.ndarray | None) -> None:
            w.wgmma_groups.append(w.wgmma_issued)

        return commit
    if s.op[1] == "wait_group":
        pending = int(s.args[0])

        def wait(w: Warp, m: np.ndarray | None) -> Any:
            due = w.wgmma_groups[: len(w.wgmma_groups) - pending]
            if not due:
                return None
            # a wgmma is one instruction of four warps: it is not done for one of them before all have issued it
            others = w.block.members[w.number // 4 * 4 : w.number // 4 * 4 + 4]
            if any(other.wgmma_issued < due[-1] for other in others):
                w.blocked = lambda: any(other.wgmma_issued < due[-1] for other in others)
                return STAY
            for other in others:  # done for one is done for all: from now on their operands may change
                while other.wgmma_checks and other.wgmma_checks[0][0] <= due[-1]:
                    other.wgmma_checks.pop(0)[1]()
            del w.wgmma_groups[: len(due)]
            return None

        return wait
    n = int(s.op[4].removeprefix("m64n").removesuffix("k16"))
    kind = s.op[-1]
    registers = _vector(s.args[0])
    reads, writes = [p.read(r, "f32") for r in registers], [p.write(r) for r in registers]
    a, b = p.read(s.args[1], "u64"), p.read(s.args[2], "u64")
    if s.args[3:6] != ["1", "1", "1"]:
        raise PtxError(f"the emulator does not know: {s.text}")
    a_turned, b_turned = s.args[6] == "1", s.args[7] == "1"
    # of groups of fewer than 64 rows the warps after the first few get what lies behind the weights: NaN here
    few = re.search(r"_skinny90_\w+?_v(\d+)_", p.name)
    row_warps = min(4, int(few[1]) // 16) if few else 4

    def fetch(w: Warp, descriptor: int, is_mn_major: bool, across: int, rows: slice) -> tuple[np.ndarray, np.ndarray]:
        places = _operand_places(descriptor >> 16, is_mn_major, across)[rows] + ((descriptor & 0x3FFF) << 4)
        if is_mn_major:
            places = places ^ (places >> 7 & SWIZZLED_BYTES[descriptor >> 62] // 16 - 1) << 4
        bits = w.block.shared.load(places.reshape(-1), 2).view(np.uint16).reshape(places.shape)
        return places, bits

    def multiply(w: Warp, m: np.ndarray | None) -> Any:
        if not _full(w, m):
            return "gather"
        da, db = int(a(w)[0]), int(b(w)[0])
        own = slice(16 * (w.number % 4), 16 * (w.number % 4) + 16)
        b_at, b_bits = fetch(w, db, b_turned, n, slice(None))
        read, a_bits = [(b_at, b_bits)], np.full((16, 16), 0x7FFF, np.uint16)
        if w.number % 4 < row_warps:
            a_at, a_bits = fetch(w, da, a_turned, 64, own)
            read.append((a_at, a_bits))
        product = (_floats(a_bits, kind) @ _floats(b_bits, kind).T).reshape(2, 8, n // 8, 4, 2)
        for j in range(n // 8):
            for e in range(4):
                value = np.ascontiguousarray(product[e // 2, :, j, :, e % 2]).reshape(LANES)
                writes[4 * j + e](w, m, reads[4 * j + e](w) + value)

        def verify() -> None:
            for at, bits in read:
                now = w.block.shared.load(at.reshape(-1), 2).view(np.uint16).reshape(at.shape)
                if not (now == bits).all():
                    raise PtxError("shared memory changed under a wgmma in flight")

        w.wgmma_issued += 1
        w.wgmma_checks.append((w.wgmma_issued, verify))
        w.machine.progress()
        return None

    return multiply
