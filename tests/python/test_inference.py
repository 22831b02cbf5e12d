"""InferencePrecisionOptimizer on small trained models: what it returns, keeps, reports and refuses."""

from __future__ import annotations

import concurrent.futures
import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from halfstep import InferencePrecisionOptimizer, int8_calibration, int8_speed_guard
from halfstep.int8_layers import Int8Conv2d, Int8Linear
from inference_cases import Cnn, accuracy, batches, digits, trained_cnn, trained_mlp
from torch import nn

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def optimizer(**options: Any) -> InferencePrecisionOptimizer:
    return InferencePrecisionOptimizer(**{"speed_guard": False, "progress": False, **options})


def int8_layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, (Int8Linear, Int8Conv2d))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
@pytest.mark.parametrize("activations", ["static", "dynamic"])
def test_all_layers_become_int8_and_the_accuracy_stays(device: str, kind: str, activations: str) -> None:
    model = trained_mlp() if kind == "mlp" else trained_cnn()
    before = copy.deepcopy(model.state_dict())
    inference = optimizer(activations=activations, strict=True)
    result = inference.optimize_for_inference(model, batches(), device)
    report = inference.report()
    assert report["result"] == "int8"
    assert report["kept"]
    assert report["drop"] <= report["bound"] <= 0.02
    assert len(int8_layers(result)) == (3 if kind == "mlp" else 5)
    assert accuracy(result, device) >= accuracy(model) - 0.02
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not result.training
    assert report["bytes"]["int8"] < 0.35 * report["bytes"]["float32"]
    text = inference.explain()
    assert "int8" in text
    assert "threshold 2 %: kept" in text


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("target", ["float16", "bfloat16"])
def test_half_targets(device: str, target: str) -> None:
    inference = InferencePrecisionOptimizer(target)
    result = inference.optimize_for_inference(trained_cnn(), batches(), device)
    report = inference.report()
    assert report["result"] == target
    assert report["kept"]
    assert {p.dtype for p in result.parameters()} == {getattr(torch, target)}
    images, _ = digits()
    assert result(images[:4].to(device)).dtype == torch.float32
    assert accuracy(result, device) >= accuracy(trained_cnn()) - 0.02


