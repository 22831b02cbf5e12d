"""Recurrent layers whose weights are stored in int8, for their size: a quarter of float32's, half of half precision's.

Each call makes floating-point weights of them, in the input's type, and runs torch's own kernel, so it takes longer
than the layer that it stands for. Each row of a weight has its scale; biases stay float32. Inference alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from halfstep.half_model import name_of
from halfstep.int8_layers import Int8Layer, never_compiled_alone, pack
from halfstep.int8_model import altered, not_selected

MODES = {"RNN_RELU": 0, "RNN_TANH": 1, "LSTM": 2, "GRU": 3}  # as cuDNN numbers them


@never_compiled_alone
class Int8Weight(Int8Layer):
    """A weight [rows, columns] in int8, and perhaps a bias [rows]."""

    def forward(self, dtype: torch.dtype) -> Tensor:
        """Return the weight in this type."""
        if not torch.jit.is_scripting():  # noqa: SIM102 - scripts skip this branch only if it stands alone
            if torch.compiler.is_exporting():
                return torch.ops.halfstep.dequantize_weight_named_dtype(self.packed, name_of(dtype))
        return torch.ops.halfstep.dequantize_weight(self.packed, dtype)


class Int8Recurrent(nn.Module):
    """What Int8LSTM, Int8GRU and Int8RNN share. They are called as the layers that they are made of are.

    `weights` are those of each layer and direction in torch's order: input, hidden, and projection where there is one;
    `packed` has their PackedInt8 in this order. `module` gives the rest; its weights are not looked at.
    Scripted ones take tensors; sequences that are packed, in Python alone.
    """

    def __init__(self, module: nn.RNNBase, packed: Iterable[torch.ScriptObject]) -> None:
        super().__init__()
        self.mode: str = module.mode
        self.input_size: int = module.input_size
        self.hidden_size: int = module.hidden_size
        self.proj_size: int = module.proj_size
        self.num_layers: int = module.num_layers
        self.bias: bool = module.bias
        self.batch_first: bool = module.batch_first
        self.bidirectional: bool = module.bidirectional
        self.weights_of_cell: int = 3 if module.proj_size > 0 else 2
        self.weights = nn.ModuleList(map(Int8Weight, packed))
        self.train(module.training)

    def extra_repr(self) -> str:
        """Describe the layer in short, as torch does."""
        parts = [f"{self.input_size}, {self.hidden_size}"]
        for name, usual in (("proj_size", 0), ("num_layers", 1), ("bias", True), ("batch_first", False)):
            if getattr(self, name) != usual:
                parts.append(f"{name}={getattr(self, name)}")
        return ", ".join([*parts, "bidirectional=True"] if self.bidirectional else parts)

    def _float_weights(self, dtype: torch.dtype) -> list[Tensor]:
        """Return all weights and biases as torch's kernels take them."""
        flat: list[Tensor] = []
        biases: list[Tensor] = []
        for number, weight in enumerate(self.weights):
            flat.append(weight(dtype))
            bias = weight.packed.bias()
            if bias is not None:
                biases.append(bias.to(dtype))
            if number % self.weights_of_cell == 1:
                flat.extend(biases)
                biases = []
        if not torch.jit.is_scripting():
            self._lay_out(flat)
        return flat

    @torch.jit.unused
    def _lay_out(self, flat: list[Tensor]) -> None:
        """Put weights in one piece of memory for cuDNN, which warns where they are not, and does it itself then."""
        first = flat[0]
        if not first.is_cuda or not torch.backends.cudnn.is_acceptable(first):
            return
        if not torch._use_cudnn_rnn_flatten_weight() or torch.compiler.is_compiling():
            return
        in_cell = self.weights_of_cell + (2 if self.bias else 0)
        with torch.cuda.device_of(first), torch.no_grad():
            torch._cudnn_rnn_flatten_weight(
                flat,
                in_cell,
                self.input_size,
                MODES[self.mode],
                self.hidden_size,
                self.proj_size,
                self.num_layers,
                self.batch_first,
                self.bidirectional,
            )

    def _checked(self, input: Tensor) -> Tensor:
        """Return the input with a batch, for [length, input_size] a batch of one."""
        if input.dim() not in (2, 3) or input.size(-1) != self.input_size:
            raise ValueError(
                f"input has shape {list(input.shape)}, expected 2 or 3 dimensions, the last of {self.input_size}"
            )
        return input if input.dim() == 3 else input.unsqueeze(0 if self.batch_first else 1)

    def _state(self, given: Tensor | None, input: Tensor, batch: int, batched: bool, size: int) -> Tensor:
        """Return the state [layers * directions, batch, size] as given, checked, or zeros."""
        layers = self.num_layers * (2 if self.bidirectional else 1)
        if given is None:
            return torch.zeros([layers, batch, size], dtype=input.dtype, device=input.device)
        expected = [layers, batch, size] if batched else [layers, size]
        if list(given.shape) != expected:
            raise ValueError(f"hx has shape {list(given.shape)}, expected {expected}")
        return given if batched else given.unsqueeze(1)


