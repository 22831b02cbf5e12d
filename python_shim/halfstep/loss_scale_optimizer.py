"""halfstep's LossScaleOptimizer for Keras: one pass over the gradients, a bounded scale, a memory of what it did."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import keras
import tensorflow as tf

from halfstep.scale_rule import COUNTERS, rule_of
from halfstep.tensorflow_ops import State, check_and_unscale, count_non_finite, update_scale, why_plain

_OWN = ("growth_factor", "backoff_factor", "min_scale", "max_scale", "hysteresis", "refill", "growth_delay")


class _Memory(keras.layers.Layer):
    """The variables beside those of Keras' own optimizer.

    A layer, so that Keras' and TensorFlow's checkpoints find it below the optimizer and keep it apart: one variable
    more in the optimizer's own list, and Keras' optimizer would refuse all of a checkpoint.
    """

    def __init__(self, hysteresis: int) -> None:
        super().__init__(name="halfstep", dtype="float32", trainable=False)
        self._hysteresis = hysteresis

    def build(self, gradients: int) -> None:
        """Make the variables. gradients: how many there are."""

        def variable(name: str, shape: tuple[int, ...], dtype: str, value: float = 0) -> Any:
            start = keras.initializers.Constant(value)
            return self.add_weight(
                name=name, shape=shape, dtype=dtype, initializer=start, trainable=False, aggregation="none"
            )

        self.hysteresis_left = variable("hysteresis_left", (), "int32", self._hysteresis)
        self.counters = variable("counters", (len(COUNTERS),), "int64")
        self.gradient_norm = variable("gradient_norm", (), "float32", math.nan)
        self.non_finite = variable("non_finite", (gradients,), "int64")  # elements, in the last skipped step
        self.built = True

    def save_own_variables(self, store: Any) -> None:
        """Save each variable under its name."""
        for variable in self.weights:
            store[variable.name] = variable.numpy()

    def load_own_variables(self, store: Any) -> None:
        """Load what is there and has the right shape; a file of Keras' own optimizer has none of it."""
        for variable in self.weights:
            if variable.name in store.keys() and tuple(store[variable.name].shape) == tuple(variable.shape):  # noqa: SIM118
                variable.assign(store[variable.name])


