"""Weights that are no layer's: parameters by which a model's own code multiplies, or in which it looks rows up."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from halfstep.int8_model import is_product

_PRODUCTS = {
    "mm",
    "bmm",
    "mv",
    "dot",
    "matmul",
    "linear",
    "mkldnn_linear",
    "convolution",
    "_convolution",
    "mkldnn_convolution",
    "cudnn_convolution",
    "_trilinear",
    "_cudnn_rnn",
    "mkldnn_rnn_layer",
    "_cdist_forward",
    "_euclidean_dist",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
}
_SUMS = {"addmm", "_addmm_activation", "baddbmm", "addbmm", "addmv"}  # whose first argument is added
_LOOKUPS = {"embedding", "_embedding_bag", "_embedding_bag_forward_only", "index", "index_select", "gather", "take"}
_KNOWN = ("aten", "prim", "prims", "halfstep")  # namespaces of ops; others may compute anything


def bare_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return float parameters and buffers of two dimensions or more, by first name, that are in no layer with products.

    They may be anything: tables of positions, gains, or weights that a forward multiplies by.
    """
    found: dict[str, torch.Tensor] = {}
    seen: set[int] = set()

    def visit(module: nn.Module, prefix: str) -> None:
        if is_product(module):
            return
        for name, parameter in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if parameter.is_floating_point() and parameter.dim() >= 2 and id(parameter) not in seen:
                found[prefix + name] = parameter
                seen.add(id(parameter))
        for name, child in module.named_children():
            visit(child, f"{prefix}{name}.")

    visit(model, "")
    return found


class WeightProducts(TorchDispatchMode):
    """While it is entered: which of these weights enter a product with, or are looked up by, something that varies.

    weights: by the names that they have in `model`, the one that is run, or had in the one that it was traced from; its
    parameters share their memory. All tensors of the model are constants. What is made of constants alone is one too,
    such as a weight that is scaled, or rows of a table by positions that are always the same; adding or concatenating
    to what varies is no product. `found` has the names and what was seen.
    """

    def __init__(self, weights: Mapping[str, torch.Tensor], model: nn.Module) -> None:
        super().__init__()
        self.found: dict[str, str] = {}
        self.paused = 0  # > 0 in layers that can be int8: what they multiply by is theirs, though it may be shared
        spans = {_span(tensor): frozenset[str]() for tensor in _tensors_of(model) if _has_memory(tensor)}
        own = dict(model.named_parameters(remove_duplicate=False))  # copies, of scripted modules
        own.update(model.named_buffers(remove_duplicate=False))
        for name, weight in weights.items():
            tensor = own.get(name, weight)
            if _has_memory(tensor):
                spans[_span(tensor)] = spans.get(_span(tensor), frozenset()) | {name}
        self._spans = sorted(spans.items(), key=lambda item: item[0])
        # Of what is made of constants; each tensor is kept, so that no other one is given its id.
        self._made: dict[int, tuple[torch.Tensor, frozenset[str]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self.paused:
            self._note(func, [t for t in pytree.arg_tree_leaves(*args, **(kwargs or {})) if _is_array(t)], out)
        return out

    def _note(self, func: Any, inputs: list[torch.Tensor], out: Any) -> None:
        made_of = [self._made_of(tensor) for tensor in inputs]
        outputs = [leaf for leaf in pytree.tree_leaves(out) if _is_array(leaf)]
        if all(each is not None for each in made_of):
            for tensor in outputs:
                # Floating-point tensors that are made of nothing (torch.empty) are there to be written to.
                if inputs or not tensor.is_floating_point():
                    self._made[id(tensor)] = tensor, frozenset().union(*made_of)
            return
        for tensor in outputs:  # one that was constant may have been written to
            self._made.pop(id(tensor), None)
        space, _, name = func.name().partition("::")
        name = name.partition(".")[0]
        if space not in _KNOWN:
            used, said = made_of, f"a parameter that {space}::{name} takes, which may compute anything"
        elif name in _LOOKUPS:
            used, said = made_of[:1], f"a parameter in which the model looks up rows ({name})"
        elif name in _PRODUCTS or name in _SUMS:
            used, said = made_of[name in _SUMS :], f"a parameter by which the model multiplies ({name})"
        else:
            return
        for weight in sorted(frozenset().union(*(each for each in used if each))):
            self.found.setdefault(weight, f"{said}: only layers become int8")

    def _made_of(self, tensor: torch.Tensor) -> frozenset[str] | None:
        """Return the weights that a constant is made of, None for what varies."""
        if id(tensor) in self._made:
            return self._made[id(tensor)][1]
        if not _has_memory(tensor):
            return None
        place = tensor.data_ptr()
        at = bisect.bisect_right(self._spans, place, key=lambda item: item[0][0]) - 1
        return self._spans[at][1] if at >= 0 and place < self._spans[at][0][1] else None


def _tensors_of(model: nn.Module) -> Iterator[torch.Tensor]:
    """Yield parameters, buffers, and tensors that are plain attributes."""
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        yield from (value for value in vars(module).values() if isinstance(value, torch.Tensor))


def _is_array(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0


def _has_memory(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_meta and tensor.numel() > 0


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """Return where the tensor's memory begins and ends."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()
