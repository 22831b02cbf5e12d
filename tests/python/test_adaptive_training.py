"""Whole training runs under AdaptivePrecisionManager: planted faults, other parts of halfstep, several ranks."""

from __future__ import annotations

import math
import os
import socket

import pytest
import torch
import torch.multiprocessing
from adaptive_cases import step
from halfstep import AdaptivePrecisionManager, GradScaler, MixedPrecisionManager
from seed_document import block
from torch import nn

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.cuda.amp.autocast.*", "ignore:.*float16 arithmetic.*")


class Planted(nn.Module):
    """A network with one layer whose output float16 cannot hold; the norm after it brings it back."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 32)
        self.planted = nn.Linear(32, 32)
        self.norm = nn.LayerNorm(32)
        self.hidden = nn.Linear(32, 32)
        self.last = nn.Linear(32, 1)
        with torch.no_grad():
            self.planted.weight.mul_(1e6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        x = torch.relu(self.norm(self.planted(x)))
        return self.last(torch.relu(self.hidden(x)))


def problem(device: torch.device, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise that no network of this size can learn keeps the final loss well away from 0."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1024, 16, generator=generator)
    noise = torch.randn(1024, 1, generator=generator)
    return x.to(device), (x[:, :1] + noise).to(device)


def run(device: torch.device, way: str, seed: int, steps: int) -> tuple[float, AdaptivePrecisionManager | None]:
    torch.manual_seed(seed)
    model = Planted().to(device)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    x, y = problem(device, seed)
    if way == "adaptive":
        adaptive = AdaptivePrecisionManager(adaptation_interval=20, sampling_interval=10)
        losses = [
            step(adaptive, model, optimizer, lambda: nn.functional.mse_loss(model(x), y), batch)
            for batch in range(steps)
        ]
        return losses[-1], adaptive
    scaler = torch.amp.GradScaler(device.type, enabled=way == "float16")
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype=torch.float16, enabled=way == "float16"):
            loss = nn.functional.mse_loss(model(x).float(), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    return loss.item(), None


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_planted_layer_alone_leaves_half_and_training_ends_as_in_float32(device: torch.device, seed: int) -> None:
    steps = 120
    expected, _ = run(device, "float32", seed, steps)
    loss, adaptive = run(device, "adaptive", seed, steps)
    stats = adaptive.get_adaptation_stats()
    assert [name for name, layer in stats["layers"].items() if layer["state"] == "float32"] == ["planted"]
    assert stats["unstable_batches"] == stats["demotions"] == 1, "it is found by the first batch"
    assert stats["fp16_ratio"] == 0.8
    assert loss == pytest.approx(expected, rel=0.01)
    plain, _ = run(device, "float16", seed, steps)
    assert math.isnan(plain), "without, every step is skipped"


def test_the_adaptive_block_of_the_document(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Word for word; on a machine without a GPU .cuda() leaves things where they are."""
    if device.type == "cpu":
        monkeypatch.setattr(nn.Module, "cuda", lambda module: module)
        monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)
    namespace: dict = {"__name__": "seed"}
    exec(compile(block("Adaptive Precision Management"), "seed.md", "exec"), namespace)
    x = torch.randn(128, 784)
    y = torch.randint(0, 10, (128,))
    loader = list(zip(x.split(32), y.split(32), strict=True))
    model = namespace["model"]
    before = nn.functional.cross_entropy(model(x.to(device)), y.to(device)).item()
    namespace["adaptive_precision_training"](model, loader, epochs=4)
    after = nn.functional.cross_entropy(model(x.to(device)), y.to(device)).item()
    assert after < 0.5 * before
    assert namespace["adaptive_manager"].get_adaptation_stats()["batches"] == 16


def test_the_documents_block_falls_back(device: torch.device, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    if device.type == "cpu":
        monkeypatch.setattr(nn.Module, "cuda", lambda module: module)
        monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)
    namespace: dict = {"__name__": "seed"}
    exec(compile(block("Adaptive Precision Management"), "seed.md", "exec"), namespace)
    with torch.no_grad():
        namespace["model"].layers[2].weight.mul_(1e7)
    loader = [(torch.randn(32, 784), torch.randint(0, 10, (32,))) for _ in range(6)]
    namespace["adaptive_precision_training"](namespace["model"], loader, epochs=1)
    printed = capsys.readouterr().out
    assert "Numerical instability detected at batch 0, using FP32" in printed
    stats = namespace["adaptive_manager"].get_adaptation_stats()
    assert {name for name, layer in stats["layers"].items() if layer["state"] == "float32"} == {"layers.2", "layers.4"}
    assert stats["unstable_batches"] == 2, "the layer, and then the one that is given its values"
    assert all(torch.isfinite(parameter).all() for parameter in namespace["model"].parameters())


