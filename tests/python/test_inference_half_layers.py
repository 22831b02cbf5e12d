"""Half targets with include and exclude: types of layers, casts in between, ties, attention, files, refusals."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from halfstep import InferencePrecisionOptimizer
from halfstep.half_model import CastModel
from halfstep.int8_attention import SplitAttention
from inference_cases import Cnn, Mlp, accuracy, batches, trained_cnn, trained_mlp
from int8_file_cases import plan_in, taken_apart, with_plan
from torch import nn


class Tied(nn.Module):
    """Embeds, runs a recurrent layer, and decodes with the table's weights."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.rnn = nn.Embedding(11, 16), nn.LSTM(16, 16, batch_first=True)
        self.blocks = nn.ModuleList(nn.ModuleDict({"mix": nn.Linear(16, 16)}) for _ in range(2))
        self.decode = nn.Linear(16, 11, bias=False)
        self.decode.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.rnn(self.table(ids))[0]
        for block in self.blocks:
            x = x + torch.relu(block["mix"](x))
        return self.decode(x)


def encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)


# model, a batch, and globs that leave something in its type
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[int], torch.Tensor], dict[str, Any]]] = {
    "mlp, a layer left out": (Mlp, lambda n: torch.randn(n, 64), {"exclude": "head"}),
    "mlp, a layer alone": (Mlp, lambda n: torch.randn(n, 64), {"include": "second"}),
    "cnn": (Cnn, lambda n: torch.randn(n, 1, 8, 8), {"exclude": ["norm", "block*"]}),
    "encoder, norms": (encoder, lambda n: torch.randn(n, 5, 16), {"exclude": "*.norm?"}),
    "encoder, a layer": (encoder, lambda n: torch.randn(n, 5, 16), {"exclude": "layers.0"}),
    "encoder, out_proj": (encoder, lambda n: torch.randn(n, 5, 16), {"include": "*.out_proj"}),
    "tied": (Tied, lambda n: torch.randint(11, (n, 7)), {"exclude": ["decode", "blocks.1"]}),
    "tied, in lists": (Tied, lambda n: torch.randint(11, (n, 7)), {"include": ["rnn", "blocks.*.mix"]}),
    "one of a sequence": (
        lambda: nn.Sequential(nn.Linear(8, 8), nn.Softmax(-1), nn.Linear(8, 4)),
        lambda n: torch.randn(n, 8),
        {"exclude": "1"},
    ),
}


def optimized(
    kind: str, target: str = "float16", device: str | torch.device = "cpu"
) -> tuple[InferencePrecisionOptimizer, nn.Module, nn.Module, torch.Tensor]:
    """Return (optimizer, model, result, another batch), the last three on the device."""
    make, batch, globs = CASES[kind]
    torch.manual_seed(0)
    model = make().eval()
    inference = InferencePrecisionOptimizer(target, accuracy_threshold=0.1, speed_guard=False, **globs)
    result = inference.optimize_for_inference(model, [batch(12) for _ in range(3)], device)
    assert inference.report()["result"] == target
    return inference, model.to(device), result, batch(5).to(device)


def of(model: nn.Module, data: Any, target: str = "float16", **globs: Any) -> nn.Module:
    options = {"eval_fn": lambda _model: 1.0, "speed_guard": False, **globs}
    return InferencePrecisionOptimizer(target, **options).optimize_for_inference(model.eval(), data, "cpu")


def types_of(model: nn.Module) -> dict[str, torch.dtype]:
    inner = model.module if isinstance(model, CastModel) else model
    return {name: parameter.dtype for name, parameter in inner.named_parameters(remove_duplicate=False)}


