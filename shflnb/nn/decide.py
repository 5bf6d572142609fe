"""Sparse or dense, layer by layer: measure both in the layouts of the plan, and never keep the slower one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..errors import ArgumentError
from ..formats.shflbw import check_block
from .eligible import FilterFn, check_patterns, matches
from .facts import Facts
from .measure import COLD_BELOW, TIMINGS, call_us, dense_call, sparse_call, transpose_us
from .modules import SHARE_ON, ShflLinear
from .observe import Observation
from .op import FEW_TOKENS
from .planner import Plan, plan

__all__ = ["POLICIES", "Options", "Timer", "Times", "decide", "sparsity_of"]

POLICIES = ("never_slower", "always")
MARGIN = 0.98
"""A layer becomes sparse if it takes at most this part of the dense time, so that noise does not decide."""

LAUNCH_MARGIN_US = 1.0
"""On a GPU it must also save this much a call: calls measured in a row hide part of each other's launch, which other
neighbours in a model do not (up to 0.9 us at 512 x 512; H200, 2026-11-22)."""


@dataclass(frozen=True)
class Options:
    """The choices of `sparsify_` and `estimate`, checked when made."""

    sparsity: float | Mapping[str, float] = 0.75
    block: tuple[int, int] = (64, 64)
    policy: str = "never_slower"
    timing: str = "eager"
    fuse: bool = True
    tokens: int = 2048
    ignore: tuple[str, ...] = ()
    filter_fn: FilterFn | None = None
    prune: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "block", check_block(self.block))
        wanted = self.sparsity.values() if isinstance(self.sparsity, Mapping) else (self.sparsity,)
        for value in wanted:
            if not isinstance(value, (int, float)) or not 0.0 <= value <= 1.0:
                raise ArgumentError(
                    f"sparsity is {value!r}; needed is a fraction from 0 (keep all) to 1 (keep nothing)"
                )
        for name, choice, allowed in (("policy", self.policy, POLICIES), ("timing", self.timing, TIMINGS)):
            if choice not in allowed:
                raise ArgumentError(f"{name} is {choice!r}; expected one of {', '.join(allowed)}")
        if self.tokens < 1:
            raise ArgumentError(f"tokens is {self.tokens}; expected at least 1")

    @property
    def budget(self) -> str:
        """How the kept weights of a layer are spread over its groups."""
        return str(self.prune.get("budget", "layer"))

    def record(self) -> dict[str, Any]:
        """The options as plain data for a report."""
        sparsity = dict(self.sparsity) if isinstance(self.sparsity, Mapping) else self.sparsity
        return {
            "sparsity": sparsity, "block": list(self.block), "policy": self.policy, "fuse": self.fuse,
            "ignore": list(self.ignore), **{key: v for key, v in self.prune.items() if isinstance(v, (str, int))},
        }  # fmt: skip


def sparsity_of(name: str, options: Options, names: Set[str] | None = None) -> float:
    """Sparsity asked for a layer; with a mapping of names and "re:" patterns the first that fits, else 0.75."""
    if not isinstance(options.sparsity, Mapping):
        return float(options.sparsity)
    if names is not None:
        check_patterns("sparsity", [key for key in options.sparsity if key != "default"], names)
    for pattern, value in options.sparsity.items():
        if pattern != "default" and matches(name, pattern):
            return float(value)
    return float(options.sparsity.get("default", 0.75))


@dataclass(frozen=True)
class Times:
    """Microseconds of all calls of one forward pass."""

    dense: float
    sparse: float
    least_saving: float = 0.0
    """Microseconds that sparse must save beside the margin."""

    @property
    def is_worth_it(self) -> bool:
        """Whether sparse is faster by more than the noise."""
        return self.sparse <= min(MARGIN * self.dense, self.dense - self.least_saving)


class Timer:
    """Measures layers and remembers what it measured, so that a model of equal blocks is measured once."""

    def __init__(self, timing: str) -> None:
        self.timing = timing
        self._known: dict[tuple[Any, ...], float] = {}
        self._confirmed: set[tuple[Any, ...]] = set()

    def times(
        self, name: str, facts: Facts, layer: ShflLinear, tokens: Counter[int], layout: Plan, *, fresh: bool = False
    ) -> Times:
        """Times of one layer in the layouts of the plan; `fresh` measures the sparse side again, for a new pattern."""
        counts = {n: calls for n, calls in tokens.items() if n}
        margin = LAUNCH_MARGIN_US * sum(counts.values()) if layer.values.device.type == "cuda" else 0.0

        def dense(again: bool = False) -> float:
            return sum(calls * self._dense(name, facts, n, layout, again) for n, calls in counts.items())

        def sparse(fresh: bool, again: bool = False) -> float:
            return sum(calls * self._sparse(name, layer, facts, n, layout, fresh, again) for n, calls in counts.items())

        found = Times(dense(), sparse(fresh), margin)
        # The side that loses is looked at again: a disturbed time was 3 times too long (H100, 2026-11-26).
        for _ in range(2):
            if not found.is_worth_it:
                found = replace(found, sparse=sparse(False, again=True))
            if found.is_worth_it:
                found = replace(found, dense=dense(again=True))
        return found

    def _measured(
        self, key: tuple[Any, ...], make: Callable[[], Any], n: int, device: torch.device, *, fresh: bool, again: bool
    ) -> float:
        """The time of the calls that `make` makes: as remembered, measured anew if `fresh`; with `again` the smaller of
        two, the second measured after other work.
        """
        if fresh or key not in self._known:
            self._known[key] = call_us(make(), device, self.timing, is_cold=n < COLD_BELOW)
            self._confirmed.discard(key)
        elif again and key not in self._confirmed:
            self._known[key] = min(self._known[key], call_us(make(), device, self.timing, is_cold=n < COLD_BELOW))
            self._confirmed.add(key)
        return self._known[key]

    def _dense(self, name: str, facts: Facts, n: int, layout: Plan, again: bool) -> float:
        w, activation, summed = facts.weight, _fused(name, layout), name in layout.summed
        key = ("dense", tuple(w.shape), n, facts.dtype, w.device, facts.bias is not None, activation, summed)

        def make() -> Any:
            return dense_call(w, facts.bias, n, facts.dtype, activation, summed=summed)

        return self._measured(key, make, n, w.device, fresh=False, again=again)

    def _sparse(
        self, name: str, layer: ShflLinear, facts: Facts, n: int, layout: Plan, fresh: bool, again: bool
    ) -> float:
        device, k, activation = layer.values.device, layer.in_features, _fused(name, layout)
        out, readers, summed = layout.layout(name), layout.readers(name), name in layout.summed
        shares = readers > 1 and device.type in SHARE_ON and n > FEW_TOKENS
        feature_in = name in layout.feature_in or shares
        longest = int(layer.indptr.diff().max()) if layer.indptr.numel() > 1 else 0
        key = ("sparse", layer.out_features, k, layer.block, layer.values.shape[0], longest, n, facts.dtype, device,
               layer.bias is not None, activation, feature_in, out, summed)  # fmt: skip

        def make() -> Any:
            return sparse_call(layer, n, facts.dtype, feature_in=feature_in, layout=out, activation=activation,
                               summed=summed)  # fmt: skip

        us = self._measured(key, make, n, device, fresh=fresh, again=again)
        return us + (self._transpose(n, k, layer, facts.dtype) / readers if shares else 0.0)

    def _transpose(self, n: int, k: int, layer: ShflLinear, dtype: torch.dtype) -> float:
        key = ("transpose", n, k, dtype, layer.values.device)
        if key not in self._known:
            self._known[key] = transpose_us(n, k, layer.values, dtype, self.timing)
        return self._known[key]


def _fused(name: str, layout: Plan) -> str | None:
    """The activation that the plan fuses into a layer."""
    return layout.fused[name][1] if name in layout.fused else None


def decide(
    seen: Observation,
    names: Set[str],
    options: Options,
    measure: Callable[[str, Plan], Times],
    *,
    others: Set[str] = frozenset(),
) -> tuple[Plan, dict[str, Times]]:
    """Choose which of the layers `names` become sparse.

    Dropping a layer can only take layouts away from the others, so the set shrinks to the largest one in which no
    layer is slower than dense.

    Parameters
    ----------
    seen : Observation
    names : layers to decide on
    measure : callable (name, plan) -> Times
    others : layers that are sparse whatever comes out

    Returns
    -------
    plan : layouts with the chosen layers sparse
    times : name -> last times measured, of the chosen and of the dropped layers; the chosen are those in which
        `is_worth_it` (all of them under the policy "always")
    """
    sparse = set(names)
    times: dict[str, Times] = {}
    while True:
        layout = plan(seen, sparse | others, fuse=options.fuse)
        for name in sorted(sparse):
            times[name] = measure(name, layout)
        worse = {name for name in sparse if not times[name].is_worth_it}
        if options.policy == "always" or not worse:
            return layout, times
        sparse -= worse