class Int8LSTM(Int8Recurrent):
    """nn.LSTM with int8 weights."""

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Make the weights and run torch's kernel."""
        if not torch.jit.is_scripting() and isinstance(input, PackedSequence):
            return self._packed(input, hx)
        x = self._checked(input)
        batched = input.dim() == 3
        batch = x.size(0) if self.batch_first else x.size(1)
        given: tuple[Tensor | None, Tensor | None] = (None, None)
        if hx is not None:
            given = (hx[0], hx[1])
        output_size = self.proj_size if self.proj_size > 0 else self.hidden_size
        h = self._state(given[0], x, batch, batched, output_size)
        c = self._state(given[1], x, batch, batched, self.hidden_size)
        weights = self._float_weights(x.dtype)
        output, h, c = torch.lstm(
            x, [h, c], weights, self.bias, self.num_layers, 0.0, False, self.bidirectional, self.batch_first
        )
        if batched:
            return output, (h, c)
        return output.squeeze(0 if self.batch_first else 1), (h.squeeze(1), c.squeeze(1))

    @torch.jit.unused
    def _packed(self, input: Any, hx: Any) -> Any:
        data, sizes = input.data, input.batch_sizes
        states = (None, None) if hx is None else tuple(_permuted(state, input.sorted_indices) for state in hx)
        batch = int(sizes[0])
        h = self._state(states[0], data, batch, True, self.proj_size or self.hidden_size)
        c = self._state(states[1], data, batch, True, self.hidden_size)
        weights = self._float_weights(data.dtype)
        output, h, c = torch.lstm(
            data, sizes, [h, c], weights, self.bias, self.num_layers, 0.0, False, self.bidirectional
        )
        h, c = (_permuted(state, input.unsorted_indices) for state in (h, c))
        return PackedSequence(output, sizes, input.sorted_indices, input.unsorted_indices), (h, c)


class _Int8PlainRecurrent(Int8Recurrent):
    """A recurrent layer with one state."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if not torch.jit.is_scripting() and isinstance(input, PackedSequence):
            return self._packed(input, hx)
        x = self._checked(input)
        batched = input.dim() == 3
        h = self._state(hx, x, x.size(0) if self.batch_first else x.size(1), batched, self.hidden_size)
        weights = self._float_weights(x.dtype)
        if self.mode == "GRU":
            output, h = torch.gru(
                x, h, weights, self.bias, self.num_layers, 0.0, False, self.bidirectional, self.batch_first
            )
        elif self.mode == "RNN_TANH":
            output, h = torch.rnn_tanh(
                x, h, weights, self.bias, self.num_layers, 0.0, False, self.bidirectional, self.batch_first
            )
        else:
            output, h = torch.rnn_relu(
                x, h, weights, self.bias, self.num_layers, 0.0, False, self.bidirectional, self.batch_first
            )
        if batched:
            return output, h
        return output.squeeze(0 if self.batch_first else 1), h.squeeze(1)

    @torch.jit.unused
    def _packed(self, input: Any, hx: Any) -> Any:
        data, sizes = input.data, input.batch_sizes
        h = None if hx is None else _permuted(hx, input.sorted_indices)
        h = self._state(h, data, int(sizes[0]), True, self.hidden_size)
        run = {"GRU": torch.gru, "RNN_TANH": torch.rnn_tanh, "RNN_RELU": torch.rnn_relu}[self.mode]
        weights = self._float_weights(data.dtype)
        output, h = run(data, sizes, h, weights, self.bias, self.num_layers, 0.0, False, self.bidirectional)
        packed = PackedSequence(output, sizes, input.sorted_indices, input.unsorted_indices)
        return packed, _permuted(h, input.unsorted_indices)


class Int8GRU(_Int8PlainRecurrent):
    """nn.GRU with int8 weights."""


class Int8RNN(_Int8PlainRecurrent):
    """nn.RNN with int8 weights."""


_KINDS: dict[type, type[Int8Recurrent]] = {nn.LSTM: Int8LSTM, nn.GRU: Int8GRU, nn.RNN: Int8RNN}


def int8_recurrent(module: nn.RNNBase, bits: int = 8) -> Int8Recurrent:
    """Return the layer with its weights in int8. TypeError for other layers, ValueError for weights not finite."""
    if type(module) not in _KINDS:
        raise TypeError(f"module is {type(module).__name__}, expected nn.LSTM, nn.GRU or nn.RNN")
    packed = [pack(weight, bias, bits=bits) for weight, bias in weights_of(module)]
    return recurrent_from(module, packed)


def recurrent_from(module: nn.RNNBase, packed: Iterable[torch.ScriptObject]) -> Int8Recurrent:
    """Return a layer like this nn.LSTM, nn.GRU or nn.RNN, with packed weights in the order of weights_of()."""
    return _KINDS[type(module)](module, packed)


def take_recurrent(
    model: nn.Module, left: dict[str, str], include: tuple[str, ...], exclude: tuple[str, ...]
) -> dict[str, nn.RNNBase]:
    """Return the recurrent layers of the model whose weights can be int8, and take them out of `left`."""
    found: dict[str, nn.RNNBase] = {}
    for name, module in model.named_modules():
        if name not in left or type(module) not in _KINDS:
            continue
        if reason := _obstacle(module) or not_selected(name, include, exclude):
            left[name] = reason
        else:
            found[name] = module
            del left[name]
    return found


def _obstacle(module: nn.RNNBase) -> str:
    if reason := altered(module):
        return reason
    dtypes = {parameter.dtype for parameter in module.parameters()}
    return "its weights are float64" if torch.float64 in dtypes else ""


def weights_of(module: nn.RNNBase) -> list[tuple[Tensor, Tensor | None]]:
    """Return each weight and its bias, in torch's order."""
    found: list[tuple[Tensor, Tensor | None]] = []
    for layer in range(module.num_layers):
        for direction in ("", "_reverse") if module.bidirectional else ("",):
            for part in ("ih", "hh"):
                bias = getattr(module, f"bias_{part}_l{layer}{direction}") if module.bias else None
                found.append((getattr(module, f"weight_{part}_l{layer}{direction}"), bias))
            if module.proj_size > 0:
                found.append((getattr(module, f"weight_hr_l{layer}{direction}"), None))
    return found


def _permuted(state: Tensor, permutation: Tensor | None) -> Tensor:
    return state if permutation is None else state.index_select(1, permutation)
