"""halfstep.GradScaler against torch.amp.GradScaler, and what it adds."""

from __future__ import annotations

import math
import pickle
import warnings

import halfstep
import pytest
import torch
from halfstep import GradScaler, ScaleCollapsed
from scaler_cases import one_parameter, used_scaler
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook


def network(device: torch.device, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)).to(device, dtype)


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    "adam_fused": lambda parameters: torch.optim.Adam(parameters, lr=0.01, fused=True),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.01),
}
# Those that halfstep steps itself compute as torch's fused kernels on a GPU do (test_optimizer.py); torch's other
# kernels round their hyperparameters to float32.
OWN_STEP = ("sgd", "adam", "adamw", "adam_fused")


def train(scaler, optimizer_name: str, device: torch.device, *, clip: bool, steps: int = 12) -> list[torch.Tensor]:
    """Train with planted overflows; return the parameters after each step, and the scale last."""
    model = network(device)
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    generator = torch.Generator().manual_seed(5)
    trace = []
    for i in range(steps):
        x = torch.randn(16, 6, generator=generator).to(device)
        optimizer.zero_grad()
        loss = model(x).square().mean()
        scaler.scale(loss).backward()
        if i in (2, 5, 6):
            next(model.parameters()).grad[0, 0] = math.inf if i != 5 else math.nan
        if clip:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        scaler.step(optimizer)
        scaler.update()
        trace += [parameter.detach().clone() for parameter in model.parameters()]
        trace.append(torch.tensor(scaler.get_scale()))
    return trace


@pytest.mark.parametrize("clip", [False, True], ids=["plain", "unscale_and_clip"])
@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
def test_trains_as_torchs_scaler_does(device: torch.device, optimizer_name: str, clip: bool) -> None:
    settings = dict(init_scale=2.0**10, growth_factor=3.0, backoff_factor=0.25, growth_interval=2)
    ours = train(GradScaler(device.type, **settings), optimizer_name, device, clip=clip)
    torchs = train(torch.amp.GradScaler(device.type, **settings), optimizer_name, device, clip=clip)
    for i, (got, expected) in enumerate(zip(ours, torchs, strict=True)):
        if optimizer_name in OWN_STEP and got.dim() > 0:
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6, msg=str(i))
        else:
            assert torch.equal(got, expected), i


@pytest.mark.parametrize("clip", [False, True], ids=["plain", "unscale_and_clip"])
def test_is_an_instance_of_torchs_class_and_disabled_is_the_plain_loop(device: torch.device, clip: bool) -> None:
    scaler = GradScaler(device.type, enabled=False)
    assert isinstance(scaler, torch.amp.GradScaler)
    ours = train(scaler, "adam", device, clip=clip, steps=2)
    torchs = train(torch.amp.GradScaler(device.type, enabled=False), "adam", device, clip=clip, steps=2)
    assert all(torch.equal(got, expected) for got, expected in zip(ours, torchs, strict=True))
    assert scaler.state_dict() == {}
    assert scaler.counters()["steps"] == 0
    assert scaler.history() == []


def test_mixed_dtypes_in_one_optimizer(device: torch.device) -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float64)
    parameters = [nn.Parameter(torch.ones(4, device=device, dtype=dtype)) for dtype in dtypes]
    optimizer = torch.optim.SGD(parameters, lr=0.5, foreach=False)
    scaler = GradScaler(device.type, init_scale=1024.0)
    scaler.scale(sum(parameter.float().sum() for parameter in parameters)).backward()
    scaler.step(optimizer)
    scaler.update()
    for parameter in parameters:
        assert parameter.tolist() == [0.5] * 4


def test_float16_gradients_by_option(device: torch.device) -> None:
    parameter, optimizer = one_parameter(torch.float16, device)
    scaler = GradScaler(device.type, init_scale=8.0)
    scaler.scale(parameter.sum()).backward()
    with pytest.raises(ValueError, match=r"^Attempting to unscale FP16 gradients\.$"):
        scaler.unscale_(optimizer)
    assert parameter.grad.tolist() == [8.0] * 3
    scaler = GradScaler(device.type, init_scale=8.0, allow_fp16_gradients=True)
    parameter.grad.fill_(8.0)
    scaler.scale(torch.zeros(()).to(device))
    scaler.step(optimizer)
    assert parameter.tolist() == [0.0] * 3


