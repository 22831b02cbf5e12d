"""residual="float32" computes autocast's bits, whatever a module does with its parameters; float16 keeps values."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from halfstep import MixedPrecisionManager
from halfstep.half_weights import OUT_OF_RANGE, HalfWeights
from test_half_weights import WIDTH, Run, same_parameters
from test_half_weights_edges import Net
from torch import nn
from torch.nn import functional as F


class StandardizedConv(nn.Conv1d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        variance, mean = torch.var_mean(self.weight, dim=(1, 2), keepdim=True)
        return self._conv_forward(x, (self.weight - mean) * torch.rsqrt(variance + 1e-10), self.bias)


class Cosine(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 16 * F.linear(F.normalize(x.float(), dim=-1), F.normalize(self.weight, dim=-1))


class Normalized(nn.LSTMCell):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x * self.weight_ih.norm())[0]


class Over(nn.Module):
    """Calls one module on channels, or step by step, or as attention does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(self.module, nn.modules.conv._ConvNd):
            return self.module(x.transpose(1, 2)).transpose(1, 2)
        if isinstance(self.module, nn.MultiheadAttention):
            return self.module(x, x.flip(1), x)[0]
        if isinstance(self.module, Normalized):
            return torch.stack([self.module(each) for each in x.unbind(1)], dim=1)
        if isinstance(self.module, nn.Bilinear):
            return self.module(x, x)
        hidden, states = None, []
        for each in x.unbind(1):
            hidden = self.module(each, hidden)
            states.append(hidden[0] if isinstance(hidden, tuple) else hidden)
        return torch.stack(states, dim=1)


def patched() -> nn.Module:
    layer = nn.Linear(WIDTH, WIDTH)
    layer.forward = lambda x: F.linear(x, F.normalize(layer.weight, dim=-1), layer.bias)
    return layer


def pair(device: torch.device, middle: Callable[[], nn.Module]) -> tuple[Run, Run]:
    """Return the same training with residual="float32" and as the plain loop."""
    runs = []
    for capture in (True, False):
        torch.manual_seed(0)
        runs.append(Run(device, Net(middle()), capture=False))
        runs[-1].manager.update_config(gradient_clipping_threshold=math.inf)  # sums half gradients in another order
        if capture:
            runs[0].step = runs[0].manager.capture(runs[0].train, residual="float32")
    return runs[0], runs[1]


WITHOUT_COPIES: dict[str, Callable[[], nn.Module]] = {
    "standardized convolution": lambda: Over(StandardizedConv(WIDTH, WIDTH, 3, padding=1)),
    "cosine": lambda: Cosine(WIDTH, WIDTH),
    "normalized cell": lambda: Over(Normalized(WIDTH, WIDTH)),
    "bilinear": lambda: Over(nn.Bilinear(WIDTH, WIDTH, WIDTH)),
    "patched": patched,
}
WITH_COPIES: dict[str, Callable[[], nn.Module]] = {
    "conv": lambda: Over(nn.Conv1d(WIDTH, WIDTH, 3, padding=1, padding_mode="circular")),
    "transposed": lambda: Over(nn.ConvTranspose1d(WIDTH, WIDTH, 3, padding=1)),
    "attention": lambda: Over(nn.MultiheadAttention(WIDTH, 4, batch_first=True, add_bias_kv=True)),
    "rnn": lambda: Over(nn.RNNCell(WIDTH, WIDTH)),
    "lstm": lambda: Over(nn.LSTMCell(WIDTH, WIDTH)),
    "gru": lambda: Over(nn.GRUCell(WIDTH, WIDTH)),
}


@pytest.mark.parametrize("middle", WITHOUT_COPIES.values(), ids=WITHOUT_COPIES.keys())
def test_layers_that_may_need_float32_have_no_copies(
    device: torch.device, middle: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    half, plain = pair(device, middle)
    assert half.losses(6) == plain.losses(6)
    assert same_parameters(half, plain)
    assert not set(half.model.middle.parameters()) & half.half.copies.keys()
    assert half.model.head.weight in half.half.copies


@pytest.mark.parametrize("middle", WITH_COPIES.values(), ids=WITH_COPIES.keys())
def test_layers_of_torch_compute_the_same_on_copies(device: torch.device, middle: Callable[[], nn.Module]) -> None:
    half, plain = pair(device, middle)
    assert half.losses(6) == plain.losses(6)
    assert same_parameters(half, plain)
    have = {name for name, parameter in half.model.named_parameters() if parameter in half.half.copies}
    without = {"middle.module.bias_k", "middle.module.bias_v", "embedding.weight"}
    assert have == {name for name, _ in half.model.named_parameters()} - without


class Scaled(nn.Module):
    """A residual branch with a layer scale."""

    def __init__(self, scale: list[float]) -> None:
        super().__init__()
        self.layer = nn.Linear(len(scale), len(scale))
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.scale * self.layer(x)


@pytest.mark.parametrize(
    ("scale", "fits"),
    [
        ([1e-8] * 4, False),
        ([1e5, 1.0, 1.0, 1.0], False),
        ([1e-5, 1e-5, 1e-5, 1.0], False),
        ([1e-5, 1e-5, 1.0, 1.0], True),
        ([0.0, 0.0, 0.0, 1e-5], False),
        ([0.0] * 4, True),
        ([float("inf"), 65504.0, 2**-14, 1.0], True),
    ],
)
def test_values_that_float16_does_not_hold_stay_float32(device: torch.device, scale: list[float], fits: bool) -> None:
    model = Scaled(scale).to(device)
    with torch.no_grad():
        model.layer.weight.fill_(1e-8)  # autocast rounds this one too
    for dtype in (torch.float16, torch.bfloat16):
        half = HalfWeights(model, dtype, "half")
        assert model.layer.weight in half.copies
        assert half.kept == ({} if fits or dtype is torch.bfloat16 else {"scale": OUT_OF_RANGE})


@pytest.mark.parametrize("value", [1e-8, 1e5])
@pytest.mark.filterwarnings("ignore:mixed_float16 on this processor")
def test_a_small_or_large_layer_scale_trains_as_under_autocast(device: torch.device, value: float) -> None:
    x = torch.randn(8, 4, device=device)
    runs = []
    for capture in (True, False):
        torch.manual_seed(0)
        model = Scaled([value] * 4).to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        manager = MixedPrecisionManager(framework="pytorch", precision_policy="mixed_float16", initial_loss_scale=1.0)
        _, _, scaler = manager.setup_pytorch_training(model, optimizer)

        def train(model=model, optimizer=optimizer, manager=manager, scaler=scaler) -> torch.Tensor:
            optimizer.zero_grad()
            with manager.autocast_context():
                change = model(x) - x
            loss = (change.float() / value).pow(2).mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            return loss.detach()

        step = manager.capture(train) if capture else train
        runs.append([step().item() for _ in range(4)])
    assert runs[0] == runs[1]
    assert all(0 < loss < float("inf") for loss in runs[0])
