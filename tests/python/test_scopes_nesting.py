"""Layers inside of layers that are planned otherwise, and modules that are called again or under two names."""

from __future__ import annotations

import copy

import pytest
import torch
from halfstep import PrecisionPlan, PrecisionPolicy
from halfstep.policy import PlannedLayer
from halfstep.scopes import apply_plan, remove_plan
from scopes_cases import INNER, WIDTH, Outer, autocast, gradients, planned
from torch import nn


@pytest.mark.parametrize("how", ["plain", "reentrant", "not reentrant"])
def test_half_layers_inside_of_a_float32_one_are_half(device: torch.device, how: str) -> None:
    torch.manual_seed(0)
    model = planned(Outer(how).to(device), INNER, default="float32")
    reference = copy.deepcopy(model)
    remove_plan(reference)
    x = torch.randn(4, WIDTH, device=device, requires_grad=True)
    with autocast(device):
        out = model(x)
    half = nn.functional.linear(x.bfloat16(), reference.inner.weight.bfloat16(), reference.inner.bias.bfloat16())
    expected = nn.functional.linear(reference.norm(half.float()), reference.weight)
    assert out.dtype is torch.float32
    assert torch.equal(out, expected)
    out.sum().backward()
    expected.sum().backward()
    for mine, theirs in zip(gradients(model), gradients(reference), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-2)
    assert torch.equal(model.weight.grad, reference.weight.grad), "float32 all through"
    assert not torch.is_autocast_enabled(device.type)
    assert torch.get_autocast_dtype(device.type) in (torch.float16, torch.bfloat16)


def test_inside_of_a_half_layer_of_another_type_the_loops_own_type_holds() -> None:
    seen: dict[str, torch.dtype] = {}

    class Notes(Outer):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.inner(x)
            seen["inner"] = x.dtype
            seen["own"] = nn.functional.linear(x, self.weight).dtype
            seen["norm"] = self.norm(x).dtype
            return x

    model = Notes()
    plan = PrecisionPolicy("p", "bfloat16", [{"name": "", "precision": "float16"}]).plan(model)
    apply_plan(model, plan, torch.bfloat16)  # the layers inside have the loop's type, and need scopes all the same
    with autocast():
        model(torch.randn(4, WIDTH))
    assert seen == {"inner": torch.bfloat16, "own": torch.float16, "norm": torch.bfloat16}


def test_only_layers_inside_of_another_precision_need_scopes_for_the_loops_own_type() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Outer(), Outer())
    plan = PrecisionPolicy("p", "bfloat16", [{"name": "2", "precision": "float32"}]).plan(model)
    apply_plan(model, plan, torch.bfloat16)
    scoped = {name for name, module in model.named_modules() if "forward" in vars(module)}
    assert scoped == {"2", "2.inner", "2.norm"}


def test_where_the_user_turns_autocast_off_nested_scopes_do_nothing(device: torch.device) -> None:
    x = torch.randn(4, WIDTH, device=device)
    model = planned(Outer("off").to(device), INNER, {"name": "", "precision": "bfloat16"}, default="float32")
    plain = copy.deepcopy(model)
    remove_plan(plain)
    with autocast(device):
        assert torch.equal(model.inner(x), plain.inner(x))  # bfloat16, both
        with torch.autocast(device.type, enabled=False):
            assert torch.equal(model(x), plain(x))
            assert model.inner(x).dtype is torch.float32
    half: list[torch.dtype] = []
    planned(model, {"name": "", "precision": "bfloat16"}, default="float16")
    model.norm.register_forward_pre_hook(lambda module, args: half.append(args[0].dtype))
    with autocast(device):
        model.float()(x)
    assert half == [torch.float32], "off within the forward of a half layer"


def test_a_module_that_calls_itself_and_one_that_is_called_twice() -> None:
    class Recursive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.eye(WIDTH))
            self.dtypes: list[tuple[torch.dtype, torch.dtype]] = []

        def forward(self, x: torch.Tensor, depth: int) -> torch.Tensor:
            out = nn.functional.linear(x, self.weight)
            self.dtypes.append((x.dtype, out.dtype))
            return out if depth == 0 else self(out, depth=depth - 1)

    for precision in ("float32", "float16"):
        model = planned(Recursive(), default=precision)
        wanted = getattr(torch, precision)
        x, weight = torch.randn(2, WIDTH), torch.eye(WIDTH, requires_grad=True)
        with autocast():
            out = model(model(x, 2).bfloat16(), 0)
            assert torch.is_autocast_enabled("cpu")
            assert torch.get_autocast_dtype("cpu") is torch.bfloat16
        expected = x.to(wanted)
        for i in range(4):
            expected = expected.bfloat16().to(wanted) if i == 3 else expected
            expected = nn.functional.linear(expected, weight.to(wanted))
        assert model.dtypes == [(wanted, wanted)] * 4
        assert torch.equal(out, expected)
        out.float().sum().backward()
        expected.float().sum().backward()
        torch.testing.assert_close(model.weight.grad, weight.grad, rtol=1e-2, atol=1e-2)


def test_shared_modules_keep_the_decision_of_their_first_name() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(WIDTH, WIDTH)
            self.second = self.first

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x))

    model = Tied()
    plan = PrecisionPolicy("p", "bfloat16", [{"name": "second", "precision": "float32"}]).plan(model)
    assert plan["second"] == PlannedLayer("second", "Linear", "bfloat16", "the same module as first")
    apply_plan(model, plan)
    with autocast():
        assert model(torch.randn(2, WIDTH)).dtype is torch.bfloat16
    by_hand = PrecisionPlan("p", [PlannedLayer("first", "Linear", "float32", "r"), plan["second"]])
    apply_plan(model, by_hand)
    with autocast():
        assert model.second(torch.randn(2, WIDTH)).dtype is torch.float32, "first wins in a plan made by hand too"


@pytest.mark.parametrize("default", ["float32", "float16"])
def test_an_exception_inside_leaves_autocast_as_it_was(default: str) -> None:
    class Fails(Outer):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.inner(x)
            raise LookupError("inside")

    model = planned(Fails(), INNER, default=default)
    with autocast():
        with pytest.raises(LookupError, match="inside"):
            model(torch.randn(2, WIDTH))
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") is torch.bfloat16
        assert torch.is_autocast_cache_enabled()
    assert not torch.is_autocast_enabled("cpu")
