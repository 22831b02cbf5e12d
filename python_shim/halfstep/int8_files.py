"""What is in a file of an optimized model: weights as safetensors, and a plan of how it was optimized. No code.

int8_save writes such files, int8_load reads them; this is what both know of them.
"""

from __future__ import annotations

import hashlib
import importlib
import zlib
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from halfstep.int8_joins import Int8JoinedLinear
from halfstep.int8_nodes import INT8_LAYERS
from halfstep.int8_recurrent import Int8Recurrent, Int8Weight

FORMAT, PLAN, DIGEST = "format", "halfstep_plan", "halfstep_plan_sha256"  # the keys of the file's metadata
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
PARTS = ("weight", "scales", "bias", "input_factors")  # of an int8 layer, a tensor each


def int8_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the int8 layers by name, without recurrent ones; for joined ones the layers that they stand for."""
    return _layers(model, INT8_LAYERS)


def recurrent_layers(model: nn.Module) -> dict[str, Int8Recurrent]:
    """Return the recurrent layers with int8 weights by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Int8Recurrent)}


def packed_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return what has packed weights by name: int8 layers, and each weight of recurrent ones."""
    return _layers(model, (*INT8_LAYERS, Int8Weight))


def _layers(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, Int8JoinedLinear):
            found.update(module.parts())
        elif isinstance(module, kinds):
            found[name] = module
    return found


def float_tensors(model: nn.Module, int8: Collection[nn.Module]) -> dict[str, torch.Tensor]:
    """Return parameters and buffers but for those of `int8`, each under the first of its names."""
    found: dict[int, tuple[str, torch.Tensor]] = {}
    left_out = {id(module) for module in int8}
    for prefix, module in model.named_modules():
        if id(module) not in left_out:
            own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
            for name, tensor in own:
                found.setdefault(id(tensor), (join(prefix, name), tensor))
    return dict(found.values())


def checksum(tensor: torch.Tensor) -> int:
    """Return the CRC-32 of the bytes of a contiguous tensor on the CPU, which are the file's."""
    return zlib.crc32(tensor.detach().flatten().view(torch.uint8).numpy())


def digest(text: str) -> str:
    """Return the SHA-256 of a plan."""
    return hashlib.sha256(text.encode()).hexdigest()


def join(prefix: str, name: str) -> str:
    """Return the name of a part of what `prefix` names; "" is the model itself."""
    return f"{prefix}.{name}" if prefix else name


def package(name: str) -> Any:
    """Import from safetensors, and say how to install it if it is missing."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != "safetensors":
            raise
        raise ModuleNotFoundError(
            "files of optimized models need safetensors: pip install safetensors", name="safetensors"
        ) from error
