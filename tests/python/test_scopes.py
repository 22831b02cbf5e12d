"""Plans applied to models: the dtypes that layers see, and that nothing else changes."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch._dynamo.testing
from halfstep import GradScaler, PrecisionPlan, PrecisionPolicy
from halfstep.policy import PlannedLayer
from halfstep.scopes import LayerScope, apply_plan, remove_plan
from torch import nn
from torch.utils.checkpoint import checkpoint

WIDTH = 16


class Net(nn.Module):
    """Five layers, of which one is used under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH))
        self.again = self.body[2]
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.again(torch.tanh(self.body(x))))


def make(rules: list[dict[str, str]], device: torch.device | str = "cpu") -> tuple[nn.Module, PrecisionPlan]:
    torch.manual_seed(0)
    model = Net().to(device)
    plan = PrecisionPolicy("test", "bfloat16", rules).plan(model)
    apply_plan(model, plan)
    return model, plan


def observed(model: nn.Module, x: torch.Tensor) -> dict[str, torch.dtype]:
    """Return the dtype that each layer hands on."""
    seen: dict[str, torch.dtype] = {}

    def note(name: str, out: torch.Tensor) -> None:  # a hook that returned something would replace the result
        seen.setdefault(name, out.dtype)

    hooks = [
        module.register_forward_hook(lambda module, args, out, name=name: note(name, out))
        for name, module in model.named_modules()
        if not list(module.children())
    ]
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        model(x)
    for hook in hooks:
        hook.remove()
    return seen


HEAD = [{"name": "head", "precision": "float32"}]
ISLAND = [{"name": "body.2", "precision": "float16"}, {"type": "*Norm*", "precision": "float32"}]


def test_layers_run_in_their_precision(device: torch.device) -> None:
    x = torch.randn(3, WIDTH, device=device)
    model, _ = make([*HEAD, *ISLAND], device)
    seen = observed(model, x)
    assert seen["body.0"] is torch.bfloat16
    assert seen["body.1"] is torch.float32
    assert seen["body.2"] is torch.float16, "an island of another half type, not the outer one's cast"
    assert seen["head"] is torch.float32
    with torch.autocast(device.type, dtype=torch.bfloat16):
        hidden = model.again(torch.tanh(model.body(x)))
        assert hidden.dtype is torch.float16, "the same module under its other name"
        expected = nn.functional.linear(hidden.float().double(), model.head.weight.double(), model.head.bias.double())
        torch.testing.assert_close(model.head(hidden).double(), expected, rtol=1e-5, atol=1e-5)


def test_without_autocast_nothing_happens(device: torch.device) -> None:
    x = torch.randn(3, WIDTH, device=device)
    model, _ = make([*HEAD, *ISLAND], device)
    plain = copy.deepcopy(model)
    remove_plan(plain)
    assert torch.equal(model(x), plain(x))
    with torch.autocast(device.type, dtype=torch.bfloat16), torch.autocast(device.type, enabled=False):
        assert torch.equal(model(x), plain(x))
        assert torch.equal(model.double()(x.double()), plain.double()(x.double()))


