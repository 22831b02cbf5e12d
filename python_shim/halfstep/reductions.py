"""Half-precision norms inside a model: torch's norm modules call halfstep's ops where autocast is on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from halfstep._library import load_library
from halfstep.watched import Unscriptable

load_library()
_ops = torch.ops.halfstep

_HALF = (torch.float16, torch.bfloat16)
_PARAMETERS = (torch.float32, *_HALF)
_FASTER_ON_CPU = (nn.RMSNorm,)  # torch's other two read half there already, and its kernels are the faster ones
_NORMS = {"layer_norm": nn.LayerNorm, "rms_norm": nn.RMSNorm, "group_norm": nn.GroupNorm}


class HalfNorm(Unscriptable):
    """The `forward` of one LayerNorm, RMSNorm or GroupNorm: float32 arithmetic, half out.

    It acts on a strided input while autocast is on for the input's device. A float16 or bfloat16 input gives its own
    dtype, where autocast on CUDA gives float32 or computes in several passes. With `float32_input` a float32 one, a
    residual stream, gives autocast's dtype, which the next product would cast it to. Everything else is the forward of
    the module's class, untouched: other dtypes, autocast off, a float64 weight, and what torch does better:

    - layer_norm and group_norm on the CPU;
    - group_norm on an input that is not contiguous, such as channels_last: torch's keeps the memory format.

    It holds the module and reads the weights when it is called. So copies, pickles and torch.func.functional_call use
    the weights they should.
    """

    what, remedy = "the half-precision norms of halfstep", "manager.remove_policy(model)"

    def __init__(self, module: nn.Module, *, float32_input: bool) -> None:
        self.module = module
        self.float32_input = float32_input

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return what the module's class returns, of the input's dtype where this acts (see the class)."""
        module = self.module
        if kwargs or len(args) != 1 or not _takes(module, args[0], float32_input=self.float32_input):
            return type(module).forward(module, *args, **kwargs)
        x = args[0]
        dtype = torch.get_autocast_dtype(x.device.type) if x.dtype is torch.float32 else x.dtype
        if isinstance(module, nn.LayerNorm):
            return _ops.layer_norm(x, module.normalized_shape, module.weight, module.bias, module.eps, out_dtype=dtype)
        if isinstance(module, nn.RMSNorm):
            return _ops.rms_norm(x, module.normalized_shape, module.weight, module.eps, out_dtype=dtype)
        return _ops.group_norm(x, module.num_groups, module.weight, module.bias, module.eps, out_dtype=dtype)


def _takes(module: nn.Module, x: Any, *, float32_input: bool) -> bool:
    """Whether halfstep's op computes `module` on `x`."""
    if not isinstance(x, torch.Tensor) or x.layout is not torch.strided or x.is_nested:
        return False
    if x.dtype not in _HALF and not (float32_input and x.dtype is torch.float32):
        return False
    device = x.device.type
    if device not in ("cuda", "cpu") or not torch.is_autocast_enabled(device):
        return False
    if device == "cpu" and not isinstance(module, _FASTER_ON_CPU):
        return False
    if isinstance(module, nn.GroupNorm) and not x.is_contiguous():
        return False
    return module.weight is None or module.weight.dtype in _PARAMETERS


def use_half_norms(model: nn.Module, names: Iterable[str]) -> None:
    """Let the norms of `model` that `names` lists, and no others, run as HalfNorm says.

    names: out of "layer_norm", "rms_norm" and "group_norm", and "float32_input", that they take float32 inputs too;
    others are none of a module's.
    Takes modules of exactly torch's classes. Left alone are subclasses, parametrized ones, those whose `forward`
    somebody else has replaced, and all inside of torch.nn.DataParallel, whose replicas share this object.
    """
    names = set(names)
    kinds = {kind for name, kind in _NORMS.items() if name in names}
    float32_input = "float32_input" in names
    replicated = {inner for outer in model.modules() if isinstance(outer, nn.DataParallel) for inner in outer.modules()}
    for module in model.modules():
        wanted = type(module) in kinds and module not in replicated
        forward = module.__dict__.get("forward")
        if isinstance(forward, HalfNorm) and not (wanted and forward.module is module):
            del module.forward
            forward = None
        if wanted and forward is None:  # one that is there stays: compiled code is made for it
            module.forward = HalfNorm(module, float32_input=float32_input)
        elif wanted and isinstance(forward, HalfNorm):
            forward.float32_input = float32_input


@contextlib.contextmanager
def float32_stream_kept(model: nn.Module) -> Iterator[None]:
    """Leave norms of float32 inputs to torch, which returns float32: where norms carry the residual stream on."""
    forwards = (module.__dict__.get("forward") for module in model.modules())
    acting = [forward for forward in forwards if isinstance(forward, HalfNorm) and forward.float32_input]
    for forward in acting:
        forward.float32_input = False
    try:
        yield
    finally:
        for forward in acting:
            forward.float32_input = True


def remove_half_norms(model: nn.Module) -> None:
    """Undo use_half_norms(): no trace of it stays in `model`."""
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), HalfNorm):
            del module.forward
