"""The order of layers by harm, against what quantizing one layer alone does to the output."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from halfstep.int8_guard import Guarded, guard
from halfstep.int8_layers import Int8Conv2d, Int8Embedding, Int8Linear, pack
from halfstep.int8_metric import choose_metric
from halfstep.int8_ranking import EFFECT, NOISE, Ranking, rank_layers
from halfstep.int8_search import give_back
from torch import nn


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Of products as small as these, threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, dict):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def int8(layer: nn.Module, bits: int = 4) -> nn.Module:
    """A layer of few bits, so that errors are seen."""
    if isinstance(layer, nn.Embedding):
        return Int8Embedding(pack(layer.weight, None, bits=bits))
    if isinstance(layer, nn.Conv2d):
        return Int8Conv2d(pack(layer.weight, layer.bias, padding=layer.padding, bits=bits))
    return Int8Linear(pack(layer.weight, layer.bias, bits=bits))


class Planted(nn.Module):
    """A layer with an error that is known: the same for every input."""

    def __init__(self, layer: nn.Module, error: torch.Tensor | float) -> None:
        super().__init__()
        self.layer, self.error = layer, error

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.layer(*args, **kwargs) + self.error


def with_int8(model: nn.Module, names: Any, layers: dict[str, nn.Module]) -> nn.Module:
    """A copy of the model in which the named layers are replaced."""
    twin = copy.deepcopy(model)
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(twin.get_submodule(parent), child, layers[name])
    return twin


def changes(model: nn.Module, layers: dict[str, nn.Module], batch: Any) -> dict[str, float]:
    """The mean squared norm of what each layer alone does to a sample's output."""
    with torch.no_grad():
        reference = call(model, batch).double()
        return {
            name: float(
                (call(with_int8(model, [name], layers), batch).double() - reference).flatten(1).square().sum(1).mean()
            )
            for name in layers
        }


@pytest.mark.parametrize("form", ["tensor", "tuple", "list", "dict"])
def test_a_linear_model_is_ranked_by_exactly_what_happens(form: str) -> None:
    """One output for each sample: its sign does not matter, and first order is all there is."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 1)

        def forward(self, x: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
            h = self.b(self.a(x) if scale is None else self.a(x) * scale)
            return self.d(self.c(input=h) + h)

    model = Model().eval()
    layers = {name: Planted(getattr(model, name), 0.1 * torch.randn(1 if name == "d" else 8)) for name in "abcd"}
    x, scale = torch.randn(16, 6), torch.rand(16, 1)
    batch = {"tensor": x, "tuple": (x, scale), "list": [x, scale], "dict": {"x": x, "scale": scale}}[form]
    ranking = rank_layers(model, layers, [batch], call)
    truth = changes(model, layers, batch)
    assert ranking.method == EFFECT
    assert ranking.note == ""
    assert ranking.scores == pytest.approx(truth, rel=1e-4)
    assert list(ranking.order) == sorted(truth, key=truth.get, reverse=True)


def test_probes_estimate_the_norm_of_several_outputs() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 20)).eval()
    layers = {name: int8(layer) for name, layer in model.named_children()}
    x = torch.randn(32, 6)
    truth = changes(model, layers, x)
    assert rank_layers(model, layers, [x], call, probes=200).scores == pytest.approx(truth, rel=0.1)
    assert rank_layers(model, layers, [x], call).scores == pytest.approx(truth, rel=0.5)


class Hard(nn.Module):
    """50 layers on a residual stream, six of which matter."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(50))
        self.register_buffer("gains", torch.full((50,), 0.02))
        self.head = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer, gain in zip(self.layers, self.gains, strict=True):
            x = x + gain * torch.tanh(layer(nn.functional.layer_norm(x, x.shape[-1:])))
        return self.head(x)


HARMFUL = ("layers.3", "layers.11", "layers.20", "layers.29", "layers.41", "layers.48")


def hard() -> tuple[Hard, dict[str, nn.Module], list[torch.Tensor]]:
    """Layers that matter have 4 bits. The others have 2, so that their own outputs are much noisier."""
    model = Hard().eval()
    layers = {}
    for i, layer in enumerate(model.layers):
        name = f"layers.{i}"
        if name in HARMFUL:
            model.gains[i] = 1.0
        layers[name] = int8(layer, bits=4 if name in HARMFUL else 2)
    return model, layers, [torch.randn(48, 32) for _ in range(3)]


