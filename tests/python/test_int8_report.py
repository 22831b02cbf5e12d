"""What reports of int8 optimizations say: weights outside of layers, attention, values that are not finite, times."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from halfstep import InferencePrecisionOptimizer
from halfstep.int8_report import RegionReport, Report, grouped
from halfstep.int8_verdict import Verdict
from inference_cases import batches, digits, trained_mlp
from torch import nn

# Never destroyed: TorchScript knows functions by their addresses, and would take whatever comes to lie at the address
# of a freed one for the operation.
LIBRARY = torch.library.Library("report_test", "DEF")
LIBRARY.define("unknown(Tensor x, Tensor w) -> Tensor")
LIBRARY.impl("unknown", lambda x, w: x @ w, "CompositeExplicitAutograd")

Parameters = dict[str, nn.Module | nn.Parameter | torch.Tensor]


def optimized(model: nn.Module, data: Any, **options: Any) -> InferencePrecisionOptimizer:
    options = {"speed_guard": False, "progress": False, "accuracy_threshold": 1.0, **options}
    inference = InferencePrecisionOptimizer(**options)
    inference.optimize_for_inference(model.eval(), data, "cpu")
    return inference


def random(*shape: int) -> nn.Parameter:
    return nn.Parameter(0.2 * torch.randn(*shape))


class Own(nn.Module):
    """A forward with parameters of its own before a layer; control flow in it makes it one that is not traced."""

    def __init__(self, function: Callable[[Any, torch.Tensor], torch.Tensor], is_traced: bool, parts: Parameters):
        super().__init__()
        self.function, self.is_traced, self.head = function, is_traced, nn.Linear(16, 4)
        for name, part in parts.items():
            self.register_buffer(name, part) if type(part) is torch.Tensor else setattr(self, name, part)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.is_traced and x.sum() > 1e9:
            x = x + 1
        return self.head(self.function(self, x))


def ids_of(x: torch.Tensor) -> torch.Tensor:
    return (x[..., 0] > 0).long()


def standardized(weight: torch.Tensor) -> torch.Tensor:
    return (weight - weight.mean(1, keepdim=True)) / weight.std(1, keepdim=True)


PRODUCTS: dict[str, tuple[Callable[[Any, torch.Tensor], torch.Tensor], Callable[[], Parameters], list[str]]] = {
    "linear": (lambda m, x: F.linear(x, m.w), lambda: {"w": random(16, 16)}, ["w"]),
    "matmul": (lambda m, x: x @ m.w.t(), lambda: {"w": random(16, 16)}, ["w"]),
    "einsum": (lambda m, x: torch.einsum("bti,oi->bto", x, m.w), lambda: {"w": random(16, 16)}, ["w"]),
    "addmm": (
        lambda m, x: torch.addmm(m.b, x.flatten(0, 1), m.w).unflatten(0, (-1, 6)),
        lambda: {"w": random(16, 16), "b": random(1, 16)},
        ["w"],
    ),
    "convolution": (
        lambda m, x: F.conv1d(x.transpose(1, 2), m.w, padding=1).transpose(1, 2),
        lambda: {"w": random(16, 16, 3)},
        ["w"],
    ),
    "embedding": (lambda m, x: x + F.embedding(ids_of(x), m.w), lambda: {"w": random(2, 16)}, ["w"]),
    "rows": (lambda m, x: x + m.w[ids_of(x)], lambda: {"w": random(2, 16)}, ["w"]),
    "low rank": (lambda m, x: F.linear(x, m.b @ m.a), lambda: {"a": random(2, 16), "b": random(16, 2)}, ["a", "b"]),
    "standardized": (lambda m, x: F.linear(x, standardized(m.w)), lambda: {"w": random(16, 16)}, ["w"]),
    "list": (
        lambda m, x: F.linear(F.linear(x, m.ws[0]), m.ws[1]),
        lambda: {"ws": nn.ParameterList([random(16, 16), random(16, 16)])},
        ["ws.0", "ws.1"],
    ),
    "buffer": (lambda m, x: F.linear(x, m.w), lambda: {"w": random(16, 16).detach().clone()}, ["w"]),
    "attention": (
        lambda m, x: F.scaled_dot_product_attention(
            x[:, None], m.w.expand(x.shape[0], -1, -1, -1), m.v.expand(x.shape[0], -1, -1, -1)
        )[:, 0],
        lambda: {"w": random(1, 1, 6, 16), "v": random(1, 1, 6, 16)},
        ["v", "w"],
    ),
    "distances": (lambda m, x: torch.cdist(x, m.w), lambda: {"w": random(16, 16)}, ["w"]),
    "scripted": (
        lambda m, x: m.part(x),
        lambda: {"part": torch.jit.script(nn.Sequential(nn.Linear(16, 16)))},
        ["part.0.weight"],
    ),
}
ADDITIONS: dict[str, tuple[Callable[[Any, torch.Tensor], torch.Tensor], Callable[[], Parameters]]] = {
    "positions": (lambda m, x: x + m.w[:, : x.shape[1]], lambda: {"w": random(1, 9, 16)}),
    "positions by number": (lambda m, x: x + m.w[torch.arange(x.shape[1])], lambda: {"w": random(9, 16)}),
    "class token": (
        lambda m, x: m.mix(torch.cat([m.w.expand(x.shape[0], -1, -1), x], 1)),
        lambda: {"w": random(1, 1, 16), "mix": nn.Linear(16, 16)},
    ),
    "gain": (lambda m, x: m.w * x + m.b, lambda: {"w": random(1, 16), "b": random(6, 16)}),
    "norm": (lambda m, x: F.layer_norm(x, (6, 16), m.w, m.b), lambda: {"w": random(6, 16), "b": random(6, 16)}),
    "relative positions": (
        lambda m, x: torch.softmax(x @ x.transpose(1, 2) + m.w[m.places][..., 0], -1) @ x,
        lambda: {"w": random(11, 1), "places": torch.arange(6)[:, None] - torch.arange(6) + 5},
    ),
    "unused": (lambda m, x: x, lambda: {"w": random(6, 16)}),
    "buffer": (lambda m, x: x + m.w, lambda: {"w": random(6, 16).detach().clone()}),
    "mask": (
        lambda m, x: F.scaled_dot_product_attention(x, x, x, attn_mask=m.w),
        lambda: {"w": torch.zeros(6, 6).masked_fill(torch.ones(6, 6).triu(1).bool(), -1e9)},
    ),
}
TRACED = pytest.mark.parametrize("is_traced", [True, False], ids=["traced", "untraced"])


@TRACED
@pytest.mark.parametrize("kind", PRODUCTS)
def test_parameters_in_products_are_named_and_strict_sees_them(kind: str, is_traced: bool) -> None:
    function, parts, expected = PRODUCTS[kind]
    torch.manual_seed(0)
    model, data = Own(function, is_traced, parts()), [torch.randn(4, 6, 16) for _ in range(4)]
    inference = optimized(model, data)
    report = inference.report()
    assert report["graph"].startswith("traced" if is_traced else "not traced")
    assert sorted(report["left"]) == expected
    words = "looks up rows" if kind in ("embedding", "rows") else "by which the model multiplies"
    assert all(words in reason for reason in report["left"].values())
    assert expected[0] in inference.explain()
    assert [region["layers"] for region in report["regions"]] == [["head"]]
    with pytest.raises(ValueError, match=f"strict=True, but layers stay float:\n.*{expected[0]}"):
        optimized(model, data, strict=True)


@TRACED
@pytest.mark.parametrize("kind", ADDITIONS)
def test_parameters_that_are_added_are_no_weights(kind: str, is_traced: bool) -> None:
    torch.manual_seed(0)
    function, parts = ADDITIONS[kind]
    data = [torch.randn(4, 6, 16) for _ in range(4)]
    assert optimized(Own(function, is_traced, parts()), data, strict=True).report()["left"] == {}


def test_a_parameter_that_a_layer_shares_and_one_that_an_unknown_operation_takes() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 16)
            self.tied, self.other = self.layer.weight, random(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(self.layer(x), self.tied) + torch.ops.report_test.unknown(x, self.other)

    torch.manual_seed(0)
    inference = optimized(Tied(), [torch.randn(4, 16) for _ in range(4)])
    left = inference.report()["left"]
    assert left.keys() == {"tied", "other"}
    assert "multiplies" in left["tied"]
    assert "report_test::unknown" in left["other"]
    assert [region["layers"] for region in inference.report()["regions"]] == [["layer"]]


def test_globs_name_parameters_by_their_modules() -> None:
    model = nn.Sequential(Own(PRODUCTS["linear"][0], True, PRODUCTS["linear"][1]()), nn.Linear(4, 4))
    report = optimized(model, [torch.randn(4, 6, 16) for _ in range(4)], exclude="0").report()
    assert report["left"] == {"0.head": "in exclude", "0.w": "in exclude"}


# ------------------------------------------------------------------------------------------------------- attention


def words(size: int = 16) -> list[torch.Tensor]:
    return [torch.randn(4, 6, size) for _ in range(4)]


def test_attention_as_the_model_itself() -> None:
    torch.manual_seed(0)
    inference = optimized(nn.MultiheadAttention(16, 2, batch_first=True), [(x, x, x) for x in words()])
    text, report = inference.explain(), inference.report()
    assert report["attention"] == [""]
    assert "attention taken apart into layers: the model itself" in text
    assert report["graph"] == "traced"
    assert [region["layers"] for region in report["regions"]] == [["q_proj"], ["k_proj"], ["v_proj"], ["out_proj"]]


def test_an_encoder_is_traced_and_nothing_is_left_whole() -> None:
    torch.manual_seed(0)
    inference = optimized(nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2), words())
    assert inference.report()["graph"] == "traced"
    lines = inference.explain().splitlines()
    assert "attention taken apart into layers: layers.0.self_attn, layers.1.self_attn" in lines


def test_a_transformer_is_no_single_layer() -> None:
    torch.manual_seed(0)
    inference = optimized(nn.Transformer(16, 2, 1, 1, 32, batch_first=True), [(x, x) for x in words()])
    assert inference.report()["graph"] == "not traced (nn.Transformer is called whole): layers are taken one by one"
    assert inference.report()["left"] == {}


def test_a_model_with_encoder_and_decoder() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
            self.decoder = nn.TransformerDecoderLayer(16, 2, 32, batch_first=True)
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.decoder(x, self.encoder(x))
            return self.attention(y, y, y, need_weights=False)[0]

    torch.manual_seed(0)
    inference = optimized(Both(), words())
    expected = "traced; decoder: left whole, as modules of torch.nn are (TransformerDecoderLayer)"
    assert inference.report()["graph"] == expected
    names = ["encoder.self_attn", "decoder.self_attn", "decoder.multihead_attn", "attention"]
    assert inference.report()["attention"] == names
    assert ": , " not in inference.explain()


def test_what_is_left_of_a_model_that_is_one_layer_has_a_name() -> None:
    class Special(nn.MultiheadAttention):
        pass

    torch.manual_seed(0)
    inference = optimized(Special(16, 2, batch_first=True), [(x, x, x) for x in words()])
    assert "\n  the model itself: float, its class Special" in inference.explain()
    assert inference.report()["attention"] == []


# --------------------------------------------------------------------------------------- values, reasons and times


def test_values_that_are_not_finite_are_counted_by_layer() -> None:
    data = [batch.clone() for batch in batches(labels=False)]
    data[0][3, 0, 1, :4] = float("nan")
    data[1][5, 0, 0, 2] = float("inf")
    inference = optimized(copy.deepcopy(trained_mlp()), data)
    report = inference.report()
    # Two images of the calibration hold them; behind the first layer each value of those is infinite or NaN.
    seen: dict[str, int] = {}
    model = copy.deepcopy(trained_mlp())
    for name, layer in model.named_children():
        layer.register_forward_pre_hook(
            lambda _m, args, name=name: seen.update({name: seen.get(name, 0) + int((~args[0].isfinite()).sum())})
        )
    with torch.no_grad():
        for number, batch in enumerate(data):
            if number % 3 != 2:
                model(batch)
    assert seen["first"] == 5
    assert report["nonfinite"] == seen
    assert f"first (5), second ({seen['second']})" in inference.explain()
    assert report["warnings"] == []
    assert optimized(trained_mlp(), batches()).report()["nonfinite"] == {}


@pytest.mark.parametrize("target", ["int8", "bfloat16"])
def test_a_batch_without_a_finite_value_is_warned_of(target: str) -> None:
    data = batches(600)
    data[3] = (torch.full_like(data[3][0], float("nan")), data[3][1])
    with pytest.warns(UserWarning, match="batch 3 of calibration_data has no finite value in argument 0"):
        inference = optimized(trained_mlp(), data, target_precision=target)
    assert "batch 3 of calibration_data" in inference.explain()


def test_equal_reasons_stand_once() -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(12)), nn.Linear(8, 2))
    inference = optimized(model, [torch.randn(8, 8) for _ in range(4)], include="12")
    assert len(inference.report()["left"]) == 12
    text = inference.explain()
    assert "\n  12 layers: float, not in include (0, 1, 2, 3, 4, 5, 6, 7 and 4 more)" in text
    assert text.count("not in include") == 1
    names = ", ".join(map(str, range(12)))
    with pytest.raises(ValueError, match=rf"float:\n  12 layers: not in include \({names}\)"):
        optimized(model, [torch.randn(8, 8) for _ in range(4)], include="12", strict=True)
    assert grouped({"a": "x", "b": "y", "c": "x"}) == ["2 layers: x (a, c)", "b: y"]


def test_regions_keep_their_numbers_beside_a_common_reason() -> None:
    report = Report("int8", "cpu")
    report.regions = [RegionReport([name], "float", why="slow", error=0.01) for name in "ab"]
    report.regions.append(RegionReport(["c"], "float", why="other", error=0.02))
    lines = str(report).splitlines()[1:]
    expected = ["  a: float; noise 1 %", "  b: float; noise 1 %", "  c: float; noise 2 %; other"]
    assert lines == [*expected, "  2 layers: float, slow (a, b)"]


def test_regions_say_which_half_type_was_timed() -> None:
    inference = optimized(trained_mlp(), batches(), speed_guard=True)
    report = inference.report()
    assert {"float32", "bfloat16", "float16"} <= report["milliseconds"].keys()
    slower, faster = re.fullmatch(
        r"regions are not timed in (\w+): the whole model is faster in (\w+)", report["halves"]
    ).groups()
    assert {slower, faster} == {"bfloat16", "float16"}
    assert report["halves"] in inference.explain()
    timed = [region["milliseconds"].keys() for region in report["regions"]]
    assert timed == [{"float32", faster, "int8"}] * len(timed)


def test_a_half_type_that_overflows_is_named() -> None:
    model = copy.deepcopy(trained_mlp())
    with torch.no_grad():
        model.first.weight *= 1e6
        model.first.bias *= 1e6
        model.second.weight /= 1e6
    notes = optimized(model, batches(), speed_guard=True).report()["notes"]
    assert "float16 is not used: its outputs are not finite" in notes


# ------------------------------------------------------------------------------------------------------ the verdict


def regression() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 1))


def squared_errors(model: nn.Module) -> torch.Tensor:
    x = torch.linspace(-1.0, 1.0, 80).reshape(10, 8)
    return -(100 * (model(x).flatten() - 0.3).square())


def test_drops_of_a_score_are_plain_numbers() -> None:
    data = [torch.randn(20, 8) for _ in range(3)]
    for eval_fn in (squared_errors, lambda model: squared_errors(model).mean()):
        inference = optimized(regression(), data, eval_fn=eval_fn, accuracy_threshold=25.0)
        line = inference.explain().splitlines()[1]
        assert line.endswith("threshold 25: kept"), line
        assert "drop" in line
        assert "%" not in line.replace("95 % bound", "")
        assert inference.report()["is_share"] is False
    inference = optimized(regression(), data, eval_fn=lambda model: [1.0] * 200)
    assert inference.explain().splitlines()[1].endswith("threshold 100 %: kept")
    for target in ("int8", "bfloat16"):
        with pytest.raises(ValueError, match=r"accuracy_threshold is 2, .* \(with an eval_fn any from 0"):
            InferencePrecisionOptimizer(target, accuracy_threshold=2)
    for bad in (-0.1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="accuracy_threshold is .*, expected a finite number from 0"):
            InferencePrecisionOptimizer(accuracy_threshold=bad, eval_fn=squared_errors)


def test_scores_of_both_models_stand_beside_the_drop() -> None:
    images, labels = digits()

    def accuracy_of(model: nn.Module, first: int, last: int) -> float:
        with torch.no_grad():
            return float((model(images[first:last]).argmax(1) == labels[first:last]).float().mean())

    inference = InferencePrecisionOptimizer(progress=False, speed_guard=False, calibration_samples=600, bits=4)
    small = inference.optimize_for_inference(trained_mlp(), batches(600), "cpu")
    report, line = inference.report(), inference.explain().splitlines()[1]
    guard = report["samples"]["guard"]
    assert report["judged"] == guard
    judged = (120, 300, 480)  # every third batch of 60
    before, after = (sum(accuracy_of(model, i, i + 60) for i in judged) / 3 for model in (trained_mlp(), small))
    assert report["float_score"] == pytest.approx(before)
    assert report["score"] == pytest.approx(after)
    expected = " -> ".join(dict.fromkeys(f"{100 * each:.4g} %" for each in (before, after)))
    assert line.startswith(f"accuracy (top-1 of {guard} samples): {expected}, "), line

    data = [torch.randn(20, 8) for _ in range(3)]
    inference = optimized(regression(), data, eval_fn=squared_errors, accuracy_threshold=25.0)
    report = inference.report()
    assert report["float_score"] == pytest.approx(float(squared_errors(regression()).mean()), rel=1e-5)
    assert report["judged"] == 10
    proxy = optimized(regression(), data, accuracy_threshold=1.0)
    assert (proxy.report()["float_score"], proxy.report()["score"]) == (None, None)


def test_the_result_is_compared_with_the_float_model() -> None:
    report = Report("int8", "cpu", result="int8", bytes={"float32": 4000, "int8": 1100})
    assert "compared with float32: 0.28 of its bytes" in str(report).splitlines()
    report.milliseconds = {"float32": 8.0, "bfloat16": 5.0, "int8": 2.0}
    assert "compared with float32: 0.25 of its time, 0.28 of its bytes" in str(report).splitlines()
    report.result, report.bytes = "float32", {"float32": 4000}
    assert "compared" not in str(report)


def test_the_batch_whose_times_these_are_has_its_size() -> None:
    inference = optimized(trained_mlp(), batches(), speed_guard=True)
    size = inference.report()["timed_samples"]
    assert size == len(batches()[0][0])
    assert f"whole model, batches of {size}: float32 " in inference.explain()


def test_scores_that_are_all_right_need_as_many_samples_as_top1() -> None:
    data = [torch.randn(20, 8) for _ in range(3)]
    with pytest.warns(UserWarning, match="scores on 20 samples cannot prove .* 0.02: 183 samples are needed"):
        inference = optimized(regression(), data, eval_fn=lambda model: [1.0] * 20, accuracy_threshold=0.02)
    report = inference.report()
    assert (report["result"], report["unchanged"]) == ("float32", True)
    assert inference.explain().splitlines()[1] == (
        "accuracy (scores of 20 samples): 100 %, no drop (the float model, unchanged)"
    )


def test_decisions_of_few_samples_are_not_kept() -> None:
    class Decides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.layer(x) > 0.0).float() * 0.0 + 1.0

    with pytest.warns(UserWarning, match="nothing differs in 20 samples, which proves a bound of 0.139"):
        inference = optimized(Decides(), [torch.randn(20, 8) for _ in range(3)], accuracy_threshold=0.05)
    assert inference.report()["unchanged"]
    assert inference.report()["evaluations"] == 1
    assert not optimized(Decides(), [torch.randn(20, 8) for _ in range(3)], accuracy_threshold=0.2).report()[
        "unchanged"
    ]


@pytest.mark.parametrize("speed_guard", [False, True])
def test_nothing_left_to_quantize_is_warned_of(speed_guard: bool) -> None:
    with pytest.warns(UserWarning, match=r"no layer of the model was left to make int8 \(2 layers: in exclude \(0, 1"):
        inference = optimized(
            regression(), [torch.randn(20, 8) for _ in range(3)], exclude="*", speed_guard=speed_guard
        )
    if not speed_guard:
        assert "no drop (the float model, unchanged)" in inference.explain().splitlines()[1]


class Masked(nn.Module):
    """Divides by the number of values that are not 0; of a row of zeros it gives NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) / (x != 0).sum(1, keepdim=True) * (x[:, :1] / x[:, :1])


