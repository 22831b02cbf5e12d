"""Models with attention in parts: in int8, and in all ways in which torch runs models."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator

import pytest
import torch
from halfstep.int8_attention import SplitAttention
from halfstep.int8_graph import trace
from halfstep.int8_layers import Int8Linear, pack
from int8_attention_cases import (
    BATCH,
    KEYS,
    LEFT_ALIGNED,
    WIDTH,
    attention,
    calls_of_products,
    close,
    encoder,
    inference,
    inputs,
    randomized,
    replaced,
)
from torch import nn


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with inference():
        yield


def with_int8(model: nn.Module) -> nn.Module:
    """Put an int8 layer in the place of every nn.Linear."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear):
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, Int8Linear(pack(layer.weight, layer.bias)))
    return model


class Vit(nn.Module):
    """A small vision transformer: [batch, 3, 32, 32] -> [batch, 10]."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, stride=8)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, 17, width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 2 * width, activation="gelu", batch_first=True, norm_first=True, dropout=0.0
        )
        self.encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.size(0), -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.encoder(x))[:, 0])


def vit() -> Vit:
    return randomized(Vit()).eval()


def test_a_vision_transformer_and_the_calls_of_its_products() -> None:
    model = vit()
    split = replaced(model)
    images = torch.randn(4, 3, 32, 32)
    assert close(split(images), model(images), 2e-6)
    whole = calls_of_products(model, images)  # why all this is there
    assert {count for name, count in whole.items() if name.endswith("out_proj")} == {0}
    calls = calls_of_products(split, images)
    assert len(calls) == 4 * 6 + 1
    assert set(calls.values()) == {1}
    assert "encoder.layers.3.self_attn.out_proj" in calls
    assert "encoder.layers.0.linear2" in calls


def test_int8_products_change_little() -> None:
    model = vit()
    int8 = with_int8(replaced(model))
    assert sum(isinstance(layer, Int8Linear) for layer in int8.modules()) == 4 * 6 + 1
    images = torch.randn(8, 3, 32, 32)
    expected, output = model(images), int8(images)
    assert close(output, expected, 0.03)
    assert not close(output, expected, 1e-4)


@pytest.mark.parametrize("sequence", ["batch", "none", "first"])
def test_attention_in_int8(sequence: str) -> None:
    module = attention(batch_first=sequence != "first")
    int8 = with_int8(replaced(module))
    given = inputs(sequence != "first")
    if sequence == "none":
        given = [x[0] for x in given]
    for needed in (True, False):
        output, weights = int8(*given, need_weights=needed)
        expected, expected_weights = module(*given, need_weights=needed)
        assert close(output, expected, 0.03)
        assert weights is None or close(weights, expected_weights, 0.03)
    nested = torch.nested.nested_tensor([torch.randn(3, WIDTH), torch.randn(2, WIDTH)])
    traced, _ = trace(int8, ("query", "key", "value"))
    for model in (int8, traced):
        with pytest.raises(ValueError, match="attention got a nested tensor"):
            model(nested, nested, nested)


def script(model: nn.Module, *args: torch.Tensor) -> nn.Module:
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(model), file)
    file.seek(0)
    return torch.jit.load(file)


def fx(model: nn.Module, *args: torch.Tensor) -> nn.Module:
    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module: nn.Module, name: str) -> bool:
            return isinstance(module, (SplitAttention, Int8Linear)) or super().is_leaf_module(module, name)

    graph = Tracer().trace(model)
    for node in graph.nodes:
        node.type = None  # annotations that are strings, as here, cannot be scripted after a trace
    traced = torch.fx.GraphModule(model, graph)
    assert "encoder.layers.0.linear1" in {node.target for node in traced.graph.nodes if node.op == "call_module"}
    return traced


WAYS = {
    "script": script,
    "script-fx": lambda model, *args: script(fx(model, *args)),
    "trace": lambda model, *args: torch.jit.trace(model, args),
    "export": lambda model, *args: torch.export.export(model, args, strict=False).module(),
    "export-strict": lambda model, *args: torch.export.export(model, args, strict=True).module(),
    "compile": lambda model, *args: torch.compile(model, backend="eager", fullgraph=True),
    "deepcopy": lambda model, *args: copy.deepcopy(model),
    "pickle": lambda model, *args: pickle.loads(pickle.dumps(model)),
    "fx": fx,
}


class Pooled(nn.Module):
    """A text classifier that averages over the padding too."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = encoder(activation="gelu")
        self.attention = attention(batch_first=True)

    def forward(self, x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        x = self.encoder(x, src_key_padding_mask=padding)
        attended, weights = self.attention(x, x, x, key_padding_mask=padding)
        if weights is not None:
            x = x + attended * weights.mean()
        return x.mean(1)


# A strict export of torch 2.11 knows no objects that are attributes of modules within the model.
@pytest.mark.parametrize("way", [way for way in WAYS if way != "export-strict"])
def test_every_way_to_run_an_int8_model(way: str) -> None:
    images = torch.randn(4, 3, 32, 32)
    model = with_int8(replaced(vit()))
    expected = model(images)
    assert close(WAYS[way](model, images)(images), expected)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_run_a_model(way: str) -> None:
    images = torch.randn(4, 3, 32, 32)
    model = vit()
    result = WAYS[way](replaced(model), images)
    assert close(result(images), model(images), 2e-6)
    if way == "script-fx":  # after a trace TorchScript does not know that the weights are there
        return
    text = Pooled().eval()
    arguments = (torch.randn(BATCH, KEYS, WIDTH), LEFT_ALIGNED.contiguous())
    result = WAYS[way](replaced(text), *arguments)
    assert close(result(*arguments), text(*arguments), 2e-6)
    other = (arguments[0], LEFT_ALIGNED.flip(0).contiguous())
    assert close(result(*other), text(*other), 2e-6)


def test_dynamic_shapes_are_exported() -> None:
    text = Pooled().eval()
    batch, length = torch.export.Dim("batch", min=2), torch.export.Dim("length", min=2)
    dims = {0: batch, 1: length}
    arguments = (torch.randn(BATCH, KEYS, WIDTH), LEFT_ALIGNED.contiguous())
    program = torch.export.export(replaced(text), arguments, dynamic_shapes=(dims, dims), strict=False)
    x, padding = torch.randn(4, 9, WIDTH), torch.arange(9).expand(4, 9) >= torch.tensor([[9], [2], [5], [7]])
    assert close(program.module()(x, padding), text(x, padding), 2e-6)
