"""What the accuracy guard measures of a model, against NumPy and SciPy."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from halfstep.int8_metric import Verdict, choose_metric
from scipy import stats
from torch import nn


def call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, dict):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


class Lookup(nn.Module):
    """Answers with what it was told, in turns."""

    def __init__(self, *answers: Any) -> None:
        super().__init__()
        self.answers = answers
        self.calls: list[tuple] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((args, kwargs))
        return self.answers[(len(self.calls) - 1) % len(self.answers)]


def logits(right: list[bool], labels: torch.Tensor, classes: int = 5) -> torch.Tensor:
    """Logits whose largest is the label's where `right` says so."""
    answers = torch.where(torch.tensor(right), labels, (labels + 1) % classes)
    return 3 * nn.functional.one_hot(answers, classes).float() + torch.rand(len(right), classes)


def bound_of_counts(lost: int, gained: int, samples: int) -> float:
    high = stats.binomtest(lost, samples).proportion_ci(0.95, method="exact").high
    low = stats.binomtest(gained, samples).proportion_ci(0.95, method="exact").low
    return high - low


@pytest.mark.parametrize("kind", [tuple, list])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_top1_over_batches(kind, dtype) -> None:
    labels = [torch.randint(5, (40,)), torch.randint(5, (30,))]
    before = [[True] * 30 + [False] * 10, [True] * 30]
    after = [[False] * 4 + [True] * 28 + [False] * 8, [False] * 1 + [True] * 29]
    batches = [kind([torch.rand(len(each), 3), each.to(dtype)]) for each in labels]
    metric = choose_metric(None, batches, call, Lookup(*(map(logits, before, labels))))
    assert (metric.kind, metric.samples, metric.proxy) == ("top-1", 70, False)
    assert metric.float_score == pytest.approx(60 / 70)
    assert [each.shape for each in metric.inputs] == [(40, 3), (30, 3)]
    changed = Lookup(*(map(logits, after, labels)))
    verdict = metric.judge(changed)
    assert all(len(args) == 1 and not kwargs for args, kwargs in changed.calls), "labels are no input"
    assert verdict.drop == pytest.approx((5 - 2) / 70)
    assert verdict.bound == pytest.approx(bound_of_counts(5, 2, 70))
    assert (verdict.samples, verdict.kind, verdict.proxy) == (70, "top-1", False)
    assert verdict.note == "5 of 70 samples lost, 2 gained"
    assert verdict.kept(verdict.bound)
    assert not verdict.kept(verdict.drop)
    same = metric.judge(Lookup(*(map(logits, before, labels))))
    assert same.drop == 0
    assert same.bound == pytest.approx(1 - 0.025 ** (1 / 70))


@dataclass
class Output:
    logits: torch.Tensor
    hidden: torch.Tensor


def test_logits_are_found_in_outputs() -> None:
    labels = torch.randint(5, (20,))
    right = logits([True] * 20, labels)
    wrong = logits([True] * 15 + [False] * 5, labels)
    other = torch.rand(20, 3)
    for wrap in (
        lambda x: (x, other),
        lambda x: [x],
        lambda x: {"hidden": other, "logits": x},
        lambda x: OrderedDict(logits=x),
        lambda x: Output(x, other),
    ):
        metric = choose_metric(None, [(torch.rand(20, 2), labels)], call, Lookup(wrap(right)))
        assert metric.kind == "top-1"
        assert metric.judge(Lookup(wrap(wrong))).drop == 0.25


def test_several_inputs_before_labels() -> None:
    labels = torch.randint(5, (8,))
    model = Lookup(logits([True] * 8, labels))
    metric = choose_metric(None, [(torch.rand(8, 2), {"mask": torch.ones(8)}, labels)], call, model)
    assert metric.kind == "top-1"
    assert len(model.calls[0][0]) == 2
    inputs = {"x": torch.rand(8, 2), "mask": None}
    model = Lookup(logits([True] * 8, labels))
    assert choose_metric(None, [(inputs, labels)], call, model).kind == "top-1"
    assert model.calls[0][1].keys() == inputs.keys(), "one mapping beside labels is keyword arguments"


