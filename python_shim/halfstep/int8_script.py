"""Optimized models as TorchScript files: they carry their code and run in C++ and Python without the package.

Such a file is a ZIP archive, with a CRC-32 of each record that torch writes and does not compare.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule
from torch.utils import _pytree as pytree

from halfstep._library import load_library
from halfstep.calibration_data import Batch
from halfstep.containers import PLAIN, tensors_of
from halfstep.half_model import CastModel
from halfstep.int8_device import checked_device
from halfstep.int8_runs import Call, disagreement
from halfstep.signatures import signature_of
from halfstep.whole_files import check_archive, check_readable, replacing


def save_script(path: str | os.PathLike[str], model: nn.Module, example: Batch) -> None:
    """Write the model as TorchScript: scripted, or traced on `example` where a script cannot be made.

    A traced model takes the tensors of `example` by the names that they have in the model; numbers and strings stay
    what they are there. The script must give the model's bits on the example and on a batch of another size; else
    ValueError says why not. A model that is a script already is written as it is. What was at `path` is replaced when
    all is written.
    """
    if isinstance(model, torch.jit.ScriptModule):
        _save(path, model)
        return
    if example.size == 1:  # so that there are two sizes to try
        example = example.twice()
    reasons: list[str] = []
    for way in (_scripted, _traced):
        try:
            with _quiet():
                script, call = way(model, example)
        except Exception as error:  # torch raises many kinds, and tracing runs the model's own code
            reasons.append(f"{way.__name__[1:]}: {_in_short(error)}")
            continue
        if different := disagreement(script, model, [example], call):
            reasons.append(f"{way.__name__[1:]}: it differs {different}")
            continue
        _save(path, script)
        return
    with torch.no_grad():
        kind = _foreign_class(example(model))
    if kind:
        reasons.append(
            f"the model returns {kind}, and a TorchScript file returns tensors, or tuples, lists and dicts of them: "
            "optimize a module around it that returns such (models of transformers do with return_dict=False)"
        )
    raise ValueError("the model cannot be made a TorchScript file: " + "; ".join(reasons))


def load_script(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> torch.jit.ScriptModule:
    """Return the model that save_torchscript() wrote, on `device`; halfstep's library is loaded for it.

    All records are read and their checksums compared before torch.jit.load() is given the file. ValueError for a file
    that is damaged, larger inside than any such file is, or no TorchScript; FileNotFoundError if there is none.
    """
    device, path = checked_device(device), Path(path)
    check_readable(path)
    try:
        check_archive(path, "data.pkl", "constants.pkl")
        load_library()
        with _quiet():
            return torch.jit.load(str(path), map_location=device)
    except (zipfile.BadZipFile, RuntimeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a TorchScript file, or a damaged one: {_in_short(error)}") from error


def _save(path: str | os.PathLike[str], script: torch.jit.ScriptModule) -> None:
    with replacing(path) as part, _quiet():
        torch.jit.save(script, str(part))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch from warning of TorchScript itself, and of what a trace may miss: that is tried out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        warnings.filterwarnings("ignore", "The TorchScript type system")
        yield


Made = tuple[torch.jit.ScriptModule, Call]  # the script, and how it and the model are called on a batch


def _scripted(model: nn.Module, example: Batch) -> Made:
    if isinstance(model, CastModel):  # arguments of any structure are beyond a script: casts are traced around it
        return _traced(CastModel(torch.jit.script(model.module), model.dtype, model.out_dtype), example, model)
    return torch.jit.script(model), lambda module, batch: batch(module)


def _traced(model: nn.Module, example: Batch, original: nn.Module | None = None) -> Made:
    original = original or model
    named, tensors = _by_name(model, original, example)
    with torch.no_grad():
        script = torch.jit.trace(named, tensors, check_trace=False, strict=False)

    def call(module: nn.Module, batch: Batch) -> Any:
        if module is original:
            return batch(module)
        return module(*_by_name(original, original, batch)[1])

    return script, call


def _by_name(model: nn.Module, original: nn.Module, example: Batch) -> tuple[GraphModule, tuple[Any, ...]]:
    """Return a module that calls `model` and takes what has tensors in `example`, and that.

    It has the parameters' names of the original's forward: a trace takes no others, nor keywords of any name.
    """
    inner = original.module if isinstance(original, CastModel) else original
    args, kwargs = example.arguments()
    bound = signature_of(inner).bind(*args, **kwargs)
    graph = Graph()
    tensors: list[Any] = []

    def taken(name: str, value: Any) -> Any:
        found = tensors_of(value)
        if not found:
            return value
        if len(found) > sum(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(value)):
            raise TypeError(
                f"argument {name} is a {type(value).__name__}, expected tensors, or tuples, lists and dicts of them"
            )
        tensors.append(value)
        return graph.placeholder(name)

    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            bound.arguments[name] = tuple(taken(f"{name}_{place}", each) for place, each in enumerate(value))
        elif kind is inspect.Parameter.VAR_KEYWORD:
            bound.arguments[name] = {key: taken(key, each) for key, each in value.items()}
        else:
            bound.arguments[name] = taken(name, value)
    graph.output(graph.call_module("model", bound.args, bound.kwargs))
    return GraphModule({"model": model}, graph, type(inner).__name__).eval(), tuple(tensors)


def _foreign_class(value: Any) -> str:
    """Return "" or the class of the first container in an output that TorchScript has nothing for."""
    if type(value) in (tuple, list, dict):
        items = value.values() if isinstance(value, dict) else value
        return next(filter(None, map(_foreign_class, items)), "")
    known = value is None or isinstance(value, (torch.Tensor, *PLAIN))
    return "" if known else type(value).__name__


def _in_short(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
