"""What int8 layers take over, against the same layers with the operations around them left to torch: equal bits."""

from __future__ import annotations

import copy
import operator
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from halfstep.int8_chains import Region, fuse
from halfstep.int8_folding import fold_batch_norms
from halfstep.int8_graph import subgraph
from halfstep.int8_layers import Int8Linear, pack
from halfstep.int8_model import share
from halfstep.int8_runs import capture, shapes_of
from int8_graph_cases import MODELS, call, made, run, traced, with_int8
from torch import nn
from torch.fx import GraphModule


def fused(graph_module: GraphModule, batch: torch.Tensor, **options: Any) -> tuple[GraphModule, list[Region]]:
    """Fuse a copy, in which no layer is shared."""
    twin = share(graph_module)
    return twin, fuse(twin, shapes_of(graph_module, batch, call), torch.float32, **options)


def parts_of(regions: list[Region]) -> dict[str, list[str]]:
    return {name: parts for region in regions for name, parts in region.parts.items() if parts}


def prepared(model: nn.Module, batch: torch.Tensor, but: tuple[str, ...] = ()) -> tuple[GraphModule, GraphModule]:
    """Return the traced float model, and the same with int8 layers."""
    graph_module = traced(model)
    return graph_module, with_int8(graph_module, batch, but)


def check(
    forward: Callable[..., torch.Tensor],
    expected: dict[str, list[str]],
    *,
    exact: bool = True,
    **layers: nn.Module | nn.Parameter,
) -> GraphModule:
    """Fuse a model of these layers and this forward(self, x), and compare what the layers took over, and the bits."""
    kind = type("Model", (nn.Module,), {"forward": forward})
    model = kind()
    for name, layer in (layers or {"fc": nn.Linear(8, 8)}).items():
        setattr(model, name, layer)
    x = torch.randn(5, 8)
    _, unfused = prepared(model.eval(), x)
    result, regions = fused(unfused, x)
    assert parts_of(regions) == expected
    for batch in (x, torch.randn(1, 8)):
        if exact:
            assert torch.equal(run(result, batch), run(unfused, batch))
        else:
            torch.testing.assert_close(run(result, batch), run(unfused, batch), rtol=1e-6, atol=1e-6)
    return result


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("fold", [False, True], ids=["", "folded"])
def test_fused_models_give_the_bits_of_unfused_ones(name: str, fold: bool) -> None:
    model, batch = made(name)
    graph_module = traced(model)
    if fold:
        fold_batch_norms(graph_module)
    unfused = with_int8(graph_module, batch)
    result, regions = fused(unfused, batch)
    assert bool(parts_of(regions)) == (fold or name != "resnet")  # there norms stand between all layers
    assert sum(len(region.layers) for region in regions) == len({n for r in regions for n in r.layers})
    for samples in (batch, batch[:2], 3 * torch.randn_like(batch)):
        out, expected = run(result, samples), run(unfused, samples)
        if name == "mobilenet":  # hardswish
            torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(out, expected)


def test_resnet() -> None:
    model, batch = made("resnet")
    graph_module = traced(model)
    norms, _ = fold_batch_norms(graph_module)
    _, regions = fused(with_int8(graph_module, batch), batch, norms=norms)
    assert [region.layers for region in regions] == [
        ["conv1"],
        ["layer1.0.conv1", "layer1.0.conv2"],
        ["layer1.1.conv1", "layer1.1.conv2", "layer2.0.conv1", "layer2.0.conv2", "layer2.0.downsample.0"],
        ["fc"],
    ]
    assert parts_of(regions) == {
        "conv1": ["batch norm bn1", "relu"],
        "layer1.0.conv1": ["batch norm layer1.0.bn1", "relu", "int8 out"],
        "layer1.0.conv2": ["batch norm layer1.0.bn2", "residual", "relu"],
        "layer1.1.conv1": ["batch norm layer1.1.bn1", "relu", "int8 out"],
        "layer1.1.conv2": ["batch norm layer1.1.bn2", "residual", "relu", "int8 out"],
        "layer2.0.conv1": ["batch norm layer2.0.bn1", "relu", "int8 out"],
        "layer2.0.conv2": ["batch norm layer2.0.bn2"],
        "layer2.0.downsample.0": ["batch norm layer2.0.downsample.1", "residual", "relu"],
    }
    assert regions[1].fused[1] == "layer1.0.conv2 + batch norm layer1.0.bn2 + residual + relu"


