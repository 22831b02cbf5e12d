"""The copy that comes back: which arguments it takes, what it answers with, and of which wrappers it is free."""

from __future__ import annotations

import copy
from collections import OrderedDict, UserDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from halfstep import InferencePrecisionOptimizer
from halfstep import inference as halfstep_inference
from halfstep.half_model import cast_floats
from halfstep.int8_layers import Int8Layer
from halfstep.int8_optimize import Int8Run
from int8_file_cases import carry
from torch import nn


def optimizer(**options: Any) -> InferencePrecisionOptimizer:
    options = {"speed_guard": False, "progress": False, "accuracy_threshold": 1.0, **options}
    return InferencePrecisionOptimizer(**options)


def data_of(*shape: int) -> list[torch.Tensor]:
    return [torch.randn(*shape) for _ in range(3)]


def int8_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, Int8Layer)]


class Optional(nn.Module):
    """Takes more than the calibration gives."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None, *, scale: float = 1.0) -> torch.Tensor:
        x = self.first(torch.relu(x)) * scale
        return self.second(x if mask is None else x * mask)


# ----------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize("carrier", [None, torch.bfloat16])
def test_other_arguments_than_the_traced_ones_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, carrier: torch.dtype | None
) -> None:
    if carrier is not None:
        carry(carrier, monkeypatch)
    inference, model, x = optimizer(speed_guard=carrier is not None), Optional().eval(), torch.randn(4, 16)
    result = inference.optimize_for_inference(model, data_of(8, 16), "cpu")
    assert inference.report()["arguments"] == ["x"]
    assert "it takes the arguments (x); others keep their defaults" in inference.explain()
    inference.save(tmp_path / "file")
    for each in (result, copy.deepcopy(result), InferencePrecisionOptimizer.load(tmp_path / "file", model)):
        for args, kwargs, said in (
            ((x, x), {}, "too many positional arguments"),
            ((x,), {"scale": 2.0}, "unexpected keyword argument 'scale'"),
            ((), {}, "missing a required argument: 'x'"),
        ):
            with pytest.raises(TypeError, match=rf"{said}.* traced with the arguments \(x\); others keep their def"):
                each(*args, **kwargs)
        assert each(x=x).shape == (4, 4)
        with pytest.raises(TypeError) as caught:  # of the operation inside, not of the call
            each("x")
        assert "traced with" not in str(caught.value)


def test_a_model_that_is_not_traced_takes_all_arguments() -> None:
    inference = optimizer(eval_fn=lambda _model: 1.0)
    mixed = [torch.randn(8, 16), (torch.randn(8, 16), torch.ones(8, 16))]
    result = inference.optimize_for_inference(Optional().eval(), mixed, "cpu")
    assert inference.report()["arguments"] is None
    assert "takes the arguments" not in inference.explain()
    assert result(torch.randn(4, 16), scale=2.0).shape == (4, 4)


def test_an_eval_fn_that_fails_on_the_copy_alone_is_told_apart() -> None:
    x = torch.randn(8, 16)

    def scaled(model: nn.Module) -> float:
        return -float(model(x, scale=0.5).square().mean())

    with pytest.raises(RuntimeError, match=r"eval_fn works on the float model but fails on .*\(x\)") as info:
        optimizer(eval_fn=scaled).optimize_for_inference(Optional().eval(), data_of(8, 16), "cpu")
    assert isinstance(info.value.__cause__, TypeError)

    def broken(_model: nn.Module) -> float:
        raise KeyError("broken as it is")

    with pytest.raises(KeyError, match="broken as it is"):
        optimizer(eval_fn=broken).optimize_for_inference(Optional().eval(), data_of(8, 16), "cpu")


def test_the_copy_is_compiled_as_one_graph() -> None:
    result = optimizer().optimize_for_inference(Optional().eval(), data_of(8, 16), "cpu")
    x = torch.randn(8, 16)
    with torch.no_grad():
        assert torch.equal(torch.compile(result, backend="eager", fullgraph=True)(x), result(x))
        assert torch.equal(torch.export.export(result, (x,), strict=False).module()(x), result(x))


# ------------------------------------------------------------------------------------------------------------- outputs


@dataclass
class Plain:
    logits: torch.Tensor
    hidden: tuple[torch.Tensor, ...] | None = None
    loss: torch.Tensor | None = None


@dataclass
class Output(OrderedDict):
    """As transformers' ModelOutput: a dict of the fields that are not None."""

    logits: Any = None
    hidden: Any = None
    loss: Any = None

    def __post_init__(self) -> None:
        for name in ("logits", "hidden", "loss"):
            if getattr(self, name) is not None:
                self[name] = getattr(self, name)