def test_batches_of_all_kinds() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = copy.deepcopy(trained_mlp())

        def forward(self, *, pixels: torch.Tensor, extra: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
            return {"logits": self.inner(pixels)}

    tensors = batches(labels=False)
    inference = optimizer()
    inference.optimize_for_inference(trained_mlp(), iter(tensors), "cpu")  # read once
    assert inference.report()["proxy"]
    assert "a proxy" in inference.explain()
    mappings = [{"pixels": x, "ignored": 3} for x in tensors]
    result = optimizer(strict=True).optimize_for_inference(Keyword(), mappings, "cpu")
    assert result(pixels=tensors[0])["logits"].shape == (60, 10)
    result = optimizer().optimize_for_inference(trained_mlp(), tensors[0], "cpu")
    assert result(tensors[1]).shape == (60, 10)
    result = optimizer().optimize_for_inference(trained_mlp(), [[x, y.float()] for x, y in batches()], "cpu")
    assert result(tensors[1]).shape == (60, 10)


def test_include_and_exclude() -> None:
    inference = optimizer(include="*", exclude=["head", "fir*"])
    result = inference.optimize_for_inference(trained_mlp(), batches(), "cpu")
    assert int8_layers(result) == ["second"]
    assert inference.report()["left"] == {"first": "in exclude", "head": "in exclude"}
    result = optimizer(exclude=[]).optimize_for_inference(trained_mlp(), batches(), "cpu")
    assert int8_layers(result) == ["first", "second", "head"]
    result = optimizer(include="second").optimize_for_inference(trained_mlp(), batches(), "cpu")
    assert int8_layers(result) == ["second"]
    with pytest.raises(ValueError, match="'hed', which names no layer"):
        optimizer(exclude="hed").optimize_for_inference(trained_mlp(), batches(), "cpu")
    with pytest.raises(ValueError, match="head: in exclude"):
        optimizer(exclude="head", strict=True).optimize_for_inference(trained_mlp(), batches(), "cpu")


@pytest.mark.parametrize("calibrator", ["min_max", "moving_average", "percentile", "entropy", "mse", "auto"])
def test_calibrators(calibrator: str) -> None:
    inference = optimizer(calibrator=calibrator)
    result = inference.optimize_for_inference(trained_cnn(), batches(), "cpu")
    assert inference.report()["calibrator"] == ("min_max" if calibrator == "auto" else calibrator)
    assert accuracy(result) >= accuracy(trained_cnn()) - 0.02


def test_a_metric_of_the_users_own() -> None:
    seen: list[nn.Module] = []

    def score(model: nn.Module) -> float:
        seen.append(model)
        return accuracy(model)

    inference = optimizer(eval_fn=score)
    inference.optimize_for_inference(trained_mlp(), batches(labels=False), "cpu")
    report = inference.report()
    assert report["metric"] == "score"
    assert not report["proxy"]
    assert 2 <= len(seen) <= report["budget"] + 1


def test_nothing_holds_and_the_float_model_comes_back() -> None:
    inference = optimizer(bits=2, accuracy_threshold=0.0, calibrator="min_max")
    with pytest.warns(UserWarning, match="the float model came back"):
        result = inference.optimize_for_inference(trained_mlp(), batches(), "cpu")
    assert int8_layers(result) == []
    assert inference.report()["result"] == "float32"
    images, _ = digits()
    assert torch.equal(result(images), trained_mlp()(images))


def test_too_few_samples_say_how_many_it_takes() -> None:
    with pytest.warns(UserWarning, match="samples are needed"):
        optimizer().optimize_for_inference(trained_mlp(), batches(90), "cpu")


def test_fewer_bits_give_layers_back_one_by_one() -> None:
    """At 3 bits some layers can stay and others cannot; the guard is content with what stays."""
    inference = optimizer(bits=3, accuracy_threshold=0.03)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = inference.optimize_for_inference(trained_cnn(), batches(1797), "cpu")
    report = inference.report()
    assert report["kept"]
    assert report["evaluations"] <= report["budget"]
    assert len(int8_layers(result)) + len(report["given_back"]) == 5


@pytest.mark.parametrize("slower", [False, True])
def test_the_speed_guard_returns_no_slower_model(slower: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8_speed_guard, "loses", lambda mine, rival: slower)
    inference = optimizer(speed_guard=True)
    result = inference.optimize_for_inference(trained_mlp(), batches(), "cpu")
    report = inference.report()
    assert report["milliseconds"]["float32"] > 0
    assert report["kept"]
    assert int8_layers(result) == ([] if slower else ["first", "second", "head"])
    assert (report["result"] == "int8") is not slower
    assert len(report["given_back"]) == (3 if slower else 0)
    for region in report["regions"]:
        assert region["state"] == ("float" if slower else "int8")
        assert bool(region["why"]) is slower
        assert {"float32", "int8"} < region["milliseconds"].keys()


def test_poison_is_given_back_alone() -> None:
    """One channel is made 10^4 larger and its reader's weights as much smaller: in float nothing changes."""
    model = copy.deepcopy(trained_mlp())
    with torch.no_grad():
        model.first.weight[5] *= 1e4
        model.first.bias[5] *= 1e4
        model.second.weight[:, 5] /= 1e4
    plain = optimizer(smooth_quant=False)
    result = plain.optimize_for_inference(model, batches(1797), "cpu")
    assert list(plain.report()["given_back"]) == ["second"]
    assert int8_layers(result) == ["first", "head"]
    auto = optimizer()
    assert int8_layers(auto.optimize_for_inference(model, batches(1797), "cpu")) == ["first", "second", "head"]
    assert [region["layers"] for region in auto.report()["regions"] if region["smoothed"]]
    everywhere = optimizer(smooth_quant=True)
    assert "second" in int8_layers(everywhere.optimize_for_inference(model, batches(1797), "cpu"))


def test_a_stopped_calibration_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained_mlp()
    file = tmp_path / "calibration.pt"

    def stop_after_five(steps: range, _progress: bool | None) -> Iterator[int]:
        yield from steps[:5]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(int8_calibration, "_SAVE_EVERY", 0.0)
        patch.setattr(int8_calibration, "_with_progress", stop_after_five)
        with pytest.raises(KeyboardInterrupt):
            optimizer(calibration_file=file).optimize_for_inference(model, batches(), "cpu")
    state = torch.load(file, weights_only=True)
    assert state["done"] == 5
    resumed, whole = optimizer(calibration_file=file), optimizer()
    images, _ = digits()
    a = resumed.optimize_for_inference(model, batches(), "cpu")(images)
    b = whole.optimize_for_inference(model, batches(), "cpu")(images)
    assert torch.equal(a, b)
    with pytest.raises(ValueError, match="of other parameters"):
        optimizer(calibration_file=file).optimize_for_inference(trained_cnn(), batches(), "cpu")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="is damaged, or none of halfstep's: delete it"):
        optimizer(calibration_file=file).optimize_for_inference(model, batches(), "cpu")


