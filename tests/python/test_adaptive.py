"""AdaptivePrecisionManager: what its context does to a model, a loss and an optimizer."""

from __future__ import annotations

import copy
import gc
import io
import logging
import pickle
import weakref

import pytest
import torch
from adaptive_cases import Probe, half_type, small_model, train
from halfstep import AdaptivePrecisionManager, GradScaler, PrecisionPolicy, apply_plan
from torch import nn
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.cuda.amp.autocast.*")


def manager(device: torch.device, **settings) -> AdaptivePrecisionManager:
    settings = {"precision": half_type(device), "adaptation_interval": 10, "sampling_interval": 5, **settings}
    return AdaptivePrecisionManager(**settings)


def test_autocast_is_on_around_the_model_alone_and_results_are_float32(device: torch.device) -> None:
    model = Probe().to(device)
    adaptive = manager(device)
    x = torch.randn(4, 8, device=device)
    with adaptive.adaptive_context(model, 0):
        y = model(x)
        assert not torch.is_autocast_enabled(device.type)
        assert (y @ y.T).dtype is torch.float32
    assert model.seen == [getattr(torch, half_type(device))]
    assert y.dtype is torch.float32
    model(x)
    assert model.seen[-1] is torch.float32, "outside of a context nothing is changed"


def test_the_fallback_really_runs_in_float32_on_every_device(device: torch.device) -> None:
    model = Probe().to(device)
    adaptive = manager(device)
    x = torch.randn(4, 8, device=device)
    with adaptive.adaptive_context(model, 0) as context, torch.autocast(device.type, dtype=torch.bfloat16):
        assert not context.in_fp32
        context.fallback_to_fp32()
        context.fallback_to_fp32()
        assert context.in_fp32
        y = model(x)
        assert torch.is_autocast_enabled(device.type), "the loop's own autocast is its own"
    assert model.seen == [torch.float32]
    model.seen.clear()
    model.eval()
    assert torch.equal(y, model(x)), "the bits of a model that has never seen half precision"
    model.train()
    with adaptive.adaptive_context(model, 1):
        model(x)
    assert model.seen[-1] is getattr(torch, half_type(device)), "only that batch"
    assert adaptive.get_adaptation_stats()["fallback_batches"] == 1


