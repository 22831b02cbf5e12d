"""The layers of an int8 model: nn.Module around a PackedInt8 and the numbers of one call. Inference alone.

They can be scripted, exported, compiled, copied, pickled, moved and shared between threads. `state_dict()` holds their
weights as `_extra_state`. They take float32, float16 or bfloat16 and answer in the same dtype, or what `out_dtype` and
`out_scale` say; int8 tensors pass between layers of one chain.

In exported programs their ops are those that take `out_dtype` by its name: AOTInductor of torch 2.11 confuses dtypes
among the arguments of ops that are not torch's (torch_ops/int8_named_dtype.cpp). So they are under torch.compile, which
answers `is_exporting()` with True.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from halfstep._library import load_library
from halfstep.half_model import name_of
from halfstep.int8_fake import register_fakes

load_library()
register_fakes()

_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch  # is there while make_fx or torch.export looks at whole operators

ACTIVATIONS = ("none", "relu", "relu6", "gelu", "gelu_tanh", "silu", "hardswish")


def pack(
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
    bits: int = 8,
    search: bool = False,
    input_factors: torch.Tensor | None = None,
) -> torch.ScriptObject:
    """Quantize a floating-point weight [out, in] or [out, in / groups, height, width] to a PackedInt8.

    stride, padding, dilation: for height and width; one number is for both. `search` takes the scale of the least
    squared error instead of the largest magnitude. ValueError for weights that are empty or not finite, TypeError for
    what is no tensor.
    """
    for name, value in (("weight", weight), ("bias", bias)):
        if not isinstance(value, torch.Tensor) and (name == "weight" or value is not None):
            raise TypeError(f"{name} is {type(value).__name__}, expected a tensor")
    if not weight.numel():
        raise ValueError(f"weight is empty: {list(weight.shape)}, expected at least one number")
    quantized, scales = torch.ops.halfstep.quantize_int8_weight(weight.detach(), bits, search)
    return torch.classes.halfstep.PackedInt8(
        quantized,
        scales,
        None if bias is None else bias.detach().float(),
        _pair(stride),
        _pair(padding),
        _pair(dilation),
        groups,
        input_factors,
    )


def _pair(value: int | tuple[int, ...]) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


def state_of(packed: torch.ScriptObject) -> dict[str, Any]:
    """Return what a PackedInt8 consists of: tensors, lists of int, an int."""
    return {name: value for name, value in packed.__obj_flatten__() if value is not None}


def packed_from(state: dict[str, Any]) -> torch.ScriptObject:
    """Make a PackedInt8 of state_of()'s dict."""
    return torch.classes.halfstep.PackedInt8(
        state["weight"],
        state["scales"],
        state.get("bias"),
        list(state["stride"]),
        list(state["padding"]),
        list(state["dilation"]),
        state["groups"],
        state.get("input_factors"),
    )


class PackedId:
    """The id of a layer's PackedInt8, asked for once. Copies and pickles of it know none: there the object is another.

    An op takes the object itself in a graph, and the id where Python calls it: handing the object over takes longer
    than all else that Python does for a call.
    """

    __slots__ = ("_known",)

    def __init__(self) -> None:
        self._known: tuple[torch.ScriptObject | None, int] = (None, 0)

    def of(self, packed: torch.ScriptObject) -> int:
        """Return the id."""
        known, number = self._known
        if known is not packed:
            number = packed.id()
            self._known = packed, number
        return number

    def __reduce__(self) -> tuple[type[PackedId], tuple[()]]:
        return PackedId, ()


def called_from_python(*tensors: torch.Tensor | None) -> bool:
    """Return whether the op that comes next runs at once on the values of these tensors, and nobody records it."""
    for each in tensors:
        if each is not None and (type(each) is not torch.Tensor or each.is_meta):
            return False
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._dispatch_tls_is_dispatch_key_included(_PRE_DISPATCH)
    )


_Layer = TypeVar("_Layer", bound=type[nn.Module])


def never_compiled_alone(layer: _Layer) -> _Layer:
    """Keep torch.compile from taking this class's forward for a graph of its own, as it does with torch's layers.

    Code that does not compile in one graph calls its layers from Python, and each has another scale: all would be
    compiled, up to the limit of recompilations, and each call would look through the guards of all. In a graph that
    calls it, a layer is inlined as before.
    """
    with contextlib.suppress(AttributeError):  # torch's own, of no stated interface: without it such calls are slow
        frames = torch._C._dynamo.eval_frame
        skip = frames._FrameAction.SKIP
        frames.set_code_exec_strategy(layer.forward.__code__, frames._FrameExecStrategy(skip, skip))
    return layer