def test_what_stays_float_is_named() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(8, 8, batch_first=True)
            self.conv = nn.Conv2d(1, 4, 3, padding=1, padding_mode="reflect")
            self.hooked = nn.Linear(4, 4)
            self.hooked.register_forward_hook(lambda *_: None)
            self.unused, self.table = nn.Linear(4, 4), nn.Embedding(4, 4)
            self.head = nn.Linear(8 * 8 + 4, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            rows = self.lstm(x.squeeze(1))[0].flatten(1)
            return self.head(torch.cat([rows, self.hooked(self.conv(x).mean((2, 3)))], 1))

    torch.manual_seed(0)
    inference, model = optimizer(), Mixed().eval()
    result = inference.optimize_for_inference(model, batches(labels=False), "cpu")
    left = inference.report()["left"]
    assert "recurrent" in left["lstm"]
    assert "padding_mode" in left["conv"]
    assert "hooks" in left["hooked"]
    assert left["unused"] == left["table"] == "never called during calibration"
    assert int8_layers(result) == ["head"]
    named = {*left, *(name for region in inference.report()["regions"] for name in region["layers"])}
    assert named == {name for name, _ in model.named_children()}


@pytest.mark.parametrize("is_traced", [True, False], ids=["traced", "untraced"])
def test_layers_that_are_read_or_not_called_stay_float_and_strict_sees_them(is_traced: bool) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.tied, self.unused = nn.Linear(64, 32), nn.Linear(32, 32), nn.Embedding(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x.flatten(1))
            if not is_traced and x.sum() > 1e9:
                x = -x
            return torch.relu(self.tied(x)) @ self.tied.weight

    torch.manual_seed(0)
    model, data = Tied().eval(), batches(labels=False)
    inference = optimizer()
    result = inference.optimize_for_inference(model, data, "cpu")
    assert int8_layers(result) == ["first"]
    assert inference.report()["graph"].startswith("traced" if is_traced else "not traced")
    expected = {"tied": "its weight is read by other code", "unused": "never called during calibration"}
    assert inference.report()["left"] == expected
    with pytest.raises(ValueError, match="tied: its weight is read by other code\n  unused: never called"):
        optimizer(strict=True).optimize_for_inference(model, data, "cpu")


@pytest.mark.parametrize("activations", ["static", "dynamic"])
@pytest.mark.parametrize("smooth", [True, False])
def test_convolutions_without_a_batch(activations: str, smooth: bool) -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.image, self.more, self.signal = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 6, 3, padding=1), nn.Conv1d(6, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.relu(self.image(x[0]))
            return self.signal(torch.relu(self.more(y) + y).mean(2)).unsqueeze(0).expand(x.shape[0], -1, -1)

    torch.manual_seed(0)
    model, data = Single().eval(), batches(labels=False)
    inference = optimizer(activations=activations, smooth_quant=smooth, accuracy_threshold=1.0, strict=True)
    result = inference.optimize_for_inference(model, data, "cpu")
    assert inference.report()["graph"] == "traced"
    with torch.no_grad():
        out, expected = result(data[0]), model(data[0])
    assert out.shape == expected.shape
    assert (out - expected).norm() < 0.05 * expected.norm()


def test_bad_calls_are_named() -> None:
    model, data = trained_mlp(), batches()
    for make, error, message in (
        (lambda: InferencePrecisionOptimizer("int4"), ValueError, "target_precision"),
        (lambda: InferencePrecisionOptimizer(calibration_samples=0), ValueError, "calibration_samples"),
        (lambda: InferencePrecisionOptimizer(accuracy_threshold=2), ValueError, "accuracy_threshold is 2"),
        (lambda: InferencePrecisionOptimizer(eval_fn=3), TypeError, "eval_fn"),
        (lambda: InferencePrecisionOptimizer(calibrator="max"), ValueError, "calibrator"),
        (lambda: InferencePrecisionOptimizer(bits=9), ValueError, "bits is 9"),
        (lambda: InferencePrecisionOptimizer(bits=True), TypeError, "bits is True, expected an integer from 2 to 8"),
        (lambda: InferencePrecisionOptimizer(bits=8.0), TypeError, "bits is 8.0"),
        (lambda: InferencePrecisionOptimizer(accuracy_threshold=True), TypeError, "accuracy_threshold is True"),
        (lambda: InferencePrecisionOptimizer(accuracy_threshold="2"), TypeError, "accuracy_threshold is '2'"),
        (lambda: InferencePrecisionOptimizer(accuracy_threshold=float("nan")), ValueError, "accuracy_threshold is nan"),
        (lambda: InferencePrecisionOptimizer(calibration_samples=True), TypeError, "calibration_samples is True"),
        (lambda: InferencePrecisionOptimizer(smooth_quant=1), ValueError, "smooth_quant is 1"),
        (lambda: InferencePrecisionOptimizer(progress=3), TypeError, "progress is 3, expected True, False or None"),
        (lambda: InferencePrecisionOptimizer(calibration_file=3), TypeError, "calibration_file is int"),
        (lambda: InferencePrecisionOptimizer(include=[3]), TypeError, "include"),
        (lambda: InferencePrecisionOptimizer(include=3), TypeError, "include is int"),
        (lambda: InferencePrecisionOptimizer(include=[]), ValueError, "include is empty, so no layer would be int8"),
        (lambda: InferencePrecisionOptimizer(include=iter(())), ValueError, "include is empty"),
        (lambda: InferencePrecisionOptimizer(include=""), ValueError, "include has ''"),
        (lambda: InferencePrecisionOptimizer(exclude=[""]), ValueError, "exclude has ''"),
        (lambda: optimizer().optimize_for_inference(3, data, "cpu"), TypeError, "model is int"),
        (lambda: optimizer().optimize_for_inference(model, [], "cpu"), ValueError, "calibration_data is empty"),
        (lambda: optimizer().optimize_for_inference(model, 3, "cpu"), TypeError, "calibration_data is int"),
        (lambda: optimizer().optimize_for_inference(model, ["a"], "cpu"), TypeError, "without a tensor"),
        (lambda: optimizer().optimize_for_inference(model, data, "meta"), ValueError, "expected cpu or cuda"),
        (lambda: optimizer().report(), RuntimeError, "optimize_for_inference"),
    ):
        with pytest.raises(error, match=message):
            make()
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="target_device='cpu'"):
            optimizer().optimize_for_inference(model, data)