@keras.saving.register_keras_serializable(package="halfstep")
class LossScaleOptimizer(keras.optimizers.LossScaleOptimizer):
    """A drop-in for keras.optimizers.LossScaleOptimizer, for the TensorFlow backend.

    inner_optimizer, initial_scale, dynamic_growth_steps, name: Keras'. With them alone the scale moves exactly as
    Keras' does. Clipping, EMA and accumulation stay arguments of the inner optimizer.
    preset: whose rule to follow: "keras", "torch", "megatron", "deepspeed", "apex" or "paddle", the two numbers above
        included unless given. What follows replaces single parameters of it.
    growth_factor > 1, backoff_factor between 0 and 1.
    min_scale, max_scale: bounds of the scale, 0 and the largest float32 by default.
    hysteresis: how many overflows a credit tolerates before the scale backs off; 1: every overflow backs off.
    refill: when the credit is restored: "on_growth", "on_clean_step" or "on_clean_step_and_backoff".
    growth_delay: clean steps after the start or an overflow that do not count towards dynamic_growth_steps.

        optimizer = LossScaleOptimizer(keras.optimizers.Adam(), min_scale=1.0)
        model.compile(optimizer=optimizer, loss="mse")  # Keras does not wrap it again

    A step looks at the gradients once: whether they are finite, their norm, and the unscaled ones come out of the same
    operations (explain() says of which kind, and why). Beyond Keras: an overflow on any replica skips the step on all
    of them; the unscaled gradients must be finite, so that a scale of 0 does not reach the weights; the scale never
    becomes infinite; counters(), gradient_norm() and overflowed() tell what happened. A model that was saved with this
    optimizer is loaded where `halfstep.tensorflow` was imported.
    """

    def __init__(
        self,
        inner_optimizer: Any,
        initial_scale: float | None = None,
        dynamic_growth_steps: int | None = None,
        *,
        preset: str = "keras",
        growth_factor: float | None = None,
        backoff_factor: float | None = None,
        min_scale: float | None = None,
        max_scale: float | None = None,
        hysteresis: int | None = None,
        refill: str | None = None,
        growth_delay: int | None = None,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        if keras.backend.backend() != "tensorflow":
            raise ValueError(f"the backend of Keras is {keras.backend.backend()!r}, expected 'tensorflow'")
        if not isinstance(inner_optimizer, keras.optimizers.Optimizer):
            raise TypeError(f"inner_optimizer is {inner_optimizer!r}, expected a keras.optimizers.Optimizer")
        if isinstance(inner_optimizer, keras.optimizers.LossScaleOptimizer):
            raise ValueError(f"inner_optimizer is a {type(inner_optimizer).__name__}, which scales the loss already")
        try:
            rule = rule_of(
                preset,
                init_scale=initial_scale,
                growth_interval=dynamic_growth_steps,
                growth_factor=growth_factor,
                backoff_factor=backoff_factor,
                min_scale=min_scale,
                max_scale=max_scale,
                hysteresis=hysteresis,
                refill=refill,
                growth_delay=growth_delay,
            )
        except (TypeError, ValueError) as error:  # with Keras' names
            named = str(error).replace("init_scale is", "initial_scale is", 1)
            raise type(error)(named.replace("growth_interval is", "dynamic_growth_steps is", 1)) from None
        super().__init__(inner_optimizer, float(rule.init_scale), rule.growth_interval, name=name, **kwargs)
        self.rule = rule
        self.memory = _Memory(rule.hysteresis)
        self._why_plain: str | None = None

    @classmethod
    def from_keras(cls, optimizer: Any, **rule: Any) -> LossScaleOptimizer:
        """Take over from a keras.optimizers.LossScaleOptimizer: its inner optimizer, its settings and its scale.

        rule: parameters of this class, other than the first three.
        """
        if not isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
            raise TypeError(f"optimizer is {optimizer!r}, expected a keras.optimizers.LossScaleOptimizer")
        inner = optimizer.inner_optimizer
        ours = cls(inner, optimizer.initial_scale, optimizer.dynamic_growth_steps, **rule)
        if optimizer.built:
            ours.build(inner._trainable_variables)
            ours.dynamic_scale.assign(optimizer.dynamic_scale)
            ours.step_counter.assign(optimizer.step_counter)
        return ours

    @property
    def dynamic_growth_steps(self) -> int:
        """Clean steps in a row before the scale grows. Steps that were traced keep what they were traced with."""
        return self.rule.growth_interval

    @dynamic_growth_steps.setter
    def dynamic_growth_steps(self, steps: int) -> None:
        if hasattr(self, "rule"):  # not yet where Keras' constructor sets it
            self.rule = dataclasses.replace(self.rule, growth_interval=steps)

    def add_variable(self, *args: Any, **kwargs: Any) -> Any:
        """Make a variable; the counter of steps begins below 0 by the rule's delay.

        By its initializer, since what is assigned while a step is being traced stays in the trace.
        """
        if kwargs.get("name") == "step_counter":
            kwargs["initializer"] = keras.initializers.Constant(-self.rule.growth_delay)
        return super().add_variable(*args, **kwargs)

    def build(self, var_list: Any) -> None:
        """Make the variables: Keras' own, and those of the memory."""
        super().build(var_list)
        self.memory.build(len(var_list))

    # ----------------------------------------------------------------------------------------------------- a step

    def apply(self, grads: Any, trainable_variables: Any = None) -> None:
        """Unscale the gradients and let the inner optimizer apply them, or skip the step; update the scale.

        grads: a tensor, IndexedSlices or None for each variable. trainable_variables: those that the optimizer was
        built with, or None for all of them. ValueError for other variables or another number of gradients, TypeError
        for gradients that are not floating-point numbers; nothing is changed then.
        """
        grads = list(grads)
        if trainable_variables is not None:
            trainable_variables = list(trainable_variables)
            if self.built:
                self._check_variables_are_known(trainable_variables)
        elif not self.built:
            raise ValueError("apply() got no trainable_variables, which the first call of an optimizer needs")
        variables = self._trainable_variables if trainable_variables is None else trainable_variables
        if len(grads) != len(variables):
            raise ValueError(f"apply() got {len(grads)} gradients for {len(variables)} variables")
        for grad, variable in zip(grads, variables, strict=True):
            if grad is not None and not tf.as_dtype(getattr(grad, "dtype", "float32")).is_floating:
                raise TypeError(
                    f"the gradient of {variable.path} is of {tf.as_dtype(grad.dtype).name}, expected floats"
                )
        super().apply(grads, trainable_variables)

    def _common_apply(self, grads: Any, trainable_variables: Any = None) -> None:
        """Step in a replica that decides for itself; with others, all decide alike."""
        found, norm, unscaled = self._check(grads, trainable_variables)
        context = tf.distribute.get_replica_context()
        if context is not None and context.num_replicas_in_sync > 1:
            found = context.all_reduce(tf.distribute.ReduceOp.SUM, found)
            norm = tf.sqrt(context.all_reduce(tf.distribute.ReduceOp.SUM, tf.square(norm)))
        self._update(found, norm)
        tf.cond(
            found > 0.0,
            lambda: self._remember(self._non_finite(unscaled, trainable_variables)),
            lambda: self.inner_optimizer.apply(unscaled, trainable_variables=trainable_variables),
        )

    def _tf_apply(self, grads: Any, trainable_variables: Any = None) -> None:
        if tf.distribute.in_cross_replica_context():
            raise ValueError("apply() must be called in a replica context.")
        if tf.__internal__.distribute.strategy_supports_no_merge_call() or not tf.distribute.has_strategy():
            self._common_apply(grads, trainable_variables)
        else:
            context = tf.distribute.get_replica_context()
            context.merge_call(self._apply_across, args=(grads, trainable_variables))

    def _apply_across(self, strategy: Any, grads: Any, trainable_variables: Any) -> None:
        """Step on all replicas at once, whose gradients are not reduced yet: each has its own overflows.

        A tf.cond around a merge_call, which the inner optimizer does, is only possible out here.
        """
        replicas = strategy.extended
        found, norm, unscaled = replicas.call_for_each_replica(self._check, args=(grads, trainable_variables))
        found = strategy.reduce(tf.distribute.ReduceOp.SUM, found, axis=None)
        squared = replicas.call_for_each_replica(tf.square, args=(norm,))
        self._update(found, tf.sqrt(strategy.reduce(tf.distribute.ReduceOp.SUM, squared, axis=None)))

        def skip() -> None:
            counts = replicas.call_for_each_replica(self._non_finite, args=(unscaled, trainable_variables))
            self._remember(strategy.reduce(tf.distribute.ReduceOp.SUM, counts, axis=None))

        def apply() -> None:
            replicas.call_for_each_replica(
                lambda these, variables: self.inner_optimizer.apply(these, trainable_variables=variables),
                args=(unscaled, trainable_variables),
            )

        tf.cond(found > 0.0, skip, apply)

    def _check(self, grads: Any, trainable_variables: Any) -> tuple[Any, Any, list[Any]]:
        """Return found, norm and the unscaled gradients, which keep their places, None and IndexedSlices."""
        self._why_plain = why_plain()
        scale = tf.convert_to_tensor(self.dynamic_scale)
        scaled, whole = [], []  # whole: what is no gradient but the next value of a variable, such as a scale of fp8
        for index, (grad, variable) in enumerate(self._pairs(grads, trainable_variables)):
            if grad is not None:
                (whole if self._overwrite_variable_with_gradient(variable) else scaled).append(index)
        unscaled, found, norm = check_and_unscale([_dense(grads[i]) for i in scaled], scale)
        if whole:
            _, found_there, _ = check_and_unscale([_dense(grads[i]) for i in whole], tf.constant(1.0))
            found = tf.maximum(found, found_there)
        result = list(grads)
        for index, value in zip(scaled, unscaled, strict=True):
            result[index] = _like(value, grads[index])
        return found, norm, result

    def _update(self, found: Any, norm: Any) -> None:
        memory = self.memory
        variables = (self.dynamic_scale, self.step_counter, memory.hysteresis_left, memory.counters)
        before = State(*(tf.convert_to_tensor(variable) for variable in variables))
        after = update_scale(before, self.rule, tf.reshape(found, [1]), tf.reshape(norm, [1]))
        for variable, value in zip(variables, after, strict=True):
            variable.assign(value)
        memory.gradient_norm.assign(norm)

    def _non_finite(self, unscaled: Any, trainable_variables: Any) -> Any:
        """Return how many elements of each variable's gradient are infinite or NaN: int64 [variables]."""
        pairs = self._pairs(unscaled, trainable_variables)
        known = [(_dense(grad), self._get_variable_index(variable)) for grad, variable in pairs if grad is not None]
        places = [[index] for _, index in known]
        counts = count_non_finite([grad for grad, _ in known])
        return tf.scatter_nd(
            tf.reshape(tf.constant(places, tf.int32), [-1, 1]), counts, [len(self._trainable_variables)]
        )

    def _remember(self, counts: Any) -> None:
        self.memory.non_finite.assign(counts)

    def _pairs(self, grads: Any, trainable_variables: Any) -> list[tuple[Any, Any]]:
        variables = self._trainable_variables if trainable_variables is None else trainable_variables
        return list(zip(grads, variables, strict=True))

    # -------------------------------------------------------------------------------------------- what happened

    def scale(self) -> float:
        """Return the loss scale now."""
        return float(self.dynamic_scale.numpy()) if self.built else self.initial_scale

    def counters(self) -> dict[str, int]:
        """Return how many steps there were, and of which kind.

        steps; skipped; consecutive_skipped; growths; backoffs; at_floor (skipped with the scale at min_scale);
        nan_steps and inf_steps (skipped ones by what their gradients held).
        """
        values = self.memory.counters.numpy().tolist() if self.built else [0] * len(COUNTERS)
        return dict(zip(COUNTERS, values, strict=True))

    def gradient_norm(self) -> float:
        """Return the L2 norm of the last step's unscaled gradients; NaN before the first step.

        Of several replicas it is the root of the sum of their squared norms.
        """
        return float(self.memory.gradient_norm.numpy()) if self.built else math.nan

    def overflowed(self) -> dict[str, int]:
        """Return the variables whose gradients had infinite or NaN elements in the last skipped step, and how many.

        Keys are the variables' paths, those with most elements first. {} before the first skipped step.
        """
        if not self.built:
            return {}
        counts = self.memory.non_finite.numpy().tolist()
        named = zip(counts, (variable.path for variable in self._trainable_variables), strict=True)
        return {path: count for count, path in sorted(named, key=lambda pair: -pair[0]) if count > 0}

    def explain(self) -> str:
        """Return which ops the last traced step uses, and why."""
        if self._why_plain is None:
            return "no step was traced yet"
        return f"plain ops: {self._why_plain}" if self._why_plain else "custom ops of halfstep's TensorFlow library"

    def get_config(self) -> dict[str, Any]:
        """Return Keras' entries and all parameters of the rule, so that no preset need be known to read them."""
        return {**super().get_config(), **{name: getattr(self.rule, name) for name in _OWN}}


def _dense(grad: Any) -> Any:
    """Return the values of an IndexedSlices, the tensor of anything else."""
    return grad.values if isinstance(grad, tf.IndexedSlices) else tf.convert_to_tensor(grad)


def _like(values: Any, grad: Any) -> Any:
    return tf.IndexedSlices(values, grad.indices, grad.dense_shape) if isinstance(grad, tf.IndexedSlices) else values