def test_samples_with_nan_do_not_decide_of_the_others() -> None:
    torch.manual_seed(0)
    data = [torch.randn(20, 8) for _ in range(6)]
    data[0][3] = data[2][4] = data[5][:2] = 0.0
    for target in ("int8", "bfloat16"):
        inference = optimized(Masked(), data, target_precision=target, accuracy_threshold=0.02)
        report = inference.report()
        assert (report["result"], report["kept"]) == (target, True)
        said = "3 of 40 samples to judge by are left out: the float model's outputs hold NaN or infinity for them"
        assert said in report["notes"]
        if target == "int8":
            assert report["graph"] == "traced"
            assert 0 < report["regions"][0]["error"] < 0.01
    data = [torch.zeros(20, 8) for _ in range(3)]
    with pytest.raises(
        ValueError, match="outputs hold NaN or infinity for 20 of 20 samples to judge by, expected some"
    ):
        optimized(Masked(), data)


def test_a_drop_that_is_no_number_says_why() -> None:
    report = Report("int8", "cpu", metric="agreement", drop=0.0, bound=0.0, kept=True, unchanged=True)
    report.everywhere_was(Verdict(math.inf, math.inf, 20, "agreement", note="the outputs hold NaN or infinity"))
    lines = str(report).splitlines()
    assert lines[2] == "int8 in every layer: the outputs hold NaN or infinity"
    assert "inf " not in str(report)
    assert Verdict(math.inf, math.inf, 20, "agreement", note="NaN").in_words() == "NaN"
    assert Verdict(0.1, math.inf, 1, "agreement").in_words() == "the drop is 0.1, and it has no bound"
    assert Verdict(0.1, 0.2, 1, "agreement").in_words() == "the drop is 0.1, its bound 0.2"


