"""When a loop is sampled, what its statistics say, and that the Watched in the model's forward is in nobody's way."""

from __future__ import annotations

import copy
import inspect
import io
import math
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from halfstep import GradScaler, MixedPrecisionManager, PrecisionPolicy, apply_plan, monitoring, remove_plan
from halfstep.monitoring import Monitor, Sample
from halfstep.reductions import HalfNorm
from halfstep.scopes import LayerScope
from halfstep.underflow import Underflow
from halfstep.watched import Watched
from torch import nn

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*float16 arithmetic", "ignore:`torch.jit:DeprecationWarning", "ignore:.*lr_scheduler.step"
)
CPU = torch.device("cpu")


def set_up(model: nn.Module, device: torch.device = CPU, policy: str = "mixed_bfloat16", **options):
    manager = MixedPrecisionManager("pytorch", policy, **options)
    model.to(device)
    return manager, *manager.setup_pytorch_training(model, torch.optim.SGD(model.parameters(), lr=0.1))


def call(manager: MixedPrecisionManager, model: Callable, *args: torch.Tensor) -> torch.Tensor:
    with manager.autocast_context():
        return model(*(args or (torch.randn(4, 8),)))


def samples(manager: MixedPrecisionManager) -> int:
    monitor = manager._manager.monitor
    assert monitor.note == ""
    return len(monitor.samples)


@pytest.fixture
def every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitoring, "_FIRST", 1)
    monkeypatch.setattr(monitoring, "_BUDGET", 0.0)


# --------------------------------------------------------------------------------------------------------- the budget


class Clock:
    """Time that passes when it is told to, and 2 seconds in each sample."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.taken = 0
        monkeypatch.setattr(monitoring.shadow, "take", self.take)

    def __call__(self) -> float:
        return self.now

    def take(self, model: nn.Module, args: tuple, kwargs: dict, *, step: int, first: bool) -> Sample:
        assert first == (self.taken == 0)
        self.taken += 1
        self.now += 2.0
        return sample(step=step)


def sample(
    step: int = 0, fp32_ms: float = 3.0, mixed_ms: float = 1.0, fp32_bytes: int = 8, mixed_bytes: int = 2, **others
) -> Sample:
    fields = {"difference": 0.0, "operations": {}, "casts": 0, "cast_bytes": 0, **others}
    return Sample(step, 0.0, fp32_ms, mixed_ms, fp32_bytes, mixed_bytes, seconds=0.0, **fields)


def test_samples_take_at_most_a_hundredth_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    manager, model, _, _ = set_up(nn.Linear(8, 8))
    monitor = manager._manager.monitor
    monitor._clock = clock
    call(manager, model.eval())
    call(manager, model.eval())
    call(manager, model.train())
    assert clock.taken == 0, "the first training call makes things ready"
    call(manager, model)
    assert clock.taken == 1
    for passed, taken in ((0.0, 1), (199.0, 1), (1.0, 2), (1.0, 2), (198.0, 2), (1.0, 3)):
        clock.now += passed
        call(manager, model)
        assert clock.taken == taken
    assert samples(manager) == 3


def test_a_call_that_must_not_be_sampled_leaves_it_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    manager, model, _, _ = set_up(nn.Linear(8, 8))
    manager._manager.monitor._clock = clock
    for _ in range(3):
        model(torch.randn(4, 8))
    assert "autocast was off" in manager.get_statistics().notes["peak_speedup"]
    call(manager, model)
    assert clock.taken == 1


def test_samples_know_the_step(every_call: None, device: torch.device) -> None:
    manager, model, optimizer, scaler = set_up(nn.Linear(8, 8), device)
    for _ in range(3):
        scaler.scale(call(manager, model, torch.randn(4, 8, device=device)).float().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert [sample.step for sample in manager._manager.monitor.samples] == [0, 1, 2]


# -------------------------------------------------------------------------------------------------------- what it says


def test_the_fields_are_sums_and_medians() -> None:
    manager, *_ = set_up(nn.Linear(8, 8), policy="mixed_float16")
    counts = ({"float16": 5, "float32": 2}, {"float16": 5, "mixed": 1, "float64": 3}, {"bfloat16": 4})
    manager._manager.monitor.samples.extend(
        [
            sample(fp32_ms=2.0, mixed_ms=1.0, fp32_bytes=100, mixed_bytes=50, difference=0.1, operations=counts[0]),
            sample(fp32_ms=9.0, mixed_ms=1.0, fp32_bytes=100, mixed_bytes=80, difference=0.3, operations=counts[1]),
            sample(fp32_ms=4.0, mixed_ms=4.0, fp32_bytes=100, mixed_bytes=120, difference=0.2, operations=counts[2]),
        ]
    )
    stats = manager.get_statistics()
    assert (stats.speedup_factor, stats.average_speedup, stats.peak_speedup) == (2.0, 2.0, 9.0)
    assert (stats.memory_saved_bytes, stats.memory_reduction) == (20, pytest.approx(0.2))
    assert stats.accuracy_preservation == pytest.approx(0.8)
    assert (stats.fp16_operations, stats.bf16_operations, stats.fp32_operations) == (10, 4, 2)
    assert (stats.mixed_operations, stats.total_operations) == (1, 20)
    assert not set(stats.notes) & set(monitoring.SAMPLED_FIELDS)


@pytest.mark.parametrize(
    ("changes", "field", "value", "note"),
    [
        ({"difference": 3.0}, "accuracy_preservation", 0.0, ""),
        ({"difference": math.inf}, "accuracy_preservation", 0.0, ""),
        ({"difference": math.nan}, "accuracy_preservation", math.nan, "cannot be compared"),
        ({"fp32_bytes": 0}, "memory_reduction", math.nan, "keeps no memory"),
        ({"mixed_ms": 0.0}, "peak_speedup", math.nan, "too coarse"),
        ({}, "total_operations", math.nan, "not counted by dtype in this build"),
    ],
)
def test_what_cannot_be_said_is_nan_with_a_reason(changes: dict, field: str, value: float, note: str) -> None:
    manager, *_ = set_up(nn.Linear(8, 8))
    manager._manager.monitor.samples.append(sample(**changes))
    stats = manager.get_statistics()
    assert getattr(stats, field) == pytest.approx(value, nan_ok=True)
    assert note in stats.notes.get(field, "")


def test_a_run_has_numbers(device: torch.device) -> None:
    policy = "mixed_float16" if device.type == "cuda" else "mixed_bfloat16"
    manager, model, optimizer, scaler = set_up(nn.Sequential(nn.Linear(64, 64), nn.ReLU()), device, policy)
    for _ in range(3):
        scaler.scale(call(manager, model, torch.randn(32, 64, device=device)).float().sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    stats = manager.get_statistics()
    assert samples(manager) == 1
    assert 0 < stats.speedup_factor == stats.peak_speedup < math.inf
    assert 0.9 < stats.accuracy_preservation < 1
    # One result of ReLU in half instead of float32; half copies of the input and of the first weight are new.
    assert math.isfinite(stats.memory_saved_bytes)
    assert ("(CPU)" in stats.notes.get("memory_saved_bytes", "")) == (device.type == "cpu")


@pytest.mark.parametrize(
    ("options", "note"),
    [({"policy": "float32"}, "the policy is float32"), ({"enable_monitoring": False}, "monitoring is off")],
)
def test_where_nothing_is_monitored_nothing_stands_in_the_model(options: dict, note: str) -> None:
    manager, model, _, _ = set_up(nn.Linear(8, 8), **options)
    call(manager, model)
    call(manager, model)
    assert "forward" not in vars(model)
    assert note in manager.get_statistics().notes["speedup_factor"]
    assert note in manager.get_statistics().notes["underflow_events"] or options.get("policy") == "float32"


# ---------------------------------------------------------------------------------------------------------- underflow


def lost_share(gradients: list[torch.Tensor]) -> float:
    """Return the definition, in float64: of gradients as they were computed."""
    shares = []
    for gradient in gradients:
        values = gradient.double().abs()
        at_risk = (values < 2.0**-14).sum().item() * 2.0**-50
        total = values.square().sum().item()
        shares.append(min(1.0, at_risk / total) if total else float(at_risk > 0))
    return max(shares)


@pytest.mark.parametrize("path", ["fused", "unscaled", "clipped", "torch fused", "torch", "hooks"])
def test_shares_are_those_of_the_scaled_gradients(device: torch.device, path: str) -> None:
    parameters = [nn.Parameter(torch.zeros(300, device=device)), nn.Parameter(torch.zeros(7, device=device))]
    kind = torch.optim.RAdam if path == "torch" else torch.optim.Adam
    optimizer = kind(parameters, **({"fused": True} if path == "torch fused" else {}))
    if path == "hooks":
        optimizer.register_step_pre_hook(lambda *_: None)
    scaler = GradScaler(device.type, init_scale=2.0**10)
    scaler._underflow = underflow = Underflow(every=1)
    expected = []
    for magnitude in (1e-3, 1e-8, 1e-12, 0.0, math.inf):
        scaler.scale(torch.zeros((), device=device))
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, device=device).mul_(magnitude * 2.0**10)
        parameters[0].grad[:50] = 0.0
        parameters[1].grad[0] = 1.0 if magnitude < math.inf else math.inf
        expected.append(lost_share([parameter.grad for parameter in parameters]))
        if path == "unscaled":
            scaler.unscale_(optimizer)
        scaler.step(optimizer, **({"max_norm": 1.0} if path == "clipped" else {}))
        scaler.update()
    shares = underflow.shares()
    assert [step for step, _ in shares] == [1, 2, 3, 4], "the last one was skipped"
    assert [share for _, share in shares] == pytest.approx(expected[:4], rel=1e-5)
    assert shares[0][1] < 1e-4 < shares[2][1]
    assert shares[3][1] == 1.0
    assert underflow.shares() == shares, "read once, kept"


def test_gradients_that_vanish_are_underflow_events_and_a_scale_saves_them(device: torch.device) -> None:
    def events(scaling: bool) -> float:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 2))
        options = {"policy": "mixed_float16", "enable_loss_scaling": scaling, "initial_loss_scale": 2.0**20}
        manager, model, optimizer, scaler = set_up(model, device, **options)
        manager._manager.monitor.gradients._every = 1
        for _ in range(5):
            optimizer.zero_grad()
            loss = call(manager, model, torch.randn(64, 8, device=device)).float().square().mean() * 1e-6
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        assert len(manager._manager.monitor.underflow()) == 5
        return manager.get_statistics().underflow_events

    assert events(scaling=False) == 5
    assert events(scaling=True) == 0


def test_only_float16_is_looked_at_and_only_now_and_then() -> None:
    manager, *_ = set_up(nn.Linear(8, 8))
    assert "float16" in manager.get_statistics().notes["underflow_events"]
    parameter = nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    scaler = GradScaler("cpu", init_scale=8.0)
    scaler._underflow = Underflow()
    for _ in range(131):
        scaler.scale(parameter.sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert [step for step, _ in scaler._underflow.shares()] == [2, 66, 130]
    assert pickle.loads(pickle.dumps(scaler))._underflow is None


def test_what_nobody_reads_is_bounded() -> None:
    underflow = Underflow(every=1)
    for step in range(300):
        underflow.look(CPU, 1, lambda one, found, norm, table: table.fill_(1.0).select(1, 0).zero_())
        underflow.updated(torch.tensor([step + 1] + [0] * 7))
    assert [step for step, _ in underflow.shares()] == list(range(45, 301))


@pytest.mark.cuda
def test_looking_waits_for_nothing() -> None:
    device = torch.device("cuda")
    manager, model, optimizer, scaler = set_up(nn.Linear(8, 8), device, "mixed_float16")
    manager._manager.monitor.gradients._every = 1
    manager._manager.monitor._due = math.inf

    def step() -> None:
        scaler.scale(call(manager, model, torch.randn(4, 8, device=device)).float().mean()).backward()
        scaler.step(optimizer)
        scaler.update()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(manager._manager.monitor.underflow()) == 3


# -------------------------------------------------------------------------------------------------------- the Watched


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        """Return the result."""
        return self.layers(x) * scale


@pytest.mark.parametrize("make", [Net, lambda: nn.Sequential(nn.Linear(8, 8)), lambda: nn.LayerNorm(8)])
def test_compiled_code_has_one_graph_and_no_sample(every_call: None, make) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        graphs.append(graph)
        return graph.forward

    manager, model, _, _ = set_up(make())
    x = torch.randn(4, 8)
    expected = call(manager, copy.deepcopy(model), x)
    for compiled in (torch.compile(model, backend=backend, fullgraph=True), torch.compile(model, backend=backend)):
        torch._dynamo.reset()
        graphs.clear()
        for _ in range(3):
            assert torch.equal(call(manager, compiled, x), expected)
        assert len(graphs) == 1
    assert samples(manager) == 0
    model.compile(backend=backend, fullgraph=True)
    call(manager, model, x)
    assert samples(manager) == 0
    assert "not in compiled code" in manager.get_statistics().notes["speedup_factor"]


def test_a_compiled_model_is_sampled_from_outside(every_call: None) -> None:
    compiled = torch.compile(Net(), backend="eager", fullgraph=True)
    manager, model, _, _ = set_up(compiled)
    assert model is compiled
    assert "forward" not in vars(compiled._orig_mod)
    call(manager, compiled)
    assert samples(manager) == 1
    assert "without torch.compile" in manager.get_statistics().notes["speedup_factor"]
    manager.remove_policy(compiled)
    assert not isinstance(vars(compiled)["forward"], Watched)
    call(manager, compiled)
    assert len(manager._manager.monitor.samples) == 1


def test_copies_and_pickles_are_not_monitored(every_call: None) -> None:
    manager, model, _, _ = set_up(Net())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    x = torch.randn(4, 8)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        forward = vars(twin)["forward"]
        assert forward.module is twin
        assert forward.monitor is None
        with torch.no_grad():
            twin.layers[0].weight.zero_()
        assert not torch.equal(call(manager, twin, x), call(manager, model.eval(), x)), "a copy has its own weights"
    assert samples(manager) == 0
    manager.setup_pytorch_training(twin, torch.optim.SGD(twin.parameters()))
    assert vars(twin)["forward"] is forward, "what stands there stays"
    call(manager, twin)
    assert samples(manager) == 1


def test_other_tools_see_the_models_forward() -> None:
    _, model, _, _ = set_up(Net())
    assert inspect.signature(model.forward) == inspect.signature(Net().forward)
    x = torch.randn(4, 8)
    for strict in (False, True):
        program = torch.export.export(model, (x,), {"scale": 2.0}, strict=strict)
        torch.testing.assert_close(program.module()(x, scale=2.0), model(x, scale=2.0))
    torch.testing.assert_close(torch.jit.trace(model, (x,))(x), model(x))
    torch.testing.assert_close(torch.func.functional_call(model, dict(model.named_parameters()), (x,)), model(x))
    with pytest.raises(Exception, match=r"manager.remove_policy\(model\)"):
        torch.jit.script(model)


def test_remove_policy_takes_it_away() -> None:
    manager, model, _, _ = set_up(Net())
    call(manager, model)
    manager.remove_policy(model)
    assert "forward" not in vars(model)
    torch.jit.script(model)
    call(manager, model)
    assert manager.get_statistics().notes["speedup_factor"] == "remove_policy() has ended it"


def chain(module: nn.Module) -> list[type]:
    forward, kinds = vars(module).get("forward"), []
    while forward is not None:
        kinds.append(type(forward))
        forward = getattr(forward, "inner", None)
    return kinds


def test_plans_and_norms_of_the_model_itself_come_and_go_in_any_order(every_call: None) -> None:
    plan = PrecisionPolicy.named("float32")
    model = nn.RMSNorm(8)
    manager, *_ = set_up(model, custom_policy=plan)
    assert chain(model) == [Watched, LayerScope, HalfNorm]
    assert call(manager, model).dtype is torch.float32
    remove_plan(model)
    assert chain(model) == [Watched, HalfNorm]
    assert call(manager, model).dtype is torch.bfloat16
    apply_plan(model, plan.plan(model))
    assert chain(model) == [LayerScope, Watched, HalfNorm]
    assert call(manager, model).dtype is torch.float32
    watched = vars(model)["forward"].inner
    manager.update_config(half_reductions=())
    assert chain(model) == [Watched, LayerScope], "the manager's own plan comes back"
    assert vars(model)["forward"] is watched
    manager.update_config(half_reductions=("rms_norm",))
    apply_plan(model, plan.plan(model))
    assert chain(model) == [LayerScope, Watched, HalfNorm]
    manager.remove_policy(model)
    assert chain(model) == []
    manager.setup_pytorch_training(model, torch.optim.SGD(model.parameters()), use_custom_policy=False)
    apply_plan(model, plan.plan(model))
    assert chain(model) == [LayerScope, Watched, HalfNorm]
    manager.setup_pytorch_training(model, torch.optim.SGD(model.parameters()), use_custom_policy=False)
    assert chain(model) == [Watched, LayerScope, HalfNorm], "one that the user has applied stays"
    manager.remove_policy(model)
    assert chain(model)[0] is LayerScope


def test_a_second_setup_is_the_one_that_is_monitored(every_call: None) -> None:
    manager, first, _, _ = set_up(Net())
    forward = vars(first)["forward"]
    second = Net()
    manager.setup_pytorch_training(second, torch.optim.SGD(second.parameters()))
    call(manager, first)
    assert samples(manager) == 0
    call(manager, second)
    assert samples(manager) == 1
    manager.setup_pytorch_training(first, torch.optim.SGD(first.parameters()))
    assert vars(first)["forward"] is forward
    call(manager, first)
    assert samples(manager) == 1


def test_a_captured_step_is_not_sampled_and_not_disturbed(every_call: None, device: torch.device) -> None:
    policy = "mixed_float16" if device.type == "cuda" else "mixed_bfloat16"
    manager, model, optimizer, scaler = set_up(Net(), device, policy)

    def step(x: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = call(manager, model, x).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss

    captured = manager.capture(step)
    x = torch.randn(4, 8, device=device)
    for _ in range(6):
        captured(x)
    assert samples(manager) == 0
    assert "captured steps" in manager.get_statistics().notes["speedup_factor"]
    assert captured.captures == (1 if device.type == "cuda" else 0)
    assert "started anew" not in captured.explain()
    step(x)
    assert samples(manager) == 1
    captured(x)
    assert samples(manager) == 1


def test_a_plan_is_tuned_on_a_model_that_is_set_up() -> None:
    manager, model, _, _ = set_up(Net(), custom_policy=PrecisionPolicy("p", "bfloat16"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = PrecisionPolicy("p", "bfloat16").tune(model, torch.randn(4, 8))
    assert set(plan) == {"layers.0", "layers.1", "layers.2"}
    apply_plan(model, plan)
    assert chain(model) == [Watched]
    assert manager._manager.monitor.note == ""


def test_a_monitor_keeps_no_model_alive() -> None:
    monitor = Monitor(GradScaler("cpu"))
    assert not any(isinstance(value, nn.Module) for value in vars(monitor).values())
    manager, model, _, _ = set_up(Net())
    for _ in range(3):
        call(manager, model)
    assert samples(manager) == 1
    assert not any(isinstance(value, nn.Module) for value in vars(manager._manager.monitor).values())