class Int8Layer(nn.Module):
    """The part that all int8 layers share: a PackedInt8 that follows the module from device to device."""

    def __init__(self, packed: torch.ScriptObject) -> None:
        super().__init__()
        self.packed = packed
        self._id = PackedId()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Int8Layer:
        super()._apply(fn, recurse)
        here = self.packed.scales().device
        there = fn(torch.empty(0, dtype=torch.int8, device=here)).device
        if there != here and there.type != "meta":
            self.packed = self.packed.to(there)
            self._id = PackedId()  # which keeps the old weights alive
        return self

    @torch.jit.unused
    def get_extra_state(self) -> dict[str, Any]:
        """Return what state_dict() holds of the layer: state_of(packed)."""
        return state_of(self.packed)

    @torch.jit.unused
    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take what get_extra_state() gave, to the device on which the layer is."""
        self.packed = packed_from(state).to(self.packed.scales().device)
        self._id = PackedId()


class _Int8Product(Int8Layer):
    """A linear layer or convolution.

    `input_scale` and `input_zero_point` are the input's; without a scale every row of a linear layer, and every image
    of a convolution, is quantized by its own largest magnitude. `out_scale` asks for an int8 output.
    """

    def __init__(
        self,
        packed: torch.ScriptObject,
        *,
        input_scale: float | None = None,
        input_zero_point: int = 0,
        activation: str = "none",
        out_dtype: torch.dtype | None = None,
        out_scale: float | None = None,
        out_zero_point: int = 0,
    ) -> None:
        super().__init__(packed)
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
        self.input_scale = input_scale
        self.input_zero_point = input_zero_point
        self.activation = activation
        self.out_dtype = out_dtype
        self.out_scale = out_scale
        self.out_zero_point = out_zero_point

    def _from_python(self, op: str, input: torch.Tensor, *tensors: torch.Tensor | None) -> torch.Tensor:
        """Call the op of this name, with a residual and perhaps row scales, in the form that suits the caller."""
        residual, *row_scales = tensors
        ops, weight, dtype = torch.ops.halfstep, self.packed, self.out_dtype
        if called_from_python(input, *tensors):
            op, weight = f"{op}_by_id", self._id.of(self.packed)
        elif torch.compiler.is_exporting():
            op, dtype = f"{op}_named_dtype", None if dtype is None else name_of(dtype)
        return getattr(ops, op)(
            input,
            weight,
            self.input_scale,
            self.input_zero_point,
            residual,
            self.activation,
            dtype,
            self.out_scale,
            self.out_zero_point,
            *row_scales,
        )

    def extra_repr(self) -> str:
        """Describe the layer in short."""
        out, *rest = self.packed.weight().shape
        parts = [f"{rest[0]} -> {out}"]
        if len(rest) == 3:
            parts.append(f"kernel={tuple(rest[1:])}")
        parts.append("per row" if self.input_scale is None else f"input_scale={self.input_scale:.3g}")
        if self.activation != "none":
            parts.append(self.activation)
        if self.out_scale is not None:
            parts.append(f"int8 out, scale {self.out_scale:.3g}")
        return ", ".join(parts)


@never_compiled_alone
class Int8Linear(_Int8Product):
    """nn.Linear in int8: [..., in] -> [..., out], plus `residual` before the activation.

    `row_scales`, float32 [...], belong to an int8 input whose rows have each its own scale.
    """

    def forward(
        self,
        input: torch.Tensor,
        residual: torch.Tensor | None = None,
        row_scales: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Quantize, multiply, add, activate."""
        if not torch.jit.is_scripting():
            return self._from_python("int8_linear", input, residual, row_scales)
        return torch.ops.halfstep.int8_linear(
            input,
            self.packed,
            self.input_scale,
            self.input_zero_point,
            residual,
            self.activation,
            self.out_dtype,
            self.out_scale,
            self.out_zero_point,
            row_scales,
        )


class _Int8Conv(_Int8Product):
    def _conv2d(self, input: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        """Call the op on [batch, in, height, width]."""
        if not torch.jit.is_scripting():
            return self._from_python("int8_conv2d", input, residual)
        return torch.ops.halfstep.int8_conv2d(
            input,
            self.packed,
            self.input_scale,
            self.input_zero_point,
            residual,
            self.activation,
            self.out_dtype,
            self.out_scale,
            self.out_zero_point,
        )


@never_compiled_alone
class Int8Conv2d(_Int8Conv):
    """nn.Conv2d in int8: [batch, in, height, width] -> [batch, out, height, width], channels last in memory.

    An image without a batch, [in, height, width], gives one too.
    """

    def forward(self, input: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Quantize, multiply, add, activate."""
        batched = input.dim() != 3
        added = residual if batched or residual is None else residual.unsqueeze(0)
        out = self._conv2d(input if batched else input.unsqueeze(0), added)
        return out if batched else out.squeeze(0)


@never_compiled_alone
class Int8Conv1d(_Int8Conv):
    """nn.Conv1d in int8: [batch, in, length] -> [batch, out, length], a convolution of height 1.

    A signal without a batch, [in, length], gives one too. ValueError for an input of another shape.
    """

    def __init__(self, packed: torch.ScriptObject, **options: Any) -> None:
        super().__init__(packed, **options)
        self.in_channels: int = packed.weight().size(1) * packed.groups()

    def forward(self, input: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Quantize, multiply, add, activate."""
        if not torch.jit.is_tracing():  # sizes are tensors then
            channels = self.in_channels
            if input.dim() not in (2, 3) or input.size(-2) != channels:
                raise ValueError(
                    f"input has shape {list(input.shape)}, expected [batch, {channels}, length] or [{channels}, length]"
                )
        batched = input.dim() == 3
        x = input.unsqueeze(-2)
        added = None if residual is None else residual.unsqueeze(-2)
        added = added if batched or added is None else added.unsqueeze(0)
        out = self._conv2d(x if batched else x.unsqueeze(0), added).squeeze(2)
        return out if batched else out.squeeze(0)


@never_compiled_alone
class Int8Embedding(Int8Layer):
    """nn.Embedding with an int8 table and a scale for each entry: indices [...] -> [..., width] in `out_dtype`."""

    def __init__(self, packed: torch.ScriptObject, out_dtype: torch.dtype = torch.float32) -> None:
        super().__init__(packed)
        self.out_dtype = out_dtype

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Look up and scale."""
        if not torch.jit.is_scripting():  # noqa: SIM102 - scripts skip this branch only if it stands alone
            if torch.compiler.is_exporting():
                return torch.ops.halfstep.int8_embedding_named_dtype(input, self.packed, name_of(self.out_dtype))
        return torch.ops.halfstep.int8_embedding(input, self.packed, self.out_dtype)

    def extra_repr(self) -> str:
        """Describe the layer in short."""
        entries, width = self.packed.weight().shape
        return f"{entries}, {width}"
