"""Mixed precision for TensorFlow and Keras 3: `docs/tensorflow.md`.

    from halfstep.tensorflow import LossScaleOptimizer

This module imports TensorFlow; `halfstep` itself does not.
"""

from __future__ import annotations

from halfstep.loss_scale_optimizer import LossScaleOptimizer

__all__ = ["LossScaleOptimizer"]
