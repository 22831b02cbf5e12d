"""The device of an optimized model: which are taken, what they are called, and whether int8 pays on another one."""

from __future__ import annotations

import contextlib
import copy
import platform
from functools import partial
from pathlib import Path

import torch
from torch import nn

from halfstep.half_model import half_model
from halfstep.int8_plan import Plan, decode
from halfstep.int8_speed import loses, share_of, time_in_turns


def checked_device(target_device: str | torch.device, argument: str = "device") -> torch.device:
    """Return the device; TypeError for no name, ValueError unless it is cpu or cuda, RuntimeError without a GPU."""
    if not isinstance(target_device, (str, torch.device)):
        raise TypeError(f"{argument} is {target_device!r}, expected a device or its name, cpu or cuda")
    try:
        device = torch.device(target_device)
    except RuntimeError:
        raise ValueError(f"{argument} is {target_device!r}, expected cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"{argument} is {device}, expected cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"{argument} is {device}, but torch sees no GPU here; pass {argument}='cpu'")
    return device


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or of the processor and what torch uses of it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def compared(
    path: Path, plan: Plan, model: nn.Module, result: nn.Module, device: torch.device, retime: bool | None
) -> str:
    """Return what to warn of: another device than the plan's, and there, or if `retime`, times of int8 that is slower.

    model, result: what was optimized, and what came of it, on `device`.
    """
    here = device_name(device)
    moved = here != plan.device.name
    if not moved and not retime:
        return ""
    said = [f"{path} was optimized on {plan.device.name}, this is {here}"] if moved else []
    if retime is not False:
        if plan.example is None:
            said.append("its times cannot be taken again: the arguments could not be written down")
        else:
            said += _times(plan, model, result, device, always=moved)
    return "; ".join(said)


def _times(plan: Plan, model: nn.Module, result: nn.Module, device: torch.device, *, always: bool) -> list[str]:
    """Return what to say of the times; nothing if int8 is not slower, but for `always`."""
    reference = copy.deepcopy(model).eval()
    if any(tensor.is_meta for tensor in (*reference.parameters(), *reference.buffers())):
        return ["its times cannot be taken again with a model on the meta device"]
    rival = half_model(reference.to(device), getattr(torch, plan.carrier))

    def random(shape: list[int], dtype: torch.dtype) -> torch.Tensor:
        if dtype.is_floating_point:
            return torch.randn(shape, device=device).to(dtype)
        return torch.zeros(shape, dtype=dtype, device=device)

    args, kwargs = decode(plan.example, random)
    try:
        calls = [partial(each, *args, **kwargs) for each in (rival, result)]
        theirs, mine = time_in_turns(calls, device)
    except Exception as error:  # the model's own code may want other inputs
        return [f"its times cannot be taken again on random inputs: {str(error).splitlines()[:1]}"]
    times = f"int8 takes {mine} here, {plan.carrier} {theirs}, {share_of(mine, theirs, plan.carrier)}"
    if loses(mine, theirs) and not plan.recurrent:  # recurrent layers are int8 for their size
        return [f"{times}: int8 is slower, optimize the model for this device again"]
    return [times] if always else []