@pytest.mark.parametrize("target", ["float16", "bfloat16"])
def test_excluded_layers_stay_in_the_models_type(target: str) -> None:
    inference = InferencePrecisionOptimizer(target, exclude=["first", "hea?"], speed_guard=False)
    model = trained_mlp()
    result = inference.optimize_for_inference(model, batches(), "cpu")
    half = getattr(torch, target)
    expected = {"first": torch.float32, "second": half, "head": torch.float32}
    assert types_of(result) == {f"{name}.{part}": expected[name] for name in expected for part in ("weight", "bias")}
    assert set(types_of(model).values()) == {torch.float32}
    report = inference.report()
    assert (report["result"], report["carrier"]) == (target, target)
    assert report["left"] == {"first": "in exclude", "head": "in exclude"}
    assert f"2 layers: not {target}, in exclude (first, head)" in inference.explain()
    assert accuracy(result) >= accuracy(model) - 0.02
    with pytest.raises(ValueError, match="strict=True, but layers stay float32:\n  2 layers: in exclude"):
        of(model, batches(), target, exclude=["first", "head"], strict=True)


def test_included_layers_alone_are_half() -> None:
    inference = InferencePrecisionOptimizer("bfloat16", include="b*", speed_guard=False)
    result = inference.optimize_for_inference(trained_cnn(), batches(), "cpu")
    found = types_of(result)
    assert {name for name, dtype in found.items() if dtype == torch.bfloat16} == {
        "block.weight",
        "block_norm.weight",
        "block_norm.bias",
    }
    assert result.block_norm.running_mean.dtype == torch.bfloat16
    assert result.norm.running_mean.dtype == torch.float32
    assert type(result) is Cnn
    assert inference.report()["carrier"] == "float32"
    assert inference.report()["left"]["stem"] == "not in include"
    assert 0.5 < inference.report()["bytes"]["bfloat16"] / inference.report()["bytes"]["float32"] < 1.0


def test_globs_that_name_all_layers_give_what_no_globs_give() -> None:
    images = batches(labels=False)
    plain, named = of(trained_cnn(), images), of(trained_cnn(), images, include="*")
    assert types_of(named) == types_of(plain)
    with torch.no_grad():
        assert torch.equal(named(images[0]), plain(images[0]))


@pytest.mark.usefixtures("no_jit_fuser")
@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("target", ["float16", "bfloat16"])
def test_results_and_files(kind: str, target: str, device: torch.device, tmp_path: Path) -> None:
    inference, model, result, x = optimized(kind, target, device)
    with torch.no_grad():
        out, expected = result(x), model(x)
        assert out.dtype == torch.float32
        assert 0 < (out - expected).norm() < 0.05 * expected.norm()
        inference.save(tmp_path / "m")
        loaded = InferencePrecisionOptimizer.load(tmp_path / "m", CASES[kind][0](), device)
        assert torch.equal(loaded(x), out)
        assert types_of(loaded) == types_of(result)
        inference.save_torchscript(tmp_path / "m.pt")
        assert torch.equal(InferencePrecisionOptimizer.load_torchscript(tmp_path / "m.pt", device)(x), out)
        for copied in (copy.deepcopy(result), pickle.loads(pickle.dumps(result))):
            assert torch.equal(copied(x), out)


def test_a_model_in_two_types_compiles_and_is_exported(device: torch.device) -> None:
    _, _, result, x = optimized("encoder, a layer", device=device)  # masks that are None pass the casts
    with torch.no_grad():
        assert torch.equal(torch.compile(result, backend="eager", fullgraph=True)(x), result(x))
        assert torch.equal(torch.export.export(result, (x,), strict=False).module()(x), result(x))


def test_attention_is_taken_apart_where_its_layers_are_in_two_types() -> None:
    inference, _, result, _ = optimized("encoder, out_proj")
    assert "layers.1.self_attn" in inference.report()["attention"]
    assert isinstance(result.layers[0].self_attn, SplitAttention)
    found = types_of(result)
    assert {name for name in found if found[name] == torch.float16} == {
        f"layers.{place}.self_attn.out_proj.{part}" for place in range(2) for part in ("weight", "bias")
    }
    model = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), nn.Linear(16, 4))
    result = of(model, [torch.randn(4, 5, 16)] * 3, exclude="1")
    assert type(result.module[0]) is nn.TransformerEncoderLayer
    assert types_of(result)["0.self_attn.in_proj_weight"] == torch.float16


