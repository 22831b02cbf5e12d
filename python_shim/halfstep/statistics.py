"""What a run reports about itself. Every number was measured; what was not is NaN, with the reason in `notes`."""

from __future__ import annotations

import dataclasses
import math

NAN = math.nan


@dataclasses.dataclass
class MixedPrecisionStatistics:
    """Statistics of a run. docs/statistics.md defines each field.

    Counts are floats where they can be unknown, since an unknown count is NaN too.
    """

    framework: str
    precision_policy: str
    total_operations: float = NAN
    fp16_operations: float = NAN
    bf16_operations: float = NAN
    fp32_operations: float = NAN
    mixed_operations: float = NAN
    speedup_factor: float = NAN
    average_speedup: float = NAN
    peak_speedup: float = NAN
    memory_saved_bytes: float = NAN
    memory_reduction: float = NAN
    accuracy_preservation: float = NAN
    overflow_events: float = NAN
    underflow_events: float = NAN
    scale_adjustments: float = NAN
    steps: float = NAN
    skipped_steps: float = NAN
    loss_scale: float = NAN
    host_syncs: float = NAN
    notes: dict[str, str] = dataclasses.field(default_factory=dict)

    def as_dict(self) -> dict[str, object]:
        """Return the fields as a dictionary, `notes` included."""
        return dataclasses.asdict(self)
