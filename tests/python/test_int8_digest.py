"""The digest of a traced model: the same for the same computation, another one for any other."""

from __future__ import annotations

import enum
from collections.abc import Callable

import torch
import torch.nn.functional as F
from halfstep.int8_attention import SplitAttention
from halfstep.int8_digest import digest_of, settings_of
from halfstep.int8_graph import trace
from torch import nn


class Net(nn.Module):
    """`head` computes what `forward` answers with."""

    def __init__(self, head: Callable, **layers: nn.Module) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.act = nn.GELU()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.head = head

    def forward(self, x: torch.Tensor) -> object:
        return self.head(self, self.first(x))


def digest(head: Callable, **layers: nn.Module) -> str:
    graph, why = trace(Net(head, **layers).eval())
    assert graph is not None, why
    return digest_of(graph)


DIFFERENT: list[Callable] = [
    lambda m, x: x,
    lambda m, x: F.relu(x),
    lambda m, x: F.gelu(x),
    lambda m, x: F.gelu(x, approximate="tanh"),
    lambda m, x: m.act(x),
    lambda m, x: x * 2,
    lambda m, x: x * 2.0,
    lambda m, x: x * 2.5,
    lambda m, x: 2 * x,
    lambda m, x: x - x.mean(),
    lambda m, x: x.mean() - x,
    lambda m, x: x[:, 1:],
    lambda m, x: x[:, :1],
    lambda m, x: x.sum(1),
    lambda m, x: x.sum(0),
    lambda m, x: x.sum(1, keepdim=True),
    lambda m, x: x.sum(True),
    lambda m, x: x.to(torch.float64),
    lambda m, x: x.to(torch.float16),
    lambda m, x: (x, x + 1),
    lambda m, x: (x + 1, x),
    lambda m, x: {"a": x, "b": x + 1},
    lambda m, x: {"b": x, "a": x + 1},
    lambda m, x: m.first(x),
    lambda m, x: x + m.first.bias,
    lambda m, x: x + m.first.weight,
]


def test_other_code_gives_another_digest() -> None:
    found = [digest(head) for head in DIFFERENT]
    assert len(set(found)) == len(found)


def test_settings_of_layers_count_and_what_has_no_effect_does_not() -> None:
    def call(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return model.act(x)

    layers = (nn.GELU(), nn.GELU("tanh"), nn.ReLU(), nn.LayerNorm(4), nn.LayerNorm(4, eps=1e-3), nn.Softmax(0))
    found = [digest(call, act=layer) for layer in (*layers, nn.Softmax(1))]
    assert len(set(found)) == len(found)
    assert digest(call, act=nn.ReLU(inplace=True)) == digest(call, act=nn.ReLU())
    assert digest(call, act=nn.BatchNorm1d(4, momentum=0.5)) == digest(call, act=nn.BatchNorm1d(4))
    whole = [nn.Sequential(nn.LSTM(4, 4, dropout=p, num_layers=2)) for p in (0.0, 0.5)]
    assert digest(lambda m, x: m.act(x)[0], act=whole[0]) == digest(lambda m, x: m.act(x)[0], act=whole[1])


def test_weights_and_names_of_arguments_do_not_count() -> None:
    class Renamed(Net):
        def forward(self, values: torch.Tensor) -> object:
            return self.head(self, self.first(values))

    def head(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x) + torch.ones(4, device=model.first.weight.device)

    graph, _ = trace(Renamed(head).eval())
    assert digest_of(graph) == digest(head) == digest(head)


class Kind(enum.Enum):
    ONE = 1
    TWO = 2


@torch.fx.wrap
def _with(x: torch.Tensor, _value: object) -> torch.Tensor:
    return x


def test_other_values_count_by_their_name_or_class() -> None:
    def given(value: object) -> str:
        return digest(lambda _model, x: _with(x, value))

    values = (Kind.ONE, Kind.TWO, torch.channels_last, torch.strided, ..., 1j, None, "1", 1, True, slice(1), range(2))
    found = [given(value) for value in values]
    assert len(set(found)) == len(found)
    assert found == [given(value) for value in values]
    assert given(torch.device("cpu")) == given(torch.device("meta"))


def test_settings_of_attention_and_transformers_count() -> None:
    def attend(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return model.part(x, x, x)[0]

    def attention(**options: object) -> nn.Module:
        return nn.MultiheadAttention(**{"embed_dim": 4, "num_heads": 2, **options})

    class Subclass(nn.MultiheadAttention):
        calls = 0

        def __init__(self, *args: object, calls: int = 0) -> None:
            super().__init__(*args)
            self.calls = calls

    parts = [attention(), attention(num_heads=4), attention(batch_first=True), attention(add_zero_attn=True)]
    parts += [SplitAttention(part) for part in parts] + [Subclass(4, 2), Subclass(4, 4)]
    found = [digest(attend, part=part) for part in parts]
    assert len(set(found)) == len(found)
    assert digest(attend, part=attention(dropout=0.5)) == found[0]
    assert digest(attend, part=Subclass(4, 2, calls=3)) == digest(attend, part=Subclass(4, 2))


def test_settings_inside_of_modules_that_are_called_whole_count() -> None:
    def decoder(heads: int, activation: object) -> nn.Module:
        return nn.TransformerDecoderLayer(4, heads, 8, activation=activation)

    def encoder(heads: int, activation: object) -> nn.Module:
        return nn.TransformerEncoderLayer(4, heads, 8, activation=activation)

    for make, call in (
        (decoder, lambda m, x: m.part(x, x)),
        (encoder, lambda m, x: m.part(x)),
    ):
        parts = [make(2, "relu"), make(4, "relu"), make(2, "gelu"), make(2, torch.tanh), make(2, nn.GELU("tanh"))]
        assert len({digest(call, part=part) for part in parts}) == len(parts)
        assert len({settings_of(part) for part in parts}) == len(parts)
        assert settings_of(make(2, "gelu")) == settings_of(parts[2].double())
