"""Plans for TorchScript: scripted and traced modules, rewritten for inference in the precisions of a plan."""

from __future__ import annotations

import torch

from halfstep._library import load_library
from halfstep.policy import PrecisionPlan

load_library()


def lower(
    module: torch.jit.ScriptModule,
    plan: PrecisionPlan,
    autocast_dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    *,
    half_reductions: bool = False,
) -> torch.jit.ScriptModule:
    """Return a copy of `module` that computes, without autocast, what a model with `plan` applied does under it.

    module: scripted, traced or loaded, in eval mode; it stays as it is and shares no memory with the copy.
    plan: made for this module, or for the model that it was made from; float32, float16 and bfloat16 alone.
    autocast_dtype: what runs outside of the plan's layers, torch.float16 or torch.bfloat16; by default the half
    precision of the plan, and float32 where it has none.
    device: where the copy will run, since autocast has other lists for CPU and CUDA; by default that of the module's
    parameters and buffers.
    half_reductions: norms, softmax and embeddings in half regions read and write half, as `.half()` has them, where
    autocast runs them in float32. Faster, and not autocast's bits.

    The copy has `forward`, all calls inlined, and every attribute; other methods are left out. Parameters that are only
    used in one half type are stored in it. Its file needs nothing but LibTorch.
    Scripts of torch's transformer encoders call the layers that are planned otherwise than what is around them. Traces
    that took their fused path cannot: trace after torch.backends.mha.set_fastpath_enabled(False).
    Raises ValueError where the module has not the plan's layers, is in training mode, or does what cannot be lowered
    (methods of interfaces, fork, Python functions, autocast regions of its own, such traces), naming it; and where the
    calls of layers that are planned otherwise are gone, as from a module that was lowered already.
    """
    if not isinstance(module, torch.jit.ScriptModule):
        raise TypeError(f"module is {type(module).__name__}, expected a module from torch.jit.script, trace or load")
    if not isinstance(plan, PrecisionPlan):
        raise TypeError(f"plan is {type(plan).__name__}, expected PrecisionPlan")
    if autocast_dtype is not None and not isinstance(autocast_dtype, torch.dtype):
        raise TypeError(f"autocast_dtype is {autocast_dtype!r}, expected torch.float16 or torch.bfloat16")
    if not isinstance(half_reductions, bool):
        raise TypeError(f"half_reductions is {half_reductions!r}, expected True or False")
    device = None if device is None else torch.device(device)
    lowered = torch.ops.halfstep.lower(module._c, plan._plan, autocast_dtype, device, half_reductions)
    return torch.jit._recursive.wrap_cpp_module(lowered)
