"""Hugging Face models: `save_pretrained` and `from_pretrained` of sparsified models, through a registered config.

`transformers` rebuilds a model from `config.json` before it loads tensors, and lets a "quantizer" named in that config
change the skeleton. Ours puts an empty `ShflLinear` of the right size where the saved model has one. Importing
`shflnb.nn` registers it, so `import shflnb.nn` and then `from_pretrained` is all that loading needs.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from ..errors import FormatError, MissingDependencyError
from .eligible import replace_module
from .modules import SharedInput, ShflLinear

__all__ = ["METHOD", "attach", "is_pretrained", "layer_records", "register", "restore_layers"]

METHOD = "shflnb"
_FORMAT = 1


def is_pretrained(model: nn.Module) -> bool:
    """Whether the model is one of `transformers`, which must be imported already if it is."""
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


def layer_records(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What a skeleton needs to know of every sparse layer: plain data, by name."""
    groups: dict[int, list[str]] = {}
    records: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules():
        if isinstance(module, ShflLinear):
            records[name] = {
                "block": list(module.block), "kept": module.values.shape[0], "activation": module.activation,
                "layout": module.layout,
            }  # fmt: skip
            if module.joins_sum:
                records[name]["joins_sum"] = True
            if module.shared is not None:
                groups.setdefault(id(module.shared), []).append(name)
    for number, names in enumerate(groups.values()):
        for name in names:
            records[name]["shared"] = number
    return records


def restore_layers(model: nn.Module, records: dict[str, dict[str, Any]], identities: list[str]) -> None:
    """Put empty sparse layers (on the device of the dense ones) and identities where the records have them.

    Raises
    ------
    FormatError
        A record names no linear layer of this model, or does not describe one.
    """
    shared: dict[int, SharedInput] = {}
    for name, record in records.items():
        try:
            linear = model.get_submodule(name)
            v, tile_k = (int(size) for size in record["block"])
            kept, activation, layout = int(record["kept"]), record.get("activation"), record.get("layout", "same")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise FormatError(f"the saved config does not describe layer {name!r} of this model: {error}") from error
        if not isinstance(linear, nn.Linear) or not 0 <= kept <= linear.in_features * -(-linear.out_features // v):
            raise FormatError(
                f"the saved config makes {name!r} sparse with {kept} kept columns; the model has {linear} there"
            )
        layer = ShflLinear(
            linear.in_features, linear.out_features, linear.bias is not None, block=(v, tile_k), activation=activation,
            device=linear.weight.device, dtype=linear.weight.dtype,
        )  # fmt: skip
        layer.resize_kept(kept)
        layer.name, layer.layout, layer.joins_sum = name, layout, bool(record.get("joins_sum"))
        if "shared" in record:
            readers = sum(other.get("shared") == record["shared"] for other in records.values())
            layer.share(shared.setdefault(record["shared"], SharedInput(readers)))
        layer.requires_grad_(linear.weight.requires_grad)
        replace_module(model, _all_names(model, linear), layer)
    for name in identities:
        replace_module(model, [name], nn.Identity())


def _all_names(model: nn.Module, module: nn.Module) -> list[str]:
    return [name for name, other in model.named_modules(remove_duplicate=False) if other is module]


def attach(model: nn.Module, fused: dict[str, tuple[str, str]]) -> None:
    """Note in the model's config what `sparsify_` did, so that `save_pretrained` writes it."""
    classes = register()
    before = getattr(model.config, "quantization_config", None)
    identities = list(getattr(before, "identities", [])) + [leaf for leaf, _ in fused.values()]
    config = classes["config"](layers=layer_records(model), identities=sorted(set(identities)))
    model.config.quantization_config = config
    model.hf_quantizer = classes["quantizer"](config, pre_quantized=True)


_CLASSES: dict[str, Any] = {}


def register() -> dict[str, Any]:
    """Register config and quantizer with `transformers` (once), and return both classes.

    Raises
    ------
    MissingDependencyError
        `transformers` is not installed.
    """
    if _CLASSES:
        return _CLASSES
    try:
        from transformers.quantizers import HfQuantizer
        from transformers.quantizers.auto import register_quantization_config, register_quantizer
        from transformers.utils.quantization_config import QuantizationConfigMixin
    except ImportError as error:
        raise MissingDependencyError(
            "saving a Hugging Face model needs transformers; pip install transformers"
        ) from error

    class ShflConfig(QuantizationConfigMixin):
        """Sparse layers of a saved model: block, kept columns, activation and layout of each, by name."""

        def __init__(
            self, layers: dict[str, Any] | None = None, identities: list[str] | None = None, format: int = _FORMAT,
            **unused: Any,
        ) -> None:  # fmt: skip
            if format != _FORMAT:
                raise FormatError(
                    f"the model was saved in format {format}; this shflnb reads {_FORMAT}: upgrade shflnb"
                )
            self.quant_method = METHOD
            self.format = format
            self.layers = layers or {}
            self.identities = identities or []

    class ShflQuantizer(HfQuantizer):
        """Changes the skeleton before the tensors are loaded; the tensors themselves are plain."""

        requires_calibration = True

        def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
            config: Any = self.quantization_config
            restore_layers(model, config.layers, config.identities)
            return model

        def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
            # transformers forbids .half() and .float() on what it calls quantized; sparse layers take both.
            model.is_quantized = False
            return model

        def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
            return True

        @property
        def is_trainable(self) -> bool:
            return True

        def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
            for name, module in list(model.named_modules()):
                if isinstance(module, ShflLinear):
                    replace_module(model, [name], module.to_dense())
            return model

    register_quantization_config(METHOD)(ShflConfig)
    register_quantizer(METHOD)(ShflQuantizer)
    _CLASSES.update(config=ShflConfig, quantizer=ShflQuantizer)
    return _CLASSES
