"""manager.capture: a replayed step is the step. On the CPU, where there are no graphs, what it says and refuses."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from halfstep import MixedPrecisionConfig, MixedPrecisionManager, StepGraph, release
from torch import nn

FOREVER = 10**6  # a warm-up that never ends: the same step, never captured


class Run:
    """A small network with dropout and batch norm, its captured step, and data."""

    def __init__(
        self,
        device: str = "cuda",
        *,
        policy: str = "mixed_float16",
        optimizer: str = "Adam",
        warmup: int = 3,
        wrap=None,
        half_weights: bool = True,
        **settings,
    ) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Linear(32, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 10)
        ).to(device)
        self.optimizer = getattr(torch.optim, optimizer)(self.model.parameters(), lr=1e-2, **settings)
        config = MixedPrecisionConfig(precision_policy=policy, gradient_clipping_threshold=1.0)
        self.manager = MixedPrecisionManager(framework="pytorch", config=config)
        _, _, self.scaler = self.manager.setup_pytorch_training(self.model, self.optimizer)
        step = self.train if wrap is None else wrap(self)
        self.step = self.manager.capture(step, warmup=warmup, half_weights=half_weights)
        generator = torch.Generator().manual_seed(1)
        self.inputs = torch.randn(120, 16, 32, generator=generator).to(device)
        self.targets = torch.randint(0, 10, (120, 16), generator=generator).to(device)
        self.weight = torch.ones((), device=device)  # of the loss; infinite for an overflow in all gradients

    def train(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        self.optimizer.zero_grad()
        with self.manager.autocast_context():
            loss = nn.functional.cross_entropy(self.model(x), y) * self.weight
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss

    def go(self, steps: range | int, *, bad: tuple[int, ...] = (), scheduler=None) -> list[float]:
        losses = []
        for i in range(steps) if isinstance(steps, int) else steps:
            self.weight.fill_(float("inf") if i in bad else 1.0)
            losses.append(self.step(self.inputs[i], self.targets[i]))
            if scheduler is not None:
                scheduler.step()
        return torch.stack(losses).tolist() if losses else []

    def everything(self) -> dict[str, torch.Tensor]:
        """Parameters, buffers, optimizer states, the scale and the scaler's counters."""
        found = {key: value.clone() for key, value in self.model.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            found |= {f"{index} {key}": value for key, value in state.items() if isinstance(value, torch.Tensor)}
        found |= {f"counter {key}": torch.tensor(value) for key, value in self.scaler.counters().items()}
        return found | {"scale": torch.tensor(self.scaler.get_scale())}


def assert_same(first: Run, second: Run) -> None:
    mine, other = first.everything(), second.everything()
    assert mine.keys() == other.keys()
    for key, value in mine.items():
        assert torch.equal(value, other[key]), key


# ----------------------------------------------------------------------------------------------------- any machine


def test_on_a_cpu_the_step_runs_and_says_why() -> None:
    run = Run("cpu", policy="mixed_bfloat16")
    assert isinstance(run.step, StepGraph)
    losses = run.go(100)
    assert sum(losses[-10:]) < sum(losses[:10])
    assert "the model is on the CPU" in run.step.explain()
    assert (run.step.captures, run.step.replays, run.step.memory()) == (0, 0, 0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"step": 3}, TypeError, "step is int, expected a function"),
        ({"residual": "double"}, ValueError, "residual is 'double', expected one of 'half', 'float32'"),
        ({"recheck": "never"}, ValueError, "recheck is 'never'"),
        ({"warmup": 1}, ValueError, "warmup is 1, expected an integer >= 2"),
        ({"warmup": 2.0}, TypeError, "warmup is 2.0, expected an integer >= 2"),
        ({"warmup": True}, TypeError, "warmup is True, expected an integer >= 2"),
        ({"max_graphs": 0}, ValueError, "max_graphs is 0"),
        ({"half_weights": 1}, TypeError, "half_weights is 1, expected True or False"),
        ({"example": 3}, TypeError, "example is int, expected a tuple"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict, error: type[Exception], message: str) -> None:
    run = Run("cpu", policy="mixed_bfloat16")
    with pytest.raises(error, match=message):
        run.manager.capture(**{"step": run.train, **arguments})