def test_mobilenet() -> None:
    model, batch = made("mobilenet")
    graph_module = traced(model)
    fold_batch_norms(graph_module)
    _, regions = fused(with_int8(graph_module, batch), batch)
    assert [region.layers for region in regions] == [
        ["stem.0"],
        ["expand.0", "depthwise.0"],
        ["fc1", "fc2"],
        ["project.0"],
        ["head.0", "head.3"],
    ]
    assert parts_of(regions) == {
        "stem.0": ["hardswish"],
        "expand.0": ["hardswish", "int8 out"],
        "depthwise.0": ["hardswish"],
        "fc1": ["relu", "int8 out"],
        "project.0": ["residual"],
        "head.0": ["hardswish", "int8 out"],
    }


def test_int8_passes_through_pooling_and_views() -> None:
    model, batch = made("plain")
    graph_module, unfused = prepared(model, batch)
    result, regions = fused(unfused, batch)
    assert [region.layers for region in regions] == [["conv1", "conv2", "fc1", "fc2"]]
    part, inputs = subgraph(graph_module, regions[0].nodes)
    values = capture(graph_module, batch, call, inputs)
    assert inputs == ["x"]
    assert torch.equal(run_part(part, inputs, values), run(model, batch))
    passed = {node.name: node.target for node in result.graph.nodes if node.op != "placeholder"}
    values = capture(result, batch, call, [name for name in passed if "size" not in name])
    assert {passed[name] for name, value in values.items() if value.dtype is torch.int8} == {
        "conv1",
        torch.ops.halfstep.int8_max_pool2d,
        "conv2",
        "reshape",
        "fc1",
    }


def test_residuals_through_dropout_and_in_one_dimension() -> None:
    for name, expected in (
        ("mlp", {"fc1": ["relu", "int8 out"], "fc2": ["residual", "int8 out"]}),
        ("signal", {"conv1": ["relu6"], "conv2": ["residual", "relu", "int8 out"]}),
    ):
        model, batch = made(name)
        graph_module = traced(model)
        fold_batch_norms(graph_module)
        _, regions = fused(with_int8(graph_module, batch), batch)
        assert parts_of(regions) == expected


@pytest.mark.parametrize(
    ("activation", "part", "exact"),
    [
        (nn.ReLU(), "relu", True),
        (nn.ReLU(inplace=True), "relu", True),
        (nn.ReLU6(), "relu6", True),
        (nn.GELU(), "gelu", False),
        (nn.GELU("tanh"), "gelu_tanh", False),
        (nn.SiLU(inplace=True), "silu", False),
        (nn.Hardswish(), "hardswish", False),
        (F.relu, "relu", True),
        (lambda x: F.relu(x, inplace=True), "relu", True),
        (lambda x: F.relu(input=x), "relu", True),
        (torch.relu, "relu", True),
        (torch.relu_, "relu", True),
        (lambda x: x.relu(), "relu", True),
        (lambda x: x.relu_(), "relu", True),
        (F.relu6, "relu6", True),
        (F.gelu, "gelu", False),
        (lambda x: F.gelu(x, approximate="tanh"), "gelu_tanh", False),
        (F.silu, "silu", False),
        (F.hardswish, "hardswish", False),
    ],
)
def test_activations(activation: Callable[..., torch.Tensor], part: str, exact: bool) -> None:
    layers = {"fc": nn.Linear(8, 8), **({"act": activation} if isinstance(activation, nn.Module) else {})}

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return (self.act if "act" in layers else activation)(self.fc(x))

    check(forward, {"fc": [part]}, exact=exact, **layers)


def hooked() -> nn.ReLU:
    relu = nn.ReLU()
    relu.register_forward_hook(lambda module, args, out: out + 1)
    return relu


@pytest.mark.parametrize("act", [nn.LeakyReLU(), hooked(), nn.Softmax(-1)], ids=["leaky", "hook", "softmax"])
def test_other_activations_stay(act: nn.Module) -> None:
    check(lambda self, x: self.act(self.fc(x)), {}, fc=nn.Linear(8, 8), act=act)


def _seen(self: Any, x: torch.Tensor) -> torch.Tensor:
    y = self.fc(x)
    return F.relu(y) * y


def _written(self: Any, x: torch.Tensor) -> torch.Tensor:
    y = self.fc(x)
    y.relu_()
    return y