@pytest.mark.parametrize(
    ("last", "output"),
    [
        (torch.zeros(8), torch.rand(8, 5)),  # no integers
        (torch.zeros(8, 2, dtype=torch.long), torch.rand(8, 5)),  # not [batch]
        (torch.zeros(7, dtype=torch.long), torch.rand(8, 5)),
        (torch.full((8,), 5), torch.rand(8, 5)),  # not 0 .. 4
        (torch.full((8,), -100), torch.rand(8, 5)),
        (torch.zeros(8, dtype=torch.bool), torch.rand(8, 5)),
        (torch.zeros(8, dtype=torch.long), torch.rand(8, 5, 4)),
        (torch.zeros(8, dtype=torch.long), torch.rand(4, 5)),
        (torch.zeros(8, dtype=torch.long), torch.rand(8)),
        ("text", torch.rand(8, 5)),
    ],
)
def test_what_is_no_label_is_an_input(last: Any, output: torch.Tensor) -> None:
    model = Lookup(output)
    metric = choose_metric(None, [(torch.rand(8, 3), last)], call, model)
    assert (metric.kind, metric.proxy) == ("agreement", True)
    assert len(model.calls[-1][0]) == 2


class Lengths(nn.Module):
    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return x + lengths[:, None]


class OneInput(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, None, :] * 2


def test_an_argument_that_looks_like_labels_is_passed() -> None:
    x, lengths = torch.rand(6, 9), torch.tensor([1, 2, 3, 4, 5, 6])
    metric = choose_metric(None, [(x, lengths)], call, Lengths())
    assert metric.kind == "agreement"
    assert len(metric.inputs[0]) == 2
    assert metric.judge(Lengths()).drop == 0


def test_labels_of_a_model_without_logits_are_left_out() -> None:
    batches = [(torch.rand(6, 9), torch.zeros(6, dtype=torch.long))]
    metric = choose_metric(None, batches, call, OneInput())
    assert metric.kind == "agreement"
    assert metric.inputs[0].shape == (6, 9)
    assert metric.judge(OneInput()).drop == 0


class KnowsItself:
    """A batch that is called, cut and labelled by itself."""

    def __init__(self, x: torch.Tensor, labels: torch.Tensor | None) -> None:
        self.x, self.labels, self.size = x, labels, len(x)

    def part(self, begin: int, end: int) -> KnowsItself:
        return KnowsItself(self.x[begin:end], self.labels)


def test_batches_that_know_their_labels() -> None:
    labels = torch.randint(5, (20,))
    batches = [KnowsItself(torch.rand(20, 2), labels)]
    metric = choose_metric(None, batches, lambda model, batch: model(batch.x), Lookup(logits([True] * 20, labels)))
    assert metric.kind == "top-1"
    assert metric.judge(Lookup(logits([True] * 10 + [False] * 10, labels))).drop == 0.5
    without = [KnowsItself(torch.rand(20, 2), None)]
    assert choose_metric(None, without, lambda model, batch: model(batch.x), OneInput()).kind == "agreement"