def test_a_layer_that_calms_down_comes_back(device: torch.device) -> None:
    torch.manual_seed(0)
    model = Planted().to(device)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    x, y = problem(device)
    adaptive = AdaptivePrecisionManager(adaptation_interval=5, sampling_interval=2)
    loss = lambda: nn.functional.mse_loss(model(x), y)  # noqa: E731
    for batch in range(12):
        step(adaptive, model, optimizer, loss, batch)
    assert adaptive.get_adaptation_stats()["layers"]["planted"]["state"] == "float32"
    with torch.no_grad():
        model.planted.weight.mul_(1e-6)
    for batch in range(12, 40):
        step(adaptive, model, optimizer, loss, batch)
    stats = adaptive.get_adaptation_stats()
    assert stats["layers"]["planted"]["state"] == "half"
    assert stats["promotions"] == 1
    assert stats["fp16_ratio"] == 1.0
    path = [(decision["from"], decision["to"]) for decision in stats["decisions"] if decision["layer"] == "planted"]
    assert path[0] == ("half", "float32")
    assert path[-2:] == [("float32", "trial"), ("trial", "half")]


def test_a_batch_that_was_not_looked_at_is_explained_by_its_fallback(device: torch.device) -> None:
    torch.manual_seed(0)
    model = Planted().to(device)
    with torch.no_grad():
        model.planted.weight.mul_(1e-6)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    x, y = problem(device)
    adaptive = AdaptivePrecisionManager(adaptation_interval=1000, sampling_interval=1000)
    for batch in range(8):
        if batch == 5:
            with torch.no_grad():
                model.planted.weight.mul_(1e6)
        step(adaptive, model, optimizer, lambda: nn.functional.mse_loss(model(x), y), batch)
    stats = adaptive.get_adaptation_stats()
    (decision,) = stats["decisions"]
    assert (decision["batch"], decision["layer"], decision["to"]) == (5, "planted", "float32")
    assert "in float32 its output reaches" in decision["reason"]
    assert stats["unstable_batches"] == stats["fallback_batches"] == 1
    assert stats["sampled_batches"] == 2, "the first, and the one after the decision"


