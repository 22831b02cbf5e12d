"""The optimizer's promise on whole models: what is given back, how often models are judged, and the drop it reports."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from halfstep import InferencePrecisionOptimizer, int8_optimize
from halfstep.int8_layers import Int8Conv2d, Int8Linear
from inference_cases import batches, digits, trained, trained_cnn, trained_mlp
from scipy import stats
from torch import nn


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Of products as small as these, threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Guarded:
    """One optimization, and what its guard worked with: the batches it judged by, and any set of int8 layers."""

    def __init__(self, model: nn.Module, data: Any, **options: Any) -> None:
        self.runs: list[int8_optimize.Int8Run] = []
        optimizer = InferencePrecisionOptimizer(
            **{"speed_guard": False, "progress": False, "calibration_samples": 1797, **options}
        )
        search = int8_optimize.Int8Run.search

        def recorded(run: int8_optimize.Int8Run, *args: Any) -> frozenset[str]:
            found = search(run, *args)
            self.run, self.settings = run, dict(run.settings.settings)
            return found

        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # where nothing holds, which the caller sees in the report
            patch.setattr(int8_optimize.Int8Run, "search", recorded)
            self.result = optimizer.optimize_for_inference(model, data, "cpu")
        self.report = optimizer.report()
        self.reference = copy.deepcopy(model).eval()

    def build(self, names: frozenset[str]) -> nn.Module:
        """The model with these layers int8, as the guard judges it."""
        self.run.settings.settings = self.settings
        return self.run.build(names)

    def measured(self, model: nn.Module) -> tuple[float, float]:
        """The drop on the guard's batches and its bound, by NumPy and SciPy."""
        with torch.no_grad():
            pairs = [(batch.labels, batch(self.reference), batch(model)) for batch in self.run.guard]
        if pairs[0][0] is not None:
            labels, before, after = (torch.cat(parts).numpy() for parts in zip(*pairs, strict=True))
            return drop_of_top1(before.argmax(1) == labels, after.argmax(1) == labels)
        before, after = (torch.cat(parts).double().numpy() for parts in list(zip(*pairs, strict=True))[1:])
        noise, power = ((after - before) ** 2).sum(1), (before**2).sum(1)
        share = noise.sum() / power.sum()
        if not share:
            return 0.0, float(stats.beta.ppf(0.95, 1, len(noise)))
        error = stats.sem((noise - share * power) / power.mean())
        return float(share), float(share + stats.t.ppf(0.95, len(noise) - 1) * error)


def drop_of_top1(before: np.ndarray, after: np.ndarray) -> tuple[float, float]:
    """The drop and the bound that design promises: Clopper and Pearson's for losses and gains, each with half."""
    samples, lost, gained = len(before), int((before & ~after).sum()), int((after & ~before).sum())
    most = 1.0 if lost == samples else stats.beta.ppf(0.975, lost + 1, samples - lost)
    least = 0.0 if gained == 0 else stats.beta.ppf(0.025, gained, samples - gained + 1)
    return (lost - gained) / samples, most - least


def int8_layers(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, (Int8Linear, Int8Conv2d))}


class Deep(nn.Module):
    """50 layers, 48 of them on a residual stream, of which six matter more than the others."""

    harmful = (3, 11, 20, 29, 41, 45)

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.first = nn.Linear(64, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(48))
        self.head = nn.Linear(width, 10)
        self.gains = [1.0 if i in self.harmful else 0.05 for i in range(48)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x.flatten(1))
        for layer, gain in zip(self.layers, self.gains, strict=True):
            x = x + gain * F.relu(layer(F.layer_norm(x, x.shape[-1:])))
        return self.head(F.layer_norm(x, x.shape[-1:]))


@functools.cache
def trained_deep() -> nn.Module:
    torch.manual_seed(0)
    return trained(Deep(), 3)


