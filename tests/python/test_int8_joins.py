"""Int8 linear layers of the same input as one product: the same bits as one by one, and which ones are joined."""

from __future__ import annotations

import contextlib
import copy
import pickle
from pathlib import Path
from typing import Any
from unittest import mock

import int8_norm_cases as norm_cases
import pytest
import torch
import torch.nn.functional as F
from halfstep import InferencePrecisionOptimizer, int8_chains
from halfstep.int8_chains import Region
from halfstep.int8_graph import subgraph
from halfstep.int8_joins import Int8JoinedLinear
from halfstep.int8_layers import Int8Linear, pack
from halfstep.int8_model import share, weight_bytes
from halfstep.int8_runs import capture, shapes_of
from int8_graph_cases import call, run, traced, with_int8
from torch import nn
from torch.fx import GraphModule


class Attention(nn.Module):
    """Attention as encoders of text have it: three products of one value, and two of another in the second one."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(16, 16, bias=bias) for _ in range(3))
        self.other_key, self.other_value = nn.Linear(16, 16), nn.Linear(16, 12)
        self.out = nn.Linear(16, 16)

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(x.size(0), x.size(1), 4, -1).transpose(1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        memory = F.relu(x)
        q, k, v = self.heads(self.query(x)), self.heads(self.key(x)), self.heads(self.value(x))
        x = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        k, v = self.heads(self.other_key(memory)), self.heads(self.other_value(memory))
        return F.scaled_dot_product_attention(self.heads(x), k, v).transpose(1, 2).flatten(2)


class InPlace(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mul_(3.0)


class Decoder(nn.Module):
    """Layers that read one memory, each by a key and a value of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({n: nn.Linear(8, 8) for n in "kv"}) for _ in range(3))

    def forward(self, memory: torch.Tensor) -> torch.Tensor:
        x = memory
        for layer in self.layers:
            x = F.scaled_dot_product_attention(x, layer["k"](memory), layer["v"](memory))
        return x


class Some(nn.Module):
    """A forward(self, x) of layers a and b, and others where a test has them."""

    def __init__(self, forward: Any, **layers: nn.Module) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        for name, layer in layers.items():
            setattr(self, name, layer)
        self._forward = forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._forward(self, x)


def fused(graph_module: GraphModule, batch: torch.Tensor, *, joins: bool = True) -> tuple[GraphModule, list[Region]]:
    twin = share(graph_module)
    with contextlib.nullcontext() if joins else mock.patch.object(int8_chains._Fuser, "joinable", return_value=[]):
        return twin, int8_chains.fuse(twin, shapes_of(graph_module, batch, call), batch.dtype)


