"""float16 and bfloat16 parameters that are stepped through float32 masters, against float32 twins."""

from __future__ import annotations

import copy
import io
import math

import halfstep
import pytest
import torch
from halfstep import GradScaler, MixedPrecisionManager
from torch import nn
from torch.testing import assert_close

OPTIMIZERS = {
    "adam": (torch.optim.Adam, {"lr": 1e-2, "weight_decay": 0.1}),
    "adamw_amsgrad": (torch.optim.AdamW, {"lr": 1e-2, "amsgrad": True}),
    "adam_fused": (torch.optim.Adam, {"lr": 1e-2, "fused": True}),
    "sgd": (torch.optim.SGD, {"lr": 1e-2, "weight_decay": 0.1}),
    "momentum": (torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9, "dampening": 0.5}),
}
EACH = pytest.mark.parametrize("name", OPTIMIZERS)
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])


def parameters(device: torch.device, dtype: torch.dtype) -> list[nn.Parameter]:
    """Half values of several sizes and strides, in `dtype`."""
    generator = torch.Generator().manual_seed(1)
    values = [torch.randn(shape, generator=generator) for shape in ((0,), (1,), (64, 65), (20000,))]
    values.append(torch.randn(7, 9, generator=generator).t())
    return [nn.Parameter(value.bfloat16().to(device, dtype)) for value in values]


def set_gradients(params: list[nn.Parameter], step: int, half: torch.dtype, factor: float = 1.0) -> None:
    """Gradients that `half` holds, in the parameters' dtype."""
    generator = torch.Generator().manual_seed(100 + step)
    for param in params:
        grad = torch.randn(param.shape, generator=generator).to(half).to(param) * factor
        param.grad = torch.empty_like(param).copy_(grad)


def step(scaler: GradScaler, optimizer: torch.optim.Optimizer, **settings) -> None:
    device = optimizer.param_groups[0]["params"][0].device
    scaler.scale(torch.zeros((), device=device))
    scaler.step(optimizer, **settings)
    scaler.update()


def a_scaler(device: torch.device, **settings) -> GradScaler:
    return GradScaler(device.type, init_scale=4.0, growth_interval=1000, master_state=True, **settings)


def run(params, optimizer, scaler: GradScaler, half: torch.dtype, steps: range) -> None:
    for i in steps:
        set_gradients(params, i, half, 4.0)
        step(scaler, optimizer)


def one(device: torch.device, dtype: torch.dtype = torch.bfloat16, kind=torch.optim.SGD, **settings):
    param = nn.Parameter(torch.ones(3, dtype=dtype, device=device))
    return param, kind([param], **{"lr": 1.0, **settings})


def masters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [state["master"] for state in optimizer.state.values()]


@HALVES
@EACH
def test_parameters_are_a_float32_twins_rounded_to_half(device: torch.device, name: str, dtype: torch.dtype) -> None:
    kind, settings = OPTIMIZERS[name]
    params, twins = parameters(device, dtype), parameters(device, torch.float32)
    optimizer, twin = kind(params, **settings), kind(twins, **settings)
    scaler, plain = a_scaler(device), GradScaler(device.type, init_scale=4.0, growth_interval=1000)
    for i in range(20):
        run(params, optimizer, scaler, dtype, range(i, i + 1))
        run(twins, twin, plain, dtype, range(i, i + 1))
    assert scaler.host_syncs == 0
    for param, other in zip(params, twins, strict=True):
        assert param.dtype is dtype
        assert torch.equal(param, other.to(dtype))
        state = optimizer.state[param]
        assert torch.equal(state["master"], other)
        assert list(state) == [*twin.state[other], "master"]
        for key, value in twin.state[other].items():
            assert state[key].dtype is torch.float32
            assert torch.equal(state[key], value), key


