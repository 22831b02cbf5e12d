"""The plan in a file of an optimized model: what is there beside its weights, as JSON, and the checks of it.

A plan is data of unknown origin: from_text() raises ValueError for whatever save() would not have written, and needs no
more memory than the text. Whether it fits a model's code is for int8_load.
"""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from halfstep.half_model import name_of
from halfstep.int8_layers import ACTIVATIONS, Int8Conv1d, Int8Conv2d, Int8Embedding, Int8Linear
from halfstep.int8_nodes import has_residual
from halfstep.int8_recurrent import MODES

FORMAT = "halfstep optimized model"
VERSION = 3  # 1 had no checksums, 2 not all settings of layers
KINDS = {"linear": Int8Linear, "conv1d": Int8Conv1d, "conv2d": Int8Conv2d, "embedding": Int8Embedding}
FLOATS = ("float32", "bfloat16", "float16", "float64")
_SMALLEST, _LARGEST = 2.0**-126, (2.0 - 2.0**-23) * 2.0**127  # normal numbers of float32: what the ops take as a scale
_DTYPES = (*FLOATS, "int64", "int32", "int16", "int8", "uint8", "bool", "complex64", "complex128")
_MOST_DIMS, _MOST_BYTES = 64, 1 << 30  # of the example's tensors

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class LayerPlan:
    """An int8 layer, by its name in the model. `kind` is the float layer's, `layer` the int8 layer's class."""

    name: str
    kind: str
    layer: str
    weight: list[int]  # its shape: [out, in] or [out, in / groups, height, width]
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int
    bias: bool
    input_factors: bool
    input_scale: float | None  # None: per row
    input_zero_point: int
    activation: str
    residual: bool
    out_dtype: str | None
    out_scale: float | None
    out_zero_point: int

    @classmethod
    def of(cls, name: str, layer: nn.Module, residual: bool) -> LayerPlan:
        """Describe an int8 layer."""
        packed = layer.packed
        dtype = layer.out_dtype
        return cls(
            name,
            next(kind for kind, each in KINDS.items() if type(layer) is each),
            type(layer).__name__,
            list(packed.weight().shape),
            packed.stride(),
            packed.padding(),
            packed.dilation(),
            packed.groups(),
            packed.bias() is not None,
            packed.input_factors() is not None,
            getattr(layer, "input_scale", None),
            getattr(layer, "input_zero_point", 0),
            getattr(layer, "activation", "none"),
            residual,
            None if dtype is None else name_of(dtype),
            getattr(layer, "out_scale", None),
            getattr(layer, "out_zero_point", 0),
        )

    def check(self) -> None:
        """Raise ValueError for what no layer can be."""
        where = f"layer {self.name!r}"
        _choice(f"{where}: kind", self.kind, KINDS)
        _expect(f"{where}: layer", self.layer, KINDS[self.kind].__name__)
        _choice(f"{where}: activation", self.activation, ACTIVATIONS)
        if self.out_dtype is not None:
            _choice(f"{where}: out_dtype", self.out_dtype, FLOATS)
        dims = 4 if self.kind in ("conv1d", "conv2d") else 2
        _integers(f"{where}: weight", self.weight, dims, 1)
        for name, least in (("stride", 1), ("padding", 0), ("dilation", 1)):
            _integers(f"{where}: {name}", getattr(self, name), 2, least)
        if self.groups < 1 or self.weight[0] % self.groups or (self.groups > 1 and (dims == 2 or self.input_factors)):
            raise ValueError(
                f"{where}: groups is {self.groups}, expected a divisor of the {self.weight[0]} output channels, and 1 "
                "but for convolutions without input_factors"
            )
        for side in ("input", "out"):
            scale, zero_point = getattr(self, f"{side}_scale"), getattr(self, f"{side}_zero_point")
            if scale is not None and not _SMALLEST <= scale <= _LARGEST:  # NaN fails
                raise ValueError(f"{where}: {side}_scale is {scale}, expected a positive normal number of float32")
            low, high = (-128, 127) if scale is not None else (0, 0)
            if not low <= zero_point <= high:
                raise ValueError(f"{where}: {side}_zero_point is {zero_point}, expected {low} to {high}")


@dataclass(frozen=True)
class RecurrentPlan:
    """A recurrent layer whose weights are int8, by its name in the model; the rest are torch's attributes."""

    name: str
    mode: str  # "LSTM", "GRU", "RNN_TANH" or "RNN_RELU"
    input_size: int
    hidden_size: int
    proj_size: int
    num_layers: int
    bias: bool
    batch_first: bool
    bidirectional: bool

    @classmethod
    def of(cls, name: str, layer: nn.Module) -> RecurrentPlan:
        """Describe a recurrent layer, int8 or torch's own."""
        keys = [field.name for field in dataclasses.fields(cls)][1:]
        return cls(name, *(getattr(layer, key) for key in keys))

    def check(self) -> None:
        """Raise ValueError for what no layer can be."""
        where = f"layer {self.name!r}"
        _choice(f"{where}: mode", self.mode, MODES)
        for key in ("input_size", "hidden_size", "num_layers"):
            _integers(f"{where}: {key}", [getattr(self, key)], 1, 1)
        most = self.hidden_size - 1 if self.mode == "LSTM" else 0
        if not 0 <= self.proj_size <= most:
            raise ValueError(f"{where}: proj_size is {self.proj_size}, expected 0 to {most}")


