"""What torch.export and torch.compile know of PackedInt8, of the ops that take one, and of Observer: no values."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from halfstep._library import load_library


class FakePackedInt8:
    """Stands for a PackedInt8 while a program is traced."""

    def __init__(self, **fields: Any) -> None:
        self._fields = fields

    @classmethod
    def __obj_unflatten__(cls, flat: tuple[tuple[str, Any], ...]) -> FakePackedInt8:
        return cls(**dict(flat))

    def weight(self) -> torch.Tensor:
        """Return the int8 weight."""
        return self._fields["weight"]

    def scales(self) -> torch.Tensor:
        """Return the scales of the output channels."""
        return self._fields["scales"]

    def bias(self) -> torch.Tensor | None:
        """Return the bias, if there is one."""
        return self._fields["bias"]

    def input_factors(self) -> torch.Tensor | None:
        """Return the factors of the input channels, if there are any."""
        return self._fields["input_factors"]

    def stride(self) -> list[int]:
        """Return height and width."""
        return self._fields["stride"]

    def padding(self) -> list[int]:
        """Return height and width."""
        return self._fields["padding"]

    def dilation(self) -> list[int]:
        """Return height and width."""
        return self._fields["dilation"]

    def groups(self) -> int:
        """Return the groups of a convolution."""
        return self._fields["groups"]

    def id(self) -> int:
        """Raise NotImplementedError: in a program a number would name nothing."""
        raise NotImplementedError("PackedInt8.id() has no meaning in a traced program, pass the object itself")

    def to(self, device: torch.device) -> FakePackedInt8:
        """Return itself: a traced program moves nothing."""
        return self

    def prepare(self, device: torch.device) -> None:
        """Do nothing."""

    def corrected(self, shifts: list[torch.Tensor]) -> FakePackedInt8:
        """Return itself: values are not known."""
        return self


class FakeObserver:
    """Stands for an Observer while a program is traced; the program observes when it runs."""

    def __init__(self, channels_dim: int | None = None) -> None:
        self._channels_dim = channels_dim

    @classmethod
    def __obj_unflatten__(cls, flat: tuple[tuple[str, Any], ...]) -> FakeObserver:
        return cls(**dict(flat))

    def observe(self, tensor: torch.Tensor) -> None:
        """Do nothing: there are no values yet."""

    def channels_dim(self) -> int | None:
        """Return the dimension of the channels, if they are observed."""
        return self._channels_dim


def _only_outside(name: str) -> Callable[..., Any]:
    def method(self: FakeObserver, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"Observer.{name}() has no meaning in a traced program, call it outside of it")

    return method


# Torch logs a line for each method that a fake object has not.
for _name in (
    *("merge", "parameters", "min", "max", "count", "nonfinite", "batches"),
    *("channel_max", "channel_mean", "histogram", "reset", "state", "restore"),
):
    setattr(FakeObserver, _name, _only_outside(_name))


def _out_dtype(input: torch.Tensor, out_dtype: torch.dtype | None, out_scale: float | None) -> torch.dtype:
    if out_scale is not None:
        return torch.int8
    if out_dtype is not None:
        return out_dtype
    return input.dtype if input.dtype.is_floating_point else torch.float32


def _int8_linear(
    input: torch.Tensor,
    weight: Any,
    input_scale: float | None = None,
    input_zero_point: int = 0,
    residual: torch.Tensor | None = None,
    activation: str = "none",
    out_dtype: torch.dtype | None = None,
    out_scale: float | None = None,
    out_zero_point: int = 0,
    input_row_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    channels, terms = weight.weight().shape
    torch._check(
        input.shape[-1] == terms, lambda: f"int8_linear: input has shape {input.shape}, expected [..., {terms}]"
    )
    return input.new_empty((*input.shape[:-1], channels), dtype=_out_dtype(input, out_dtype, out_scale))


def _int8_conv2d(
    input: torch.Tensor,
    weight: Any,
    input_scale: float | None = None,
    input_zero_point: int = 0,
    residual: torch.Tensor | None = None,
    activation: str = "none",
    out_dtype: torch.dtype | None = None,
    out_scale: float | None = None,
    out_zero_point: int = 0,
) -> torch.Tensor:
    channels, _, *kernel = weight.weight().shape
    sizes = [
        (size + 2 * padding - dilation * (taps - 1) - 1) // stride + 1
        for size, taps, stride, padding, dilation in zip(
            input.shape[2:], kernel, weight.stride(), weight.padding(), weight.dilation(), strict=True
        )
    ]
    out = input.new_empty((input.shape[0], channels, *sizes), dtype=_out_dtype(input, out_dtype, out_scale))
    return out.to(memory_format=torch.channels_last)


def _int8_embedding(indices: torch.Tensor, weight: Any, out_dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return indices.new_empty((*indices.shape, weight.weight().shape[1]), dtype=out_dtype)


def _dequantize_weight(weight: Any, out_dtype: torch.dtype) -> torch.Tensor:
    return weight.weight().new_empty(weight.weight().shape, dtype=out_dtype)


def _named_dtype(fake: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return the fake of the op that takes `out_dtype` by its name."""
    signature = inspect.signature(fake)

    def named(*args: Any, **kwargs: Any) -> torch.Tensor:
        given = signature.bind(*args, **kwargs)
        name = given.arguments.get("out_dtype")
        if name is not None:
            given.arguments["out_dtype"] = getattr(torch, name)
        return fake(*given.args, **given.kwargs)

    return named


@functools.cache
def register_fakes() -> None:
    """Make the int8 ops known to torch.export and torch.compile. Loads the library; a second call does nothing."""
    load_library()
    torch._library.register_fake_class("halfstep::PackedInt8", FakePackedInt8)
    torch._library.register_fake_class("halfstep::Observer", FakeObserver)
    fakes: dict[str, Callable[..., torch.Tensor]] = {
        "int8_linear": _int8_linear,
        "int8_conv2d": _int8_conv2d,
        "int8_embedding": _int8_embedding,
        "dequantize_weight": _dequantize_weight,
    }
    fakes.update({f"{name}_named_dtype": _named_dtype(fake) for name, fake in fakes.items()})
    for name, fake in fakes.items():
        torch.library.register_fake(f"halfstep::{name}", fake)
        # Ops with an object among their arguments count as ones with side effects; these have none.
        torch.library._register_effectful_op(f"halfstep::{name}", None)