def ratio_of_sums(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[float, np.ndarray]:
    """The share of noise of all samples together, and what each one adds to its error to first order."""
    noise, power = [], []
    for reference, output in pairs:
        a, b = reference.double().flatten(1).numpy(), output.double().flatten(1).numpy()
        noise.append(((a - b) ** 2).sum(1))
        power.append((a**2).sum(1))
    noise, power = np.concatenate(noise), np.concatenate(power)
    ratio = noise.sum() / power.sum()
    return ratio, (noise - ratio * power) / power.mean()


def share_bound(samples: int) -> float:
    """What a share is at most that was never seen."""
    return stats.binomtest(0, samples).proportion_ci(0.9, method="exact").high


def t_bound(values: np.ndarray) -> float:
    return values.mean() + stats.t.ppf(0.95, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_agreement_of_several_outputs(dtype: torch.dtype) -> None:
    a = [torch.randn(10, 4, 3), torch.randn(6, 4, 3)]
    b = [torch.randn(10, 2), torch.randn(6, 2)]
    whole = torch.randn(3)  # has no samples, and does not count
    other = [[x.to(dtype) for x in xs] for xs in ([x + 0.1 * torch.randn_like(x) for x in xs] for xs in (a, b))]
    batches = [torch.rand(10, 3), torch.rand(6, 3)]

    def outputs(xs, ys):
        return [{"a": x, "ids": torch.arange(len(x)), "rest": (y, whole, None)} for x, y in zip(xs, ys, strict=True)]

    metric = choose_metric(None, batches, call, Lookup(*outputs(a, b)))
    assert (metric.kind, metric.samples, metric.proxy) == ("agreement", 16, True)
    assert metric.reference_bytes == 4 * (16 * 14 + 2 * 3)
    verdict = metric.judge(Lookup(*outputs(*other)))
    pairs = [list(zip(a, other[0], strict=True)), list(zip(b, other[1], strict=True))]
    ratios, errors = zip(*map(ratio_of_sums, pairs), strict=True)
    assert verdict.drop == pytest.approx(np.mean(ratios), rel=1e-6)
    assert verdict.bound == pytest.approx(np.mean(ratios) + t_bound(np.mean(errors, 0)), rel=1e-6)
    assert verdict.proxy
    assert "proxy" in verdict.note
    same = metric.judge(Lookup(*outputs(a, b)))
    assert (same.drop, same.bound, same.unchanged) == (0.0, pytest.approx(share_bound(16)), True)
    assert metric.of_itself() == Verdict(0.0, 0.0, 16, "agreement", True, "the float model itself")


def test_the_share_of_noise_is_that_of_all_samples_together() -> None:
    """A sample whose output happens to be near 0 weighs as much as any other in the power of the noise."""
    reference = torch.linspace(1.0, 3.0, 300)[:, None]
    reference[7] = 1e-4
    output = reference + 0.02 * torch.randn(300, 1)
    verdict = choose_metric(None, [torch.rand(300, 2)], call, Lookup(reference)).judge(Lookup(output))
    ratio, errors = ratio_of_sums([(reference, output)])
    assert ratio < 2e-4
    assert verdict.drop == pytest.approx(ratio, rel=1e-6)
    assert verdict.bound == pytest.approx(ratio + t_bound(errors), rel=1e-6)
    numbers = choose_metric(None, [torch.rand(300, 2)], call, Lookup(reference[:, 0])).judge(Lookup(output[:, 0]))
    assert (numbers.drop, numbers.bound) == pytest.approx((verdict.drop, verdict.bound))


def test_samples_and_outputs_without_power() -> None:
    reference, batches = torch.randn(40, 3), [torch.rand(40, 2)]
    reference[5] = 0.0
    output = reference + 0.1
    ratio, errors = ratio_of_sums([(reference, output)])
    verdict = choose_metric(None, batches, call, Lookup(reference)).judge(Lookup(output))
    assert (verdict.drop, verdict.bound) == pytest.approx((ratio, ratio + t_bound(errors)), rel=1e-6)
    silent = choose_metric(None, batches, call, Lookup(torch.zeros(40, 3)))
    assert silent.judge(Lookup(torch.zeros(40, 3))).bound == pytest.approx(share_bound(40))
    assert (silent.judge(Lookup(output)).drop, silent.judge(Lookup(output)).bound) == (1.0, math.inf)


def test_decisions_that_do_not_differ_prove_what_their_number_proves() -> None:
    """Of 20 samples none turns, which happens in a third of all cases where one in 18 does."""
    decisions = nn.functional.one_hot(torch.randint(4, (20,)), 4).float()
    verdict = choose_metric(None, [torch.rand(20, 2)], call, Lookup(decisions)).judge(Lookup(decisions))
    assert verdict.drop == 0
    assert verdict.bound == pytest.approx(share_bound(20))
    assert not verdict.kept(0.02)
    assert "nothing differs in 20 samples" in verdict.note


def test_outputs_without_samples_count_once_for_each_batch() -> None:
    a = [torch.randn(7, 10, 2), torch.randn(7, 10, 2), torch.randn(7, 10, 2)]  # [time, batch, width]
    b = [x + 0.1 for x in a]
    metric = choose_metric(None, [torch.rand(10, 3)] * 3, call, Lookup(*a))
    assert metric.samples == 3
    verdict = metric.judge(Lookup(*b))
    ratio, errors = ratio_of_sums([(x.reshape(1, -1), y.reshape(1, -1)) for x, y in zip(a, b, strict=True)])
    assert verdict.drop == pytest.approx(ratio, rel=1e-6)
    assert verdict.bound == pytest.approx(ratio + t_bound(errors), rel=1e-6)


class Reuses(nn.Module):
    """Returns the same memory in each call."""

    def __init__(self) -> None:
        super().__init__()
        self.out = torch.empty(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out.copy_(x)


def test_the_reference_is_a_copy() -> None:
    model = Reuses()
    batches = [torch.rand(4, 3), torch.rand(4, 3)]
    metric = choose_metric(None, batches, call, model)
    assert metric.judge(nn.Identity()).drop == 0


def test_one_sample_proves_nothing_of_agreement() -> None:
    metric = choose_metric(None, [torch.rand(1, 3)], call, nn.Identity())
    verdict = metric.judge(nn.Identity())
    assert (verdict.drop, verdict.bound) == (0.0, math.inf)
    assert not verdict.kept(0.5)
    assert "2 samples are needed" in metric.shortage(0.5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_outputs_that_are_not_finite_are_never_kept(bad: float, dtype: torch.dtype) -> None:
    labels = torch.randint(5, (8,))
    right = logits([True] * 8, labels)
    broken = right.clone().to(dtype)
    broken[3, (labels[3] + 1) % 5] = bad
    zeros = torch.zeros(8, 5)  # noise of nothing
    spoilt = zeros.clone().to(dtype)
    spoilt[7, 4] = bad
    for batches, before, after in (
        ([(torch.rand(8, 2), labels)], right, broken),
        ([torch.rand(8, 2)], right, broken),
        ([torch.rand(8, 2)], zeros, spoilt),
    ):
        metric = choose_metric(None, batches, call, Lookup(before))
        verdict = metric.judge(Lookup(after))
        assert (verdict.drop, verdict.bound) == (math.inf, math.inf)
        assert not verdict.kept(1e30)
        assert "NaN or infinity" in verdict.note
        assert metric.judge(Lookup(before)).drop == 0


def test_classes_that_the_float_model_masks_may_stay_masked() -> None:
    labels = torch.randint(4, (8,))
    masked = logits([True] * 8, labels)
    masked[:, 4] = -math.inf
    metric = choose_metric(None, [(torch.rand(8, 2), labels)], call, Lookup(masked))
    assert metric.judge(Lookup(masked)).drop == 0
    broken = masked.clone()
    broken[2] = math.nan
    assert metric.judge(Lookup(broken)).drop == math.inf
    with pytest.raises(ValueError, match="outputs hold NaN or infinity for 8 of 8 samples to judge by, expected some"):
        choose_metric(None, [torch.rand(8, 2)], call, Lookup(masked))


def test_samples_for_which_the_float_model_gives_nan_are_left_out() -> None:
    labels = [torch.randint(5, (30,)), torch.randint(5, (10,))]
    before = [logits([True] * 30, labels[0]), logits([True] * 10, labels[1])]
    after = [logits([False] * 3 + [True] * 27, labels[0]), before[1].clone()]
    for answers in (before, after):
        answers[0][2:4] = math.nan
        answers[1][5, 1] = math.nan
    after[0][3] = 0.0
    batches = [torch.rand(30, 2), torch.rand(10, 2)]
    said = "3 of 40 samples to judge by are left out: the float model's outputs hold NaN or infinity for them"
    top1 = choose_metric(None, list(zip(batches, labels, strict=True)), call, Lookup(*before))
    verdict = top1.judge(Lookup(*after))
    assert (top1.kind, top1.samples, top1.notes) == ("top-1", 37, [said])
    assert (verdict.drop, verdict.bound) == pytest.approx((2 / 37, bound_of_counts(2, 0, 37)))
    agreement = choose_metric(None, batches, call, Lookup(*before))
    verdict = agreement.judge(Lookup(*after))
    assert (agreement.kind, agreement.samples, agreement.notes) == ("agreement", 37, [said])
    whole = [x.isfinite().all(1) for x in before]
    ratio, errors = ratio_of_sums([(a[w], b[w]) for a, b, w in zip(before, after, whole, strict=True)])
    assert (verdict.drop, verdict.bound) == pytest.approx((ratio, ratio + t_bound(errors)), rel=1e-6)
    for last in (labels[0], None):
        batch = (batches[0], last) if last is not None else batches[0]
        with pytest.raises(ValueError, match="NaN or infinity for 30 of 30 samples"):
            choose_metric(None, [batch], call, Lookup(torch.full((30, 5), math.nan)))


def test_outputs_that_do_not_count_must_stay_finite() -> None:
    x = torch.rand(8, 3)
    metric = choose_metric(None, [x], call, Lookup((x, torch.tensor(2.0))))
    assert metric.judge(Lookup((x + 0.1, torch.tensor(3.0)))).drop < 1
    assert metric.judge(Lookup((x + 0.1, torch.tensor(math.nan)))).drop == math.inf
    metric = choose_metric(None, [x], call, Lookup((x, torch.tensor(math.inf))))
    assert metric.judge(Lookup((x + 0.1, torch.tensor(math.inf)))).drop < 1


def test_outputs_of_other_shapes_are_never_kept() -> None:
    metric = choose_metric(None, [torch.rand(8, 2)], call, Lookup(torch.rand(8, 4), torch.rand(8, 3)))
    verdict = metric.judge(Lookup(torch.rand(8, 3)))
    assert verdict.drop == math.inf
    assert "other shapes" in verdict.note


def test_scores_of_samples_are_compared_in_pairs() -> None:
    before, after = torch.randn(30), torch.randn(30)
    for wrap in (lambda x: x, lambda x: x.tolist(), lambda x: tuple(x.tolist()), lambda x: x.numpy()):
        metric = choose_metric(lambda model, wrap=wrap: wrap(model.scores), [], call, Scored(before))
        verdict = metric.judge(Scored(after))
        differences = (before.double() - after.double()).numpy()
        assert (metric.kind, metric.samples, verdict.proxy) == ("scores", 30, False)
        assert verdict.drop == pytest.approx(differences.mean())
        assert verdict.bound == pytest.approx(t_bound(differences))


class Scored(nn.Module):
    def __init__(self, scores: Any) -> None:
        super().__init__()
        self.scores = scores


def test_scores_of_right_and_wrong_are_counted() -> None:
    """Student's t would call no difference among five samples certain."""
    before = torch.tensor([1.0] * 20 + [0.0] * 5)
    after = torch.tensor([0.0] * 3 + [1.0] * 17 + [1.0] + [0.0] * 4)
    metric = choose_metric(lambda model: model.scores, [], call, Scored(before))
    verdict = metric.judge(Scored(after))
    assert verdict.drop == pytest.approx(2 / 25)
    assert verdict.bound == pytest.approx(bound_of_counts(3, 1, 25))
    assert metric.samples_needed(0.02) == 183
    assert metric.judge(Scored(before)).bound == pytest.approx(1 - 0.025 ** (1 / 25))


def test_scores_that_are_all_right_have_the_bound_of_top1() -> None:
    metric = choose_metric(lambda model: model.scores, [], call, Scored([1.0] * 20))
    labels = torch.randint(5, (20,))
    right = Lookup(logits([True] * 20, labels))
    top1 = choose_metric(None, [(torch.rand(20, 2), labels)], call, right)
    assert metric.is_share
    for scores in ([1.0] * 20, [0.0] * 2 + [1.0] * 18):
        verdict = metric.judge(Scored(scores))
        other = top1.judge(Lookup(logits([score == 1.0 for score in scores], labels)))
        assert (verdict.drop, verdict.bound) == (other.drop, other.bound)
    assert metric.samples_needed(0.02) == top1.samples_needed(0.02) == 183
    assert "scores on 20 samples cannot prove a drop of at most 0.02: 183 samples are needed" in metric.shortage(0.02)


def test_scores_that_are_all_the_same_have_no_bound() -> None:
    """How much a sample can lose is not known where none has another score, unless it is right or wrong."""
    metric = choose_metric(lambda model: model.scores, [], call, Scored([37.5] * 20))
    verdict = metric.judge(Scored([37.5] * 20))
    assert (verdict.drop, verdict.bound) == (0.0, math.inf)
    for said in (verdict.note, metric.shortage(1.0)):
        assert "all scores are 37.5, so how much a sample can lose is not known" in said
    assert metric.judge(Scored([36.5] + [37.5] * 19)).bound == pytest.approx(bound_of_counts(1, 0, 20))
    assert not metric.is_share


def test_scores_that_do_not_differ_are_not_certain() -> None:
    scores = torch.rand(30)
    metric = choose_metric(lambda model: model.scores, [], call, Scored(scores))
    verdict = metric.judge(Scored(scores))
    assert (verdict.drop, verdict.unchanged) == (0.0, True)
    assert verdict.bound == pytest.approx(float(scores.max() - scores.min()) * share_bound(30))


@pytest.mark.parametrize("wrap", [tuple, list, torch.tensor])
@pytest.mark.parametrize("measures", [(0.9, 0.85), (0.9, 0.85, 0.8, 0.7), (12.0, 12.0)])
def test_several_measures_are_no_scores_of_samples(wrap: Any, measures: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=f"returned {len(measures)} numbers, expected one, or one for each of 5 sampl"):
        choose_metric(lambda model: wrap(measures), [], call, nn.Identity())
    assert choose_metric(lambda model: wrap((1.0, 0.0)), [], call, nn.Identity()).kind == "scores"


@pytest.mark.parametrize("wrap", [float, torch.tensor, np.float64, lambda x: torch.tensor([x]), lambda x: [x]])
def test_one_number_has_no_bound(wrap) -> None:
    metric = choose_metric(lambda model: wrap(model.scores), [], call, Scored(0.9))
    verdict = metric.judge(Scored(0.875))
    assert (metric.kind, verdict.kind, verdict.samples) == ("score", "score", 1)
    assert verdict.bound == verdict.drop == pytest.approx(0.025)
    assert "no bound" in verdict.note
    assert verdict.kept(0.03)
    assert not verdict.kept(0.02)
    assert metric.shortage(0.02) == ""


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite(bad: float) -> None:
    for good, wrong in ((0.5, bad), ([0.5] * 5, [0.5] * 4 + [bad])):
        metric = choose_metric(lambda model: model.scores, [], call, Scored(good))
        assert metric.judge(Scored(wrong)).drop == math.inf
        assert not metric.judge(Scored(wrong)).kept(1e300)
        with pytest.raises(ValueError, match="NaN or infinity for the float model"):
            choose_metric(lambda model, wrong=wrong: wrong, [], call, Scored(good))


def test_how_many_samples_are_needed() -> None:
    labels = torch.randint(5, (60,))
    metric = choose_metric(None, [(torch.rand(60, 2), labels)], call, Lookup(logits([True] * 60, labels)))
    assert metric.samples_needed(0.02) == 183
    assert "top-1 on 60 samples cannot prove a drop of at most 0.02: 183 samples are needed" in metric.shortage(0.02)
    assert metric.shortage(0.1) == ""
    assert "no number of samples can" in metric.shortage(0.0)
    agreement = choose_metric(None, [torch.rand(60, 2)], call, nn.Identity())
    assert agreement.shortage(0.0) == ""
    assert "no number" in agreement.shortage(-0.1)


def test_the_bound_has_95_percent_confidence() -> None:
    labels = torch.randint(5, (200,))
    batches, right = [(torch.rand(200, 2), labels)], logits([True] * 200, labels)
    verdict = choose_metric(None, batches, call, Lookup(right)).judge(Lookup(right))
    assert verdict.bound == pytest.approx(1 - 0.025 ** (1 / 200))


def test_gradients_are_off() -> None:
    seen = []

    def evaluate(model: nn.Module) -> float:
        seen.append(torch.is_grad_enabled())
        return 1.0

    choose_metric(evaluate, [], call, nn.Identity()).judge(nn.Identity())
    layer = nn.Linear(3, 2)
    metric = choose_metric(None, [torch.rand(4, 3)], call, layer)
    assert seen == [False, False]
    assert metric.judge(layer).drop == 0


@pytest.mark.cuda
def test_models_on_a_gpu() -> None:
    labels = torch.randint(5, (20,))
    right, wrong = logits([True] * 20, labels), logits([True] * 15 + [False] * 5, labels)
    for batch in (torch.rand(20, 2, device="cuda"), (torch.rand(20, 2, device="cuda"), labels.cuda())):
        on_cpu = choose_metric(None, [batch], call, Lookup(right)).judge(Lookup(wrong))
        metric = choose_metric(None, [batch], call, Lookup(right.cuda()))
        assert metric.judge(Lookup(wrong.cuda())) == on_cpu
        assert metric.judge(Lookup((wrong * math.nan).cuda())).drop == math.inf


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="batches is empty"):
        choose_metric(None, [], call, nn.Identity())
    with pytest.raises(TypeError, match="without floating-point values, expected some: pass eval_fn"):
        choose_metric(None, [torch.rand(4)], call, Lookup(torch.arange(4)))
    with pytest.raises(TypeError, match="eval_fn returned str, expected a number"):
        choose_metric(lambda model: "good", [], call, nn.Identity())
    with pytest.raises(TypeError, match="eval_fn returned Tensor, expected a number"):
        choose_metric(lambda model: torch.rand(2, 2), [], call, nn.Identity())
    with pytest.raises(TypeError, match="eval_fn returned NoneType"):
        choose_metric(lambda model: None, [], call, nn.Identity())
    with pytest.raises(ValueError, match="no score"):
        choose_metric(lambda model: [], [], call, nn.Identity())
    metric = choose_metric(lambda model: model.scores, [], call, Scored([1.0, 2.0, 3.0, 4.0, 5.0]))
    with pytest.raises(ValueError, match="returned 3 scores, expected 5"):
        metric.judge(Scored([1.0, 2.0, 3.0]))

    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("broken as it is")

    for batch in (torch.rand(4, 2), (torch.rand(4, 2), torch.zeros(4, dtype=torch.long))):
        with pytest.raises(RuntimeError, match="broken as it is"):
            choose_metric(None, [batch], call, Broken())
