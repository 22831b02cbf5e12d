"""The accuracy guard: which layers stay int8 so that the model's drop is provably at most a threshold."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from halfstep.int8_metric import Verdict
from halfstep.int8_ranking import Ranking
from halfstep.int8_search import Search, give_back


@dataclass(frozen=True)
class Guarded:
    """What the guard decided, and how: `search.quantized` stays int8. ranking: None where nothing had to be ranked."""

    search: Search
    ranking: Ranking | None


def guard(
    layers: Sequence[str],
    judge: Callable[[frozenset[str]], Verdict],
    rank: Callable[[], Ranking],
    threshold: float,
    shortage: str = "",
    budget: int | None = None,
) -> Guarded:
    """Search for the layers that can be int8 together; see give_back().

    judge: the verdict on the model in which the layers of these names are int8. rank: the layers' order of harm, asked
    for once where not all can stay. shortage: "" or why the samples are too few to prove the threshold of any model
    (Metric.shortage): then only all layers together are tried, because a model may have become better, and it is the
    note of a search that finds none. budget: verdicts that may be asked for; None: as many as give_back() takes.
    """
    ranking: Ranking | None = None

    def order() -> Sequence[str]:
        nonlocal ranking
        ranking = rank()
        return ranking.order

    search = give_back(
        layers, judge, (lambda: tuple(layers)) if shortage else order, threshold, 1 if shortage else budget
    )
    if shortage and not search.kept:
        search = dataclasses.replace(search, ranking=(), note=shortage)
    return Guarded(search, ranking)