@pytest.mark.parametrize("labels", [False, True], ids=["agreement", "top-1"])
def test_few_layers_of_a_hard_model_are_given_back(labels: bool) -> None:
    """At most 1.5 times as many as the best order that one-layer runs, 50 and 50 evaluations, find."""
    threshold = 0.02 if not labels else 0.03
    guarded = Guarded(
        trained_deep(),
        batches(1797, labels=labels),
        bits=3,
        accuracy_threshold=threshold,
        calibrator="mse",
        smooth_quant=False,
        bias_correction=False,
    )
    report = guarded.report
    every = frozenset(guarded.run.candidates)
    assert len(every) == 50
    assert report["result"] == "int8"
    assert report["budget"] == 2 * math.ceil(math.log2(50)) + 16
    assert report["evaluations"] <= report["budget"]
    given_back = set(report["given_back"])
    assert int8_layers(guarded.result) == every - given_back

    @functools.cache
    def measure(names: frozenset[str]) -> tuple[float, float]:
        return guarded.measured(guarded.build(names))

    assert measure(every)[1] > threshold  # else there would be nothing to find
    orders = (
        sorted(every, key=lambda name: measure(frozenset([name])), reverse=True),
        sorted(every, key=lambda name: measure(every - {name})),
    )
    fewest = min(
        next(count for count in range(51) if measure(every.difference(order[:count]))[1] <= threshold)
        for order in orders
    )
    assert 2 <= fewest <= 12
    assert len(given_back) <= 1.5 * fewest, (sorted(given_back), fewest)
    assert (report["drop"], report["bound"]) == pytest.approx(guarded.measured(guarded.result), rel=1e-4)
    assert report["bound"] <= threshold