def by_own_noise(model: nn.Module, layers: dict[str, nn.Module], batches: list[torch.Tensor]) -> Ranking:
    """What ranking by the layers' own outputs would say: that of a model that cannot be differentiated."""

    def without_gradients(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return call(model, batch)

    return rank_layers(model, layers, batches, without_gradients)


def test_layers_that_matter_come_first() -> None:
    model, layers, batches = hard()
    ranking = rank_layers(model, layers, batches, call)
    assert set(ranking.order[:6]) == set(HARMFUL)
    truth = changes(model, layers, batches[0])
    assert set(sorted(truth, key=truth.get, reverse=True)[:6]) == set(HARMFUL)
    local = by_own_noise(model, layers, batches)
    assert local.method == NOISE
    assert set(local.order[-6:]) == set(HARMFUL)


def test_the_guard_gives_back_few_layers_of_a_hard_model() -> None:
    """At most 1.5 times as many as the order by runs with one layer each, which takes 50 evaluations."""
    model, layers, batches = hard()
    metric = choose_metric(None, batches, call, model)

    def build(quantized: frozenset[str]) -> nn.Module:
        return with_int8(model, quantized, layers)

    alone = {name: metric.judge(build(frozenset([name]))).drop for name in layers}
    order = sorted(alone, key=alone.get, reverse=True)
    threshold = 1.5 * metric.judge(build(frozenset(layers) - set(HARMFUL))).bound
    fewest = next(i for i in range(51) if metric.judge(build(frozenset(order[i:]))).kept(threshold))
    assert 2 < fewest <= 6

    decided = guard(
        list(layers),
        lambda names: metric.judge(build(names)),
        lambda: rank_layers(model, layers, batches, call),
        threshold,
    )
    search = decided.search
    assert search.kept
    assert len(search.given_back) <= 1.5 * fewest
    assert len(search.history) <= search.budget == 28
    assert decided.ranking.order == search.ranking
    assert metric.judge(build(search.quantized)) == search.verdict

    local = by_own_noise(model, layers, batches)
    worse = give_back(list(layers), lambda quantized: metric.judge(build(quantized)), lambda: local.order, threshold)
    assert len(worse.given_back) > 4 * fewest


def test_a_guard_that_has_nothing_to_do() -> None:
    model, layers, batches = hard()
    metric = choose_metric(None, batches, call, model)
    decided = guard(list(layers), lambda _names: metric.judge(model), lambda: pytest.fail("ranked"), 0.03)
    assert decided.search.quantized == frozenset(layers)
    assert decided.ranking is None


def test_a_guard_with_too_few_samples() -> None:
    model, layers, batches = hard()
    labelled = [(x, model(x).argmax(1)) for x in batches]
    metric = choose_metric(None, labelled, call, model)
    assert (metric.kind, metric.samples) == ("top-1", 144)

    def guarded(threshold: float) -> Guarded:
        rank, shortage = lambda: pytest.fail("ranked"), metric.shortage(threshold)
        return guard(list(layers), lambda _names: metric.judge(model), rank, threshold, shortage)

    decided = guarded(0.02)
    assert not decided.search.kept
    assert "183 samples are needed" in decided.search.note
    assert decided.search.given_back == tuple(layers)
    assert len(decided.search.history) == 1
    assert guarded(0.03).search.kept


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, 16)
        self.mix = nn.Linear(16, 16)
        self.out = nn.Linear(16, 3)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        h = self.embedding(ids)
        h = h + self.mix(h).relu_()
        return {"ids": ids, "logits": self.out(h.mean(1))}


@pytest.mark.parametrize("form", ["tensor", "tuple", "dict"])
def test_token_ids(form: str) -> None:
    model = Tokens().eval()
    layers = {name: int8(layer, bits=3) for name, layer in model.named_children()}
    ids = torch.randint(100, (64, 12))
    batch = {"tensor": ids, "tuple": (ids, ids > 5), "dict": {"ids": ids, "mask": None}}[form]
    ranking = rank_layers(model, layers, [batch], call, probes=64)
    part = {"tensor": ids[:32], "tuple": (ids[:32], None), "dict": {"ids": ids[:32]}}[form]
    with torch.no_grad():
        reference = call(model, part)["logits"]
        truth = {
            name: float((call(with_int8(model, [name], layers), part)["logits"] - reference).square().sum(1).mean())
            for name in layers
        }
    # relu bends what follows the embedding, so first order is not all of it.
    assert ranking.scores == pytest.approx(truth, rel=0.35)
    assert ranking.note == ""