def test_parameters_stay_shared_where_the_types_agree() -> None:
    data = [torch.randint(11, (4, 7)) for _ in range(3)]
    model = Tied()
    together = of(model, data, exclude="rnn").module
    assert together.decode.weight is together.table.weight
    assert together.table.weight.dtype == torch.float16
    together = of(model, data, exclude=["table", "decode"]).module
    assert together.decode.weight is together.table.weight
    assert together.table.weight.dtype == torch.float32
    apart = of(model, data, exclude="decode").module
    assert (apart.table.weight.dtype, apart.decode.weight.dtype) == (torch.float16, torch.float32)
    assert torch.equal(apart.decode.weight, model.table.weight)
    assert torch.equal(apart.table.weight, model.table.weight.half())
    assert model.decode.weight is model.table.weight


def test_a_layer_in_another_type_keeps_what_the_code_around_it_asks_for() -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x).unflatten(1, (layer.out_features,)) if isinstance(layer, nn.Linear) else layer(x)
            return x

    seen: list[torch.dtype] = []
    model = Asks()
    model.layers[2].register_forward_hook(lambda _module, args, out: seen.extend([args[0].dtype, out.dtype]))
    result = of(model, [torch.randn(4, 8)] * 3, exclude="layers.2")
    seen.clear()
    result(torch.randn(4, 8))
    assert seen == [torch.float32, torch.float32]
    assert type(result.module.layers[2]) is nn.Linear


def test_models_of_several_types_keep_them_where_they_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)).double()
    model[1].float()
    model[1].register_forward_pre_hook(lambda _module, args: (args[0].float(),))
    model[1].register_forward_hook(lambda _module, _args, out: out.double())
    result = of(model, [torch.randn(4, 8).double()] * 3, exclude="1")
    found = {name: dtype for name, dtype in types_of(result).items() if name.endswith("weight")}
    assert found == {"0.weight": torch.float16, "1.weight": torch.float32, "2.weight": torch.float16}
    assert result(torch.randn(4, 8).double()).dtype == torch.float64


def test_nothing_left_to_cast_is_warned_of() -> None:
    inference = InferencePrecisionOptimizer("float16", exclude="*")
    with pytest.warns(UserWarning, match=r"no layer of the model was left to make float16 \(3 layers: in exclude"):
        result = inference.optimize_for_inference(trained_mlp(), batches(), "cpu")
    assert set(types_of(result).values()) == {torch.float32}
    report = inference.report()
    assert (report["result"], report["carrier"], report["unchanged"]) == ("float32", "float32", True)


class OwnAttention(nn.MultiheadAttention):
    """May compute anything."""


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = OwnAttention(16, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x)[0]


