"""Which layers of a model can and should become sparse, and for every other one the reason why not."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..errors import ArgumentError
from .modules import ShflLinear

__all__ = ["Candidate", "FilterFn", "find_layers", "matches", "replace_module", "turn_off_fast_paths"]

FilterFn = Callable[[str, nn.Module], "bool | None"]

_HEAD_NAMES = {"classifier", "cls", "embed_out", "head", "heads", "lm_head", "output_projection", "qa_outputs", "score",
               "seq_relationship", "vocab_projector"}  # fmt: skip
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass
class Candidate:
    """A module that holds a matrix.

    `reason` is None for a layer that can become sparse, else it says why the layer stays as it is.
    """

    name: str
    kind: str
    shape: tuple[int, int] | None
    reason: str | None
    aliases: tuple[str, ...] = ()
    dense_bytes: int = 0


def find_layers(
    model: nn.Module, block: tuple[int, int], *, ignore: Sequence[str] = (), filter_fn: FilterFn | None = None
) -> list[Candidate]:
    """All modules of the model that hold a matrix, in order, each with the reason why it stays dense, if it does.

    Parameters
    ----------
    model : torch.nn.Module
    block : (v, tile_k)
    ignore : names or "re:" patterns
        A name leaves out that module and everything below it; "re:expression" whatever names the expression matches
        from the start (`re.match`). A name or pattern that matches nothing is refused.
    filter_fn : callable (name, module) -> True, False or None
        True takes a layer in although it is a head or tied or a subclass of `nn.Linear`, False leaves it out, None
        leaves it to the rules.

    Raises
    ------
    ArgumentError
        `ignore` has an entry that matches no module.
    """
    names = _names(model)
    check_patterns("ignore", ignore, [name for group in names.values() for name in group])
    owners = _owners(names)
    found = []
    for module, (name, *aliases) in names.items():
        parameters = dict(module.named_parameters(recurse=False))
        parametrised = parametrize.is_parametrized(module)
        weight = next((p for p in parameters.values() if p.dim() >= 2), None)
        if isinstance(module, parametrize.ParametrizationList):
            continue  # spoken for by the module whose weight it holds
        if weight is None and not parametrised and not isinstance(module, ShflLinear):
            continue
        reason = _reason(model, module, [name, *aliases], block, ignore, filter_fn, owners)
        shape = _shape(module, weight)
        nbytes = 0 if weight is None else weight.numel() * weight.element_size()
        found.append(Candidate(name, type(module).__name__, shape, reason, tuple(aliases), nbytes))
    return found


def matches(name: str, pattern: str) -> bool:
    """Whether a module name fits a name (itself or a parent) or a "re:" pattern."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    return name == pattern or name.startswith(pattern + ".")


def check_patterns(what: str, patterns: Iterable[str], names: Iterable[str]) -> None:
    """Refuse a name or pattern that no module has: most likely it is misspelt."""
    if isinstance(patterns, str):
        raise ArgumentError(f"{what} is the string {patterns!r}; expected a list of names and 're:' patterns")
    names = list(names)
    for pattern in patterns:
        try:
            hit = any(matches(name, pattern) for name in names)
        except re.error as error:
            raise ArgumentError(f"{what} has {pattern!r}, which is no regular expression: {error}") from None
        if not hit:
            some = ", ".join(name for name in names[:8] if name)
            raise ArgumentError(f"{what} has {pattern!r}, which matches no module; there are {some}, ...")


def replace_module(model: nn.Module, names: Iterable[str], module: nn.Module) -> None:
    """Put `module` at every one of the names."""
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)


