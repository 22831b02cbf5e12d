"""Mixed precision for TensorFlow and Keras 3: `docs/tensorflow.md`.

    from halfstep.tensorflow import LossScaleOptimizer

This module imports TensorFlow; `halfstep` itself does not. Importing it registers what Keras and TensorFlow need to
load models and graphs that were saved with it.
"""

from __future__ import annotations

from halfstep.keras_policy import (
    KerasPlan,
    KerasPolicy,
    PrecisionPolicyMap,
    apply_plan,
    apply_policy,
    needs_loss_scaling,
    plan,
    remove_policy,
)
from halfstep.loss_scale_callback import LossScaleCallback
from halfstep.loss_scale_optimizer import LossScaleOptimizer
from halfstep.tensorflow_library import register

__all__ = [
    "KerasPlan",
    "KerasPolicy",
    "LossScaleCallback",
    "LossScaleOptimizer",
    "PrecisionPolicyMap",
    "apply_plan",
    "apply_policy",
    "needs_loss_scaling",
    "plan",
    "remove_policy",
]

register()
