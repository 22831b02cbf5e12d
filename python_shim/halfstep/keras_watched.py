"""The Keras model whose training a manager reports on, one batch of it, and what was measured on copies of them."""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from halfstep.keras_fit import Batch, CannotKeep, tap
from halfstep.keras_twin import CannotMeasure, Speed, layer_bytes, step_seconds, under_strategy


class Watched:
    """A model, which this does not keep alive, and a batch. What was measured stays until the model is changed.

    form: what fit's data looked like when the batch was taken from it.
    """

    def __init__(self, model: Any = None, batch: Batch | None = None, *, form: Any = None) -> None:
        self.model: Callable[[], Any] = _none if model is None else weakref.ref(model)
        self.batch = batch
        self._form = form
        self._note = (
            ""
            if model is not None
            else ("no model is known: call setup_tensorflow_policy() before keras.Model.fit(), or watch(model, x, y)")
        )
        self._measured: dict[str, Any] = {}
        self._measured_of: Any = None

    def after(self, model: Any, arguments: dict[str, Any]) -> tuple[Watched, Any]:
        """Return (what is watched from this fit on, the x to give to it). Data of another form gives a new batch."""
        x = arguments["x"]
        if under_strategy(model):
            return Watched(model), x  # measuring says so
        try:
            form = _form(arguments)
            if self.model() is model and self.batch is not None and form == self._form:
                return self, x
            watched = Watched(model, form=form)
            return watched, tap(x, arguments, watched._keep)
        except CannotKeep as error:
            why = str(error)
        except Exception as error:  # whatever the data raises: fit will say it better
            why = f"looking at fit's data raised {type(error).__name__}"
        watched = Watched(model)
        watched._note = f"no batch could be kept, since {why}: call watch(model, x, y)"
        return watched, x

    def _keep(self, batch: Batch) -> None:
        self.batch = batch

    def memory(self) -> tuple[int, int] | str:
        """Return the bytes of the layers' outputs, the model's and its float32 twin's, or why they are not known."""
        return self._result("memory", layer_bytes)

    def speed(self, *, measure: bool) -> Speed | str:
        """Return the times of training steps, or why there are none."""
        return self._result("speed", step_seconds if measure else None)

    def _result(self, name: str, measure: Callable[[Any, Batch], Any] | None) -> Any:
        model = self.model()
        if model is None:
            return self._note or "the model is gone"
        state = _state(model)
        if state != self._measured_of:
            self._measured, self._measured_of = {}, state
        if name not in self._measured:
            if measure is None:
                return "not measured yet: get_comprehensive_stats() times training steps"
            if self.batch is None and not under_strategy(model):
                return self._note or "fit has not trained on a batch yet"
            self._measured[name] = _measured(measure, model, self.batch)
        return self._measured[name]


def _none() -> None:
    return None


def _measured(measure: Callable[[Any, Batch], Any], model: Any, batch: Any) -> Any:
    """Return the result, or why there is none."""
    try:
        return measure(model, batch or (None, None, None))
    except CannotMeasure as error:
        return str(error)
    except Exception as error:  # whatever the model's own code raises in a copy: training must not end by it
        message = str(error).strip().splitlines() or [""]
        return f"measuring raised {type(error).__name__}: {message[0]}"


def _state(model: Any) -> Any:
    """Return what the numbers depend on beside the batch: the layers, their dtypes, and how the model is compiled."""
    layers = [(layer.name, layer.compute_dtype, layer.built) for layer in model._flatten_layers()]
    if not model.compiled or model.optimizer is None:
        return layers, None
    return layers, (weakref.ref(model.optimizer), model.jit_compile, model.run_eagerly)


def _form(arguments: dict[str, Any]) -> Any:
    x = arguments["x"]
    if isinstance(x, tf.data.Dataset):
        return x.element_spec
    if isinstance(x, (types.GeneratorType, keras.utils.PyDataset)):
        return type(x)
    arrays = keras.tree.flatten([x, arguments.get("y"), arguments.get("sample_weight")])
    shapes = [(str(getattr(array, "shape", "")), str(getattr(array, "dtype", ""))) for array in arrays]
    return shapes, arguments.get("batch_size"), arguments.get("steps_per_epoch")
