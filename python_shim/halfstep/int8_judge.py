"""The accuracy guard's view of one optimization: it hands over sets of layers, and asks for verdicts on models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from halfstep.calibration_data import Batch
from halfstep.int8_metric import Metric, Verdict

if TYPE_CHECKING:
    from halfstep.int8_optimize import Int8Run


class Judge:
    """The metric on models with these int8 layers. What was judged with the same estimator is remembered."""

    def __init__(self, run: Int8Run, metric: Metric) -> None:
        self._run = run
        self._metric = metric
        self._known: dict[tuple[str, frozenset[str]], Verdict] = {}
        self.shortage = metric.shortage
        self.evaluations = 0

    def judge(self, names: frozenset[str]) -> Verdict:
        """Return the verdict on build(names): the metric for the search, which has sets in place of models."""
        key = (self._run.report.calibrator if names else "", names)
        if key not in self._known:
            self._known[key] = self.fresh(self._run.build(names))
        return self._known[key]

    def fresh(self, model: nn.Module) -> Verdict:
        """Return the verdict on a model."""
        self.evaluations += 1
        return self._metric.judge(model)


def call(model: nn.Module, batch: Batch) -> Any:
    """Call the model on a batch."""
    return batch(model)