def _sized(self: Any, x: torch.Tensor) -> torch.Tensor:
    y = self.fc(x)
    return F.relu(y) / y.size(0)


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        (_seen, {}),
        (_written, {}),
        (_sized, {"fc": ["relu"]}),
        (lambda self, x: F.relu(self.fc(F.relu(self.fc(x)))), {}),
        (lambda self, x: self.fc(input=x).relu(), {"fc": ["relu"]}),
        (lambda self, x: F.relu(F.relu(self.fc(x))), {"fc": ["relu"]}),
    ],
    ids=["another reader", "written for another reader", "reader of its size", "two calls", "keyword", "twice"],
)
def test_who_may_read_what_an_activation_takes(forward: Any, expected: dict[str, list[str]]) -> None:
    check(forward, expected)


def _late(self: Any, x: torch.Tensor) -> torch.Tensor:
    y = self.fc(x)
    z = torch.sigmoid(x)
    return y + z


def _input_written_meanwhile(self: Any, x: torch.Tensor) -> torch.Tensor:
    x = x + 0
    y = self.fc(x)
    x.mul_(2)
    return y + x


def _residual_written_afterwards(self: Any, x: torch.Tensor) -> torch.Tensor:
    x = x + 0
    y = self.fc(x) + x
    x.mul_(2)
    return y * x


def _residual_written_to(self: Any, x: torch.Tensor) -> torch.Tensor:
    z = x + 0
    y = z.add_(self.fc(x))
    return y * z


def _output_read_again(self: Any, x: torch.Tensor) -> torch.Tensor:
    y = self.fc(x)
    return (y + x) * y


def _activated_before(self: Any, x: torch.Tensor) -> torch.Tensor:
    return F.relu(self.fc(x)) + x


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        (lambda self, x: self.fc(x) + x, {"fc": ["residual"]}),
        (lambda self, x: x + self.fc(x), {"fc": ["residual"]}),
        (lambda self, x: torch.add(x, self.fc(x)), {"fc": ["residual"]}),
        (lambda self, x: torch.add(input=x, other=self.fc(x), alpha=1), {"fc": ["residual"]}),
        (lambda self, x: self.fc(x).add(x).relu(), {"fc": ["residual", "relu"]}),
        (lambda self, x: self.fc(x).add_(x).relu_(), {"fc": ["residual", "relu"]}),
        (lambda self, x: operator.iadd(self.fc(x), x), {"fc": ["residual"]}),
        (_late, {"fc": ["residual"]}),
        (_residual_written_afterwards, {"fc": ["residual"]}),
        (lambda self, x: F.relu(self.fc(x) + x + x), {"fc": ["residual"]}),
        (lambda self, x: torch.add(self.fc(x), x, alpha=2), {}),
        (lambda self, x: self.fc(x) + x[:1], {}),
        (lambda self, x: self.fc(x) + x.mean(1, keepdim=True), {}),
        (lambda self, x: self.fc(x)[None] + x, {}),
        (lambda self, x: self.fc(x) + x.unsqueeze(0), {}),
        (lambda self, x: self.fc(x) + 1, {}),
        (lambda self, x: self.fc(x) + self.row, {}),
        (lambda self, x: self.fc(x) + x.double(), {}),
        (lambda self, x: self.fc(x) + x.to(torch.int32), {}),
        (lambda self, x: operator.add(y := self.fc(x), y), {}),
        (_input_written_meanwhile, {}),
        (_residual_written_to, {}),
        (_output_read_again, {}),
        (_activated_before, {"fc": ["relu"]}),
    ],
)
def test_residuals(forward: Any, expected: dict[str, list[str]]) -> None:
    check(forward, expected, fc=nn.Linear(8, 8), row=nn.Parameter(torch.randn(1, 8)))


def test_of_two_int8_layers_the_later_takes_the_other() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        a = self.one(x)
        return F.relu(a.add_(self.two(x)))

    result = check(forward, {"two": ["residual", "relu"]}, one=nn.Linear(8, 8), two=nn.Linear(8, 8))
    assert [str(node.args) for node in result.graph.nodes if node.target == "two"] == ["(x, one)"]


