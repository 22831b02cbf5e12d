"""Training through planned layers: threads, nesting, transforms, wrappers, and what torch's own modules do inside."""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any, NamedTuple

import pytest
import torch
import torch._dynamo.testing
from halfstep import PrecisionPlan, PrecisionPolicy
from halfstep.policy import PlannedLayer
from halfstep.scopes import LayerScope, apply_plan, remove_plan
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

WIDTH = 8


def mlp(device: torch.device | str = "cpu") -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 4)).to(device)


def planned(model: nn.Module, *rules: dict[str, str], default: str = "bfloat16") -> nn.Module:
    apply_plan(model, PrecisionPolicy("p", default, rules).plan(model))
    return model


HEAD = {"name": "2", "precision": "float32"}
ISLAND = {"name": "2", "precision": "float16"}


def autocast(device: torch.device | str = "cpu") -> torch.autocast:
    return torch.autocast(torch.device(device).type, dtype=torch.bfloat16)


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.grad for parameter in model.parameters()]


def same(mine: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


# ------------------------------------------------------------------------------------------------------------ threads


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


# ------------------------------------------------------------------------------------------------------------ nesting


class Outer(nn.Module):
    """A layer with a parameter of its own and layers inside, as a vision transformer with its class token is."""

    def __init__(self, how: str = "plain") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.how = how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.how == "plain":
            x = self.inner(x)
        elif self.how == "off":
            with torch.autocast(x.device.type, enabled=False):
                x = self.inner(x)
        else:
            x = checkpoint(self.inner, x, use_reentrant=self.how == "reentrant")
        return nn.functional.linear(self.norm(x), self.weight)


INNER = {"name": "inner", "precision": "bfloat16"}


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


# ----------------------------------------------------------------------------------------------------------- training


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
from test_scopes_training import HEAD, autocast, gradients, mlp, planned, same
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


# ----------------------------------------------------------------------------------------------------------- compiled


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


# -------------------------------------------------------------------------------------------- what stands in a layer


def test_hooks_see_what_arrives_and_what_leaves() -> None:
    model = planned(mlp(), HEAD)
    seen: list[Any] = []
    model[2].register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    model[2].register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    model[2].register_full_backward_hook(lambda module, given, got: seen.append((given[0].dtype, got[0].dtype)))
    with autocast():
        out = model(torch.randn(2, WIDTH, requires_grad=True))
    out.sum().backward()
    # The cast of the input is the layer's own, so the gradient that it hands back is of what arrived.
    assert seen == [torch.bfloat16, torch.float32, (torch.bfloat16, torch.float32)]


def test_parametrized_layers() -> None:
    model = mlp()
    parametrize.register_parametrization(model[2], "weight", nn.Tanh())
    plan = PrecisionPolicy("p", "bfloat16", [HEAD]).plan(model)
    assert plan["2"].type == "ParametrizedLinear"
    apply_plan(model, plan)
    x = torch.randn(2, WIDTH)
    with autocast():
        hidden = model[1](model[0](x)).float()
        out = model(x)
    weight = torch.tanh(model[2].parametrizations.weight.original)
    assert torch.equal(out, nn.functional.linear(hidden, weight, model[2].bias))
    out.sum().backward()
    assert model[2].parametrizations.weight.original.grad.count_nonzero()


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_attention_still_sees_that_query_key_and_value_are_one(device: torch.device, precision: str) -> None:
    attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True, device=device)
    plan = PrecisionPolicy("p", "bfloat16", [{"type": "Multi*", "precision": precision}]).plan(attention)
    assert plan["out_proj"].precision == precision
    assert plan["out_proj"].reason == "never called: inherits from the model"
    apply_plan(attention, plan)
    assert "forward" not in vars(attention.out_proj)
    seen: list[bool] = []
    inner = vars(attention)["forward"]
    inner.inner = lambda query, key, value, **rest: seen.append(query is key is value)
    x = torch.randn(2, 3, WIDTH, device=device)
    with autocast(device):
        attention(x, x, value=x)
        attention(x.bfloat16(), x, x)
    assert seen == [True, False]
    inner.inner = None
    for training in (True, False):
        attention.train(training)
        with autocast(device), torch.set_grad_enabled(training):
            assert attention(x, x, x)[0].dtype is getattr(torch, precision)
            assert attention(x.bfloat16(), x.bfloat16(), x.bfloat16())[0].dtype is getattr(torch, precision)