class Answering(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.first, self.second, self.kind = nn.Linear(16, 8), nn.Linear(8, 4), kind

    def forward(self, x: torch.Tensor) -> Any:
        x = torch.relu(self.first(x))
        if self.kind in (Plain, Output):
            return self.kind(logits=self.second(x), hidden=(x,))
        return self.kind([("logits", self.second(x)), ("hidden", (x,))])


@pytest.mark.parametrize("carrier", [None, torch.bfloat16])
@pytest.mark.parametrize("kind", [Plain, Output, OrderedDict, UserDict, dict])
def test_a_traced_model_answers_with_the_same_class(
    monkeypatch: pytest.MonkeyPatch, kind: Any, carrier: torch.dtype | None
) -> None:
    if carrier is not None:
        carry(carrier, monkeypatch)
    inference, model = optimizer(speed_guard=carrier is not None), Answering(kind).eval()
    result = inference.optimize_for_inference(model, data_of(8, 16), "cpu")
    assert inference.report()["graph"] == "traced"
    x = torch.randn(4, 16)
    with torch.no_grad():
        out, expected = result(x), model(x)
    assert type(out) is type(expected) is kind
    if kind is not Plain:
        assert list(out) == list(expected) == ["logits", "hidden"]
    if kind in (Plain, Output):
        assert vars(out).keys() == vars(expected).keys()
        assert out.loss is None
        logits, hidden = out.logits, out.hidden
    else:
        logits, hidden = out["logits"], out["hidden"]
    assert type(hidden) is tuple
    for mine, theirs in ((logits, model.second(torch.relu(model.first(x)))), (hidden[0], torch.relu(model.first(x)))):
        assert mine.dtype == torch.float32
        assert (mine - theirs).norm() < 0.1 * theirs.norm()


def test_a_container_of_another_class_is_a_difference() -> None:
    class Changing(Answering):
        def forward(self, x: torch.Tensor) -> Any:
            y = self.second(self.first(x))
            return Plain(y) if type(y) is torch.Tensor else Output(y)

    inference = optimizer()
    result = inference.optimize_for_inference(Changing(None).eval(), data_of(8, 16), "cpu")
    assert "the outputs differ in structure" in inference.report()["graph"]
    assert type(result(torch.randn(2, 16))) is Plain


def test_casts_of_a_dict_with_fields_change_both() -> None:
    made = cast_floats(Output(torch.ones(2), (torch.ones(2),)), torch.float16)
    assert made.logits is made["logits"]
    assert made.logits.dtype == made.hidden[0].dtype == torch.float16


# ------------------------------------------------------------------------------------------------------------ wrappers


def test_compiled_blocks_become_int8(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def block() -> nn.Module:
        return nn.Sequential(nn.Linear(16, 16), nn.ReLU())

    shared = torch.compile(block())
    model = nn.Sequential(shared, nn.Sequential(torch.compile(block()), nn.DataParallel(block())), shared, block())
    model[3].compile()
    model.eval()
    plain = nn.Sequential(
        shared._orig_mod, nn.Sequential(model[1][0]._orig_mod, model[1][1].module), shared._orig_mod, model[3]
    )
    before, x = list(model.state_dict()), torch.randn(4, 16)
    seen: list[bool] = []

    def watched(*args: Any) -> Int8Run:
        seen.append(args[4].compiled)
        return Int8Run(*args)

    monkeypatch.setattr(halfstep_inference, "Int8Run", watched)
    inference = optimizer(calibration_file=tmp_path / "calibration")
    result = inference.optimize_for_inference(model, data_of(8, 16), "cpu")
    report = inference.report()
    assert report["graph"] == "traced"
    assert sorted(int8_names(result)) == ["0.0", "1.0.0", "1.1.0", "3.0"]
    assert not report["left"]
    assert any("stood around 0, 2, 1.0, 1.1: they are not in" in note for note in report["notes"])
    assert seen == [True]
    assert list(model.state_dict()) == before
    inference.save(tmp_path / "file")
    with torch.no_grad():
        for code in (model, plain):
            assert torch.equal(InferencePrecisionOptimizer.load(tmp_path / "file", code)(x), result(x))
    optimizer().optimize_for_inference(plain, data_of(8, 16), "cpu")
    assert seen == [True, True]  # plain[3] is compiled in place


def test_a_data_parallel_model_is_taken_out() -> None:
    inference = optimizer()
    result = inference.optimize_for_inference(nn.DataParallel(Optional().eval()), data_of(8, 16), "cpu")
    assert sorted(int8_names(result)) == ["first", "second"]
    assert inference.report()["graph"] == "traced"


def test_an_int8_copy_is_no_model_to_optimize() -> None:
    result = optimizer().optimize_for_inference(Optional().eval(), data_of(8, 16), "cpu")
    for target in ("int8", "bfloat16"):
        with pytest.raises(ValueError, match=r"layers that are int8 already \(first, second\)"):
            InferencePrecisionOptimizer(target).optimize_for_inference(result, data_of(8, 16), "cpu")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: nn.Sequential(nn.Linear(16, 8), nn.LazyLinear(4)), "layer '1' is a LazyLinear without weights"),
        (lambda: nn.Sequential(nn.Linear(16, 8), nn.LazyBatchNorm1d(affine=False)), "layer '1' is a LazyBatchNorm1d"),
        (lambda: nn.LazyLinear(4), "model is a LazyLinear without weights, .*: call the model once before"),
    ],
)
@pytest.mark.parametrize("target", ["int8", "bfloat16"])
def test_lazy_layers_without_weights_are_named(
    make: Callable[[], nn.Module], said: str, target: str, tmp_path: Path
) -> None:
    model = make()
    options = {"calibration_file": tmp_path / "calibration"} if target == "int8" else {}
    inference = optimizer(target_precision=target, **options)
    with pytest.raises(ValueError, match=said):
        inference.optimize_for_inference(model, data_of(8, 16), "cpu")
    model(torch.randn(2, 16))
    inference.optimize_for_inference(model, data_of(8, 16), "cpu")


def test_old_weight_norm_is_called_parametrized(tmp_path: Path) -> None:
    model = nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(16, 16)), nn.Linear(16, 4)).eval()
    inference, x = optimizer(), torch.randn(4, 16)
    result = inference.optimize_for_inference(model, data_of(8, 16), "cpu")
    inference.save(tmp_path / "file")
    with torch.no_grad():
        assert torch.equal(InferencePrecisionOptimizer.load(tmp_path / "file", model)(x), result(x))
    assert inference.report()["left"] == {"0": "it is parametrized (torch.nn.utils)"}
