"""Canonical order <-> the order of the few-column kernel: balanced streams of records, in NumPy and both ways.

A *step* is 16 kept columns of one *item* (at most 64 rows of a group; v = 128 gives two items a group): what one
`mma.m16n8k16` eats along k. A *record* is a step as it lies in memory, read once, front to back:

    [rows / 16][32 lanes][8 halves]   operand A in fragment order, as in `layout.to_mma`
    [16 column places, uint16]        0 .. window - 1, or PADDING; the highest bit is set in the last step of a piece

Work is cut three times: items go to *teams* (longest first, to the team with least); a team's steps, sorted by column,
go in equal numbers to its *ranks* (thread blocks of a cluster), so that a rank needs only a window of x; a rank's steps
go to its *warps*. A window that would be wider than `window` rows is cut into *phases*. A *piece* is what a warp sums
in its registers without a break: its sum fills one *slot*, and the sum of an item's slots in the order of the entries
is the item's result, so that the order of every addition is fixed here.

Where no team has more items than a block has warps, the layout is *owned*: each warp works on one item only, through
all phases, and has one piece; the slots of 64 columns then fit where the window of x was. Else a rank's steps, sorted
by item, go in equal numbers to the warps, and a piece ends with every item and phase.

Inside a piece the columns are ordered so that eight neighbours fall into different shared-memory banks; `place_of_row`
is the order in which the rows of a window stand there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import ArgumentError, DtypeError
from .shflbw import ShflBWMatrix
from .skinny_work import Steps, Work, share_items

__all__ = ["LAST_STEP", "NO_ROW", "PADDING", "SkinnyLayout", "from_skinny", "place_of_row", "to_skinny"]

PADDING = 0x7FFF  # a column place that stands for zeros
LAST_STEP = 0x8000  # bit of the places of a piece's last step
NO_ROW = 0xFFFFFFFF  # output row of a place that the short last group does not have


@dataclass(frozen=True, eq=False)
class SkinnyLayout:
    """A packed matrix as balanced streams of records, on the host.

    Parameters
    ----------
    records : uint16 array, shape (steps, item_rows * 16 + 16)
        Weights (bits of the dtype) and column places, in the order block, warp, phase, item, column.
    warps : uint32 array, shape (teams * ranks, warps, 3 + phases rounded up to a multiple of 4)
        First record, first slot, steps, and the steps of each phase, for each warp of each block.
    windows : uint32 array, shape (2, teams * ranks, phases, 4)
        First column of x, rows to load, and what to add to a column place, of each phase; [0] loads phase by phase,
        [1] all of a block's window at phase 0.
    entry_ptr : uint32 array, shape (items + 1,)
        Entries of an item, in the order of `teams_ptr`.
    entries : uint32 array
        rank * 65536 + slot of every piece, by item, in the order of their addition.
    teams_ptr : uint32 array, shape (teams + 1,)
        Items of each team.
    team_table : uint32 array, shape (teams, words)
        What a block must know of its team, in one piece: first item, items, then where each item's entries begin and
        where the last one's end (words of this row), then the entries.
    item_ids : int64 array, shape (items,)
        group * (items per group) + part, for each item in the order of the teams.
    rows : uint32 array, shape (items * item_rows,)
        Output row of each row of each item, or NO_ROW.
    """

    records: np.ndarray
    warps: np.ndarray
    windows: np.ndarray
    entry_ptr: np.ndarray
    entries: np.ndarray
    teams_ptr: np.ndarray
    team_table: np.ndarray
    item_ids: np.ndarray
    rows: np.ndarray
    ranks: int
    phases: int
    v: int
    groups: int
    dtype: np.dtype
    is_owned: bool

    @property
    def item_rows(self) -> int:
        """Rows of an item."""
        return min(self.v, 64)

    @property
    def teams(self) -> int:
        """Number of teams."""
        return len(self.teams_ptr) - 1

    @property
    def steps(self) -> int:
        """Records of all blocks together."""
        return len(self.records)

    @property
    def slots(self) -> int:
        """Slots of the block that has most."""
        if not len(self.entries):
            return 0
        return int((self.entries & 0xFFFF).max()) + 1

    def window_rows(self, merged: bool) -> int:
        """Rows of the widest window, rounded up to a multiple of 8: all of a block's (merged) or one phase's."""
        return int(-(-int(self.windows[int(merged), :, :, 1].max(initial=0)) // 8) * 8)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays that go to the device."""
        return sum(a.nbytes for a in (self.records, self.warps, self.windows, self.team_table, self.rows))


