"""The autocast context that halfstep hands out."""

from __future__ import annotations

from typing import Any

import torch


class AutocastContext(torch.autocast):
    """torch.autocast that drops its cached casts of weights whenever it ends, not only when the outermost one does.

    torch keeps the casts until the outermost region ends. A training loop that runs inside an outer region would see
    the weights of its first step for ever: the optimizer updates the float32 weights, the forward pass reads the old
    casts, and the loss stands still.
    """

    def __exit__(self, *error: Any) -> Any:
        result = super().__exit__(*error)
        torch.clear_autocast_cache()
        return result
