"""How a model uses its layers: which it calls, and of which it reads the weight or another attribute without a call."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from halfstep.calibration_data import naming
from halfstep.calls import without_compiler
from halfstep.int8_weights import WeightProducts

_WHOLE = ("parameters", "named_parameters")  # of a layer itself; those of a model around it call neither
_FEWEST = 3  # batches that are run in any case


@dataclass
class Use:
    """What the runs saw of one layer."""

    called: bool = False
    read: str = ""  # an attribute that code outside of the layer has read

    @property
    def obstacle(self) -> str:
        """Return "" or why no layer of another class can stand in the layer's place."""
        if self.read:
            return read_elsewhere(self.read)
        return "" if self.called else NEVER_CALLED


NEVER_CALLED = "never called during calibration"


def read_elsewhere(attribute: str) -> str:
    """Return the reason for which a layer stays that other code reads."""
    return f"its {attribute} is read by other code"


def uses_of(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Sequence[Callable[[nn.Module], Any]],
    products: WeightProducts | None = None,
) -> dict[str, Use]:
    """Run the model without gradients and return how it used each of these layers, which are modules of it.

    batches: each is called with the model. As many are run as it takes to see all layers called, but three at least.
    products: watches, outside of these layers, what code does with other weights.
    """
    uses = {name: Use() for name in layers}
    with torch.no_grad(), without_compiler(model), contextlib.ExitStack() as probes:
        for name, layer in layers.items():
            probes.enter_context(_probed(layer, uses[name], products))
        if products is not None:
            probes.enter_context(products)
        for number, batch in enumerate(batches):
            if number >= _FEWEST and all(use.called for use in uses.values()):
                break
            with naming(batch, model):
                batch(model)
    return uses


@contextlib.contextmanager
def _probed(layer: nn.Module, use: Use, products: WeightProducts | None) -> Iterator[None]:
    """Let the layer be of a class that notes its uses."""
    kind = type(layer)
    watched = {name for name in vars(layer) if not name.startswith("_")} - {"training"}
    watched |= {*layer._parameters, *_WHOLE}
    depth = 0

    class Probe(kind):
        def __getattribute__(self, name: str) -> Any:
            if not depth and name in watched:
                use.read = use.read or ("weight" if name in _WHOLE else name)
            return super().__getattribute__(name)

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            use.called = True
            depth += 1
            if products is not None:
                products.paused += 1
            try:
                return super().forward(*args, **kwargs)
            finally:
                depth -= 1
                if products is not None:
                    products.paused -= 1

    layer.__class__ = Probe
    try:
        yield
    finally:
        layer.__class__ = kind