def place_of_row(row: np.ndarray) -> np.ndarray:
    """Where row r of a window stands in shared memory: r with its lowest 3 bits XORed with the next 3; its own inverse.

    Both the 8 rows 8i .. 8i+7 and the 8 rows j, 8+j, .., 56+j fall into 8 different places modulo 8.
    """
    return (row & ~np.int64(7)) | ((row ^ (row >> 3)) & 7)


def to_skinny(packed: ShflBWMatrix, teams: int, ranks: int, warps: int, window: int) -> SkinnyLayout:
    """Cut a packed matrix into equal streams for `teams * ranks` blocks of `warps` warps.

    Parameters
    ----------
    packed : ShflBWMatrix of float16 or bfloat16
    teams, ranks, warps : int
        Thread-block clusters, blocks in each, warps in each of those.
    window : int
        Rows of x that a block can hold at once, at most 32704 and at least 128.

    Raises
    ------
    DtypeError
        When the values are not 2 bytes wide.
    ArgumentError
        When a count is not positive or the window is out of range.

    Examples
    --------
    >>> import numpy as np
    >>> from shflnb.formats import pack
    >>> packed = pack(np.repeat(np.eye(2, 64, dtype=np.float16), 16, axis=0), block=(16, 16))
    >>> layout = to_skinny(packed, teams=2, ranks=1, warps=2, window=1024)
    >>> layout.steps, layout.slots, layout.windows[0, :, 0, :2].tolist()
    (2, 1, [[0, 1], [0, 2]])
    """
    if packed.values.itemsize != 2:
        raise DtypeError(f"the values are {packed.dtype}; kernel layouts hold float16 or bfloat16; use "
                         f"packed.astype('float16')")  # fmt: skip
    if min(teams, ranks, warps) < 1 or not 128 <= window <= 0x7FC0:
        raise ArgumentError(f"teams = {teams}, ranks = {ranks}, warps = {warps}, window = {window}; expected positive "
                            "counts and a window of 128 to 32704 rows")  # fmt: skip
    parts = max(1, packed.v // 64)
    cut = Steps.of(packed, span=window // 2)
    team_of_item = share_items(np.repeat(cut.steps_of_group, parts), teams)
    item_ids = np.argsort(team_of_item, kind="stable")
    order_of_item = np.empty(len(item_ids), np.int64)
    order_of_item[item_ids] = np.arange(len(item_ids))
    is_owned = bool(np.bincount(team_of_item, minlength=1).max(initial=0) <= warps)
    work = Work.of(cut, parts, team_of_item, order_of_item, (teams, ranks, warps), window, is_owned)
    warp_table, slots, last = _pieces(work, teams * ranks, warps, is_owned)
    entry_ptr, entries = _entries(work, last, slots, ranks, len(item_ids))
    records = _records(packed, cut, work, last, parts)
    rows = np.full((len(item_ids), min(packed.v, 64)), NO_ROW, np.uint32)
    padded = np.full(packed.groups * packed.v, NO_ROW, np.uint32)
    padded[: packed.shape[0]] = packed.row_perm
    rows[:] = padded.reshape(-1, min(packed.v, 64))[item_ids]
    teams_ptr = np.searchsorted(team_of_item[item_ids], np.arange(teams + 1)).astype(np.uint32)
    table = _team_table(teams_ptr.astype(np.int64), entry_ptr.astype(np.int64), entries)
    return SkinnyLayout(records, warp_table, work.windows, entry_ptr, entries, teams_ptr, table, item_ids,
                        rows.reshape(-1), ranks, work.phases, packed.v, packed.groups, packed.values.dtype,
                        is_owned)  # fmt: skip


def _pieces(work: Work, blocks: int, warps: int, is_owned: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The warps' table, the slot of each step's piece, and which steps are the last of theirs."""
    n = len(work.step)
    cell = work.block * warps + work.warp
    begins = np.ones(n, bool)
    begins[1:] = (cell[1:] != cell[:-1]) | (work.item[1:] != work.item[:-1])
    if not is_owned:
        begins[1:] |= work.phase[1:] != work.phase[:-1]
    last = np.ones(n, bool)
    last[:-1] = begins[1:]
    pieces_before = np.searchsorted(work.block[begins], np.arange(blocks))
    slot = np.cumsum(begins) - 1 - pieces_before[work.block] if n else np.zeros(0, np.int64)
    table = np.zeros((blocks * warps, -(-(3 + work.phases) // 4) * 4), np.uint32)
    record_at = np.searchsorted(cell, np.arange(blocks * warps))
    table[:, 0] = record_at
    has = record_at < n
    table[has, 1] = slot[record_at[has]]
    steps = np.bincount(cell * work.phases + work.phase, minlength=blocks * warps * work.phases).reshape(
        -1, work.phases
    )
    table[:, 2] = steps.sum(axis=1)
    table[:, 3 : 3 + work.phases] = steps
    if slot.max(initial=0) > 0xFFFF:
        raise ArgumentError("a block has more than 65536 pieces; use more teams or ranks")
    return table.reshape(blocks, warps, -1), slot, last


def _entries(work: Work, last: np.ndarray, slot: np.ndarray, ranks: int, items: int) -> tuple[np.ndarray, np.ndarray]:
    """CSR of the pieces by item: rank * 65536 + slot, in the order of ranks and slots."""
    item, rank, at = work.item[last], work.block[last] % ranks, slot[last]
    order = np.lexsort((at, rank, item))
    entry_ptr = np.zeros(items + 1, np.uint32)
    np.cumsum(np.bincount(item, minlength=items), out=entry_ptr[1:])
    return entry_ptr, (rank * 65536 + at)[order].astype(np.uint32)


def _team_table(teams_ptr: np.ndarray, entry_ptr: np.ndarray, entries: np.ndarray) -> np.ndarray:
    """The rows of `SkinnyLayout.team_table`, a multiple of 4 words each, since they are copied 16 bytes at a time."""
    items, counts = np.diff(teams_ptr), np.diff(entry_ptr[teams_ptr])
    words = -(-int((3 + items + counts).max(initial=4)) // 4) * 4
    table = np.zeros((len(items), words), np.uint32)
    for team, (begin, end) in enumerate(zip(teams_ptr[:-1].tolist(), teams_ptr[1:].tolist(), strict=True)):
        pointers = entry_ptr[begin : end + 1]
        head = 3 + end - begin
        table[team, :2] = begin, end - begin
        table[team, 2:head] = pointers - pointers[0] + head
        table[team, head : head + counts[team]] = entries[pointers[0] : pointers[-1]]
    return table


def _records(packed: ShflBWMatrix, cut: Steps, work: Work, last: np.ndarray, parts: int) -> np.ndarray:
    """Weights in fragment order and column places of every step."""
    n, rows = len(work.step), min(packed.v, 64)
    source = cut.columns[work.step]
    window = work.windows[0, work.block, work.phase, 0].astype(np.int64) if n else np.zeros(0, np.int64)
    places = np.full((n, 16), PADDING, np.int64)
    kept = source >= 0
    places[kept] = place_of_row(packed.indices[source[kept]].astype(np.int64) - np.repeat(window, kept.sum(axis=1)))
    run = (
        np.cumsum(last) - last
    ) * work.phases + work.phase  # columns change places inside a piece, but not from phase to phase
    order = _spread_banks(np.repeat(run, 16), places.reshape(-1))
    source, places = source.reshape(-1)[order].reshape(n, 16), places.reshape(-1)[order].reshape(n, 16)
    records = np.zeros((n, rows * 16 + 16), np.uint16)
    bits = packed.values.view(np.uint16).reshape(-1, parts, rows)
    part = work.item_id % parts
    for begin in range(0, n, 65536):  # piecewise, so that the work space stays small beside the matrix
        part_of = slice(begin, min(n, begin + 65536))
        slab = (
            bits[np.maximum(source[part_of], 0), part[part_of, None]]
            if len(bits)
            else np.zeros((0, 16, rows), np.uint16)
        )
        slab[source[part_of] < 0] = 0
        # a column of a step is (upper half, t, odd), a row of an item is (strip, upper half, q), slowest first
        fragments = slab.reshape(-1, 2, 4, 2, rows // 16, 2, 8).transpose(0, 4, 6, 2, 1, 5, 3)
        records[part_of, : rows * 16] = fragments.reshape(-1, rows * 16)
    records[:, rows * 16 :] = places | np.where(last, LAST_STEP, 0)[:, None]
    return records


def _spread_banks(piece: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Order of the columns inside each run so that neighbours differ modulo 8 as long as they can; padding is last."""
    bank = np.where(place == PADDING, 8, place & 7)
    by_bank = np.lexsort((place, bank, piece))
    _, start, count = np.unique(piece[by_bank] * 16 + bank[by_bank], return_index=True, return_counts=True)
    turn = np.empty(len(piece), np.int64)
    turn[by_bank] = np.arange(len(piece)) - np.repeat(start, count)
    turn[bank == 8] = len(piece)
    return np.lexsort((bank, turn, piece))


def from_skinny(layout: SkinnyLayout) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The canonical `(indices, values, indptr)` of a layout made by `to_skinny`."""
    rows, parts, phases = layout.item_rows, max(1, layout.v // 64), layout.phases
    blocks, warps, _ = layout.warps.shape
    counts = layout.warps[:, :, 3 : 3 + phases].reshape(-1).astype(np.int64)
    cell = np.repeat(np.arange(len(counts)), counts)
    block = cell // (warps * phases)
    last = (layout.records[:, rows * 16] & LAST_STEP) != 0
    piece = np.cumsum(last) - last
    first_piece = np.searchsorted(block[last], np.arange(blocks))
    slot = piece - first_piece[block]
    team = block // layout.ranks
    item_of = np.full((layout.teams, layout.ranks, max(1, layout.slots)), -1, np.int64)
    per_item: np.ndarray = np.diff(layout.entry_ptr.astype(np.int64))
    owner = np.repeat(np.arange(len(layout.item_ids)), per_item)
    team_of = np.searchsorted(layout.teams_ptr, owner, side="right") - 1
    item_of[team_of, layout.entries >> 16, layout.entries & 0xFFFF] = owner
    item = layout.item_ids[item_of[team, block % layout.ranks, slot]] if len(block) else np.zeros(0, np.int64)
    places = (layout.records[:, rows * 16 :] & PADDING).astype(np.int64)
    column = place_of_row(places) + layout.windows[0, block, cell % phases, 0].astype(np.int64)[:, None]
    slabs = layout.records[:, : rows * 16].reshape(-1, rows // 16, 8, 4, 2, 2, 2)
    slabs = slabs.transpose(0, 4, 3, 6, 1, 5, 2).reshape(-1, 16, rows)
    kept = places != PADDING
    group = np.repeat(item // parts, kept.sum(axis=1))
    part = np.repeat(item % parts, kept.sum(axis=1))
    order = np.lexsort((column[kept], group, part))
    total = len(order) // parts
    values = np.concatenate(np.split(slabs[kept][order], parts), axis=1) if parts > 1 else slabs[kept][order]
    indptr = np.zeros(layout.groups + 1, np.int64)
    np.cumsum(np.bincount(group[order][:total], minlength=layout.groups), out=indptr[1:])
    indices = column[kept][order][:total].astype(np.int32)
    return indices, np.ascontiguousarray(values).view(layout.dtype).reshape(-1, layout.v), indptr
