"""The float model in the form in which its layers become int8: traced and folded where that can be proven."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from halfstep.calibration_data import Batch
from halfstep.half_model import half_model
from halfstep.int8_model import replace_layers
from halfstep.int8_report import Report
from halfstep.int8_speed import Timing, time_in_turns


@dataclass
class Region:
    """Layers between which values stay int8, in the order in which they run."""

    layers: list[str]
    fused: list[str] = field(default_factory=list)


class Form:
    """`model` is the float model whose layers are replaced."""

    def __init__(self, reference: nn.Module, batches: list[Batch], options: Any, report: Report) -> None:
        self.model = copy.deepcopy(reference)

    def build(self, inner: nn.Module, layers: dict[str, nn.Module], dtype: torch.dtype) -> nn.Module:
        return replace_layers(inner, layers)

    def regions(self, inner: nn.Module, layers: dict[str, nn.Module], dtype: torch.dtype) -> list[Region]:
        return [Region([name]) for name in layers]

    def time_region(
        self, region: Region, inner: nn.Module, layers: dict[str, nn.Module], batch: Batch, dtype: torch.dtype
    ) -> dict[str, Timing]:
        (name,) = region.layers
        layer = inner.get_submodule(name)
        own = self.model.get_submodule(name)
        captured: list[torch.Tensor] = []
        handle = own.register_forward_hook(lambda _m, args, _o: captured.append(args[0]))
        try:
            with torch.no_grad():
                batch(self.model)
        finally:
            handle.remove()
        value = captured[0]
        if not value.is_floating_point():
            return {"int8": Timing(0.0, 0.0, 0.0, 0)}
        half = value.to(dtype)
        calls = {str(value.dtype).removeprefix("torch."): partial(own, value)}
        calls[str(dtype).removeprefix("torch.")] = partial(layer, half)
        calls["int8"] = partial(layers[name], half)
        return dict(zip(calls, time_in_turns(list(calls.values()), value.device), strict=True))
