"""The hooks that undo a loss scale at the leaves: what others put on the same parameters, and what stays behind."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from halfstep import load_library
from torch import nn
from torch.utils.checkpoint import checkpoint

load_library()


def unscaler():
    return torch.classes.halfstep.GradientUnscaler()


def scaled_backward(hooks, root: torch.Tensor, scale: float = 1024.0, **kwargs) -> None:
    factor = torch.tensor(scale, device=root.device)
    gradients, number = hooks.begin([root], [None], hooks.leaves([root]), factor, True)
    try:
        torch.autograd.backward(root, gradients, **kwargs)
    finally:
        hooks.end(number)


def network(device: torch.device) -> tuple[nn.Module, torch.Tensor]:
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4), nn.Linear(4, 1)).to(device)
    return model, torch.randn(5, 8, device=device)


def gradients_of(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters()]


def test_gradients_are_those_without_a_scale(device: torch.device) -> None:
    model, x = network(device)
    model(x).sum().backward()
    expected = gradients_of(model)
    model.zero_grad()
    hooks = unscaler()
    scaled_backward(hooks, model(x).sum())
    assert all(torch.equal(a, b) for a, b in zip(gradients_of(model), expected, strict=True)), "powers of 2 are exact"
    scaled_backward(hooks, model(x).sum(), 2.0**20)
    assert all(torch.equal(a, 2 * b) for a, b in zip(gradients_of(model), expected, strict=True)), "and accumulate"


def test_what_flows_inside_is_scaled(device: torch.device) -> None:
    x = torch.ones(3, device=device, requires_grad=True)
    inside = []
    y = x * 2
    y.register_hook(lambda gradient: inside.append(gradient.clone()))
    scaled_backward(unscaler(), y.sum())
    assert inside[0].tolist() == [1024.0] * 3
    assert x.grad.tolist() == [2.0] * 3


def test_python_hooks_on_the_same_parameters_see_true_gradients_and_stay(device: torch.device) -> None:
    """Registering the first one throws away other hooks of the tensor, so none of ours may be there between passes."""
    model, x = network(device)
    hooks, seen, accumulated = unscaler(), [], []
    scaled_backward(hooks, model(x).sum())
    expected = gradients_of(model)
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: seen.append(gradient.clone()))
        parameter.register_hook(lambda gradient: gradient.clamp(-0.01, 0.01))
        parameter.register_post_accumulate_grad_hook(lambda leaf: accumulated.append(leaf.grad.clone()))
    model.zero_grad()
    scaled_backward(hooks, model(x).sum())
    assert sorted(g.abs().max().item() for g in seen) == sorted(g.abs().max().item() for g in expected)
    assert len(accumulated) == len(expected)
    for gradient, plain in zip(gradients_of(model), expected, strict=True):
        assert torch.equal(gradient, plain.clamp(-0.01, 0.01)), "a hook may replace the gradient"
    seen.clear()
    model(x).sum().backward()
    assert len(seen) == len(expected), "the user's hooks stay"


def test_nothing_is_left_behind(device: torch.device) -> None:
    model, x = network(device)
    hooks = unscaler()
    scaled_backward(hooks, model(x).sum())
    model.zero_grad()
    model(x).sum().backward()
    plain = gradients_of(model)
    model.zero_grad()
    scaled_backward(hooks, model(x).sum())
    assert all(torch.equal(a, b) for a, b in zip(gradients_of(model), plain, strict=True))
    gone = [weakref.ref(parameter) for parameter in model.parameters()]
    del model
    gc.collect()
    assert all(reference() is None for reference in gone), "the hooks keep no parameter alive"


def test_a_backward_that_fails_leaves_nothing(device: torch.device) -> None:
    model, x = network(device)
    hooks = unscaler()

    def fail(gradient: torch.Tensor) -> None:
        raise ZeroDivisionError

    y = model[0](x)
    handle = y.register_hook(fail)
    with pytest.raises(ZeroDivisionError):
        scaled_backward(hooks, y.sum())
    handle.remove()
    model.zero_grad()
    model(x).sum().backward()
    expected = gradients_of(model)
    model.zero_grad()
    model(x).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(gradients_of(model), expected, strict=True))


def test_parameters_outside_of_the_model_and_penalties_are_right(device: torch.device) -> None:
    model, x = network(device)
    temperature = nn.Parameter(torch.tensor(2.0, device=device))

    def loss() -> torch.Tensor:
        return (model(x) * temperature).sum() + sum((p**2).sum() for p in model.parameters())

    loss().backward()
    expected = [*gradients_of(model), temperature.grad.clone()]
    model.zero_grad()
    temperature.grad = None
    scaled_backward(unscaler(), loss())
    got = [*gradients_of(model), temperature.grad]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(device: torch.device, reentrant: bool) -> None:
    """A reentrant one runs a backward pass within the pass, which the context's backward() announces as well."""
    model, x = network(device)
    x.requires_grad_(True)
    model(x).sum().backward()
    expected = gradients_of(model)
    model.zero_grad()
    hooks = unscaler()
    factor = torch.tensor(1024.0, device=device)
    torchs = torch.autograd.backward

    def nested(tensors, grad_tensors=None, *args, **kwargs):
        given = [grad_tensors] if isinstance(grad_tensors, torch.Tensor) else list(grad_tensors)
        leaves = [leaf for leaf in hooks.leaves(list(tensors)) if isinstance(leaf, nn.Parameter)]
        _, inner = hooks.begin(list(tensors), given, leaves, factor, False)
        torchs(tensors, grad_tensors, *args, **kwargs)
        hooks.end(inner)

    loss = checkpoint(model, x, use_reentrant=reentrant).sum()
    gradients, number = hooks.begin([loss], [None], hooks.leaves([loss]), factor, True)
    torch.autograd.backward = nested
    try:
        torchs(loss, gradients)
    finally:
        torch.autograd.backward = torchs
        hooks.end(number)
    assert all(torch.equal(a, b) for a, b in zip(gradients_of(model), expected, strict=True))


