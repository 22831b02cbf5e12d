"""keras.Model.fit with somebody who looks at what it is given, and at the first batch that it trains on."""

from __future__ import annotations

import contextlib
import functools
import inspect
import random
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

import keras
import numpy as np
import tensorflow as tf

Batch = tuple[Any, Any, Any]  # x, y, sample_weight; of arrays on the host


class Listener(Protocol):
    """Who looks at fit."""

    def around_fit(self, model: Any, arguments: dict[str, Any]) -> AbstractContextManager[None]:
        """Return the context that fit runs in. `arguments` are those that fit was given, by name, to be changed."""


class CannotKeep(Exception):
    """Why no batch can be kept of what fit was given."""


_listener: Listener | None = None
_wrapper: Callable[..., Any] | None = None
_replaced: Any = None  # what the class itself had before; it inherits fit


def listen_to_fit(listener: Listener) -> None:
    """Let this listener hear of each fit of a keras.Model from now on, in place of any other. fit is wrapped once."""
    global _listener, _wrapper, _replaced
    _listener = listener
    if _wrapper is None:
        _replaced = keras.Model.__dict__.get("fit")
        _wrapper = _wrapped(keras.Model.fit)
        keras.Model.fit = _wrapper


def stop_listening() -> None:
    """Give keras.Model its own fit back. Where something else has been put around the wrapper, that stays, unheard."""
    global _listener, _wrapper
    _listener = None
    if _wrapper is None or keras.Model.__dict__.get("fit") is not _wrapper:
        return
    if _replaced is None:
        del keras.Model.fit
    else:
        keras.Model.fit = _replaced
    _wrapper = None


def _wrapped(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def fit(self: Any, *args: Any, **kwargs: Any) -> Any:
        listener = _listener
        if listener is None:
            return original(self, *args, **kwargs)
        try:
            bound = signature.bind(self, *args, **kwargs)
        except TypeError:
            return original(self, *args, **kwargs)  # which says what is wrong
        with listener.around_fit(self, bound.arguments):
            return original(*bound.args, **bound.kwargs)

    return fit


def host_batch(x: Any, y: Any, sample_weight: Any, rows: int | None = None) -> Batch:
    """Return copies of the first `rows` rows (None: of all). CannotKeep names what is no array."""
    copy = functools.partial(_host_copy, rows=rows)
    return tuple(None if part is None else keras.tree.map_structure(copy, part) for part in (x, y, sample_weight))


def _host_copy(array: Any, rows: int | None) -> Any:
    if array is None:
        return None
    if isinstance(array, tf.RaggedTensor):
        return array[:rows]
    if hasattr(array, "iloc"):  # pandas
        array = array.iloc[:rows].to_numpy()
    elif isinstance(array, (tf.Tensor, tf.Variable)) or hasattr(array, "__array__"):
        array = np.asarray(array[:rows])
    else:
        raise CannotKeep(f"it holds a {type(array).__name__}")
    # As fit does with arrays: floats become Keras' floatx.
    kind = keras.config.floatx() if keras.backend.is_float_dtype(array.dtype.name) else array.dtype
    return array.astype(kind)


def tap(x: Any, arguments: dict[str, Any], keep: Callable[[Batch], None]) -> Any:
    """Return x of fit, or something in its place that yields the same; `keep` gets the first batch, at once or later.

    Nothing is drawn from x that fit would not draw: a second iterator over a tf.data.Dataset would move its shuffling
    on and start its generators again. Raises CannotKeep.
    """
    if isinstance(x, tf.data.Dataset):
        return _tapped_dataset(x, keep)
    if isinstance(x, types.GeneratorType):
        return _tapped_generator(x, keep)
    if isinstance(x, keras.utils.PyDataset):
        keep(_first_of_py_dataset(x))
        return x
    if type(x).__module__.startswith(("torch.utils.data", "grain", "tensorflow.python.distribute")):
        raise CannotKeep(f"fit was given a {type(x).__name__}")
    rows = arguments.get("batch_size") or _default_rows(x, arguments.get("steps_per_epoch"))
    keep(host_batch(x, arguments.get("y"), arguments.get("sample_weight"), rows))
    return x


def _default_rows(x: Any, steps: int | None) -> int:
    """Return the batch size that fit takes without one."""
    if not steps:
        return 32
    return -(-len(keras.tree.flatten(x)[0]) // steps)


def _tapped_generator(generator: Any, keep: Callable[[Batch], None]) -> Any:
    """Return a generator of the same items. What is left in `generator` at the end stays in it, as it would anyway."""

    def items() -> Any:
        first = True
        for item in generator:
            if first:
                first = False
                _keep_quietly(item, keep)
            yield item

    return items()


def _tapped_dataset(dataset: Any, keep: Callable[[Batch], None]) -> Any:
    """Return a dataset of the same elements, whose first one is looked at on its way through."""
    spec = dataset.element_spec
    if not all(isinstance(part, tf.TensorSpec) for part in tf.nest.flatten(spec)):
        raise CannotKeep("the dataset's elements are not only dense tensors")

    def look(*arrays: Any) -> Any:
        _keep_quietly(tf.nest.pack_sequence_as(spec, list(arrays)), keep)
        return np.bool_(True)

    @tf.autograph.experimental.do_not_convert
    def through(index: Any, element: Any) -> Any:
        flat = tf.nest.flatten(element)
        tf.cond(index == 0, lambda: tf.numpy_function(look, flat, tf.bool), lambda: tf.constant(False))
        return element

    tapped = dataset.enumerate().map(through)
    if tapped.element_spec != spec:
        raise CannotKeep("the dataset's elements do not pass through tf.data.Dataset.map as they are")
    return tapped


def _keep_quietly(element: Any, keep: Callable[[Batch], None]) -> None:
    """Keep a batch while fit is at work, which no failure here may stop."""
    try:
        keep(host_batch(*keras.utils.unpack_x_y_sample_weight(element)))
    except Exception:  # then there is no batch, as before
        return


def _first_of_py_dataset(dataset: Any) -> Batch:
    """Return its item 0, with the random states that its making may have moved put back."""
    with random_states_kept():
        try:
            return host_batch(*keras.utils.unpack_x_y_sample_weight(dataset[0]))
        except CannotKeep:
            raise
        except Exception as error:  # whatever reading it raises
            raise CannotKeep(f"item 0 of the {type(dataset).__name__} raised {type(error).__name__}: {error}") from None


@contextlib.contextmanager
def random_states_kept() -> Iterator[None]:
    """Put the states of Python's and NumPy's global generators back at the end."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002 - the user's, whichever they use
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
