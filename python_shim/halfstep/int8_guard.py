"""The accuracy guard: which layers stay int8 so that the model's drop is provably at most a threshold."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from halfstep.int8_metric import Metric
from halfstep.int8_ranking import Ranking
from halfstep.int8_search import Search, give_back


@dataclass(frozen=True)
class Guarded:
    """What the guard decided, and how: `search.quantized` stays int8. ranking: None where nothing had to be ranked."""

    search: Search
    ranking: Ranking | None


def guard(
    metric: Metric,
    layers: Sequence[str],
    build: Callable[[frozenset[str]], nn.Module],
    rank: Callable[[], Ranking],
    threshold: float,
    budget: int | None = None,
) -> Guarded:
    """Search for the layers that can be int8 together; see give_back().

    build: the model with these layers int8. rank: their order of harm, asked for once where not all can stay. Where the
    samples are too few to prove the threshold of any model, only all layers together are tried, because a model may
    have become better, and the note says how many samples are needed.
    """
    ranking: Ranking | None = None

    def order() -> Sequence[str]:
        nonlocal ranking
        ranking = rank()
        return ranking.order

    shortage = metric.shortage(threshold)
    search = give_back(
        layers,
        lambda quantized: metric.judge(build(quantized)),
        (lambda: tuple(layers)) if shortage else order,
        threshold,
        1 if shortage else budget,
    )
    if shortage and not search.kept:
        search = dataclasses.replace(search, ranking=(), note=shortage)
    return Guarded(search, ranking)
