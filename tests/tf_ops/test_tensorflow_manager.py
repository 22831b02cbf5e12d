"""MixedPrecisionManager(framework="tensorflow"): the policy, the optimizer, and what it hears of fit."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import warnings
from pathlib import Path

import halfstep
import keras
import numpy as np
import pytest
import tensorflow as tf
from halfstep import CustomPrecisionPolicy, MixedPrecisionConfig, MixedPrecisionManager, tensorflow_manager
from halfstep.tensorflow import KerasPolicy, LossScaleOptimizer, apply_policy
from manager_cases import X, Y, compiled, kept, manager, policy_name, small

SHIM = Path(__file__).resolve().parents[2] / "python_shim"
_fit = keras.Model.fit


# ------------------------------------------------------------------------------------------------------ the policy


def test_auto_is_tensorflow_where_there_is_no_torch() -> None:
    assert MixedPrecisionManager().framework == "tensorflow"


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float32"])
def test_the_policy_is_keras_global_one_until_it_is_put_back(policy: str) -> None:
    keras.config.set_dtype_policy("float64")
    mp = manager(policy)
    assert policy_name() == "float64", "making a manager sets nothing"
    assert mp.setup_tensorflow_policy() is None
    assert policy_name() == policy
    assert keras.layers.Dense(1).compute_dtype == policy.removeprefix("mixed_")
    mp.setup_tensorflow_policy()  # again changes nothing
    mp.restore_tensorflow_policy()
    assert policy_name() == "float64"
    assert keras.Model.fit is _fit
    mp.restore_tensorflow_policy()
    assert policy_name() == "float64"


def test_a_second_manager_takes_over() -> None:
    first, second = manager("mixed_float16"), manager("mixed_bfloat16")
    first.setup_tensorflow_policy()
    wrapped = keras.Model.fit
    second.setup_tensorflow_policy()
    assert keras.Model.fit is wrapped, "it is wrapped once"
    model = compiled(second)
    model.fit(X, Y, verbose=0)
    assert kept(first) is None
    assert kept(second) is not None
    first.restore_tensorflow_policy()  # not in force any more
    assert (policy_name(), keras.Model.fit) == ("mixed_bfloat16", wrapped)
    second.restore_tensorflow_policy()
    assert (policy_name(), keras.Model.fit) == ("float32", _fit)


def test_what_the_user_sets_between_two_managers_is_what_comes_back() -> None:
    first, second = manager("mixed_float16"), manager("mixed_bfloat16")
    first.setup_tensorflow_policy()
    keras.config.set_dtype_policy("float64")
    second.setup_tensorflow_policy()
    second.restore_tensorflow_policy()
    assert policy_name() == "float64"


@pytest.mark.parametrize("name", ["policy_context", "autocast_context"])
def test_contexts_nest_and_end_by_exceptions_too(name: str) -> None:
    half, brain = getattr(manager("mixed_float16"), name), getattr(manager("mixed_bfloat16"), name)
    with half():
        assert policy_name() == "mixed_float16"
        with brain():
            assert keras.layers.Dense(1).compute_dtype == "bfloat16"
            with half():
                assert policy_name() == "mixed_float16"
        assert policy_name() == "mixed_float16"
        with pytest.raises(ZeroDivisionError), brain():
            _ = 1 / 0
        assert policy_name() == "mixed_float16"
    assert policy_name() == "float32"
    assert keras.Model.fit is _fit


def test_autocast_off_is_the_policy_float32() -> None:
    mp = MixedPrecisionManager("tensorflow", config=MixedPrecisionConfig(enable_autocast=False))
    with mp.policy_context():
        assert policy_name() == "float32"
    assert type(mp.wrap_optimizer("sgd")) is keras.optimizers.SGD


def test_float16_without_a_gpu_warns_once() -> None:
    assert not tf.config.list_physical_devices("GPU"), "this test is for processors"
    tensorflow_manager._warn_of_slow_float16.cache_clear()
    with pytest.warns(UserWarning, match="mixed_bfloat16 is the policy for processors") as caught:
        manager().setup_tensorflow_policy()
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        manager().setup_tensorflow_policy()
        manager("mixed_bfloat16").setup_tensorflow_policy()
    assert policy_name() == "mixed_bfloat16"


# --------------------------------------------------------------------------------------------------- the optimizer


def test_wrap_optimizer_scales_under_float16_alone() -> None:
    config = MixedPrecisionConfig(
        loss_scale=2.0**8,
        loss_scale_growth_factor=4.0,
        loss_scale_backoff_factor=0.25,
        loss_scale_growth_interval=7,
        gradient_clipping_threshold=math.inf,
    )
    inner = keras.optimizers.Adam(0.01)
    wrapped = MixedPrecisionManager("tensorflow", config=config).wrap_optimizer(inner)
    assert type(wrapped) is LossScaleOptimizer
    assert wrapped.inner_optimizer is inner
    rule = wrapped.rule
    assert (rule.init_scale, rule.growth_factor, rule.backoff_factor, rule.growth_interval) == (256.0, 4.0, 0.25, 7)
    assert inner.global_clipnorm is None
    for other in (manager("mixed_bfloat16"), manager("float32"), manager(enable_loss_scaling=False)):
        assert other.wrap_optimizer(inner) is inner


def test_wrap_optimizer_takes_what_keras_takes() -> None:
    mp = manager(initial_loss_scale=2.0**10)
    by_name = mp.wrap_optimizer("adamw")
    assert type(by_name.inner_optimizer) is keras.optimizers.AdamW
    assert by_name.initial_scale == 2.0**10
    config = keras.optimizers.serialize(keras.optimizers.SGD(0.25, momentum=0.5))
    assert mp.wrap_optimizer(config).inner_optimizer.momentum == 0.5
    assert mp.wrap_optimizer(by_name) is by_name, "halfstep's own comes back"
    with pytest.raises(TypeError, match="optimizer is None"):
        mp.wrap_optimizer(None)
    with pytest.raises(ValueError, match="no_such_optimizer"):
        mp.wrap_optimizer("no_such_optimizer")


def test_keras_own_loss_scaling_is_taken_over() -> None:
    theirs = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1), 2.0**6, 5)
    ours = manager().wrap_optimizer(theirs)
    assert type(ours) is LossScaleOptimizer
    assert ours.inner_optimizer is theirs.inner_optimizer
    assert (ours.initial_scale, ours.dynamic_growth_steps, ours.built) == (2.0**6, 5, False)

    with manager().policy_context():
        model = small()
        model.compile(theirs, "mse")
    model.fit(X, Y, batch_size=4, epochs=4, verbose=0)  # 12 steps: 2 growths, and 2 steps towards the next
    assert (float(theirs.dynamic_scale), int(theirs.step_counter)) == (2.0**8, 2)
    ours = manager().wrap_optimizer(theirs)
    assert (ours.initial_scale, ours.scale(), int(ours.step_counter)) == (2.0**6, 2.0**8, 2)
    model.compile(ours, "mse")
    model.fit(X, Y, batch_size=4, verbose=0)
    assert (ours.scale(), int(ours.iterations)) == (2.0**9, 15)


def gradient_norms(mp: MixedPrecisionManager, optimizer) -> float:
    """Return the norm of the gradient that one step of SGD has applied, with a learning rate of 1."""
    keras.utils.set_random_seed(2)
    with mp.policy_context():
        model = small()
    model.compile(mp.wrap_optimizer(optimizer), "mse")
    before = model.get_weights()
    model.train_on_batch(X, 100 * Y)
    return math.sqrt(sum(float(((a - b) ** 2).sum()) for a, b in zip(before, model.get_weights(), strict=True)))


def test_a_config_clips_and_nothing_else_does() -> None:
    unclipped = gradient_norms(manager(initial_loss_scale=1.0), keras.optimizers.SGD(1.0))
    assert unclipped > 10
    for policy in ("mixed_float16", "mixed_bfloat16"):
        config = MixedPrecisionConfig(policy, loss_scale=1.0, gradient_clipping_threshold=0.5)
        mp = MixedPrecisionManager("tensorflow", config=config)
        assert gradient_norms(mp, keras.optimizers.SGD(1.0)) == pytest.approx(0.5, rel=1e-3)
    config = MixedPrecisionConfig(loss_scale=1.0, gradient_clipping_threshold=math.inf)
    mp = MixedPrecisionManager("tensorflow", config=config)
    assert gradient_norms(mp, keras.optimizers.SGD(1.0)) == pytest.approx(unclipped, rel=0.05)


def test_clipping_twice_is_refused() -> None:
    mp = MixedPrecisionManager("tensorflow", config=MixedPrecisionConfig())
    for arguments in ({"clipnorm": 0.5}, {"clipvalue": 1.0}, {"global_clipnorm": 2.0}):
        inner = keras.optimizers.SGD(**arguments)
        for optimizer in (inner, LossScaleOptimizer(inner)):
            name = next(iter(arguments))
            with pytest.raises(ValueError, match=f"the optimizer has {name}=.*gradient_clipping_threshold=1.0"):
                mp.wrap_optimizer(optimizer)
        assert manager().wrap_optimizer(inner).inner_optimizer.get_config()[name] == arguments[name]
    same = keras.optimizers.SGD(global_clipnorm=1.0)
    assert mp.wrap_optimizer(same).inner_optimizer is same
    assert mp.wrap_optimizer(same).inner_optimizer is same, "what is clipped by the manager may come again"


def test_adjust_loss_scale() -> None:
    mp = manager()
    mp.adjust_loss_scale(factor=0.5)
    assert mp.config.loss_scale == 2**14
    optimizer = mp.wrap_optimizer("sgd")
    mp.adjust_loss_scale(0.25)
    assert (optimizer.scale(), optimizer.built) == (2**12, False)
    model = small()
    model.compile(optimizer, "mse")
    model.train_on_batch(X, Y)
    assert optimizer.scale() == 2**12, "the first step began with it"
    mp.adjust_loss_scale(2.0)
    assert float(optimizer.dynamic_scale) == 2**13
    for bad, error in ((0.0, ValueError), (math.nan, ValueError), ("x", TypeError), (1e38, ValueError)):
        with pytest.raises(error, match="factor is"):
            mp.adjust_loss_scale(factor=bad)
    assert optimizer.scale() == 2**13
    floored = mp.wrap_optimizer(LossScaleOptimizer(keras.optimizers.SGD(), 4.0, min_scale=2.0))
    with pytest.raises(ValueError, match=r"factor is 0.25: .*min_scale"):
        mp.adjust_loss_scale(0.25)
    assert floored.scale() == 4.0
    manager("float32").adjust_loss_scale(2.0)  # nothing is scaled


def test_update_config_acts_or_raises() -> None:
    mp = manager()
    optimizer = mp.wrap_optimizer("sgd")
    mp.update_config(loss_scale=2.0**9, loss_scale_growth_interval=3, loss_scale_backoff_factor=0.25)
    mp.update_config(gradient_clipping_threshold=0.5)
    assert (optimizer.scale(), optimizer.dynamic_growth_steps) == (2.0**9, 3)
    assert (optimizer.rule.backoff_factor, optimizer.inner_optimizer.global_clipnorm) == (0.25, 0.5)
    mp.update_config(gradient_clipping_threshold=math.inf)
    assert optimizer.inner_optimizer.global_clipnorm is None
    mp.update_config(gradient_clipping_threshold=0.5)
    model = small()
    model.compile(optimizer, "mse")
    model.fit(X, Y, batch_size=4, verbose=0)
    assert optimizer.scale() == 2.0**10, "three steps are the new interval"
    mp.update_config(loss_scale=2.0**4)
    assert float(optimizer.dynamic_scale) == 2.0**4
    before = mp.config
    for changes in (
        {"loss_scale_growth_interval": 5},
        {"loss_scale_growth_factor": 4.0},
        {"loss_scale_backoff_factor": 0.5},
        {"gradient_clipping_threshold": 2.0},
    ):
        with pytest.raises(ValueError, match=f"^{next(iter(changes))}: the optimizer has been built"):
            mp.update_config(loss_scale=8.0, **changes)
    with pytest.raises(ValueError, match="Make a new MixedPrecisionManager"):
        mp.update_config(precision_policy="float32")
    with pytest.raises(ValueError, match="half_reductions is a setting for framework='pytorch'"):
        mp.update_config(half_reductions=())
    with pytest.raises(ValueError, match=r"update_config got \['lr'\]"):
        mp.update_config(lr=1.0)
    assert (mp.config, optimizer.scale()) == (before, 16.0)
    mp.update_config(loss_scale_growth_interval=3)  # as it is


def test_update_config_changes_a_policy_in_force() -> None:
    mp = manager("mixed_bfloat16")
    mp.update_config(precision_policy="float32")
    assert policy_name() == "float32"
    mp.setup_tensorflow_policy()
    mp.update_config(precision_policy="mixed_bfloat16")
    assert policy_name() == "mixed_bfloat16"
    mp.update_config(autocast_enabled=False)
    assert policy_name() == "float32"


# --------------------------------------------------------------------------------------------------- the statistics


def test_statistics_are_measured_or_nan_with_a_reason() -> None:
    mp = manager(initial_loss_scale=2.0**8)
    before = mp.get_statistics()
    assert (before.framework, before.precision_policy) == ("tensorflow", "mixed_float16")
    assert "wrap_optimizer() has not been called" in before.notes["steps"]
    assert "call setup_tensorflow_policy() before" in before.notes["memory_reduction"]
    assert {name for name, value in before.as_dict().items() if value != value} == set(before.notes)
    mp.setup_tensorflow_policy()
    model = compiled(mp)
    model.fit(X, Y, batch_size=4, epochs=2, verbose=0)
    model.train_on_batch(X, np.full_like(Y, 1e30))  # overflows float32's square
    stats = mp.get_statistics()
    assert (stats.steps, stats.skipped_steps, stats.overflow_events, stats.scale_adjustments) == (7, 1, 1, 1)
    assert stats.loss_scale == 2**7
    # The layers put out 4 x 8 numbers in half, and 4 x 1 in float32: 2 bytes saved of each of the 32.
    assert (stats.memory_saved_bytes, stats.memory_reduction) == (64.0, 64 / (4 * 9 * 4))
    assert "get_comprehensive_stats()" in stats.notes["speedup_factor"]
    every = mp.get_comprehensive_stats()
    assert every["training_speedup"] == every["speedup_factor"] == every["average_speedup"] > 0
    assert every["peak_speedup"] >= every["training_speedup"]
    assert re.match(r"of \d+ training steps of a copy", every["notes"]["training_speedup"])
    assert mp.get_statistics().speedup_factor == every["speedup_factor"], "measured once"
    assert mp.get_comprehensive_stats() == every or math.isnan(every["total_operations"])
    for name, value in every.items():
        if isinstance(value, float) and math.isnan(value):
            assert every["notes"][name] == "not measured with TensorFlow"
    assert optimizer_counts(model) == (7, 1)


def optimizer_counts(model: keras.Model) -> tuple[int, int]:
    counters = model.optimizer.counters()
    return counters["steps"], counters["skipped"]


def test_monitoring_can_be_off() -> None:
    mp = manager(enable_monitoring=False)
    mp.setup_tensorflow_policy()
    model = compiled(mp)
    history = model.fit(X, Y, verbose=0)
    assert "loss_scale" in history.history
    mp.watch(model, X, Y)
    assert kept(mp) is None
    stats = mp.get_comprehensive_stats()
    assert math.isnan(stats["training_speedup"])
    numbers = {name for name, value in stats.items() if isinstance(value, float)}
    assert set(stats["notes"]) == numbers
    assert set(stats["notes"].values()) == {"monitoring is off (enable_monitoring=False)"}


def test_watch() -> None:
    class Net(keras.Model):
        def __init__(self, width: int = 8) -> None:
            super().__init__()
            self.first, self.last = keras.layers.Dense(width), keras.layers.Dense(1, dtype="float32")

        def call(self, x):
            return self.last(self.first(x["in"]))

    mp = manager("mixed_bfloat16")
    with mp.policy_context():
        model = Net()
    mp.watch(model, {"in": X}, Y)
    assert "no weights yet" in mp.get_statistics().notes["memory_reduction"]
    model({"in": X})
    assert mp.get_statistics().memory_saved_bytes == 12 * 8 * 2, mp.get_statistics().notes["memory_reduction"]
    every = mp.get_comprehensive_stats()
    assert "not compiled" in every["notes"]["training_speedup"]
    model.compile(mp.wrap_optimizer("sgd"), "mse")
    assert "not measured yet" in mp.get_statistics().notes["speedup_factor"]
    assert mp.get_comprehensive_stats()["training_speedup"] > 0
    assert "does not scale the loss" in mp.get_statistics().notes["steps"]
    with pytest.raises(TypeError, match=r"model is str, expected keras\.Model"):
        mp.watch("model", X)
    with pytest.raises(ValueError, match="x is None"):
        mp.watch(model, None)
    with pytest.raises(TypeError, match="it holds a object"):
        mp.watch(model, object())


def test_keras_own_loss_scaling_is_named() -> None:
    mp = manager()
    mp.setup_tensorflow_policy()
    model = small()
    model.compile("sgd", "mse")
    model.fit(X, Y, verbose=0)
    stats = mp.get_statistics()
    assert math.isnan(stats.steps)
    assert "Keras' LossScaleOptimizer, which counts nothing" in stats.notes["steps"]
    assert stats.memory_saved_bytes > 0


# ------------------------------------------------------------------------------------------------------ the borders


def test_what_is_of_other_frameworks_says_so() -> None:
    mp = manager()
    for call in (
        lambda: mp.setup_pytorch_training(None, None),
        lambda: mp.capture(len),
        lambda: mp.optimize_data_precision(X),
        lambda: mp.optimizer,
    ):
        with pytest.raises(AttributeError, match="this manager's framework is 'tensorflow', which has no"):
            call()
    data = MixedPrecisionManager("sklearn")
    for name in ("setup_tensorflow_policy", "restore_tensorflow_policy", "policy_context"):
        with pytest.raises(AttributeError, match=f"'sklearn', which has no {name}: framework='tensorflow' has"):
            getattr(data, name)()
    with pytest.raises(AttributeError, match="which has no wrap_optimizer"):
        data.wrap_optimizer("sgd")
    with pytest.raises(ImportError, match="pip install torch"):
        MixedPrecisionManager("pytorch")


def test_custom_policies_are_looked_at() -> None:
    for bad in (3, dict, "float16"):
        with pytest.raises(TypeError, match=r"custom_policy is .*, expected an instance of a CustomPrecisionPolicy"):
            manager(custom_policy=bad)
    with pytest.raises(ValueError, match="made without custom_policy"):
        manager().apply_policy(small())


def test_a_custom_policy_is_applied_and_decides_the_loss_scaling() -> None:
    from halfstep import keras_policy

    class HeadInFloat32(halfstep.CustomPrecisionPolicy):
        def should_use_fp16(self, layer_type: str, layer_name: str) -> bool:
            return layer_name != "head"

    def model() -> keras.Model:
        layers = [keras.Input((4,)), keras.layers.Dense(8, name="body"), keras.layers.Dense(1, name="head")]
        return keras.Sequential(layers)

    mp = manager("mixed_bfloat16", custom_policy=HeadInFloat32())
    brain = model()
    plan = mp.apply_policy(brain)
    assert [layer.compute_dtype for layer in brain.layers] == ["bfloat16", "float32"]
    assert mp.precision_plan(brain) is plan
    assert type(mp.wrap_optimizer("sgd")) is keras.optimizers.SGD
    mp.remove_policy(brain)
    assert [layer.compute_dtype for layer in brain.layers] == ["float32", "float32"]
    assert mp.precision_plan(brain) is None

    rules = [{"name": "body", "precision": "float16"}]
    text = json.dumps({"name": "mine", "default": "float32", "rules": rules})
    mp = manager("mixed_bfloat16", custom_policy=keras_policy.KerasPolicy.from_json(text))
    half = model()
    assert type(mp.wrap_optimizer("sgd")) is keras.optimizers.SGD, "no float16 is known of yet"
    mp.apply_policy(half)
    half.compile(mp.wrap_optimizer("sgd"), "mse")
    assert type(half.optimizer) is LossScaleOptimizer
    mp.setup_tensorflow_policy()
    history = half.fit(X, Y, verbose=0).history
    assert len(history["loss_scale"]) == 1
    assert mp.get_statistics().memory_saved_bytes == 12 * 8 * 2, "the float32 layer is so in both copies"
    with pytest.raises(ValueError, match="the precision policy is float32"):
        manager("float32", custom_policy=HeadInFloat32()).apply_policy(model())


def test_another_keras_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(ImportError, match="the backend of Keras is 'jax', expected 'tensorflow'"):
        manager()
    code = (
        f"import os, sys; sys.path.insert(0, {str(SHIM)!r}); os.environ['TF_USE_LEGACY_KERAS'] = '1'\n"
        "from halfstep import MixedPrecisionManager\nMixedPrecisionManager('tensorflow')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "tf.keras is not Keras 3" in result.stderr.splitlines()[-1], result.stderr


def test_importing_halfstep_imports_no_tensorflow() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(SHIM)!r})\n"
        "import halfstep, modules.engine.mixed_precision as m\n"
        "m.MixedPrecisionManager('sklearn')\n"
        "print([name for name in ('tensorflow', 'keras', 'torch') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout == "[]\n", result.stderr


def head_and_body() -> keras.Model:
    return keras.Sequential([keras.Input([4]), keras.layers.Dense(8, name="body"), keras.layers.Dense(1, name="head")])


def test_a_custom_policy_is_applied_by_fit() -> None:
    policy = KerasPolicy("careful", "float16", [{"name": "head", "precision": "float32"}])
    mp = MixedPrecisionManager("tensorflow", custom_policy=policy)
    mp.setup_tensorflow_policy()
    model = head_and_body()
    model.compile(mp.wrap_optimizer("sgd"), "mse")
    model.fit(np.ones((8, 4)), np.ones((8, 1)), verbose=0)
    assert [layer.compute_dtype for layer in model.layers] == ["float16", "float32"]
    assert mp.precision_plan(model)["head"].precision == "float32"
    assert mp.get_statistics().steps == 1
    mp.remove_policy(model)
    assert [layer.compute_dtype for layer in model.layers] == ["float16", "float16"]


def test_a_loss_scale_of_a_policy_is_said_not_to_be_asked() -> None:
    class Policy(CustomPrecisionPolicy):
        def get_loss_scale_factor(self, gradient_norm: float) -> float:
            return 1.0

    with pytest.warns(UserWarning, match="get_loss_scale_factor of Policy is not asked under framework='tensorflow'"):
        MixedPrecisionManager("tensorflow", custom_policy=Policy())


def test_layers_made_in_float32_that_a_policy_makes_half_are_named() -> None:
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = keras.Sequential(
        [keras.Input([4]), keras.layers.Dense(8), keras.layers.Dense(1, name="head", dtype="float32")]
    )
    with pytest.warns(UserWarning, match="^head: made in float32 under a half policy"):
        apply_policy(model, KerasPolicy("all", "bfloat16"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_policy(model, KerasPolicy("but", "bfloat16", [{"name": "head", "precision": "float32"}]))


def test_a_threshold_for_several_optimizers_is_refused() -> None:
    config = MixedPrecisionConfig(gradient_clipping_threshold=1.0)
    several = keras.optimizers.MultiOptimizer(lambda variable: keras.optimizers.SGD())
    with pytest.raises(ValueError, match="a MultiOptimizer, which does not clip"):
        MixedPrecisionManager("tensorflow", config=config).wrap_optimizer(several)


def test_the_policy_cannot_be_set_up_within_a_context() -> None:
    mp = manager("mixed_bfloat16")
    with mp.policy_context():
        with pytest.raises(RuntimeError, match="inside of a policy_context"):
            mp.setup_tensorflow_policy()
        assert policy_name() == "mixed_bfloat16"
    assert policy_name() == "float32"


def test_a_policy_that_was_set_since_is_not_put_back_over() -> None:
    mp = manager("mixed_bfloat16")
    mp.setup_tensorflow_policy()
    keras.config.set_dtype_policy("float64")
    mp.restore_tensorflow_policy()
    assert policy_name() == "float64"
