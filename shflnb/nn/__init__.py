"""PyTorch: sparse layers, whole models, forecasts and fine-tuning. The only part of shflnb that imports torch.

`sparsify_` makes a model sparse in place and reports on every layer; `estimate` is the same table before any pruning;
`ShflLinear` is one sparse layer; `prepare` and `finalize` stand around a training loop. Start with `docs/pytorch.md`.
"""

try:
    import torch as _torch  # noqa: F401 (only to say what is missing)
except ImportError as error:
    from ..errors import MissingDependencyError

    raise MissingDependencyError("shflnb.nn needs torch; pip install 'shflnb[torch]'") from error

from .convert import sparsify_
from .finetune import Preparation, ShflMask, finalize, prepare
from .forecast import estimate
from .hf import register as register_with_transformers
from .layout import is_feature_major, to_feature_major, to_token_major
from .modules import ShflLinear
from .op import dense_weight, packed_linear
from .record import forget
from .report import LayerReport, Report

__all__ = [
    "LayerReport",
    "Preparation",
    "Report",
    "ShflLinear",
    "ShflMask",
    "dense_weight",
    "estimate",
    "finalize",
    "forget",
    "is_feature_major",
    "packed_linear",
    "prepare",
    "register_with_transformers",
    "sparsify_",
    "to_feature_major",
    "to_token_major",
]
