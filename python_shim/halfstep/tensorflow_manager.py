"""The TensorFlow side of MixedPrecisionManager."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

from halfstep.config import MixedPrecisionConfig, check_number, check_scale
from halfstep.keras_fit import CannotKeep, host_batch, listen_to_fit, stop_listening
from halfstep.keras_twin import Speed
from halfstep.keras_watched import Watched
from halfstep.loss_scale_callback import with_callback
from halfstep.loss_scale_optimizer import LossScaleOptimizer
from halfstep.statistics import NAN, MixedPrecisionStatistics

# Settings of the configuration that are torch's. Keras' layers and optimizers have nothing that would act on them.
_NOT_HERE = ("half_reductions", "numerical_stability_check", "autocast_device_type")
# Settings that a traced training step has as constants.
_RULE = ("loss_scale_growth_factor", "loss_scale_backoff_factor", "loss_scale_growth_interval")
_TRACED = (*_RULE, "gradient_clipping_threshold")
_COUNTED = ("steps", "skipped_steps", "overflow_events", "scale_adjustments", "loss_scale")
_SPEED = ("speedup_factor", "average_speedup", "peak_speedup")
_MEMORY = ("memory_saved_bytes", "memory_reduction")
_METHODS = {"setup": "setup_pytorch_training"}  # of the manager that calls them
_OFF = "monitoring is off (enable_monitoring=False)"

_in_force: TensorFlowManager | None = None  # whose policy Keras has and who hears of fit
_contexts = 0  # that are open


class TensorFlowManager:
    """Keras' global policy, the optimizer's loss scale, and what the training of the latest model shows."""

    framework = "tensorflow"

    def __init__(
        self, config: MixedPrecisionConfig, enable_loss_scaling: bool, monitor: bool, *, clip: bool, custom_policy: Any
    ) -> None:
        _check_keras()
        if custom_policy is not None:
            _check_custom_policy(custom_policy)
        self.config = config
        self._loss_scaling = enable_loss_scaling
        self._monitoring = monitor
        self._clip = clip
        self._custom_policy = custom_policy
        self._float16_layers = False  # apply_policy() has made some
        self._before: Any = None  # the global policy to put back
        self._wrapped: Callable[[], Any] = _none  # the latest result of wrap_optimizer()
        self._scaling: Callable[[], LossScaleOptimizer | None] = _none  # whose counters are reported
        self._clipped: weakref.WeakSet[Any] = weakref.WeakSet()  # the optimizers whose global_clipnorm is ours
        self._watched = Watched()
        self._plans: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()

    # ------------------------------------------------------------------------------------------- policy and fit

    @property
    def _policy(self) -> str:
        return self.config.precision_policy if self.config.enable_autocast else "float32"

    def setup_tensorflow_policy(self) -> None:
        """See MixedPrecisionManager."""
        global _in_force
        if _contexts:
            raise RuntimeError(
                "setup_tensorflow_policy() inside of a policy_context(), whose end would put back the policy before "
                "it: call it outside"
            )
        current = keras.config.dtype_policy()
        previous = _in_force
        if previous is None or current.name != previous._policy:  # else it is the other manager's, which goes with it
            self._before = current
        elif previous is not self:
            self._before = previous._before
        keras.config.set_dtype_policy(self._policy)
        _in_force = self
        listen_to_fit(self)
        if self._policy == "mixed_float16":
            _warn_of_slow_float16()

    def restore_tensorflow_policy(self) -> None:
        """See MixedPrecisionManager."""
        global _in_force
        if _in_force is not self:
            return
        _in_force = None
        stop_listening()
        if keras.config.dtype_policy().name == self._policy:  # else somebody has set another one since
            keras.config.set_dtype_policy(self._before)

    @contextlib.contextmanager
    def policy_context(self) -> Iterator[None]:
        """See MixedPrecisionManager."""
        global _contexts
        before = keras.config.dtype_policy()
        keras.config.set_dtype_policy(self._policy)
        _contexts += 1
        try:
            yield
        finally:
            _contexts -= 1
            keras.config.set_dtype_policy(before)

    def autocast_context(self) -> contextlib.AbstractContextManager[None]:
        """Return policy_context(), under the name that users of PyTorch know."""
        return self.policy_context()

    @contextlib.contextmanager
    def around_fit(self, model: Any, arguments: dict[str, Any]) -> Iterator[None]:
        """Hear of a fit: apply the custom policy if that was not done, add the callback, note model and first batch."""
        if self._custom_policy is not None and self._policy != "float32" and model not in self._plans:
            self.apply_policy(model)
        self._note_optimizer(getattr(model, "optimizer", None))
        arguments["callbacks"], done = with_callback(arguments.get("callbacks"))
        if self._monitoring and "x" in arguments:
            self._watched, arguments["x"] = self._watched.after(model, arguments)
        try:
            yield
        finally:
            done()

    def watch(self, model: Any, x: Any, y: Any, sample_weight: Any) -> None:
        """See MixedPrecisionManager."""
        if not isinstance(model, keras.Model):
            raise TypeError(f"model is {type(model).__name__}, expected keras.Model")
        if x is None:
            raise ValueError("x is None, expected the inputs of one batch")
        try:
            batch = host_batch(x, y, sample_weight)
        except CannotKeep as error:
            raise TypeError(f"x, y or sample_weight is not of arrays: {error}") from None
        self._note_optimizer(getattr(model, "optimizer", None))
        if self._monitoring:
            self._watched = Watched(model, batch)

    def apply_policy(self, model: Any) -> Any:
        """See MixedPrecisionManager."""
        if self._custom_policy is None:
            raise ValueError("apply_policy() has nothing to apply: the manager was made without custom_policy")
        from halfstep import keras_policy

        half = self._policy.removeprefix("mixed_")
        if half == "float32":
            raise ValueError("the precision policy is float32, under which no custom_policy is asked")
        plan = keras_policy.apply_policy(model, self._custom_policy, half)
        if self._loss_scaling and keras_policy.needs_loss_scaling(model):
            self._float16_layers = True
        self._plans[model] = plan
        return plan

    def plan_of(self, model: Any) -> Any:
        """Return the plan that apply_policy() has applied to the model."""
        return self._plans.get(model)

    def remove_policy(self, model: Any) -> None:
        """Give the layers back the precisions that they had before apply_policy()."""
        from halfstep import keras_policy

        keras_policy.remove_policy(model)
        self._plans.pop(model, None)

    # -------------------------------------------------------------------------------------------- the optimizer

    def _scales(self, config: MixedPrecisionConfig) -> bool:
        half = config.enable_autocast and config.precision_policy == "mixed_float16"
        return self._loss_scaling and (half or self._float16_layers)

    def wrap_optimizer(self, optimizer: Any) -> Any:
        """See MixedPrecisionManager."""
        optimizer = keras.optimizers.get(optimizer)  # raises ValueError for what is none
        if optimizer is None:
            raise TypeError("optimizer is None, expected what keras.optimizers.get takes")
        inner = getattr(optimizer, "inner_optimizer", optimizer)
        self._check_clipping(inner, self.config)
        if self._scales(self.config) and not isinstance(optimizer, LossScaleOptimizer):
            optimizer = self._scaling_optimizer(optimizer)
        self._set_clipping(inner)
        self._wrapped = weakref.ref(optimizer)
        self._note_optimizer(optimizer)
        return optimizer

    def _scaling_optimizer(self, optimizer: Any) -> LossScaleOptimizer:
        config = self.config
        factors = {
            "growth_factor": config.loss_scale_growth_factor,
            "backoff_factor": config.loss_scale_backoff_factor,
        }
        if not isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
            return LossScaleOptimizer(optimizer, config.loss_scale, config.loss_scale_growth_interval, **factors)
        return LossScaleOptimizer.from_keras(optimizer, **factors)

    def _note_optimizer(self, optimizer: Any) -> None:
        """Take note of the optimizer in use: reports and changes of the scale are about it, or none."""
        if optimizer is not None:
            self._scaling = weakref.ref(optimizer) if isinstance(optimizer, LossScaleOptimizer) else _none

    def _threshold(self, config: MixedPrecisionConfig) -> float | None:
        threshold = config.gradient_clipping_threshold
        return threshold if self._clip and threshold != math.inf else None

    def _check_clipping(self, inner: Any, config: MixedPrecisionConfig) -> None:
        threshold = self._threshold(config)
        if threshold is None or inner in self._clipped:
            return
        if isinstance(inner, keras.optimizers.MultiOptimizer):
            raise ValueError(
                "the optimizer is a MultiOptimizer, which does not clip, and the manager has "
                f"gradient_clipping_threshold={threshold!r}: let the optimizers in it clip, with math.inf here"
            )
        for name in ("clipnorm", "clipvalue", "global_clipnorm"):
            own = getattr(inner, name, None)
            if own is not None and (name, own) != ("global_clipnorm", threshold):
                raise ValueError(
                    f"the optimizer has {name}={own!r}, and the manager has gradient_clipping_threshold={threshold!r}: "
                    "Keras clips in one way alone. Leave one of them out; math.inf as the threshold clips nothing."
                )

    def _set_clipping(self, inner: Any) -> None:
        """Set global_clipnorm, or take one away that was set here."""
        threshold = self._threshold(self.config)
        if threshold is not None:
            inner.global_clipnorm = threshold
            self._clipped.add(inner)
        elif inner in self._clipped:
            inner.global_clipnorm = None
            self._clipped.discard(inner)

    def apply_config(self, config: MixedPrecisionConfig, changed: set[str]) -> None:
        """Put a checked new configuration into force, or raise ValueError where it could not act."""
        differing = {name for name in changed if getattr(config, name) != getattr(self.config, name)}
        for name in _NOT_HERE:
            if name in differing:
                raise ValueError(f"{name} is a setting for framework='pytorch'; with TensorFlow nothing acts on it")
        clip_before, self._clip = self._clip, self._clip or "gradient_clipping_threshold" in changed
        try:
            self._check_changes(config, changed, differing, clip_before)
        except ValueError:
            self._clip = clip_before
            raise
        policy, self.config = self._policy, config
        wrapped, scaling = self._wrapped(), self._scaling()
        if wrapped is not None and "gradient_clipping_threshold" in changed:
            self._set_clipping(getattr(wrapped, "inner_optimizer", wrapped))
        if scaling is not None:
            if not scaling.built:
                _set_rule(scaling, config, differing)
            if "loss_scale" in changed:
                _set_scale(scaling, config.loss_scale)
        if _in_force is self and self._policy != policy:
            keras.config.set_dtype_policy(self._policy)

    def _check_changes(
        self, config: MixedPrecisionConfig, changed: set[str], differing: set[str], clip_before: bool
    ) -> None:
        wrapped, scaling = self._wrapped(), self._scaling()
        if wrapped is not None:
            if self._scales(config) != self._scales(self.config):
                raise ValueError(
                    "precision_policy and enable_autocast decide whether the optimizer scales the loss; after "
                    "wrap_optimizer() that cannot change. Make a new MixedPrecisionManager."
                )
            self._check_clipping(getattr(wrapped, "inner_optimizer", wrapped), config)
        if scaling is not None and "loss_scale" in changed:
            dataclasses.replace(scaling.rule, init_scale=config.loss_scale)  # raises where its bounds exclude it
        starts_clipping = "gradient_clipping_threshold" in changed and not clip_before
        traced = differing | ({"gradient_clipping_threshold"} if starts_clipping else set())
        late = [name for name in _TRACED if name in traced]
        if late and any(optimizer is not None and optimizer.built for optimizer in (wrapped, scaling)):
            raise ValueError(
                f"{', '.join(late)}: the optimizer has been built, and training steps that were traced keep the values "
                "they had. Change them before the first step, or make a new MixedPrecisionManager."
            )

    def adjust_loss_scale(self, factor: float) -> None:
        """Multiply the loss scale by `factor`, a finite number > 0, within float32 (reads the scale on the host)."""
        check_number("a finite number > 0", lambda value: 0 < value < math.inf)("factor", factor)
        scaling = self._scaling()
        if scaling is None and not self._scales(self.config):
            return
        scale = (self.config.loss_scale if scaling is None else scaling.scale()) * factor
        try:
            check_scale("the loss scale", scale)
            if scaling is not None:
                dataclasses.replace(scaling.rule, init_scale=scale)  # raises where its bounds exclude it
        except ValueError as error:
            raise ValueError(f"factor is {factor!r}: {error}") from None
        if scaling is None:
            self.config.loss_scale = scale
        else:
            _set_scale(scaling, scale)

    # --------------------------------------------------------------------------------------------- the statistics

    def statistics(self, *, speed: bool = False) -> MixedPrecisionStatistics:
        """Return what is known; memory is measured once for a model and its batch, speed too where it is asked for."""
        result = MixedPrecisionStatistics(self.framework, self.config.precision_policy)
        notes = result.notes
        if not self._monitoring:
            unknown = (field.name for field in dataclasses.fields(result) if getattr(result, field.name) is NAN)
            notes.update(dict.fromkeys(unknown, _OFF))
            return result
        self._fill_counts(result)
        memory = self._watched.memory()
        if isinstance(memory, str):
            notes.update(dict.fromkeys(_MEMORY, memory))
        else:
            same, full = memory
            result.memory_saved_bytes = float(full - same)
            result.memory_reduction = 1 - same / full if full else NAN
            notes.update(dict.fromkeys(_MEMORY, "bytes that the layers put out in a training step's forward pass"))
        timed = self._watched.speed(measure=speed)
        if isinstance(timed, str):
            notes.update(dict.fromkeys(_SPEED, timed))
        else:
            result.speedup_factor = result.average_speedup = timed.median
            result.peak_speedup = timed.peak
            notes.update(dict.fromkeys(_SPEED, _how_timed(timed)))
        for field in dataclasses.fields(result):
            value = getattr(result, field.name)
            if isinstance(value, float) and math.isnan(value):
                notes.setdefault(field.name, "not measured with TensorFlow")
        return result

    def comprehensive_statistics(self) -> dict[str, Any]:
        """Return the statistics as a dictionary, with training_speedup."""
        result = self.statistics(speed=True)
        result.notes["training_speedup"] = result.notes["speedup_factor"]
        return {**result.as_dict(), "training_speedup": result.speedup_factor}

    def _fill_counts(self, result: MixedPrecisionStatistics) -> None:
        scaling = self._scaling()
        if scaling is not None:
            counters = scaling.counters()
            result.steps = counters["steps"]
            result.skipped_steps = result.overflow_events = counters["skipped"]
            result.scale_adjustments = counters["growths"] + counters["backoffs"]
            result.loss_scale = scaling.scale()
            return
        model = self._watched.model()
        if isinstance(getattr(model, "optimizer", None), keras.optimizers.LossScaleOptimizer):
            why = "the optimizer is Keras' LossScaleOptimizer, which counts nothing: use wrap_optimizer()"
            if not self._loss_scaling:
                why = "compile() added Keras' LossScaleOptimizer, which counts nothing: give it auto_scale_loss=False"
        elif self._wrapped() is not None:
            why = "the optimizer does not scale the loss, so no steps were counted"
        else:
            why = "wrap_optimizer() has not been called, or its optimizer is gone"
        result.notes.update(dict.fromkeys(_COUNTED, why))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise AttributeError(
            f"this manager's framework is 'tensorflow', which has no {_METHODS.get(name, name)}; it has "
            "setup_tensorflow_policy, wrap_optimizer, apply_policy, policy_context and watch"
        )


def _none() -> None:
    return None


def _check_keras() -> None:
    if keras.backend.backend() != "tensorflow":
        raise ImportError(f"the backend of Keras is {keras.backend.backend()!r}, expected 'tensorflow' (KERAS_BACKEND)")
    try:
        same = tf.keras.Model is keras.Model
    except ImportError:  # the older Keras is asked for, and is not installed
        same = False
    if not same:
        raise ImportError("tf.keras is not Keras 3, which framework='tensorflow' is for: unset TF_USE_LEGACY_KERAS")


def _check_custom_policy(policy: Any) -> None:
    if isinstance(policy, type) or not (hasattr(policy, "should_use_fp16") or hasattr(policy, "to_json")):
        raise TypeError(
            f"custom_policy is {policy!r}, expected an instance of a CustomPrecisionPolicy or a policy with to_json()"
        )
    if getattr(policy, "chooses_loss_scale", lambda: False)():
        warnings.warn(
            f"get_loss_scale_factor of {type(policy).__name__} is not asked under framework='tensorflow': the loss "
            "scale follows the rule of the LossScaleOptimizer",
            stacklevel=5,
        )


def _set_scale(optimizer: LossScaleOptimizer, scale: float) -> None:
    """Set the running scale, or that of the first step where there was none yet."""
    if optimizer.built:
        optimizer.dynamic_scale.assign(scale)
    else:
        optimizer.rule = dataclasses.replace(optimizer.rule, init_scale=scale)
        optimizer.initial_scale = scale


def _set_rule(optimizer: LossScaleOptimizer, config: MixedPrecisionConfig, changed: set[str]) -> None:
    """Set what has changed of the rule of an optimizer that has not traced a step."""
    names = {name.removeprefix("loss_scale_"): getattr(config, name) for name in _RULE if name in changed}
    optimizer.rule = dataclasses.replace(optimizer.rule, **names)


def _how_timed(speed: Speed) -> str:
    steps = f"of {len(speed.mixed)} training steps of a copy of the model and as many of its float32 twin"
    return f"{steps}; {speed.skipped} of the former were skipped for their gradients" if speed.skipped else steps


@functools.cache
def _warn_of_slow_float16() -> None:
    """Warn, once, where TensorFlow sees processors alone."""
    if all(device.device_type == "CPU" for device in tf.config.list_physical_devices()):
        warnings.warn(
            "mixed_float16 without a GPU: on a processor TensorFlow gains nothing from float16, and on some it takes "
            "many times as long as float32. mixed_bfloat16 is the policy for processors.",
            stacklevel=4,
        )
