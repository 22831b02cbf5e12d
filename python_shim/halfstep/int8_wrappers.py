"""Modules that stand around others and change nothing of what they compute: of compilers and of parallel training."""

from __future__ import annotations

from torch import nn

from halfstep.calls import is_compiled
from halfstep.shadow import unwrapped

_PARALLEL = (nn.parallel.DistributedDataParallel, nn.DataParallel)


def any_compiled(model: nn.Module) -> bool:
    """Return whether torch.compile stands around the model or a module in it."""
    return any(map(is_compiled, model.modules()))


def plain_name(name: str) -> str:
    """Return the name that a module or tensor has without the wrappers of compilers around it."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def without_wrappers(model: nn.Module) -> tuple[nn.Module, list[str]]:
    """Take wrappers out of `model`, in place; the caller owns the model.

    Returns the model (the module inside, if it is itself wrapped) and the names that the modules within have then. A
    module in several places stays one module. Nothing is left of Module.compile() in a copy.
    """
    model = inner_of(model)
    found: list[str] = []
    for name, module in list(model.named_modules()):
        for child_name, child in module._modules.items():
            if child is not None and (inner := inner_of(child)) is not child:
                module._modules[child_name] = inner
                found.append(plain_name(f"{name}.{child_name}" if name else child_name))
    return model, found


def inner_of(module: nn.Module) -> nn.Module:
    """Return the module inside of all wrappers that stand directly around it."""
    while True:
        inner = unwrapped(module)[1]
        inner = inner.module if isinstance(inner, _PARALLEL) else inner
        if inner is module:
            return module
        module = inner