def turn_off_fast_paths(model: nn.Module) -> None:
    """Keep torch's fused encoder from reading `linear1.weight` past the sparse layer that stands there."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and any(isinstance(c, ShflLinear) for c in module.children()):
            module.activation_relu_or_gelu = 0
        if isinstance(module, nn.TransformerEncoder) and any(isinstance(c, ShflLinear) for c in module.modules()):
            module.use_nested_tensor = False


def _names(model: nn.Module) -> dict[nn.Module, list[str]]:
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return names


def _owners(names: dict[nn.Module, list[str]]) -> dict[int, list[tuple[str, nn.Module]]]:
    """id(parameter) -> the modules that hold it, each with its first name."""
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for module, (name, *_) in names.items():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((name, module))
    return owners


def _shape(module: nn.Module, weight: torch.Tensor | None) -> tuple[int, int] | None:
    if isinstance(module, (ShflLinear, nn.Linear)):
        return int(module.out_features), int(module.in_features)
    if weight is None:
        return None
    return weight.shape[0], weight[0].numel()


def _reason(
    model: nn.Module, module: nn.Module, names: list[str], block: tuple[int, int], ignore: Sequence[str],
    filter_fn: FilterFn | None, owners: dict[int, list[tuple[str, nn.Module]]],
) -> str | None:  # fmt: skip
    if isinstance(module, ShflLinear):
        return "already sparse"
    for name in names:
        for pattern in ignore:
            if matches(name, pattern):
                return f"ignored ({pattern})"
    forced = None if filter_fn is None else filter_fn(names[0], module)
    if forced is not None and not forced:
        return "left out by filter_fn"
    return _hard_reason(model, module, names, block, bool(forced)) or (
        None if forced else _soft_reason(model, module, names, owners)
    )


def _hard_reason(
    model: nn.Module, module: nn.Module, names: list[str], block: tuple[int, int], forced: bool
) -> str | None:
    """Why this module cannot become a `ShflLinear`."""
    if not isinstance(module, nn.Linear):
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            return "an embedding: looked up, not multiplied"
        return f"a {type(module).__name__}: only torch.nn.Linear is packed"
    if names[0] == "":
        return "it is the model itself, which cannot be replaced in place: use ShflLinear.from_dense"
    if parametrize.is_parametrized(module):
        on = ", ".join(type(p).__name__ for group in module.parametrizations.values() for p in group)
        hint = (
            "call finalize() first"
            if "ShflMask" in on
            else "call torch.nn.utils.parametrize.remove_parametrizations first"
        )
        return f"parametrised ({on}): {hint}"
    for name in names:
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(parent, nn.MultiheadAttention):
            return "inside nn.MultiheadAttention, which reads the weight without calling the layer"
    if hasattr(module, "_hf_hook"):
        return "accelerate has put a hook on it: its weight may be elsewhere"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    if type(module) is not nn.Linear and not forced:
        kind = type(module).__name__
        return f"a subclass of nn.Linear ({kind}), which may compute something else; filter_fn can take it in"
    if any(getattr(hook, "__module__", "").startswith("torch.nn.utils") for hook in module._forward_pre_hooks.values()):
        return "a hook of torch.nn.utils rewrites its weight; remove it first"
    m, k = module.out_features, module.in_features
    if module.weight.dtype not in _DTYPES:
        return f"its weight is {module.weight.dtype}"
    if m < block[0]:
        return f"{m} rows, fewer than v = {block[0]}"
    if k < block[1]:
        return f"{k} columns, fewer than tile_k = {block[1]}"
    return None


def _soft_reason(
    model: nn.Module, module: nn.Module, names: list[str], owners: dict[int, list[tuple[str, nn.Module]]]
) -> str | None:
    """Why this module had better stay dense; `filter_fn` can say otherwise, except for tied weights."""
    for name, other in owners[id(module.weight)]:
        if other is not module:
            kind = "the embedding" if isinstance(other, nn.Embedding) else "the weight of"
            return f"tied: it shares its weight with {kind} {name}"
    if _is_output_embedding(model, module):
        return "output head (get_output_embeddings)"
    if any(name.rpartition(".")[2] in _HEAD_NAMES for name in names):
        return f"output head (named {names[0].rpartition('.')[2]})"
    rows = len(module.weight)
    if rows == _vocabulary(model) and module is _last_linear(model):
        return f"output head (last layer, {rows} rows as the vocabulary has entries)"
    return None


def _is_output_embedding(model: nn.Module, module: nn.Module) -> bool:
    getter: Any = getattr(model, "get_output_embeddings", None)
    return callable(getter) and getter() is module


def _vocabulary(model: nn.Module) -> int:
    return max((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), default=-1)


def _last_linear(model: nn.Module) -> nn.Module | None:
    last = None
    for module in model.modules():
        if isinstance(module, nn.Linear):
            last = module
    return last
