"""Which layers of a model are candidates for int8 as it was traced and folded, and why each of the others is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from halfstep.calibration_data import collect
from halfstep.int8_form import Form, Region
from halfstep.int8_layers import Int8Linear, pack
from halfstep.int8_model import Int8Settings
from halfstep.int8_report import Report
from torch import nn
from torch.fx import GraphModule

NEVER = "never called during calibration"
READ = "its weight is read by other code"


class Conv1D(nn.Module):
    """Stands for the layer of transformers, of that name: weight [in, out]."""

    def __init__(self, out: int, width: int) -> None:
        super().__init__()
        self.nf, self.nx = out, width
        self.weight, self.bias = nn.Parameter(torch.randn(width, out)), nn.Parameter(torch.randn(out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return flat.view(*x.shape[:-1], self.nf)


Conv1D.__module__ = "transformers.pytorch_utils"


class Scaled(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


class Shifted(nn.Conv2d):
    pass


class Model(nn.Module):
    """Has these layers and this forward(self, x); control flow in it makes the model one that is not traced."""

    def __init__(self, forward: Any, is_traced: bool, **layers: nn.Module) -> None:
        super().__init__()
        self.function, self.is_traced = forward, is_traced
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.is_traced and x.sum() > 1e6:
            x = x + 1
        return self.function(self, x)


TRACED = pytest.mark.parametrize("is_traced", [True, False], ids=["traced", "untraced"])


def found_in(
    model: nn.Module, x: torch.Tensor, include: tuple[str, ...] = (), exclude: tuple[str, ...] = ()
) -> tuple[Form, list[str], dict[str, str]]:
    """Return the form, the candidates and the layers that are left with the reasons."""
    batches = collect(model.eval(), [x, x, x, x], 1000)
    form = Form(model, batches, True, Report("int8", "cpu"))
    assert isinstance(form.model, GraphModule) == getattr(model, "is_traced", True)
    found, left = form.candidates(batches, include, exclude)
    kinds = {type(module) for module in form.model.modules()}
    assert not [kind for kind in kinds if kind.__name__ == "Probe"]
    return form, list(found), left


def int8_of(form: Form, names: list[str], x: torch.Tensor) -> dict[str, nn.Module]:
    found, _ = form.candidates(collect(form.model, [x], 1000), (), ())
    packed = {n: pack(c.weight, c.bias, **c.geometry) for n, c in found.items() if n in names}
    return {name: Int8Settings(each).layer(found[name], torch.float32) for name, each in packed.items()}


@TRACED
def test_layers_of_transformers_and_subclasses_are_seen(is_traced: bool) -> None:
    layers = {"image": Shifted(1, 2, 3), "down": Conv1D(16, 32), "scaled": Scaled(16, 4)}
    model = Model(lambda self, x: self.scaled(self.down(self.image(x).flatten(1))), is_traced, **layers)
    x = torch.randn(6, 1, 6, 6)
    form, found, left = found_in(model, x)
    assert found == ["down"]
    assert left.keys() == {"image", "scaled"}
    assert "its class Shifted may" in left["image"]
    assert "its class Scaled may" in left["scaled"]
    int8 = form.build(form.model, int8_of(form, found, x), torch.float32)
    assert isinstance(int8.down, Int8Linear)
    out, expected = int8(x), model(x)
    assert (out - expected).norm() < 0.03 * expected.norm()


def _tied(self: Any, x: torch.Tensor) -> torch.Tensor:
    return F.linear(self.fc(self.e(x)), self.e.weight)


def _asks_for_the_dtype(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.fc(self.e(x)).to(self.e.weight.dtype)


def _asks_for_the_device(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.fc(self.e(x)).to(next(self.e.parameters()).device)


@TRACED
@pytest.mark.parametrize("forward", [_tied, _asks_for_the_dtype])
def test_a_layer_whose_weight_is_read_stays_float(forward: Any, is_traced: bool) -> None:
    model = Model(forward, is_traced, e=nn.Embedding(9, 8), fc=nn.Linear(8, 8))
    x = torch.randint(0, 9, (6, 5))
    form, found, left = found_in(model, x)
    assert found == ["fc"]
    assert left == {"e": READ}
    with torch.no_grad():
        out = form.build(form.model, int8_of(form, found, x), torch.float32)(x)
        assert (out - model(x)).norm() < 0.03 * out.norm()


def test_what_an_int8_layer_lacks_and_code_reads() -> None:
    layers = {"e": nn.Embedding(9, 8), "fc": nn.Linear(8, 8)}
    x = torch.randint(0, 9, (6, 5))
    _, _, left = found_in(Model(_asks_for_the_device, False, **layers), x)
    assert left == {"e": READ}
    model = Model(lambda self, x: self.fc(self.e(x)).view(-1, self.fc.out_features), False, **layers)
    _, found, left = found_in(model, x)
    assert found == ["e"]
    assert left == {"fc": "its out_features is read by other code"}
    model = Model(lambda self, x: self.fc(self.e(x)).to(next(self.parameters()).dtype), False, **layers)
    _, found, left = found_in(model, x)  # what is asked for is of the whole model
    assert found == ["e", "fc"]
    assert left == {}


@TRACED
def test_attention_that_is_left_reads_its_output_projection(is_traced: bool) -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    attention.register_forward_hook(lambda *_: None)
    model = Model(lambda self, x: self.fc(self.attn(x, x, x)[0]), is_traced, attn=attention, fc=nn.Linear(8, 8))
    _, found, left = found_in(model, torch.randn(4, 5, 8))
    assert found == ["fc"]
    assert left["attn.out_proj"] == READ


def test_probes_end_when_the_model_fails() -> None:
    model = Model(lambda self, x: self.fc(x), False, fc=nn.Linear(8, 8)).eval()
    batches = collect(model, [torch.randn(4, 8)], 100)
    form = Form(model, batches, True, Report("int8", "cpu"))
    with pytest.raises(ValueError, match="batch 0 of calibration_data makes the model raise.*cannot be multiplied"):
        form.candidates(collect(model, [torch.randn(4, 7)], 100), (), ())
    assert type(form.model.fc) is nn.Linear


@TRACED
def test_layers_that_are_never_called_are_named(is_traced: bool) -> None:
    layers = {
        "fc": nn.Linear(8, 8),
        "unused": nn.Linear(8, 8),
        "table": nn.Embedding(4, 4),
        "lstm": nn.LSTM(8, 8),
        "read": nn.Linear(8, 8),
        "attn": nn.MultiheadAttention(8, 2),
    }
    layers["alias"] = layers["fc"]
    model = Model(lambda self, x: F.linear(self.alias(x), self.read.weight), is_traced, **layers)
    _, found, left = found_in(model, torch.randn(4, 8), exclude=("table",))
    assert found == ["fc"]
    parts = {f"attn.{name}_proj": NEVER for name in ("q", "k", "v", "out")}
    lstm = left.pop("lstm")
    assert lstm == NEVER if is_traced else "recurrent" in lstm
    assert left == {"unused": NEVER, "read": READ, **parts, "table": "in exclude"}


def test_a_layer_that_a_late_batch_calls_is_called() -> None:
    model = Model(lambda self, x: self.rare(x) if x[0, 0] > 9 else self.fc(x), False, fc=nn.Linear(8, 8))
    model.rare = nn.Linear(8, 8)
    batches = collect(model.eval(), [*(torch.randn(4, 8) for _ in range(5)), torch.full((4, 8), 10.0)], 100)
    form = Form(model, batches, True, Report("int8", "cpu"))
    assert form.candidates(batches, (), ())[0].keys() == {"fc", "rare"}
    assert form.candidates(batches[:5], (), ())[1] == {"rare": NEVER}


def test_globs_are_of_the_models_own_names() -> None:
    layers = {"c": nn.Conv2d(1, 2, 3), "b1": nn.BatchNorm2d(2), "drop": nn.Dropout(), "fc": nn.Linear(32, 8)}
    layers.update(unused=nn.Linear(8, 8), attn=nn.MultiheadAttention(8, 2))

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        x = self.fc(self.drop(self.b1(self.c(x)).flatten(1)))
        return self.attn(x, x, x)[0]

    model, x = Model(forward, True, **layers), torch.randn(4, 1, 6, 6)
    form, found, left = found_in(model, x, exclude=("b1", "drop", "unused", "attn.k_proj"))
    assert form.norms == [("c", "b1")]
    assert found == ["c", "fc", "attn.q_proj", "attn.v_proj", "attn.out_proj"]
    assert left == {"unused": "in exclude", "attn.k_proj": "in exclude"}
    assert found_in(model, x, include=("c", "drop"))[1] == ["c"]
    for argument in ("include", "exclude"):
        with pytest.raises(ValueError, match=f"{argument} has 'b2', which names no layer"):
            found_in(model, x, **{argument: ("b2",)})


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_regions_of_an_encoder(activation: str) -> None:
    """Query, key and value are one product, behind the norm of the layer before; additions and norms are taken over."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation=activation)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(4, 5, 8)
    form, found, left = found_in(model, x)
    assert left == {}
    assert isinstance(form.model, GraphModule)
    packed = {name: layer.packed for name, layer in int8_of(form, found, x).items()}

    def layers() -> dict[str, nn.Module]:
        return {name: Int8Linear(each, input_scale=0.03) for name, each in packed.items()}

    regions = form.regions(form.model, layers(), torch.float32)
    expected: list[tuple[list[str], list[str]]] = []
    for n in (0, 1):
        q, k, v, out = (f"layers.{n}.self_attn.{part}_proj" for part in ("q", "k", "v", "out"))
        before = f" + norm layers.{n - 1}.norm2" if n else ""
        fused = [f"{q}{before} + joined with {k}, {v}", *(f"{each}{before}" for each in (k, v) if n)]
        expected += [([q, k, v], fused), ([out], [f"{out} + residual"])]
        one, two = f"layers.{n}.linear1", f"layers.{n}.linear2"
        norm = f"norm layers.{n}.norm1"
        expected.append(([one, two], [f"{one} + {norm} + {activation} + int8 out", f"{two} + residual"]))
    assert [(region.layers, region.fused) for region in regions] == expected
    assert all(region.nodes for region in regions)
    (batch,) = collect(model, [x], 100)
    for region in regions:
        timed = form.time_region(region, {torch.float32: form.model}, layers(), batch, torch.float32)
        assert timed.keys() == {"float32", "int8"}
        assert all(timing.median > 0 for timing in timed.values())


def test_a_layer_without_nodes_is_timed_by_what_it_is_given() -> None:
    model = Model(lambda self, x: self.rare(x) if x.sum() > 1e6 else self.fc(input=x), False, fc=nn.Linear(8, 8))
    model.rare = nn.Linear(8, 8)
    x = torch.randn(4, 8)
    batches = collect(model.eval(), [x, x + 1e6], 100)
    form = Form(model, batches, True, Report("int8", "cpu"))
    layers = {
        n: Int8Settings(pack(c.weight, c.bias)).layer(c, torch.float32)
        for n, c in form.candidates(batches, (), ())[0].items()
    }
    inners = {torch.float32: form.model}
    timed = {n: form.time_region(Region([n]), inners, layers, batches[0], torch.float32) for n in layers}
    assert timed["fc"].keys() == {"float32", "int8"}
    assert timed["rare"] == {}