def test_a_constant_of_the_batchs_shape_is_no_residual() -> None:
    """With one sample, [1, 8] of a parameter is what the layer gives; with two it is not."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.row = nn.Linear(8, 8), nn.Parameter(torch.randn(1, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x) + self.row

    _, unfused = prepared(Model().eval(), torch.randn(4, 8))
    result, regions = fused(unfused, torch.randn(1, 8))
    assert parts_of(regions) == {}
    x = torch.randn(4, 8)
    assert torch.equal(run(result, x), run(unfused, x))


def scales(model: GraphModule, **given: tuple[float, int] | None) -> GraphModule:
    """Give layers other input scales; None for scales of their own for each row."""
    for name, pair in given.items():
        layer = model.get_submodule(name)
        layer.input_scale, layer.input_zero_point = pair or (None, 0)
    return model


class Fork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.left, self.right = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.first(x))
        return self.left(y) * torch.sigmoid(self.right(y.reshape(y.shape[0], -1)))


@pytest.mark.parametrize(
    ("given", "passes"),
    [
        ({}, True),
        ({"left": (0.25, 3), "right": (0.25, 3)}, True),
        ({"left": (0.25, 3), "right": (0.25, 4)}, False),
        ({"left": (0.25, 3), "right": (0.5, 3)}, False),
        ({"left": None}, False),
        ({"left": None, "right": None}, False),
    ],
)
def test_all_readers_must_quantize_alike(given: dict[str, Any], passes: bool) -> None:
    x = torch.randn(5, 8)
    graph_module, unfused = prepared(Fork().eval(), x)
    scales(unfused, **given)
    result, regions = fused(unfused, x)
    assert torch.equal(run(result, x), run(unfused, x))
    assert (result.first.out_scale is not None) == passes
    if passes:
        assert [region.layers for region in regions] == [["first", "left", "right"]]
        assert (result.first.out_scale, result.first.out_zero_point) == (
            result.left.input_scale,
            result.left.input_zero_point,
        )
        assert result.left.out_dtype is result.right.out_dtype is torch.float32
    else:
        assert [region.layers for region in regions] == [["first"], ["left"], ["right"]]
    assert unfused.first.out_scale is None


def test_readers_that_scale_their_input_by_channel_get_no_int8() -> None:
    x = torch.randn(5, 8)
    _, unfused = prepared(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).eval(), x)
    layer = unfused.get_submodule("1")
    packed = pack(torch.randn(8, 8), None, input_factors=torch.rand(8) + 0.5)
    unfused.set_submodule("1", Int8Linear(packed, input_scale=layer.input_scale))
    _, regions = fused(unfused, x)
    assert parts_of(regions) == {}


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: self.b(y := self.a(x)) + y,
        lambda self, x: self.b(torch.sigmoid(self.a(x))),
        lambda self, x: (self.b(y := self.a(x)), y)[0] * y,
        lambda self, x: self.b(self.b(self.a(x))),
        lambda self, x: self.b(self.a(x)[:, :8]),
        lambda self, x: self.b(F.dropout(self.a(x), 0.0, training=True)),
        lambda self, x: self.b(self.a(x).view(torch.int32).view(torch.float32)),
    ],
    ids=["residual", "float", "output", "two calls", "slice", "dropout at work", "view of bits"],
)
def test_where_no_int8_passes(forward: Any) -> None:
    kind = type("Model", (nn.Module,), {"forward": forward})
    model = kind()
    model.a, model.b = nn.Linear(8, 8), nn.Linear(8, 8)
    x = torch.randn(5, 8)
    _, unfused = prepared(model.eval(), x)
    result, _ = fused(unfused, x)
    assert result.a.out_scale is None
    assert torch.equal(run(result, x), run(unfused, x))


@pytest.mark.parametrize(
    "between",
    [
        lambda x: x.flatten(1),
        lambda x: torch.flatten(x, 1),
        lambda x: x.reshape(-1, 8),
        lambda x: x.view(x.size(0), 8),
        lambda x: x.view(x.shape[0], -1),
        lambda x: torch.reshape(x, (-1, 8)),
        lambda x: x.transpose(0, 1).permute(1, 0).contiguous(),
        lambda x: torch.unsqueeze(x, 1).squeeze(1),
        lambda x: F.dropout(x, training=False),
        nn.Identity(),
        nn.Flatten(1),
        nn.Unflatten(1, (1, 8)),
    ],
)
def test_int8_passes_through(between: Any) -> None:
    layers = {"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)}
    if isinstance(between, nn.Module):
        layers["between"] = between

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.b((self.between if "between" in layers else between)(self.a(x)))

    check(forward, {"a": ["int8 out"]}, **layers)


@pytest.mark.parametrize(
    ("pool", "passes"),
    [
        (nn.MaxPool2d(2), True),
        (nn.MaxPool2d(3, 2, 1, dilation=1, ceil_mode=True), True),
        (nn.MaxPool2d(2, 1, 1, dilation=2), True),
        (lambda x: F.max_pool2d(x, 3, 1, padding=1), True),
        (lambda x: torch.max_pool2d(x, 3, 1, 1), True),
        (nn.AvgPool2d(2), False),
        (nn.AdaptiveMaxPool2d(3), False),
        (lambda x: F.max_pool2d(x, 3, 1, 1, 1, False, True)[0], False),
    ],
)
def test_pooling(pool: Any, passes: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)
            if isinstance(pool, nn.Module):
                self.pool = pool

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b((self.pool if isinstance(pool, nn.Module) else pool)(self.a(x)))

    x = torch.randn(3, 3, 20, 19)
    _, unfused = prepared(Model().eval(), x)
    result, _ = fused(unfused, x)
    assert (result.a.out_scale is not None) == passes
    assert torch.equal(run(result, x), run(unfused, x))


def test_layers_in_modules_called_whole_are_regions_without_nodes() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.more = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.more(self.fc(x))
            return y if y.sum() > 0 else -y

    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), Branch(), nn.Linear(8, 8)).eval()
    x = torch.randn(5, 8)
    graph_module, unfused = prepared(model, x)
    for name in ("2.fc", "2.more"):
        unfused.set_submodule(name, copy.deepcopy(unfused.get_submodule("0")))
    result, regions = fused(unfused, x)
    assert [(region.layers, region.nodes) for region in regions] == [
        (["0"], ["_0", "_1"]),
        (["2.fc"], []),
        (["2.more"], []),
        (["3"], ["_3"]),
    ]
    assert torch.equal(run(result, x), run(unfused, x))


def test_a_layer_called_twice_is_one_region() -> None:
    result = check(lambda self, x: self.fc(torch.tanh(self.fc(x))), {})
    unchanged, regions = fused(result, torch.randn(5, 8))
    assert [region.layers for region in regions] == [["fc"]]
    assert regions[0].nodes == ["fc", "tanh", "fc_1"]


def run_part(part: nn.Module, inputs: list[str], values: dict[str, Any]) -> Any:
    with torch.no_grad():
        return part(*(values[name] for name in inputs))


@pytest.mark.parametrize("name", MODELS)
def test_regions_run_alone_in_float_and_in_int8(name: str) -> None:
    """On the same captured inputs, by name, a float region gives the float values and an int8 one the int8 model's."""
    model, batch = made(name)
    graph_module = traced(model)
    fold_batch_norms(graph_module)
    result, regions = fused(with_int8(graph_module, batch), batch)
    for region in regions:
        for whole in (graph_module, result):
            part, inputs = subgraph(whole, region.nodes)
            last = [node for node in whole.graph.nodes if node.name in region.nodes][-1].name
            values = capture(whole, batch, call, [*inputs, last])
            assert set(inputs) <= {node.name for node in graph_module.graph.nodes}
            out = run_part(part, inputs, values)
            assert torch.equal(out, values[last])
            assert out.dtype is torch.float32
        floats = capture(graph_module, batch, call, [*inputs, last])
        error = (run_part(part, inputs, floats) - floats[last]).norm() / floats[last].norm()
        assert error < 0.05