def test_gradients_below_half_arrive(device: torch.device) -> None:
    """2^-26 is less than float16 can hold; without a scale such gradients are 0."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 1, bias=False)).to(device)
    with torch.no_grad():
        for layer in model:
            layer.weight.fill_(1.0)
    x = torch.ones(2, 4, device=device)

    def gradient(context=None) -> torch.Tensor:
        model.zero_grad()
        loss = model(x).sum() * 2.0**-26
        assert context is None or context.is_stable(loss)
        loss.backward()
        return model[0].weight.grad.clone()

    expected = gradient()
    with torch.autocast(device.type, dtype=torch.float16):
        assert gradient().abs().max() == 0.0, "the case is one"
    adaptive = AdaptivePrecisionManager()
    with adaptive.adaptive_context(model, 0) as context:
        assert torch.equal(gradient(context), expected)


def test_an_overflow_leaves_parameters_and_moments_alone(device: torch.device) -> None:
    model = small_model().to(device)
    optimizers = [
        torch.optim.AdamW(model[0].parameters(), 0.1, weight_decay=0.5),
        torch.optim.SGD(model[2].parameters(), 0.1, momentum=0.9),
    ]
    adaptive = manager(device)
    x = torch.randn(8, 8, device=device)
    for step in range(2):
        with adaptive.adaptive_context(model, step):
            model(x).square().mean().backward()
            for optimizer in optimizers:
                optimizer.step()
            model.zero_grad()
    before, momentum = copy.deepcopy([model[0].state_dict(), optimizers[0].state_dict()]), model[2].weight.clone()
    scale = adaptive.get_adaptation_stats()["loss_scale"]
    with adaptive.adaptive_context(model, 2):
        loss = model(x).square().mean()
        (loss + model[0].weight[0, 0] * float("inf")).backward()
        for optimizer in optimizers:
            optimizer.step()
    assert _equal(before, [model[0].state_dict(), optimizers[0].state_dict()]), "nothing of it has moved"
    assert torch.equal(momentum, model[2].weight), "a model's step is skipped as a whole"
    stats = adaptive.get_adaptation_stats()
    assert stats["skipped_steps"] == 1
    assert stats["overflowed"]
    assert stats["overflowed"][0] == "0.weight"
    if half_type(device) == "float16":
        assert stats["loss_scale"] == scale / 2


def test_a_fused_optimizer_skips_on_the_device(device: torch.device) -> None:
    """Nothing is read on the host between backward() and the next is_stable()."""
    model = small_model().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), 0.1, weight_decay=0.5, fused=True)
    adaptive = manager(device)
    x = torch.randn(8, 8, device=device)
    for number, factor in enumerate((1.0, float("inf"), 1.0)):
        before = copy.deepcopy([model.state_dict(), optimizer.state_dict()["state"]])
        with adaptive.adaptive_context(model, number):
            optimizer.zero_grad()
            loss = model(x).square().mean() * factor
            if device.type == "cuda" and number > 0:  # the first step makes states, the first batch is looked at
                torch.cuda.set_sync_debug_mode("error")
            try:
                loss.backward()
                optimizer.step()
            finally:
                if device.type == "cuda":
                    torch.cuda.set_sync_debug_mode("default")
        after = [model.state_dict(), optimizer.state_dict()["state"]]
        assert _equal(before, after) == (factor == float("inf"))
        assert not hasattr(optimizer, "found_inf")
    assert adaptive.get_adaptation_stats()["skipped_steps"] == 1


def _equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def test_accumulation_over_several_backwards_and_contexts(device: torch.device) -> None:
    """Also while the scale changes in between: what is accumulated is true gradients."""
    model = small_model().to(device)
    batches = torch.randn(6, 8, 8, device=device)
    adaptive = AdaptivePrecisionManager(initial_loss_scale=2.0**10)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    expected = [torch.zeros_like(parameter) for parameter in model.parameters()]
    for batch in batches:
        with torch.autocast(device.type, dtype=torch.float16):
            y = model(batch)
        scaled = torch.autograd.grad(y.float().sum() * 2.0**10, list(model.parameters()))
        expected = [total + part / 2.0**10 for total, part in zip(expected, scaled, strict=True)]
    for number, pair in enumerate(batches.reshape(3, 2, 8, 8)):
        with adaptive.adaptive_context(model, number):
            for batch in pair:
                model(batch).sum().backward()
            if number == 2:
                optimizer.step()
    for parameter, total in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, total, rtol=1e-6, atol=1e-7)


def test_losses_beside_the_model(device: torch.device) -> None:
    """Penalties, losses with parameters of their own and torch.autograd.grad: all gradients are true ones."""
    model = small_model().to(device)
    temperature = nn.Parameter(torch.tensor(3.0, device=device))
    x = torch.randn(8, 8, device=device)

    def backward() -> list[torch.Tensor]:
        model.zero_grad()
        temperature.grad = None
        y = model(x)
        (direct,) = torch.autograd.grad(y.sum(), model[2].bias, retain_graph=True)
        assert direct.tolist() == [8.0]
        loss = (y * temperature).sum() + 0.1 * sum(parameter.square().sum() for parameter in model.parameters())
        loss.backward()
        return [*(parameter.grad.clone() for parameter in model.parameters()), temperature.grad.clone()]

    expected = backward()
    with manager(device, initial_loss_scale=16.0).adaptive_context(model, 0):
        got = backward()
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
    assert torch.autograd.backward.__module__ == "torch.autograd"


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(device: torch.device, reentrant: bool) -> None:
    """A reentrant one runs a backward pass of its own within the pass."""
    model = small_model().to(device)
    x = torch.randn(8, 8, device=device, requires_grad=True)
    gradients = []
    for number, checkpointed in enumerate((False, True)):
        with manager(device, initial_loss_scale=64.0).adaptive_context(model, number):
            model.zero_grad()
            y = checkpoint(model, x, use_reentrant=reentrant) if checkpointed else model(x)
            y.square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("kind", ["halfstep", "torch", "torch, unannounced"])
def test_a_scaler_at_work_does_the_scaling(device: torch.device, kind: str) -> None:
    model = small_model().to(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = (GradScaler if kind == "halfstep" else torch.amp.GradScaler)(device.type, init_scale=4.0)
    adaptive = AdaptivePrecisionManager(initial_loss_scale=16.0)
    seen: list[float] = []
    x = torch.randn(8, 8, device=device)
    before = model[0].weight.clone()
    for batch in range(3):
        with adaptive.adaptive_context(model, batch, scaler=scaler if kind == "torch" else None) as context:
            optimizer.zero_grad()
            y = model(x)
            y.register_hook(lambda gradient: seen.append(gradient.abs().max().item()))
            loss = y.sum()
            assert context.is_stable(loss)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    assert seen == [4.0] * 3
    assert adaptive.get_adaptation_stats()["loss_scale"] == 4.0
    assert not torch.equal(before, model[0].weight)


def test_custom_policies_are_where_it_starts(device: torch.device) -> None:
    half = half_type(device)
    policy = PrecisionPolicy("careful", half, [{"name": "2", "precision": "float32"}])
    dtypes: list[torch.dtype] = []
    for way in ("argument", "applied"):
        dtypes.clear()
        model = small_model().to(device)
        if way == "applied":
            apply_plan(model, policy.plan(model))
        adaptive = manager(device, custom_policy=policy if way == "argument" else None)
        forwards = {name: module.__dict__.get("forward") for name, module in model.named_modules()}
        with adaptive.adaptive_context(model, 0):
            assert adaptive.precision_plan(model)["2"].precision == "float32"
            assert adaptive.precision_plan(model)["0"].precision == half
            model[2].register_forward_hook(lambda module, args, result: dtypes.append(result.dtype))
            model(torch.randn(2, 8, device=device))
            assert dtypes == [torch.float32]
        assert "2" not in adaptive.get_adaptation_stats()["layers"], "a fixed layer is not monitored"
        assert adaptive.get_adaptation_stats()["fp16_ratio"] == 1.0
        adaptive.release(model)
        assert {name: module.__dict__.get("forward") for name, module in model.named_modules()} == forwards


def test_release_and_deletion_leave_nothing(device: torch.device) -> None:
    model = small_model().to(device)
    attributes = {name: dict(vars(module)) for name, module in model.named_modules()}
    adaptive = manager(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    train(adaptive, model, optimizer, torch.randn(8, 8, device=device), steps=12)
    adaptive.release(model)
    adaptive.release(model)
    assert {name: vars(module) for name, module in model.named_modules()} == attributes
    train(adaptive, model, optimizer, torch.randn(8, 8, device=device), steps=2)
    gone = [weakref.ref(model), *(weakref.ref(parameter) for parameter in model.parameters())]
    del model, optimizer, attributes
    gc.collect()
    assert all(reference() is None for reference in gone)
    assert torch.nn.modules.module._global_forward_hooks == {}
    assert torch.nn.modules.module._global_forward_pre_hooks == {}
    assert torch.autograd.backward.__module__ == "torch.autograd"


def test_copies_and_pickles_are_free_of_the_manager(device: torch.device) -> None:
    model = Probe().to(device)
    adaptive = manager(device)
    x = torch.randn(2, 8, device=device)
    with adaptive.adaptive_context(model, 0):
        twin = copy.deepcopy(model)
        loaded = pickle.loads(pickle.dumps(model))
        for other in (twin, loaded):
            other(x)
            assert other.seen[-1] is torch.float32
        model(x)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    with pytest.raises(AttributeError, match="release"):
        torch.jit.script(model)


def test_a_checkpoint_goes_on(device: torch.device) -> None:
    model = small_model().to(device)
    adaptive = manager(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    train(adaptive, model, optimizer, torch.randn(8, 8, device=device), steps=7)
    state = adaptive.state_dict(model)
    other, twin = manager(device), copy.deepcopy(model)
    other.load_state_dict(twin, pickle.loads(pickle.dumps(state)))
    assert other.state_dict(twin) == state
    assert other.get_adaptation_stats(twin)["batches"] == 7
    foreign = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="layers"):
        other.load_state_dict(foreign, state)
    assert "forward" not in vars(foreign)
    with pytest.raises(ValueError, match="missing keys"):
        other.load_state_dict(twin, {})
    assert other.state_dict(twin) == state


def test_decisions_are_logged_and_kept(caplog: pytest.LogCaptureFixture) -> None:
    model = small_model()
    with torch.no_grad():
        model[0].weight.mul_(1e6)
    adaptive = AdaptivePrecisionManager()
    with caplog.at_level(logging.INFO, "halfstep.adaptive"), adaptive.adaptive_context(model, 17) as context:
        assert not context.is_stable(model(torch.randn(2, 8)).sum())
    (decision,) = adaptive.get_adaptation_stats()["decisions"]
    assert decision["batch"] == 17
    assert (decision["layer"], decision["from"], decision["to"]) == ("0", "half", "float32")
    assert decision["score"] == float("inf")
    assert "batch 17: layer '0' half -> float32" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stability_threshold": 0.0}, "stability_threshold is 0.0"),
        ({"stability_threshold": float("nan")}, "stability_threshold"),
        ({"stability_threshold": "1"}, "stability_threshold is '1'"),
        ({"adaptation_interval": 0}, "adaptation_interval is 0"),
        ({"adaptation_interval": 2.5}, "adaptation_interval is 2.5"),
        ({"enable_gradient_monitoring": 1}, "enable_gradient_monitoring is 1"),
        ({"precision": "float32"}, "precision is 'float32'"),
        ({"sampling_interval": 0}, "sampling_interval"),
        ({"hold_intervals": 4, "max_hold_intervals": 2}, "max_hold_intervals is 2"),
        ({"custom_policy": "careful"}, "custom_policy is 'careful'"),
        ({"initial_loss_scale": 0.0}, "initial_loss_scale"),
    ],
)
def test_bad_settings(settings: dict, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        AdaptivePrecisionManager(**settings)


def test_misuse() -> None:
    adaptive = AdaptivePrecisionManager()
    model = small_model()
    assert adaptive.get_adaptation_stats()["batches"] == 0
    with pytest.raises(TypeError, match="model is int"):
        adaptive.adaptive_context(3)
    with pytest.raises(TypeError, match="batch_idx is 1.5"):
        adaptive.adaptive_context(model, 1.5)
    with pytest.raises(TypeError, match="scaler is str"):
        adaptive.adaptive_context(model, 1, scaler="x")
    with pytest.raises(ValueError, match="no adaptive_context"):
        adaptive.precision_plan(model)
    with adaptive.adaptive_context(model, 0), pytest.raises(RuntimeError, match="is open"):
        adaptive.release(model)
    context = adaptive.adaptive_context(model, 0)
    with pytest.raises(RuntimeError, match="is new"):
        context.is_stable(torch.ones(1))
    with context, pytest.raises(RuntimeError, match="open already"), adaptive.adaptive_context(model, 0):
        pass
    with pytest.raises(RuntimeError, match="is over"):
        context.fallback_to_fp32()
    with pytest.raises(RuntimeError, match="entered before"), context:
        pass
    with adaptive.adaptive_context(model, 1) as context:
        with pytest.raises(TypeError, match=r"loss is torch.int64"):
            context.is_stable(torch.ones(1, dtype=torch.long))
        with pytest.raises(RuntimeError, match="grad can be implicitly created only for scalar outputs"):
            model(torch.randn(2, 8)).backward()
    with pytest.raises(ZeroDivisionError), adaptive.adaptive_context(model, 2):
        raise ZeroDivisionError
    assert torch.autograd.backward.__module__ == "torch.autograd"
    with adaptive.adaptive_context(model, 3) as context:
        assert context.is_stable(model(torch.randn(2, 8)).sum()), "an exception closes the batch"
