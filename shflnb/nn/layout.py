"""Feature-major and token-major tensors: the same shape (..., features), two orders in memory.

    token-major    strides (..., features, 1): what `torch.nn.Linear` makes
    feature-major  strides (..., 1, tokens):   `(features, tokens)` in memory, what the kernels eat and produce

As with channels_last for images, a tensor keeps its order through bias, GELU, dropout and every other elementwise
module, so layers that follow each other hand the feature-major tensor on without a transpose.
"""

from __future__ import annotations

import torch

__all__ = ["is_feature_major", "to_feature_major", "to_token_major"]


def is_feature_major(x: torch.Tensor) -> bool:
    """Whether `x` (..., features) lies in memory as a contiguous (features, tokens) array, and not also token-major.

    A tensor of one token, or of one feature, is both; it counts as token-major.

    Examples
    --------
    >>> import torch
    >>> [is_feature_major(x) for x in (torch.zeros(8, 3).T, torch.zeros(3, 8), torch.zeros(8, 1).T)]
    [True, False, False]
    """
    if x.dim() < 2 or x.is_contiguous():
        return False
    return x.movedim(-1, 0).is_contiguous()


def to_feature_major(x: torch.Tensor) -> torch.Tensor:
    """`x` with the same shape and values, feature-major in memory; `x` itself if it is so already. Differentiable.

    Written in ATen operations on purpose: `torch.compile` fuses the copy with what made the tensor.
    """
    if x.dim() < 2:
        return x
    return x.movedim(-1, 0).contiguous().movedim(0, -1)


def to_token_major(x: torch.Tensor) -> torch.Tensor:
    """`x.contiguous()`: token-major in memory; `x` itself if it is so already. Differentiable."""
    return x.contiguous()