def test_capture_needs_a_setup() -> None:
    with pytest.raises(RuntimeError, match="call setup_pytorch_training"):
        MixedPrecisionManager(framework="pytorch").capture(lambda: None)


def test_a_captured_step_does_not_keep_the_model_alive() -> None:
    run = Run("cpu", policy="mixed_bfloat16")
    run.go(2)
    model, manager = weakref.ref(run.model), run.manager
    del run
    gc.collect()
    assert model() is None
    with pytest.raises(RuntimeError, match="call setup_pytorch_training"):
        manager.capture(lambda: None)


def test_a_captured_step_within_a_captured_step_is_an_error() -> None:
    run = Run("cpu", policy="mixed_bfloat16")
    outer = run.manager.capture(run.step)
    with pytest.raises(RuntimeError, match="within a captured step"):
        outer(run.inputs[0], run.targets[0])
    run.go(2)


def test_arguments_may_be_nested_and_results_are_detached() -> None:
    run = Run("cpu", policy="mixed_bfloat16")

    def step(batch: dict, *, scale: float) -> dict:
        loss = run.train(batch["x"], batch["y"][0])
        return {"loss": loss, "parts": (loss * scale, None)}

    captured = run.manager.capture(step)
    result = captured({"x": run.inputs[0], "y": [run.targets[0]]}, scale=2.0)
    assert result["parts"][0] == 2 * result["loss"]
    assert result["parts"][1] is None
    assert not result["loss"].requires_grad


# ----------------------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.cuda
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("optimizer", ["Adam", "AdamW", "SGD", "SGD momentum", "Adam amsgrad"])
@pytest.mark.parametrize("half_weights", [True, False])
def test_replays_are_bit_equal_to_the_step(policy: str, optimizer: str, half_weights: bool) -> None:
    settings = {"SGD momentum": {"momentum": 0.9, "nesterov": True}, "Adam amsgrad": {"amsgrad": True}}
    kind = optimizer.split()[0]
    runs = [
        Run(policy=policy, optimizer=kind, warmup=warmup, half_weights=half_weights, **settings.get(optimizer, {}))
        for warmup in (3, FOREVER)
    ]
    losses = []
    for run in runs:
        torch.manual_seed(5)  # the dropout of both
        losses.append(run.go(60, bad=(10, 11, 40)))
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=0, equal_nan=True)
    assert_same(*runs)
    assert runs[0].scaler.counters()["skipped"] == 3
    assert (runs[0].step.captures, runs[0].step.replays) == (1, 57)
    assert runs[1].step.captures == 0
    assert "captured, 57 replays" in runs[0].step.explain()
    assert runs[0].step.memory() > 0


@pytest.mark.cuda
def test_learning_rates_are_followed_by_one_capture() -> None:
    runs = [Run(warmup=3), Run(warmup=FOREVER)]
    for run in runs:
        torch.manual_seed(5)
        run.go(100, scheduler=torch.optim.lr_scheduler.OneCycleLR(run.optimizer, max_lr=0.05, total_steps=101))
    assert_same(*runs)
    assert (runs[0].step.captures, runs[0].step.replays) == (1, 97)


@pytest.mark.cuda
def test_a_learning_rate_on_the_gpu_is_followed() -> None:
    runs = [Run(warmup=3), Run(warmup=FOREVER)]
    for run in runs:
        run.optimizer.param_groups[0]["lr"] = torch.tensor(1e-2, device="cuda")
        torch.manual_seed(5)
        run.go(6)
        run.optimizer.param_groups[0]["lr"].fill_(1e-3)
        run.go(range(6, 12))
        run.optimizer.param_groups[0]["lr"] = torch.tensor(1e-4, dtype=torch.float64, device="cuda")
        run.go(range(12, 18))
    assert_same(*runs)
    assert runs[0].step.captures == 1


@pytest.mark.cuda
def test_dropout_draws_anew_in_each_replay() -> None:
    run = Run(optimizer="SGD", momentum=0.0)
    run.optimizer.param_groups[0]["lr"] = 0.0
    losses = [run.step(run.inputs[0], run.targets[0]).item() for _ in range(12)]
    assert len(set(losses[4:])) == 8


