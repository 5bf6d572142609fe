"""Which rows belong together: an order of the rows in which every v of them, as a group, store few zeros.

A group stores the union of its rows' supports for each of its rows. Three steps, each on bit sets of 64 columns a word:

1. Rows of equal support make whole groups by themselves: a pattern without accidental zeros is recovered here, exactly.
2. What is left over is clustered: around the row with the most non-zeros gather the rows that lie in its support well
   beyond chance. A cluster that fills a group is one; this finds a pattern in which single weights happen to be zero.
3. Clusters too small for a group are merged, the merge that stores least first; rows without any non-zero fill gaps.

The given order is kept when it is no worse. Every choice is deterministic, and the work is bounded: rows that the
budget does not reach are sorted by their number of non-zeros.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

__all__ = ["find_row_order", "group_union", "stored_places"]

SCAN_BUDGET = 600_000_000
"""Words of 64 columns that each of steps 2 and 3 may look at, about 1.2 seconds each (2 ns a word, 2026-11)."""

CACHED_WORDS = 1 << 15
"""Words scanned at a time, so that intermediate results stay in the cache (4 times faster at 14336 rows, 2026-11)."""

SKETCH_WORDS = (8, 64)
"""Steps 2 and 3 look at no more than so many words of a row: at least 8 of them, up to 64 as the budget allows."""

LONELY_SEEDS = 128
"""Step 2 ends after so many rows in a row found no other row like them: there is no pattern to find."""

BEYOND_CHANCE = 0.4
"""How far from chance (0) to containment (1) a row's share inside a cluster's support must be to join the cluster."""


def group_union(packed_bits: np.ndarray, v: int) -> np.ndarray:
    """The union of the supports of every v rows (the last group may have fewer): uint64, (ceil(m / v), words)."""
    if 0 in packed_bits.shape:
        return np.zeros((-(-packed_bits.shape[0] // v), packed_bits.shape[1]), dtype=np.uint64)
    return np.bitwise_or.reduceat(packed_bits, np.arange(0, packed_bits.shape[0], v), axis=0)


def stored_places(bits: np.ndarray, v: int, order: np.ndarray) -> int:
    """Value places stored when the rows stand in `order`: kept columns times rows, summed over the groups."""
    counts = _popcount(group_union(bits[order], v))
    rows = np.minimum(v, len(bits) - v * np.arange(len(counts)))
    return int((counts * rows).sum())


def find_row_order(bits: np.ndarray, v: int) -> np.ndarray:
    """An order of the rows, int32 (m,), that groups them well; the given order when no better one is found.

    Parameters
    ----------
    bits : uint64 array, shape (m, words)
        The support of each row as a bit set (the order of columns within a word does not matter).
    v : int
        Rows per group; the last group holds m % v rows if that is not zero.
    """
    given = np.arange(len(bits), dtype=np.int32)
    best, best_stored = given, stored_places(bits, v, given)
    nnz = int(_popcount(bits).sum())
    if best_stored == nnz:
        return best
    search = _Search(bits, v)
    for zeros_apart in (True, False):
        order = search.run(zeros_apart)
        stored = stored_places(bits, v, order)
        if stored < best_stored:
            best, best_stored = order, stored
        if best_stored == nnz or not search.has_zero_groups:
            break
    return best


def _popcount(bits: np.ndarray) -> np.ndarray:
    """Set bits of each row, int64."""
    return np.bitwise_count(bits).sum(axis=-1, dtype=np.int64)


@dataclass
class _Pool:
    """Clusters that are no whole group yet: their rows, the union of their supports, and how many rows are left."""

    rows: list[np.ndarray]
    bits: np.ndarray
    size: np.ndarray = field(init=False)
    nnz: np.ndarray = field(init=False)
    scanned: int = 0

    def __post_init__(self) -> None:
        self.size = np.array([len(r) for r in self.rows], dtype=np.int64)
        self.nnz = _popcount(self.bits)

    def overlap(self, ids: np.ndarray, union: np.ndarray) -> np.ndarray:
        """Columns that each cluster of `ids` shares with `union`."""
        self.scanned += len(ids) * len(union)
        out = np.empty(len(ids), dtype=np.int64)
        step = max(1, CACHED_WORDS // len(union))
        for start in range(0, len(ids), step):
            part = self.bits[ids[start : start + step]]
            part &= union
            np.sum(np.bitwise_count(part), axis=1, dtype=np.int64, out=out[start : start + step])
        return out

    def take(self, i: int, count: int) -> np.ndarray:
        """Remove and return up to `count` rows of cluster i."""
        taken, self.rows[i] = self.rows[i][:count], self.rows[i][count:]
        self.size[i] = len(self.rows[i])
        return taken

    def alive(self) -> np.ndarray:
        return np.flatnonzero(self.size)


class _Search:
    """The three steps for one matrix and one v."""

    def __init__(self, bits: np.ndarray, v: int) -> None:
        self.v = v
        first, labels = _classes(bits)
        by_class = np.argsort(labels, kind="stable")
        ends = np.cumsum(np.bincount(labels, minlength=len(first)))[:-1]
        self.members = np.split(by_class, ends)
        self.empty = _popcount(bits[first]) == 0
        self.has_zero_groups = any(self.empty[i] and len(rows) >= v for i, rows in enumerate(self.members))
        self.sketch = _sketch(bits, v)

    def run(self, zeros_apart: bool) -> np.ndarray:
        """One order; `zeros_apart` makes whole groups of empty rows first, else they are kept for filling gaps."""
        v = self.v
        whole: list[np.ndarray] = []
        rest: list[np.ndarray] = []
        for rows, empty in zip(self.members, self.empty, strict=True):
            full = 0 if empty and not zeros_apart else len(rows) // v * v
            whole.extend(rows[:full].reshape(-1, v))
            if full < len(rows):
                rest.append(rows[full:])
        if rest:
            pool = _Pool(rest, self.sketch[[rows[0] for rows in rest]])
            found, pool = _cluster(pool, v)
            whole += found
            whole += _merge(pool, v)
        return np.concatenate(whole).astype(np.int32)


def _sketch(bits: np.ndarray, v: int) -> np.ndarray:
    """Evenly spaced words of each row: as many as the budget has for 5 scans of half the rows for every group."""
    m, words = bits.shape
    affordable = int(0.4 * SCAN_BUDGET * v / max(m, 1) ** 2)
    used = min(words, max(SKETCH_WORDS[0], min(SKETCH_WORDS[1], affordable)))
    if used == words:
        return bits
    return np.ascontiguousarray(bits[:, np.linspace(0, words - 1, used).astype(np.int64)])


def _classes(bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First row of each class of equal supports, in the order of first rows, and the class of each row."""
    as_one = np.ascontiguousarray(bits).view(np.dtype((np.void, bits.shape[1] * 8))).ravel()
    _, first, labels = np.unique(as_one, return_index=True, return_inverse=True)
    rank = np.argsort(first)
    place = np.empty_like(rank)
    place[rank] = np.arange(len(rank))
    return first[rank], place[labels.ravel()]