@pytest.mark.parametrize("name", MODELS)
def test_fused_models_are_copied_pickled_scripted_and_exported(name: str) -> None:
    model, batch = made(name)
    graph_module = traced(model)
    fold_batch_norms(graph_module)
    result, _ = fused(with_int8(graph_module, batch), batch)
    expected = run(result, batch)
    twin = copy.deepcopy(result)
    assert [node.name for node in twin.graph.nodes] == [node.name for node in result.graph.nodes]
    assert torch.equal(run(twin, batch), expected)
    assert torch.equal(run(pickle.loads(pickle.dumps(result)), batch), expected)
    assert torch.equal(run(torch.jit.script(result), batch), expected)
    program = torch.export.export(result, (batch,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    assert torch.equal(run(program.module(), batch), expected)
    assert torch.equal(run(program.module(), batch[:3]), run(result, batch[:3]))


def test_half_precision_carries_what_is_not_int8() -> None:
    model, batch = made("resnet")
    graph_module = traced(model)
    fold_batch_norms(graph_module)
    unfused = with_int8(graph_module, batch)
    half, batch = unfused.to(torch.bfloat16), batch.bfloat16()
    result = share(half)
    fuse(result, shapes_of(half, batch, call), torch.bfloat16)
    out = run(result, batch)
    assert out.dtype is torch.bfloat16
    torch.testing.assert_close(out, run(half, batch), rtol=0.05, atol=0.05)