@pytest.mark.cuda
def test_each_shape_has_its_own_capture() -> None:
    runs = [Run(warmup=2), Run(warmup=FOREVER)]
    for run in runs:
        torch.manual_seed(5)
        for i in range(24):
            size = (16, 8, 12)[i % 3]
            run.step(run.inputs[i, :size], run.targets[i, :size])
    assert_same(*runs)
    assert (runs[0].step.captures, runs[0].step.replays) == (3, 18)
    assert "float32[8, 32], int64[8]: captured, 6 replays" in runs[0].step.explain()


@pytest.mark.cuda
def test_no_more_captures_than_asked_for() -> None:
    run = Run()
    run.step = run.manager.capture(run.train, warmup=2, max_graphs=1)
    for size in (16, 8):
        for i in range(5):
            run.step(run.inputs[i, :size], run.targets[i, :size])
    assert run.step.captures == 1
    assert "max_graphs = 1" in run.step.explain()


@pytest.mark.cuda
@pytest.mark.parametrize(
    "change",
    ["growth_interval", "clipping", "optimizer state", "parameter data", "eval", "released", "eager step", "new group"],
)
def test_a_change_of_structure_is_captured_anew(change: str) -> None:
    runs = [Run(warmup=3), Run(warmup=FOREVER)]
    for run in runs:
        torch.manual_seed(5)
        run.go(8)
        if change == "growth_interval":
            run.scaler.set_growth_interval(2)
        elif change == "clipping":
            run.manager.update_config(gradient_clipping_threshold=0.01)
        elif change == "optimizer state":
            run.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
        elif change == "parameter data":
            run.model[0].weight.data = run.model[0].weight.data * 0.5
        elif change == "eval":
            run.model.eval()
        elif change == "released":
            release(run.optimizer)
            assert not next(iter(run.optimizer.state.values()))["step"].is_cuda
        elif change == "eager step":
            run.train(run.inputs[0], run.targets[0])
        else:
            extra = nn.Parameter(torch.ones(3, device="cuda"))
            run.optimizer.add_param_group({"params": [extra]})
        run.go(range(8, 20))
    assert_same(*runs)
    # An eager step leaves gradients behind, which the first capture did not begin with.
    assert runs[0].step.captures == 2, runs[0].step.explain()


@pytest.mark.cuda
@pytest.mark.parametrize("where", ["inside, first", "inside, to zero", "inside, last", "outside"])
def test_gradients_may_be_zeroed_anywhere(where: str) -> None:
    def wrap(run: Run):
        def step(x, y):
            if where == "inside, first":
                run.optimizer.zero_grad()
            elif where == "inside, to zero":
                run.optimizer.zero_grad(set_to_none=False)
            with run.manager.autocast_context():
                loss = nn.functional.cross_entropy(run.model(x), y)
            run.scaler.scale(loss).backward()
            run.scaler.step(run.optimizer)
            run.scaler.update()
            if where == "inside, last":
                run.optimizer.zero_grad()
            return loss

        return step

    runs = [Run(warmup=warmup, wrap=wrap) for warmup in (3, FOREVER)]
    for run in runs:
        torch.manual_seed(5)
        for i in range(12):
            run.step(run.inputs[i], run.targets[i])
            if where == "outside":
                run.optimizer.zero_grad()
    assert_same(*runs)
    assert runs[0].step.captures in (1, 2), runs[0].step.explain()
    assert runs[0].step.replays >= 8


@pytest.mark.cuda
def test_two_captured_functions_accumulate() -> None:
    def losses(capture: bool) -> Run:
        run = Run(half_weights=False)

        def backward(x, y):
            with run.manager.autocast_context():
                loss = nn.functional.cross_entropy(run.model(x), y)
            run.scaler.scale(loss / 2).backward()
            return loss

        def last(x, y):
            loss = backward(x, y)
            run.scaler.step(run.optimizer)
            run.scaler.update()
            run.optimizer.zero_grad()
            return loss

        warmup = 2 if capture else FOREVER
        first, second = run.manager.capture(backward, warmup=warmup), run.manager.capture(last, warmup=warmup)
        torch.manual_seed(5)
        for i in range(0, 24, 2):
            first(run.inputs[i], run.targets[i])
            second(run.inputs[i + 1], run.targets[i + 1])
        if capture:
            assert first.replays > 0
            assert second.replays > 0
        return run

    assert_same(losses(True), losses(False))


