"""Fine-tuning towards the pattern: `prepare` -> train -> `finalize`.

`prepare` puts a mask on each weight as a parametrisation, so the training loop, the optimiser and the losses stay as
they are. `step()` after each optimiser step lets the sparsity rise on a cubic curve and searches the masks anew now
and then; what is masked keeps its last value and may come back at the next search. `finalize` packs what the last
masks keep.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrize

from ..arrays import host_array
from ..errors import ArgumentError, ShflnbError
from ..patterns import PruneResult, cubic_sparsity, prune, update_mask
from .convert import finish_patterns
from .decide import Options, sparsity_of
from .eligible import FilterFn, find_layers
from .report import Report

__all__ = ["Preparation", "ShflMask", "finalize", "prepare"]


class ShflMask(nn.Module):
    """Parametrisation of a weight: `weight * mask`, the mask in the Shfl-BW pattern of `row_perm` and `block`."""

    mask: torch.Tensor
    row_perm: torch.Tensor

    def __init__(self, weight: torch.Tensor, block: tuple[int, int]) -> None:
        super().__init__()
        self.block = block
        self.retained = 1.0
        self.register_buffer("mask", torch.ones(weight.shape, dtype=torch.bool, device=weight.device))
        self.register_buffer("row_perm", torch.arange(weight.shape[0], dtype=torch.int32, device=weight.device))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight as the layer sees it."""
        return weight * self.mask

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        """Assigning to `layer.weight` sets the weight below the mask."""
        return weight

    def set_result(self, found: PruneResult) -> None:
        """Take over what a search found."""
        mask = found.mask if isinstance(found.mask, torch.Tensor) else torch.from_numpy(found.mask)
        with torch.no_grad():
            self.mask.copy_(mask)
            self.row_perm.copy_(torch.from_numpy(found.row_perm))
        self.retained = found.retained

    def result(self) -> PruneResult | None:
        """The mask as a `PruneResult` (without a weight) for the next search; None while nothing is masked."""
        if bool(self.mask.all()):
            return None
        mask = self.mask if self.mask.is_cuda else host_array(self.mask)
        row_perm = host_array(self.row_perm)
        counts = host_array(self.mask)[row_perm[:: self.block[0]]].sum(axis=1)
        return PruneResult(None, mask, row_perm, counts, self.retained, self.block)


class Preparation:
    """A model with masks on its weights, and the schedule they follow. Made by `prepare`."""

    def __init__(
        self,
        model: nn.Module,
        layers: dict[str, ShflMask],
        options: Options,
        *,
        steps: int,
        every: int,
        hysteresis: float,
    ) -> None:
        self.model, self.layers, self.options = model, layers, options
        self.steps, self.every, self.hysteresis = steps, every, hysteresis
        self.done = 0

    @property
    def progress(self) -> float:
        """Part of the final sparsity that is asked for now, 0 to 1: the cubic curve at the current step."""
        return cubic_sparsity(self.done, start=0, end=self.steps, final=1.0) if self.steps else 1.0

    def step(self) -> bool:
        """Count one optimiser step; search the masks anew every `every` steps and at the last. Whether it did."""
        self.done += 1
        due = self.done <= self.steps and (self.done % self.every == 0 or self.done == self.steps)
        if due:
            self.refresh()
        return due

    def refresh(self) -> None:
        """Set all masks for the sparsity of the current step.

        The first time the search finds the groups; after that they stay unless a new search keeps 2 % more, and columns
        that are kept now count `1 + hysteresis` times (`shflnb.patterns.update_mask`).
        """
        for name, mask in self.layers.items():
            target = sparsity_of(name, self.options) * self.progress
            try:
                mask.set_result(self._search(mask, self._original(name), target))
            except ShflnbError as error:
                raise type(error)(f"layer {name}: {error}") from error

    def _search(self, mask: ShflMask, weight: torch.Tensor, sparsity: float) -> PruneResult:
        options = dict(self.options.prune)
        previous = mask.result()
        if previous is None:
            return prune(weight, sparsity=sparsity, block=self.options.block, **options)
        regroup = None if options.pop("search") == "identity" else 0.02
        if self.done < self.steps:
            options["quality"] = "fast"
        return update_mask(weight, previous, sparsity=sparsity, hysteresis=self.hysteresis, regroup=regroup, **options)

    def _original(self, name: str) -> torch.Tensor:
        return self.model.get_submodule(name).parametrizations.weight.original.detach()

    def finalize(self, **options: Any) -> Report:
        """`finalize(model, **options)`."""
        return finalize(self.model, **options)

    def state_dict(self) -> dict[str, int]:
        """Where the schedule stands; the masks are buffers of the model."""
        return {"done": self.done}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on where a saved run stood, after the model's own `load_state_dict`."""
        self.done = int(state["done"])


