"""The check of the gradients and the scale rule in TensorFlow: one custom op each, or plain ops with the same results.

The plain ops are for large gradients, where they are faster; for XLA, which cannot compile a custom op; for GPUs, whose
stream TensorFlow's C API does not give; and for machines without the compiled library. Both take what a mixed list of
gradients holds (float16, bfloat16, float32, float64), and both compute as `csrc/include/halfstep/gradients.h` and
`scaling.h` say.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from tensorflow.python.ops import control_flow_util  # no public function tells of XLA

from halfstep.scale_rule import COUNTERS, ScaleRule
from halfstep.tensorflow_library import library, library_missing

# Elements from which on a gradient has operations of its own. One op for all waits until the last gradient is there,
# and then reads from memory what the caches held when it was made; for small ones the number of operations counts more.
_LARGE = 1 << 17


class State(NamedTuple):
    """What the rule updates: scalars of float32, int64 and int32, and int64 [8] in the order of COUNTERS."""

    scale: Any
    growth_tracker: Any
    hysteresis_left: Any
    counters: Any


def why_plain() -> str:
    """Return why plain ops are used where this is called, "" for the custom ops."""
    if control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()):
        return "XLA compiles this function, and it has no kernels of custom ops"
    if tf.config.list_logical_devices("GPU"):
        return "there is a GPU, and TensorFlow's C API gives kernels no CUDA stream"
    library()  # warns
    return library_missing()


def check_and_unscale(grads: list[Any], scale: Any) -> tuple[list[Any], Any, Any]:
    """Return (the unscaled gradients, found, norm), both float32 scalars.

    grads: tensors, of which none is None. found is 1 if an unscaled element is infinite or NaN, else 0; norm is the L2
    norm of all of them. scale: a float32 scalar.
    """
    if why_plain():
        return _check_plain(grads, scale)
    small = [index for index, grad in enumerate(grads) if (grad.shape.num_elements() or 0) < _LARGE]
    large = sorted(set(range(len(grads))) - set(small))
    checked = []  # (indices, their unscaled gradients, found, norm)
    if small or not large:
        given = [grads[index] for index in small]
        checked.append((small, *library().halfstep_check_and_unscale(given, scale, threads=_threads())))
    if large:
        checked.append((large, *_check_plain([grads[index] for index in large], scale)))
    result = list(grads)
    for indices, unscaled, _, _ in checked:
        for index, value in zip(indices, unscaled, strict=True):
            result[index] = value
    if len(checked) == 1:
        return result, *checked[0][2:]
    _, _, founds, norms = zip(*checked, strict=True)
    squares = tf.square(tf.cast(tf.stack(norms), tf.float64))
    return result, tf.reduce_max(tf.stack(founds)), tf.cast(tf.sqrt(tf.reduce_sum(squares)), tf.float32)


def _check_plain(grads: list[Any], scale: Any) -> tuple[list[Any], Any, Any]:
    if not grads:
        return [], tf.constant(0.0), tf.constant(0.0)
    inverse = tf.cast(1.0 / tf.cast(scale, tf.float64), tf.float32)
    unscaled, halves = [], []  # halves of the sums of squares
    for grad in grads:
        compute = tf.float64 if grad.dtype == tf.float64 else tf.float32
        value = tf.cast(tf.cast(grad, compute) * tf.cast(inverse, compute), grad.dtype)
        unscaled.append(value)
        halves.append(tf.cast(tf.nn.l2_loss(tf.cast(value, compute)), tf.float64))
    half = tf.add_n(halves)
    # A finite sum of squares is one of finite elements; only for others need all be looked at again.
    finite = tf.cond(tf.math.is_finite(half), lambda: True, lambda: _all_finite(unscaled))
    return unscaled, 1.0 - tf.cast(finite, tf.float32), tf.cast(tf.sqrt(2.0 * half), tf.float32)


def _all_finite(tensors: list[Any]) -> Any:
    return tf.reduce_all(tf.stack([tf.reduce_all(tf.math.is_finite(tensor)) for tensor in tensors]))


def count_non_finite(grads: list[Any]) -> Any:
    """Return how many elements of each gradient are infinite or NaN: int64 [gradients]."""
    if not grads:
        return tf.zeros([0], tf.int64)
    if not why_plain():
        return tf.cast(library().halfstep_gradient_statistics(grads, 1.0, threads=_threads())[:, 0], tf.int64)
    return tf.stack([tf.math.count_nonzero(tf.logical_not(tf.math.is_finite(grad))) for grad in grads])


def update_scale(state: State, rule: ScaleRule, found: Any, norm: Any) -> State:
    """Return the state after a step. found, norm: float32 [replicas]."""
    if not why_plain():
        factors = np.array([rule.growth_factor, rule.backoff_factor, rule.min_scale, rule.max_scale])
        return State(
            *library().halfstep_update_scale(
                *state,
                found,
                norm,
                factors,
                growth_interval=rule.growth_interval,
                hysteresis=rule.hysteresis,
                refill=rule.refill,
                growth_delay=rule.growth_delay,
            )
        )
    return _update_scale_plain(state, rule, found, norm)


def _update_scale_plain(state: State, rule: ScaleRule, found: Any, norm: Any) -> State:
    """Follow the rule as csrc/scaling_step.h has it, both outcomes computed and one chosen: scalars cost no time."""
    scale, tracker, credit, counters = state
    found = tf.reduce_any(found != 0.0)
    wide = tf.cast(scale, tf.float64)  # products are taken in float64 and rounded once
    floor, ceiling = tf.constant(rule.min_scale, tf.float32), tf.constant(rule.max_scale, tf.float32)

    # found
    full = tf.constant(rule.hysteresis, tf.int32)
    spent = tf.maximum(credit - 1, 0)
    backs_off = spent <= 0
    stuck = tf.logical_and(backs_off, scale <= floor)
    lowered = tf.maximum(tf.cast(wide * rule.backoff_factor, tf.float32), floor)
    lowered = tf.where(tf.logical_and(backs_off, scale > floor), lowered, scale)
    if rule.refill == "on_clean_step_and_backoff":
        spent = tf.where(backs_off, full, spent)

    # not found
    grows = tracker + 1 >= rule.growth_interval
    grown = tf.cast(wide * rule.growth_factor, tf.float32)
    may_grow = tf.logical_and(grows, tf.logical_and(tf.math.is_finite(grown), scale < ceiling))
    raised = tf.where(may_grow, tf.minimum(grown, ceiling), scale)
    refilled = tf.where(grows, full, credit) if rule.refill == "on_growth" else full

    after = State(
        tf.where(found, lowered, raised),
        tf.where(
            found, tf.constant(-rule.growth_delay, tf.int64), tf.where(grows, tf.zeros_like(tracker), tracker + 1)
        ),
        tf.where(found, spent, refilled),
        None,
    )
    combined = tf.cast(norm, tf.float64)
    combined = tf.sqrt(tf.reduce_sum(tf.square(combined)))
    happened = {
        "steps": True,
        "skipped": found,
        "growths": after.scale > scale,
        "backoffs": after.scale < scale,
        "at_floor": tf.logical_and(found, stuck),
        "nan_steps": tf.logical_and(found, tf.math.is_nan(combined)),
        "inf_steps": tf.logical_and(found, tf.math.is_inf(combined)),
    }
    added = tf.stack([tf.cast(happened.get(name, found), tf.int64) for name in COUNTERS])
    kept = tf.stack([tf.cast(found, tf.int64) if name == "consecutive_skipped" else 1 for name in COUNTERS])
    return after._replace(counters=counters * kept + added)


def _threads() -> int:
    """Return the threads of one operation, as TensorFlow is configured; 0 for all processors."""
    return tf.config.threading.get_intra_op_parallelism_threads()
