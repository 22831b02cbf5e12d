"""Optimized models as TorchScript files: they carry their code and run in C++ and Python without the package."""

from __future__ import annotations

import os
import warnings

import torch
from torch import nn
from torch.utils import _pytree as pytree

from halfstep.half_model import CastModel
from halfstep.int8_files import replacing
from halfstep.int8_form import Arguments, call_with
from halfstep.int8_runs import disagreement


def save_script(path: str | os.PathLike[str], model: nn.Module, example: Arguments) -> None:
    """Write the model as TorchScript: scripted, or traced on `example` where a script cannot be made.

    The script must give the model's bits on the example and on a batch of another size; else ValueError says why not.
    What was at `path` is replaced when all is written.
    """
    example = _two_samples(example)
    reasons: list[str] = []
    for way in (_scripted, _traced):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                warnings.simplefilter("ignore", torch.jit.TracerWarning)  # what it warns of is tried out below
                script = way(model, example)
        except Exception as error:  # torch raises many kinds, and tracing runs the model's own code
            reasons.append(f"{way.__name__[1:]}: {_in_short(error)}")
            continue
        if different := disagreement(script, model, [example], call_with):
            reasons.append(f"{way.__name__[1:]}: it differs {different}")
            continue
        with replacing(path) as part:
            torch.jit.save(script, str(part))
        return
    raise ValueError("the model cannot be made a TorchScript file: " + "; ".join(reasons))


def _scripted(model: nn.Module, example: Arguments) -> torch.jit.ScriptModule:
    if isinstance(model, CastModel):  # arguments of any structure are beyond a script: casts are traced around it
        inner = CastModel(torch.jit.script(model.module), model.dtype, model.out_dtype).eval()
        return _traced(inner, example)
    return torch.jit.script(model)


def _traced(model: nn.Module, example: Arguments) -> torch.jit.ScriptModule:
    args, kwargs = example
    with torch.no_grad():
        if kwargs and not args:
            return torch.jit.trace(model, example_kwarg_inputs=kwargs, check_trace=False, strict=False)
        if kwargs:
            raise ValueError("the model is called with positional and keyword arguments, which no trace can take")
        return torch.jit.trace(model, args, check_trace=False, strict=False)


def _two_samples(example: Arguments) -> Arguments:
    """Return the example with its sample twice if there is but one, so that there are two sizes to try."""
    tensors = [leaf for leaf in pytree.tree_leaves(example) if isinstance(leaf, torch.Tensor) and leaf.dim()]
    if not tensors or len(tensors[0]) != 1:
        return example

    def twice(value: object) -> object:
        if isinstance(value, torch.Tensor) and value.dim() and len(value) == 1:
            return value.expand(2, *value.shape[1:]).contiguous()
        return value

    return pytree.tree_map(twice, example)


def _in_short(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
