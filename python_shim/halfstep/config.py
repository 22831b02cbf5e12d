"""The settings of a mixed-precision run, checked."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

POLICIES = ("mixed_float16", "mixed_bfloat16", "float32")
DEVICE_TYPES = ("cuda", "cpu")
HALF_REDUCTIONS = ("layer_norm", "rms_norm", "group_norm", "cross_entropy", "float32_input")


@dataclasses.dataclass
class MixedPrecisionConfig:
    """Settings of a run. Every field is checked when it is set; a bad value raises and changes nothing.

    precision_policy: "mixed_float16", "mixed_bfloat16" or "float32".
    loss_scale: initial loss scale, > 0 and within float32. Used by mixed_float16.
    loss_scale_growth_factor: > 1, after loss_scale_growth_interval steps without an overflow.
    loss_scale_backoff_factor: between 0 and 1, on an overflow.
    loss_scale_growth_interval: steps, >= 1.
    enable_autocast: False makes autocast_context() a context with autocast off.
    autocast_device_type: "cuda" or "cpu", for contexts opened before a model is known. Where there is no GPU, "cuda"
        means the CPU. After setup_pytorch_training the model's device decides.
    gradient_clipping_threshold: largest L2 norm of the gradients of one optimizer, > 0; math.inf for none. A manager
        that was given a config clips with it in scaler.step(), unless the loop has called scaler.unscale_() itself.
    numerical_stability_check: also check gradients, and skip steps with infinite or NaN ones, where the policy needs
        no loss scale (mixed_bfloat16) or scaling is off.
    half_reductions: which of "layer_norm", "rms_norm", "group_norm" and "cross_entropy" read half, compute in float32
        and write half (cross entropy: a float32 loss) under the mixed policies, instead of going through float32
        copies. "float32_input": these norms also take a float32 residual stream and write half, which the next layer
        would cast it to; where norms are what carries the stream on (post-norm models), the stream becomes half by it.
        They are differentiable once; (), or a tuple without the one in question, gives torch's own back. A list is
        stored as a tuple.
    """

    precision_policy: str = "mixed_float16"
    loss_scale: float = 2**15
    loss_scale_growth_factor: float = 2.0
    loss_scale_backoff_factor: float = 0.5
    loss_scale_growth_interval: int = 2000
    enable_autocast: bool = True
    autocast_device_type: str = "cuda"
    gradient_clipping_threshold: float = 1.0
    numerical_stability_check: bool = True
    half_reductions: tuple[str, ...] = HALF_REDUCTIONS

    def __setattr__(self, name: str, value: Any) -> None:
        check = _CHECKS.get(name)
        if check is None:
            raise AttributeError(f"MixedPrecisionConfig has no field {name!r}; it has {', '.join(_CHECKS)}")
        check(name, value)
        object.__setattr__(self, name, tuple(value) if isinstance(value, list) else value)


def _fail(name: str, value: Any, expected: str, error: type[Exception] = ValueError) -> None:
    raise error(f"{name} is {value!r}, expected {expected}")


def check_choice(*choices: str):
    """Return a check that the value is one of `choices`."""

    def check(name: str, value: Any) -> None:
        if value not in choices:
            _fail(name, value, "one of " + ", ".join(map(repr, choices)))

    return check


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_number(expected: str, accept):
    """Return a check that the value is a number, not NaN, for which `accept` holds."""

    def check(name: str, value: Any) -> None:
        if not _is_number(value):
            _fail(name, value, expected, TypeError)
        try:
            number = float(value)
        except OverflowError:  # an integer beyond float64
            number = math.inf
        if math.isnan(number) or not accept(number):
            _fail(name, value, expected)

    return check


def check_count(name: str, value: Any) -> None:
    """Check that the value is a positive int32."""
    expected = f"an integer from 1 to {_LARGEST_INT}"
    if not isinstance(value, int) or isinstance(value, bool):
        _fail(name, value, expected, TypeError)
    if not 1 <= value <= _LARGEST_INT:
        _fail(name, value, expected)


def _check_reductions(name: str, value: Any) -> None:
    expected = "a tuple of names out of " + ", ".join(map(repr, HALF_REDUCTIONS))
    if not isinstance(value, (tuple, list)):
        _fail(name, value, expected, TypeError)
    if any(entry not in HALF_REDUCTIONS for entry in value):
        _fail(name, value, expected)


def check_bool(name: str, value: Any) -> None:
    """Check that the value is True or False."""
    if not isinstance(value, bool):
        _fail(name, value, "True or False", TypeError)


# The smallest and the largest positive float32: a scale that rounds to 0 or infinity is none.
_SMALLEST, LARGEST_SCALE = 2.0**-149, (2.0 - 2.0**-23) * 2.0**127
_LARGEST_INT = 2**31 - 1

check_scale = check_number(
    f"a number > 0 within float32 ({_SMALLEST:.2g} to {LARGEST_SCALE:.2g})",
    lambda value: _SMALLEST <= value <= LARGEST_SCALE,
)

_CHECKS = {
    "precision_policy": check_choice(*POLICIES),
    "loss_scale": check_scale,
    "loss_scale_growth_factor": check_number("a finite number > 1", lambda value: 1 < value < math.inf),
    "loss_scale_backoff_factor": check_number("a number between 0 and 1", lambda value: 0 < value < 1),
    "loss_scale_growth_interval": check_count,
    "enable_autocast": check_bool,
    "autocast_device_type": check_choice(*DEVICE_TYPES),
    "gradient_clipping_threshold": check_number("a number > 0 (math.inf: no clipping)", lambda value: value > 0),
    "numerical_stability_check": check_bool,
    "half_reductions": _check_reductions,
}
