"""Files of models with recurrent layers whose weights are int8: the same bits come back, and damage is refused."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from halfstep import InferencePrecisionOptimizer
from halfstep.half_model import CastModel
from halfstep.int8_load import load_int8
from halfstep.int8_recurrent import Int8Recurrent
from int8_file_cases import Branching, carry, plan_in, put_together, taken_apart, with_plan
from torch import nn

LAYERS: dict[str, Callable[[], nn.RNNBase]] = {
    "lstm": lambda: nn.LSTM(6, 8, batch_first=True),
    "lstm deep": lambda: nn.LSTM(6, 8, num_layers=2, bidirectional=True, batch_first=True),
    "lstm projected": lambda: nn.LSTM(6, 8, proj_size=4, num_layers=2, bidirectional=True, bias=False),
    "gru": lambda: nn.GRU(6, 8, num_layers=2, dropout=0.5, batch_first=True),
    "gru without bias": lambda: nn.GRU(6, 8, bias=False),
    "tanh": lambda: nn.RNN(6, 8, bidirectional=True),
    "relu": lambda: nn.RNN(6, 8, num_layers=3, nonlinearity="relu", bias=False, batch_first=True),
}


class Reader(nn.Module):
    """A linear layer, a recurrent one, a norm that stays float, and a linear layer."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.rnn = nn.Linear(6, 6), LAYERS[kind]()
        with torch.no_grad():
            width = self.rnn(torch.zeros(1, 1, 6))[0].shape[-1]
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.rnn(torch.relu(self.first(x)))[0])).mean(1)


