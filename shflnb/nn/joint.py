"""The products of layers that read the same few tokens, as one launch: q, k and v; gate and up.

    q(x)   computes q, k and v of x, and keeps those of k and v
    k(x)   takes its own, if this is the same tensor with the same contents
    v(x)   takes its own; nothing is kept any more

In eager inference on a GPU that has the few-column kernel, and where that kernel stores the results of all layers
itself. Results are those of each layer alone within rounding: the number of blocks that share a sum may differ. Nothing
is copied for it: the kernel reads each layer's own weights, and a result is a tensor of its own in an allocation that
they share.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..kernels.views import torch_stream
from .op import FEW_TOKENS, dispatch_state, is_plain_call
from .record import launch_record

if TYPE_CHECKING:
    from .modules import ShflLinear

__all__ = ["JointProducts", "few_layout", "stream_of"]

MISSES = 2
"""So often a layer may leave its result; then the layers go alone for good."""


class JointProducts:
    """What the layers that read one tensor compute together.

    Layers are known by weak references, and so are their weights: an optimiser step, `load_state_dict` or `.to()` makes
    new launch records (see `record.py`), and then the joint ones are made anew. A result waits for one tensor object,
    one version of its contents, one stream and one capture; it goes when the tensor goes. A model that calls only some
    of the layers pays for the others twice at most.
    """

    def __init__(self, readers: int) -> None:
        self.readers = readers
        self.misses = 0
        self._members: tuple[weakref.ref[ShflLinear], ...] = ()
        self._joint: _Joint | None = None
        self._waiting: _Waiting | None = None

    def add(self, layer: ShflLinear) -> None:
        """Let the layer take part, unless there are as many as there shall be."""
        others = tuple(ref for ref in self._members if ref() is not None and ref() is not layer)
        if len(others) < self.readers:
            self._members, self._joint, self._waiting = (*others, weakref.ref(layer)), None, None

    def result(self, layer: ShflLinear, x: torch.Tensor) -> torch.Tensor | None:
        """`layer(x)` where no gradient is wanted, by a joint launch; None where the layer has to compute it alone.

        Raises
        ------
        CaptureError
            The joint launch would have to be prepared while a CUDA graph is captured.
        """
        if self.misses >= MISSES or len(self._members) < self.readers:
            return None
        place = self._place(layer)
        own = None if place < 0 else _own(layer, x.dtype)
        if own is None:
            return None
        waiting = self._waiting
        if waiting is not None and waiting.source() is x and waiting.joint.holds(place, own):
            piece = waiting.pieces.pop(place, None) if waiting.stamp == _stamp(x) else None
            if not waiting.pieces:
                self._waiting = None
            if piece is not None:
                return waiting.memo.view(piece, place)
        if not is_plain_call(x, own.values, own.bias):
            return None
        joint = self._joint
        if joint is None or not joint.holds(place, own):
            joint = self._joint = self._made(x.dtype)
        memo = None if joint is None else joint.memo(x)
        if joint is None or memo is None:
            return None
        if waiting is not None and waiting is self._waiting and waiting.joint is joint:
            self._missed()
        return None if self.misses >= MISSES else self._compute(joint, memo, place, x)

    def _place(self, layer: ShflLinear) -> int:
        for number, ref in enumerate(self._members):
            if ref() is layer:
                return number
        return -1

    def _made(self, dtype: torch.dtype) -> _Joint | None:
        layers = [layer for layer in (ref() for ref in self._members) if layer is not None]
        if len(layers) < self.readers:
            self._members = tuple(weakref.ref(layer) for layer in layers)
            return None
        found = [own for own in (_own(layer, dtype) for layer in layers) if own is not None]
        if len(found) < self.readers:
            return None
        return _Joint(found, functools.partial(_drop_joint, weakref.ref(self)))

    def _compute(self, joint: _Joint, memo: _Memo, place: int, x: torch.Tensor) -> torch.Tensor:
        """The results of all layers: that at `place` at once, the others for later."""
        stamp = _stamp(x)
        out = x.new_empty(memo.values)
        launch(memo.road, stamp[2], x, out)
        # Not views of `out`: each has a version counter of its own.
        pieces = dict(enumerate(torch.unsafe_split_with_sizes(out, memo.sizes)))
        piece = pieces.pop(place)
        self._waiting = _Waiting(weakref.ref(x, self._forget_results), stamp, joint, memo, pieces)
        return memo.view(piece, place)

    def _missed(self) -> None:
        self.misses += 1
        self._waiting = None

    def _forget_results(self, source: Any) -> None:
        waiting = self._waiting
        if waiting is not None and waiting.source is source:
            self._missed()


def _drop_joint(owner: weakref.ref[JointProducts], record: Any) -> None:
    """A launch record went, and with it the weights of a layer: let their device memory go, too."""
    joints = owner()
    if joints is not None and joints._joint is not None and record in joints._joint.records:
        joints._joint = None


class _Own(NamedTuple):
    """What a layer's product depends on, beside x."""

    values: torch.Tensor
    bias: torch.Tensor | None
    packed: Any
    """Its launch record: another one as soon as the weights are others."""
    rest: tuple[Any, ...]
    """Activation and layout, address and dtype of the bias."""


