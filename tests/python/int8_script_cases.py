"""How the tests make scripts of models and quantize them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from halfstep import InferencePrecisionOptimizer
from torch import nn


def scripted(model: nn.Module, _example: Any) -> torch.jit.ScriptModule:
    return torch.jit.script(model)


def traced(model: nn.Module, example: Any) -> torch.jit.ScriptModule:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        return torch.jit.trace(model, (example,), check_trace=False)
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def frozen(model: nn.Module, _example: Any) -> torch.jit.ScriptModule:
    return torch.jit.freeze(torch.jit.script(model))


def optimized(model: torch.jit.ScriptModule, batch: Callable[[int], Any], device: str = "cpu", **options: Any) -> tuple:
    options = {"speed_guard": False, "progress": False, **options}
    inference = InferencePrecisionOptimizer(options.pop("target", "int8"), **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        result = inference.optimize_for_inference(model, [batch(8) for _ in range(6)], device)
    return inference, result


def noise(expected: torch.Tensor, got: torch.Tensor) -> float:
    return float((got.double() - expected.double()).square().sum() / expected.double().square().sum())


def calls(script: torch.jit.ScriptModule, op: str) -> int:
    return str(script.graph).count(op)