@dataclass(frozen=True)
class DevicePlan:
    """What a model was tuned for. `milliseconds` are of the whole model on one batch, by type."""

    type: str
    name: str
    kernel: str
    milliseconds: dict[str, float]


@dataclass(frozen=True)
class RegionPlan:
    """Layers between which values stay int8, and what each took over, in words."""

    layers: list[str]
    fused: list[str]


@dataclass(frozen=True)
class Plan:
    """All that is known of an optimized model, but for its code and its weights."""

    halfstep: str
    torch: str
    model: str  # its class
    outside: str  # the model's own dtype, in which it is called
    carrier: str  # the dtype of what is not int8
    graph: str | None  # the digest of the trace, None if the model is not traced
    settings: str | None  # the digest of the settings of torch's layers, None without int8 layers
    attention: list[str]  # taken apart
    folded: list[list[str]]  # batch norms, as (convolution, norm)
    layers: list[LayerPlan]
    recurrent: list[RecurrentPlan]
    regions: list[RegionPlan]
    example: dict[str, Any] | None  # encode() of the arguments
    orders: dict[str, list[int]]  # the dimensions of tensors that are not contiguous, the outermost in memory first
    checksums: dict[str, int]  # the CRC-32 of each tensor's bytes in the file
    device: DevicePlan
    casts: dict[str, str] = field(default_factory=dict)  # layers in another dtype than what calls them, if any

    def to_text(self) -> str:
        """Return the plan as JSON."""
        values = dataclasses.asdict(self)
        if not self.casts:
            del values["casts"]
        return json.dumps({"format": FORMAT, "version": VERSION, **values}, allow_nan=False)

    @classmethod
    def from_text(cls, text: str) -> Plan:
        """Read and check a plan; ValueError says what is wrong with it."""
        try:
            values = json.loads(text)
            if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
                raise ValueError(f"the plan is not of the format {FORMAT!r}")
            version = values.pop("version", None)
            if type(version) is not int or version < 1:
                raise ValueError(f"version is {version!r}, expected {VERSION}")
            if version > VERSION:
                raise ValueError(f"version is {version}, newer than {VERSION}: halfstep is older than the file")
            if version < VERSION:
                raise ValueError(
                    f"version is {version}, which says too little, expected {VERSION}: save the model again"
                )
            plan = _made(cls, values, "the plan")
            plan._check()
        except RecursionError:
            raise ValueError("the plan is nested too deeply") from None
        except json.JSONDecodeError as error:
            raise ValueError(f"the plan is not JSON: {error}") from None
        return plan

    def _check(self) -> None:
        for name in ("outside", "carrier"):
            _choice(name, getattr(self, name), FLOATS)
        names = [layer.name for layer in self.layers]
        every = [layer.name for layer in (*self.layers, *self.recurrent)]
        if len(set(every)) != len(every):
            raise ValueError("layers has a name twice")
        for layer in (*self.layers, *self.recurrent):
            layer.check()
        traced = self.graph is not None
        self._check_casts(every)
        if not self.layers and (traced or (self.attention and not self.casts) or self.regions):
            raise ValueError("the plan is traced, has attention or regions without int8 layers")
        if not traced and self.folded:
            raise ValueError("the plan has folded batch norms, but the model is not traced")
        if traced and self.example is None:
            raise ValueError("the plan has no example, but the model is traced")
        if any(len(pair) != 2 for pair in self.folded):
            raise ValueError("folded has an entry that is not a pair of names")
        if sorted(name for region in self.regions for name in region.layers) != sorted(names):
            raise ValueError("regions has other layers than layers")
        for name, order in self.orders.items():
            if sorted(order) != list(range(len(order))):
                raise ValueError(f"orders: {name!r} has {order}, expected an order of dimensions")
        if self.example is not None:
            decode(self.example, lambda shape, dtype: None)

    def _check_casts(self, int8: list[str]) -> None:
        if self.casts and int8:
            raise ValueError("the plan has casts between layers and int8 layers")
        if "" in self.casts:
            raise ValueError("casts has '', the model itself, whose type is the carrier")
        for name, dtype in self.casts.items():
            _choice(f"casts: {name!r}", dtype, FLOATS)
        if len(types := {self.outside, self.carrier, *self.casts.values()}) > 2:
            raise ValueError(f"casts are between {', '.join(sorted(types))}, expected two types")