def _own(layer: ShflLinear, dtype: torch.dtype) -> _Own | None:
    """The `_Own` of a layer; None where its tensors are no plain parameters."""
    parameters, buffers = layer._parameters, layer._buffers  # nn.Module's attribute access takes 0.5 us each
    values, bias = parameters.get("values"), parameters.get("bias")
    if values is None or (bias is None and layer.bias is not None):
        return None
    packed = launch_record(values, buffers["indices"], buffers["indptr"], buffers["row_perm"], layer.in_features,
                           layer.block[1], dtype)  # fmt: skip
    if bias is None:
        return _Own(values, None, packed, (layer.activation, layer.layout))
    return _Own(values, bias, packed, (layer.activation, layer.layout, bias.data_ptr(), bias.dtype))


class _Joint:
    """Launch records of the layers together; without `parts` they do not fit together, and go alone."""

    def __init__(self, layers: Sequence[_Own], forget: Any) -> None:
        self.records = [weakref.ref(own.packed, forget) for own in layers]
        self.rest = [own.rest for own in layers]
        self.rows = [own.packed.shape[0] for own in layers]
        self.device = layers[0].values.get_device()
        self.dtype = layers[0].values.dtype
        self.parts: Any = make_parts(layers) if _fit(layers) else None
        self._memos: dict[Any, _Memo | None] = {}

    def holds(self, place: int, own: _Own) -> bool:
        """Whether the layer at this place is what it was."""
        return self.records[place]() is own.packed and self.rest[place] == own.rest

    def memo(self, x: torch.Tensor) -> _Memo | None:
        """What is launched for x; None if nothing is."""
        if self.parts is None or not x.is_contiguous() or x.data_ptr() & 15 or x.dtype != self.dtype:
            return None
        key = (x.shape, x.get_device())
        if key not in self._memos:
            self._memos[key] = self._made(x)
        return self._memos[key]

    def _made(self, x: torch.Tensor) -> _Memo | None:
        k, lead = self.parts.k, tuple(x.shape[:-1])
        n = math.prod(lead)
        if x.get_device() != self.device or x.shape[-1] != k or not 0 < n <= FEW_TOKENS:
            return None
        layouts = {few_layout(rest[1], n) for rest in self.rest}
        is_feature = layouts == {"feature"}
        if len(layouts) > 1 or not (is_feature or stores_results(self.parts.m, n)):
            return None
        road = self.parts.road(n, is_feature, stream_of(x))
        shapes = tuple((m, *lead) if is_feature else (*lead, m) for m in self.rows)
        return _Memo(road, self.parts.m * n, tuple(m * n for m in self.rows), shapes, is_feature)


