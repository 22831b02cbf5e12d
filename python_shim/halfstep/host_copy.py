"""Copies of a tensor to the host that nothing waits for."""

from __future__ import annotations

import torch


def send(
    tensor: torch.Tensor, into: torch.Tensor | None = None, event: torch.cuda.Event | None = None
) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    """Enqueue a copy of `tensor` to the CPU; return it, and the event after which it is whole (None: it is already).

    into, event: those of an earlier call, whose copy nobody needs any more, instead of new ones.
    """
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda) if into is None else into
    copy.copy_(tensor, non_blocking=True)
    if not tensor.is_cuda:
        return copy, None
    with torch.cuda.device(tensor.device):
        event = event or torch.cuda.Event()
        event.record()
    return copy, event
