"""Layer and RMS norms that give int8 to the int8 layers that read them, and which norms of a traced model can be such.

Torch adds a row in another order than halfstep does, so such a norm differs from torch's in the last places.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Graph, GraphModule, Node

from halfstep.int8_layers import Int8Linear, never_compiled_alone
from halfstep.int8_nodes import argument, input_of, is_plain, module_of, reads_shape

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Whether the mean is taken off.
_MODULES = {nn.LayerNorm: True, nn.RMSNorm: False}
_FUNCTIONS = {F.layer_norm: True, torch.layer_norm: True, F.rms_norm: False, torch.rms_norm: False}


class _Int8Norm(nn.Module):
    """A norm over one dimension, [..., size] -> (int8 [..., size], scales, float [..., size]).

    `out_scale` and `out_zero_point` are the int8's. Without a scale every row is quantized by its own largest
    magnitude, and `scales` are float32 [...]; else they are empty. The float result, in the input's dtype, is empty
    unless `keep_float` asks for it.
    """

    def __init__(
        self,
        size: int,
        weight: nn.Parameter | None,
        eps: float | None,
        *,
        out_scale: float | None = None,
        out_zero_point: int = 0,
        keep_float: bool = False,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.size = size
        self.eps = eps
        self.out_scale = out_scale
        self.out_zero_point = out_zero_point
        self.keep_float = keep_float

    def extra_repr(self) -> str:
        """Describe the layer in short."""
        out = "per row" if self.out_scale is None else f"out_scale={self.out_scale:.3g}"
        return f"{self.size}, eps={self.eps}, {out}" + (", float too" if self.keep_float else "")


@never_compiled_alone
class Int8LayerNorm(_Int8Norm):
    """nn.LayerNorm over one dimension, [..., size] -> (int8 [..., size], scales, float [..., size]); see _Int8Norm."""

    def __init__(
        self, size: int, weight: nn.Parameter | None, bias: nn.Parameter | None, eps: float = 1e-5, **options: Any
    ) -> None:
        super().__init__(size, weight, eps, **options)
        self.bias = bias

    def forward(self, input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Normalise, round, quantize."""
        return torch.ops.halfstep.layer_norm_int8(
            input,
            [self.size],
            self.weight,
            self.bias,
            self.eps,
            self.out_scale,
            self.out_zero_point,
            self.keep_float,
        )


@never_compiled_alone
class Int8RMSNorm(_Int8Norm):
    """nn.RMSNorm over one dimension, [..., size] -> (int8 [..., size], scales, float [..., size]); see _Int8Norm."""

    def forward(self, input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Normalise, round, quantize."""
        return torch.ops.halfstep.rms_norm_int8(
            input,
            [self.size],
            self.weight,
            self.eps,
            self.out_scale,
            self.out_zero_point,
            self.keep_float,
        )


@dataclass(frozen=True)
class NormCall:
    """A norm over the last dimension in a graph: a module's call, or a function's with its weight and bias."""

    name: str  # the module's, or the node's
    module: nn.LayerNorm | nn.RMSNorm | None
    center: bool  # False: RMS norm
    size: int
    weight: Node | None = None
    bias: Node | None = None
    eps: float | None = None

    @classmethod
    def of(cls, root: nn.Module, node: Node) -> NormCall | None:
        """Describe the node; None if it is something else, or a norm that its module's class alone does not define."""
        if not isinstance(input_of(node), Node):
            return None
        module = module_of(root, node)
        if module is not None:
            plain = type(module) in _MODULES and is_plain(module) and len(node.args) + len(node.kwargs) == 1
            if not plain or len(module.normalized_shape) != 1:
                return None
            return cls(str(node.target), module, _MODULES[type(module)], module.normalized_shape[0], eps=module.eps)
        if node.op != "call_function" or node.target not in _FUNCTIONS:
            return None
        center = _FUNCTIONS[node.target]
        shape, weight = argument(node, 1, "normalized_shape", None), argument(node, 2, "weight", None)
        bias = argument(node, 3, "bias", None) if center else None
        eps = argument(node, 4, "eps", 1e-5) if center else argument(node, 3, "eps", None)
        stored = all(each is None or (isinstance(each, Node) and each.op == "get_attr") for each in (weight, bias))
        known = isinstance(shape, (tuple, list)) and len(shape) == 1 and type(shape[0]) is int
        if not stored or not known or not isinstance(eps, (int, float, *(() if center else (type(None),)))):
            return None
        return cls(node.name, None, center, shape[0], weight, bias, None if eps is None else float(eps))

    def int8_module(self, **options: Any) -> nn.Module:
        """Return what stands for the module."""
        if self.center:
            return Int8LayerNorm(self.size, self.module.weight, self.module.bias, self.eps, **options).eval()
        return Int8RMSNorm(self.size, self.module.weight, self.eps, **options).eval()

    def int8_call(self, graph: Graph, x: Node, *options: Any) -> Node:
        """Put the function's op into the graph."""
        if self.center:
            arguments = (x, [self.size], self.weight, self.bias, self.eps, *options)
            return graph.call_function(torch.ops.halfstep.layer_norm_int8, arguments)
        return graph.call_function(torch.ops.halfstep.rms_norm_int8, (x, [self.size], self.weight, self.eps, *options))


def computes_in_float32(dtypes: set[torch.dtype]) -> bool:
    """Return whether values of these dtypes, one of them alone, can be normalised to int8."""
    return len(dtypes) == 1 and dtypes <= set(_DTYPES)


def put_int8_norm(
    graph_module: GraphModule,
    node: Node,
    norm: NormCall,
    readers: Collection[Node],
    scale: float | None,
    zero_point: int,
) -> list[str]:
    """Let a norm give int8 by this scale, or by rows, to some of its readers, and float to what else reads it.

    readers: those that take int8; by rows they are layers of takes_rows(). Returns the names of the nodes that are new;
    the one that stands for the norm's value has the name of `node`, which is gone.
    """
    graph, name = graph_module.graph, node.name
    keep = bool(float_readers(node, readers))
    with graph.inserting_before(node):
        if norm.module is not None:
            layer = norm.int8_module(out_scale=scale, out_zero_point=zero_point, keep_float=keep)
            _replace(graph_module, norm.module, layer)
            made = graph.call_module(str(node.target), (input_of(node),))
        else:
            made = norm.int8_call(graph, input_of(node), scale, zero_point, keep)
        quantized = graph.call_function(operator.getitem, (made, 0))
        new = [made, quantized]
        if scale is None:
            scales = graph.call_function(operator.getitem, (made, 1))
            new.append(scales)
            for reader in readers:
                reader.kwargs = {**reader.kwargs, "row_scales": scales}
        for reader in readers:
            reader.replace_input_with(node, quantized)
        value = quantized
        if keep:
            value = graph.call_function(operator.getitem, (made, 2))
            new.append(value)
        node.replace_all_uses_with(value)
    graph.erase_node(node)
    value.name = name
    return [each.name for each in new if each is not value]


def float_readers(node: Node, readers: Collection[Node]) -> list[Node]:
    """Return who reads the node's value beside those that take int8."""
    return [user for user in node.users if user not in readers and not reads_shape(user)]


def takes_rows(layer: nn.Module) -> bool:
    """Return whether an int8 layer reads int8 whose rows have each its own scale."""
    return type(layer) is Int8Linear and layer.input_scale is None


def _replace(root: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for name, module in list(root.named_modules(remove_duplicate=False)):
        if module is old:
            root.set_submodule(name, new)