def test_encoders_call_their_layers_in_eval_mode_too(device: torch.device) -> None:
    """On the CPU autocast does not keep them from the fused path, which reads the weights and calls no layer."""
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True, device=device)
    model = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(2, 5, WIDTH, device=device)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2], device=device)
    reference = copy.deepcopy(model).double()(x.double(), src_key_padding_mask=mask)  # with gradients: not fused
    planned(model, default="float32")
    with torch.no_grad(), autocast(device):
        out = model(x, src_key_padding_mask=mask)
    assert out.dtype is torch.float32
    keep = ~mask
    torch.testing.assert_close(out[keep].double(), reference[keep], rtol=1e-4, atol=1e-4)
    twin = copy.deepcopy(model)
    for each in (model, twin):
        remove_plan(each)
        assert each.use_nested_tensor
        assert [inner.activation_relu_or_gelu for inner in each.layers] == [1, 1]
        assert not any("halfstep" in key for module in each.modules() for key in vars(module))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("packed", [False, True])
def test_recurrent_layers_given_half(device: torch.device, kind: type, packed: bool) -> None:
    rnn = kind(WIDTH, 4, batch_first=True, device=device)
    x = torch.randn(2, 5, WIDTH, device=device).bfloat16()
    given = pack_padded_sequence(x, torch.tensor([3, 5]), True, enforce_sorted=False) if packed else x
    full = pack_padded_sequence(x.float(), torch.tensor([3, 5]), True, enforce_sorted=False) if packed else x.float()
    expected = rnn(full)[0]
    planned(rnn, default="float32")
    with autocast(device):
        out = rnn(given)[0]
    assert type(out) is type(expected)
    if packed:
        out, expected = (pad_packed_sequence(each, batch_first=True)[0] for each in (out, expected))
    assert out.dtype is torch.float32
    assert torch.equal(out, expected)
    out.sum().backward()
    assert rnn.weight_ih_l0.grad.dtype is torch.float32


def test_embeddings_have_no_floating_input() -> None:
    model = nn.Sequential(nn.Embedding(5, WIDTH), nn.Linear(WIDTH, 2))
    planned(model, {"type": "Embedding", "precision": "float32"})
    with autocast():
        out = model(torch.tensor([1, 4]))
    out.float().sum().backward()
    assert out.dtype is torch.bfloat16
    assert model[0].weight.grad.count_nonzero() == 2 * WIDTH


class Pair(NamedTuple):
    x: torch.Tensor
    n: int


@dataclasses.dataclass
class Record:
    x: torch.Tensor


def test_named_tuples_are_cast_and_unknown_objects_handed_on() -> None:
    got: list[Any] = []

    class Takes(nn.Module):
        def forward(self, *values: Any) -> torch.Tensor:
            got.extend(values)
            return values[0]

    model = planned(Takes(), default="float32")
    half = torch.ones(2, dtype=torch.bfloat16)
    record, ordered = Record(half), collections.OrderedDict(x=half)
    with autocast():
        model(half, Pair(half, 3), record, ordered, {"x": half}, [half], "text", None)
    assert got[0].dtype is torch.float32
    assert got[1].x is got[0], "one tensor stays one"
    assert type(got[1]) is Pair
    assert got[1].n == 3
    assert got[2] is record
    assert got[3] is ordered
    assert got[4]["x"] is got[0]
    assert got[5][0] is got[0]
    assert got[6:] == ["text", None]


def test_containers_compile_in_one_graph(device: torch.device) -> None:
    torch._dynamo.reset()

    class Takes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.eye(WIDTH))

        def forward(self, x: torch.Tensor, pair: Pair, more: dict[str, Any]) -> tuple[torch.Tensor, bool]:
            return nn.functional.linear(pair.x + more["x"], self.weight) * pair.n, x is pair.x

    model = planned(Takes().to(device), default="float32")
    x = torch.randn(2, WIDTH, device=device).bfloat16()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with autocast(device):
        expected, out = (call(x, Pair(x, 3), {"x": x}) for call in (model, compiled))
    assert expected[1] is out[1] is True
    assert out[0].dtype is torch.float32
    assert torch.equal(out[0], expected[0])


def test_scripted_layers_inside(tmp_path) -> None:
    scripted = torch.jit.script(nn.Linear(WIDTH, WIDTH))
    torch.jit.save(scripted, tmp_path / "layer.pt")
    for layer in (scripted, torch.jit.load(tmp_path / "layer.pt")):
        model = planned(nn.Sequential(layer, nn.Linear(WIDTH, 2)), {"name": "0", "precision": "float32"})
        assert isinstance(vars(model[0])["forward"], LayerScope)
        with autocast():
            assert model[0](torch.randn(2, WIDTH).bfloat16()).dtype is torch.float32
        remove_plan(model)
        assert model[0](torch.randn(2, WIDTH)).dtype is torch.float32