class Between(nn.Module):
    """What overflows stands between the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.block["a"](x)
        return self.block["b"](y * 1e6 / 1e6)


def test_what_overflows_between_the_layers_is_the_fault_of_the_module_around_them(device: torch.device) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), Between(), nn.Linear(8, 1)).to(device)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    x = torch.randn(16, 8, device=device)
    adaptive = AdaptivePrecisionManager(adaptation_interval=1000)
    losses = [step(adaptive, model, optimizer, lambda: model(x).square().mean(), batch) for batch in range(6)]
    stats = adaptive.get_adaptation_stats()
    assert stats["unstable_batches"] <= 3
    assert stats["layers"]["1"]["state"] == "float32"
    assert stats["layers"]["0"]["state"] == stats["layers"]["2"]["state"] == "half"
    assert losses[-1] < losses[0]


def test_with_a_grad_scaler_the_fault_is_found_without_asking_for_the_loss(device: torch.device) -> None:
    torch.manual_seed(0)
    model = Planted().to(device)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    scaler = GradScaler(device.type)
    x, y = problem(device)
    adaptive = AdaptivePrecisionManager(adaptation_interval=50)
    for batch in range(20):
        with adaptive.adaptive_context(model, batch):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    stats = adaptive.get_adaptation_stats()
    assert [name for name, layer in stats["layers"].items() if layer["state"] == "float32"] == ["planted"]
    assert loss.isfinite()
    assert scaler.counters()["skipped"] < 5


def test_a_scaler_names_the_parameters_that_overflowed(device: torch.device) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1)).to(device)
    optimizer = torch.optim.SGD(model.named_parameters(), 0.1)
    scaler = GradScaler(device.type, init_scale=1.0, name_overflows=True)
    loss = model(torch.ones(2, 4, device=device)).sum() + model[0].bias[1] * float("inf")
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.last_step(wait=True).overflowed == ("0.bias",)


@pytest.mark.cuda
def test_a_captured_step_is_captured_anew_when_the_plan_changes() -> None:
    device = torch.device("cuda")
    torch.manual_seed(0)
    model = Planted().to(device)
    with torch.no_grad():
        model.planted.weight.mul_(1e-6)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    manager = MixedPrecisionManager()
    _, _, scaler = manager.setup_pytorch_training(model, optimizer)
    adaptive = AdaptivePrecisionManager(adaptation_interval=10, sampling_interval=5)
    x, y = problem(device)

    def train_step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss

    captured = manager.capture(train_step)
    for batch in range(30):
        if batch == 20:
            with torch.no_grad():
                model.planted.weight.mul_(1e6)
        with adaptive.adaptive_context(model, batch, scaler=scaler):
            loss = captured(x, y)
    stats = adaptive.get_adaptation_stats()
    assert stats["layers"]["planted"]["state"] == "float32", captured.explain()
    assert captured.captures >= 2, captured.explain()
    assert captured.replays > 5, captured.explain()
    assert loss.isfinite()
    assert stats["fp16_ratio"] == 0.8


@pytest.mark.filterwarnings("ignore:.*torch._dynamo.*", "ignore:.*lru_cache.*")
def test_a_compiled_model(device: torch.device) -> None:
    torch.manual_seed(0)
    inner = Planted().to(device)
    model = torch.compile(inner, backend="eager")
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    x, y = problem(device)
    adaptive = AdaptivePrecisionManager(adaptation_interval=5, sampling_interval=2)
    losses = [
        step(adaptive, model, optimizer, lambda: nn.functional.mse_loss(model(x), y), batch) for batch in range(12)
    ]
    stats = adaptive.get_adaptation_stats()
    assert [name for name, layer in stats["layers"].items() if layer["state"] == "float32"] == ["planted"]
    assert losses[-1] < losses[0]


def _rank(rank: int, port: int, backend: str, results: dict) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group(backend, rank=rank, world_size=2)
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")  # never the current one
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(Planted().to(device))
    with torch.no_grad():
        model.module.planted.weight.mul_(0.02)  # overflows where the input is large: on one rank alone
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    x, y = problem(device, seed=rank)
    x = x * (10.0 if rank == 1 else 0.1)
    adaptive = AdaptivePrecisionManager(adaptation_interval=5, sampling_interval=2)
    for batch in range(12):
        loss = step(adaptive, model, optimizer, lambda: nn.functional.mse_loss(model(x), y), batch)
    stats = adaptive.get_adaptation_stats()
    results[rank] = {
        "plan": adaptive.precision_plan(model).to_json(),
        "decisions": stats["decisions"],
        "unstable": stats["unstable_batches"],
        # Numbers, because a tensor is fetched from its process, which may have ended.
        "weights": [parameter.detach().tolist() for parameter in model.parameters()],
        "loss": loss,
    }
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("backend", ["gloo", pytest.param("nccl", marks=[pytest.mark.cuda, pytest.mark.two_gpus])])
def test_ranks_decide_alike(backend: str) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    with torch.multiprocessing.Manager() as shared:
        results = shared.dict()
        torch.multiprocessing.spawn(_rank, (port, backend, results), nprocs=2)
        first, second = results[0], results[1]
    assert first["unstable"] == second["unstable"] == 1
    assert first["plan"] == second["plan"]
    assert first["decisions"] == second["decisions"]
    assert first["decisions"][0]["layer"] == "planted"
    assert first["weights"] == second["weights"]


def test_bfloat16_has_no_scale_and_skips_all_the_same(device: torch.device) -> None:
    model = nn.Linear(4, 1).to(device)
    adaptive = AdaptivePrecisionManager(precision="bfloat16", adaptation_interval=2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = model.weight.clone()
    for batch in range(6):
        with adaptive.adaptive_context(model, batch):
            (model(torch.ones(2, 4, device=device)).sum() * float("inf")).backward()
            optimizer.step()
    assert torch.equal(model.weight, before)
    assert adaptive.get_adaptation_stats()["loss_scale"] == 1.0
    assert adaptive.get_adaptation_stats()["skipped_steps"] == 6
