"""`sparsify_`: prune, pack and replace the layers of a model, and say of each one what was done and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import ArgumentError, ShflnbError
from ..formats import ShflBWMatrix, pack
from ..patterns import prune, score_matrix, share_budget
from .calibrate import input_norms
from .decide import Options, Timer, Times, decide, sparsity_of
from .eligible import Candidate, FilterFn, find_layers, replace_module, turn_off_fast_paths
from .facts import compute_dtype, facts_of, stand_in, unsupported
from .hf import attach, is_pretrained
from .measure import call_us, device_name
from .modules import SHARE_ON, SharedInput, ShflLinear
from .observe import Observation, call_model, evaluation, observe
from .planner import Plan, components, plan
from .report import LayerReport, Report

__all__ = ["sparsify_"]

Progress = Callable[[str, int, int], None]
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
          "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks")  # fmt: skip


def sparsify_(
    model: nn.Module,
    sparsity: float | Mapping[str, float] = 0.75,
    block: tuple[int, int] = (64, 64),
    *,
    score: Any = "magnitude",
    search: str = "refined",
    budget: str = "layer",
    seed: int = 0,
    quality: str = "default",
    calibration: Iterable[Any] | None = None,
    example_inputs: Any = None,
    filter_fn: FilterFn | None = None,
    ignore: Sequence[str] = (),
    policy: str = "never_slower",
    timing: str = "eager",
    fuse: bool = True,
    tokens: int = 2048,
    measure_model: bool = True,
    progress: Progress | bool | None = None,
) -> Report:
    """Make the linear layers of a model sparse, in place, where that makes them faster.

    Each layer is pruned to the Shfl-BW pattern, packed, timed against the dense layer on its own device, and replaced
    by a `ShflLinear` if it is faster. One group of layers that belong together is handled at a time and its dense
    weights are given up before the next, so a model that is larger than memory (mapped from a file) goes through.

    Parameters
    ----------
    model : torch.nn.Module
        Changed in place. Its weights decide the device and the dtype; under autocast the autocast dtype is measured.
    sparsity : float, or mapping of names and "re:" patterns to floats
        Part of each weight to remove; in a mapping the first entry that fits counts, "default" is for the rest.
    block : (v, tile_k)
    score, search, budget, seed, quality
        As in `shflnb.prune`. score="activation" needs `calibration`. Besides "layer" and "group" the budget may be
        "model": `sparsity` then holds for all layers together (with a mapping, for those of one entry) and each
        layer's share is found by one threshold; this needs the scores of all layers at once, in float32.
    calibration : iterable of inputs, optional
        Each like `example_inputs`; the norms of what goes into each layer weigh its columns.
    example_inputs : tensor, tuple or mapping, optional
        Arguments of one forward pass (`model(x)`, `model(*args)`, `model(**kwargs)`) of the size that will be used.
        Without them the layers are timed at `tokens` tokens each, layouts are not planned and nothing is fused.
    filter_fn : callable (name, module) -> True, False or None
        True takes a layer in against the rules for heads and subclasses, False leaves it out.
    ignore : list of names and "re:" patterns
    policy : "never_slower" or "always"
        "always" replaces every layer that can be, whatever its time.
    timing : "eager" or "graph"
        How the model will be called: plainly, or captured in a CUDA graph.
    fuse : bool
        Let the epilogue compute an activation module that follows a sparse layer; that module becomes `nn.Identity`.
    tokens : int
        Tokens to time at without `example_inputs`.
    measure_model : bool
        Time the whole model on `example_inputs` before and after.
    progress : callable (name, done, all), or True for a bar

    Returns
    -------
    Report
        A row for every layer that holds a matrix, also for those left dense, with the reason.

    Raises
    ------
    ArgumentError
        An option is not allowed, or an `ignore` entry matches nothing.
    ShflnbError
        A weight cannot be pruned (NaN, ...); the text names the layer.

    Examples
    --------
    >>> import torch, shflnb
    >>> model = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.GELU(), torch.nn.Linear(512, 256))
    >>> report = shflnb.sparsify_(model, 0.75, (32, 32), example_inputs=torch.randn(64, 256), policy="always")
    >>> [row.decision for row in report.rows], report["0"].fused
    (['sparse', 'sparse'], 'gelu')
    """
    options = Options(
        sparsity, block, policy, timing, fuse, tokens, tuple(_listed(ignore)), filter_fn,
        prune={"score": score, "search": search, "budget": "layer" if budget == "model" else budget, "seed": seed,
               "quality": quality},
    )  # fmt: skip
    activation_aware = isinstance(score, str) and score == "activation"
    if activation_aware and calibration is None:
        raise ArgumentError('score="activation" needs calibration=, an iterable of inputs of the model')
    if calibration is not None and not activation_aware:
        raise ArgumentError(
            f'calibration is given, but score is {score!r}, which does not use it; pass score="activation"'
        )
    work = _Work(model, options, find_layers(model, options.block, ignore=options.ignore, filter_fn=filter_fn))
    work.watch(example_inputs)
    if calibration is not None:
        work.calibrate(calibration)
    if budget == "model":
        work.share_budget()
    return _carry_out(work, example_inputs, measure_model, _shown(progress))


def finish_patterns(
    model: nn.Module,
    options: Options,
    patterns: Mapping[str, tuple[np.ndarray, np.ndarray, float]],
    example_inputs: Any,
    measure_model: bool,
) -> Report:
    """Replace the layers whose (mask, row_perm, retained) are given; the second half of `sparsify_`, for `finalize`."""
    found = find_layers(model, options.block, filter_fn=lambda name, module: True if name in patterns else None)
    for candidate in found:
        if candidate.reason is None and candidate.name not in patterns:
            candidate.reason = "not prepared for fine-tuning"
    work = _Work(model, options, found, patterns=patterns)
    work.watch(example_inputs)
    return _carry_out(work, example_inputs, measure_model, _shown(None))


def _carry_out(work: _Work, example_inputs: Any, measure_model: bool, progress: Progress) -> Report:
    model = work.model
    timed = measure_model and example_inputs is not None
    dense_us = work.model_us(example_inputs) if timed else None
    work.run(progress)
    if work.done and is_pretrained(model):
        attach(model, work.fused)
    sparse_us = work.model_us(example_inputs) if timed and work.done else None
    report = work.report()
    report.model_dense_us, report.model_sparse_us = dense_us, sparse_us
    return report


@dataclass
class _Work:
    """One run of `sparsify_`: what was found, what was decided, what is done."""

    model: nn.Module
    options: Options
    found: list[Candidate]
    seen: Observation = field(default_factory=Observation)
    norms: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, LayerReport] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)
    fused: dict[str, tuple[str, str]] = field(default_factory=dict)
    patterns: Mapping[str, tuple[np.ndarray, np.ndarray, float]] = field(default_factory=dict)
    is_planned: bool = False

    def __post_init__(self) -> None:
        self.timer = Timer(self.options.timing)
        self.names = [c.name for c in self.found if c.reason is None]
        everything = {name for c in self.found for name in (c.name, *c.aliases)}
        self.sparsities = {name: sparsity_of(name, self.options, everything) for name in self.names}

    def modules(self) -> dict[nn.Module, str]:
        """The layers that may become sparse -> their names."""
        return {self.model.get_submodule(name): name for name in self.names}

    def watch(self, example_inputs: Any) -> None:
        """Look at one forward pass, or assume `tokens` for every layer."""
        for name in list(self.names):
            reason = unsupported(self.model.get_submodule(name))
            if reason is not None:
                self._leave(name, reason)
        if example_inputs is None:
            if self.options.policy == "never_slower":
                self.seen = Observation(calls={name: [self.options.tokens] for name in self.names})
            return
        self.is_planned = True
        self.seen = observe(self.model, example_inputs, self.modules())
        if not any(self.model.get_submodule(name).weight.device.type in SHARE_ON for name in self.names):
            self.seen.summed.clear()  # elsewhere nothing is turned
        if self.options.policy == "never_slower":
            for name in [name for name in self.names if name not in self.seen.calls]:
                self._leave(name, "the example inputs do not reach it, so it was not timed")

    def calibrate(self, calibration: Iterable[Any]) -> None:
        """Collect the norms of the layers' inputs; a layer without them cannot be scored."""
        self.norms = input_norms(self.model, calibration, self.modules())
        for name in [name for name in self.names if name not in self.norms]:
            self._leave(name, "the calibration data does not reach it, so it cannot be scored")

    def share_budget(self) -> None:
        """One threshold for all layers of one asked sparsity: how sparse each of them shall be."""
        score = self.options.prune["score"]
        if not isinstance(score, str):
            raise ArgumentError(
                "budget='model' compares the scores of different layers; name a score, such as 'magnitude'"
            )
        for asked in sorted({self.sparsities[name] for name in self.names}):
            scores = {}
            for name in (name for name in self.names if self.sparsities[name] == asked):
                weight = self.model.get_submodule(name).weight.detach()
                try:
                    scores[name] = score_matrix(weight, score, norm=self.norms.get(name))
                except ShflnbError as error:
                    raise type(error)(f"layer {name}: {error}") from error
            shares = share_budget(scores, 1.0 - asked, block=self.options.block)
            self.sparsities.update({name: 1.0 - share for name, share in shares.items()})

    def _leave(self, name: str, reason: str) -> None:
        self.names.remove(name)
        for candidate in self.found:
            if candidate.name == name:
                candidate.reason = reason

    def model_us(self, example_inputs: Any) -> float:
        """Microseconds of one forward pass of the whole model."""
        device = next(self.model.parameters()).device
        with evaluation(self.model, keep_fast_path=True):
            return call_us([lambda: call_model(self.model, example_inputs)], device, self.options.timing)

    # -- layer by layer -----------------------------------------------------------------------------------------------

    def run(self, progress: Progress) -> None:
        """Decide on random patterns first; then prune what is worth it, group by group, and decide on the real ones."""
        total = len(self.names)
        expected = self._expected()
        ordered = [name for name in self.seen.order if name in expected]
        ordered += [name for name in self.names if name in expected and name not in self.seen.calls]
        for group in components(self.seen, ordered):
            layers: dict[str, ShflLinear] = {}
            for name in group:
                progress(name, len(self.done), total)
                layers[name] = self._pruned(name)
            self._commit(group, layers)
        self._arrange()

    def _expected(self) -> set[str]:
        """Layers that are worth pruning, by times on random patterns."""
        if self.options.policy == "always" or self.patterns:
            return set(self.names)
        stand_ins: dict[tuple[Any, ...], ShflLinear] = {}

        layers: dict[str, ShflLinear] = {}

        def measure(name: str, layout: Plan) -> Times:
            facts = facts_of(self.model.get_submodule(name))
            if name not in layers:
                layers[name] = stand_in(
                    facts, self.options.block, self.sparsities[name], stand_ins, self.options.budget
                )
            return self.timer.times(name, facts, layers[name], self.seen.tokens(name), layout)

        _, times = decide(self.seen, set(self.names), self.options, measure)
        for name, found in times.items():
            if not found.is_worth_it:
                self._dense_row(name, found, "dense is as fast or faster (random pattern)")
        return {name for name, found in times.items() if found.is_worth_it}

    def _packed(self, name: str, weight: torch.Tensor) -> tuple[ShflBWMatrix, float]:
        """The layer's packed weight and its retained score: searched, or by the mask that fine-tuning left."""
        if name in self.patterns:
            mask, row_perm, retained = self.patterns[name]
            packed = pack(weight, self.options.block, row_perm=row_perm, mask=mask, fill_in_warning=None)
            return packed, retained
        options = dict(self.options.prune)
        if name in self.norms:
            options["norm"] = self.norms[name]
        result = prune(weight, sparsity=self.sparsities[name], block=self.options.block, **options)
        return result.pack(), result.retained

    def _pruned(self, name: str) -> ShflLinear:
        linear = self.model.get_submodule(name)
        assert isinstance(linear, nn.Linear), "find_layers lets only these through"
        try:
            packed, retained = self._packed(name, linear.weight.detach())
        except ShflnbError as error:
            raise type(error)(
                f"layer {name}: {error} ({len(self.done)} layers before it are sparse already)"
            ) from error
        layer = ShflLinear.from_packed(
            packed, linear.bias, device=linear.weight.device, name=name, requires_grad=linear.weight.requires_grad
        )
        layer.training = linear.training
        for hooks in _HOOKS:
            setattr(layer, hooks, getattr(linear, hooks))
        self.rows[name] = LayerReport(
            name, "ShflLinear", (layer.out_features, layer.in_features), "sparse", "", retained=retained,
            sparsity=1.0 - packed.density, sparse_bytes=packed.nbytes,
        )  # fmt: skip
        return layer

    def _commit(self, group: list[str], layers: dict[str, ShflLinear]) -> None:
        """Time the packed layers of a group, put the good ones into the model and let their dense weights go."""
        timed = {name for name in group if name in self.seen.calls}

        def measure(name: str, layout: Plan) -> Times:
            facts = facts_of(self.model.get_submodule(name))
            return self.timer.times(name, facts, layers[name], self.seen.tokens(name), layout, fresh=True)

        _, times = decide(self.seen, timed, self.options, measure)
        for name in group:
            if name not in times:
                why = "the example inputs do not reach it" if self.is_planned else "no example inputs"
                self.rows[name].reason = f"policy always; not timed ({why})"
            elif times[name].is_worth_it or self.options.policy == "always":
                self._sparse_row(name, times[name])
            else:
                self._dense_row(name, times[name], "dense is as fast or faster with the pattern found")
                continue
            aliases = next(c.aliases for c in self.found if c.name == name)
            replace_module(self.model, (name, *aliases), layers[name])
            self.done.add(name)

    def _arrange(self) -> None:
        """Set the planned layouts, shared transposes and fused activations, now that the sparse layers are known."""
        layout = plan(self.seen, self.done, fuse=self.options.fuse)
        for name in self.done:
            layer = self.model.get_submodule(name)
            assert isinstance(layer, ShflLinear), "replaced in _commit"
            if self.is_planned and name in self.seen.calls:
                layer.layout, layer.joins_sum = layout.layout(name), name in layout.summed
                self.rows[name].layout = _layout_text(name, layout, layer.values.device.type in SHARE_ON)
        for group in layout.shared:
            shared = SharedInput(len(group))
            for name in group:
                layer = self.model.get_submodule(name)
                assert isinstance(layer, ShflLinear), "replaced in _commit"
                layer.share(shared)
        for name, (leaf, activation) in layout.fused.items():
            layer = self.model.get_submodule(name)
            assert isinstance(layer, ShflLinear), "replaced in _commit"
            layer.set_activation(activation)
            replace_module(self.model, [leaf], nn.Identity())
            self.rows[name].fused = activation
        self.fused = dict(layout.fused)
        turn_off_fast_paths(self.model)

    # -- the report ---------------------------------------------------------------------------------------------------

    def _sparse_row(self, name: str, times: Times) -> None:
        row = self.rows[name]
        row.dense_us, row.sparse_us = times.dense, times.sparse
        row.reason = f"{times.dense / times.sparse:.2f}x faster" if times.is_worth_it else "policy always"

    def _dense_row(self, name: str, times: Times, reason: str) -> None:
        m, k = self.model.get_submodule(name).weight.shape
        self.rows[name] = LayerReport(
            name, "Linear", (m, k), "dense", reason, dense_us=times.dense, sparse_us=times.sparse
        )

    def report(self) -> Report:
        """All rows in the order of the model."""
        rows = []
        for candidate in self.found:
            row = self.rows.get(candidate.name)
            if row is None:
                row = LayerReport(candidate.name, candidate.kind, candidate.shape, "dense", candidate.reason or "")
                if candidate.kind == "ShflLinear":
                    layer = self.model.get_submodule(candidate.name)
                    row.decision, row.sparsity = "sparse", 1.0 - layer.density
                    row.sparse_bytes = sum(t.numel() * t.element_size() for t in (layer.values, layer.indices))
            row.aliases = candidate.aliases
            row.dense_bytes = row.dense_bytes or candidate.dense_bytes
            calls = Counter(self.seen.calls.get(candidate.name, ()))
            row.n, row.calls = max(calls, default=None), sum(calls.values())
            rows.append(row)
        parameter = next(self.model.parameters(), torch.empty(0))
        return Report(
            "sparsified", rows, device_name(parameter.device), str(compute_dtype(parameter))[6:],
            self.options.timing, options=self.options.record(),
        )  # fmt: skip


def _layout_text(name: str, layout: Plan, is_shared: bool) -> str:
    readers, text = layout.readers(name), layout.text(name)
    return f"{text}, input transposed once for {readers}" if readers > 1 and is_shared else text


def _listed(ignore: Sequence[str]) -> Sequence[str]:
    if isinstance(ignore, str):
        raise ArgumentError(f"ignore is the string {ignore!r}; expected a list of names and 're:' patterns")
    return ignore


def _shown(progress: Progress | bool | None) -> Progress:
    if callable(progress):
        return progress
    if not progress:
        return lambda name, done, total: None
    from rich.console import Console

    console = Console(stderr=True)
    return lambda name, done, total: console.print(f"[{done + 1}/{total}] {name}", highlight=False)
