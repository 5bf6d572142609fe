"""Which layers keep their output feature-major, share one transpose, take over an activation, or go into a sum.

    token-major x --transpose--> fc1 (+ gelu) --feature-major--> fc2 --transpose (+ residual)--> token-major y
    token-major x --transpose--> shared by q, k and v

A pure function of what was observed and of the set of sparse layers, so it can be asked again when a layer stays dense.
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import dataclass, field

from .observe import Observation

__all__ = ["Plan", "components", "plan"]


@dataclass(frozen=True)
class Plan:
    """Layouts of the sparse layers.

    Attributes
    ----------
    feature_out : layers whose output stays feature-major
    feature_in : layers whose input arrives feature-major
    shared : groups of layers that share one transpose of their common input
    fused : layer -> (activation module that becomes an identity, activation)
    summed : layers whose output is made token-major by the sum that it goes into
    """

    feature_out: frozenset[str] = frozenset()
    feature_in: frozenset[str] = frozenset()
    shared: tuple[tuple[str, ...], ...] = ()
    fused: dict[str, tuple[str, str]] = field(default_factory=dict)
    summed: frozenset[str] = frozenset()

    def layout(self, name: str) -> str:
        """The order in which the layer hands on its result: "feature" or "token"."""
        return "feature" if name in self.feature_out else "token"

    def text(self, name: str) -> str:
        """The layer's row of a report: "token -> feature", or where a sum turns the result "token -> token (sum)"."""
        into = "feature" if name in self.feature_in else "token"
        return f"{into} -> {self.layout(name)}{' (sum)' if name in self.summed else ''}"

    def readers(self, name: str) -> int:
        """How many layers share the transpose of this layer's input (1: its own)."""
        return next((len(group) for group in self.shared if name in group), 1)


def plan(seen: Observation, sparse: Set[str], *, fuse: bool = True) -> Plan:
    """Plan the layouts for the given sparse layers.

    A layer's output stays feature-major if it reaches only sparse layers, through elementwise operations only, together
    with every layer whose output it meets on the way.
    """
    good = {name for name in sparse
            if name not in seen.escaped and seen.edges.get(name) and seen.edges[name] <= sparse}  # fmt: skip
    joined = _joined(seen.meets)
    feature_out = frozenset(name for name in good if joined.get(name, frozenset((name,))) <= good)
    # What arrives feature-major from one source must not arrive token-major from another call of the same layer.
    sources: dict[str, set[str]] = {}
    for source, readers in seen.edges.items():
        for reader in readers:
            sources.setdefault(reader, set()).add(source)
    feature_in = frozenset(name for name, found in sources.items() if name in sparse and found <= feature_out)
    groups = (tuple(n for n in group if n in sparse and n not in feature_in) for group in seen.shared)
    shared = tuple(group for group in groups if len(group) > 1)
    fused = {name: seen.fusable[name] for name in sorted(sparse & seen.fusable.keys())} if fuse else {}
    summed = frozenset(seen.summed & sparse) - feature_out if fuse else frozenset()
    return Plan(feature_out, feature_in, shared, fused, summed)


def components(seen: Observation, names: Iterable[str]) -> list[list[str]]:
    """Layers whose layouts depend on each other, together; in the order of the first call of each."""
    order = list(names)
    links = [frozenset((source, *readers)) for source, readers in seen.edges.items()]
    joined = _joined([*links, *seen.meets, *(frozenset(group) for group in seen.shared)])
    done: set[str] = set()
    result = []
    for name in order:
        if name not in done:
            group = joined.get(name, frozenset((name,)))
            result.append([n for n in order if n in group])
            done |= group
    return result


def _joined(sets: Iterable[frozenset[str]]) -> dict[str, frozenset[str]]:
    """Member -> union of all sets that hang together with it."""
    joined: dict[str, frozenset[str]] = {}
    for members in sets:
        union = members.union(*(joined[name] for name in members if name in joined))
        for name in union:
            joined[name] = union
    return joined