@HALVES
def test_updates_below_half_an_ulp_add_up(device: torch.device, dtype: torch.dtype) -> None:
    results = []
    for master_state in (True, False):
        param, optimizer = one(device, dtype, lr=1e-5)
        scaler = GradScaler(device.type, init_scale=4.0, master_state=master_state, allow_fp16_gradients=True)
        for _ in range(1000):
            param.grad = torch.full_like(param, 4.0)
            step(scaler, optimizer)
        results.append(param.detach().float())
    assert_close(results[0], torch.full((3,), 0.99, device=device), rtol=4e-3, atol=0)
    assert results[1].tolist() == [1.0] * 3


def test_against_torch_in_float64(device: torch.device) -> None:
    params, exact = parameters(device, torch.bfloat16), parameters(torch.device("cpu"), torch.float64)
    optimizer, reference = torch.optim.AdamW(params, lr=1e-2), torch.optim.AdamW(exact, lr=1e-2, foreach=False)
    scaler = a_scaler(device)
    for i in range(50):
        run(params, optimizer, scaler, torch.bfloat16, range(i, i + 1))
        set_gradients(exact, i, torch.bfloat16)
        reference.step()
    for master, expected in zip(masters(optimizer), exact, strict=True):
        assert_close(master.cpu().double(), expected.detach(), rtol=2e-4, atol=2e-5)


@EACH
def test_a_skip_changes_no_byte(device: torch.device, name: str) -> None:
    kind, settings = OPTIMIZERS[name]
    params = parameters(device, torch.bfloat16)
    optimizer, scaler = kind(params, **settings), a_scaler(device)
    run(params, optimizer, scaler, torch.bfloat16, range(2))
    before = [p.detach().clone() for p in params], copy.deepcopy(optimizer.state_dict()["state"])
    set_gradients(params, 3, torch.bfloat16)
    params[3].grad[-1] = math.inf
    step(scaler, optimizer)
    assert scaler.counters()["skipped"] == 1
    assert all(torch.equal(*pair) for pair in zip(params, before[0], strict=True))
    after = optimizer.state_dict()["state"]
    for index, entry in before[1].items():
        assert all(torch.equal(after[index][key], value) for key, value in entry.items())


@EACH
@pytest.mark.parametrize("order", ["model first", "optimizer first"])
def test_a_checkpoint_resumes_bit_by_bit(device: torch.device, name: str, order: str) -> None:
    kind, settings = OPTIMIZERS[name]

    def fresh():
        model = nn.ParameterList(parameters(device, torch.bfloat16))
        return model, kind(model.parameters(), **settings), a_scaler(device)

    model, optimizer, scaler = fresh()
    run(list(model), optimizer, scaler, torch.bfloat16, range(5))
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    loaded = torch.load(file)
    resumed, other, resumed_scaler = fresh()
    resumed_scaler.prepare(other)
    if order == "model first":
        resumed.load_state_dict(loaded[0])
        other.load_state_dict(loaded[1])
    else:
        run(list(resumed), other, resumed_scaler, torch.bfloat16, range(7, 9))
        other.load_state_dict(loaded[1])
        resumed.load_state_dict(loaded[0])
    run(list(model), optimizer, scaler, torch.bfloat16, range(5, 10))
    run(list(resumed), other, resumed_scaler, torch.bfloat16, range(5, 10))
    assert all(torch.equal(*pair) for pair in zip(model, resumed, strict=True))
    assert all(torch.equal(*pair) for pair in zip(masters(optimizer), masters(other), strict=True))
    assert not torch.equal(masters(other)[3], resumed[3])


def test_a_checkpoint_that_torch_has_rounded_warns(device: torch.device) -> None:
    param, optimizer = one(device, kind=torch.optim.Adam)
    param.grad = torch.ones_like(param)
    step(a_scaler(device), optimizer)
    other, loaded = one(device, kind=torch.optim.Adam)
    loaded.load_state_dict(optimizer.state_dict())
    other.grad = torch.ones_like(other)
    with pytest.warns(UserWarning, match=r"prepare\(optimizer\) before optimizer.load_state_dict"):
        step(a_scaler(device), loaded)
    assert all(value.dtype is torch.float32 for value in loaded.state[other].values())


