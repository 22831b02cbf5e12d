"""What MixedPrecisionManager(framework="sklearn") is: a SklearnPrecisionOptimizer with the manager's statistics."""

from __future__ import annotations

from typing import Any

from halfstep.config import MixedPrecisionConfig
from halfstep.shrink_report import ShrinkReport
from halfstep.sklearn_optimizer import SklearnPrecisionOptimizer
from halfstep.statistics import MixedPrecisionStatistics


class SklearnManager:
    """Reduces data before scikit-learn sees it. scikit-learn computes in float32 or float64 and has no half policy."""

    framework = "sklearn"

    def __init__(self, config: MixedPrecisionConfig) -> None:
        self.config = config
        self.optimizer = SklearnPrecisionOptimizer()
        self._bytes_before = 0
        self._bytes_after = 0

    def optimize_data_precision(self, X: Any, y: Any = None) -> tuple[Any, Any]:
        """Call the optimizer and add up what it saved."""
        result = self.optimizer.optimize_data_precision(X, y)
        report: ShrinkReport = self.optimizer.report()
        self._bytes_before += report.bytes_before
        self._bytes_after += report.bytes_after
        return result

    def apply_config(self, config: MixedPrecisionConfig, changed: set[str]) -> None:
        """Keep the settings: none acts on data."""
        self.config = config

    def adjust_loss_scale(self, factor: float) -> None:
        """Nothing is scaled here."""

    def statistics(self) -> MixedPrecisionStatistics:
        """Return the bytes that optimize_data_precision() has saved; there are no steps and no operations to count."""
        result = MixedPrecisionStatistics(self.framework, self.config.precision_policy)
        if self._bytes_before:
            result.memory_saved_bytes = float(self._bytes_before - self._bytes_after)
            result.memory_reduction = 1 - self._bytes_after / self._bytes_before
        else:
            why = "optimize_data_precision() has seen no data"
            result.notes.update(memory_saved_bytes=why, memory_reduction=why)
        for name, value in result.as_dict().items():
            if isinstance(value, float) and value != value and name not in result.notes:
                result.notes[name] = "scikit-learn's steps and operations are not halfstep's"
        return result

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise AttributeError(
            f"this manager's framework is 'sklearn', which has no {name}: framework='pytorch' has, with torch"
        )