def _waits(run: Run):
    def step(x, y):
        loss = run.train(x, y)
        if loss.item() < 0:
            raise AssertionError
        return loss

    return step


def _fails_in_capture(run: Run):
    def step(x, y):
        loss = run.train(x, y)
        if torch.cuda.is_current_stream_capturing():
            loss.item()
        return loss

    return step


def _raises_in_capture(run: Run):
    def step(x, y):
        loss = run.train(x, y)
        if torch.cuda.is_current_stream_capturing():
            raise ValueError("not here")
        return loss

    return step


def _schedules(run: Run):
    scheduler = torch.optim.lr_scheduler.ExponentialLR(run.optimizer, 0.9)

    def step(x, y):
        loss = run.train(x, y)
        scheduler.step()
        return loss

    return step


def _steps_twice(run: Run):
    def step(x, y):
        run.train(x, y)
        return run.train(x, y)

    return step


def _hooks(run: Run):
    run.optimizer.register_step_post_hook(lambda *args: None)
    return run.train


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("wrap", "reason"),
    [
        (_waits, "the step waits for the device"),
        (_fails_in_capture, "not permitted when stream is capturing"),
        (_raises_in_capture, "ValueError: not here"),
        (_schedules, "the step changes hyperparameters"),
        (_steps_twice, "only be replayed"),
        (_hooks, "has step hooks"),
    ],
)
def test_what_cannot_be_captured_trains_all_the_same(wrap, reason: str) -> None:
    runs = [Run(warmup=3, wrap=wrap), Run(warmup=FOREVER, wrap=wrap)]
    for run in runs:
        torch.manual_seed(5)
        run.go(12, bad=(5,))
    assert reason in runs[0].step.explain()
    assert runs[0].step.captures == 0
    assert_same(*runs)
    later = Run()  # the failure has left nothing behind: memory, streams and random numbers work, captures too
    later.go(8)
    assert later.step.captures == 1


@pytest.mark.cuda
def test_other_optimizers_run_as_they_are() -> None:
    runs = [Run(optimizer="RMSprop", warmup=warmup) for warmup in (3, FOREVER)]
    for run in runs:
        torch.manual_seed(5)
        run.go(10)
    assert "RMSprop is not exactly Adam, AdamW or SGD" in runs[0].step.explain()
    assert_same(*runs)


@pytest.mark.cuda
@pytest.mark.parametrize("problem", ["cpu argument", "argument with gradient", "object", "number returned"])
def test_arguments_and_results_that_cannot_be_captured(problem: str) -> None:
    run = Run()
    x, y = run.inputs[0], run.targets[0]
    if problem == "cpu argument":
        step = run.manager.capture(lambda x, y: run.train(x.cuda(), y))
        arguments, reason = (x.cpu(), y), "an argument is on cpu, the model on cuda:0: move it before the call"
    elif problem == "argument with gradient":
        step = run.manager.capture(run.train)
        arguments, reason = (x.clone().requires_grad_(), y), "an argument requires a gradient"
    elif problem == "object":
        step = run.manager.capture(lambda batch: run.train(*batch.pair))
        batch = type("Batch", (), {"pair": (x, y)})()
        arguments, reason = (batch,), "an argument cannot be captured: it has a Batch"
    else:
        step = run.manager.capture(lambda x, y: (run.train(x, y), 3.0))
        arguments, reason = (x, y), "the step returns a Python number"
    for _ in range(6):
        step(*arguments)
    assert step.captures == 0
    assert reason in step.explain()
    assert run.scaler.counters()["steps"] == 6