class Reads(nn.Module):
    """Multiplies by a layer's weight, which it does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x) @ self.second.weight


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.factors = nn.Linear(8, 8), nn.ParameterList([torch.ones(8)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x) * self.factors[0]


def called_twice() -> nn.Module:
    layer = nn.Linear(8, 8)
    return nn.Sequential(nn.Sequential(layer, nn.Linear(8, 8)), nn.Sequential(layer))


ROWS, TOKENS = [torch.randn(4, 8) for _ in range(3)], [torch.randn(4, 5, 16) for _ in range(3)]
REFUSED = {
    "no such layer": (Mlp, [torch.randn(4, 64)] * 3, {"exclude": "hed"}, "exclude has 'hed', which names no layer"),
    "no such layer to include": (
        Mlp,
        [torch.randn(4, 64)] * 3,
        {"include": "hed"},
        "include has 'hed', which names no",
    ),
    "attention of its own": (
        Attends,
        TOKENS,
        {"exclude": "*.out_proj"},
        "layer 'attention.out_proj' is in float32, but attention in float16, a OwnAttention that may read weights",
    ),
    "a weight that is read": (
        Reads,
        ROWS,
        {"exclude": "second"},
        "does not run in float16 without the layers that include and exclude leave in float32: RuntimeError: .*dtype",
    ),
    "a list of parameters": (
        Listed,
        ROWS,
        {"exclude": "factors"},
        "layer 'factors' is in float32, but the model itself in float16, and a ParameterList has no call to cast in",
    ),
    "two callers": (
        called_twice,
        ROWS,
        {"exclude": ["1", "0.0"]},
        "layer '0.0' is called by 0 in float16 and by 1 in float32: expected include and exclude to name both or",
    ),
    "a script": (
        lambda: torch.jit.script(nn.Sequential(nn.Linear(8, 8))),
        ROWS,
        {"exclude": "0"},
        "include and exclude are given with target_precision='float16' and a model of TorchScript",
    ),
    "inside of a script": (
        lambda: nn.Sequential(torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))),
        ROWS,
        {"exclude": "0.0"},
        "layer '0.0' is in float32, but 0 in float16, and a script can have no casts before and behind it or within",
    ),
    "a script within": (
        lambda: nn.Sequential(torch.jit.script(nn.Sequential(nn.Linear(8, 8))), nn.Linear(8, 8)),
        ROWS,
        {"include": "0"},
        "layer '0' is in float16, but the model itself in float32, and a script can have no casts before and behind it",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_parted_is_refused(kind: str) -> None:
    make, data, globs, said = REFUSED[kind]
    with pytest.raises(ValueError, match=said):
        of(make(), data, **globs)


def test_a_copy_in_two_types_is_no_model_to_optimize() -> None:
    _, _, result, x = optimized("mlp, a layer left out")
    for target in ("int8", "bfloat16"):
        with pytest.raises(ValueError, match=r"layers that are cast already \(module.head\), expected the float model"):
            of(result, [x] * 3, target)
    with pytest.raises(ValueError, match="include is empty, so no layer would be float16"):
        InferencePrecisionOptimizer("float16", include=[])


def changed(file: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """Change the plan in a file, and its digest with it."""
    plan = plan_in(taken_apart(file)[0])
    change(plan)
    return with_plan(file, file, plan)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda p: p.pop("casts"), "head.weight is F32 .*, expected float16"),
        (lambda p: p.update(casts={}), "head.weight is F32 .*, expected float16"),
        (lambda p: p.update(casts=["head"]), "casts is list"),
        (lambda p: p.update(casts={"head": 3}), "casts: head is int, expected str"),
        (lambda p: p.update(casts={"head": "int8"}), "casts: 'head' is 'int8', expected one of float32"),
        (lambda p: p.update(casts={"head": "bfloat16"}), "casts are between bfloat16, float16, float32, expected two"),
        (lambda p: p.update(casts={"": "float32"}), "casts has '', the model itself"),
        (lambda p: p.update(casts={"hed": "float32"}), "layers in another type than what calls them: .*hed"),
        (lambda p: p["casts"].update(second="float16"), "layers in another type than what calls them: .*second"),
        (lambda p: p.update(attention=["head"]), r"attention that is taken apart: \['head'\] in the file"),
    ],
)
def test_plans_with_other_casts_are_refused(change: Callable[[dict[str, Any]], Any], said: str, tmp_path: Path) -> None:
    inference, _, _, _ = optimized("mlp, a layer left out")
    inference.save(tmp_path / "m")
    with pytest.raises(ValueError, match=said):
        InferencePrecisionOptimizer.load(changed(tmp_path / "m", change), Mlp())


def test_plans_without_casts_are_those_of_before(tmp_path: Path) -> None:
    inference = InferencePrecisionOptimizer("float16", speed_guard=False)
    inference.optimize_for_inference(trained_mlp(), batches(), "cpu")
    inference.save(tmp_path / "m")
    assert "casts" not in plan_in(taken_apart(tmp_path / "m")[0])


def test_casts_beside_int8_layers_are_refused(tmp_path: Path) -> None:
    inference = InferencePrecisionOptimizer(speed_guard=False, progress=False, accuracy_threshold=0.1)
    inference.optimize_for_inference(trained_mlp(), batches(), "cpu")
    inference.save(tmp_path / "m")
    with pytest.raises(ValueError, match="the plan has casts between layers and int8 layers"):
        InferencePrecisionOptimizer.load(changed(tmp_path / "m", lambda p: p.update(casts={"a": "float16"})), Mlp())


class Angle(nn.Module):
    """Takes and returns a float64 beside values of its own type."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x * self.scale, t


