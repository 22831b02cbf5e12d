"""The layers of a Keras model that have a precision of their own, and what follows them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import keras

# They compute between their sublayers, most of which they make themselves in build(): decided as one.
WHOLE = (
    keras.layers.MultiHeadAttention,
    keras.layers.GroupQueryAttention,
    keras.layers.RNN,
    keras.layers.StackedRNNCells,
    keras.layers.AugMix,
    keras.layers.RandAugment,
    keras.layers.RandomColorJitter,
)


class FoundLayer(NamedTuple):
    """A layer under one of its qualified names; same_as: the name under which it came before, or ""."""

    name: str
    layer: keras.Layer
    same_as: str


def check_model(model: keras.Layer) -> None:
    """Raise TypeError for what is no Keras layer."""
    if not isinstance(model, keras.Layer):
        raise TypeError(f"model is {type(model).__name__}, expected a keras.Model or keras.Layer")


def sublayers(layer: keras.Layer) -> list[keras.Layer]:
    """Return the layers that a layer holds itself, in the order in which they were assigned."""
    # Only models have a public `layers`; what other layers hold is behind this method alone.
    return layer._flatten_layers(include_self=False, recursive=False)


def all_layers(layer: keras.Layer) -> list[keras.Layer]:
    """Return a layer and all that it holds, at any depth, each once."""
    known: dict[int, keras.Layer] = {id(layer): layer}
    pending = [layer]
    while pending:
        for child in sublayers(pending.pop()):
            if id(child) not in known:
                known[id(child)] = child
                pending.append(child)
    return list(known.values())


def layers_of(model: keras.Layer) -> list[FoundLayer]:
    """Return what a plan covers, in the model's order, under each of its names.

    That is each layer without sublayers or with weights of its own, and each of WHOLE, without what is in it. Left out
    are inputs, what computes in no floating-point type, such as StringLookup, and wrappers, such as Bidirectional.
    Raises TypeError for what is no Keras layer, ValueError where two layers have one qualified name.
    """
    check_model(model)
    found: dict[str, FoundLayer] = {}
    first: dict[int, str] = {}
    for name, layer in _walk(model, ""):
        if name in found:
            raise ValueError(f"two layers are named {name!r}, expected names of their own: pass name= to one of them")
        found[name] = FoundLayer(name, layer, first.get(id(layer), ""))
        first.setdefault(id(layer), name)
    return list(found.values())


def _walk(layer: keras.Layer, name: str) -> Iterator[tuple[str, keras.Layer]]:
    if isinstance(layer, keras.layers.InputLayer):
        return
    inner = sublayers(layer)
    whole = isinstance(layer, WHOLE)
    own = whole or not inner or (wrapped(layer) is None and _has_weights_of_its_own(layer, inner))
    if own and keras.backend.is_float_dtype(layer.compute_dtype):
        yield name, layer
    if not whole:
        for child in inner:
            yield from _walk(child, f"{name}.{child.name}" if name else child.name)


def _has_weights_of_its_own(layer: keras.Layer, inner: list[keras.Layer]) -> bool:
    theirs = {id(weight) for child in inner for weight in child.weights}
    return any(id(weight) not in theirs for weight in layer.weights)


def wrapped(layer: keras.Layer) -> keras.Layer | None:
    """Return the layer that a wrapper wraps, whose precision it shares, since it casts what that is given and returns.

    None for what is no wrapper.
    """
    while isinstance(layer, (keras.layers.Bidirectional, keras.layers.Wrapper)):
        inner = layer.forward_layer if isinstance(layer, keras.layers.Bidirectional) else layer.layer
        if not isinstance(inner, (keras.layers.Bidirectional, keras.layers.Wrapper)):
            return inner
        layer = inner
    return None


def layers_within(layer: keras.Layer) -> list[keras.Layer]:
    """Return what has the precision of a layer because it is in it."""
    inner = all_layers(layer)[1:] if isinstance(layer, WHOLE) else []
    return [other for other in inner if keras.backend.is_float_dtype(other.compute_dtype)]


def wrappers_of(model: keras.Layer) -> dict[int, list[keras.Layer]]:
    """Return, by the id of what is wrapped, the wrappers that have its precision because they are around it."""
    wrappers: dict[int, list[keras.Layer]] = {}
    for layer in all_layers(model):
        inner = wrapped(layer)
        if inner is not None:
            wrappers.setdefault(id(inner), []).append(layer)
    return wrappers