def train(model: nn.Module, call, device: torch.device, steps: int = 30) -> list[float]:
    torch.manual_seed(1)
    x, y = torch.randn(64, WIDTH, device=device), torch.randint(4, (64,), device=device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    scaler = GradScaler(device.type, init_scale=1024.0)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = nn.functional.cross_entropy(call(x).float(), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert all(parameter.grad.dtype is torch.float32 for parameter in model.parameters())
    return losses


@pytest.mark.parametrize("rules", [HEAD, ISLAND, [*HEAD, *ISLAND]], ids=["head", "island", "both"])
@pytest.mark.parametrize("how", ["plain", "reentrant", "not reentrant"])
def test_training_with_scopes_is_near_float32(device: torch.device, rules, how: str) -> None:
    torch.manual_seed(0)
    reference = Net().to(device)

    def plain_call(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, enabled=False):
            return reference(x)

    model, _ = make(rules, device)

    def call(x: torch.Tensor) -> torch.Tensor:
        if how == "plain":
            return model(x)
        return checkpoint(model, x.requires_grad_(), use_reentrant=how == "reentrant")

    mine, expected = train(model, call, device), train(reference, plain_call, device)
    assert mine[-1] < 0.5 * mine[0]
    assert mine[-1] == pytest.approx(expected[-1], rel=0.1)


def test_under_an_outer_autocast_the_loss_falls(device: torch.device) -> None:
    model, _ = make([*HEAD, *ISLAND], device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        losses = train(model, model, device)
    assert losses[-1] < 0.5 * losses[0], "casts of weights that were kept would hide every update"


@pytest.mark.parametrize("rules", [HEAD, ISLAND], ids=["head", "island"])
def test_compiled_in_one_graph(device: torch.device, rules) -> None:
    torch._dynamo.reset()
    model, _ = make(rules, device)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    x = torch.randn(3, WIDTH, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        expected = model(x)
        out = compiled(x)
    assert counter.frame_count == 1
    assert out.dtype is expected.dtype
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    assert model.head.weight.grad is not None


def copies(model: nn.Module):
    yield copy.deepcopy(model)
    yield pickle.loads(pickle.dumps(model))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    yield torch.load(file, weights_only=False)


def test_copies_use_their_own_weights_and_no_trace_stays() -> None:
    model, plan = make([*HEAD, *ISLAND])
    x = torch.randn(3, WIDTH)
    names = list(model.state_dict())
    for twin in copies(model):
        assert observed(twin, x) == observed(model, x)
        with torch.no_grad():
            twin.head.weight.zero_()
            twin.head.bias.fill_(7.0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert (twin(x) == 7.0).all()
            assert not (model(x) == 7.0).any()
        assert list(twin.state_dict()) == names
    remove_plan(model)
    assert all("forward" not in vars(module) for module in model.modules())
    torch.jit.script(model)
    apply_plan(model, plan)
    with pytest.raises(Exception, match="call remove_plan"):
        torch.jit.script(model)


def test_a_forward_of_somebody_elses_is_kept() -> None:
    model = Net()
    model.head.forward = lambda x: (x.dtype, torch.is_autocast_enabled("cpu"))
    before = model.head.forward
    apply_plan(model, PrecisionPolicy("p", "bfloat16", HEAD).plan(model))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(torch.randn(2, WIDTH)) == (torch.float32, False)
    remove_plan(model)
    assert model.head.forward is before


def test_layers_of_the_loops_own_dtype_need_no_scope() -> None:
    model, plan = make(HEAD)
    assert isinstance(vars(model.body[0])["forward"], LayerScope)
    apply_plan(model, plan, torch.bfloat16)
    assert "forward" not in vars(model.body[0])
    assert isinstance(vars(model.head)["forward"], LayerScope)
    assert observed(model, torch.randn(1, WIDTH))["body.0"] is torch.bfloat16


def test_an_exception_leaves_autocast_as_it_was() -> None:
    model, _ = make(HEAD)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(RuntimeError, match="shape|size"):
            model.head(torch.randn(2, 3))
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") is torch.bfloat16


def test_inputs_in_containers_are_cast() -> None:
    class Takes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

        def forward(self, pair, *, more):
            return pair[0].dtype, pair[1][0].dtype, more["x"].dtype, more["n"]

    model = Takes()
    apply_plan(model, PrecisionPlan("p", [PlannedLayer("", "Takes", "float32", "r")]))
    half = torch.ones(2, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = model((half, [torch.ones(2, dtype=torch.int64)]), more={"x": half, "n": 3})
    assert got == (torch.float32, torch.int64, torch.float32, 3)


def test_a_plan_of_another_model_changes_nothing() -> None:
    model, plan = make(HEAD)
    other = nn.Sequential(nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"the plan has a Linear 'body.0', but in the model there is none"):
        apply_plan(other, plan)
    with pytest.raises(ValueError, match="layer 'head' is planned as int8, expected one of"):
        apply_plan(model, PrecisionPlan("p", [PlannedLayer("head", "Linear", "int8", "r")]))
    assert observed(model, torch.randn(1, WIDTH))["head"] is torch.float32, "the plan of before is still applied"