def joined_in(model: nn.Module) -> dict[str, list[str]]:
    return {name: module.names for name, module in model.named_modules() if isinstance(module, Int8JoinedLinear)}


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype is other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("rows", [False, True], ids=["static", "by rows"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_joined_products_give_the_bits_of_single_ones(
    rows: bool, bias: bool, dtype: torch.dtype, device: torch.device
) -> None:
    batch = torch.randn(3, 5, 16)
    unfused = with_int8(traced(Attention(bias).eval()), batch)
    unfused = (norm_cases.by_rows(unfused) if rows else unfused).to(device, dtype)
    batch = batch.to(device, dtype)
    result, regions = fused(unfused, batch)
    single, _ = fused(unfused, batch, joins=False)
    assert joined_in(result) == {
        "query_key_value": ["query", "key", "value"],
        "other_key_other_value": ["other_key", "other_value"],
    }
    assert joined_in(single) == {}
    assert not hasattr(result, "key")
    assert weight_bytes(result) == weight_bytes(single)
    for samples in (batch, batch[:1], batch[:, :2] * 4):
        assert same(run(result, samples), run(single, samples))
    assert [region.layers for region in regions] == [["query", "key", "value"], ["out"], ["other_key", "other_value"]]
    assert regions[0].fused == ["query + joined with key, value"]


@pytest.mark.parametrize("sizes", [(1, 2), (7, 33, 2), (64, 16, 48), (1, 130)])
def test_layers_of_any_sizes(sizes: tuple[int, ...], device: torch.device) -> None:
    layers = {str(n): Int8Linear(pack(torch.randn(n, 19), torch.randn(n)), input_scale=0.05) for n in sizes}
    layers = {name: layer.to(device) for name, layer in layers.items()}
    joined, x = Int8JoinedLinear(layers), torch.randn(6, 19, device=device)
    for rows in (x, x[:1], x.half()):
        assert same(joined(rows), torch.cat([layer(rows) for layer in layers.values()], -1))
    for (name, part), layer in zip(joined.parts().items(), layers.values(), strict=True):
        assert name == str(layer.packed.weight().size(0))
        assert same(part(x), layer(x))
        assert part.packed.weight().untyped_storage().data_ptr() == joined.packed.weight().untyped_storage().data_ptr()
    assert repr(joined).endswith(f"input_scale=0.05, {' + '.join(map(str, sizes))})")


def test_values_have_their_names_and_regions_are_whole() -> None:
    batch = torch.randn(3, 5, 16)
    graph_module = traced(Attention().eval())
    result, regions = fused(with_int8(graph_module, batch), batch)
    floats = capture(graph_module, batch, call, [node.name for node in graph_module.graph.nodes if node.op != "output"])
    values = capture(result, batch, call, [node.name for node in result.graph.nodes if node.op != "output"])
    assert floats.keys() <= values.keys()
    for region in regions:
        part, inputs = subgraph(result, region.nodes)
        whole, float_inputs = subgraph(graph_module, region.nodes)
        assert inputs == float_inputs
        with torch.no_grad():
            outputs = part(*[values[each] for each in inputs])
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        names = [name for name in region.nodes if name in floats]
        assert len(outputs) == len(names)
        assert all(same(out, values[name]) for out, name in zip(outputs, names, strict=True))
        assert any(isinstance(module, Int8JoinedLinear) for module in part.modules()) == (len(names) > 1)


def sums(self: Some, x: torch.Tensor) -> torch.Tensor:
    return self.a(x) + self.b(x)


def with_a_write(self: Some, x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    z = self.a(y)
    y.mul_(3.0)
    return z.abs() + self.b(y).abs()


def before_a_write(self: Some, x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    z = self.a(y).abs() * self.b(y).abs()
    y.mul_(3.0)
    return z + self.c(y).abs()


def one_more(self: Some, x: torch.Tensor) -> torch.Tensor:
    return self.a(x).abs() + self.b(x).abs() + self.c(x).abs()


def apart(self: Some, x: torch.Tensor) -> torch.Tensor:
    return self.a(x).abs() + self.b(x * 2).abs()


def twice(self: Some, x: torch.Tensor) -> torch.Tensor:
    return self.a(x).abs() + self.a(x * 2) + self.b(x).abs()


def written_to(self: Some, x: torch.Tensor) -> torch.Tensor:
    y = self.a(x)
    y.mul_(2.0)
    return y.abs() + self.b(x).abs()


def written_to_through_a_ravel(self: Some, x: torch.Tensor) -> torch.Tensor:
    y = self.a(x)
    torch.ravel(y).add_(1.0)
    return y.abs() + self.b(x).abs()


def written_to_by_a_script(self: Some, x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    z = self.a(y).abs()
    return self.c(y) + z + self.b(y).abs()


def written_to_by_a_special_method(self: Some, x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    z = self.a(y)
    y.__imul__(3.0)
    return z.abs() + self.b(y).abs()


def viewed_as_complex(self: Some, x: torch.Tensor) -> torch.Tensor:
    y = torch.view_as_complex(self.a(x).reshape(-1, 4, 2)).abs()
    return y.sum(1, keepdim=True) + self.b(x).abs()


def rotated(self: Some, x: torch.Tensor) -> torch.Tensor:
    y = self.a(x)
    y = y * 0.5 + torch.cat((-y[..., 4:], y[..., :4]), -1) * 0.25
    return y.abs() + self.b(x).float().abs()


def written_to_through_a_view(self: Some, x: torch.Tensor) -> torch.Tensor:
    y = self.a(x)
    y.view(-1).mul_(2.0)  # a copy, were it columns of a wider tensor
    return y.abs() + self.b(x).abs()


def given_back(self: Some, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return self.a(x).transpose(0, 1), self.b(x), self.c(x).abs(), self.d(x).abs()


def asked_for_its_layout(self: Some, x: torch.Tensor) -> torch.Tensor:
    y = self.a(x)
    return torch.as_strided(y, (5, 4), (8, 1)).abs() + self.b(x).abs()[:, :4]


def a_function_of_the_users(x: torch.Tensor) -> torch.Tensor:
    return x.view(-1).abs().view(x.shape)


torch.fx.wrap("a_function_of_the_users")


def given_to_other_code(self: Some, x: torch.Tensor) -> torch.Tensor:
    return a_function_of_the_users(self.a(x)) + self.b(x).abs()


def gated(self: Some, x: torch.Tensor) -> torch.Tensor:
    return F.silu(self.a(x)) * self.b(x)


@pytest.mark.parametrize(
    ("forward", "layers", "expected"),
    [
        (one_more, {"c": nn.Linear(8, 8)}, ["a", "b", "c"]),
        (one_more, {"c": nn.Linear(8, 8, bias=False)}, ["a", "b"]),
        (sums, {}, None),  # b takes the addition of what a gives
        (with_a_write, {}, None),
        (before_a_write, {"c": nn.Linear(8, 8)}, ["a", "b"]),
        (apart, {}, None),
        (twice, {}, None),
        (gated, {}, None),  # one has an activation
        (written_to, {}, None),
        (written_to_through_a_view, {}, None),
        (written_to_through_a_ravel, {}, None),
        (written_to_by_a_script, {"c": torch.jit.script(InPlace())}, None),
        (written_to_by_a_special_method, {}, None),
        (viewed_as_complex, {"b": nn.Linear(8, 3)}, None),
        (rotated, {}, ["a", "b"]),
        (given_back, {"c": nn.Linear(8, 8), "d": nn.Linear(8, 8)}, ["c", "d"]),
        (asked_for_its_layout, {}, None),
        (given_to_other_code, {}, None),
    ],
)
def test_which_layers_are_joined(forward: Any, layers: dict[str, nn.Module], expected: list[str] | None) -> None:
    x = torch.randn(5, 8)
    unfused = with_int8(traced(Some(forward, **layers).eval()), x)
    result, _ = fused(unfused, x)
    assert list(joined_in(result).values()) == ([] if expected is None else [expected])
    outputs, singles = run(result, x), run(fused(unfused, x, joins=False)[0], x)
    if forward is given_back:
        assert all(out.view(-1).shape == (40,) for out in outputs[1:])
        outputs, singles = torch.cat([outputs[0].t(), *outputs[1:]]), torch.cat([singles[0].t(), *singles[1:]])
    assert same(outputs, singles)


def test_layers_of_one_module_alone_are_joined() -> None:
    x = torch.randn(2, 5, 8)
    unfused = with_int8(traced(Decoder().eval()), x)
    result, _ = fused(unfused, x)
    assert joined_in(result) == {f"layers.{n}.k_v": [f"layers.{n}.k", f"layers.{n}.v"] for n in range(3)}
    assert same(run(result, x), run(fused(unfused, x, joins=False)[0], x))


def test_layers_that_quantize_otherwise_are_not_joined() -> None:
    x = torch.randn(5, 8)
    for change in ("scale", "factors", "dtype"):
        unfused = with_int8(traced(Some(one_more, c=nn.Linear(8, 8)).eval()), x)
        if change == "scale":
            unfused.b.input_scale *= 2
        elif change == "factors":
            unfused.b.packed = pack(torch.randn(8, 8), torch.randn(8), input_factors=torch.rand(8) + 0.5)
        else:
            unfused.b.out_dtype = torch.float16
        assert list(joined_in(fused(unfused, x)[0]).values()) == [["a", "c"]]


def test_a_name_that_is_taken() -> None:
    x = torch.randn(5, 8)
    model = Some(lambda self, x: self.a(x).abs() + self.b(x).abs() + self.a_b(x).tanh(), a_b=nn.Tanh())
    result, _ = fused(with_int8(traced(model.eval()), x), x)
    assert joined_in(result) == {"a_b_": ["a", "b"]}


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "script", "export", "compile"])
def test_joined_models_are_copied_and_compiled(way: str) -> None:
    batch = torch.randn(3, 5, 16)
    result, _ = fused(with_int8(traced(Attention().eval()), batch), batch)
    made = {
        "deepcopy": copy.deepcopy,
        "pickle": lambda model: pickle.loads(pickle.dumps(model)),
        "script": torch.jit.script,
        "export": lambda model: torch.export.export(model, (batch,)).module(),
        "compile": lambda model: torch.compile(model, backend="eager", fullgraph=True),
    }[way](result)
    assert same(run(made, batch), run(result, batch))
    if way in ("deepcopy", "pickle"):
        assert joined_in(made) == joined_in(result)


@pytest.mark.parametrize("activations", ["static", "dynamic"])
def test_files_know_layers_by_their_names(activations: str, device: torch.device, tmp_path: Path) -> None:
    inference = InferencePrecisionOptimizer(
        accuracy_threshold=1.0,
        eval_fn=lambda _model: 1.0,
        speed_guard=False,
        smooth_quant=False,
        progress=False,
        activations=activations,
    )
    batches = [torch.randn(4, 5, 16) for _ in range(3)]
    result = inference.optimize_for_inference(Attention().eval(), batches, str(device))
    assert joined_in(result).keys() == {"query_key_value", "other_key_other_value"}
    assert "query + joined with key, value" in inference.explain()
    inference.save(tmp_path / "m")
    loaded = InferencePrecisionOptimizer.load(tmp_path / "m", Attention(), device)
    assert str(loaded) == str(result)
    x = batches[0].to(device)
    assert same(run(loaded, x), run(result, x))
    inference.save_torchscript(tmp_path / "script")
    assert same(run(torch.jit.load(tmp_path / "script"), x), run(result, x))