def test_a_training_model_is_left_in_training() -> None:
    model = Cnn().train()
    result = optimizer(accuracy_threshold=1.0).optimize_for_inference(model, batches(), "cpu")
    assert model.training
    assert not result.training


def test_batches_that_give_different_arguments_are_not_traced() -> None:
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = copy.deepcopy(trained_mlp())

        def forward(self, x: torch.Tensor, extra: torch.Tensor | None = None) -> torch.Tensor:
            return self.inner(x if extra is None else x + extra)

    data = [(x, torch.zeros(1)) if i % 2 else (x,) for i, x in enumerate(batches(labels=False))]
    inference = optimizer()
    result = inference.optimize_for_inference(Optional(), data, "cpu")
    assert "different arguments" in inference.report()["graph"]
    images, _ = digits()
    assert torch.equal(result(images), result(images, extra=torch.zeros(1)))


def test_mixed_models_keep_their_type() -> None:
    model = copy.deepcopy(trained_mlp())
    model.norm = nn.LayerNorm(4).to(torch.bfloat16)
    inference = optimizer(speed_guard=True)
    inference.optimize_for_inference(model, batches(), "cpu")
    assert set(inference.report()["milliseconds"]) <= {"float32", "int8"}


class Routed(nn.Module):
    """Gives some rows to a second layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.a(x)).clone()
        chosen = x[:, 0] > 0
        y[chosen] = self.b(y[chosen])
        return y


@pytest.mark.parametrize("form", ["eager", "script"])
def test_a_batch_without_rows_for_a_layer_does_not_stop_the_correction_of_biases(form: str) -> None:
    model = Routed().eval()
    data = [torch.randn(32, 16).abs() for _ in range(9)]
    for batch in data:
        batch[:16, 0] = -1.0
    data[1][:, 0] = -1.0  # which calibrates
    inference = InferencePrecisionOptimizer(accuracy_threshold=0.9, bits=3, speed_guard=False, progress=False)
    inference.optimize_for_inference(torch.jit.script(model) if form == "script" else model, data, "cpu")
    assert inference.report()["bias_correction"] == "biases corrected in 2 layers"


def test_models_are_optimized_in_several_threads() -> None:
    images, _ = digits()
    model = trained_mlp()

    def optimized(_: int) -> torch.Tensor:
        return optimizer().optimize_for_inference(model, batches(), "cpu")(images)

    expected = optimized(0)
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        assert all(torch.equal(each, expected) for each in threads.map(optimized, range(8)))
