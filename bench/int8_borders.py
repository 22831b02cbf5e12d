"""Where the time of an int8 model goes: its products, the borders at which values become int8, and everything else.

A layer that is given floats is called on them and on the same values in int8: the difference is its border. Norms that
write int8 are borders as a whole, with the norm that they compute. A convolution by images has no form that takes int8,
so it counts as a product alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from halfstep.int8_layers import Int8Linear
from halfstep.int8_nodes import PRODUCTS
from halfstep.int8_norms import Int8LayerNorm, Int8RMSNorm
from timing import measure, replayed
from torch import nn

NORMS = (Int8LayerNorm, Int8RMSNorm)
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def shares(model: nn.Module, example: tuple[torch.Tensor, ...], repeats: int = 11) -> dict[str, float]:
    """Return the milliseconds of "model", "products", "borders" and "rest" on this batch; CUDA graphs on a GPU."""
    device = example[0].device
    calls: list[tuple[nn.Module, Arguments]] = []
    handles = [
        module.register_forward_pre_hook(lambda module, *given: calls.append((module, given)), with_kwargs=True)
        for module in model.modules()
        if isinstance(module, (*PRODUCTS, *NORMS))
    ]
    with torch.inference_mode():
        model(*example)
        for handle in handles:
            handle.remove()

        def took(run: Callable[[], object]) -> float:
            return measure(replayed(run, device), device, repeats)

        whole, products, borders = took(partial(model, *example)), 0.0, 0.0
        for module, (args, kwargs) in calls:
            time = took(partial(module, *args, **kwargs))
            if isinstance(module, NORMS):
                borders += time
                continue
            given = _in_int8(module, args[0])
            inside = (
                time if given is None else min(time, took(partial(module, given[0], *args[1:], **kwargs, **given[1])))
            )
            products += inside
            borders += time - inside
    return {"model": whole, "products": products, "borders": borders, "rest": whole - products - borders}


def _in_int8(module: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]] | None:
    """Return the input in int8 and what says how; None if it is int8, or the layer has no form that takes it."""
    if x.dtype == torch.int8:
        return None
    if module.input_scale is not None:
        return torch.ops.halfstep.quantize_int8(x, module.input_scale, module.input_zero_point), {}
    if not isinstance(module, Int8Linear):
        return None
    quantized, scales = torch.ops.halfstep.quantize_int8_rows(x)
    return quantized, {"row_scales": scales}
