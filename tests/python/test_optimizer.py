"""The fused step against torch.optim, and that the optimizer stays the user's own."""

from __future__ import annotations

import copy
import gc
import io
import math

import halfstep
import pytest
import torch
from halfstep import GradScaler
from halfstep.optimizer import FusedStep, has_step_hooks
from halfstep.step_capture import Recorder
from torch import nn
from torch.testing import assert_close

OPTIMIZERS = {
    "adam": (torch.optim.Adam, {"lr": 1e-2, "weight_decay": 0.1}),
    "adam_amsgrad_maximize": (torch.optim.Adam, {"lr": 1e-2, "amsgrad": True, "maximize": True}),
    "adamw": (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1}),
    "sgd": (torch.optim.SGD, {"lr": 1e-2, "weight_decay": 0.1, "maximize": True}),
    "momentum": (torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9, "dampening": 0.5}),
    "nesterov": (torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
}
EACH = pytest.mark.parametrize("name", OPTIMIZERS)


def parameters(device: torch.device, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """Sizes around the kernels' boundaries: empty, one element, transposed, an unaligned view."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(0,), (1,), (3, 5), (64, 65), (20000,)]
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    values.append(torch.randn(7, 9, generator=generator).t())
    unaligned = torch.randn(1000, generator=generator)
    return [nn.Parameter(value.to(device, dtype)) for value in values] + [nn.Parameter(unaligned.to(device, dtype)[1:])]


def set_gradients(params: list[nn.Parameter], step: int, factor: float, planted: str | None = None) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for param in params:
        grad = torch.randn(param.shape, generator=generator).to(param) * factor
        if planted and grad.numel() > 10000:
            place = {"first": 0, "middle": grad.numel() // 2, "last": -1}[planted]
            grad.view(-1)[place] = math.inf if step % 2 else math.nan
        param.grad = torch.empty_like(param).copy_(grad)  # in the parameter's memory order, as torch's fused step asks


def skips(step: int) -> str | None:
    return {3: "first", 50: "middle", 51: "last", 199: "first"}.get(step)


def run(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], scaler: GradScaler, steps: int = 200) -> None:
    for step in range(steps):
        scaler.scale(torch.zeros((), device=params[0].device))
        set_gradients(params, step, scaler.get_scale(), skips(step))
        scaler.step(optimizer)
        scaler.update()


@EACH
def test_200_steps_equal_torchs_in_float64(device: torch.device, name: str) -> None:
    kind, settings = OPTIMIZERS[name]
    ours, reference = parameters(device), parameters(torch.device("cpu"), torch.float64)
    optimizer = kind(ours, **settings)
    exact = kind(reference, foreach=False, **settings)
    scaler = GradScaler(device.type, init_scale=1024.0, growth_interval=20)
    run(optimizer, ours, scaler)
    for step in range(200):
        if skips(step) is None:
            grads = parameters(torch.device("cpu"))
            set_gradients(grads, step, 1.0)
            for p, g in zip(reference, grads, strict=True):
                p.grad = g.grad.double()
            exact.step()
    assert scaler.counters()["skipped"] == 4
    assert scaler.host_syncs == 0
    for got, expected in zip(ours, reference, strict=True):
        assert_close(got.cpu().double(), expected, rtol=2e-4, atol=2e-5)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@EACH
def test_200_steps_are_torchs_fused_kernels_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    kind, settings = OPTIMIZERS[name]
    device = torch.device("cuda")
    params, reference = parameters(device, dtype), parameters(device, dtype)
    optimizer, torchs = (kind(p, fused=True, **settings) for p in (params, reference))
    scaler = GradScaler("cuda", init_scale=4.0, growth_interval=1000, allow_fp16_gradients=True)
    for step in range(200):
        scaler.scale(torch.zeros((), device=device))
        set_gradients(params, step, 4.0)
        scaler.step(optimizer)
        scaler.update()
        set_gradients(reference, step, 1.0)
        torchs.step()
    if name == "adam" and dtype is torch.float32:
        # In torch's kernel three of four neighbours fuse the L2 decay's product and sum, the fourth rounds twice.
        for got, expected in zip(params, reference, strict=True):
            assert_close(got, expected, rtol=1e-5, atol=1e-6)
        return
    for got, expected in zip(params, reference, strict=True):
        assert torch.equal(got, expected)
    ours, theirs = optimizer.state_dict()["state"], torchs.state_dict()["state"]
    for index, entry in theirs.items():
        for key, expected in entry.items():
            if expected is not None:
                assert torch.equal(ours[index][key], expected), key


@EACH
def test_a_skip_changes_no_byte(device: torch.device, name: str) -> None:
    kind, settings = OPTIMIZERS[name]
    params = parameters(device)
    optimizer = kind(params, **settings)
    scaler = GradScaler(device.type)
    run(optimizer, params, scaler, steps=2)
    before = [p.detach().clone() for p in params], copy.deepcopy(optimizer.state_dict())
    scaler.scale(torch.zeros((), device=device))
    set_gradients(params, 3, 1.0, "last")
    scaler.step(optimizer)
    for p, b in zip(params, before[0], strict=True):
        assert torch.equal(p, b)
    after = optimizer.state_dict()
    for index, entry in before[1]["state"].items():
        for key, value in entry.items():
            assert torch.equal(after["state"][index][key], value)


@EACH
def test_two_runs_give_the_same_bits(device: torch.device, name: str) -> None:
    kind, settings = OPTIMIZERS[name]
    results = []
    for _ in range(2):
        params = parameters(device)
        run(kind(params, **settings), params, GradScaler(device.type), steps=10)
        results.append(params)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(device: torch.device, dtype: torch.dtype) -> None:
    params, reference = parameters(device, dtype), parameters(device, dtype)
    scaler = GradScaler(device.type, init_scale=4.0, allow_fp16_gradients=True)
    optimizer, torchs = (torch.optim.SGD(p, lr=0.5, momentum=0.5) for p in (params, reference))
    for step in range(3):
        scaler.scale(torch.zeros((), device=device))
        set_gradients(params, step, 4.0)
        scaler.step(optimizer)
        scaler.update()
        set_gradients(reference, step, 1.0)
        torchs.step()
    assert scaler.host_syncs == 0
    tolerance = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float64: 1e-12}[dtype]
    for got, expected in zip(params, reference, strict=True):
        assert_close(got, expected, rtol=tolerance, atol=tolerance)


def small(device: torch.device, kind=torch.optim.Adam, **settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).to(device)
    return model, kind(model.parameters(), **{"lr": 0.01, **settings})


def backward(model: nn.Module, scaler, factor: float = 1.0) -> None:
    device = next(model.parameters()).device
    x = torch.linspace(-1, 1, 32, device=device).view(8, 4)
    scaler.scale(model(x).square().mean() * factor).backward()


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer, scaler, factor: float = 1.0, **step) -> None:
    optimizer.zero_grad()
    backward(model, scaler, factor)
    scaler.step(optimizer, **step)
    scaler.update()


# ----------------------------------------------------------------------------------------------------- clipping


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD])
def test_folded_clipping_is_the_documents_loop(device: torch.device, kind) -> None:
    models = []
    for way in ("folded", "explicit", "both"):
        model, optimizer = small(device, kind)
        scaler = GradScaler(device.type, init_scale=1000.0)
        for _ in range(5):
            optimizer.zero_grad()
            backward(model, scaler, 50.0)
            if way == "explicit":
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                scaler.step(optimizer)
            else:
                if way == "both":
                    scaler.unscale_(optimizer)
                scaler.step(optimizer, max_norm=0.1)
            scaler.update()
        models.append(model)
    for others in zip(*(model.parameters() for model in models), strict=True):
        for other in others[1:]:
            assert_close(other, others[0], rtol=1e-5, atol=1e-7)


def test_after_an_explicit_unscale_the_clip_sees_the_users_gradients(device: torch.device) -> None:
    parameter = nn.Parameter(torch.ones(3, device=device))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scaler = GradScaler(device.type, init_scale=8.0)
    scaler.scale(parameter.sum()).backward()
    scaler.unscale_(optimizer)
    parameter.grad.copy_(torch.tensor([30.0, 0.0, 40.0]))
    scaler.step(optimizer, max_norm=5.0)
    assert_close(parameter, torch.tensor([-2.0, 1.0, -3.0], device=device).requires_grad_())


# ------------------------------------------------------------------------------------------- the user's optimizer


@EACH
def test_checkpoints_go_both_ways(device: torch.device, name: str) -> None:
    """Four steps in two halves, by us or torch, before and after a checkpoint: all the same."""
    kind, settings = OPTIMIZERS[name]
    results = []
    for first in ("halfstep", "torch"):
        for second in ("halfstep", "torch"):
            model, optimizer = small(device, kind, **settings)
            for which in (first, second):
                scaler = GradScaler(device.type) if which == "halfstep" else torch.amp.GradScaler(device.type)
                for _ in range(2):
                    one_step(model, optimizer, scaler)
                file = io.BytesIO()
                torch.save(optimizer.state_dict(), file)
                file.seek(0)
                state_dict = torch.load(file)
                for entry in state_dict["state"].values():
                    if "step" in entry:
                        assert entry["step"].device.type == "cpu"
                        assert entry["step"].dtype == torch.float32
                optimizer = kind(model.parameters(), **settings)
                optimizer.load_state_dict(state_dict)
            results.append((model, optimizer.state_dict()["state"]))
    for model, state in results[1:]:
        for got, expected in zip(model.parameters(), results[0][0].parameters(), strict=True):
            assert_close(got, expected, rtol=1e-5, atol=1e-7)
        for index, entry in results[0][1].items():
            assert list(state[index]) == list(entry)
            for key, expected in entry.items():
                assert_close(state[index][key], expected, rtol=1e-5, atol=1e-8)


def test_fused_true_keeps_its_steps_on_the_device(device: torch.device) -> None:
    model, optimizer = small(device, fused=True)
    one_step(model, optimizer, GradScaler(device.type))
    assert all(entry["step"].device.type == device.type for entry in optimizer.state_dict()["state"].values())


def test_release_gives_torchs_state_back(device: torch.device) -> None:
    model, optimizer = small(device, torch.optim.Adam)
    scaler = GradScaler(device.type)
    one_step(model, optimizer, scaler)
    halfstep.release(optimizer)
    assert all(state["step"].device.type == "cpu" for state in optimizer.state.values())
    assert all(state["step"] == 1 for state in optimizer.state.values())
    one_step(model, optimizer, scaler)
    assert all(state["step"] == 2 for state in optimizer.state.values())
    halfstep.release(torch.optim.SGD(model.parameters(), lr=1.0))  # one never seen


def test_a_skipped_first_step_leaves_no_momentum_buffer(device: torch.device) -> None:
    model, optimizer = small(device, torch.optim.SGD, momentum=0.9, dampening=0.5)
    scaler = GradScaler(device.type)
    one_step(model, optimizer, scaler, factor=math.inf)
    assert all(entry["momentum_buffer"] is None for entry in optimizer.state_dict()["state"].values())
    one_step(model, optimizer, scaler)
    reference, torchs = small(device, torch.optim.SGD, momentum=0.9, dampening=0.5)
    one_step(reference, torchs, torch.amp.GradScaler(device.type, enabled=False))
    for got, expected in zip(model.parameters(), reference.parameters(), strict=True):
        assert_close(got, expected)


def momentum_after(scaler, device: torch.device, way: str, dampening: float) -> tuple[torch.Tensor, torch.Tensor]:
    """One parameter and its momentum buffer after a skipped step, one that torch takes by itself, and a clean one."""
    param = nn.Parameter(torch.ones(3, device=device))
    optimizer = torch.optim.SGD([param], lr=0.1, momentum=0.9, dampening=dampening)
    for factor in (math.inf, 1.0):
        optimizer.zero_grad()
        scaler.scale(param.sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        if factor == math.inf:
            param.grad = torch.ones_like(param)
            optimizer.step(*((lambda: None,) if way == "closure" else ()))
            if way == "checkpoint":
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return param.detach(), optimizer.state[param]["momentum_buffer"]


@pytest.mark.parametrize("dampening", [0.0, 0.5])
@pytest.mark.parametrize("way", ["plain", "closure", "checkpoint"])
def test_torchs_step_after_a_skipped_first_one_starts_the_momentum(
    device: torch.device, way: str, dampening: float
) -> None:
    ours = momentum_after(GradScaler(device.type), device, way, dampening)
    theirs = momentum_after(torch.amp.GradScaler(device.type), device, way, dampening)
    assert_close(ours, theirs)


def test_a_step_graphs_own_hooks_are_no_step_hooks(device: torch.device) -> None:
    _, optimizer = small(device)
    FusedStep(optimizer)
    with Recorder({}, []).recording():
        assert not has_step_hooks(optimizer)
    optimizer.register_step_post_hook(print)
    assert has_step_hooks(optimizer)


def test_dropped_fused_steps_leave_no_hook(device: torch.device) -> None:
    _, optimizer = small(device)
    for _ in range(3):
        FusedStep(optimizer)
    gc.collect()
    assert not optimizer._optimizer_state_dict_post_hooks


def test_param_groups_schedulers_and_tensor_learning_rates(device: torch.device) -> None:
    def make():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).to(device)
        groups = [
            {"params": model[0].parameters(), "lr": torch.tensor(0.02, device=device)},
            {"params": model[2].parameters(), "lr": 0.5, "betas": (0.5, 0.7), "weight_decay": 0.1},
        ]
        optimizer = torch.optim.AdamW(groups, fused=True)
        return model, optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    model, optimizer, scheduler = make()
    reference, torchs, torch_scheduler = make()
    scaler, plain = GradScaler(device.type), torch.amp.GradScaler(device.type, enabled=False)
    for _ in range(4):
        one_step(model, optimizer, scaler)
        scheduler.step()  # warns, an error here, unless the optimizer was stepped before
        one_step(reference, torchs, plain)
        torch_scheduler.step()
    assert scaler.host_syncs == 0
    for got, expected in zip(model.parameters(), reference.parameters(), strict=True):
        assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_hooks_fire_once_also_on_a_skip_and_see_true_gradients(device: torch.device) -> None:
    model, optimizer = small(device, torch.optim.SGD)
    calls = []
    optimizer.register_step_pre_hook(lambda opt, *_: calls.append(model[0].bias.grad.abs().max().item()))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    scaler = GradScaler(device.type, init_scale=2.0**14)
    one_step(model, optimizer, scaler)
    assert calls[0] < 10
    assert calls[1:] == ["after"]
    one_step(model, optimizer, scaler, factor=math.inf)
    assert len(calls) == 4


def test_what_torch_must_step_is_counted_and_right(device: torch.device) -> None:
    def patched(optimizer):
        original = optimizer.step
        optimizer.step = lambda *args, **kwargs: (calls.append("step"), original(*args, **kwargs))[1]

    class Mine(torch.optim.Adam):
        pass

    calls: list[str] = []
    for make in (
        lambda p: torch.optim.RMSprop(p, lr=0.01),
        lambda p: Mine(p, lr=0.01),
        lambda p: torch.optim.Adam(p, lr=0.01),
    ):
        model, _ = small(device)
        optimizer = make(model.parameters())
        if type(optimizer) is torch.optim.Adam:
            patched(optimizer)
        before = [p.detach().clone() for p in model.parameters()]
        scaler = GradScaler(device.type)
        one_step(model, optimizer, scaler)
        assert scaler.host_syncs == 1
        assert all(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert calls == ["step"]


def test_a_patched_step_after_fused_ones_takes_over(device: torch.device) -> None:
    model, optimizer = small(device)
    scaler = GradScaler(device.type)
    one_step(model, optimizer, scaler)
    original, calls = optimizer.step, []
    optimizer.step = lambda *args: (calls.append(1), original(*args))[1]
    one_step(model, optimizer, scaler)
    assert calls == [1]
    assert all(state["step"] == 2 and state["step"].device.type == "cpu" for state in optimizer.state.values())


def test_sparse_gradients_fall_to_torch_and_back(device: torch.device) -> None:
    embedding = nn.Embedding(5, 3, sparse=True, device=device)
    optimizer = torch.optim.SGD(embedding.parameters(), lr=1.0)
    scaler = GradScaler(device.type, init_scale=4.0)
    for sparse, syncs in ((False, 0), (True, 1), (False, 1)):
        embedding.sparse = sparse
        before = embedding.weight.detach().clone()
        optimizer.zero_grad()
        scaler.scale(embedding(torch.tensor([1, 1, 3], device=device)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        expected = torch.tensor([0.0, 2.0, 0.0, 1.0, 0.0], device=device)[:, None].expand(5, 3)
        assert_close(before - embedding.weight.detach(), expected)
        assert scaler.host_syncs == syncs


def test_frozen_unused_and_later_parameters(device: torch.device) -> None:
    a, b, c, later = (nn.Parameter(torch.ones(3, device=device)) for _ in range(4))
    optimizer = torch.optim.Adam([a, b, c], lr=0.1)
    scaler = GradScaler(device.type)

    def step(*used: nn.Parameter) -> None:
        optimizer.zero_grad()
        scaler.scale(sum(p.sum() for p in used)).backward()
        scaler.step(optimizer)
        scaler.update()

    step(a, b)
    assert c not in optimizer.state
    assert c.tolist() == [1.0] * 3
    step(a)
    step(a, c)
    optimizer.add_param_group({"params": [later], "lr": 0.2})
    step(a, later)
    assert [optimizer.state[p]["step"].item() for p in (a, b, c, later)] == [4, 1, 1, 1]
    assert_close(later.detach(), torch.full((3,), 0.8, device=device))
    assert scaler.host_syncs == 0


def test_replaced_state_and_moved_parameters_are_noticed(device: torch.device) -> None:
    model, optimizer = small(device, torch.optim.SGD, momentum=0.9)
    scaler = GradScaler(device.type)
    one_step(model, optimizer, scaler)
    for param in model.parameters():
        optimizer.state[param]["momentum_buffer"] = torch.zeros_like(param)
        param.data = param.data.clone()
    before = [p.detach().clone() for p in model.parameters()]
    one_step(model, optimizer, scaler)
    for param, b in zip(model.parameters(), before, strict=True):
        buffer = optimizer.state[param]["momentum_buffer"]
        assert_close(param.grad / 65536.0, buffer)
        assert_close(b - param, 0.01 * buffer, rtol=1e-3, atol=1e-7)


def test_accumulation_and_two_optimizers_and_two_losses(device: torch.device) -> None:
    shared = nn.Linear(4, 4).to(device)
    heads = [nn.Linear(4, 1).to(device) for _ in range(2)]
    optimizers = [torch.optim.Adam(shared.parameters()), torch.optim.SGD(heads[0].parameters(), lr=0.1)]
    optimizers[1].add_param_group({"params": heads[1].parameters()})
    scaler = GradScaler(device.type)
    x = torch.ones(2, 4, device=device)
    for _ in range(2):  # accumulate
        losses = [head(shared(x)).sum() for head in heads]
        scaler.scale(losses[0]).backward(retain_graph=True)
        scaler.scale(losses[1]).backward()
    before = heads[0].bias.detach().clone()
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    assert_close(before - heads[0].bias.detach(), torch.full_like(before, 0.1 * 2 * 2))
    # An overflow of one optimizer skips that one alone.
    shared.weight.grad[0, 0] = math.inf
    weights = shared.weight.detach().clone(), heads[0].weight.detach().clone()
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    assert torch.equal(shared.weight, weights[0])
    assert not torch.equal(heads[0].weight, weights[1])


def test_gradients_of_other_strides(device: torch.device) -> None:
    conv = nn.Conv2d(4, 8, 3).to(device, memory_format=torch.channels_last)
    twin = copy.deepcopy(conv)
    gradient = torch.randn(8, 4, 3, 3, device=device)
    for module, scaler in ((conv, GradScaler(device.type, init_scale=1.0)), (twin, None)):
        optimizer = torch.optim.Adam(module.parameters())
        module.weight.grad = gradient.clone()
        if scaler is None:
            optimizer.step()
        else:
            scaler.scale(torch.ones((), device=device))
            scaler.step(optimizer)
            assert scaler.host_syncs == 0
    assert_close(conv.weight, twin.weight)


def test_the_graph_notices_that_parameters_were_written(device: torch.device) -> None:
    model, optimizer = small(device)
    scaler = GradScaler(device.type)
    one_step(model, optimizer, scaler)
    loss = model(torch.ones(2, 4, device=device)).sum()
    version = model[2].weight._version
    scaler.step(optimizer)
    assert model[2].weight._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.cuda
@EACH
def test_a_step_never_waits_for_the_gpu(name: str) -> None:
    kind, settings = OPTIMIZERS[name]
    model, optimizer = small(torch.device("cuda"), kind, **settings)
    scaler = GradScaler("cuda")
    one_step(model, optimizer, scaler)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            one_step(model, optimizer, scaler, max_norm=1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --------------------------------------------------------------------------------------------------------- the ops


@EACH
def test_the_ops_are_the_step(device: torch.device, name: str) -> None:
    kind, settings = OPTIMIZERS[name]
    params, copies_ = parameters(device), parameters(device)
    set_gradients(params, 1, 8.0)
    grads = [p.grad for p in params]
    optimizer = kind(params, **settings)
    scaler = GradScaler(device.type, init_scale=8.0)
    scaler.scale(torch.zeros((), device=device))
    scaler.step(optimizer, max_norm=3.0)
    values = [p.detach() for p in copies_]
    steps = [torch.zeros((), device=device) for _ in values]
    norm = torch.linalg.vector_norm(torch.cat([g.reshape(-1) for g in grads]).double() / 8.0).float()
    control = {"scale": torch.full((), 8.0, device=device), "norm": norm, "max_norm": 3.0, "lr": settings["lr"]}
    control |= {"found": torch.zeros((), device=device)}
    common = {key: settings[key] for key in ("weight_decay", "maximize") if key in settings}
    zeros = [[torch.zeros_like(v) for v in values] for _ in range(3)]
    if kind is torch.optim.SGD:
        own = {key: settings[key] for key in ("momentum", "dampening", "nesterov") if key in settings}
        buffers = zeros[0] if "momentum" in own else []
        torch.ops.halfstep.sgd_step_(values, grads, buffers, steps, **control, **own, **common)
    else:
        if kind is torch.optim.AdamW:
            common["decoupled"] = True
        largest = zeros[2] if settings.get("amsgrad") else []
        torch.ops.halfstep.adam_step_(
            values, grads, zeros[0], zeros[1], largest, steps, beta1=0.9, beta2=0.999, eps=1e-8, **control, **common
        )
    assert all(step == 1 for step in steps)
    for value, param in zip(values, params, strict=True):
        assert_close(value, param.detach(), rtol=1e-6, atol=1e-7)


def test_the_ops_under_opcheck(device: torch.device) -> None:
    def tensors():
        return [torch.ones(5, device=device), torch.ones(0, device=device)]

    steps = [torch.zeros((), device=device) for _ in range(2)]
    hyper = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8}
    arguments = (tensors(), tensors(), tensors(), tensors(), [], steps)
    torch.library.opcheck(torch.ops.halfstep.adam_step_.default, arguments, hyper)
    torch.library.opcheck(torch.ops.halfstep.sgd_step_.default, (tensors(), tensors(), [], steps), {"lr": 0.1})


def test_bad_arguments_are_named(device: torch.device) -> None:
    value, step = torch.ones(4, device=device), torch.zeros((), device=device)
    gradient = value.clone()

    def sgd(params=(value,), grads=(gradient,), steps=(step,), buffers=(), **settings):
        torch.ops.halfstep.sgd_step_(list(params), list(grads), list(buffers), list(steps), **{"lr": 0.1, **settings})

    with pytest.raises(ValueError, match="sgd_step_: grads has 0 tensors, expected 1"):
        sgd(grads=())
    with pytest.raises(ValueError, match=r"sgd_step_: params\[0\]: its gradient has another shape"):
        sgd(grads=[torch.ones(3, device=device)])
    with pytest.raises(ValueError, match=r"params\[0\]: it is Float and its gradient Double"):
        sgd(grads=[value.double()])
    with pytest.raises(ValueError, match=r"its gradient has layout Sparse"):
        sgd(grads=[torch.eye(2, device=device).to_sparse()], params=[torch.ones(2, 2, device=device)])
    with pytest.raises(TypeError, match="steps has dtype Double, expected Float"):
        sgd(steps=[step.double()])
    with pytest.raises(ValueError, match="momentum is 0.9 and there are 0 momentum_buffers"):
        sgd(momentum=0.9)
    with pytest.raises(ValueError, match=r"a state of params\[0\] is .*expected the parameter's"):
        sgd(momentum=0.9, buffers=[torch.ones(5, device=device)])
    with pytest.raises(ValueError, match="norms is empty"):
        torch.ops.halfstep.combine_norms([])
    assert value.tolist() == [1.0] * 4