class Lengths(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        return self.layer(x) if lengths is None else self.layer(x) * lengths[:, None]


NOTES = {
    "an argument": (
        Lengths,
        lambda x: (x, torch.arange(20) % 4 + 1),
        "the integers [batch] at the end of the batches were passed to forward as `lengths`",
    ),
    "float labels": (regression, lambda x: (x, torch.rand(20)), "(place 1: float32 [batch])"),
    "one-hot labels": (regression, lambda x: [x, torch.eye(4)[torch.arange(20) % 4]], "(place 1: float32 [batch, 4])"),
    "labels in a mapping": (Lengths, lambda x: {"x": x, "labels": torch.rand(20, 1)}, "(labels: float32 [batch, 1])"),
    "labels of no classes": (regression, lambda x: (x, torch.arange(20) % 4), "batches have labels, but not one class"),
}


@pytest.mark.parametrize("kind", NOTES)
@pytest.mark.parametrize("target", ["int8", "bfloat16"])
def test_why_outputs_are_compared(kind: str, target: str) -> None:
    make, batch, said = NOTES[kind]
    inference = optimized(make(), [batch(torch.randn(20, 8)) for _ in range(3)], target_precision=target)
    assert inference.report()["proxy"]
    (note,) = (note for note in inference.report()["notes"] if "outputs are compared" in note)
    assert said in note
    with_score = optimized(
        make(), [batch(torch.randn(20, 8)) for _ in range(3)], target_precision=target, eval_fn=lambda model: 1.0
    )
    assert not any("outputs are compared" in note for note in with_score.report()["notes"])
