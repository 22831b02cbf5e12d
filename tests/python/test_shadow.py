"""The float32 run beside training: what it measures, that it leaves no trace, and where there is none."""

from __future__ import annotations

import random
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy
import pytest
import torch
from halfstep import MixedPrecisionManager, monitoring
from torch import nn

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*float16 arithmetic"),
    pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning"),
]


@pytest.fixture(autouse=True)
def _every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitoring, "_FIRST", 1)
    monkeypatch.setattr(monitoring, "_BUDGET", 0.0)


class Net(nn.Module):
    """All that could tell a run from another: buffers, dropout, other generators, a tied weight, old hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.bn = nn.BatchNorm1d(8)
        self.norm = nn.RMSNorm(8)
        self.again = nn.Linear(8, 8)
        self.again.weight = self.first.weight
        self.spectral = nn.utils.spectral_norm(nn.Linear(8, 8))
        self.weighted = nn.utils.weight_norm(nn.Linear(8, 8))
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(8, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.python_calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.python_calls += 1
        x = self.norm(torch.relu_(self.bn(self.first(x))))
        if random.random() < 0.5:
            x = self.again(x) * float(numpy.random.rand())  # noqa: NPY002 - the global state is what it is about
        return self.head(self.dropout(self.weighted(self.spectral(x))))


def set_up(
    model: nn.Module, device: torch.device, **options
) -> tuple[MixedPrecisionManager, nn.Module, torch.optim.Optimizer, torch.amp.GradScaler]:
    policy = "mixed_float16" if device.type == "cuda" else "mixed_bfloat16"
    manager = MixedPrecisionManager("pytorch", policy, **options)
    model = model.to(device)
    return manager, *manager.setup_pytorch_training(model, torch.optim.Adam(model.parameters(), lr=0.01))


def sampled(
    model: nn.Module, *args, device: torch.device | None = None, **kwargs
) -> tuple[monitoring.Sample, nn.Module]:
    """Return the sample of one training call, and the model as it was set up."""
    manager, model, _, _ = set_up(model, device or torch.device("cpu"))
    with manager.autocast_context():
        model(*args, **kwargs)
    monitor = manager._manager.monitor
    assert monitor.note == ""
    assert len(monitor.samples) == 1
    return monitor.samples[0], model


def trained(device: torch.device, monitored: bool) -> list:
    """Return all that a run leaves: losses, gradients, parameters, buffers, states of generators."""
    torch.manual_seed(3)
    random.seed(3)
    numpy.random.seed(3)  # noqa: NPY002
    manager, model, optimizer, scaler = set_up(Net(), device, enable_monitoring=monitored)
    losses = []
    for step in range(6):
        optimizer.zero_grad()
        for _ in range(2):  # accumulation
            x, y = torch.randn(2, 16, 8, device=device), torch.randn(16, 3, device=device)
            with manager.autocast_context():
                # Twice in one region: the second call reads the casts of the first from autocast's cache.
                loss = nn.functional.mse_loss((model(x[0]) + model(x[1])).float(), y)
            scaler.scale(loss).backward()
            losses.append(loss.detach())
        if step % 2:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    monitor = manager._manager.monitor
    assert (monitor is None) != monitored
    if monitored:
        assert monitor.note == ""
        assert len(monitor.samples) == 24, "one in each call"
    state = numpy.random.get_state()  # noqa: NPY002
    return [
        torch.stack(losses),
        *[parameter.grad for parameter in model.parameters()],
        *model.state_dict().values(),
        torch.get_rng_state(),
        *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else []),
        torch.tensor(hash((random.getstate(), state[1].tobytes(), state[2:]))),
        torch.tensor([model.python_calls, scaler.get_scale(), scaler.counters()["steps"]]),
    ]


def test_a_run_that_is_sampled_in_every_call_has_the_same_bits(device: torch.device) -> None:
    for plain, monitored in zip(trained(device, False), trained(device, True), strict=True):
        assert torch.equal(plain, monitored)


def test_the_loops_cache_of_casts_stays(device: torch.device) -> None:
    manager, model, _, _ = set_up(nn.Linear(8, 8), device)
    x = torch.randn(4, 8, device=device)

    def cast_of_weight() -> object:
        return torch.mm(x, model.weight).grad_fn.next_functions[1][0]

    with manager.autocast_context():
        before = cast_of_weight()
        model(x)
        assert len(manager._manager.monitor.samples) == 1
        assert cast_of_weight() is before
        assert torch.is_autocast_enabled(device.type)
        assert torch.is_autocast_cache_enabled()


def test_hooks_gradients_and_the_graph_are_left_alone(device: torch.device) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 2))
    calls: list[str] = []
    model.register_forward_pre_hook(lambda *_: calls.append("before model"))
    model[0].register_forward_hook(lambda *_: calls.append("after 0"))
    model[2].register_full_backward_hook(lambda *_: calls.append("backward 2"))
    manager, model, _, _ = set_up(model, device)
    model[0].weight.register_hook(lambda _: calls.append("gradient"))
    model[0].weight.register_post_accumulate_grad_hook(lambda _: calls.append("accumulated"))
    held = threading.Lock()  # a hook's object cannot be copied: hooks are not
    model[0].register_forward_hook(lambda *_, held=held: None)
    model[2].register_state_dict_pre_hook(held.__class__.__repr__)
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    x = torch.randn(4, 8, device=device, requires_grad=True)
    with manager.autocast_context():
        out = model(x)
    assert len(manager._manager.monitor.samples) == 1
    assert calls == ["before model", "after 0"]
    assert x.grad is None
    assert all(parameter.grad is None for parameter in model.parameters())
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    out.float().sum().backward()
    assert calls == ["before model", "after 0", "backward 2", "gradient", "accumulated"]


def test_arguments_may_be_written_to_and_be_of_any_shape() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.same: list[bool] = []

        def forward(self, query: torch.Tensor, batch: dict, *, scale: float, mask: list | None = None) -> dict:
            assert query is batch["key"], "one tensor in two places stays one"
            query.mul_(scale)
            return {"result": self.layer(query), "mask": mask}

    manager, model, _, _ = set_up(Model(), torch.device("cpu"))
    x = torch.ones(2, 4)
    with manager.autocast_context():
        model(x, {"key": x}, scale=3.0, mask=[torch.ones(2, dtype=torch.bool)])
    assert manager._manager.monitor.note == ""
    assert len(manager._manager.monitor.samples) == 1
    assert torch.equal(x, torch.full((2, 4), 3.0)), "written once"


# ------------------------------------------------------------------------------------------------------- the numbers


def test_the_difference_is_that_of_the_outputs_in_eval_mode(device: torch.device) -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.Dropout(0.5), nn.Tanh(), nn.Linear(32, 4))
    model[1].momentum = 0.0  # the runs before would move what eval mode reads
    x = torch.randn(64, 16, device=device)
    sample, model = sampled(model, x, device=device)
    dtype = torch.float16 if device.type == "cuda" else torch.bfloat16
    with torch.no_grad():
        full = model.eval()(x).double()
        with torch.autocast(device.type, dtype=dtype):
            half = model(x).double()
    expected = ((half - full).norm() / full.norm()).item()
    assert expected > 0
    assert sample.difference == pytest.approx(expected, rel=1e-4)


def test_times_are_those_of_two_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that only the model moves on."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    class Slow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = self.layer(x)
            now[0] += 0.02 if out.dtype is torch.bfloat16 else 0.05
            return out

    sample, _ = sampled(Slow(), torch.randn(2, 4))
    assert sample.mixed_ms == pytest.approx(20)
    assert sample.fp32_ms == pytest.approx(50)
    assert sample.seconds == pytest.approx((2 * 20 + 2 * 50 + 20 + 50) / 1e3), "two runs of each, and both outputs"


def test_bytes_on_a_cpu_are_what_is_saved_beside_parameters_and_arguments() -> None:
    sample, _ = sampled(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(5, 8))
    assert sample.fp32_bytes == 4 * 5 * 16, "the result of ReLU, which the second layer saves too"
    # The half copies of x and of the second weight, and the half result of ReLU.
    assert sample.mixed_bytes == 2 * (5 * 8 + 16 * 4 + 5 * 16)


@pytest.mark.cuda
def test_bytes_on_a_gpu_are_the_allocators() -> None:
    device = torch.device("cuda")
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)).to(device)
    x = torch.randn(1024, 256, device=device)

    def kept(autocast: bool) -> int:
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", dtype=torch.float16, enabled=autocast):
            out = model(x)
            after = torch.cuda.memory_allocated()
        del out
        return after - before

    kept(False), kept(True)  # cuBLAS takes its workspace in the first
    expected = kept(False), kept(True)
    sample, _ = sampled(model, x, device=device)
    assert (sample.fp32_bytes, sample.mixed_bytes) == expected


def test_operations_are_counted_where_the_build_can() -> None:
    sample, _ = sampled(nn.Linear(8, 8), torch.randn(4, 8))
    try:
        torch.classes.halfstep.OperationCounter()
    except RuntimeError:
        assert sample.operations == {}
        return
    assert sample.operations["bfloat16"] > 0
    assert sample.casts > 0
    assert sample.cast_bytes > 0


# ---------------------------------------------------------------------------------------------------- where it is off


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


class Locked(Broken):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


class Single(Broken):
    """Cannot be called twice with weights alike."""

    seen = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        Single.seen += 1
        if Single.seen == 1:
            raise RuntimeError("out of something\nand more")
        return super().forward(x)


class Clamps(Broken):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.layer.weight.data.mul_(0.5)
        return super().forward(x)


class Refers(Broken):
    """A function of it refers to itself, and a copy has the same function."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(4)
        self.act = lambda x: self.bn(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(super().forward(x))


class RefersAndRaises(Refers):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = super().forward(x)
        Single.seen += 1
        if Single.seen == 1:
            raise RuntimeError("after it has written")
        return out


class Tells(Broken):
    def forward(self, x: torch.Tensor) -> object:
        return {1, super().forward(x)}


class Frozen(Broken):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).detach()


