"""`estimate`: the table of `sparsify_` before any pruning, from random patterns of the same size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import ArgumentError
from .decide import Options, Timer, Times, decide, sparsity_of
from .eligible import FilterFn, find_layers
from .facts import Facts, compute_dtype, facts_of, stand_in, unsupported
from .measure import call_us, device_name
from .modules import SHARE_ON, ShflLinear
from .observe import Observation, call_model, evaluation, observe
from .planner import Plan
from .predict import Gpu, gpu_named, predicted_us
from .report import LayerReport, Report

__all__ = ["estimate"]


def estimate(
    model: nn.Module,
    example_inputs: Any,
    sparsity: float | Mapping[str, float] = 0.75,
    block: tuple[int, int] = (64, 64),
    *,
    filter_fn: FilterFn | None = None,
    ignore: Sequence[str] = (),
    policy: str = "never_slower",
    timing: str = "eager",
    fuse: bool = True,
    device: Any = None,
    dtype: torch.dtype | None = None,
) -> Report:
    """What `sparsify_` would gain, layer by layer, before the work of pruning. The model is not changed.

    The dense layers are timed as they are, the sparse ones with random patterns of the same size in the planned
    layouts.

    Parameters
    ----------
    model : torch.nn.Module
        May lie on the meta device (`with torch.device("meta")`), so that a model too large to load can be judged.
    example_inputs : tensor, tuple or mapping
        Arguments of one forward pass of the size that will be used, on the model's device.
    sparsity, block, filter_fn, ignore, policy, timing, fuse
        As in `sparsify_`.
    device : torch.device, str or None
        Where to measure; default the model's device. The name of a GPU that is not there ("H200") gives a prediction
        from its measured rates instead, and the report says so.
    dtype : torch.dtype, optional
        Dtype to measure in; default that of the weights, or the autocast dtype. For a prediction 16-bit.

    Returns
    -------
    Report
        Of kind "estimate"; `basis` says whether the times were measured or predicted.

    Raises
    ------
    ArgumentError, DeviceError

    Examples
    --------
    >>> import torch, shflnb
    >>> with torch.device("meta"):
    ...     model = torch.nn.Sequential(torch.nn.Linear(4096, 14336), torch.nn.GELU(), torch.nn.Linear(14336, 4096))
    >>> report = shflnb.estimate(model, torch.empty(4096, 4096, device="meta"), device="H200")
    >>> report.basis, report["0"].decision
    ('predicted for NVIDIA H200, not measured', 'sparse')
    """
    options = Options(sparsity, block, policy, timing, fuse, ignore=tuple(ignore), filter_fn=filter_fn)
    found = find_layers(model, options.block, ignore=options.ignore, filter_fn=filter_fn)
    names = {c.name for c in found if c.reason is None}
    for name in names:
        sparsity_of(name, options, {alias for c in found for alias in (c.name, *c.aliases)})
    seen = observe(model, example_inputs, {model.get_submodule(name): name for name in names})
    place = _place(model, device)
    if isinstance(place, torch.device) and place.type not in SHARE_ON:
        seen.summed.clear()  # there nothing is turned
    asker = (
        _Predictor(model, seen, options, place)
        if isinstance(place, Gpu)
        else _Meter(model, seen, options, place, dtype)
    )
    reasons = {c.name: c.reason for c in found}
    for name in sorted(names):
        reasons[name] = asker.refuses(name) or (None if name in seen.calls else "the example inputs do not reach it")
    names = {name for name in names if reasons[name] is None}
    layout, times = decide(seen, names, options, asker.times)
    rows = []
    for candidate in found:
        row = LayerReport(
            candidate.name, candidate.kind, candidate.shape, "dense", reasons[candidate.name] or "",
            aliases=candidate.aliases, dense_bytes=candidate.dense_bytes,
        )  # fmt: skip
        if candidate.name in times:
            _fill(row, times[candidate.name], layout, seen, options)
        rows.append(row)
    report = Report("estimate", rows, asker.device, asker.dtype, timing, asker.basis, options.record())
    report.model_dense_us = asker.model_us(example_inputs)
    return report


def _fill(row: LayerReport, times: Times, layout: Plan, seen: Observation, options: Options) -> None:
    m, k = row.shape or (0, 0)
    calls = seen.tokens(row.name)
    row.n, row.calls = max(calls), sum(calls.values())
    row.dense_us, row.sparse_us = times.dense, times.sparse
    if not times.is_worth_it and options.policy == "never_slower":
        row.reason = "dense is as fast or faster"
        return
    v, tile_k = options.block
    columns = round((1.0 - sparsity_of(row.name, options)) * k * -(-m // v) / tile_k) * tile_k
    row.decision = "sparse"
    row.sparsity = 1.0 - min(1.0, columns * v / (m * k))
    row.sparse_bytes = round(row.dense_bytes * (1.0 - row.sparsity)) + 4 * columns
    row.reason = f"{times.dense / times.sparse:.2f}x faster" if times.is_worth_it else "policy always"
    row.layout = layout.text(row.name)
    row.fused = layout.fused[row.name][1] if row.name in layout.fused else None


def _place(model: nn.Module, device: Any) -> torch.device | Gpu:
    """The device to measure on, or the GPU to predict for."""
    if device is None:
        own = next((p.device for p in model.parameters()), torch.device("cpu"))
        return torch.device("cpu") if own.type == "meta" else own
    if isinstance(device, str) and device.partition(":")[0] not in ("cpu", "cuda"):
        return gpu_named(device)
    place = torch.device(device)
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ArgumentError(f"device is {device!r}, but torch sees no GPU; name one to predict for, such as 'H200'")
    if place.type == "cuda" and place.index is None:  # as tensors name it: "cuda" alone equals no tensor's device
        return torch.device("cuda", torch.cuda.current_device())
    return place


class _Meter:
    """Measures on a device that is there."""

    basis = "random patterns"

    def __init__(
        self, model: nn.Module, seen: Observation, options: Options, device: torch.device, dtype: torch.dtype | None
    ) -> None:
        self.model, self.seen, self.options, self.place, self.wanted = model, seen, options, device, dtype
        self.timer = Timer(options.timing)
        self.stand_ins: dict[tuple[Any, ...], ShflLinear] = {}
        self.layers: dict[str, ShflLinear] = {}
        self.dense: dict[tuple[Any, ...], Facts] = {}
        self.device = device_name(device)
        first = next(model.parameters(), torch.empty(0))
        self.dtype = str(dtype or compute_dtype(first))[6:]

    def refuses(self, name: str) -> str | None:
        """Why the layer cannot be sparse on this device."""
        linear = self.model.get_submodule(name)
        if self.place.type == "cuda" and (self.wanted or compute_dtype(linear.weight)) in (
            torch.float16,
            torch.bfloat16,
        ):
            return None
        return unsupported(linear) if linear.weight.device.type == self.place.type else self._unsupported_there()

    def _unsupported_there(self) -> str | None:
        if self.place.type == "cuda":
            return "the kernels of a GPU take float16 and bfloat16; pass dtype=torch.bfloat16"
        return None

    def facts(self, name: str) -> Facts:
        """The layer's own tensors, or random ones of their shape where these are elsewhere."""
        facts = facts_of(self.model.get_submodule(name))
        dtype = self.wanted or facts.dtype
        if facts.weight.device == self.place:
            return Facts(facts.weight, facts.bias, dtype)
        m, k = facts.weight.shape
        key = (m, k, dtype, facts.bias is not None)
        if key not in self.dense:
            weight = torch.randn(m, k, device=self.place, dtype=torch.float32).mul_(k**-0.5).to(dtype)
            bias = None if facts.bias is None else torch.zeros(m, device=self.place, dtype=dtype)
            self.dense[key] = Facts(weight, bias, dtype)
        return self.dense[key]

    def times(self, name: str, layout: Plan) -> Times:
        """Times of the layer as the plan has it."""
        facts = self.facts(name)
        if name not in self.layers:
            sparsity = sparsity_of(name, self.options)
            self.layers[name] = stand_in(facts, self.options.block, sparsity, self.stand_ins, self.options.budget)
        return self.timer.times(name, facts, self.layers[name], self.seen.tokens(name), layout)

    def model_us(self, example_inputs: Any) -> float | None:
        """The dense model's time on its own device, if that is the one measured on."""
        if any(p.device != self.place for p in self.model.parameters()) or self.wanted is not None:
            return None
        with evaluation(self.model, keep_fast_path=True):
            return call_us([lambda: call_model(self.model, example_inputs)], self.place, self.options.timing)