def encode(value: Any) -> Any:
    """Return arguments as plain values, of tensors their shape and dtype; ValueError for what is not plain."""
    if isinstance(value, torch.Tensor):
        return {"tensor": list(value.shape), "dtype": name_of(value.dtype)}
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return {"float": repr(value)}
    if type(value) in (tuple, list):
        return {type(value).__name__: [encode(each) for each in value]}
    if type(value) is dict and all(isinstance(key, str) for key in value):
        return {"dict": {key: encode(each) for key, each in value.items()}}
    raise ValueError(
        f"the model is called with a {type(value).__name__}, which cannot be written down; expected tensors, numbers, "
        "strings, and tuples, lists and dicts of them"
    )


def decode(example: Any, tensor: typing.Callable[[list[int], torch.dtype], Any]) -> Arguments:
    """Return the arguments that encode() got, with tensor(shape, dtype) for each tensor; ValueError if they are none.

    The sizes of all tensors are checked before.
    """
    sizes: list[int] = []

    def read(value: Any) -> Any:
        if value is None or type(value) in (bool, int, str):
            return value
        if not isinstance(value, dict):
            raise ValueError(f"example has a {type(value).__name__}")
        if set(value) == {"tensor", "dtype"}:
            shape = _integers("example: shape", value["tensor"], None, 0)
            _choice("example: dtype", value["dtype"], _DTYPES)
            dtype = getattr(torch, value["dtype"])
            sizes.append(math.prod(shape) * dtype.itemsize)
            if len(shape) > _MOST_DIMS or max(shape, default=0) > _MOST_BYTES or sum(sizes) > _MOST_BYTES:
                raise ValueError(
                    f"example has a tensor {shape[:9]}, more than the {_MOST_BYTES} bytes that it may take"
                )
            return tensor(shape, dtype)
        if len(value) == 1:
            ((key, item),) = value.items()
            if key == "float" and type(item) is str:
                return float(item)
            if key in ("tuple", "list") and type(item) is list:
                return (tuple if key == "tuple" else list)(read(each) for each in item)
            if key == "dict" and type(item) is dict:
                return {name: read(each) for name, each in item.items()}
        raise ValueError(f"example has an entry of {sorted(value)[:4]}, which is not known")

    arguments = read(example)
    if not (isinstance(arguments, tuple) and [type(each) for each in arguments] == [tuple, dict]):
        raise ValueError("example is not a pair of positional and keyword arguments")
    return arguments


def residuals(model: nn.Module) -> set[str]:
    """Return the layers of a traced model that add a residual: those that are called with a second tensor."""
    if not isinstance(model, GraphModule):
        return set()
    calls = [node for node in model.graph.nodes if node.op == "call_module"]
    return {str(node.target) for node in calls if has_residual(node)}


def _choice(what: str, value: Any, choices: Collection[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{what} is {value!r}, expected one of {', '.join(choices)}")


def _expect(what: str, value: Any, expected: Any) -> None:
    if value != expected:
        raise ValueError(f"{what} is {value!r}, expected {expected!r}")


def _integers(what: str, value: Any, count: int | None, least: int) -> list[int]:
    valid = type(value) is list and all(type(each) is int and least <= each < 1 << 40 for each in value)
    if not valid or (count is not None and len(value) != count):
        raise ValueError(f"{what} is {str(value)[:80]}, expected {count or 'a list of'} integers of {least} or more")
    return value


def _made(kind: Any, value: Any, where: str) -> Any:
    """Return a value of JSON as what an annotation says: dataclasses, lists, dicts, unions with None, plain types."""
    if dataclasses.is_dataclass(kind):
        if type(value) is not dict:
            raise ValueError(f"{where} is {type(value).__name__}, expected an object")
        hints = typing.get_type_hints(kind)
        optional = {each.name for each in dataclasses.fields(kind) if each.default_factory is not dataclasses.MISSING}
        missing, unknown = sorted(hints.keys() - optional - value.keys()), sorted(value.keys() - hints.keys())
        if missing or unknown:
            raise ValueError(f"{where} lacks {missing} and has {unknown[:4]}, which are not known")
        return kind(**{key: _made(hints[key], each, f"{where}: {key}") for key, each in value.items()})
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is list and type(value) is list:
        return [_made(arguments[0], each, where) for each in value]
    if origin is dict and type(value) is dict:
        return {key: _made(arguments[1], each, f"{where}: {key}") for key, each in value.items()}
    if type(None) in arguments:
        return None if value is None else _made(arguments[0], value, where)
    if kind is Any or (origin is None and type(value) is kind):
        return value
    raise ValueError(f"{where} is {type(value).__name__}, expected {getattr(kind, '__name__', kind)}")
