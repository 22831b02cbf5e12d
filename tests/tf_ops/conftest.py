"""What the tests of the TensorFlow door share. They run in an environment of TensorFlow, without torch."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # before TensorFlow is imported
TESTS = Path(__file__).resolve().parents[1]
for folder in (TESTS.parent / "python_shim", TESTS / "tf_ops", TESTS / "python"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes more than about ten seconds")
    import tensorflow as tf

    # Before anything runs: two logical CPUs, on which a strategy can have two replicas.
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    # Once in a process, in whichever test comes first; a test of its own looks at it.
    config.addinivalue_line("filterwarnings", "ignore:mixed_float16 without a GPU")


@pytest.fixture(autouse=True)
def _global_state() -> Iterator[None]:
    """Begin each test with the same seeds, and put back Keras' policy and fit, whatever a test leaves behind."""
    import keras

    keras.utils.set_random_seed(0)
    policy, fit, state = keras.config.dtype_policy(), keras.Model.fit, random.getstate()
    yield
    managers = sys.modules.get("halfstep.tensorflow_manager")
    if managers is not None and managers._in_force is not None:
        managers._in_force.restore_tensorflow_policy()
    keras.config.set_dtype_policy(policy)
    random.setstate(state)
    assert keras.Model.fit is fit, "a test has left keras.Model.fit wrapped"


@pytest.fixture
def mixed_float16() -> None:
    """Keras' global policy for one test."""
    import keras

    keras.config.set_dtype_policy("mixed_float16")


@pytest.fixture(scope="session")
def two_replicas():
    """A MirroredStrategy over two logical CPUs, which pytest_configure has made.

    One for all tests: the collective operations of several strategies in one process take each other's keys.
    """
    import tensorflow as tf

    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