def poisoned(model: nn.Module, producer: str, consumer: str, channel: int) -> nn.Module:
    """The same function, with an output channel 10^4 as large and its reader's weights as much smaller."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        source, reader = model.get_submodule(producer), model.get_submodule(consumer)
        source.weight[channel] *= 1e4
        source.bias[channel] *= 1e4
        reader.weight[:, channel] /= 1e4
    return model


class Convolutions(nn.Module):
    """Convolutions of 3 x 3 and of 1 x 1, so that both kinds can be poisoned."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(1, 16, 3, padding=1)
        self.b = nn.Conv2d(16, 16, 3, padding=1)
        self.c = nn.Conv2d(16, 24, 1, stride=2)
        self.d = nn.Conv2d(24, 16, 3, padding=1)
        self.head = nn.Linear(256, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (self.a, self.b, self.c, self.d):
            x = F.relu(layer(x))
        return self.head(x.flatten(1))


class Linears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in ((64, 64), (64, 48), (48, 64), (64, 32), (32, 10)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


@functools.cache
def trained_of(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return trained(kind(), 8)


def busiest(model: nn.Module, producer: str) -> int:
    """The output channel with the largest mean: a dead one would poison nothing."""
    found: list[torch.Tensor] = []
    handle = model.get_submodule(producer).register_forward_hook(lambda _m, _a, out: found.append(out))
    with torch.no_grad():
        model(digits()[0][:100])
    handle.remove()
    out = F.relu(found[0])
    return int(out.transpose(0, 1).flatten(1).mean(1).argmax())


POISONS = [
    (Linears, "layers.0", "layers.1"),
    (Linears, "layers.2", "layers.3"),
    (Convolutions, "a", "b"),
    (Convolutions, "b", "c"),
    (Convolutions, "c", "d"),
]


@pytest.mark.parametrize("labels", [False, True], ids=["agreement", "top-1"])
@pytest.mark.parametrize(("kind", "producer", "consumer"), POISONS)
def test_of_poison_exactly_the_reader_is_given_back(
    kind: type[nn.Module], producer: str, consumer: str, labels: bool
) -> None:
    plain = trained_of(kind)
    model = poisoned(plain, producer, consumer, busiest(plain, producer))
    images, _ = digits()
    with torch.no_grad():
        assert torch.allclose(model(images), plain(images), rtol=1e-3, atol=1e-3)
    guarded = Guarded(model, batches(1797, labels=labels), smooth_quant=False)
    assert list(guarded.report["given_back"]) == [consumer]
    every = frozenset(guarded.run.candidates)
    assert int8_layers(guarded.result) == every - {consumer}
    assert (guarded.report["drop"], guarded.report["bound"]) == pytest.approx(
        guarded.measured(guarded.result), rel=1e-4, abs=1e-12
    )


@pytest.mark.parametrize("activations", ["static", "dynamic"])
@pytest.mark.parametrize("labels", [False, True], ids=["agreement", "top-1"])
@pytest.mark.parametrize(("kind", "producer", "consumer"), POISONS)
def test_with_smoothing_no_layer_is_given_back(
    kind: type[nn.Module], producer: str, consumer: str, labels: bool, activations: str
) -> None:
    plain = trained_of(kind)
    model = poisoned(plain, producer, consumer, busiest(plain, producer))
    guarded = Guarded(model, batches(1797, labels=labels), activations=activations)
    assert guarded.report["given_back"] == {}
    assert int8_layers(guarded.result) == frozenset(guarded.run.candidates)
    assert guarded.report["bound"] <= 0.02


def test_a_layer_whose_smoothed_input_no_float_holds_is_not_smoothed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)).eval()
    with torch.no_grad():
        model[0].weight.mul_(1e-42)
        model[1].weight.mul_(1e36)
    guarded = Guarded(model, [torch.randn(50, 16) for _ in range(6)], smooth_quant=True, accuracy_threshold=1.0)
    assert guarded.run.settings.smoothed == {"0"}


def random_network(seed: int) -> nn.Module:
    """A small network of random depth, widths, activations and kinds of layers, some of it with outliers."""
    draw = np.random.default_rng(seed)
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    channels = 1
    for _ in range(draw.integers(0, 3)):
        out = int(draw.choice([4, 8, 12]))
        layers.append(nn.Conv2d(channels, out, 3, padding=1))
        if draw.random() < 0.5:
            layers.append(nn.BatchNorm2d(out))
        layers.append(draw.choice([nn.ReLU, nn.SiLU, nn.Hardswish])())
        channels = out
    layers.append(nn.Flatten())
    width = 64 * channels
    for _ in range(draw.integers(1, 4)):
        out = int(draw.choice([16, 24, 40]))
        layers += [nn.Linear(width, out), draw.choice([nn.ReLU, nn.GELU, nn.Tanh])()]
        width = out
    layers.append(nn.Linear(width, 10))
    model = trained(nn.Sequential(*layers), 2)
    if draw.random() < 0.5:  # a weight that makes all others of its row coarse
        with torch.no_grad():
            weight = model[-1].weight
            weight[0, 0] = 20.0 * weight.abs().max()
    return model


@pytest.mark.parametrize("seed", range(20))
def test_what_is_said_to_be_kept_is_kept(seed: int) -> None:
    draw = np.random.default_rng(1000 + seed)
    labels = bool(draw.random() < 0.5)
    threshold = float(draw.choice([0.0, 0.005, 0.01, 0.03, 0.1]))
    guarded = Guarded(
        random_network(seed),
        batches(1797, labels=labels),
        accuracy_threshold=threshold,
        bits=int(draw.choice([3, 4, 6, 8])),
        activations=str(draw.choice(["static", "dynamic"])),
    )
    report = guarded.report
    drop, bound = guarded.measured(guarded.result)
    assert report["kept"]
    if report["result"] == "float32":  # the model itself: its drop is 0 however few samples there are
        images, _ = digits()
        assert torch.equal(guarded.result(images), guarded.reference(images))
        assert (report["drop"], report["bound"]) == (0.0, 0.0)
    else:
        assert (report["drop"], report["bound"]) == pytest.approx((drop, bound), rel=1e-3, abs=1e-9)
        assert drop <= bound <= threshold
    assert report["evaluations"] <= report["budget"]
    assert not guarded.result.training


@pytest.mark.parametrize("labels", [False, True], ids=["agreement", "top-1"])
def test_a_larger_threshold_keeps_more_layers(labels: bool) -> None:
    """The search is no exhaustive one, so a layer fewer is allowed; from end to end the difference must be large."""
    counts = []
    for threshold in (0.0, 0.004, 0.015, 0.03, 0.06, 0.1):
        guarded = Guarded(
            trained_of(Linears), batches(1797, labels=labels), bits=4, accuracy_threshold=threshold, calibrator="mse"
        )
        drop, _ = guarded.measured(guarded.result)
        assert drop <= threshold
        counts.append(len(int8_layers(guarded.result)))
    assert all(after >= before - 1 for before, after in itertools.pairwise(counts)), counts
    assert counts[0] <= 1
    assert counts[-1] == 5


@pytest.mark.parametrize("make", [trained_mlp, trained_cnn])
def test_two_runs_give_the_same_bits(make: Callable[[], nn.Module]) -> None:
    images, _ = digits()
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)  # which must not matter
        guarded = Guarded(make(), batches(1797, labels=False), bits=4, accuracy_threshold=0.01)
        with torch.no_grad():
            found.append((int8_layers(guarded.result), guarded.report, guarded.result(images)))
    assert found[0][0] == found[1][0]
    assert found[0][1] == found[1][1]
    assert torch.equal(found[0][2], found[1][2])
