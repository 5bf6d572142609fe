"""`shflnb::linear`, the operator that torch knows: eager, autograd, autocast, `torch.compile`, `torch.export`.

    y = act(x @ W.T + bias)        with W given by the plain tensors values, indices, indptr, row_perm

The gradients are ATen code, so they compile, differentiate again and run anywhere. With respect to x the dense W is
built for the moment of the backward pass (one scatter) and multiplied; with respect to the values the dense gradient
is one product, of which the kept places are read. Both are deterministic (no float atomics: every place is written
once) and cost what a dense layer's backward costs; they take memory for one dense W. A NaN in an output gradient
spreads as in a dense layer. Training at full speed of the dense layer is what `shflnb.nn.prepare` is for.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from .. import ops
from ..errors import ArgumentError, DeviceError, DtypeError, ShapeError
from ..kernels.memo import KINDS, quick_product, quick_transpose
from .layout import is_feature_major
from .record import launch_record

__all__ = ["ACTIVATIONS", "FEW_TOKENS", "activate", "dense_weight", "dispatch_state", "feature_view", "flat_features",
           "has_plain_keys", "is_plain_call", "packed_linear", "plain_linear", "turned"]  # fmt: skip

ACTIVATIONS = ("relu", "gelu", "silu")
"""What the epilogue can do; "gelu" is the exact form, with the error function."""

FEW_TOKENS = 64
"""Up to here nothing is shared or kept transposed: turning so few tokens costs less than planning for it."""

_LIB = torch.library.Library("shflnb", "DEF")
# needs_fixed_stride_order: the layout of x, decided when the graph is traced, is part of what the kernel expects.
_LIB.define(
    "linear(Tensor x, Tensor values, Tensor indices, Tensor indptr, Tensor row_perm, Tensor? bias, "
    "int k, int tile_k, str? activation, bool feature_out) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)


def packed_linear(
    x: torch.Tensor,
    values: torch.Tensor,
    indices: torch.Tensor,
    indptr: torch.Tensor,
    row_perm: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    k: int,
    tile_k: int = 64,
    activation: str | None = None,
    layout: str = "same",
) -> torch.Tensor:
    """`act(F.linear(x, W, bias))` for a packed W given as plain tensors: (..., k) -> (..., m).

    Parameters
    ----------
    x : tensor (..., k)
        Token-major or feature-major (see `layout.py`), on the device of `values`; another order is copied first. Same
        dtype as `values`; under autocast x goes to the autocast dtype, and the values are rounded to it once and
        remembered.
    values : tensor (kept columns, v)
    indices : int32 tensor (kept columns,)
    indptr : int64 tensor (groups + 1,)
    row_perm : int32 tensor (m,)
        As in `shflnb.ShflBWMatrix`.
    bias : tensor (m,), optional
        Of the dtype of x, or float32.
    k, tile_k : int
        Columns of W, and of a kernel tile.
    activation : None, "relu", "gelu" or "silu"
    layout : "same", "token" or "feature"
        Order of the result in memory; "same" is that of x. The values of the result do not depend on it.

    Returns
    -------
    tensor (..., m), dtype of x

    Raises
    ------
    ShapeError, DtypeError, DeviceError, ArgumentError, FormatError

    Examples
    --------
    >>> import numpy as np, torch, shflnb
    >>> from shflnb.nn.op import packed_linear
    >>> packed = shflnb.pack(np.eye(16, dtype=np.float32), block=(16, 16), fill_in_warning=None)
    >>> t = [torch.from_numpy(a) for a in (packed.values, packed.indices, packed.indptr, packed.row_perm)]
    >>> x = torch.randn(3, 16)
    >>> torch.equal(packed_linear(x, *t, k=16), x)
    True
    """
    if activation is not None and activation not in ACTIVATIONS:
        raise ArgumentError(f"activation is {activation!r}; expected None or one of {', '.join(ACTIVATIONS)}")
    if layout == "same":
        feature_out = is_feature_major(x)
    elif layout in ("token", "feature"):
        feature_out = layout == "feature"
    else:
        raise ArgumentError(f"layout is {layout!r}; expected 'same', 'token' or 'feature'")
    args = (x, values, indices, indptr, row_perm, bias, k, tile_k, activation, feature_out)
    if is_plain_call(x, values, bias):
        return plain_linear(*args)
    return torch.ops.shflnb.linear.default(*args)


def activate(z: torch.Tensor, activation: str | None) -> torch.Tensor:
    """The activation by name, as torch computes it."""
    if activation is None:
        return z
    functions: dict[str, Any] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}
    return functions[activation](z)


# -- the forward pass -------------------------------------------------------------------------------------------------


def dispatch_state() -> tuple[int, int]:
    """The key sets that modes, autocast, tracing and functorch transforms change for the current thread."""
    return _include_set().raw_repr(), _exclude_set().raw_repr()


_include_set: Any = getattr(torch._C, "_dispatch_tls_local_include_set", None)
_exclude_set: Any = getattr(torch._C, "_dispatch_tls_local_exclude_set", None)
_keys_of: Any = getattr(torch._C, "_dispatch_keys", None)
_PLAIN_STATES: set[tuple[int, int]] = set()
_PLAIN_KEYS: set[int] = set()


def _learn_plain_calls() -> None:
    """Note what an ordinary call looks like to the dispatcher, in inference mode too."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for inference in (False, True):
        with torch.inference_mode(inference):
            _PLAIN_STATES.add(dispatch_state())
            _PLAIN_KEYS.update(_keys_of(torch.empty(0, device=device)).raw_repr() for device in devices)