def _cluster(pool: _Pool, v: int) -> tuple[list[np.ndarray], _Pool]:
    """Step 2: whole groups found around dense rows, and the pool of what stays smaller than a group."""
    whole: list[np.ndarray] = []
    parts: list[np.ndarray] = []
    unions: list[np.ndarray] = []
    lonely = 0
    for seed in np.argsort(-pool.nnz, kind="stable"):
        if lonely >= LONELY_SEEDS or pool.scanned > SCAN_BUDGET or pool.nnz[seed] == 0:
            break
        if pool.size[seed] == 0:
            continue
        rows, union = _gather_alike(pool, int(seed), v)
        lonely = 0 if len(rows) > 1 else lonely + 1
        if len(rows) == v:
            whole.append(rows)
        else:
            parts.append(rows)
            unions.append(union)
    for i in pool.alive():
        parts.append(pool.rows[i])
        unions.append(pool.bits[i])
    bits = np.array(unions, dtype=np.uint64).reshape(len(parts), pool.bits.shape[1])
    return whole, _Pool(parts, bits)


def _gather_alike(pool: _Pool, seed: int, v: int) -> tuple[np.ndarray, np.ndarray]:
    """Up to v rows whose support lies beyond chance in that of the growing cluster, and the union of their supports."""
    union = pool.bits[seed].copy()
    got = [pool.take(seed, v)]
    need = v - len(got[0])
    width = 64 * len(union)
    while need:
        ids = pool.alive()
        overlap, nnz = pool.overlap(ids, union), pool.nnz[ids]
        inside = int(_popcount(union))
        chance = inside / width
        alike = (nnz > 0) & (overlap >= (chance + BEYOND_CHANCE * (1 - chance)) * nnz)
        if not alike.any():
            break
        ids, overlap, nnz = ids[alike], overlap[alike], nnz[alike]
        order = np.argsort(-overlap / (nnz + inside - overlap), kind="stable")
        # Half of the places at a time: the union of the best half tells members from strangers better than one row.
        need = _take_in_order(pool, ids[order], need, -(-need // 2), got, union)
    return np.concatenate(got), union


def _take_in_order(
    pool: _Pool, ids: np.ndarray, need: int, quota: int, got: list[np.ndarray], union: np.ndarray
) -> int:
    """Take clusters in order until `quota` rows (at most `need`) are there; returns how many are still needed."""
    stop = need - quota
    for i in ids:
        taken = pool.take(int(i), need)
        got.append(taken)
        union |= pool.bits[i]
        need -= len(taken)
        if need <= stop:
            break
    return need


def _merge(pool: _Pool, v: int) -> list[np.ndarray]:
    """Step 3: groups of v rows from what is left, and last what does not fill a group."""
    whole: list[np.ndarray] = []
    left = int(pool.size.sum()) // v
    # Large clusters first, then dense ones; empty rows never start a group while others are left.
    seeds = np.lexsort((-pool.nnz, -pool.size * (pool.nnz > 0), pool.nnz == 0))
    for seed in seeds:
        while left and pool.size[seed] and pool.scanned <= SCAN_BUDGET:
            whole.append(_gather_cheapest(pool, int(seed), v))
            left -= 1
    ids = pool.alive()
    ids = ids[np.argsort(-pool.nnz[ids], kind="stable")]
    return whole + [pool.rows[i] for i in ids]


def _gather_cheapest(pool: _Pool, seed: int, v: int) -> np.ndarray:
    """v rows, grown from the seed by the clusters that add the fewest stored places per row."""
    union = pool.bits[seed].copy()
    got = [pool.take(seed, v)]
    need = v - len(got[0])
    while need:
        ids = pool.alive()
        have, inside = v - need, int(_popcount(union))
        nnz, count = pool.nnz[ids], np.minimum(pool.size[ids], need)
        joined = inside + nnz - pool.overlap(ids, union)
        added = (joined * (have + count) - inside * have - nnz * count) / count
        quota = -(-need // 2)
        best = np.argpartition(added, quota - 1)[:quota] if quota < len(ids) else np.arange(len(ids))
        order = best[np.lexsort((-count[best], added[best]))]
        need = _take_in_order(pool, ids[order], need, quota, got, union)
    return np.concatenate(got)
