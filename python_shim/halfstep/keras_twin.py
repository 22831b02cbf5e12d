"""Two copies of a Keras model, one as it is and one in float32, and what their training steps need of time and memory.

The user's model is only read: its configuration and its weights. All that runs are the copies.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import inspect
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

# There is no public name for the two things of it that making and running a layer move on (see undisturbed).
from keras.src.backend.common import global_state

from halfstep.keras_fit import random_states_kept

_SECONDS = 20.0
_STEPS = 15  # timed, at most, of each copy
# What gives a tensor another name or shape and no memory of its own.
_VIEWS = (
    "Identity",
    "IdentityN",
    "Reshape",
    "Squeeze",
    "ExpandDims",
    "StopGradient",
    "PreventGradient",
    "CheckNumerics",
)
_GIVEN = ("Placeholder", "ReadVariableOp", "Const")  # memory that is there in any case


class CannotMeasure(Exception):
    """Why a model is not measured."""


@dataclasses.dataclass(frozen=True)
class Speed:
    """Seconds of each timed training step, of the model and of its float32 twin, and how many of the former skipped."""

    mixed: tuple[float, ...]
    full: tuple[float, ...]
    skipped: int

    @property
    def median(self) -> float:
        """The float32 median over the other."""
        return statistics.median(self.full) / statistics.median(self.mixed)

    @property
    def peak(self) -> float:
        """The largest ratio of two steps that were timed one after the other."""
        return max(full / mixed for mixed, full in zip(self.mixed, self.full, strict=True))


def layer_bytes(model: Any, batch: tuple[Any, Any, Any]) -> tuple[int, int]:
    """Return the bytes of all layers' outputs on a batch in training, of the model and of its float32 twin.

    They are read off a traced forward pass that does not run. A tensor that several layers return is counted once; a
    view of it (a reshape), inputs and variables are not counted. Raises CannotMeasure.
    """
    with undisturbed():
        same, full = _pair(model, batch[0])
        return _output_bytes(same, batch[0]), _output_bytes(full, batch[0])


def step_seconds(model: Any, batch: tuple[Any, Any, Any], *, clock: Callable[[], float] = time.perf_counter) -> Speed:
    """Time training steps of the model's copy and of its float32 twin, in turn, for about 20 seconds at most.

    The steps are those of fit with the loss, the optimizer's configuration, jit_compile and run_eagerly of the
    model; metrics are left out. The twin's optimizer does not scale the loss. Both have taken steps before the timed
    ones, at least 2 and at most 15 each. Raises CannotMeasure.
    """
    if not getattr(model, "compiled", False) or model.optimizer is None:
        raise CannotMeasure("the model is not compiled with an optimizer, so it has no training step to time")
    with undisturbed():
        speed = _timed(model, batch, clock)
    gc.collect()  # models are cycles: two copies of all weights and states would stay
    return speed


def _timed(model: Any, batch: tuple[Any, Any, Any], clock: Callable[[], float]) -> Speed:
    start = clock()
    twins = _pair(model, batch[0])
    for twin, scaling in zip(twins, (True, False), strict=True):
        twin.set_weights(model.get_weights())
        _compile(twin, model, scaling=scaling)
    batch = tuple(None if part is None else keras.tree.map_structure(_on_device, part) for part in batch)
    data = keras.utils.pack_x_y_sample_weight(*batch)  # as fit gives it to a train_step of the user's

    def seconds(twin: Any) -> float:
        begin = clock()
        _train_step(twin, data)
        return clock() - begin

    for twin in twins:
        if seconds(twin) < _SECONDS / 8:  # traces
            seconds(twin)
    skipped = _skipped(twins[0])
    timed: list[tuple[float, ...]] = []
    while len(timed) < 2 or (len(timed) < _STEPS and clock() - start < _SECONDS):
        timed.append(tuple(map(seconds, twins)))
    return Speed(*zip(*timed, strict=True), _skipped(twins[0]) - skipped)


def _train_step(twin: Any, data: Any) -> None:
    """Take a step as fit takes it, and wait for it; train_on_batch gives x, y and None, which not all steps take."""
    twin.make_train_function()
    for value in keras.tree.flatten(twin.train_function(iter([data]))):
        keras.ops.convert_to_numpy(value)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Put back, at the end, what the making and running of copies moves on: random states, names and the policy.

    Random states are Python's, NumPy's and Keras' global generator. (Operations of TensorFlow that take no seed do not
    move TensorFlow's own state in a traced function.) Names are the counters from which layers are named.
    """
    policy = keras.config.dtype_policy()
    names = global_state.get_global_attribute("object_name_uids")
    counts = dict(names or {})
    generator = global_state.get_global_attribute("global_seed_generator")
    seed = None if generator is None else generator.state.numpy()
    try:
        with random_states_kept(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Keras warns of in a model was said when that was made
            yield
    finally:
        keras.config.set_dtype_policy(policy)
        names = global_state.get_global_attribute("object_name_uids")
        if names is not None:
            names.clear()
            names.update(counts)
        if generator is not None:
            generator.state.assign(seed)
        else:
            global_state.set_global_attribute("global_seed_generator", None)


def parts(model: Any) -> list[Any]:
    """Return the model, its layers down to the innermost, and the operations between them (functional `x + y`)."""
    # Models list their own layers in public, layers do not.
    found = {id(layer): layer for layer in model._flatten_layers()}
    for layer in list(found.values()):
        found.update((id(operation), operation) for operation in getattr(layer, "operations", ()))
    return list(found.values())


def computes_in_half(layer: Any) -> bool:
    """Return whether a layer computes in float16 or bfloat16."""
    return getattr(layer, "compute_dtype", None) in ("float16", "bfloat16")


def under_strategy(model: Any) -> bool:
    """Return whether the model, or whoever asks, is under a tf.distribute strategy."""
    return tf.distribute.has_strategy() or model.distribute_strategy is not tf.distribute.get_strategy()


def _pair(model: Any, x: Any) -> tuple[Any, Any]:
    """Return two copies, with weights of their own."""
    if under_strategy(model):
        raise CannotMeasure("the model is under a tf.distribute strategy, where copies would need its devices")
    if not any(map(computes_in_half, parts(model))):
        raise CannotMeasure("no layer of the model computes in half precision, so both steps would be the same")
    if not model.weights:
        raise CannotMeasure("the model has no weights yet: its first call makes them")
    return _copy(model, x, full=False), _copy(model, x, full=True)


def _copy(model: Any, x: Any, *, full: bool) -> Any:
    """Return a copy, in float32 or with the dtypes of the model."""
    # For layers that a subclassed model makes without a dtype of their own.
    keras.config.set_dtype_policy("float32" if full else model.dtype_policy)
    try:
        twin = _made_anew(model, full=full)
    except Exception as error:  # whatever get_config(), from_config() and constructors of other people's classes raise
        raise CannotMeasure(f"the model cannot be copied: {_in_short(error)}") from None
    _trace(twin, x)  # which builds it, and the layers that layers make in their build()
    _liken(model, twin, full=full)
    return twin


def _made_anew(model: Any, *, full: bool) -> Any:
    kind = type(model)
    lambdas = _lambdas(model)
    config = _edited(keras.saving.serialize_keras_object(model.get_config()), lambdas, full=full)
    recipe = {
        "module": kind.__module__,
        "class_name": kind.__name__,
        "config": config,
        "registered_name": keras.saving.get_registered_name(kind),
    }
    named = {**_own_names(model), **{f"{name}.{key}": function for (name, key), function in lambdas.items()}}
    try:
        return keras.saving.deserialize_keras_object(recipe, custom_objects=named)
    except TypeError:
        # Of a subclass Keras knows the arguments that it was made with, but gives it name and dtype too, which many
        # constructors do not take.
        taken = inspect.signature(kind.__init__).parameters
        if any(taken[name].kind is taken[name].VAR_KEYWORD for name in taken):
            raise
        arguments = {name: value for name, value in config.items() if name in taken}
        return kind(**keras.saving.deserialize_keras_object(arguments, custom_objects=named))


def _lambdas(model: Any) -> dict[tuple[str, str], Any]:
    """Return the lambdas in the model by the name of their layer and the key in its configuration.

    Keras writes their byte code, and what it reads from that has lost the names (`tf`, `np`) that it uses.
    """
    found: dict[tuple[str, str], Any] = {}
    for part in parts(model):
        for attribute, value in vars(part).items():
            if inspect.isfunction(value) and value.__name__ == "<lambda>":
                found[part.name, attribute.removeprefix("_")] = value
    return found


def _edited(config: Any, lambdas: dict[tuple[str, str], Any], *, full: bool) -> Any:
    """Put names for lambdas, leave out how models inside were compiled, and make half dtypes float32 for a twin."""
    if isinstance(config, (list, tuple)):
        return [_edited(value, lambdas, full=full) for value in config]
    if not isinstance(config, dict):
        return config
    result = {}
    for key, value in config.items():
        if full and key == "dtype" and "float16" in str(value):
            result[key] = "float32"
        elif (config.get("name"), key) in lambdas:
            name = f"{config['name']}.{key}"
            result[key] = {"class_name": "function", "config": name, "registered_name": name}
        elif key != "compile_config":
            result[key] = _edited(value, lambdas, full=full)
    return result


def _own_names(*roots: Any) -> dict[str, Any]:
    """Return the classes and functions that the configurations name and that need not be registered with Keras."""
    named: dict[str, Any] = {}
    for part in [part for root in roots for part in (parts(root) if isinstance(root, keras.Model) else [root])]:
        for thing in (part, *vars(part).values()):
            kind = thing if inspect.isfunction(thing) or inspect.isclass(thing) else type(thing)
            named_by_keras = kind.__module__.startswith("keras.") or kind.__name__ == "<lambda>"
            if not named_by_keras and (inspect.isfunction(kind) or hasattr(kind, "get_config")):
                named[kind.__name__] = named[keras.saving.get_registered_name(kind)] = kind
    return named


def _liken(model: Any, twin: Any, *, full: bool) -> None:
    """Give each layer of the copy what was set after its making: the dtype, which is checked, and `trainable`."""
    layers, copies = model._flatten_layers(), twin._flatten_layers()
    if list(map(type, layers)) != list(map(type, copies)):
        raise CannotMeasure("the model cannot be copied: its get_config() makes other layers than it has")
    for layer, copied in zip(layers, copies, strict=True):
        wanted = "float32" if full and computes_in_half(layer) else layer.compute_dtype
        if copied.compute_dtype != wanted:
            copied.dtype_policy = "float32" if full else layer.dtype_policy
        if copied.compute_dtype != wanted:
            raise CannotMeasure(f"layer {layer.name} computes in {copied.compute_dtype} in the copy, expected {wanted}")
        if copied.trainable != layer.trainable:
            copied.trainable = layer.trainable
    if [tuple(weight.shape) for weight in model.weights] != [tuple(weight.shape) for weight in twin.weights]:
        # Of a subclass with constructor arguments Keras may know the defaults alone.
        raise CannotMeasure("the model cannot be copied: its get_config() makes weights of other shapes than it has")


def _on_device(array: Any) -> Any:
    return None if array is None else tf.convert_to_tensor(array)


def _trace(model: Any, x: Any) -> Any:
    """Trace a forward pass in training on the shapes of x; nothing runs but the making of variables."""
    training = {"training": True} if "training" in inspect.signature(model.call).parameters else {}

    @tf.function(autograph=False)
    def forward(inputs: Any) -> Any:
        return model(inputs, **training)

    try:
        return forward.get_concrete_function(keras.tree.map_structure(_on_device, x))
    except Exception as error:  # whatever the model raises
        raise CannotMeasure(f"a copy of the model cannot be called: {_in_short(error)}") from None


def _output_bytes(model: Any, x: Any) -> int:
    """Add up the outputs of all parts of a copy, which this changes."""
    outputs: list[tuple[str, Any]] = []
    for part in parts(model):
        part.call = _noting(part, outputs)
    graph = _trace(model, x).graph
    used = _used(graph)
    counted: dict[str, int] = {}
    for name, tensor in outputs:
        if not isinstance(tensor, tf.Tensor) or tensor.graph is not graph:  # in loops: what they return is counted
            continue
        while tensor.op.type in _VIEWS:
            tensor = tensor.op.inputs[tensor.value_index if tensor.op.type == "IdentityN" else 0]
        if tensor.op.type in _GIVEN or tensor.op.name not in used:
            continue
        if not tensor.shape.is_fully_defined():
            raise CannotMeasure(f"the shape of what {name} returns is not known before it runs")
        counted[tensor.name] = math.prod(tensor.shape) * tensor.dtype.size
    return sum(counted.values())


def _used(graph: Any) -> set[str]:
    """Return the operations that run: TensorFlow leaves out what no result and no assignment needs.

    Keras traces a recurrent cell once more, for the shapes alone.
    """
    found: set[str] = set()
    pending = [tensor.op for tensor in graph.outputs] + list(graph.control_outputs)
    while pending:
        operation = pending.pop()
        if operation.name not in found:
            found.add(operation.name)
            pending += [tensor.op for tensor in operation.inputs] + list(operation.control_inputs)
    return found


def _noting(part: Any, outputs: list[tuple[str, Any]]) -> Callable[..., Any]:
    call = part.call

    @functools.wraps(call)  # whose signature _trace and Keras ask for
    def noted(*args: Any, **kwargs: Any) -> Any:
        result = call(*args, **kwargs)
        outputs.extend((part.name, tensor) for tensor in keras.tree.flatten(result))
        return result

    return noted


def _compile(twin: Any, model: Any, *, scaling: bool) -> None:
    """Compile a copy as the model is compiled, with an optimizer of its own."""
    source = model.optimizer
    scales = isinstance(source, keras.optimizers.LossScaleOptimizer)
    if scales and not scaling:
        source = source.inner_optimizer
    try:
        with keras.saving.custom_object_scope(_own_names(source, getattr(source, "inner_optimizer", source))):
            optimizer = type(source).from_config(source.get_config())
        twin.compile(
            optimizer=optimizer,
            loss=model.loss,
            loss_weights=(model.get_compile_config() or {}).get("loss_weights"),
            run_eagerly=model.run_eagerly,
            jit_compile=model.jit_compile,
            auto_scale_loss=False,
        )
    except Exception as error:  # as in _copy
        raise CannotMeasure(f"a copy of the model cannot be compiled: {_in_short(error)}") from None
    optimizer.build(twin.trainable_variables)
    if scales and scaling and source.built:
        optimizer.dynamic_scale.assign(source.dynamic_scale)  # else its first steps may overflow and be skipped


def _skipped(twin: Any) -> int:
    """Return how many steps a copy has skipped; Keras' own optimizer does not know, and then 0."""
    counters = getattr(twin.optimizer, "counters", None)
    return counters()["skipped"] if callable(counters) else 0


def _in_short(error: Exception) -> str:
    """Return the beginning; of Keras' long texts around the errors of others, that of the innermost."""
    message = str(error).rpartition("Exception encountered: ")[2]
    return f"{type(error).__name__}: {' '.join(message.split())[:200]}"
