"""Scopes around torch's own modules, hooks, parametrizations, and inputs of all kinds."""

from __future__ import annotations

import collections
import copy
import dataclasses
from typing import Any, NamedTuple

import pytest
import torch
import torch._dynamo.testing
from halfstep import PrecisionPolicy
from halfstep.scopes import LayerScope, apply_plan, remove_plan
from scopes_cases import HEAD, WIDTH, autocast, mlp, planned
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


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
    assert got[3]["x"] is got[0]
    assert type(got[3]) is collections.OrderedDict
    assert ordered["x"] is half
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
