"""The names of the user's document in one place: halfstep.mixed_precision."""

from __future__ import annotations

from halfstep.config import MixedPrecisionConfig
from halfstep.manager import MixedPrecisionManager
from halfstep.statistics import MixedPrecisionStatistics

__all__ = ["MixedPrecisionConfig", "MixedPrecisionManager", "MixedPrecisionStatistics"]