@dataclass(frozen=True)
class _Memo:
    """A joint launch for x of one shape."""

    road: Any
    values: int
    sizes: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    is_feature: bool

    def view(self, piece: torch.Tensor, place: int) -> torch.Tensor:
        """The result of the layer at this place, as the layer alone would shape it."""
        y = piece.view(self.shapes[place])
        return y.movedim(0, -1) if self.is_feature else y


@dataclass
class _Waiting:
    """Results that nobody has asked for yet, by place."""

    source: weakref.ref[torch.Tensor]
    stamp: tuple[int, ...]
    joint: _Joint
    memo: _Memo
    pieces: dict[int, torch.Tensor] = field(default_factory=dict)


def few_layout(layout: str, tokens: int) -> str:
    """The order of a result of so few tokens: feature-major only if rows start at 16-byte boundaries.

    Otherwise the layer that reads it would have to turn it first.
    """
    return "feature" if layout == "feature" and tokens % 8 == 0 else "token"


def _stamp(x: torch.Tensor) -> tuple[int, ...]:
    """What must not change until a result is asked for: contents, stream, capture, and what the dispatcher does."""
    stream = stream_of(x)
    capture = 0
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        capture = capture_of(x.get_device(), stream)
    return (0 if x.is_inference() else x._version, x.data_ptr(), stream, capture, *dispatch_state())


def stream_of(x: torch.Tensor) -> int:
    """Raw handle of torch's current stream on the device of x; 0 on the CPU."""
    return torch_stream(x.get_device()) if x.is_cuda else 0


def _fit(layers: Sequence[_Own]) -> bool:
    """Whether one kernel can compute for all of these layers."""
    first = layers[0]
    kernels = {(own.packed.shape[1], own.packed.v, own.packed.dtype, own.values.device) for own in layers}
    activations = {own.rest[0] for own in layers} - {None}
    biases = all(
        own.bias is None
        or (own.bias.device == first.values.device and own.bias.dtype in (first.values.dtype, torch.float32)
            and own.bias.shape == own.packed.shape[:1] and own.bias.is_contiguous())
        for own in layers
    )  # fmt: skip
    return len(kernels) == 1 and len(activations) <= 1 and biases and all(0 not in own.packed.shape for own in layers)


# -- the device -------------------------------------------------------------------------------------------------------
# What follows is all that needs a GPU; tests put something else in its place.


def make_parts(layers: Sequence[_Own]) -> Any:
    """The `Parts` of these layers; None where the device or the group size has no kernel for them."""
    from ..kernels.launch import device_context
    from ..kernels.operands import check_bias
    from ..kernels.select import has_few_columns
    from ..kernels.skinny_config import has_parts
    from ..kernels.skinny_parts import Part, Parts

    packed, device = layers[0].packed, layers[0].values.get_device()
    if device < 0 or packed.dtype not in ("float16", "bfloat16") or not has_parts(packed.v):
        return None
    context = device_context(device)
    if not has_few_columns(1, context.capability):
        return None
    parts = [Part(own.packed, *check_bias(own.bias, own.packed, device), own.rest[0] is not None) for own in layers]
    activation = next((own.rest[0] for own in layers if own.rest[0] is not None), None)
    return Parts(context, parts, activation, stream_of(layers[0].values))


def stores_results(m: int, n: int) -> bool:
    """Whether the kernel itself stores so many token-major results."""
    from ..kernels.skinny_config import stores_directly

    return stores_directly(m, n, parts=True)


def launch(road: Any, stream: int, x: torch.Tensor, out: torch.Tensor) -> None:
    """Enqueue a joint launch."""
    from ..kernels.skinny_plan import launch_skinny

    turned = road.work_values[0]
    work = x.new_empty(turned) if turned else None
    launch_skinny(road, stream, x.data_ptr(), out.data_ptr(), (0 if work is None else work.data_ptr(), 0), 0, 0)


def capture_of(device: int, stream: int) -> int:
    """The number of the capture that the stream is in."""
    from ..kernels.launch import capture_id, device_context

    return capture_id(device_context(device), stream)