def prepare(
    model: nn.Module,
    sparsity: float | Mapping[str, float] = 0.75,
    block: tuple[int, int] = (64, 64),
    *,
    steps: int,
    every: int | None = None,
    hysteresis: float = 0.1,
    search: str = "refined",
    budget: str = "layer",
    seed: int = 0,
    quality: str = "default",
    filter_fn: FilterFn | None = None,
    ignore: Sequence[str] = (),
) -> Preparation:
    """Put a mask on every layer that `sparsify_` would take, for training towards the pattern.

    Parameters
    ----------
    model : torch.nn.Module
        Changed in place: parametrisations on weights. Optimisers made before or after hold the same parameters.
    sparsity, block, search, budget, seed, quality, filter_fn, ignore
        As in `sparsify_`; the score is the magnitude of the weight at the time of each search.
    steps : int
        Optimiser steps over which the sparsity rises; 0 prunes at once. Train on after them with the masks fixed.
    every : int, optional
        Steps between two searches; default a tenth of `steps`.
    hysteresis : float
        Edge of weights that are kept now, so that masks settle: 0.1 counts them 1.1 times.

    Returns
    -------
    Preparation
        Call its `step()` after each optimiser step, and `finalize()` in the end.

    Raises
    ------
    ArgumentError
        An option is not allowed, or no layer is left to prune.

    Examples
    --------
    >>> import torch, shflnb.nn
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64))
    >>> preparation = shflnb.nn.prepare(model, 0.5, (16, 16), steps=0)
    >>> model(torch.randn(8, 64)).square().sum().backward()                       # train as ever
    >>> report = preparation.finalize()
    >>> model[0]
    ShflLinear(in_features=64, out_features=64, bias=True, sparsity=50.0%, block=(16, 16))
    """
    if steps < 0 or (every is not None and every < 1) or hysteresis < 0:
        raise ArgumentError(f"steps is {steps}, every {every}, hysteresis {hysteresis}; needed are >= 0, >= 1 and >= 0")
    options = Options(
        sparsity, block, ignore=tuple(ignore), filter_fn=filter_fn,
        prune={"search": search, "budget": budget, "seed": seed, "quality": quality},
    )  # fmt: skip
    found = find_layers(model, options.block, ignore=options.ignore, filter_fn=filter_fn)
    everything = {name for c in found for name in (c.name, *c.aliases)}
    layers: dict[str, ShflMask] = {}
    for candidate in found:
        if candidate.reason is None:
            sparsity_of(candidate.name, options, everything)
            module = model.get_submodule(candidate.name)
            mask = ShflMask(module.weight, options.block)
            parametrize.register_parametrization(module, "weight", mask, unsafe=True)
            layers[candidate.name] = mask
    if not layers:
        reasons = "; ".join(f"{c.name}: {c.reason}" for c in found[:5])
        raise ArgumentError(f"the model has no layer to prune ({reasons or 'no linear layers'})")
    preparation = Preparation(
        model, layers, options, steps=steps, every=every or max(1, steps // 10), hysteresis=hysteresis
    )
    if steps == 0:
        preparation.refresh()
    return preparation


def finalize(
    model: nn.Module, *, example_inputs: Any = None, policy: str = "always", timing: str = "eager", fuse: bool = True,
    measure_model: bool = True,
) -> Report:  # fmt: skip
    """Pack every layer that `prepare` put a mask on, with the mask it has, and take the parametrisations away.

    Parameters
    ----------
    model : torch.nn.Module
        Prepared; changed in place.
    example_inputs, policy, timing, fuse, measure_model
        As in `sparsify_`. Under "never_slower" a layer that would be slower becomes a dense layer again, with the same
        zeros in it.

    Returns
    -------
    Report

    Raises
    ------
    ArgumentError
        No layer of the model was prepared.
    """
    patterns: dict[str, tuple[np.ndarray, np.ndarray, float]] = {}
    block = (64, 64)
    for name, module in model.named_modules():
        mask = _mask_of(module)
        if mask is not None:
            patterns[name] = (host_array(mask.mask).copy(), host_array(mask.row_perm).copy(), mask.retained)
            block = mask.block
    if not patterns:
        raise ArgumentError("no layer of the model was prepared; call shflnb.nn.prepare(model, ...) before training")
    for name in patterns:
        parametrize.remove_parametrizations(model.get_submodule(name), "weight", leave_parametrized=True)
    options = Options(0.0, block, policy, timing, fuse)
    return finish_patterns(model, options, patterns, example_inputs, measure_model)


def _mask_of(module: nn.Module) -> ShflMask | None:
    if not parametrize.is_parametrized(module, "weight"):
        return None
    return next((p for p in module.parametrizations.weight if isinstance(p, ShflMask)), None)
