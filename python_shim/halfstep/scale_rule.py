"""The scale rule's parameters and presets, for doors that must work without a compiled library.

The rule itself and the sources of the presets: `csrc/include/halfstep/scaling.h`, `csrc/scaling.cpp`. A test compares
the presets here with the core's.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from halfstep.config import LARGEST_SCALE, check_choice, check_count, check_number, check_scale

REFILLS = ("on_growth", "on_clean_step", "on_clean_step_and_backoff")
# halfstep::Counter
COUNTERS = ("steps", "skipped", "consecutive_skipped", "growths", "backoffs", "at_floor", "nan_steps", "inf_steps")


@dataclasses.dataclass(frozen=True)
class ScaleRule:
    """The parameters; the defaults are torch's."""

    init_scale: float = 65536.0
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000
    min_scale: float = 0.0
    max_scale: float = LARGEST_SCALE
    hysteresis: int = 1
    refill: str = "on_clean_step"
    growth_delay: int = 0

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            check(name, getattr(self, name))
        if self.min_scale > self.max_scale:
            raise ValueError(f"min_scale is {self.min_scale!r}, expected at most max_scale ({self.max_scale!r})")
        if not self.min_scale <= self.init_scale <= self.max_scale:
            raise ValueError(
                f"init_scale is {self.init_scale!r}, expected a number from min_scale ({self.min_scale!r}) to "
                f"max_scale ({self.max_scale!r})"
            )


PRESETS: dict[str, dict[str, Any]] = {
    "torch": {},
    "keras": {"init_scale": 2.0**15},
    "megatron": {
        "init_scale": 2.0**32,
        "growth_interval": 1000,
        "min_scale": 1.0,
        "hysteresis": 2,
        "refill": "on_growth",
    },
    "deepspeed": {
        "growth_interval": 1000,
        "min_scale": 1.0,
        "hysteresis": 2,
        "refill": "on_growth",
        "growth_delay": 1,
    },
    "apex": {"hysteresis": 2},
    "paddle": {"min_scale": 1.0, "refill": "on_clean_step_and_backoff"},
}


def rule_of(preset: str, **changes: Any) -> ScaleRule:
    """Return the rule of a preset with `changes` to it; those that are None leave what the preset says."""
    check_choice(*PRESETS)("preset", preset)
    return ScaleRule(**{**PRESETS[preset], **{name: value for name, value in changes.items() if value is not None}})


def _check_delay(name: str, value: Any) -> None:
    if value != 0 or isinstance(value, bool):
        try:
            check_count(name, value)
        except (TypeError, ValueError) as error:
            raise type(error)(str(error).replace("from 1 to", "from 0 to")) from None


_CHECKS = {
    "init_scale": check_scale,
    "growth_factor": check_number("a finite number > 1", lambda value: 1 < value < math.inf),
    "backoff_factor": check_number("a number between 0 and 1", lambda value: 0 < value < 1),
    "growth_interval": check_count,
    "min_scale": check_number(f"a number from 0 to {LARGEST_SCALE:.2g}", lambda value: 0 <= value <= LARGEST_SCALE),
    "max_scale": check_scale,
    "hysteresis": check_count,
    "refill": check_choice(*REFILLS),
    "growth_delay": _check_delay,
}
