"""What a model's forward takes, whether it is Python or TorchScript."""

from __future__ import annotations

import inspect

import torch
from torch import nn


def signature_of(model: nn.Module) -> inspect.Signature:
    """Return the signature of forward; TypeError or ValueError if it cannot be known."""
    if not isinstance(model, torch.jit.ScriptModule):
        return inspect.signature(model.forward)
    if not hasattr(model, "forward"):
        raise TypeError(f"the script of {model.original_name} has no method forward")  # but some of other names
    parameters = []
    for argument in model.forward.schema.arguments[1:]:
        kind = inspect.Parameter.KEYWORD_ONLY if argument.kwarg_only else inspect.Parameter.POSITIONAL_OR_KEYWORD
        default = argument.default_value if argument.has_default_value() else inspect.Parameter.empty
        parameters.append(inspect.Parameter(argument.name, kind, default=default))
    return inspect.Signature(parameters)
