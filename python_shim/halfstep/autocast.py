"""The autocast context that halfstep hands out."""

from __future__ import annotations

from typing import Any

import torch

from halfstep._library import load_library

load_library()
_ops = torch.ops.halfstep


class AutocastContext(torch.autocast):
    """torch.autocast that drops its cached casts of weights whenever it ends, not only when the outermost one does.

    torch keeps the casts until the outermost region ends. A training loop that runs inside an outer region would see
    the weights of its first step for ever: the optimizer updates the float32 weights, the forward pass reads the old
    casts, and the loss stands still.

    half_cross_entropy: inside, on CUDA, torch's cross_entropy of half logits [N, C] or [C] and int64 targets reads them
        as they are instead of making float32 copies; the loss is float32, differentiable once.

    One object may be entered again before it has ended, as the decorator of a recursive function is.
    """

    def __init__(
        self,
        device_type: str,
        dtype: torch.dtype | None = None,
        enabled: bool = True,
        cache_enabled: bool | None = None,
        *,
        half_cross_entropy: bool = False,
    ) -> None:
        super().__init__(device_type, dtype=dtype, enabled=enabled, cache_enabled=cache_enabled)
        self._half_cross_entropy = half_cross_entropy and self._enabled
        self._outer: list[tuple[Any, ...]] = []  # what was, one entry for each __enter__

    def __enter__(self) -> Any:
        # What is traced becomes ATen ops in any case, and the switch is no part of a program.
        if not torch.compiler.is_compiling():
            kind = self.device
            switch = _ops.set_half_reductions(self._half_cross_entropy) if kind == "cuda" else None
            before = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), torch.is_autocast_cache_enabled()
            self._outer.append((*before, switch))
        return super().__enter__()

    def __exit__(self, *error: Any) -> Any:
        result = super().__exit__(*error)
        torch.clear_autocast_cache()
        if not torch.compiler.is_compiling():
            # torch itself knows only what was before the latest __enter__.
            enabled, dtype, cache_enabled, switch = self._outer.pop()
            torch.set_autocast_enabled(self.device, enabled)
            torch.set_autocast_dtype(self.device, dtype)
            torch.set_autocast_cache_enabled(cache_enabled)
            if switch is not None:
                _ops.set_half_reductions(switch)
        return result
