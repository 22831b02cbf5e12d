"""The loss scale and the skipped steps in the logs of Keras."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import keras

from halfstep.config import check_bool, check_count
from halfstep.errors import ScaleCollapsed
from halfstep.loss_scale_optimizer import LossScaleOptimizer

# Of each model that is trained, the callback that acts. Others of its kind stand by.
_acting: weakref.WeakKeyDictionary[Any, weakref.ref[LossScaleCallback]] = weakref.WeakKeyDictionary()


class LossScaleCallback(keras.callbacks.Callback):
    """Writes what the loss scaling does into the logs, where History, CSVLogger and TensorBoard find it.

    per_batch: also into the logs of each batch. It reads three values from the device in each, which waits for it.
    max_consecutive_skips: raise ScaleCollapsed once so many steps in a row were skipped, naming the variables with the
        most infinite or NaN elements in their gradients; looked at where logs are written. None: never.

    The keys are loss_scale; skipped_steps, all since the optimizer was made; and gradient_norm, the L2 norm of the
    last step's unscaled gradients. A UserWarning says once if the scale has become 0. Put it before the callbacks that
    read logs. It does nothing for a model whose optimizer is not halfstep's LossScaleOptimizer, and of several of its
    kind only the first acts.
    """

    def __init__(self, per_batch: bool = False, max_consecutive_skips: int | None = None) -> None:
        super().__init__()
        check_bool("per_batch", per_batch)
        if max_consecutive_skips is not None:
            check_count("max_consecutive_skips", max_consecutive_skips)
        self.per_batch = per_batch
        self.max_consecutive_skips = max_consecutive_skips
        self._warned = False

    def set_model(self, model: Any) -> None:
        """Hear of the model. A new training begins, in which no callback acts yet."""
        super().set_model(model)
        _acting.pop(model, None)

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Act in this training, if no other callback of this kind does."""
        self._acts()

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Write into the logs of a batch."""
        if self.per_batch:
            self._write(logs)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Write into the logs of an epoch."""
        self._write(logs)

    def _acts(self) -> bool:
        acting = _acting.get(self.model)
        if acting is None or acting() is None:
            _acting[self.model] = weakref.ref(self)
            return True
        return acting() is self

    def _write(self, logs: dict[str, Any] | None) -> None:
        optimizer = self.model.optimizer
        if not isinstance(optimizer, LossScaleOptimizer) or not self._acts():
            return
        scale, counters = optimizer.scale(), optimizer.counters()
        if logs is not None:
            logs["loss_scale"] = scale
            logs["skipped_steps"] = counters["skipped"]
            logs["gradient_norm"] = optimizer.gradient_norm()
        if scale == 0 and not self._warned:
            self._warned = True
            warnings.warn(
                "the loss scale has become 0, from which it does not grow again: all further steps are skipped. Give "
                "LossScaleOptimizer a min_scale, and look at its overflowed().",
                stacklevel=2,
            )
        if self.max_consecutive_skips is not None and counters["consecutive_skipped"] >= self.max_consecutive_skips:
            listed = "; ".join(f"{path}: {count}" for path, count in list(optimizer.overflowed().items())[:5])
            raise ScaleCollapsed(
                f"{counters['consecutive_skipped']} steps in a row had infinite or NaN gradients; the loss scale is "
                f"{scale:g}. Variables with the most infinite or NaN gradient elements: {listed or 'none'}."
            )


def with_callback(callbacks: Any) -> tuple[Any, Any]:
    """Return (fit's callbacks with a LossScaleCallback as the first, what to call once fit is over).

    One that is there already stays where it is, and no other is added.
    """
    if isinstance(callbacks, keras.callbacks.CallbackList):
        present = callbacks.callbacks
    else:
        present = keras.tree.flatten(callbacks) if callbacks else []
    if any(isinstance(callback, LossScaleCallback) for callback in present):
        return callbacks, _nothing
    own = LossScaleCallback()
    if not isinstance(callbacks, keras.callbacks.CallbackList):
        return [own, *present], _nothing
    # The user's own list, which has told its callbacks of the model already.
    own.set_model(callbacks.model)
    own.set_params(callbacks.params)
    present.insert(0, own)
    return callbacks, lambda: present.remove(own)


def _nothing() -> None:
    pass
