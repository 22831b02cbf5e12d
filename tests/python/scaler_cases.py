"""A parameter and its optimizer, and a scaler with a history."""

from __future__ import annotations

import math

import torch
from halfstep import GradScaler
from torch import nn


def one_parameter(dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", size: int = 3):
    parameter = nn.Parameter(torch.ones(size, dtype=dtype, device=device))
    return parameter, torch.optim.SGD([parameter], lr=1.0)


def used_scaler(device: str = "cpu", **settings) -> GradScaler:
    parameter, optimizer = one_parameter(device=device)
    scaler = GradScaler(device, init_scale=256.0, growth_interval=3, **settings)
    for i in range(5):
        optimizer.zero_grad()
        scaler.scale(parameter.sum() * (math.inf if i == 1 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
    return scaler
