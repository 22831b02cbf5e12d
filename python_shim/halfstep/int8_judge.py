"""The accuracy guard's view of one optimization: it hands over sets of layers, and asks for verdicts on models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from halfstep.calibration_data import Batch, looks_like_labels
from halfstep.int8_report import Report
from halfstep.int8_verdict import Metric, Verdict

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
        carriers = self._run.carriers
        if not names and carriers.fastest == carriers.own:
            return self._metric.of_itself()
        key = (self._run.report.calibrator if names else "", names)
        if key not in self._known:
            self._known[key] = self.fresh(self._run.build(names))
        return self._known[key]

    def fresh(self, model: nn.Module) -> Verdict:
        """Return the verdict on a model."""
        self.evaluations += 1
        return self._metric.judge(model)


def tell(report: Report, metric: Metric, model: nn.Module, batches: Sequence[Batch]) -> None:
    """Write to the report by what models are judged, and where outputs are compared, why the batches gave nothing else.

    model: whose forward takes the batches.
    """
    report.metric, report.proxy, report.is_share = metric.kind, metric.proxy, metric.is_share
    report.float_score, report.judged = metric.float_score, metric.samples
    report.notes += metric.notes
    if not metric.proxy:
        return
    if any(batch.labels is not None for batch in batches):
        report.notes.append(
            "batches have labels, but not one class of the outputs for each sample: outputs are compared"
        )
    if argument := looks_like_labels(model, batches[0]):
        report.notes.append(
            f"the integers [batch] at the end of the batches were passed to forward as `{argument}`, so they are no "
            "labels: outputs are compared"
        )
    if left_out := batches[0].left_out:
        report.notes.append(
            f"forward does not take all that batches have ({', '.join(left_out)}), and integers [batch] alone are "
            "labels: outputs are compared; an eval_fn can judge by the rest"
        )


def call(model: nn.Module, batch: Batch) -> Any:
    """Call the model on a batch."""
    return batch(model)
