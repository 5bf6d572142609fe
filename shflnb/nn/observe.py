"""One forward pass watched: which layers run, on how many tokens, and where their outputs go.

The planner needs four facts that the module tree does not tell: which layer's output reaches which other layer
through nothing but elementwise operations (then it may stay feature-major on the way), which layers read the same
tensor (then one transpose serves them all), which activation module does nothing but activate one layer's output
(then the epilogue can do it), and which output does nothing but join a sum (then that sum can turn it). They are read
off one run of the dense model under a `TorchDispatchMode`; nothing is traced or rewritten.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["Observation", "call_model", "evaluation", "observe"]

_ACTIVATION_OPS = {"aten::gelu": "gelu", "aten::relu": "relu", "aten::silu": "silu"}
_KEEPING = {
    "aten::native_dropout",
    "aten::dropout",
    "aten::detach",
    "aten::alias",
    "aten::_to_copy",
    "aten::lift_fresh",
}
"""Operations that keep values in place and memory order, besides those that torch tags as pointwise."""
_RESHAPING = {"aten::view", "aten::_unsafe_view", "aten::reshape", "aten::unsqueeze", "aten::squeeze"}


@dataclass
class Observation:
    """What one forward pass showed of the watched layers.

    Attributes
    ----------
    calls : layer name -> tokens of each call, in order
    order : layer names in the order of their first call
    edges : layer name -> names of watched layers that its output reaches through elementwise operations only
    escaped : layer names whose output also goes elsewhere (attention, a norm, a residual sum, the model's output)
    meets : sets of layers whose outputs meet in an elementwise operation (gate * up): they share one layout
    shared : sets of layers that read one tensor, which nothing writes to in between
    fusable : layer name -> (name of the module that only activates its output, "relu" | "gelu" | "silu")
    summed : layer names whose outputs all go into a sum with an ordinary tensor of the same size, and nowhere else
    """

    calls: dict[str, list[int]] = field(default_factory=dict)
    edges: dict[str, set[str]] = field(default_factory=dict)
    escaped: set[str] = field(default_factory=set)
    meets: list[frozenset[str]] = field(default_factory=list)
    shared: list[tuple[str, ...]] = field(default_factory=list)
    fusable: dict[str, tuple[str, str]] = field(default_factory=dict)
    summed: set[str] = field(default_factory=set)

    @property
    def order(self) -> list[str]:
        """Names in the order of their first call."""
        return list(self.calls)

    def tokens(self, name: str) -> Counter[int]:
        """Tokens per call -> number of such calls in one forward pass."""
        return Counter(self.calls.get(name, ()))


def call_model(model: nn.Module, inputs: Any) -> Any:
    """`model(x)`, `model(*inputs)` or `model(**inputs)`, as the inputs are a tensor, a sequence or a mapping."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(inputs)


@contextlib.contextmanager
def evaluation(model: nn.Module, *, keep_fast_path: bool = False) -> Iterator[None]:
    """No gradients, and every module in eval mode; afterwards each one is back in the mode it had.

    torch's fused encoder path calls no submodule, so it is off in here unless `keep_fast_path` says otherwise.
    """
    training = [module for module in model.modules() if module.training]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    model.eval()
    torch.backends.mha.set_fastpath_enabled(fast_path and keep_fast_path)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for module in training:
            module.training = True


def observe(model: nn.Module, inputs: Any, names: dict[nn.Module, str]) -> Observation:
    """Run the model once on `inputs` and say what was seen of the layers in `names` (module -> name)."""
    watch = _Watch(names)
    handles = []
    for name, module in model.named_modules():
        if module in names:
            handles.append(module.register_forward_pre_hook(watch.enter_layer, prepend=True))
            handles.append(module.register_forward_hook(watch.leave_layer))
        elif _may_be_activation(module):
            watch.leaf_names[module] = name
            handles.append(module.register_forward_pre_hook(watch.enter_leaf, prepend=True))
            handles.append(module.register_forward_hook(watch.leave_leaf))
    try:
        with evaluation(model), watch:
            output = call_model(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    for leaf in tree_leaves(_plain(output)):
        if isinstance(leaf, torch.Tensor):
            watch.escape(leaf)
    return watch.result()


def _plain(output: Any) -> Any:
    return dict(output) if isinstance(output, Mapping) else output


def _may_be_activation(module: nn.Module) -> bool:
    return not any(True for _ in module.children()) and not any(True for _ in module.parameters(recurse=False))


@dataclass
class _Read:
    """Layers that read one tensor object, and the version they saw."""

    versions: set[int] = field(default_factory=set)
    layers: list[str] = field(default_factory=list)


class _Watch(TorchDispatchMode):
    """Follows tensors through the operations of one forward pass."""

    def __init__(self, names: dict[nn.Module, str]) -> None:
        super().__init__()
        self.names = names
        self.leaf_names: dict[nn.Module, str] = {}
        self.seen = Observation()
        # Tensor -> the layers whose output it is, up to elementwise operations.
        self.flow: Any = WeakIdKeyDictionary()
        # Tensor -> the one layer whose output it is, untouched.
        self.direct: Any = WeakIdKeyDictionary()
        self.reader: Any = WeakIdKeyDictionary()
        self.reads: list[_Read] = []
        self.uses: Counter[str] = Counter()
        self.sums: Counter[str] = Counter()
        self.leaf_calls: Counter[str] = Counter()
        self.activated: dict[str, Counter[tuple[str, str]]] = {}
        self.inside: str | None = None
        self.leaf: list[Any] | None = None

    # -- hooks --------------------------------------------------------------------------------------------------------

    def enter_layer(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        name = self.names[module]
        x = next((a for a in args if isinstance(a, torch.Tensor)), None)
        if self.inside is None and x is not None:
            self.seen.calls.setdefault(name, []).append(math.prod(x.shape[:-1]))
            for source in self.flow.get(x, ()):
                self.seen.edges.setdefault(source, set()).add(name)
            self._use(x)
            read = self.reader.get(x)
            if read is None:
                read = self.reader[x] = _Read()
                self.reads.append(read)
            read.versions.add(x._version)
            read.layers.append(name)
        self.inside = name

    def leave_layer(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        name = self.names[module]
        self.inside = None
        if isinstance(output, torch.Tensor):
            self.flow[output] = frozenset((name,))
            self.direct[output] = name

    def enter_leaf(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.leaf_calls[self.leaf_names[module]] += 1
        x = args[0] if len(args) == 1 and isinstance(args[0], torch.Tensor) else None
        source = None if x is None else self.direct.get(x)
        self.leaf = None if source is None else [source, x, []]

    def leave_leaf(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        leaf, self.leaf = self.leaf, None
        if leaf is not None and len(leaf[2]) == 1:
            func, read, out, plain = leaf[2][0]
            activation = _ACTIVATION_OPS.get(func)
            if activation is not None and plain and read is leaf[1] and out is output:
                found = self.activated.setdefault(leaf[0], Counter())
                found[self.leaf_names[module], activation] += 1

    # -- operations ---------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.inside is None:
            operands = [a for a in tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)]
            for operand in operands:
                self._use(operand)
            if func is torch.ops.aten.add.Tensor and len(operands) == 2 and len(args) == 2 and not kwargs:
                self._sum(*operands)
            if self.leaf is not None:
                plain = not kwargs or kwargs.get("approximate", "none") == "none"
                self.leaf[2].append((func._schema.name, operands[0] if operands else None, out, plain))
            if any(operand in self.flow for operand in operands):
                self._follow(func, operands, out)
        return out

    def _use(self, x: torch.Tensor) -> None:
        source = self.direct.get(x)
        if source is not None:
            self.uses[source] += 1

    def _sum(self, a: torch.Tensor, b: torch.Tensor) -> None:
        for term, other in ((a, b), (b, a)):
            source = self.direct.get(term)
            if source is not None and other not in self.flow and other.is_contiguous():
                self.sums[source] += (other.shape, other.dtype) == (term.shape, term.dtype)

    def _follow(self, func: Any, operands: list[torch.Tensor], out: Any) -> None:
        flows = [self.flow[x] for x in operands if x in self.flow]
        sources = frozenset().union(*flows)
        name = func._schema.name
        if isinstance(out, torch.Tensor) and not _breaks_layout(func, name, operands, out, self.flow):
            self.flow[out] = sources
            if len(sources) > 1:
                self.seen.meets.append(sources)
        else:
            self.seen.escaped |= sources

    def escape(self, x: torch.Tensor) -> None:
        """Somebody outside the model reads `x`."""
        self.seen.escaped |= self.flow.get(x, frozenset())
        self._use(x)

    def result(self) -> Observation:
        seen = self.seen
        groups = {tuple(read.layers) for read in self.reads if len(read.layers) > 1 and len(read.versions) == 1}
        grouped = Counter(name for group in groups for name in set(group))
        # A layer that reads with one company now and another then is left alone.
        seen.shared = [group for group in sorted(groups) if all(grouped[name] == 1 for name in group)
                       and len(set(group)) == len(group)]  # fmt: skip
        for name, found in self.activated.items():
            (leaf, activation), times = found.most_common(1)[0]
            calls = len(seen.calls[name])
            if times == calls and self.uses[name] == calls and self.leaf_calls[leaf] == calls:
                seen.fusable[name] = (leaf, activation)
        seen.summed = {name for name, times in self.sums.items() if times == self.uses[name] == len(seen.calls[name])}
        return seen


def _breaks_layout(func: Any, name: str, operands: list[torch.Tensor], out: torch.Tensor, flow: Any) -> bool:
    """Whether the result of an operation is something else than its feature-major operand with other numbers."""
    if name in _RESHAPING:
        x = operands[0]
        return x.dim() < 2 or out.dim() < 2 or x.shape[-1] != out.shape[-1]
    if torch.Tag.pointwise not in func.tags and name not in _KEEPING:
        return True
    # A full-sized operand from elsewhere (a residual) is token-major: mixing the two orders is slow, so the flow ends.
    return any(x not in flow and x.numel() > x.shape[-1] for x in operands if x.dim() > 0)