@EACH
@pytest.mark.parametrize("way", ["release", "step", "load"])
def test_torch_goes_on_from_its_own_states(device: torch.device, name: str, way: str) -> None:
    """And halfstep from those that torch then has."""
    kind, settings = OPTIMIZERS[name]
    params = parameters(device, torch.bfloat16)
    optimizer, scaler = kind(params, **settings), a_scaler(device)
    run(params, optimizer, scaler, torch.bfloat16, range(3))
    expected = copy.deepcopy(optimizer.state_dict()["state"])
    if way == "release":
        halfstep.release(optimizer)
        for index, param in enumerate(params):
            assert "master" not in optimizer.state.get(param, {})
            for key, value in optimizer.state.get(param, {}).items():
                assert value.dtype is (torch.float32 if key == "step" else torch.bfloat16)
                assert_close(value, expected[index][key].to(value.dtype))
        assert not optimizer._optimizer_load_state_dict_pre_hooks
        assert not optimizer._optimizer_load_state_dict_post_hooks
    if way == "load":
        fresh = kind(params, **settings)
        fresh.load_state_dict(optimizer.state_dict())
        optimizer = fresh
    set_gradients(params, 3, torch.bfloat16)
    optimizer.step()
    state = optimizer.state_dict()["state"]
    if "momentum_buffer" in settings or kind is not torch.optim.SGD:
        assert state[3]["exp_avg" if kind is not torch.optim.SGD else "momentum_buffer"].dtype is torch.bfloat16
    if way != "load":
        run(params, optimizer, scaler, torch.bfloat16, range(4, 6))
        assert all(value.dtype is torch.float32 for entry in optimizer.state.values() for value in entry.values())


def test_masters_begin_in_the_middle_and_keep_what_was_there(device: torch.device) -> None:
    param, optimizer = one(device, lr=0.5, momentum=0.5)
    for master_state in (False, True):
        param.grad = torch.ones_like(param)
        step(GradScaler(device.type, init_scale=1.0, master_state=master_state), optimizer)
    assert param.tolist() == [-0.25] * 3
    assert optimizer.state[param]["momentum_buffer"].tolist() == [1.5] * 3
    twin = copy.deepcopy(optimizer)  # has masters, hence needs no option
    other = twin.param_groups[0]["params"][0]
    other.grad = torch.ones_like(other)
    step(GradScaler(device.type, init_scale=1.0), twin)
    assert other.tolist() == [-1.125] * 3
    assert twin.state[other]["master"].dtype is torch.float32


def test_values_written_to_a_parameter_reach_its_master(device: torch.device) -> None:
    param, optimizer = one(device, lr=2.0**-12)
    scaler = a_scaler(device)

    def once() -> list[float]:
        param.grad = torch.full_like(param, 4.0)
        step(scaler, optimizer)
        return optimizer.state[param]["master"].tolist()

    small = 2.0**-12
    assert once() == [1 - small] * 3
    assert param.tolist() == [1.0] * 3
    with torch.no_grad():
        param[0] = 5.0
    assert once() == [5 - small, 1 - 2 * small, 1 - 2 * small]  # what was not written keeps what half cannot hold
    param.data = torch.full_like(param, 3.0)
    assert once() == [3 - small] * 3
    param.data = param.data.half()
    assert once() == [3 - 2 * small] * 3
    assert param.dtype is torch.float16
    param.data = param.data.float()
    param.grad = torch.full_like(param, 4.0)
    step(scaler, optimizer)
    assert "master" not in optimizer.state[param]


