"""Norms of what goes into each layer, from calibration data, for activation-aware scores."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import ArgumentError
from .observe import call_model, evaluation

__all__ = ["input_norms"]


def input_norms(model: nn.Module, calibration: Iterable[Any], names: dict[nn.Module, str]) -> dict[str, np.ndarray]:
    """Euclidean norm of every input feature of every layer over all calibration data.

    Parameters
    ----------
    model : torch.nn.Module
    calibration : iterable of inputs
        Each a tensor, a tuple or a mapping: the arguments of one forward pass.
    names : module -> name
        Layers to watch; features last in their input.

    Returns
    -------
    name -> float32 array (k,)
        `sqrt((x ** 2).sum(over tokens))`; layers that the data did not reach are missing.

    Raises
    ------
    ArgumentError
        `calibration` is empty.
    """
    sums: dict[str, torch.Tensor] = {}

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].detach().reshape(-1, args[0].shape[-1])
        # Sums of squares over many tokens outgrow float16 and the precision of float32.
        square = x.float().square().sum(0, dtype=torch.float64)
        name = names[module]
        sums[name] = sums[name] + square if name in sums else square

    handles = [module.register_forward_pre_hook(hook) for module in names]
    count = 0
    try:
        with evaluation(model):
            for inputs in calibration:
                call_model(model, inputs)
                count += 1
    finally:
        for handle in handles:
            handle.remove()
    if count == 0:
        raise ArgumentError("calibration is empty; expected at least one input of the model")
    return {name: total.sqrt().float().cpu().numpy() for name, total in sums.items()}
