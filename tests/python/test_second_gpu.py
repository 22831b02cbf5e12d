"""Two GPUs: what lies on the second is computed there, although the first is the current one, with the same bits.

The other half of this, one process for each GPU, is test_distributed.py.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from adaptive_cases import small_model, step
from halfstep import AdaptivePrecisionManager, GradScaler, InferencePrecisionOptimizer, MixedPrecisionManager
from halfstep.int8_layers import Int8Conv2d, Int8Embedding, Int8Linear, pack
from inference_cases import Cnn, digits
from torch import nn

pytestmark = [pytest.mark.cuda, pytest.mark.two_gpus]
FIRST, SECOND = torch.device("cuda:0"), torch.device("cuda:1")
ops = torch.ops.halfstep


@pytest.fixture(autouse=True)
def _current_device_stays() -> None:
    torch.cuda.set_device(FIRST)
    yield
    assert torch.cuda.current_device() == 0


def linear(rows: int, width: int, channels: int, **settings: object) -> tuple[nn.Module, torch.Tensor]:
    return Int8Linear(pack(torch.randn(channels, width)), **settings), torch.randn(rows, width)


def conv(channels: int, outputs: int, size: int, **geometry: int) -> tuple[nn.Module, torch.Tensor]:
    weight = torch.randn(outputs, channels // geometry.get("groups", 1), size, size)
    images = torch.randn(4, channels, 14, 14).to(memory_format=torch.channels_last)
    return Int8Conv2d(pack(weight, torch.randn(outputs), **geometry), input_scale=0.03), images


# One of each family of kernels; those that use much shared memory have to be told so on each GPU.
LAYERS: dict[str, Callable[[], tuple[nn.Module, torch.Tensor]]] = {
    "one row": lambda: linear(1, 512, 256),
    "few rows": lambda: linear(24, 512, 256),
    "Hopper's rows": lambda: linear(384, 512, 256, input_scale=0.03, activation="relu"),
    "rows of any width": lambda: linear(70, 77, 33, input_scale=0.03, input_zero_point=5),
    "Hopper's 1 x 1": lambda: conv(64, 128, 1),
    "Hopper's 3 x 3": lambda: conv(64, 64, 3, padding=1),
    "Hopper's patches": lambda: conv(3, 64, 14, stride=14),
    "3 x 3": lambda: conv(24, 40, 3, padding=1, stride=2),
    "depthwise": lambda: conv(64, 64, 3, padding=1, groups=64),
    "embedding": lambda: (Int8Embedding(pack(torch.randn(50, 32))), torch.randint(50, (7, 9))),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str) -> None:
    layer, x = LAYERS[name]()
    expected = layer(x)
    # The second first: what is prepared once for a GPU must not count for the other.
    for device in (SECOND, FIRST, SECOND):
        moved = copy.deepcopy(layer).to(device)
        with torch.cuda.device(FIRST):
            y = moved(x.to(device))
        assert y.device == device
        assert torch.equal(y.cpu(), expected)


def test_a_layer_moves_from_one_gpu_to_the_other_and_packs_where_its_input_is() -> None:
    layer, x = linear(40, 64, 32)
    expected = layer(x)
    layer.to(FIRST).to(SECOND)
    for device in (SECOND, FIRST):
        y = layer(x.to(device))
        assert y.device == device
        assert torch.equal(y.cpu(), expected)


def test_quantization_norms_and_pooling() -> None:
    x = torch.randn(64, 96)
    images = torch.randint(-128, 128, (2, 16, 9, 9), dtype=torch.int8).to(memory_format=torch.channels_last)

    def all_of(device: torch.device) -> list[torch.Tensor]:
        there = x.to(device)
        quantized = ops.quantize_int8(there, 0.03, 4)
        return [
            quantized,
            *ops.quantize_int8_rows(there),
            ops.dequantize_int8(quantized, 0.03, 4),
            *ops.layer_norm_int8(there, [96], scale=0.03)[:1],
            *ops.rms_norm_int8(there, [96])[:2],
            ops.int8_max_pool2d(images.to(device), 3, 2, 1),
        ]

    for first, second in zip(all_of(FIRST), all_of(SECOND), strict=True):
        assert second.device == SECOND
        assert torch.equal(first.cpu(), second.cpu())


def test_an_observer_adds_what_it_sees_on_both() -> None:
    here, both = (torch.classes.halfstep.Observer(1) for _ in range(2))
    for number, scale in enumerate((1.0, 3.0, 0.5, 2.0)):
        batch = torch.randn(100, 8) * scale
        here.observe(batch)
        both.observe(batch.to(SECOND if number % 2 else FIRST))
    for estimator in ("min_max", "percentile", "mse", "entropy"):
        assert both.parameters(estimator, False, 8) == here.parameters(estimator, False, 8)


def test_an_optimized_model_on_the_second(tmp_path: Path) -> None:
    images, labels = digits()
    model = Cnn().eval()
    batches = [(images[i : i + 100], labels[i : i + 100]) for i in range(0, 600, 100)]
    inference = InferencePrecisionOptimizer(accuracy_threshold=0.9, speed_guard=False)
    small = inference.optimize_for_inference(model, batches, target_device="cuda:1")
    assert inference.report()["result"] == "int8"
    expected = small(images[:50].to(SECOND))
    assert expected.device == SECOND
    inference.save(tmp_path / "small.safetensors")
    inference.save_torchscript(tmp_path / "small.pt")
    for device in (FIRST, SECOND):
        x = images[:50].to(device)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loaded = InferencePrecisionOptimizer.load(tmp_path / "small.safetensors", model, device)
        script = torch.jit.load(tmp_path / "small.pt", map_location=device)
        for again in (loaded, script):
            y = again(x)
            assert y.device == device
            assert torch.equal(y.cpu(), expected.cpu())


class TwoStages(nn.Module):
    """A model whose halves are on two GPUs."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, 64).to(FIRST)
        self.second = nn.Linear(64, 10).to(SECOND)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(F.relu(self.first(x.to(FIRST))).to(SECOND))