@pytest.mark.cuda
def test_two_models_with_two_optimizers_in_one_step() -> None:
    def adversarial(warmup: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        maker, judge = nn.Linear(8, 16).cuda(), nn.Linear(16, 1).cuda()
        optimizers = [torch.optim.Adam(maker.parameters(), lr=1e-3), torch.optim.SGD(judge.parameters(), lr=1e-2)]
        manager = MixedPrecisionManager(framework="pytorch")
        _, _, scaler = manager.setup_pytorch_training(maker, optimizers[0])
        manager.setup_pytorch_training(judge, optimizers[1])

        def step(noise, real):
            with manager.autocast_context():
                made = judge(maker(noise)).float().mean()
            optimizers[0].zero_grad()
            scaler.scale(-made).backward()  # leaves gradients in the judge
            scaler.step(optimizers[0])
            optimizers[1].zero_grad()
            with manager.autocast_context():
                loss = judge(maker(noise).detach()).float().mean() - judge(real).float().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizers[1])
            scaler.update()
            return loss

        captured = manager.capture(step, warmup=warmup)
        generator = torch.Generator().manual_seed(3)
        for _ in range(12):
            captured(torch.randn(4, 8, generator=generator).cuda(), torch.randn(4, 16, generator=generator).cuda())
        assert captured.captures == (1 if warmup == 3 else 0), captured.explain()
        return {**maker.state_dict(), **{f"judge {key}": value for key, value in judge.state_dict().items()}}

    first, second = adversarial(3), adversarial(FOREVER)
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


@pytest.mark.cuda
def test_a_replay_waits_for_nothing() -> None:
    run = Run()
    run.go(6)
    scheduler = torch.optim.lr_scheduler.StepLR(run.optimizer, 1, 0.9)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for i in range(6, 12):
            run.step(run.inputs[i], run.targets[i])
            scheduler.step()
            run.scaler.last_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert run.step.replays == 9


@pytest.mark.cuda
def test_checkpoints_of_a_replayed_run_are_torchs() -> None:
    run = Run(warmup=3)
    run.go(10)
    state = run.optimizer.state_dict()
    assert all(not entry["step"].is_cuda and entry["step"] == 10 for entry in state["state"].values())
    stock = torch.optim.Adam(copy.deepcopy(run.model).parameters(), lr=1e-2)
    stock.load_state_dict(state)
    run.go(range(10, 12))
    assert run.step.captures == 1  # saving is no change


@pytest.mark.cuda
def test_results_are_copies_unless_asked_otherwise() -> None:
    run = Run()
    first = [run.step(run.inputs[i], run.targets[i]) for i in range(8)]
    assert len({loss.data_ptr() for loss in first}) == 8
    run.step = run.manager.capture(run.train, copy_outputs=False)
    second = [run.step(run.inputs[i], run.targets[i]) for i in range(8)]
    assert len({loss.data_ptr() for loss in second[3:]}) == 1


@pytest.mark.cuda
def test_the_gradients_of_a_replay_can_be_asked_for() -> None:
    runs = [Run(warmup=3), Run(warmup=FOREVER)]
    for run in runs:
        torch.manual_seed(5)
        run.go(8)
    mine, other = (run.step.gradients() for run in runs)
    assert mine.keys() == other.keys() == dict(runs[0].model.named_parameters()).keys()
    for name, gradient in mine.items():
        assert gradient.dtype is torch.float32
        assert torch.equal(gradient, other[name]), name


@pytest.mark.cuda
def test_a_dropped_step_frees_its_memory() -> None:
    run = Run()
    run.go(6)
    torch.cuda.synchronize()
    run.step.reset()
    gc.collect()
    torch.cuda.empty_cache()
    assert run.step.memory() == 0
    run.go(6)
    assert run.step.captures == 2


@pytest.mark.cuda
def test_an_example_is_looked_at_but_not_trained_on() -> None:
    run = Run()
    before = run.everything()
    step = run.manager.capture(run.train, (run.inputs[0], run.targets[0]))
    assert "float32[16, 32], int64[16]: warming up, 0 of 3" in step.explain()
    assert "is on cpu" in run.manager.capture(run.train, (run.inputs[0].cpu(), run.targets[0])).explain()
    for key, value in before.items():
        assert torch.equal(value, run.everything()[key]), key


@pytest.mark.cuda
def test_overflowed_parameters_are_named_in_replays() -> None:
    run = Run(warmup=3)
    run.scaler._statistics = True
    run.go(9, bad=(8,))
    report = run.scaler.last_step(wait=True)
    assert report.skipped
    assert report.overflowed
    run.go(range(9, 11))
    assert run.scaler.last_step(wait=True).overflowed == ()
    assert run.step.captures == 1
