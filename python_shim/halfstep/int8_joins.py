"""Int8 linear layers that read one value as one product: the query, key and value of attention are the usual case.

One product reads the input once, and is one call instead of several. Each layer's channels keep their own scales, so
the bits are those of the layers one by one. Each result is a view of some columns, so what is written to, leaves the
model or meets code that is not torch's is not joined. Functions of torch that compute otherwise where memory is not
contiguous (sigmoid) may differ in the last place.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping

import torch
from torch.fx import GraphModule, Node

from halfstep.int8_layers import Int8Linear, packed_from, state_of
from halfstep.int8_nodes import module_of

_BY_CHANNEL = ("weight", "scales", "bias")
# What is one setting for all channels of a call.
_SETTINGS = ("input_scale", "input_zero_point", "activation", "out_dtype", "out_scale", "out_zero_point")


class Int8JoinedLinear(Int8Linear):
    """Linear layers of the same input as one: [..., in] -> [..., sum of their out], in their order.

    `names` are the layers' qualified names, `sizes` how many channels each has.
    """

    def __init__(self, layers: Mapping[str, Int8Linear]) -> None:
        first = next(iter(layers.values()))
        states = [state_of(layer.packed) for layer in layers.values()]
        rows = {part: torch.cat([state[part] for state in states]) for part in _BY_CHANNEL if part in states[0]}
        super().__init__(packed_from({**states[0], **rows}), **{name: getattr(first, name) for name in _SETTINGS})
        self.names = list(layers)
        self.sizes: list[int] = [layer.packed.weight().size(0) for layer in layers.values()]

    @torch.jit.unused
    def parts(self) -> dict[str, Int8Linear]:
        """Return the layers that this one stands for, by name; their tensors are views of this one's."""
        state = state_of(self.packed)
        rows = {part: state[part].split(self.sizes) for part in _BY_CHANNEL if part in state}
        settings = {name: getattr(self, name) for name in _SETTINGS}
        return {
            name: Int8Linear(packed_from({**state, **{part: each[i] for part, each in rows.items()}}), **settings)
            for i, name in enumerate(self.names)
        }

    def extra_repr(self) -> str:
        """Describe the layer in short."""
        return f"{super().extra_repr()}, {' + '.join(map(str, self.sizes))}"


def joins_of(layer: Int8Linear) -> tuple[object, ...] | None:
    """Return what layers of the same input have in common that can be one product; None if the layer can be in none.

    A smoothed layer multiplies its input by factors of its own.
    """
    if type(layer) is not Int8Linear or layer.packed.input_factors() is not None:
        return None
    return (layer.packed.bias() is None, *(getattr(layer, name) for name in _SETTINGS))


def join_products(graph_module: GraphModule, nodes: list[Node]) -> list[str]:
    """Let one product stand for these calls of layers with the same joins_of() and arguments, in the graph's order.

    The nodes keep their names; returns those of the nodes that are new. The layers are gone from the graph module.
    """
    graph = graph_module.graph
    layers = {str(node.target): module_of(graph_module, node) for node in nodes}
    joined = Int8JoinedLinear(layers).eval()
    name = _free_name(graph_module, layers)
    _remove(graph_module, layers.values())
    graph_module.add_submodule(name, joined)
    with graph.inserting_before(nodes[0]):
        product = graph.call_module(name, nodes[0].args, nodes[0].kwargs)
        split = graph.call_method("split_with_sizes", (product, joined.sizes, -1))
        pieces = [graph.call_function(operator.getitem, (split, i)) for i in range(len(nodes))]
    for node, piece in zip(nodes, pieces, strict=True):
        node.replace_all_uses_with(piece)
        graph.erase_node(node)
        piece.name = node.name
    return [product.name, split.name]


def _free_name(graph_module: GraphModule, names: Iterable[str]) -> str:
    """Return a name beside the first layer that says what is joined and is not taken: "attention.q_proj_k_proj"."""
    split = [name.rpartition(".") for name in names]
    parent, dot, _ = split[0]
    name = parent + dot + "_".join(last for _, _, last in split)
    taken = dict(graph_module.named_modules())
    while name in taken or hasattr(taken[parent], name.rpartition(".")[2]):
        name += "_"
    return name


def _remove(graph_module: GraphModule, layers: Iterable[Int8Linear]) -> None:
    gone = set(layers)
    for name, module in list(graph_module.named_modules(remove_duplicate=False)):
        if module in gone:
            graph_module.delete_submodule(name)