def test_groups_with_float32_parameters_and_unused_ones(device: torch.device) -> None:
    half, full, unused = (
        nn.Parameter(torch.ones(4, dtype=dtype, device=device))
        for dtype in (torch.float16, torch.float32, torch.bfloat16)
    )
    optimizer = torch.optim.Adam([{"params": [half], "lr": 0.5}, {"params": [full, unused], "lr": 0.25}])
    scaler = a_scaler(device)
    for param in (half, full):
        param.grad = torch.full_like(param, 4.0)
    step(scaler, optimizer)
    assert set(optimizer.state[full]) == {"step", "exp_avg", "exp_avg_sq"}
    assert unused not in optimizer.state
    assert_close(half.detach().float(), torch.full_like(full, 0.5), rtol=1e-3, atol=0)
    assert_close(full.detach(), torch.full_like(full, 0.75))
    unused.grad = torch.full_like(unused, 4.0)
    step(scaler, optimizer)
    assert optimizer.state[unused]["step"] == 1
    assert optimizer.state[unused]["master"].dtype is torch.float32


@HALVES
def test_unscale_and_clip_before_the_step(device: torch.device, dtype: torch.dtype) -> None:
    results = []
    for way in ("explicit", "folded", "hooked"):
        param, optimizer = one(device, dtype)
        scaler = a_scaler(device)
        if way == "hooked":
            optimizer.register_step_pre_hook(lambda *_: None)
        scaler.scale((param.float() * torch.tensor([3.0, 0.0, 4.0], device=device)).sum()).backward()
        if way == "explicit":
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_([param], 2.5)
        scaler.step(optimizer, **({} if way == "explicit" else {"max_norm": 2.5}))
        scaler.update()
        assert scaler.host_syncs == 0
        results.append(optimizer.state[param]["master"])
        assert torch.equal(param, results[-1].to(dtype))
    for result in results:
        assert_close(result, torch.tensor([-0.5, 1.0, -1.0], device=device), rtol=1e-3, atol=1e-5)


def test_what_torch_must_step_is_refused(device: torch.device) -> None:
    param, optimizer = one(device, kind=torch.optim.RMSprop)
    scaler = a_scaler(device)
    scaler.scale(param.float().sum()).backward()
    with pytest.raises(RuntimeError, match="master_state=True, but RMSprop cannot .*: RMSprop is not exactly Adam"):
        scaler.step(optimizer)
    with pytest.raises(RuntimeError, match="the scaler is disabled"):
        GradScaler(device.type, enabled=False, master_state=True).step(optimizer)
    assert param.tolist() == [1.0] * 3
    full = nn.Parameter(torch.ones(3, device=device))
    others = torch.optim.RMSprop([full])
    full.grad = torch.ones_like(full)
    step(a_scaler(device), others)
    assert full.tolist() != [1.0] * 3
    with pytest.raises(TypeError, match="master_state is 'yes', expected True or False"):
        GradScaler(device.type, master_state="yes")


@EACH
def test_a_captured_step_steps_through_masters(device: torch.device, name: str) -> None:
    kind, settings = OPTIMIZERS[name]
    x = torch.linspace(-1, 1, 32, device=device).view(8, 4)
    results = []
    for captured in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).to(device, torch.bfloat16)
        optimizer = kind(model.parameters(), **settings)
        manager = MixedPrecisionManager(precision_policy="mixed_bfloat16")
        _, _, scaler = manager.setup_pytorch_training(model, optimizer)
        scaler._master_state = True

        def train(x, model=model, optimizer=optimizer, scaler=scaler):
            optimizer.zero_grad()
            loss = model(x.bfloat16()).float().square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            return loss

        do = manager.capture(train) if captured else train
        for i in range(8):
            if i in (2, 6):  # warming up, and between replays
                with torch.no_grad():
                    model[0].weight[0] = 0.5
            do(x)
        if captured and device.type == "cuda":
            assert "1 captures" in do.explain(), do.explain()
        results.append([*model.parameters(), *masters(optimizer)])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.cuda
@EACH
def test_a_step_never_waits_for_the_gpu(name: str) -> None:
    kind, settings = OPTIMIZERS[name]
    device = torch.device("cuda")
    params = parameters(device, torch.bfloat16)
    optimizer, scaler = kind(params, **settings), a_scaler(device)
    run(params, optimizer, scaler, torch.bfloat16, range(1))
    set_gradients(params, 1, torch.bfloat16)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            with torch.no_grad():
                params[3].mul_(0.5)
            step(scaler, optimizer, max_norm=1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
