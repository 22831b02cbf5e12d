"""All classes for mixed precision in one place; `modules.engine.mixed_precision` is another name for it."""

from __future__ import annotations

from halfstep.config import MixedPrecisionConfig
from halfstep.manager import MixedPrecisionManager
from halfstep.policy import CustomPrecisionPolicy
from halfstep.statistics import MixedPrecisionStatistics

__all__ = ["CustomPrecisionPolicy", "MixedPrecisionConfig", "MixedPrecisionManager", "MixedPrecisionStatistics"]
