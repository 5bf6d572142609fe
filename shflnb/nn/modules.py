"""`ShflLinear`: a drop-in for `torch.nn.Linear` whose weight is packed in the Shfl-BW pattern."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import numpy as np
import torch
from torch import nn

from ..arrays import host_array, like_kind
from ..errors import ArgumentError, DtypeError, ShapeError, ShflnbError
from ..formats import ShflBWMatrix, pack
from ..formats.shflbw import check_block
from ..patterns import prune
from .joint import JointProducts, few_layout, stream_of
from .layout import is_feature_major, to_feature_major
from .op import (
    ACTIVATIONS,
    FEW_TOKENS,
    activate,
    dense_weight,
    feature_view,
    is_plain_call,
    packed_linear,
    plain_linear,
    turned,
)
from .sums import LEAST_VALUES, as_term

__all__ = ["SharedInput", "ShflLinear"]

SHARE_ON = {"cuda"}
"""Devices whose kernels want feature-major input; the CPU has a kernel for either order and needs no shared transpose.
"""
_FORM = ("in_features", "out_features", "v", "tile_k", "activation")
_ACTIVATION_MODULES = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}


class ShflLinear(nn.Module):
    """`act(x @ W.T + bias)` with a packed W: (..., in_features) -> (..., out_features).

    Made by `ShflLinear.from_dense`, `ShflLinear.from_packed` or `shflnb.sparsify_`; the constructor makes an empty
    layer (W = 0) for `load_state_dict` to fill, whatever number of columns the saved layer keeps.

    Parameters
    ----------
    in_features, out_features : int
        k and m.
    bias : bool
    block : (v, tile_k)
    activation : None, "relu", "gelu" or "silu"
        Computed in the epilogue of the product, on float32 sums. With a gradient it is computed by torch afterwards.
    device, dtype
        As in every torch module.

    Attributes
    ----------
    values : Parameter (kept columns, v)
        Kept weights; trainable in place.
    indices, indptr, row_perm : buffers, int32, int64, int32
        As in `shflnb.ShflBWMatrix`.
    form : buffer, int64 (5,)
        in_features, out_features, v, tile_k and the number of the activation: `state_dict` describes the layer
        completely.
    bias : Parameter (out_features,) or None
    layout : "same", "token" or "feature"
        Order of the result in memory; set by the planner of `sparsify_`. Values do not depend on it.
    joins_sum : bool
        Whether all results go into a residual sum, which then turns them (see `sums.py`); set by the planner.
    name : str
        Name in the model, for error texts.

    Examples
    --------
    >>> import torch
    >>> from shflnb.nn import ShflLinear
    >>> layer = ShflLinear.from_dense(torch.nn.Linear(256, 128), sparsity=0.5, block=(32, 32))
    >>> layer(torch.zeros(3, 256)).shape
    torch.Size([3, 128])
    """

    indices: torch.Tensor
    indptr: torch.Tensor
    row_perm: torch.Tensor
    form: torch.Tensor
    joins_sum = False  # of layers pickled before there was such a thing, too

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        block: tuple[int, int] = (64, 64),
        activation: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = int(in_features), int(out_features)
        self.block = check_block(block)
        self.activation = _checked_activation(activation)
        self.layout = "same"
        self.name = ""
        self.shared: SharedInput | None = None
        v = self.block[0]
        groups = -(-self.out_features // v)
        self.values = nn.Parameter(torch.empty(0, v, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self.register_buffer("indices", torch.empty(0, dtype=torch.int32, device=device))
        self.register_buffer("indptr", torch.zeros(groups + 1, dtype=torch.int64, device=device))
        self.register_buffer("row_perm", torch.arange(out_features, dtype=torch.int32, device=device))
        self.register_buffer("form", torch.tensor(self._form(), dtype=torch.int64, device=device))

    # -- ways to build it ---------------------------------------------------------------------------------------------

    @classmethod
    def from_dense(
        cls,
        linear: nn.Linear,
        sparsity: float | None = 0.75,
        block: tuple[int, int] = (64, 64),
        *,
        name: str = "",
        **options: Any,
    ) -> ShflLinear:
        """Prune and pack a dense layer; its bias is shared, not copied.

        Parameters
        ----------
        linear : torch.nn.Linear
        sparsity : float or None
            Part of the weights to remove; None removes nothing and packs the zeros that are there (lossless).
        block : (v, tile_k)
        name : str
            For error texts.
        **options
            Of `shflnb.prune`: score, search, budget, seed, quality, ...

        Raises
        ------
        ArgumentError, DtypeError, ShapeError
            Those of `shflnb.prune` and `shflnb.pack`, with the layer's name in front.
        """
        weight = linear.weight.detach()
        try:
            packed = pack(weight, block=block) if sparsity is None else prune(
                weight, sparsity=sparsity, block=block, **options
            ).pack()  # fmt: skip
        except ShflnbError as error:
            raise _with_name(error, name) from error
        return cls.from_packed(
            packed, linear.bias, device=weight.device, name=name, requires_grad=linear.weight.requires_grad
        )

    @classmethod
    def from_packed(
        cls,
        packed: ShflBWMatrix,
        bias: torch.Tensor | None = None,
        *,
        activation: str | None = None,
        device: Any = None,
        name: str = "",
        requires_grad: bool = True,
    ) -> ShflLinear:
        """A layer that holds the arrays of `packed` on `device` (that of `bias`, if none is named).

        `bias` is shared, not copied, where it lies on that device already.
        """
        m, k = packed.shape
        if bias is not None and tuple(bias.shape) != (m,):
            raise ShapeError(f"bias has shape {tuple(bias.shape)}; packed needs ({m},)")
        if device is None and bias is not None:
            device = bias.device
        layer = cls(k, m, bias=False, block=packed.block, activation=activation, device=device)
        place, like = layer.form.device, torch.empty(0, device="cpu")  # whatever torch's default device is
        tensors = {field: like_kind(np.ascontiguousarray(getattr(packed, field)), like).to(place)
                   for field in ("values", "indices", "indptr", "row_perm")}  # fmt: skip
        layer.values = nn.Parameter(tensors["values"], requires_grad=requires_grad)
        layer.indices, layer.indptr, layer.row_perm = tensors["indices"], tensors["indptr"], tensors["row_perm"]
        if bias is not None:
            if bias.device != place:
                bias = nn.Parameter(bias.detach().to(place), bias.requires_grad)
            layer.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        layer.name = name
        return layer

    def to_packed(self) -> ShflBWMatrix:
        """The weight as a `ShflBWMatrix` on the host (a copy), for `shflnb.save` and the array calls."""
        fields = {field: np.array(host_array(getattr(self, field)), order="C")
                  for field in ("indptr", "indices", "values", "row_perm")}  # fmt: skip
        return ShflBWMatrix((self.out_features, self.in_features), self.block, **fields)

    def to_dense(self) -> nn.Module:
        """A `torch.nn.Linear` with the same weights (pruned places are 0), followed by the activation, if any."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.dense_weight().detach(), requires_grad=self.values.requires_grad)
        if self.bias is not None:
            linear.bias = self.bias
        linear.training = self.training
        return linear if self.activation is None else nn.Sequential(linear, _ACTIVATION_MODULES[self.activation]())

    def dense_weight(self) -> torch.Tensor:
        """W as a dense tensor (out_features, in_features), differentiable with respect to `values`."""
        return dense_weight(self.values, self.indices, self.indptr, self.row_perm, self.in_features)

    @property
    def weight(self) -> torch.Tensor:
        """`dense_weight()`, for code that reads `layer.weight`; built anew every time, which a warning says once."""
        warnings.warn(
            f"{self.name or 'a ShflLinear'}: .weight builds the dense matrix each time it is read; where only dtype "
            "or device is wanted read .values",
            stacklevel=2,
        )
        return self.dense_weight()

    # -- the product --------------------------------------------------------------------------------------------------

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`act(F.linear(x, W, bias))`; token-major or feature-major in, `self.layout` out."""
        try:
            return self._product(x)
        except ShflnbError as error:
            raise _with_name(error, self.name) from error

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype != self.values.dtype and not torch.is_autocast_enabled(x.device.type):
            raise DtypeError(
                f"x is {x.dtype}, the layer {self.values.dtype}; convert one with .to() or use torch.autocast"
            )
        activation = self.activation
        if activation is not None and torch.is_grad_enabled() and (x.requires_grad or self._is_trained()):
            # Unfused: autograd then keeps z, which the epilogue never writes, instead of computing it a second time.
            return activate(self._linear(x, None), activation)
        return self._linear(x, activation)

    def _is_trained(self) -> bool:
        return self.values.requires_grad or (self.bias is not None and self.bias.requires_grad)

    def _linear(self, x: torch.Tensor, activation: str | None) -> torch.Tensor:
        layout = self.layout
        if torch.compiler.is_compiling():
            # Not while exporting: the number of tokens would become a condition of the exported program.
            if x.device.type in SHARE_ON and not _is_exporting() and x.numel() > FEW_TOKENS * self.in_features:
                return self._compiled(x, activation)
        elif (self.shared is not None or layout == "feature") and x.device.type in SHARE_ON:
            shared = None if torch.is_grad_enabled() else self.shared
            if x.numel() <= FEW_TOKENS * self.in_features:
                y = None if shared is None else shared.joint.result(self, x)
                if y is not None:
                    return y
                layout = few_layout(layout, x.numel() // max(1, self.in_features)) if layout == "feature" else layout
            elif shared is not None:
                layout = ("feature" if is_feature_major(x) else "token") if layout == "same" else layout
                x = shared.feature_major(x)
        # While tracing the number of tokens is not looked at: it would become a condition of the traced program.
        is_term = self.joins_sum and layout == "token" and not torch.compiler.is_compiling()
        if is_term and self._may_wait_for_a_sum(x):
            return as_term(plain_linear(x, *self._tensors(), self.in_features, self.block[1], activation, True))
        return packed_linear(x, *self._tensors(), k=self.in_features, tile_k=self.block[1], activation=activation,
                             layout=layout)  # fmt: skip

    def _tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """values, indices, indptr, row_perm and bias; past `nn.Module.__getattr__`, which takes 0.5 us for each."""
        parameters, buffers = self._parameters, self._buffers
        values, bias = parameters.get("values"), parameters.get("bias")
        if values is None or torch.compiler.is_compiling():
            return self.values, self.indices, self.indptr, self.row_perm, self.bias
        bias = self.bias if bias is None else bias  # parametrised, or none
        return values, buffers["indices"], buffers["indptr"], buffers["row_perm"], bias

    def _may_wait_for_a_sum(self, x: torch.Tensor) -> bool:
        """Whether the result can be handed on feature-major, for the sum that turns it."""
        tokens, m = x.numel() // max(1, self.in_features), self.out_features
        return (
            x.device.type in SHARE_ON
            and tokens > FEW_TOKENS
            and tokens * m >= LEAST_VALUES
            and m % 8 == 0
            and x.dim() > 1
            and x.dtype in (torch.float16, torch.bfloat16)
            and is_plain_call(x, self.values, self.bias)
        )

    def _compiled(self, x: torch.Tensor, activation: str | None) -> torch.Tensor:
        """Both transposes in the open, where the compiler fuses them with their neighbours."""
        feature_out = self.layout == "feature" or (self.layout == "same" and is_feature_major(x))
        features = to_feature_major(x) if self.shared is None else self.shared.traced(x)
        y = packed_linear(
            features, self.values, self.indices, self.indptr, self.row_perm, self.bias,
            k=self.in_features, tile_k=self.block[1], activation=activation, layout="feature",
        )  # fmt: skip
        return y if feature_out else y.contiguous()

    # -- state --------------------------------------------------------------------------------------------------------

    @property
    def density(self) -> float:
        """Stored places / all places of W."""
        return self.values.numel() / max(1, self.in_features * self.out_features)

    def extra_repr(self) -> str:
        """What stands in the brackets of the repr."""
        parts = [
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}",
            f"sparsity={1 - self.density:.1%}, block={self.block}",
        ]
        if self.activation is not None:
            parts.append(f"activation={self.activation}")
        if self.layout != "same":
            parts.append(f"layout={self.layout}")
        if self.joins_sum:
            parts.append("joins_sum=True")
        return ", ".join(parts)

    def _form(self) -> list[int]:
        activation = 0 if self.activation is None else 1 + ACTIVATIONS.index(self.activation)
        return [self.in_features, self.out_features, *self.block, activation]

    def share(self, shared: SharedInput) -> None:
        """Let the layer read its input, and compute, together with the others that `shared` is given to."""
        self.shared = shared
        shared.joint.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.shared is not None:  # of a copy: with the copies of the others
            self.share(self.shared)

    def set_activation(self, activation: str | None) -> None:
        """Choose what the epilogue computes."""
        self.activation = _checked_activation(activation)
        self.form = torch.tensor(self._form(), dtype=torch.int64, device=self.form.device)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        """Take over block, activation and number of kept columns of the saved layer, then load as every module does."""
        form = state_dict.get(prefix + "form")
        if form is not None and tuple(form.shape) == (len(_FORM),):
            try:
                self._adopt([int(number) for number in form.tolist()])
            except ShflnbError as error:
                error_msgs.append(f"{prefix}form: {error}")
        saved = state_dict.get(prefix + "values")
        if saved is not None and saved.dim() == 2 and saved.shape[1] == self.block[0]:
            self.resize_kept(saved.shape[0])
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def resize_kept(self, kept: int) -> None:
        """Make room for `kept` columns and for the groups of the current block, without setting their contents.

        Nothing happens where the sizes fit already; else new tensors take the place of the old, so an optimiser that
        holds the old ones has to be made anew.
        """
        v, groups = self.block[0], -(-self.out_features // self.block[0])
        own = self.values
        if tuple(own.shape) != (kept, v):
            self.values = nn.Parameter(torch.empty(kept, v, dtype=own.dtype, device=own.device), own.requires_grad)
            self.indices = torch.empty(kept, dtype=torch.int32, device=own.device)
        if self.indptr.shape[0] != groups + 1:
            self.indptr = torch.empty(groups + 1, dtype=torch.int64, device=own.device)

    def _adopt(self, form: list[int]) -> None:
        k, m, v, tile_k, activation = form
        if (k, m) != (self.in_features, self.out_features):
            raise ShapeError(f"saved layer is {m} x {k}; this one is {self.out_features} x {self.in_features}")
        if not 0 <= activation <= len(ACTIVATIONS):
            raise ArgumentError(f"activation number is {activation}; expected 0..{len(ACTIVATIONS)}")
        self.block = check_block((v, tile_k))
        self.activation = None if activation == 0 else ACTIVATIONS[activation - 1]


class SharedInput:
    """One feature-major copy for several layers that read the same tensor (q, k and v; gate and up).

    Up to `FEW_TOKENS` tokens nothing is copied: `joint` computes for all of them at once. Beyond that it is made in
    eager inference, and in the graph that `torch.compile` traces. In eager mode it belongs to one tensor object, one
    version of its contents and one stream; it goes when the tensor goes, or when the last of `readers` layers has taken
    it. Tensors made under `inference_mode` have no version: there the planner has seen that nothing writes between the
    readers.
    """

    def __init__(self, readers: int) -> None:
        self.readers = readers
        self.joint = JointProducts(readers)
        self._entry: tuple[Any, ...] | None = None
        self._source: torch.Tensor | None = None
        self._copy: torch.Tensor | None = None
        self._uses = 0

    def traced(self, x: torch.Tensor) -> torch.Tensor:
        """`to_feature_major(x)` for a tracer: plain attributes and `is`, all of them reset by the last reader."""
        if self._source is not None and self._source is x and self._copy is not None:
            copy = self._copy
            self._uses += 1
        else:
            copy = to_feature_major(x)
            self._source, self._copy, self._uses = x, copy, 1
        if self._uses >= self.readers:
            self._source, self._copy, self._uses = None, None, 0
        return copy

    def feature_major(self, x: torch.Tensor) -> torch.Tensor:
        """`to_feature_major(x)`, computed once for the readers; x itself where nothing would be transposed."""
        tokens = x.shape[:-1].numel()
        if tokens <= FEW_TOKENS or is_feature_major(x):
            return x
        stamp = (0 if x.is_inference() else x._version, x.data_ptr(), stream_of(x))
        entry = self._entry
        if entry is not None and entry[0]() is x and entry[1] == stamp:
            source, _, copy, uses = entry
            self._entry = None if uses + 1 >= self.readers else (source, stamp, copy, uses + 1)
            return copy
        copy = feature_view(turned(x.reshape(tokens, x.shape[-1])), x.shape[:-1])
        self._entry = (weakref.ref(x, self._forget), stamp, copy, 1)
        return copy

    def _forget(self, source: Any) -> None:
        entry = self._entry
        if entry is not None and entry[0] is source:
            self._entry = None

    def __reduce__(self) -> tuple[Any, ...]:
        return (SharedInput, (self.readers,))


def _is_exporting() -> bool:
    asked = getattr(torch.compiler, "is_exporting", None)  # new in torch 2.7
    return asked is not None and asked()


def _checked_activation(activation: str | None) -> str | None:
    if activation is not None and activation not in ACTIVATIONS:
        raise ArgumentError(f"activation is {activation!r}; expected None or one of {', '.join(ACTIVATIONS)}")
    return activation


def _with_name(error: ShflnbError, name: str) -> ShflnbError:
    return type(error)(f"layer {name}: {error}") if name else error


torch.serialization.add_safe_globals([ShflLinear, SharedInput])