def replaced() -> nn.Module:
    model = nn.Sequential(Broken(), nn.Linear(4, 4))
    inner = model[0]
    inner.forward = lambda x: inner.layer(x) + 1
    return model


@pytest.mark.parametrize(
    ("make", "note"),
    [
        (Locked, "a sample raised TypeError: .*cannot be copied"),
        (Single, "a sample raised RuntimeError: out of something$"),
        (Clamps, "forward writes to the parameter layer.weight"),
        (Refers, "a copy of the model writes to the model"),
        (RefersAndRaises, "a sample raised RuntimeError: after it has written"),
        (Tells, "the model's result cannot be looked into: it has a set"),
        (Frozen, "returns nothing from which a backward pass starts"),
        (replaced, "the forward of 0 was replaced by a function"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.SyncBatchNorm(4).eval()), "SyncBatchNorm .1."),
        (lambda: nn.ModuleList([nn.Linear(4, 4)]), "ModuleList has no forward"),
        (lambda: torch.jit.script(Broken()), "TorchScript"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_what_cannot_be_sampled_trains_on_and_says_why(make, note: str) -> None:
    def run(monitored: bool) -> list[torch.Tensor]:
        torch.manual_seed(1)
        Single.seen = 0 if monitored else 1
        manager, model, _, scaler = set_up(make(), torch.device("cpu"), enable_monitoring=monitored)
        callable_ = model[0] if isinstance(model, nn.ModuleList) else model
        for _ in range(3):
            x = torch.randn(6, 4)
            with manager.autocast_context():
                out = callable_(x)
            if isinstance(out, torch.Tensor) and out.requires_grad:
                scaler.scale(out.float().sum()).backward()
        if monitored:
            stats = manager.get_statistics()
            monitor = manager._manager.monitor
            assert len(monitor.samples) == 0
            assert re.search(note, monitor.note)
            assert stats.notes["speedup_factor"] == monitor.note
        return [*model.state_dict().values(), *[p.grad for p in model.parameters() if p.grad is not None]]

    for plain, monitored in zip(run(False), run(True), strict=True):
        assert torch.equal(plain, monitored)


def test_an_argument_that_cannot_be_copied_ends_it() -> None:
    class Takes(Broken):
        def forward(self, x: torch.Tensor, extra: object) -> torch.Tensor:
            return super().forward(x)

    manager, model, _, _ = set_up(Takes(), torch.device("cpu"))
    with manager.autocast_context():
        model(torch.randn(2, 4), object())
    assert "an argument cannot be copied: it has a object" in manager._manager.monitor.note


class Nothing(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class NothingEither(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def global_hook():
    return nn.modules.module.register_module_forward_hook(lambda *_: None)


@pytest.mark.parametrize(
    ("around", "reason"),
    [
        (lambda: torch.autocast("cpu", enabled=False), "autocast was off"),
        (lambda: torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x), "saved tensors"),
        (lambda: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]), "profiler"),
        (Nothing, "mode of torch's dispatch"),
        (NothingEither, "mode of torch's dispatch"),
        (global_hook, "global hooks"),
    ],
)
def test_calls_that_others_look_at_are_not_sampled(around, reason: str) -> None:
    manager, model, _, _ = set_up(nn.Linear(4, 4), torch.device("cpu"))
    monitor = manager._manager.monitor
    x = torch.randn(2, 4)
    with manager.autocast_context(), around():
        model(x)
    assert len(monitor.samples) == 0
    assert monitor.note == ""
    assert reason in manager.get_statistics().notes["accuracy_preservation"]
    with manager.autocast_context(), torch.device("cpu"):
        model(x)
    assert len(monitor.samples) == 1


@pytest.mark.cuda
def test_who_looks_for_waits_finds_none_of_a_sample() -> None:
    device = torch.device("cuda")
    manager, model, _, _ = set_up(nn.Linear(4, 4), device)
    x = torch.randn(2, 4, device=device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with manager.autocast_context():
            model(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert manager._manager.monitor.note == ""
    assert "waits" in manager.get_statistics().notes["speedup_factor"]


@pytest.mark.cuda
def test_a_step_in_a_graph_of_ones_own_is_not_sampled() -> None:
    device = torch.device("cuda")
    manager, model, _, _ = set_up(nn.Linear(4, 4), device)
    x = torch.randn(2, 4, device=device)
    with manager.autocast_context():
        model(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), manager.autocast_context():
        model(x)
    assert manager._manager.monitor.note == ""
    assert len(manager._manager.monitor.samples) == 1


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_neither_are_transformed_traced_and_gradless_calls() -> None:
    manager, model, _, _ = set_up(nn.Linear(4, 4), torch.device("cpu"))
    x = torch.randn(2, 4)
    with manager.autocast_context():
        torch.func.vmap(model)(x)
        torch.func.grad(lambda x: model(x).float().sum())(x)
        with torch.no_grad():
            model(x)
        with torch.inference_mode():
            model(x)
        model.eval()(x)
    with manager.autocast_context():
        torch.jit.trace(model.train(), (x,), check_trace=False)
    assert len(manager._manager.monitor.samples) == 0
    with manager.autocast_context():
        model(x)
    assert len(manager._manager.monitor.samples) == 1


RANKS = """
import os, sys
import torch, torch.distributed as dist
from torch import nn
from halfstep import MixedPrecisionManager, monitoring

monitoring._FIRST, monitoring._BUDGET = 1, 0.0
rank, port = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)

class Talks(nn.Linear):
    def forward(self, x):
        out = super().forward(x)
        dist.all_reduce(out.detach())
        return out

def run(inner, wrap):
    torch.manual_seed(0)
    model = wrap(inner())
    manager = MixedPrecisionManager("pytorch", "mixed_bfloat16")
    model, optimizer, scaler = manager.setup_pytorch_training(model, torch.optim.SGD(model.parameters(), lr=0.1))
    monitor = manager._manager.monitor
    for step in range(3):
        if rank and step == 1:
            monitor._due = float("inf")  # one rank samples, the other does not
        with manager.autocast_context():
            loss = model(torch.full((2, 4), rank + 1.0)).float().sum()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    return monitor, model

monitor, model = run(lambda: nn.Linear(4, 4), nn.parallel.DistributedDataParallel)
parameters = [torch.empty_like(model.module.weight.data) for _ in range(2)]
dist.all_gather(parameters, model.module.weight.data)
print(len(monitor.samples), monitor.note, torch.equal(*parameters))
monitor, _ = run(lambda: Talks(4, 4), nn.parallel.DistributedDataParallel)
print(len(monitor.samples), monitor.note)
from torch.distributed.fsdp import fully_shard
monitor, _ = run(lambda: nn.Linear(4, 4), lambda model: fully_shard(model, mesh=dist.init_device_mesh("cpu", (2,))))
print(len(monitor.samples), monitor.note)
sys.stdout.flush()
dist.barrier()
# Not through torch's teardown of gloo: without a line of halfstep it aborts about one process in ten.
os._exit(0)
"""


def test_ranks(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    ranks = [
        subprocess.Popen([sys.executable, script, str(rank), str(port)], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    lines = [rank.communicate(timeout=300)[0].splitlines() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert [line[0] for line in lines] == ["3  True", "1  True"]
    for line in lines:
        assert line[1].startswith("0 the model's ranks talk to each other (c10d.allreduce_")
        assert line[2] == "0 the model is under FSDP, and a float32 run would enter its collectives"