class _Predictor:
    """Predicts for a GPU that is not there."""

    dtype = "16-bit"

    def __init__(self, model: nn.Module, seen: Observation, options: Options, gpu: Gpu) -> None:
        self.model, self.seen, self.options, self.gpu = model, seen, options, gpu
        self.device = gpu.name
        self.basis = f"predicted for {gpu.name}, not measured"

    def refuses(self, name: str) -> None:
        """A prediction takes every layer."""

    def times(self, name: str, layout: Plan) -> Times:
        """Predicted times of all calls of one forward pass."""
        m, k = self.model.get_submodule(name).weight.shape
        density = 1.0 - sparsity_of(name, self.options)
        dense = sparse = 0.0
        for n, calls in Counter(self.seen.calls[name]).items():
            moved = 0.0 if name in layout.feature_in else k * n / layout.readers(name)
            # a sum that turns its operand moves what the sum alone would
            moved += 0.0 if name in layout.feature_out or name in layout.summed else m * n
            one = predicted_us(
                self.gpu, m, k, n, density, self.options.block[0], timing=self.options.timing, transposes=moved
            )
            dense, sparse = dense + calls * one[0], sparse + calls * one[1]
        return Times(dense, sparse)

    def model_us(self, example_inputs: Any) -> None:
        """Nothing is known of the rest of the model."""