class BranchingReader(Reader):
    """Cannot be traced."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(-x if x.sum() > 1e6 else x)


def optimized(model: nn.Module, **options: Any) -> tuple[InferencePrecisionOptimizer, nn.Module]:
    options = {"speed_guard": False, "progress": False, "recurrent_weights": True, **options}
    optimizer = InferencePrecisionOptimizer(accuracy_threshold=1.0, eval_fn=lambda _model: 1.0, **options)
    data = [torch.randn(8, 5, 6) for _ in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        result = optimizer.optimize_for_inference(model.eval(), data, "cpu")
    assert optimizer.report()["result"] == "int8"
    assert recurrent(result)
    return optimizer, result


def recurrent(model: nn.Module) -> list[tuple[str, str]]:
    return [(name, repr(module)) for name, module in model.named_modules() if isinstance(module, Int8Recurrent)]


def assert_the_same(loaded: nn.Module, result: nn.Module) -> None:
    x = torch.randn(4, 5, 6)
    with torch.no_grad():
        found, expected = loaded(x), result(x)
    leaves = torch.utils._pytree.tree_leaves
    assert all(map(torch.equal, leaves(found), leaves(expected)))
    assert len(leaves(found)) == len(leaves(expected))
    assert recurrent(loaded) == recurrent(result)
    assert type(loaded).__name__ == type(result).__name__
    assert not any(module.training for module in loaded.modules())


@pytest.mark.parametrize("kind", LAYERS)
def test_the_same_bits_come_back(kind: str, tmp_path: Path) -> None:
    optimizer, result = optimized(Reader(kind))
    optimizer.save(tmp_path / "m")
    plan = plan_in(taken_apart(tmp_path / "m")[0])
    assert [layer["name"] for layer in plan["layers"]] == ["first", "head"]
    assert [layer["name"] for layer in plan["recurrent"]] == ["rnn"]
    assert plan["graph"]
    assert_the_same(load_int8(tmp_path / "m", Reader(kind)), result)
    assert_the_same(load_int8(tmp_path / "m", Reader(kind).to("meta")), result)


@pytest.mark.parametrize(
    ("make", "options", "graph"),
    [
        (lambda: Reader("lstm"), {"exclude": ["first", "head"]}, False),  # nothing but the recurrent layer
        (lambda: BranchingReader("gru"), {}, False),
        (lambda: BranchingReader("gru"), {"include": "rnn"}, False),
        (lambda: nn.GRU(6, 8, batch_first=True), {}, False),
        (lambda: nn.Sequential(nn.LSTM(6, 8, proj_size=2)), {}, False),
    ],
)
def test_without_a_graph(make: Callable, options: dict[str, Any], graph: bool, tmp_path: Path) -> None:
    optimizer, result = optimized(make(), **options)
    optimizer.save(tmp_path / "m")
    assert bool(plan_in(taken_apart(tmp_path / "m")[0])["graph"]) is graph
    assert_the_same(load_int8(tmp_path / "m", make()), result)


@pytest.mark.parametrize("options", [{}, {"include": "rnn"}])
def test_in_a_half_carrier(options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    carry(torch.bfloat16, monkeypatch)
    optimizer, result = optimized(Reader("lstm deep"), speed_guard=True, **options)
    assert isinstance(result, CastModel)
    optimizer.save(tmp_path / "m")
    assert_the_same(load_int8(tmp_path / "m", Reader("lstm deep"), retime=False), result)


def test_one_layer_by_two_names(tmp_path: Path) -> None:
    class Twice(Reader):
        def __init__(self) -> None:
            super().__init__("lstm")
            self.again = self.rnn

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + self.again(x)[0].sum()

    optimizer, result = optimized(Twice())
    optimizer.save(tmp_path / "m")
    loaded = load_int8(tmp_path / "m", Twice())
    assert_the_same(loaded, result)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("saved") / "m"
    optimized(Reader("lstm deep"))[0].save(file)
    return file


def refused(file: Path, said: str, kind: str = "lstm deep") -> None:
    with pytest.raises(ValueError, match=said) as caught:
        load_int8(file, Reader(kind))
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("lstm", r"layer 'rnn': num_layers: 2 in the file, 1 by the model's code"),
        ("gru", r"layer 'rnn': mode: LSTM in the file, GRU by the model's code"),
        ("lstm projected", r"layer 'rnn': proj_size: 0 in the file, 4 by the model's code"),
    ],
)
def test_other_code_is_named(kind: str, said: str, saved: Path) -> None:
    model = Reader("lstm deep")
    model.rnn = LAYERS[kind]()
    with pytest.raises(ValueError, match=said):
        load_int8(saved, model)


def test_a_layer_that_is_missing_is_named(saved: Path) -> None:
    model = Reader("lstm deep")
    model.rnn = nn.Identity()
    with pytest.raises(ValueError, match="layer 'rnn' cannot be int8 in this model: there is no such layer"):
        load_int8(saved, model)
    model = Reader("lstm deep")
    model.rnn.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="layer 'rnn' cannot be int8 in this model: it has hooks"):
        load_int8(saved, model)
    with pytest.raises(ValueError, match="torch.fx traced, but this model cannot be"):
        load_int8(saved, Branching())


def layer(**changes: Any) -> Callable[[dict], None]:
    return lambda plan: plan["recurrent"][0].update(changes)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (layer(mode="MGU"), "layer 'rnn': mode is 'MGU', expected one of RNN_RELU"),
        (layer(mode="GRU"), "mode: GRU in the file, LSTM by the model's code"),
        (layer(hidden_size=0), "hidden_size is .*0.*, expected 1 integers of 1 or more"),
        (layer(hidden_size=1 << 39), "hidden_size: 549755813888 in the file, 8 by the model's code"),
        (layer(hidden_size=1 << 80), "hidden_size is"),
        (layer(input_size=-1), "input_size is"),
        (layer(input_size=7), "input_size: 7 in the file"),
        (layer(num_layers=0), "num_layers is"),
        (layer(num_layers=1 << 30), "num_layers: 1073741824 in the file"),
        (layer(num_layers=2.0), "num_layers is float, expected int"),
        (layer(proj_size=8), "proj_size is 8, expected 0 to 7"),
        (layer(proj_size=-1), "proj_size is -1"),
        (layer(mode="GRU", proj_size=1), "proj_size is 1, expected 0 to 0"),
        (layer(bias=1), "bias is int, expected bool"),
        (layer(bias=False), "bias: False in the file, True by the model's code"),
        (layer(batch_first=False), "batch_first: False in the file"),
        (layer(bidirectional=False), "bidirectional: False in the file"),
        (layer(name="first"), "layers has a name twice"),
        (layer(name="head.rnn"), "layer 'head.rnn' cannot be int8 in this model: there is no such layer"),
        (layer(more=1), r"has \['more'\]"),
        (lambda p: p["recurrent"][0].pop("mode"), r"lacks \['mode'\]"),
        (lambda p: p.pop("recurrent"), r"lacks \['recurrent'\]"),
        (lambda p: p.update(recurrent=[]), r"lacks tensors \['rnn.bias_hh_l0'.* and has \['rnn.weights.0.bias'"),
        (lambda p: p.update(recurrent={}), "recurrent is dict, expected list"),
        (lambda p: p["recurrent"].append(p["recurrent"][0]), "layers has a name twice"),
        (lambda p: p["checksums"].pop("rnn.weights.7.scales"), r"has \['rnn.weights.7.scales'\]"),
    ],
)
def test_plans_that_do_not_fit(change: Callable, said: str, saved: Path, tmp_path: Path) -> None:
    plan = plan_in(taken_apart(saved)[0])
    change(plan)
    refused(with_plan(tmp_path / "m", saved, plan), said)


def test_flipped_bits_are_refused_with_the_name(saved: Path, tmp_path: Path) -> None:
    header, data = taken_apart(saved)
    chance, model = random.Random(0), Reader("lstm deep")
    names = [name for name in header if name.startswith("rnn.weights.")]
    assert len(names) == 8 * 3
    for name in names:
        place = chance.randrange(*header[name]["data_offsets"])
        damaged = bytearray(data)
        damaged[place] ^= 1 << chance.randrange(8)
        put_together(tmp_path / "m", header, bytes(damaged))
        with pytest.raises(ValueError, match=f"{name} is damaged: its CRC-32"):
            load_int8(tmp_path / "m", model)


@pytest.mark.parametrize("part", ["weight", "scales", "bias"])
def test_shapes_that_do_not_fit(part: str, saved: Path, tmp_path: Path) -> None:
    header, data = taken_apart(saved)
    shape = header[f"rnn.weights.0.{part}"]["shape"]
    header[f"rnn.weights.0.{part}"]["shape"] = [*shape[:-1], 1, shape[-1]]
    refused(put_together(tmp_path / "m", header, data), rf"rnn.weights.0.{part} is .*, expected (int8|float32) \[32")


def test_mutated_plans_with_a_right_digest(saved: Path, tmp_path: Path) -> None:
    """An entry of the recurrent plan is replaced: ValueError, or the same layer."""
    model = Reader("lstm deep")
    first = json.dumps(plan_in(taken_apart(saved)[0]))
    for key in json.loads(first)["recurrent"][0]:
        for value in (None, True, 0, -1, 2, 1 << 80, 0.5, "", "LSTM", "first", [], [0], {}):
            plan = json.loads(first)
            if type(value) is type(plan["recurrent"][0][key]) and value == plan["recurrent"][0][key]:
                continue
            plan["recurrent"][0][key] = value
            with pytest.raises(ValueError, match=str(tmp_path)):
                load_int8(with_plan(tmp_path / "m", saved, plan), model)
