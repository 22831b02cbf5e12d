"""The search for layers to give back, on landscapes whose truth is known."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from halfstep.int8_search import Search, default_budget, give_back
from hypothesis import given, settings
from hypothesis import strategies as st


@dataclass(frozen=True)
class Drop:
    drop: float

    def kept(self, threshold: float) -> bool:
        return self.drop <= threshold


class Landscape:
    """A drop for each set of layers, and a count of what was asked."""

    def __init__(self, damage: Callable[[frozenset[str]], float]) -> None:
        self.damage = damage
        self.asked: list[frozenset[str]] = []
        self.ranked = 0

    def evaluate(self, quantized: frozenset[str]) -> Drop:
        self.asked.append(quantized)
        return Drop(self.damage(quantized))

    def search(self, layers, ranking, threshold=1.0, budget=None) -> Search:
        def rank():
            self.ranked += 1
            return ranking

        return give_back(layers, self.evaluate, rank, threshold, budget)


def additive(damages: dict[str, float]) -> Landscape:
    return Landscape(lambda quantized: math.fsum(damages[name] for name in quantized))


def names(count: int) -> list[str]:
    return [f"layer{i}" for i in range(count)]


def check(search: Search, landscape: Landscape, layers: list[str], threshold: float = 1.0) -> None:
    """What holds of every search."""
    assert len(landscape.asked) == len(set(landscape.asked)) == len(search.history) <= search.budget
    assert [trial.quantized for trial in search.history] == landscape.asked
    assert landscape.ranked <= 1
    assert all(trial.kept == trial.verdict.kept(threshold) for trial in search.history)
    if search.kept:
        assert (search.quantized, search.verdict) in [(t.quantized, t.verdict) for t in search.history]
        assert search.verdict.kept(threshold)
        assert search.quantized | set(search.given_back) == set(layers)
        assert not search.quantized & set(search.given_back)
    else:
        assert search.quantized == frozenset()
        assert search.note
        assert not any(trial.kept for trial in search.history)


@pytest.mark.parametrize(("layers", "budget"), [(0, 16), (1, 16), (2, 18), (3, 20), (50, 28), (64, 28), (65, 30)])
def test_budget(layers: int, budget: int) -> None:
    assert default_budget(layers) == budget
    if layers:
        assert budget == 2 * math.ceil(math.log2(layers)) + 16


def test_all_layers_stay_if_they_may() -> None:
    landscape = additive(dict.fromkeys(names(9), 0.1))
    search = landscape.search(names(9), [])
    check(search, landscape, names(9))
    assert search.quantized == frozenset(names(9))
    assert search.given_back == ()
    assert landscape.ranked == 0
    assert len(search.history) == 1


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 200), st.data())
def test_the_smallest_count_is_found(count: int, data: st.DataObject) -> None:
    """The drop is kept if, and only if, the first `harmful` layers of the ranking are float."""
    layers = names(count)
    harmful = data.draw(st.integers(0, count))
    ranking = data.draw(st.permutations(layers))
    bad = set(ranking[:harmful])
    landscape = Landscape(lambda quantized: 2.0 * bool(quantized & bad))
    search = landscape.search(layers, ranking)
    check(search, landscape, layers)
    assert search.given_back == tuple(ranking[:harmful])


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 200), st.integers(0, 2**32), st.floats(0.1, 3.0))
def test_additive_damage(count: int, seed: int, spread: float) -> None:
    """With a good ranking nothing is given back that need not be, however damages are distributed."""
    rng = random.Random(seed)
    damages = {name: rng.lognormvariate(0, spread) for name in names(count)}
    whole = math.fsum(damages.values())
    damages = {name: 3.0 * damage / whole for name, damage in damages.items()}
    ranking = sorted(damages, key=damages.get, reverse=True)
    fewest = next(i for i in range(count + 1) if math.fsum(damages[name] for name in ranking[i:]) <= 1.0)
    landscape = additive(damages)
    search = landscape.search(names(count), ranking)
    check(search, landscape, names(count))
    assert search.kept
    assert len(search.given_back) == fewest


def test_additive_damage_with_an_imperfect_ranking() -> None:
    """Few harmful layers, each ranked by a guess that is wrong by a factor of 2 or so: at most 1.5 times the best."""
    for seed in range(200):
        rng = random.Random(seed)
        layers = names(50)
        harmful = set(rng.sample(layers, 6))
        damages = {name: rng.uniform(0.4, 1.0) if name in harmful else rng.uniform(0, 0.006) for name in layers}
        guess = {name: damage * rng.lognormvariate(0, 0.7) for name, damage in damages.items()}
        by_damage = sorted(damages, key=damages.get, reverse=True)
        fewest = next(i for i in range(51) if math.fsum(damages[name] for name in by_damage[i:]) <= 0.3)
        landscape = additive(damages)
        search = landscape.search(layers, sorted(guess, key=guess.get, reverse=True), 0.3)
        check(search, landscape, layers, 0.3)
        assert search.kept
        assert len(search.given_back) <= 1.5 * fewest


def test_layers_that_were_ranked_too_high_are_quantized_again() -> None:
    layers = names(20)
    bad = {"layer3", "layer7"}
    ranking = ["layer3", "layer0", "layer1", "layer2", "layer7", *(x for x in layers[4:] if x != "layer7")]
    landscape = Landscape(lambda quantized: 2.0 * bool(quantized & bad))
    search = landscape.search(layers, ranking)
    check(search, landscape, layers)
    assert search.given_back == ("layer3", "layer7")
    tried = [trial.step for trial in search.history if trial.step.endswith("again")]
    # layer7 was the last one given back by the bisection, so it is known not to hold.
    assert tried == [f"quantize {name} again" for name in ("layer2", "layer1", "layer0", "layer3")]


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 60), st.integers(0, 2**32), st.floats(0, 1), st.none() | st.integers(1, 40))
def test_any_landscape_ends_in_a_set_that_was_evaluated(
    count: int, seed: int, share: float, budget: int | None
) -> None:
    layers = names(count)

    def damage(quantized: frozenset[str]) -> float:
        return 2.0 * (random.Random(f"{seed} {sorted(quantized)}").random() < share)

    ranking = random.Random(seed).sample(layers, count)
    results = []
    for _ in range(2):
        landscape = Landscape(damage)
        search = landscape.search(layers, ranking, budget=budget)
        check(search, landscape, layers)
        results.append(search)
        if any(trial.kept for trial in search.history):
            assert search.kept
            assert len(search.quantized) == max(len(trial.quantized) for trial in search.history if trial.kept)
    assert results[0] == results[1]


def test_nothing_holds() -> None:
    layers = names(5)
    landscape = Landscape(lambda quantized: 2.0 + len(quantized))
    search = landscape.search(layers, layers)
    check(search, landscape, layers)
    assert "even with every layer given back" in search.note
    assert search.verdict == Drop(2.0)
    assert search.given_back == tuple(layers)


@pytest.mark.parametrize(("drop", "kept"), [(0.5, True), (1.5, False), (math.nan, False), (math.inf, False)])
def test_a_model_without_layers(drop: float, kept: bool) -> None:
    landscape = Landscape(lambda quantized: drop)
    search = landscape.search([], [])
    assert search.kept is kept
    assert search.quantized == frozenset()
    assert bool(search.note) is not kept


def test_the_budget_ends_the_search() -> None:
    layers = names(64)
    landscape = Landscape(lambda quantized: float(len(quantized)))
    search = landscape.search(layers, layers, threshold=0.5, budget=3)
    check(search, landscape, layers, 0.5)
    assert "none of 3 evaluations" in search.note
    bad = set(layers[:33])
    landscape = Landscape(lambda quantized: 2.0 * bool(quantized & bad))
    search = landscape.search(layers, layers, budget=9)
    check(search, landscape, layers)
    assert search.kept
    assert search.given_back == tuple(layers[:48])  # 64 holds, 48 holds, and 40 would have been next


def test_arguments_are_checked() -> None:
    landscape = Landscape(lambda quantized: 2.0)
    with pytest.raises(ValueError, match="names a layer twice"):
        landscape.search(["a", "a"], ["a"])
    with pytest.raises(ValueError, match="budget is 0"):
        landscape.search(["a"], ["a"], budget=0)
    for ranking in (["a"], ["a", "a"], ["a", "c"]):
        with pytest.raises(ValueError, match="each of the 2 layers once"):
            landscape.search(["a", "b"], ranking)
