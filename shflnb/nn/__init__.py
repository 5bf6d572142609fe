"""PyTorch: sparse layers, whole models, forecasts and fine-tuning. The only part of shflnb that imports torch.

    report = shflnb.sparsify_(model, 0.75, (64, 64), example_inputs=x)      # prune, pack, measure, replace
    report.print()
    forecast = shflnb.estimate(model, x)                                    # the same table before pruning

    layer = shflnb.nn.ShflLinear.from_dense(linear, sparsity=0.75)          # one layer
    preparation = shflnb.nn.prepare(model, 0.75, steps=1000)                # masks, for fine-tuning
"""

try:
    import torch as _torch
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