def test_sparse_gradients(device: torch.device) -> None:
    for dtype, options in ((torch.float32, {}), (torch.float16, {"allow_fp16_gradients": True})):
        embedding = nn.Embedding(5, 3, sparse=True, device=device, dtype=dtype)
        optimizer = torch.optim.SGD(embedding.parameters(), lr=1.0)
        before = embedding.weight.detach().clone()
        scaler = GradScaler(device.type, init_scale=4.0, **options)
        scaler.scale(embedding(torch.tensor([1, 1, 3], device=device)).float().sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        moved = (before - embedding.weight.detach()).float().round().tolist()
        assert [row[0] for row in moved] == [0.0, 2.0, 0.0, 1.0, 0.0]


def test_duplicate_sparse_indices_that_overflow_together_are_found() -> None:
    embedding = nn.Embedding(2, 1, sparse=True, dtype=torch.float16)
    optimizer = torch.optim.SGD(embedding.parameters(), lr=1.0)
    scaler = GradScaler("cpu", init_scale=1.0, allow_fp16_gradients=True)
    loss = scaler.scale((embedding(torch.tensor([0, 0])) * 40000.0).float().sum())
    loss.backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.counters()["skipped"] == 1


def test_an_overflow_made_by_a_scale_below_one_is_skipped() -> None:
    parameter, optimizer = one_parameter()
    scaler = GradScaler("cpu", init_scale=0.125)
    scaler.scale(parameter.sum()).backward()
    parameter.grad.fill_(1e38)
    scaler.step(optimizer)
    scaler.update()
    assert parameter.tolist() == [1.0] * 3


def test_two_devices_with_overflows_make_one_flag() -> None:
    # Two flags on this one device stand for two devices; torch's fused step skips on exactly 1, and torch adds.
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([parameter], lr=1.0, fused=True)
    scaler = GradScaler("cpu")
    scaler.scale(parameter.sum()).backward()
    scaler.unscale_(optimizer)
    state = scaler._per_optimizer_states[id(optimizer)]
    state["found_inf_per_device"] = {torch.device("cpu"): torch.ones(()), torch.device("cpu", 0): torch.ones(())}
    scaler.step(optimizer)
    scaler.update()
    assert parameter.tolist() == [1.0] * 3
    assert scaler.get_scale() == 32768.0


def test_two_devices_with_overflows_are_skipped_when_step_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adagrad([parameter], lr=1.0, fused=True)  # a fused optimizer that torch steps
    scaler = GradScaler("cpu")
    flags = {torch.device("cpu"): torch.ones(()), torch.device("cpu", 0): torch.ones(())}
    monkeypatch.setattr(scaler, "_unscale_grads_", lambda *_: dict(flags))
    scaler.scale(parameter.sum()).backward()
    scaler.step(optimizer, max_norm=1.0)
    assert parameter.tolist() == [1.0] * 3


def test_factors_of_one_freeze_the_scale_as_in_torch() -> None:
    parameter, optimizer = one_parameter()
    torchs = torch.amp.GradScaler("cpu", init_scale=8.0)
    torchs.set_growth_factor(1.0)
    torchs.set_backoff_factor(1.0)
    torchs.set_growth_interval(1.0)
    scaler = GradScaler("cpu")
    scaler.load_state_dict(torchs.state_dict())
    for factor in (1.0, math.inf, 1.0):
        optimizer.zero_grad()
        scaler.scale(parameter.sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 8.0


def test_setters_refuse_at_once_what_an_update_could_not_use() -> None:
    scaler = GradScaler("cpu")
    with pytest.raises(ValueError, match="growth_factor is 0.5"):
        scaler.set_growth_factor(0.5)
    with pytest.raises(ValueError, match="backoff_factor is 2"):
        scaler.set_backoff_factor(2.0)
    with pytest.raises(ValueError, match="growth_interval is 0"):
        scaler.set_growth_interval(0)
    scaler.set_growth_interval(5.0)
    assert (scaler.get_growth_factor(), scaler.get_backoff_factor(), scaler.get_growth_interval()) == (2.0, 0.5, 5)


# ------------------------------------------------------------------------------------------ errors, word for word


def misuse(scaler_class: type, name: str) -> None:
    parameter, optimizer = one_parameter()
    scaler = scaler_class("cpu")
    ready = name not in ("unscale before scale", "step before scale", "update before scale")
    if ready:
        scaler.scale(parameter.sum()).backward()
    actions = {
        "unscale before scale": lambda: scaler.unscale_(optimizer),
        "step before scale": lambda: scaler.step(optimizer),
        "update before scale": lambda: scaler.update(),
        "unscale twice": lambda: (scaler.unscale_(optimizer), scaler.unscale_(optimizer)),
        "unscale after step": lambda: (scaler.step(optimizer), scaler.unscale_(optimizer)),
        "step twice": lambda: (scaler.step(optimizer), scaler.step(optimizer)),
        "closure": lambda: scaler.step(optimizer, closure=lambda: None),
        "update without step": lambda: scaler.update(),
        "no gradients": lambda: (optimizer.zero_grad(), scaler.step(optimizer)),
        "not a tensor": lambda: scaler.scale(3),
        "tensor new_scale that requires grad": lambda: scaler.update(torch.ones((), requires_grad=True)),
        "two new_scales": lambda: scaler.update(torch.ones(2)),
        "empty state": lambda: scaler.load_state_dict({}),
        "pickle between step and update": lambda: (scaler.step(optimizer), pickle.dumps(scaler)),
        "growth factor": lambda: scaler_class("cpu", growth_factor=1.0),
        "backoff factor": lambda: scaler_class("cpu", backoff_factor=1.0),
    }
    actions[name]()


MISUSES = [
    "unscale before scale", "step before scale", "update before scale", "unscale twice", "unscale after step",
    "step twice", "closure", "update without step", "no gradients", "not a tensor",
    "tensor new_scale that requires grad", "two new_scales", "empty state", "pickle between step and update",
    "growth factor", "backoff factor",
]  # fmt: skip


@pytest.mark.parametrize("name", MISUSES)
def test_torchs_errors_word_for_word(name: str) -> None:
    with pytest.raises(Exception) as expected:  # noqa: PT011
        misuse(torch.amp.GradScaler, name)
    with pytest.raises(type(expected.value)) as got:
        misuse(GradScaler, name)
    assert str(got.value) == str(expected.value)


BAD_GRADIENTS = {
    "meta": lambda: torch.ones((), device="meta").expand(2),
    "expanded": lambda: torch.ones(()).expand(2),
    "csr": lambda: torch.eye(2).to_sparse_csr(),
}


@pytest.mark.parametrize("kind", BAD_GRADIENTS)
@pytest.mark.parametrize("action", ["step", "unscale_"])
def test_one_bad_gradient_leaves_all_others_scaled(kind: str, action: str) -> None:
    bad_grad = BAD_GRADIENTS[kind]()
    good, bad = nn.Parameter(torch.ones(2)), nn.Parameter(torch.empty_like(bad_grad, memory_format=None))
    optimizer = torch.optim.SGD([("good", good), ("bad", bad)], lr=1.0)
    scaler = GradScaler("cpu", init_scale=8.0)
    scaler.scale(good.sum()).backward()
    bad.grad = bad_grad
    if (kind, action) == ("expanded", "step"):  # which writes no gradient
        scaler.step(optimizer)
        assert good.tolist() == [0.0] * 2
        assert (bad.grad.stride(), bad.grad.tolist()) == ((0,), [1.0] * 2)
        return
    for _ in range(2):
        with pytest.raises(ValueError, match="the gradient of bad "):
            getattr(scaler, action)(optimizer)
        assert good.grad.tolist() == [8.0] * 2
    pickle.dumps(scaler)


BAD_KINDS = [
    ({"device": 65536.0}, "device is 65536.0, expected a device type"),
    ({"init_scale": "big"}, "init_scale is 'big', expected a number"),
    ({"growth_interval": 10.5}, "growth_interval is 10.5, expected an integer"),
    ({"hysteresis": True}, "hysteresis is True, expected an integer"),
    ({"refill": 3}, "refill is 3, expected a str"),
]


@pytest.mark.parametrize(("settings", "message"), BAD_KINDS, ids=[case[1] for case in BAD_KINDS])
def test_settings_of_the_wrong_kind_are_named(settings: dict, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        GradScaler(**{"device": "cpu", **settings})


def test_other_arguments_of_the_wrong_kind_are_named() -> None:
    _, optimizer = one_parameter()
    with pytest.raises(TypeError, match="state_dict is NoneType, expected a dict"):
        GradScaler("cpu").load_state_dict(None)
    with pytest.raises(ValueError, match="max_norm is '1', expected a number > 0"):
        GradScaler("cpu").step(optimizer, max_norm="1")


@pytest.mark.parametrize("action", ["step", "unscale_"])
def test_a_refused_call_leaves_no_trace(action: str) -> None:
    _, optimizer = one_parameter()
    scaler = GradScaler("cpu")
    with pytest.raises(AssertionError, match="_scale is None"):
        getattr(scaler, action)(optimizer)
    pickle.dumps(scaler)  # refused in the middle of an iteration


@pytest.mark.skipif(torch.cuda.is_available(), reason="the warning is for machines without a GPU")
def test_torchs_warning_without_cuda() -> None:
    with pytest.warns(UserWarning, match="CUDA is not available.  Disabling"):
        scaler = GradScaler()
    assert not scaler.is_enabled()


BAD_SETTINGS = [
    ({"init_scale": -1.0}, "init_scale is -1"),
    ({"init_scale": math.nan}, "init_scale is nan"),
    ({"init_scale": 0.0}, "init_scale is 0"),
    ({"min_scale": 1e6}, r"init_scale is 65536, .* from min_scale \(1e\+06\)"),
    ({"max_scale": 1.0}, r"init_scale is 65536, .* to max_scale \(1\)"),
    ({"max_scale": -1.0}, "max_scale is -1"),
    ({"hysteresis": 0}, "hysteresis is 0"),
    ({"refill": "now"}, "refill is 'now'"),
    ({"growth_interval": 0}, "growth_interval is 0"),
    ({"max_consecutive_skips": 0}, "max_consecutive_skips is 0"),
]


@pytest.mark.parametrize(("settings", "message"), BAD_SETTINGS, ids=[case[1] for case in BAD_SETTINGS])
def test_bad_settings_are_named(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GradScaler("cpu", **settings)


@pytest.mark.parametrize("bad", [-1.0, 0.0, math.nan, math.inf, -3, 1e-60, 1e39])
def test_a_bad_new_scale_changes_nothing(bad: float) -> None:
    parameter, optimizer = one_parameter()
    scaler = GradScaler("cpu")
    scaler.scale(parameter.sum()).backward()
    scaler.step(optimizer)
    with pytest.raises(ValueError, match="new_scale is"):
        scaler.update(bad)
    assert scaler.get_scale() == 65536.0
    scaler.update(4)  # an int is a number too
    assert scaler.get_scale() == 4.0


def test_complex_gradients_are_named() -> None:
    good, bad = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, dtype=torch.complex64))
    optimizer = torch.optim.SGD([("weight", good), ("phase", bad)], lr=1.0)
    scaler = GradScaler("cpu")
    scaler.scale(good.sum() + bad.abs().sum()).backward()
    with pytest.raises(TypeError, match="the gradient of phase has dtype torch.complex64"):
        scaler.step(optimizer)
    assert good.grad.tolist() == [65536.0] * 2
    assert good.tolist() == [1.0] * 2


CHANGES = {
    "freed": lambda parameter: setattr(parameter, "grad", None),
    "resized": lambda parameter: parameter.grad.resize_(0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_gradients_that_change_between_unscale_and_step(change: str) -> None:
    parameter = nn.Parameter(torch.ones(3))
    other = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([parameter, other], lr=1.0)
    scaler = GradScaler("cpu")
    scaler.scale((parameter + other).sum()).backward()
    scaler.unscale_(optimizer)
    CHANGES[change](parameter)
    with pytest.raises(RuntimeError, match="the gradient of parameter 0 of group 0 was freed, resized or added"):
        scaler.step(optimizer)
    assert other.tolist() == [1.0] * 3
    assert not optimizer.state
    assert scaler.get_scale() == 65536.0


def test_a_gradient_added_after_unscale_is_refused() -> None:
    parameter, late = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter, late], lr=1.0)
    scaler = GradScaler("cpu")
    scaler.scale(parameter.sum()).backward()
    scaler.unscale_(optimizer)
    scaler.scale(late.sum()).backward()  # still scaled: stepping it would be wrong by the scale
    with pytest.raises(RuntimeError, match="parameter 1 of group 0 .* had none and has 2 elements"):
        scaler.step(optimizer)
    assert late.tolist() == [1.0] * 2


def test_a_gradient_replaced_by_one_of_the_same_size_is_the_users_right() -> None:
    parameter, optimizer = one_parameter()
    scaler = GradScaler("cpu")
    scaler.scale(parameter.sum()).backward()
    scaler.unscale_(optimizer)
    parameter.grad = parameter.grad.clamp(max=0.5)
    scaler.step(optimizer)
    assert parameter.tolist() == [0.5] * 3


@pytest.mark.parametrize("bad", [1.0, 64.0])
def test_a_new_scale_outside_the_bounds_is_refused(bad: float) -> None:
    scaler = GradScaler("cpu", init_scale=8.0, min_scale=4.0, max_scale=16.0)
    scaler.scale(torch.ones(()))
    with pytest.raises(ValueError, match=r"new_scale is .*, expected min_scale \(4\) to max_scale \(16\)"):
        scaler.update(bad)
    assert scaler.get_scale() == 8.0


@pytest.mark.cuda
def test_the_scale_may_live_on_the_cpu_and_gradients_on_the_gpu() -> None:
    # Copies to the CPU must be awaited before the host reads them.
    parameter = nn.Parameter(torch.ones(1 << 22, device="cuda"))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scaler = GradScaler("cpu")
    for i in range(20):
        scaler.scale(torch.ones(()))
        parameter.grad = torch.full_like(parameter, math.inf)
        scaler.step(optimizer)
        scaler.update()
        assert scaler.counters()["skipped"] == i + 1
    assert parameter[0].item() == 1.0


# ---------------------------------------------------------------------------------------------- what it tells


def test_counters_and_history(device: torch.device) -> None:
    scaler = used_scaler(device.type)
    assert scaler.counters() == {
        "steps": 5, "skipped": 1, "consecutive_skipped": 0, "growths": 1, "backoffs": 1, "at_floor": 0,
        "nan_steps": 0, "inf_steps": 1,
    }  # fmt: skip
    history = scaler.history()
    assert [(r.step, r.scale, r.skipped) for r in history] == [
        (1, 256.0, False), (2, 256.0, True), (3, 128.0, False), (4, 128.0, False), (5, 128.0, False),
    ]  # fmt: skip
    assert history[0].norm == pytest.approx(math.sqrt(3.0))
    assert math.isinf(history[1].norm)
    assert scaler.get_scale() == 256.0
    assert scaler.host_syncs == 0


def test_a_collapsed_scale_names_the_parameters(device: torch.device) -> None:
    good, bad = (nn.Parameter(torch.ones(4, device=device)) for _ in range(2))
    optimizer = torch.optim.SGD([("encoder.weight", good), ("decoder.weight", bad)], lr=1.0)
    scaler = GradScaler(device.type, init_scale=4.0, min_scale=2.0, max_consecutive_skips=3)
    factor = torch.tensor([1.0, math.inf, math.nan, 1.0], device=device)
    with pytest.raises(ScaleCollapsed, match=r"3 steps in a row .* scale is 2 .*: decoder.weight: 2 of 4\."):
        for _ in range(4):
            optimizer.zero_grad()
            scaler.scale((good + bad * factor).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
    assert scaler.counters()["at_floor"] == 2
    assert good.tolist() == [1.0] * 4


def test_presets_follow_their_names() -> None:
    scaler = GradScaler.from_preset("megatron", "cpu", growth_interval=5)
    assert scaler.get_scale() == 2.0**32
    assert scaler.get_growth_interval() == 5
    assert scaler.state_dict()["halfstep"]["refill"] == "on_growth"
    delayed = GradScaler.from_preset("deepspeed", "cpu", init_scale=8.0, growth_interval=2)
    parameter, optimizer = one_parameter()
    scales = []
    for _ in range(4):
        delayed.scale(parameter.sum()).backward()
        delayed.step(optimizer)
        delayed.update()
        scales.append(delayed.get_scale())
    assert scales == [8.0, 8.0, 16.0, 16.0]
    with pytest.raises(ValueError, match="preset is 'none'"):
        GradScaler.from_preset("none", "cpu")


def test_max_norm_clips_the_unscaled_gradients(device: torch.device) -> None:
    for explicit in (False, True):
        parameter, optimizer = one_parameter(device=device, size=4)
        scaler = GradScaler(device.type)
        scaler.scale(parameter.sum() * 3.0).backward()
        if explicit:
            scaler.unscale_(optimizer)
        scaler.step(optimizer, max_norm=1.0)
        scaler.update()
        torch.testing.assert_close(parameter.detach(), torch.full((4,), 0.5, device=device), rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match="max_norm is -1"):
        scaler.step(optimizer, max_norm=-1.0)


# -------------------------------------------------------------------------------------------- ambient autocast


@pytest.mark.parametrize("outer", [False, True], ids=["plain", "inside_an_outer_autocast"])
@pytest.mark.parametrize("inner", [False, True], ids=["no_inner", "inner_autocast"])
def test_the_loss_falls_wherever_autocast_is_on(device: torch.device, outer: bool, inner: bool) -> None:
    def context(enabled: bool):
        return halfstep.AutocastContext(device.type, dtype=torch.bfloat16, enabled=enabled)

    model = network(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    scaler = GradScaler(device.type)
    x, y = torch.randn(32, 6, device=device), torch.randn(32, 2, device=device)
    losses = []
    outermost = torch.autocast(device.type, dtype=torch.bfloat16, enabled=outer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with outermost:
            for _ in range(30):
                optimizer.zero_grad()
                with context(inner or outer):
                    loss = (model(x).float() - y).square().mean()
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_torchs_own_nesting_never_learns_which_is_why() -> None:
    """What AutocastContext is for; if this fails, torch has mended it and the class can go."""
    weight = nn.Parameter(torch.ones(2, 2))
    x = torch.ones(2, 2)

    def product() -> float:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return (x @ weight).sum().item()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        first = product()
        with torch.no_grad():
            weight.mul_(3.0)
        assert product() == first


def test_scale_warns_once_where_autocast_is_on() -> None:
    parameter, _ = one_parameter()
    scaler = GradScaler("cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.warns(UserWarning, match="where autocast is on"):
            scaler.scale(parameter.sum())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            scaler.scale(parameter.sum())


# ------------------------------------------------------------------------------------------------------ step hooks


def replace(gradient) -> None:
    def hook(optimizer, *_) -> None:
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = gradient(parameter.grad)

    return hook


@pytest.mark.parametrize("everywhere", [False, True], ids=["instance", "global"])
@pytest.mark.parametrize("name", ["before", "after", "halved", "in_place", "clamped", "dropped"])
def test_step_hooks_see_and_do_what_they_do_with_torchs_scaler(
    device: torch.device, name: str, everywhere: bool
) -> None:
    seen: list[list[float]] = []
    hook = {
        "halved": replace(lambda gradient: gradient / 2),
        "in_place": replace(lambda gradient: gradient.mul_(3)),
        "clamped": replace(lambda gradient: gradient.clamp(-0.5, 0.5)),
        "dropped": replace(lambda gradient: None),
    }.get(name, lambda optimizer, *_: seen.append(optimizer.param_groups[0]["params"][0].grad.tolist()))
    results = []
    for kind in (torch.amp.GradScaler, GradScaler):
        parameter, optimizer = one_parameter(device=device)
        scaler = kind(device.type, init_scale=8.0)
        if everywhere:
            register = {"after": register_optimizer_step_post_hook}.get(name, register_optimizer_step_pre_hook)
        else:
            register = optimizer.register_step_post_hook if name == "after" else optimizer.register_step_pre_hook
        handle = register(hook)
        try:
            scaler.scale((parameter * torch.arange(3.0, device=device)).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        finally:
            handle.remove()
        results.append((parameter.tolist(), parameter.grad is None))
    assert results[0] == results[1]
    assert seen[:1] == seen[1:]


def test_a_hook_that_sets_what_cannot_be_stepped_is_named() -> None:
    parameter, optimizer = one_parameter()
    optimizer.register_step_pre_hook(replace(lambda gradient: gradient.to_sparse()))
    scaler = GradScaler("cpu")
    scaler.scale(parameter.sum()).backward()
    with pytest.raises(RuntimeError, match="a hook before the step left .* layout Sparse"):
        scaler.step(optimizer)
    assert parameter.tolist() == [1.0] * 3
