"""Training through planned layers: threads, transforms, wrappers, the compiler."""

from __future__ import annotations

import contextlib
import copy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from halfstep.scopes import remove_plan
from scopes_cases import HEAD, INNER, ISLAND, WIDTH, Outer, autocast, gradients, mlp, planned, same
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parametrize

# -------------------------------------------------------------------------------------------------------------- threads


@pytest.mark.parametrize("rule", [HEAD, ISLAND], ids=["float32", "float16"])
def test_backward_on_another_thread_gives_the_same_bits(device: torch.device, rule) -> None:
    x = torch.randn(16, WIDTH, device=device)
    results = []
    with ThreadPoolExecutor(1) as pool:
        for run in (lambda loss: torch.autograd.backward(loss), lambda loss: pool.submit(loss.backward).result()):
            model = planned(mlp(device), rule)
            with autocast(device):
                loss = model(x).float().square().mean()
            run(loss)
            results.append(gradients(model))
    assert same(*results)
    assert all(each.dtype is torch.float32 and each.count_nonzero() for each in results[0])


def test_two_plans_on_two_threads_at_once() -> None:
    """The scopes switch the thread's own state: neither thread sees what the other's scopes do."""
    plans = {"float32": HEAD, "float16": ISLAND}
    models = {name: planned(mlp(), rule) for name, rule in plans.items()}
    x = torch.randn(16, WIDTH)
    barrier = Barrier(2)

    def meet(module: nn.Module, args: tuple[Any, ...]) -> None:
        barrier.wait(timeout=60)  # inside of the layer's scope, both at once

    def work(name: str) -> tuple[torch.dtype, bool, list[torch.Tensor]]:
        model = models[name]
        with autocast():
            for _ in range(20):
                model.zero_grad()
                out = model(x)
                out.float().sum().backward()
            return out.dtype, torch.is_autocast_enabled("cpu"), gradients(model)

    class Meeting(nn.Identity):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            meet(self, ())
            return x

    for model in models.values():
        parametrize.register_parametrization(model[2], "weight", Meeting(), unsafe=True)
    with ThreadPoolExecutor(2) as pool:
        got = dict(zip(models, pool.map(work, models), strict=True))
    for name in models:
        barrier = Barrier(1)
        assert got[name][0] is getattr(torch, name)
        assert got[name][1]
        assert same(work(name)[2], got[name][2]), "as alone"


# ------------------------------------------------------------------------------------------------------------- training