class Convolutional(nn.Module):
    """In-place activations, a layer that is called twice, and an addition in place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.activation(self.stem(x))
        out = self.twice(x)
        out += x
        out = self.twice(self.activation(out))
        out += 1.0
        return self.head(out.relu_().mean((2, 3)))


@pytest.mark.parametrize("frozen", [False, True])
def test_layers_whose_outputs_are_written_to(frozen: bool) -> None:
    model = Convolutional().eval().requires_grad_(not frozen)
    layers = {name: int8(getattr(model, name), bits=5) for name in ("stem", "twice", "head")}
    x = torch.randn(16, 3, 8, 8)
    ranking = rank_layers(model, layers, [x], call, probes=64)
    assert ranking.method == EFFECT
    truth = changes(model, layers, x)
    assert list(ranking.order) == sorted(truth, key=truth.get, reverse=True)
    # The two calls of `twice` count as if their errors had nothing to do with each other.
    assert ranking.scores["stem"] == pytest.approx(truth["stem"], rel=0.35)
    assert ranking.scores["twice"] == pytest.approx(truth["twice"], rel=0.6)
    assert ranking.scores["head"] == pytest.approx(truth["head"], rel=0.35)


class Regrouped(nn.Module):
    """The layer's rows are not the samples: `group` says what they are."""

    def __init__(self, group: Callable[[torch.Tensor], torch.Tensor], back: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.group, self.back = group, back

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.back(self.layer(self.group(x)))


@pytest.mark.parametrize(
    ("group", "back"),
    [
        (lambda x: x, lambda y: y.sum((1, 2))),
        (lambda x: x.reshape(-1, 4), lambda y: y.reshape(-1, 7, 4).sum((1, 2))),  # one row for each token
        (lambda x: x.transpose(0, 1), lambda y: y.sum((0, 2))),  # time first
    ],
    ids=["samples", "tokens", "time first"],
)
def test_errors_are_put_together_by_sample(group, back) -> None:
    model = Regrouped(group, back).eval()
    layers = {"layer": Planted(model.layer, torch.randn(4))}
    x = torch.randn(16, 7, 4)
    truth = 49 * float(layers["layer"].error.sum() ** 2)  # the same error at each of 7 places
    ranking = rank_layers(model, layers, [x], call, probes=400)
    assert ranking.scores["layer"] == pytest.approx(truth, rel=0.25)


class TwoOutputs(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None, torch.Tensor]:
        return x * 2, None, x.sum(1)


def test_layers_with_several_outputs() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 3)
            self.both = TwoOutputs()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            a, nothing, b = self.both(self.first(x))
            assert nothing is None
            return a.sum(1) + b

    class Off(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None, torch.Tensor]:
            a, nothing, b = TwoOutputs()(x)
            return a + 0.5, nothing, b + 2.0

    model = Model().eval()
    ranking = rank_layers(model, {"both": Off()}, [torch.randn(8, 3)], call)
    assert ranking.scores["both"] == pytest.approx((3 * 0.5) ** 2 + 2.0**2)
    with pytest.raises(ValueError, match="int8 layer for 'both' gives 1 floating-point tensors, expected 2"):
        rank_layers(model, {"both": nn.Identity()}, [torch.randn(8, 3)], call)