def test_autograd_grad_and_second_derivatives(device: torch.device) -> None:
    x = torch.tensor([1.0, 2.0], device=device, requires_grad=True)
    hooks = unscaler()
    scaled_backward(hooks, (x**3).sum(), create_graph=True)
    assert x.grad.tolist() == [3.0, 12.0]
    (second,) = torch.autograd.grad(x.grad.sum(), x)
    assert second.tolist() == [6.0, 12.0]
    (first,) = torch.autograd.grad((x**3).sum(), x)
    assert first.tolist() == [3.0, 12.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_gradients_keep_their_dtype(device: torch.device, dtype: torch.dtype) -> None:
    x = torch.ones(3, device=device, dtype=dtype, requires_grad=True)
    scaled_backward(unscaler(), (x.float() * 2**-20).sum(), 2.0**15)
    assert x.grad.dtype is dtype
    assert x.grad.tolist() == [2.0**-20] * 3
    x.grad = None
    scaled_backward(unscaler(), (x.float() * 2**-20).sum(), 2.0**30)
    assert x.grad.tolist() == [2.0**-20] * 3, "half could not hold the scale"


def test_sparse_gradients(device: torch.device) -> None:
    table = nn.Embedding(10, 3, sparse=True).to(device)
    scaled_backward(unscaler(), table(torch.tensor([1, 1, 4], device=device)).sum())
    assert table.weight.grad.is_sparse
    assert table.weight.grad.to_dense()[:, 0].tolist() == [0, 2, 0, 0, 1, 0, 0, 0, 0, 0]


def test_what_was_reached(device: torch.device) -> None:
    model, x = network(device)
    unused = nn.Parameter(torch.ones(1, device=device))
    hooks = unscaler()
    loss = model(x).sum()
    assert {id(leaf) for leaf in hooks.leaves([loss])} == {id(parameter) for parameter in model.parameters()}
    gradients, number = hooks.begin([loss], [None], [*model.parameters(), unused], None, True)
    torch.autograd.backward(loss, gradients)
    assert {id(leaf) for leaf in hooks.end(number)} == {id(parameter) for parameter in model.parameters()}


def test_a_float16_root_is_scaled_as_far_as_it_holds(device: torch.device) -> None:
    x = torch.ones(3, device=device, requires_grad=True)
    loss = (x * 2**-20).sum().half()
    scaled_backward(unscaler(), loss, 2.0**30)
    assert x.grad.tolist() == [2.0**-20] * 3


@pytest.mark.filterwarnings("ignore:.*lru_cache.*", "ignore:.*torch._dynamo.*")
def test_compiled_autograd() -> None:
    model, x = network(torch.device("cpu"))
    model(x).sum().backward()
    expected = gradients_of(model)
    model.zero_grad()
    hooks, statistics = unscaler(), _monitor(["a"])
    y = statistics.watch_input(0, model[0](x))
    statistics.watch_output(0, y, True)
    loss = model[1:](y).sum()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        scaled_backward(hooks, loss)
    assert all(torch.equal(a, b) for a, b in zip(gradients_of(model), expected, strict=True))
    assert statistics.rows()[0, 1, 1].item() == y.numel(), "the gradient was seen"
    assert statistics.rows()[0, 2, 1].item() == y.numel()


def _monitor(names: list[str]):
    from halfstep import PrecisionPlan
    from halfstep.policy import PlannedLayer

    plan = PrecisionPlan("test", [PlannedLayer(name, "Linear", "float16", "") for name in names])
    return torch.classes.halfstep.StabilityMonitor(plan._plan)


def test_bad_arguments() -> None:
    hooks = unscaler()
    x = torch.ones(1, requires_grad=True)
    with pytest.raises(ValueError, match="1 roots and 2 gradients"):
        hooks.begin([x], [None, None], [], None, True)
    with pytest.raises(TypeError, match="scale has dtype Double"):
        hooks.begin([x], [None], [x], torch.ones(1, dtype=torch.float64), True)
    with pytest.raises(ValueError, match="no pass 7"):
        hooks.end(7)