def losses(model: nn.Module, device: torch.device, outer: contextlib.AbstractContextManager[Any]) -> list[float]:
    from halfstep import AutocastContext

    torch.manual_seed(1)
    x, y = torch.randn(64, WIDTH, device=device), torch.randint(4, (64,), device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    result = []
    with outer:
        for _ in range(20):
            optimizer.zero_grad()
            with AutocastContext(device.type, dtype=torch.bfloat16):
                loss = nn.functional.cross_entropy(model(x).float(), y)
            with torch.autocast(device.type, enabled=False):
                loss.backward()
            optimizer.step()
            result.append(loss.item())
    return result


@pytest.mark.parametrize("rule", [HEAD, ISLAND], ids=["float32", "float16"])
def test_nested_in_an_outer_autocast_training_is_the_same(device: torch.device, rule) -> None:
    alone = losses(planned(mlp(device), rule), device, contextlib.nullcontext())
    nested = losses(planned(mlp(device), rule), device, autocast(device))
    assert alone == nested, "bit by bit"
    assert nested[-1] < 0.9 * nested[0]


def test_removed_from_a_copy_the_plan_stays_in_the_original() -> None:
    model = planned(mlp(), HEAD)
    twin = copy.deepcopy(model)
    remove_plan(twin)
    x = torch.randn(2, WIDTH)
    with autocast():
        assert twin(x).dtype is torch.bfloat16
        assert model(x).dtype is torch.float32
    assert not any("forward" in vars(module) for module in twin.modules())
    assert all(vars(module)["forward"].module is module for module in model if "forward" in vars(module))


@pytest.mark.parametrize("rule", [HEAD, ISLAND], ids=["float32", "float16"])
def test_functional_transforms(device: torch.device, rule) -> None:
    model = planned(mlp(device), rule)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    x = torch.randn(5, WIDTH, device=device)

    def loss(parameters: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        with autocast(device):
            return functional_call(model, parameters, (x,)).float().square().sum()

    zeros = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    assert loss(zeros, x) == 0.0
    transformed = grad(loss)(parameters, x)
    loss(dict(model.named_parameters()), x).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(transformed[name], parameter.grad, rtol=2e-2, atol=2e-2)
    per_sample = vmap(grad(loss), in_dims=(None, 0))(parameters, x.unsqueeze(1))
    for name, each in per_sample.items():
        assert each.dtype is torch.float32
        torch.testing.assert_close(each.sum(0), transformed[name], rtol=3e-2, atol=3e-2)


DDP = """
import os, sys
import torch, torch.distributed as dist
sys.path[:0] = [sys.argv[1]]
from scopes_cases import HEAD, autocast, gradients, mlp, planned, same
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=0, world_size=1)
x = torch.randn(16, 8)
results = []
for wrap in (lambda model: model, torch.nn.parallel.DistributedDataParallel):
    model = planned(mlp(), HEAD)
    wrapped = wrap(model)
    for _ in range(2):
        model.zero_grad(set_to_none=False)
        with autocast():
            out = wrapped(x)
        out.square().mean().backward()
    results.append(gradients(model))
print(out.dtype, same(*results))
sys.stdout.flush()
os._exit(0)  # torch's teardown of gloo aborts now and then
"""


def test_inside_of_distributed_data_parallel(tmp_path) -> None:
    (tmp_path / "worker.py").write_text(DDP)
    worker = [sys.executable, tmp_path / "worker.py", Path(__file__).parent, tmp_path / "rendezvous"]
    done = subprocess.run(worker, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "torch.float32 True\n"


# ------------------------------------------------------------------------------------------------------------- compiled


def trained(call: Any, model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model.zero_grad()
    with autocast(x.device):
        out = call(x)
    out.float().square().mean().backward()
    return out.detach(), [gradient.clone() for gradient in gradients(model)]


# torch compiles the backward pass under the autocast of the call, so the products of a float32 layer's gradients would
# be half ones. This setting makes it as in eager code.
_BACKWARD_AS_IN_EAGER = {"backward_pass_autocast": "off"}


@pytest.mark.parametrize("rule", [HEAD, ISLAND], ids=["float32", "float16"])
def test_compiled_training_is_that_of_eager_for_all_shapes(device: torch.device, rule) -> None:
    torch._dynamo.reset()
    model = planned(mlp(device), rule)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for size in (3, 5, 16):
        x = torch.randn(size, WIDTH, device=device)
        with torch._functorch.config.patch(_BACKWARD_AS_IN_EAGER):
            out, mine = trained(compiled, model, x)
        expected, theirs = trained(model, model, x)
        assert out.dtype is expected.dtype
        torch.testing.assert_close(out, expected)
        assert same(mine, theirs)
    assert counter.frame_count == 1


def test_another_plan_is_compiled_anew(device: torch.device) -> None:
    torch._dynamo.reset()
    model = planned(mlp(device), HEAD)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, WIDTH, device=device)
    seen = []
    for rules in ((HEAD,), None, (ISLAND,), (HEAD,)):
        remove_plan(model)
        if rules is not None:
            planned(model, *rules)
        with torch._functorch.config.patch(_BACKWARD_AS_IN_EAGER):
            out, mine = trained(compiled, model, x)
        expected, theirs = trained(model, model, x)
        seen.append(out.dtype)
        torch.testing.assert_close(out, expected)
        assert same(mine, theirs)
    assert seen == [torch.float32, torch.bfloat16, torch.float16, torch.float32]


def test_nested_scopes_compile_to_the_same(device: torch.device) -> None:
    torch._dynamo.reset()
    model = planned(Outer().to(device), INNER, default="float32")
    x = torch.randn(3, WIDTH, device=device)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch._functorch.config.patch(_BACKWARD_AS_IN_EAGER):
        out, mine = trained(compiled, model, x)
    expected, theirs = trained(model, model, x)
    assert torch.equal(out, expected)
    assert same(mine, theirs)