def test_nothing_is_changed() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2)).eval()
    model[0].weight.requires_grad_(False)
    model[3].weight.grad = torch.ones(2, 4)

    def state() -> list[Any]:
        return [
            *[(p.requires_grad, p.grad is None, p._version, p.tolist()) for p in model.parameters()],
            *[buffer.tolist() for buffer in model.buffers()],
            [module.training for module in model.modules()],
            [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
            torch.get_rng_state().tolist(),
            torch.is_grad_enabled(),
        ]

    def drawing(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return model(batch + torch.rand(1))

    before = state()
    x = torch.randn(8, 4)
    before[-2] = torch.get_rng_state().tolist()
    layers = {"0": Planted(model[0], 0.1), "3": Planted(model[3], 0.1)}
    first = rank_layers(model, layers, [x], drawing)
    assert state() == before
    assert model[3].weight.grad.equal(torch.ones(2, 4))
    with torch.no_grad():
        assert rank_layers(model, layers, [x], drawing) == first, "deterministic, and gradients are switched on inside"
    with torch.inference_mode():
        assert rank_layers(model, layers, [x], drawing) == first
    by_own_noise(model, layers, [x])
    assert state() == before

    class Fails(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError("fails")

    with pytest.raises(ValueError, match="fails"):
        rank_layers(model, {"0": Fails()}, [x], drawing)
    assert state() == before


def test_a_few_samples_of_two_batches_are_run() -> None:
    sizes = []

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def forward(self, x: torch.Tensor, table: torch.Tensor, kind: str) -> torch.Tensor:
            sizes.append((len(x), len(table), kind))
            return self.layer(x)

    model = Model().eval()
    batches = [(torch.randn(40, 3), torch.rand(7), "a"), (torch.randn(8, 3), torch.rand(7), "b"), None]
    ranking = rank_layers(model, {"layer": Planted(model.layer, 0.5)}, batches, call)
    assert set(sizes) == {(32, 7, "a"), (8, 7, "b")}
    assert ranking.scores["layer"] == pytest.approx(0.25), "the mean over samples, however they are batched"


def test_a_model_that_wants_whole_batches() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x.view(40, 3))

    model = Fixed().eval()
    ranking = rank_layers(model, {"layer": Planted(model.layer, 0.5)}, [torch.randn(40, 3)], call)
    assert ranking.method == EFFECT
    assert ranking.scores["layer"] == pytest.approx(0.25)


class Severed(nn.Module):
    """A first half that no gradient reaches, and a layer that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after, self.unused = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(self.before(x).detach())


def test_layers_without_a_gradient() -> None:
    model = Severed().eval()
    layers = {name: Planted(layer, 0.1) for name, layer in model.named_children()}
    ranking = rank_layers(model, layers, [torch.randn(8, 3)], call)
    assert ranking.order[0] == "after"
    assert (ranking.scores["before"], ranking.scores["unused"]) == (0.0, 0.0)
    assert ranking.note == "no gradient reached before"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_that_are_not_finite_come_first(bad: float) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)).eval()
    layers = {name: Planted(layer, bad if name == "1" else 100.0) for name, layer in model.named_children()}
    ranking = rank_layers(model, layers, [torch.randn(8, 3)], call)
    assert ranking.order[0] == "1"
    assert not math.isfinite(ranking.scores["1"])
    local = by_own_noise(model, layers, [torch.randn(8, 3)])
    assert local.order[0] == "1"


class WithoutBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2


class Wrapped(nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.noisy, self.clean = nn.Linear(3, 3), nn.Linear(3, 3)
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.clean(self.function(self.noisy(x)))


def written_after_use(x: torch.Tensor) -> torch.Tensor:
    y = x.exp()
    z = y * 2
    y.add_(1)
    return z


def to_a_leaf(x: torch.Tensor) -> torch.Tensor:
    leaf = torch.zeros_like(x, requires_grad=True)
    return leaf.add_(x)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (WithoutBackward.apply, "backward"),
        (written_after_use, "modified by an inplace operation"),
        (to_a_leaf, "leaf Variable"),
        (lambda x: torch.exp(x, out=torch.empty_like(x)), "automatic differentiation"),
    ],
    ids=["no backward", "written after use", "leaf", "out"],
)
def test_models_that_cannot_be_differentiated(function, reason: str) -> None:
    model = Wrapped(function).eval()
    layers = {"clean": Planted(model.clean, 0.01), "noisy": Planted(model.noisy, 1.0)}
    ranking = rank_layers(model, layers, [torch.randn(8, 3)], call)
    assert ranking.method == NOISE
    assert ranking.order == ("noisy", "clean")
    assert "cannot be differentiated" in ranking.note
    assert reason in ranking.note


def test_models_of_inference_tensors() -> None:
    with torch.inference_mode():
        model = Wrapped(torch.tanh).eval()
    layers = {"clean": Planted(model.clean, 0.01), "noisy": Planted(model.noisy, 1.0)}
    ranking = rank_layers(model, layers, [torch.randn(8, 3)], call)
    assert ranking.method == NOISE
    assert ranking.order == ("noisy", "clean")
    assert "nference tensor" in ranking.note


def test_noise_of_the_own_output_is_a_share_of_its_power() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)).eval()
    x = torch.randn(8, 3)
    layers = {name: int8(layer) for name, layer in model.named_children()}
    scores = by_own_noise(model, layers, [x]).scores
    with torch.no_grad():
        h = model[0](x)
        for name, layer, given in (("0", model[0], x), ("1", model[1], h)):
            reference, output = layer(given).double(), layers[name](given).double()
            expected = ((output - reference) ** 2).sum() / (reference**2).sum()
            assert scores[name] == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.cuda
def test_models_on_a_gpu() -> None:
    model, layers, batches = hard()
    on_cpu = rank_layers(model, layers, batches, call)
    there = {name: layer.cuda() for name, layer in layers.items()}
    state = torch.cuda.get_rng_state()
    ranking = rank_layers(model.cuda(), there, [batch.cuda() for batch in batches], call)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert set(ranking.order[:6]) == set(HARMFUL)
    assert ranking.scores == pytest.approx(on_cpu.scores, rel=0.05), "the same probes"


def test_bad_arguments_are_named() -> None:
    model = nn.Sequential(nn.Linear(3, 3)).eval()
    layers = {"0": Planted(model[0], 0.1)}
    with pytest.raises(ValueError, match="the model has no layer 'x'"):
        rank_layers(model, {"x": model[0]}, [torch.rand(2, 3)], call)
    with pytest.raises(ValueError, match="batches is empty"):
        rank_layers(model, layers, [], call)
    with pytest.raises(ValueError, match="probes is 0"):
        rank_layers(model, layers, [torch.rand(2, 3)], call, probes=0)
    with pytest.raises(ValueError, match="without a tensor"):
        rank_layers(model, layers, ["text"], call)
