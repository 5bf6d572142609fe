"""A layer's result on its way into a residual sum: made token-major by the kernel that adds.

    y = layer(x)     a `SumTerm`: feature-major, as the product made it
    h = h + y        one kernel turns y and adds h: it moves three matrices, a transpose and torch's addition five

Where the planner has seen that all a layer's results go into a sum and nowhere else (`joins_sum`), in eager inference
on a GPU. A `SumTerm` is a tensor with the right values from the start: whatever else is done with it finds an ordinary
token-major tensor, so a model that does something else than it was seen to do only loses the gain. Sums are torch's to
the bit: each is taken in float32 and rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map_only

from ..kernels.memo import quick_transpose
from .op import flat_features, has_plain_keys, turned

__all__ = ["LEAST_VALUES", "SumTerm", "as_term", "turned_sum"]

LEAST_VALUES = 1 << 22
"""Of a result; below, what Python does for a `SumTerm` takes longer than the memory traffic that it saves."""

_ADDITIONS = (torch.add, torch.Tensor.add)
_METADATA = {
    torch.Tensor.size,
    torch.Tensor.dim,
    torch.Tensor.numel,
    torch.Tensor.is_floating_point,
    *(getattr(torch.Tensor, name).__get__ for name in ("shape", "dtype", "device", "is_cuda", "ndim", "requires_grad")),
}
"""What is the same of a tensor in either order."""


class SumTerm(torch.Tensor):
    """A feature-major result (..., m) that is turned when it is added to something, or when anything else is asked."""

    _plain: torch.Tensor
    _is_turned: bool

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Add if that is what is asked; else do what is asked with the turned tensor."""
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if func in _ADDITIONS and not kwargs and len(args) == 2:
            term, other = args if isinstance(args[0], cls) else args[::-1]
            if not term._is_turned and _fits(term._plain, other):
                return turned_sum(term._plain, other)
        if func is F.dropout and kwargs is not None and not kwargs.get("training", True) and len(args) == 1:
            return args[0]
        args, kwargs = tree_map_only(cls, cls.token_major, (args, kwargs or {}))
        return func(*args, **kwargs)

    def token_major(self) -> torch.Tensor:
        """The same values as an ordinary token-major tensor; made once."""
        if not self._is_turned:
            y = self._plain
            self._plain, self._is_turned = turned(flat_features(y), is_result=True).view(y.shape), True
        return self._plain


def as_term(y: torch.Tensor) -> torch.Tensor:
    """A feature-major result as a `SumTerm`."""
    term = y.as_subclass(SumTerm)
    term._plain, term._is_turned = y, False
    return term


def _fits(y: torch.Tensor, other: Any) -> bool:
    """Whether the kernel can add `other` to the result."""
    return (
        has_plain_keys(other)
        and other.shape == y.shape
        and other.dtype == y.dtype
        and other.device == y.device
        and other.is_contiguous()
        and other.data_ptr() % 16 == 0
        and not (other.requires_grad and torch.is_grad_enabled())
    )


def turned_sum(y: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """`y + other` of a feature-major and a token-major tensor of 16-bit values on a GPU, token-major."""
    m = y.shape[-1]
    done = quick_transpose(y, m, y.numel() // m, y.shape, True, other)
    if done is None:
        from ..kernels.spmm_device import device_transpose

        done = device_transpose(flat_features(y), is_result=True, addend=other.view(-1, m)).view(y.shape)
    return done
