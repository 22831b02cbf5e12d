"""Plans by measured cost: what is timed, what is decided, what the reasons say, and that the model stays as it is."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from halfstep import CustomPrecisionPolicy, MixedPrecisionConfig, MixedPrecisionManager, PrecisionPolicy, tuning
from halfstep.scopes import LayerScope, apply_plan
from torch import nn

POLICY = PrecisionPolicy("p", "bfloat16", [{"name": "head", "precision": "float32", "reason": "logits"}])


class Net(nn.Module):
    """Three blocks (the first gets no input with a gradient), a layer that is called twice, one that never is."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)) for _ in range(3)])
        self.twice = nn.Linear(8, 8)
        self.again = self.twice
        self.dropout = nn.Dropout(0.5)
        self.unused = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = torch.relu(block(x))
        return self.head(self.dropout(self.again(self.twice(x))))


class Clock:
    """Stands in for the measurement: half takes 2 ms in the layers named as slow and 1 ms elsewhere, float32 1.5."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *slow: str) -> None:
        self.slow = slow
        self.timed: list[tuple[str, torch.dtype, bool]] = []
        self.calls: dict[str, int] = {}
        monkeypatch.setattr(tuning, "_seconds", self.seconds)

    def seconds(self, run: tuning._Run, device: torch.device, times: int) -> float:
        run()  # whatever the clock says, it must be possible
        self.calls[run.name] = len(run._calls)
        if (run.name, run.dtype, run.backward) not in self.timed:
            self.timed.append((run.name, run.dtype, run.backward))
        if run.dtype is torch.float32:
            return 1.5e-3
        return 2e-3 if run.name in self.slow else 1e-3

    def names(self) -> set[str]:
        return {name for name, _, _ in self.timed}


def test_what_half_makes_slower_stays_float32(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    clock = Clock(monkeypatch, "twice")
    model = Net().to(device)
    plan = POLICY.tune(model, torch.randn(4, 8, device=device))
    untuned = POLICY.plan(model)
    assert list(plan) == list(untuned)
    assert {name for name in plan if plan[name].precision != untuned[name].precision} == {"twice", "again"}
    both = "casts included (forward and backward)"
    assert plan["twice"].reason == f"float32: 1.5 ms against 2 ms in bfloat16, {both}"
    assert plan["again"].reason == "the same module as twice"
    assert plan["dropout"].reason == f"the default of p; bfloat16: 1 ms against 1.5 ms in float32, {both}"
    assert plan["blocks.1.0"].reason.endswith(both)
    assert plan["blocks.2.0"].reason.endswith(f"{both}, as blocks.1.0")
    assert plan["head"] == untuned["head"], "float32 by the policy: nothing to time"
    assert plan["unused"].reason == "the default of p; never called"
    assert plan.policy == "p, tuned"
    assert clock.names() == {"blocks.0.0", "blocks.0.1", "blocks.1.0", "twice", "dropout"}
    assert {dtype for _, dtype, _ in clock.timed} == {torch.bfloat16, torch.float32}
    assert {name: calls for name, calls in clock.calls.items() if calls > 1} == {"twice": 2}
    apply_plan(model, plan, torch.bfloat16)
    assert isinstance(vars(model.twice)["forward"], LayerScope)
    assert "forward" not in vars(model.dropout)


@pytest.mark.parametrize(("mode", "backward", "expected"), [
    (True, None, True), (False, None, False), (True, False, False), (False, True, True)
])  # fmt: skip
def test_backward_belongs_to_it_in_training(monkeypatch, mode: bool, backward: bool | None, expected: bool) -> None:
    clock = Clock(monkeypatch)
    plan = POLICY.tune(Net().train(mode), torch.randn(4, 8), backward=backward)
    assert {backward for _, _, backward in clock.timed} == {expected}
    assert plan["twice"].reason.endswith("(forward and backward)" if expected else "(forward)")


def test_without_gradients_only_forward_is_timed(monkeypatch) -> None:
    clock = Clock(monkeypatch)
    with torch.no_grad():
        POLICY.tune(Net(), torch.randn(4, 8))
    assert {backward for _, _, backward in clock.timed} == {False}


def test_a_policy_as_code_is_tuned_too(monkeypatch) -> None:
    class Code(CustomPrecisionPolicy):
        def should_use_fp16(self, layer_type: str, layer_name: str) -> bool:
            return layer_type == "Linear"

    Clock(monkeypatch, "twice")
    plan = Code().tune(Net(), (), "bfloat16", kwargs={"x": torch.randn(4, 8)})
    assert plan["twice"].precision == "float32"
    assert plan["head"].reason.startswith("Code.should_use_fp16 is True; bfloat16: 1 ms")
    assert plan["dropout"].reason == "Code.should_use_fp16 is False"


def test_a_small_or_an_unsure_difference_changes_nothing() -> None:
    def slower(half: list[float], full: list[float], margin: float = 0.02) -> bool:
        return tuning._Timing(half, full, False, "").half_is_slower(margin)

    steady = [1.0] * 9
    assert slower([1.03] * 9, steady)
    assert not slower([1.01] * 9, steady), "within the margin"
    assert slower([1.01] * 9, steady, margin=0.0)
    assert not slower(steady, steady, margin=0.0)
    assert not slower([0.5, 3.0, 0.6, 3.0, 1.5, 0.5, 3.0, 0.6, 3.0], steady), "too spread to tell"
    assert slower([9.0, 20.0] * 4 + [9.0], [1.0, 1.2] * 4 + [1.0]), "spread, but nine times as long"


def test_layers_in_other_states_are_timed_apart(monkeypatch) -> None:
    class Scaled(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = factor
            self.weight = nn.Parameter(torch.ones(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.weight * self.factor

    clock = Clock(monkeypatch)
    frozen = nn.Linear(8, 8).requires_grad_(False)
    layers = [nn.Linear(8, 8), nn.Linear(8, 8, bias=False), frozen, nn.Linear(8, 8), nn.Linear(8, 8)]
    model = nn.Sequential(*layers, Scaled(1), Scaled(2), Scaled(2))
    PrecisionPolicy.named("mixed_bfloat16").tune(model, torch.randn(4, 8))
    # 0 gets the example in float32 without a gradient, 3 and 4 bfloat16 with one; 5 too, 6 and 7 its float32 result.
    assert clock.names() == {"0", "1", "2", "3", "5", "6"}


def test_casts_are_part_of_both(monkeypatch) -> None:
    arrived: dict[torch.dtype, list[torch.dtype]] = {}

    class Seen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.eye(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = nn.functional.linear(x, self.weight)
            arrived.setdefault(out.dtype, []).append(x.dtype)
            return out

    Clock(monkeypatch)
    model = nn.Sequential(nn.Linear(8, 8), Seen())
    PrecisionPolicy.named("mixed_bfloat16").tune(model, torch.randn(4, 8))
    assert set(arrived) == {torch.bfloat16, torch.float32}
    assert set(arrived[torch.float32]) == {torch.float32}, "the half result of the layer before is cast by the scope"
    assert set(arrived[torch.bfloat16]) == {torch.bfloat16}


def test_weights_are_cast_anew_in_every_run(monkeypatch) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Casts(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._to_copy.default and args[0].shape == (8, 5):
                self.count += 1
            return func(*args, **(kwargs or {}))

    counts: dict[torch.dtype, list[int]] = {}

    def seconds(run, device, times) -> float:
        with Casts() as casts:
            run()
        counts.setdefault(run.dtype, []).append(casts.count)
        return 1.0

    monkeypatch.setattr(tuning, "_seconds", seconds)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # an outer region keeps casts
        PrecisionPolicy.named("mixed_bfloat16").tune(nn.Linear(5, 8), torch.randn(4, 5), backward=False)
    assert set(counts[torch.bfloat16]) == {1}
    assert set(counts[torch.float32]) == {0}


def state_of(model: nn.Module) -> dict[str, object]:
    """Return all that could change, tensors as their identity, version and value."""

    def plain(value: object) -> object:
        if isinstance(value, torch.Tensor):
            return id(value), value._version, value.data_ptr(), value.detach().clone().tolist(), value.requires_grad
        if isinstance(value, dict):
            return [(key, plain(item)) for key, item in value.items()]
        return value if isinstance(value, (bool, int, float, str)) else id(value)

    return {name: plain(dict(vars(module))) for name, module in model.named_modules()} | {
        f"{name}.grad": plain(parameter.grad) for name, parameter in model.named_parameters()
    }


@pytest.mark.parametrize("training", [True, False])
def test_the_model_stays_as_it_is(monkeypatch, device: torch.device, training: bool) -> None:
    Clock(monkeypatch)
    model = Net().to(device).train(training)
    x = torch.randn(4, 8, device=device)
    model(x).sum().backward()
    calls: list[str] = []
    model.twice.weight.register_hook(lambda grad: calls.append("tensor"))
    model.twice.weight.register_post_accumulate_grad_hook(lambda parameter: calls.append("accumulated"))
    model.register_full_backward_hook(lambda module, before, after: calls.append("module"))
    model.head.weight.requires_grad_(False)
    model.unused.eval()
    apply_plan(model, PrecisionPolicy("q", "float32", [{"name": "twice", "precision": "float16"}]).plan(model))
    before = state_of(model)
    generators = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if device.type == "cuda" else [])]
    with torch.autocast(device.type, dtype=torch.float16):
        POLICY.tune(model, x, backward=True)
        POLICY.plan(model, x)
        assert torch.is_autocast_enabled(device.type)
        assert torch.get_autocast_dtype(device.type) is torch.float16
        assert torch.is_autocast_cache_enabled()
    assert not torch.is_autocast_enabled(device.type)
    assert state_of(model) == before
    assert calls == []
    after = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if device.type == "cuda" else [])]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(generators, after, strict=True))
    assert torch.is_grad_enabled()


def test_a_scope_of_before_does_not_decide(monkeypatch) -> None:
    """The plan that is made is what runs in the one call, not the one that is applied."""
    arrived: list[torch.dtype] = []
    monkeypatch.setattr(tuning, "_time", lambda entry, *rest: arrived.append(entry.calls[0][0][0].dtype) or "no")
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout())
    apply_plan(model, PrecisionPolicy.named("float32").plan(model))
    PrecisionPolicy.named("mixed_bfloat16").tune(model, torch.randn(4, 8))
    assert arrived == [torch.float32, torch.bfloat16]


def test_norms_of_a_manager_are_timed_as_they_run(monkeypatch) -> None:
    clock = Clock(monkeypatch)
    model = nn.Sequential(nn.Linear(8, 8), nn.RMSNorm(8), nn.Linear(8, 8), nn.RMSNorm(8))
    manager = MixedPrecisionManager(config=MixedPrecisionConfig(precision_policy="mixed_bfloat16"))
    manager.setup_pytorch_training(model, torch.optim.SGD(model.parameters(), 0.1))
    forward = model[1].forward
    used: list[type] = []
    original = tuning._Run.__init__

    def note(self, entry, *args, **kwargs) -> None:
        original(self, entry, *args, **kwargs)
        used.append(type(self._scope.inner))

    monkeypatch.setattr(tuning._Run, "__init__", note)
    PrecisionPolicy.named("mixed_bfloat16").tune(model, torch.randn(4, 8))
    assert type(forward).__name__ == "HalfNorm"
    assert type(forward) in used
    assert vars(model[1])["forward"] is forward
    assert clock.names() == {"0", "1", "2"}, "the second norm is like the first"


def test_layers_that_cannot_be_timed_alone_say_so(monkeypatch) -> None:
    class Leaves(nn.Module):
        def forward(self, x: torch.Tensor, model: list) -> torch.Tensor:
            model.append(1)
            if len(model) > 1:
                raise LookupError("called twice")
            return x

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.leaves, self.linear = Leaves(), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen: list = []
            return self.linear(self.leaves(x, self.seen))

    clock = Clock(monkeypatch)
    plan = POLICY.tune(Model(), torch.randn(4, 8))
    assert plan["leaves"].precision == "bfloat16"
    assert plan["leaves"].reason == "the default of p; not timed: alone it raises LookupError: called twice"
    assert clock.names() == {"linear"}


def test_a_layer_that_writes_to_its_input_gets_copies(monkeypatch) -> None:
    clock = Clock(monkeypatch)
    PrecisionPolicy.named("mixed_bfloat16").tune(
        nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True)), torch.ones(4, 8)
    )
    assert ("1", torch.bfloat16, True) in clock.timed


def test_a_layer_inside_of_one_keeps_its_precision_while_that_is_timed(monkeypatch) -> None:
    inner: dict[torch.dtype, set[torch.dtype]] = {}

    class Inner(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = super().forward(x)
            inner.setdefault(current[0], set()).add(out.dtype)
            return out

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(8))
            self.inner = Inner(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) * self.scale

    current: list[torch.dtype] = [torch.float64]

    def seconds(run, device, times) -> float:
        current[0] = run.dtype if run.name == "" else torch.float64
        run()
        current[0] = torch.float64
        return 2.0 if run.name == "" and run.dtype is not torch.float32 else 1.0

    monkeypatch.setattr(tuning, "_seconds", seconds)
    plan = PrecisionPolicy.named("mixed_bfloat16").tune(Outer(), torch.randn(4, 8))
    assert inner[torch.float32] == inner[torch.bfloat16] == {torch.bfloat16}
    assert plan[""].precision == "float32"
    assert plan["inner"].precision == "bfloat16"


def test_what_is_never_called_follows_the_layer_it_is_in(monkeypatch) -> None:
    Clock(monkeypatch, "self_attn")
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    plan = PrecisionPolicy.named("mixed_bfloat16").tune(model, torch.randn(2, 3, 8))
    assert plan["self_attn"].precision == plan["self_attn.out_proj"].precision == "float32"
    assert plan["self_attn.out_proj"].reason == "never called: inherits from self_attn"
    assert plan["linear1"].precision == "bfloat16"


def test_wrong_arguments_are_named() -> None:
    model, x = Net(), torch.randn(4, 8)
    with pytest.raises(ValueError, match="planned as int8, expected one of"):
        PrecisionPolicy("q", "int8").tune(model, x)
    with pytest.raises(ValueError, match="planned as tfloat32, expected one of"):
        PrecisionPolicy("q", "tfloat32").tune(model, x)
    with pytest.raises(RuntimeError, match="shape|size"):
        POLICY.tune(model, torch.randn(4, 5))
    with pytest.raises(TypeError, match="example is list, expected a tensor or a tuple"):
        POLICY.tune(model, [x])
    with pytest.raises(TypeError, match="kwargs is list, expected a mapping"):
        POLICY.tune(model, kwargs=[x])
    with pytest.raises(TypeError, match="model is str, expected torch.nn.Module"):
        tuning.tune(POLICY.plan(model), "model", x, None, None, 0.02)
    with pytest.raises(ValueError, match=r"the example is on \['meta'\], but the model on cpu"):
        POLICY.tune(model, x.to("meta"))
    with pytest.raises(ValueError, match="the model is on meta, expected a CPU or a CUDA GPU"):
        POLICY.tune(Net().to("meta"), x.to("meta"))
    with pytest.raises(ValueError, match="model is a DataParallel, expected the model inside of it"):
        POLICY.tune(nn.DataParallel(model), x)
    with pytest.raises(TypeError, match="backward is 1, expected True or False"):
        POLICY.tune(model, x, backward=1)
    with pytest.raises(ValueError, match=re.escape("margin is -0.1, expected a finite number >= 0")):
        POLICY.tune(model, x, margin=-0.1)


@pytest.mark.cuda
def test_an_example_on_the_wrong_device_is_named() -> None:
    with pytest.raises(ValueError, match=r"the example is on \['cpu'\], but the model on cuda:0"):
        POLICY.tune(Net().cuda(), torch.randn(4, 8))


def test_models_without_parameters_and_compiled_ones(monkeypatch) -> None:
    clock = Clock(monkeypatch)
    plan = PrecisionPolicy.named("mixed_bfloat16").tune(nn.Sequential(nn.ReLU(), nn.Tanh()), torch.randn(3))
    assert "1 ms against 1.5 ms" in plan["1"].reason
    compiled = torch.compile(nn.Sequential(nn.Linear(8, 8)), backend="eager")
    plan = PrecisionPolicy.named("mixed_bfloat16").tune(compiled, torch.randn(3, 8))
    assert "1 ms against 1.5 ms" in plan["0"].reason
    assert {"0", "1"} == clock.names()


def test_scripted_layers_and_inference_mode(monkeypatch) -> None:
    clock = Clock(monkeypatch)
    model = nn.Sequential(torch.jit.script(nn.Linear(8, 8)), nn.Linear(8, 8))
    for context in (torch.enable_grad(), torch.inference_mode()):
        with context:
            plan = PrecisionPolicy.named("mixed_bfloat16").tune(model, torch.randn(4, 8))
        assert all("1 ms against 1.5 ms" in plan[name].reason for name in plan)
    assert {backward for _, _, backward in clock.timed} == {True, False}
    assert model[0](torch.randn(4, 8)).requires_grad


def test_a_model_that_cannot_be_copied_is_named() -> None:
    import threading

    model = nn.Linear(8, 8)
    model.lock = threading.Lock()
    with pytest.raises(TypeError, match="runs on a copy of the model, which cannot be copied: cannot pickle"):
        POLICY.tune(model, torch.randn(4, 8))


def test_copies_share_the_parameters_and_nothing_else() -> None:
    from halfstep.calls import copy_of

    model = Net()
    model.kept = model.twice.weight * 2  # deepcopy itself refuses such a tensor
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(model)
    twin = copy_of(model)
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert mine is not theirs
        assert mine.data_ptr() == theirs.data_ptr()
    assert twin.again is twin.twice
    twin(torch.randn(4, 8)).sum().backward()
    assert model.twice.weight.grad is None
    assert model.blocks[0][1].num_batches_tracked == 0
    assert twin.blocks[0][1].num_batches_tracked == 1


def test_measured_for_real(device: torch.device) -> None:
    """No time is asserted, but each layer that is half has both, and layers alike have the same."""
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.LayerNorm(64), *(nn.Linear(64, 64) for _ in range(3)))
    model.to(device)
    plan = PrecisionPolicy.named("mixed_bfloat16").tune(model, torch.randn(16, 64, device=device))
    number = r"\d[\d.e+-]* ms"
    for name in plan:
        layer = plan[name]
        if layer.precision == "float32":
            assert re.match(rf"float32: {number} against {number} in bfloat16, casts included", layer.reason)
        else:
            assert re.search(rf"; bfloat16: {number} against {number} in float32", layer.reason)
        assert "(forward and backward)" in layer.reason
    timed, shared = (re.sub(r", as \d$", "", plan[name].reason) for name in ("4", "5"))
    assert timed == shared, "both are given half"
    assert re.search(r", as [34]$", plan["5"].reason)
    apply_plan(model, plan, torch.bfloat16)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert model(torch.randn(16, 64, device=device)).shape == (16, 64)
