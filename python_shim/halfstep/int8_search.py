"""The search for the layers that stay int8: quantize all, then give back as few as keep the accuracy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Trial:
    """One evaluation: what was done, the layers that were int8, and the verdict on them."""

    step: str
    quantized: frozenset[str]
    verdict: Any
    kept: bool


@dataclass(frozen=True)
class Search:
    """The result of give_back().

    quantized: the layers that stay int8. Unless `kept` is False they were evaluated, and `verdict` is theirs.
    given_back: the others, most harmful first. ranking: all layers in that order, empty where none had to be given
    back. kept: False where nothing held: then no layer stays int8, `note` says why, and `verdict` is that of the
    smallest set that was evaluated.
    """

    quantized: frozenset[str]
    given_back: tuple[str, ...]
    kept: bool
    verdict: Any
    history: tuple[Trial, ...]
    budget: int
    ranking: tuple[str, ...] = ()
    note: str = ""


def default_budget(layers: int) -> int:
    """Return how many evaluations a search may take: 2 * ceil(log2(layers)) + 16."""
    return 2 * max(layers - 1, 0).bit_length() + 16


class _BudgetSpent(Exception):
    """No evaluation is left."""


@dataclass
class _Trials:
    """Evaluates each set once, within the budget."""

    evaluate: Callable[[frozenset[str]], Any]
    threshold: float
    budget: int
    history: list[Trial] = field(default_factory=list)
    known: dict[frozenset[str], Trial] = field(default_factory=dict)

    def __call__(self, step: str, quantized: frozenset[str]) -> Trial:
        if quantized not in self.known:
            if len(self.history) >= self.budget:
                raise _BudgetSpent
            verdict = self.evaluate(quantized)
            trial = Trial(step, quantized, verdict, bool(verdict.kept(self.threshold)))
            self.known[quantized] = trial
            self.history.append(trial)
        return self.known[quantized]


def give_back(
    layers: Sequence[str],
    evaluate: Callable[[frozenset[str]], Any],
    rank: Callable[[], Sequence[str]],
    threshold: float,
    budget: int | None = None,
) -> Search:
    """Find layers that can be int8 together.

    evaluate: the verdict on the model with these layers int8; verdict.kept(threshold) decides. rank: all layers, most
    harmful first; called once, if at all. If all layers together do not hold, the first 1, 2, 4, ... of the ranking are
    given back, the smallest count that holds is found by bisection, and then each layer given back is tried again,
    least harmful first. At most `budget` evaluations, default_budget() unless given. ValueError for layers that are
    named twice, a budget below 1, or a ranking of other layers.
    """
    every = frozenset(layers)
    if len(every) != len(layers):
        raise ValueError("layers names a layer twice, expected each once")
    budget = default_budget(len(layers)) if budget is None else budget
    if budget < 1:
        raise ValueError(f"budget is {budget}, expected at least 1 evaluation")
    trials = _Trials(evaluate, threshold, budget)
    found = trials("all", every)
    if found.kept:
        return Search(every, (), True, found.verdict, tuple(trials.history), budget)
    if not every:
        return _nothing(trials, (), "there is no layer to give back, and the threshold is not kept")
    ranking = tuple(rank())
    if len(ranking) != len(every) or frozenset(ranking) != every:
        raise ValueError(f"rank() gave {len(ranking)} names, expected each of the {len(every)} layers once")
    try:
        found, count = _doubled(trials, every, ranking)
    except _BudgetSpent:
        return _nothing(trials, ranking, f"none of {budget} evaluations, all that the budget has, kept the threshold")
    if found is None:
        return _nothing(trials, ranking, "the threshold is not kept even with every layer given back")
    try:
        found, count = _bisected(trials, every, ranking, found, count)
        for name in reversed(ranking[:count]):
            again = trials(f"quantize {name} again", found.quantized | {name})
            found = again if again.kept else found
    except _BudgetSpent:
        found = _largest(trials)
    given_back = tuple(name for name in ranking if name not in found.quantized)
    return Search(found.quantized, given_back, True, found.verdict, tuple(trials.history), budget, ranking)


def _doubled(trials: _Trials, every: frozenset[str], ranking: Sequence[str]) -> tuple[Trial | None, int]:
    """Give back 1, 2, 4, ... layers until that holds; None if not even all of them do."""
    count = 1
    while True:
        found = trials(f"give back {count}", every.difference(ranking[:count]))
        if found.kept:
            return found, count
        if count == len(ranking):
            return None, count
        count = min(2 * count, len(ranking))


def _bisected(
    trials: _Trials, every: frozenset[str], ranking: Sequence[str], found: Trial, count: int
) -> tuple[Trial, int]:
    """Return the smallest count in the last interval, whose upper end is `count`, and what was found with it."""
    step = 1
    while 2 * step < count:
        step *= 2
    fails = step if count > 1 else 0
    while count - fails > 1:
        middle = (fails + count) // 2
        trial = trials(f"give back {middle}", every.difference(ranking[:middle]))
        if trial.kept:
            found, count = trial, middle
        else:
            fails = middle
    return found, count


def _largest(trials: _Trials) -> Trial:
    """Return the kept trial with the most layers; of several, the first."""
    return max((trial for trial in trials.history if trial.kept), key=lambda trial: len(trial.quantized))


def _nothing(trials: _Trials, ranking: tuple[str, ...], note: str) -> Search:
    smallest = min(trials.history, key=lambda trial: len(trial.quantized))
    return Search(frozenset(), ranking, False, smallest.verdict, tuple(trials.history), trials.budget, ranking, note)