def train(scaler: torch.amp.GradScaler, optimizer: str, bad: dict[int, str]) -> tuple[list[torch.Tensor], list[float]]:
    torch.manual_seed(0)
    model = TwoStages()
    stepper = getattr(torch.optim, optimizer)(model.parameters(), lr=1e-2)
    scales = []
    for number in range(8):
        stepper.zero_grad()
        loss = model(torch.randn(16, 32)).square().mean()
        scaler.scale(loss).backward()
        if number in bad:
            getattr(model, bad[number]).weight.grad[0, 0] = float("inf")
        scaler.unscale_(stepper)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5, foreach=False)
        scaler.step(stepper)
        scaler.update()
        scales.append(scaler.get_scale())
    return [parameter.detach().cpu() for parameter in model.parameters()], scales


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_one_model_on_both_trains_as_with_torchs_scaler(optimizer: str) -> None:
    bad = {2: "first", 4: "second"}
    settings = {"init_scale": 2.0**10, "growth_interval": 3}
    ours, our_scales = train(GradScaler("cuda", **settings), optimizer, bad)
    torchs, their_scales = train(torch.amp.GradScaler("cuda", **settings), optimizer, bad)
    assert our_scales == their_scales
    # As on one GPU (test_grad_scaler.py): torch's unfused kernels round hyperparameters to float32.
    torch.testing.assert_close(ours, torchs, rtol=1e-5, atol=1e-6)


def losses_of(device: torch.device, captured: bool) -> list[float]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10)).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    manager = MixedPrecisionManager(framework="pytorch")
    model, optimizer, scaler = manager.setup_pytorch_training(model, optimizer)

    def one_step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        with manager.autocast_context():
            loss = F.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss

    run = manager.capture(one_step, warmup=3) if captured else one_step
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(10):
        x, y = torch.randn(16, 32, generator=generator), torch.randint(0, 10, (16,), generator=generator)
        losses.append(run(x.to(device), y.to(device)).item())
    return losses


@pytest.mark.parametrize("captured", [False, True])
def test_a_manager_trains_on_the_second_as_on_the_first(captured: bool) -> None:
    assert losses_of(SECOND, captured) == losses_of(FIRST, captured)


def test_adaptive_fallback_on_the_second() -> None:
    def trained_on(device: torch.device) -> tuple[list[dict], list[float]]:
        model = small_model().to(device)
        with torch.no_grad():
            model[2].weight.mul_(1e6)  # its products leave float16
        x, adaptive = torch.randn(32, 8).to(device), AdaptivePrecisionManager(adaptation_interval=4)
        optimizer = torch.optim.SGD(model.parameters(), 1e-12)
        losses = [
            step(adaptive, model, optimizer, lambda: model(x).square().mean(), batch=batch) for batch in range(10)
        ]
        return adaptive.get_adaptation_stats()["decisions"], losses

    first, second = trained_on(FIRST), trained_on(SECOND)
    assert first == second
    assert first[0]