if None not in (_include_set, _exclude_set, _keys_of):
    _learn_plain_calls()


def is_plain_call(x: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether nothing stands between the call and the kernel, so that the dispatcher's 10 us can be saved.

    No gradient, no tracing, no autocast, no dispatch mode, no functorch transform, no tensor subclass: read off the
    dispatcher's own key sets, which name them all. Where torch does not show those sets the call is simply dispatched.
    """
    if torch.compiler.is_compiling() or not _PLAIN_STATES:
        return False
    if torch.is_grad_enabled() and (
        x.requires_grad or values.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return False
    return has_plain_keys(x) and dispatch_state() in _PLAIN_STATES and not torch._C._is_torch_function_mode_enabled()


def has_plain_keys(x: torch.Tensor) -> bool:
    """Whether this is a tensor and nothing more: no subclass, no wrapper of a functorch transform."""
    return type(x) is torch.Tensor and _keys_of(x).raw_repr() in _PLAIN_KEYS


def plain_linear(
    x: torch.Tensor,
    values: torch.Tensor,
    indices: torch.Tensor,
    indptr: torch.Tensor,
    row_perm: torch.Tensor,
    bias: torch.Tensor | None,
    k: int,
    tile_k: int,
    activation: str | None,
    feature_out: bool,
) -> torch.Tensor:
    """The kernel's side of the operator: check, find the launch record, multiply in the layout that x has.

    What the dispatcher comes to; called past it where `is_plain_call` has found nothing in between.
    """
    if bias is not None and bias.dtype not in (x.dtype, torch.float32) and x.is_floating_point():
        bias = bias.to(x.dtype)
    layout = "feature" if feature_out and x.dim() > 1 else "token"
    # A feature-major result lies without gaps here; `ops.linear` gives it rows that start at 16-byte boundaries.
    on_device = x.is_cuda and (layout == "token" or x.numel() // max(1, k) % 8 == 0)
    if on_device:
        known = launch_record(values, indices, indptr, row_perm, k, tile_k, x.dtype, make=False)
        done = None if known is None else quick_product(known, KINDS[layout], x, bias, activation)
        if done is not None:
            return done
    _check(x, values, row_perm, bias, k)
    packed = launch_record(values, indices, indptr, row_perm, k, tile_k, x.dtype)
    if on_device and x.numel():
        return ops.linear(x, packed, bias, activation=activation, layout=layout)
    lead, m = x.shape[:-1], row_perm.shape[0]
    tokens = math.prod(lead)
    # Always two dimensions, of strides (k, 1) or (1, tokens), whatever the leading dimensions are.
    flat = flat_features(x).t() if is_feature_major(x) else x.reshape(tokens, k)
    if layout == "feature":
        memory = x.new_empty(m, tokens)
        if tokens:
            ops.linear(flat, packed, bias, activation=activation, out=memory.t())
        return feature_view(memory, lead)
    return ops.linear(flat, packed, bias, activation=activation).view(*lead, m)


def feature_view(y: torch.Tensor, lead: torch.Size) -> torch.Tensor:
    """A (m, tokens) product as the feature-major tensor (*lead, m)."""
    return y.t() if len(lead) == 1 else y.view(y.shape[0], *lead).movedim(0, -1)


def flat_features(x: torch.Tensor) -> torch.Tensor:
    """A feature-major tensor (*lead, features) as the (features, tokens) matrix that it is in memory."""
    return x.t() if x.dim() == 2 else x.movedim(-1, 0).flatten(1)


def turned(x: torch.Tensor, *, is_result: bool = False) -> torch.Tensor:
    """`x.t().contiguous()`; 16-bit values on a GPU by the transpose kernel of the products."""
    if not (x.is_cuda and x.dtype in (torch.float16, torch.bfloat16) and x.numel()):
        return x.t().contiguous()
    x, (rows, cols) = x.contiguous(), x.shape
    done = quick_transpose(x, rows, cols, (cols, rows), is_result)
    if done is None:
        from ..kernels.spmm_device import device_transpose

        done = device_transpose(x, is_result=is_result)
    return done


def _check(
    x: torch.Tensor,
    values: torch.Tensor,
    row_perm: torch.Tensor,
    bias: torch.Tensor | None,
    k: int,
) -> None:
    """What can change from call to call; the rest is checked when the launch record is made."""
    if x.dim() < 1 or x.shape[-1] != k:
        raise ShapeError(f"x has shape {tuple(x.shape)}; the layer needs (..., {k}), features last")
    if values.device != x.device:  # before the bias: a whole layer elsewhere is named by its main tensor
        raise DeviceError(f"x is on {x.device}, values on {values.device}; move one with .to()")
    if bias is not None:
        if bias.dim() != 1 or bias.shape[0] != row_perm.shape[0]:
            raise ShapeError(f"bias has shape {tuple(bias.shape)}; the layer needs ({row_perm.shape[0]},)")
        if bias.device != x.device:
            raise DeviceError(f"x is on {x.device}, bias on {bias.device}; move one with .to()")
    if not x.is_floating_point():
        raise DtypeError(f"x is {x.dtype}; needed is a floating dtype, that of the weights ({values.dtype})")


@torch.library.register_fake("shflnb::linear", lib=_LIB)
def _linear_fake(
    x: torch.Tensor,
    values: torch.Tensor,
    indices: torch.Tensor,
    indptr: torch.Tensor,
    row_perm: torch.Tensor,
    bias: torch.Tensor | None,
    k: int,
    tile_k: int,
    activation: str | None,
    feature_out: bool,
) -> torch.Tensor:
    """Shape, strides, dtype and device of the result, without data."""
    _check(x, values, row_perm, bias, k)
    m = row_perm.shape[0]
    if feature_out and x.dim() > 1:
        return x.new_empty((m, *x.shape[:-1])).movedim(0, -1)
    return x.new_empty((*x.shape[:-1], m))


_LIB.impl("linear", plain_linear, "CPU")
_LIB.impl("linear", plain_linear, "CUDA")


def _autocast(device_type: str, key: str) -> None:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def linear(x: torch.Tensor, values: torch.Tensor, *rest: Any) -> torch.Tensor:
        # Only x is cast: the values keep their storage, by which the launch record (rounded once) is found.
        with torch._C._ExcludeDispatchKeyGuard(keys):
            if x.is_floating_point() and x.dtype != torch.float64:
                x = x.to(torch.get_autocast_dtype(device_type))
            return torch.ops.shflnb.linear.default(x, values, *rest)

    _LIB.impl("linear", linear, key)


_autocast("cpu", "AutocastCPU")
_autocast("cuda", "AutocastCUDA")


@torch.library.register_vmap("shflnb::linear", lib=_LIB)
def _vmap(info: Any, in_dims: tuple[Any, ...], x: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, int]:
    """A batch of x is one dimension more; a batch of weights is refused."""
    if any(dim is not None for dim in in_dims[1:]):
        raise ArgumentError("vmap over the weights of a packed layer is not possible; call the layers one by one")
    return torch.ops.shflnb.linear.default(x.movedim(in_dims[0], 0), *rest), 0


# -- the backward pass ------------------------------------------------------------------------------------------------


def _places(
    indices: torch.Tensor, indptr: torch.Tensor, row_perm: torch.Tensor, v: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column in the dense W of every value place: int64, (kept columns, v) and (kept columns, 1).

    Places of rows that the last group does not have are given row m.
    """
    m, groups = row_perm.shape[0], indptr.shape[0] - 1
    order = F.pad(row_perm.long(), (0, groups * v - m), value=m).view(groups, v)
    group = torch.repeat_interleave(
        torch.arange(groups, device=indptr.device), indptr.diff(), output_size=indices.shape[0]
    )
    return order[group], indices.long().unsqueeze(1)


def dense_weight(
    values: torch.Tensor, indices: torch.Tensor, indptr: torch.Tensor, row_perm: torch.Tensor, k: int
) -> torch.Tensor:
    """The dense (m, k) matrix of packed tensors, differentiable with respect to the values."""
    m, v = row_perm.shape[0], values.shape[1]
    rows, columns = _places(indices, indptr, row_perm, v)
    # One row more than W has takes the places of rows that the last group does not have.
    return values.new_zeros(m + 1, k).index_put((rows, columns.expand_as(rows)), values)[:m]


def _activation_gradient(grad: torch.Tensor, z: torch.Tensor, activation: str) -> torch.Tensor:
    if activation == "relu":
        return torch.ops.aten.threshold_backward(grad, z, 0)
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(grad, z)
    # Written out: aten::silu_backward cannot be differentiated again. In float32 at least, as ATen computes it.
    wide = z if z.dtype == torch.float64 else z.float()
    s = torch.sigmoid(wide)
    return (grad * (s * (1 + wide * (1 - s)))).to(grad.dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, values, indices, indptr, row_perm, bias, k, tile_k, activation, feature_out = inputs
    # x is not needed for its own gradient: a frozen layer without a fused activation keeps no activations alive.
    keep_x = activation is not None or ctx.needs_input_grad[1]
    ctx.save_for_backward(x if keep_x else None, values, indices, indptr, row_perm, bias)
    ctx.sizes = (k, tile_k, activation, feature_out)
    ctx.x_dtype = x.dtype


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    x, values, indices, indptr, row_perm, bias = ctx.saved_tensors
    k, tile_k, activation, feature_out = ctx.sizes
    m = row_perm.shape[0]
    if activation is not None:
        z = torch.ops.shflnb.linear.default(x, values, indices, indptr, row_perm, bias, k, tile_k, None, feature_out)
        grad = _activation_gradient(grad, z, activation)
    tokens = math.prod(grad.shape[:-1])
    flat = grad.reshape(tokens, m)
    grad_x = grad_values = grad_bias = None
    if ctx.needs_input_grad[0]:
        weight = dense_weight(values, indices, indptr, row_perm, k).to(grad.dtype)
        grad_x = (flat @ weight).reshape(*grad.shape[:-1], k).to(ctx.x_dtype)
    if ctx.needs_input_grad[1]:
        dense = F.pad(flat.t() @ x.reshape(tokens, k), (0, 0, 0, 1))
        rows, columns = _places(indices, indptr, row_perm, values.shape[1])
        grad_values = dense[rows, columns].to(values.dtype)
    if bias is not None and ctx.needs_input_grad[5]:
        grad_bias = flat.sum(0).to(bias.dtype)
    return grad_x, grad_values, None, None, None, grad_bias, None, None, None, None


torch.library.register_autograd("shflnb::linear", _backward, setup_context=_setup_context, lib=_LIB)