@pytest.mark.parametrize("globs", [{"exclude": "turn"}, {"include": "turn"}])
def test_casts_leave_values_of_other_types_alone(globs: dict[str, str]) -> None:
    class Turning(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.turn, self.head = Angle(), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            x, t = self.turn(x, torch.tensor(2.0**24 + 1, dtype=torch.float64))
            self.seen = t
            return self.head(x)

    model = Turning()
    result = of(model, [torch.randn(4, 4) for _ in range(3)], **globs)
    inner = result.module if isinstance(result, CastModel) else result
    result(torch.randn(4, 4))
    assert inner.seen.dtype == torch.float64
    assert inner.seen.item() == 2.0**24 + 1


def test_a_layer_with_buffers_alone_is_named_and_strict_sees_it() -> None:
    class Places(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.randn(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.table

    model, data = nn.Sequential(nn.Linear(4, 4), Places()), [torch.randn(4, 4) for _ in range(3)]
    inference = InferencePrecisionOptimizer("bfloat16", exclude="1", speed_guard=False, accuracy_threshold=0.1)
    inference.optimize_for_inference(model.eval(), data, "cpu")
    assert inference.report()["left"] == {"1": "in exclude"}
    with pytest.raises(ValueError, match="strict=True"):
        of(model, data, "bfloat16", exclude="1", strict=True)


@pytest.mark.parametrize("globs", [{}, {"exclude": "0"}])
def test_files_are_not_loaded_into_layers_of_other_settings(globs: dict[str, str], tmp_path: Path) -> None:
    def made(eps: float) -> nn.Module:
        return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8, eps=eps), nn.Linear(8, 2)).eval()

    inference = InferencePrecisionOptimizer("bfloat16", speed_guard=False, accuracy_threshold=0.1, **globs)
    result, x = inference.optimize_for_inference(made(1e-5), [torch.randn(8, 8)] * 3, "cpu"), torch.randn(3, 8)
    inference.save(tmp_path / "m")
    assert torch.equal(InferencePrecisionOptimizer.load(tmp_path / "m", made(1e-5))(x), result(x))
    with pytest.raises(ValueError, match="the settings of torch's layers differ"):
        InferencePrecisionOptimizer.load(tmp_path / "m", made(1.0))


@pytest.mark.parametrize("target", ["int8", "float16"])
def test_a_layer_of_two_names_is_named_by_both_or_neither(target: str) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8)
            self.seq = nn.Sequential(self.a, nn.Linear(8, 2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.seq(x)

    model, data = Shared().eval(), [torch.randn(10, 8) for _ in range(3)]
    options = {"speed_guard": False, "accuracy_threshold": 1.0, "progress": False}
    for globs in ({"exclude": "seq.0"}, {"include": "seq"}, {"exclude": "a"}):
        inference = InferencePrecisionOptimizer(target, **options, **globs)
        with pytest.raises(ValueError, match="name layer 'a', which is 'seq.0' too, by one of its names alone"):
            inference.optimize_for_inference(model, data, "cpu")
    inference = InferencePrecisionOptimizer(target, **options, exclude=["a", "seq.0"])
    inference.optimize_for_inference(model, data, "cpu")
    assert list(inference.report()["left"]) == ["a"]
