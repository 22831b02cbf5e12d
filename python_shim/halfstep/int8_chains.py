"""What int8 layers of a traced model take over from the operations around them, and where int8 passes between them.

    activation   relu, relu6, gelu, silu or hardswish, of which the layer's output is the only input
    residual     the addition of another tensor of the same shape
    int8 out     where every reader is an int8 layer that quantizes by the same scale and zero point
    norm         a layer or RMS norm, which writes int8 for the int8 layers that read it, and float for what else does
    joined       linear layers that read the same value alike are one product

In float32 none of them changes a bit of what is finite, but for gelu, silu, hardswish and norms, which torch rounds at
other places: a norm is that of halfstep's `layer_norm` or `rms_norm`, quantized. In half precision the sums are no
longer rounded before the activation or the addition.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch
from torch import nn
from torch.fx import GraphModule, Node

from halfstep.int8_joins import join_products, joins_of
from halfstep.int8_nodes import (
    INT8_LAYERS,
    PRODUCTS,
    activation_of,
    call_sites,
    has_residual,
    input_of,
    is_in_place_addition,
    is_plain,
    is_read_as_values,
    max_pool_of,
    may_write,
    module_of,
    moves_values,
    put_int8_pool,
    reads_shape,
    summands_of,
)
from halfstep.int8_norms import NormCall, computes_in_float32, float_readers, put_int8_norm, takes_rows
from halfstep.int8_runs import Shapes


@dataclasses.dataclass(frozen=True)
class Region:
    """Int8 layers that int8 connects, in the order of the graph; one without such neighbours is a region of its own.

    layers: their qualified names.
    nodes: the names of what they do in the graph before fuse(), taken over operations included: for subgraph(). None
        for a layer inside of a module that the graph calls whole: the graph cannot tell what it is given.
    parts: for each layer what it took over, such as ["batch norm bn1", "residual", "relu", "int8 out"].
    """

    layers: list[str]
    nodes: list[str]
    parts: dict[str, list[str]]

    @property
    def fused(self) -> list[str]:
        """One line for each layer that took over anything, such as "conv1 + batch norm bn1 + relu"."""
        return [" + ".join((name, *parts)) for name, parts in self.parts.items() if parts]


def fuse(
    graph_module: GraphModule,
    shapes: Shapes,
    out_dtype: torch.dtype,
    norms: Iterable[tuple[str, str]] = (),
) -> list[Region]:
    """Let the int8 layers in the graph take over what they can, in place, and say what belongs together.

    shapes: shapes_of() the graph, before or after its layers became int8, in the dtypes that it will run in.
    out_dtype: what the model runs in beside int8. Layers that read int8 would not know it otherwise.
    norms: the pairs of fold_batch_norms(), which are told with the other parts.

    A layer that is called several times stays as it is. The layer's node takes the name of the last operation that it
    took over; joined layers are gone from the module, and an Int8JoinedLinear is where the first of them was.
    """
    fuser = _Fuser(graph_module, shapes)
    for conv, norm in norms:
        fuser.note(conv, f"batch norm {norm}")
    fuser.take_activations()
    fuser.take_residuals()
    fuser.take_activations()
    fuser.pass_int8(out_dtype)
    fuser.take_norms(out_dtype)
    groups = fuser.joinable()
    regions = fuser.regions()
    for nodes in groups:
        own = next(region for region in regions if str(nodes[0].target) in region.layers)
        own.nodes.extend(join_products(graph_module, nodes))
    graph_module.graph.lint()
    graph_module.recompile()
    return regions


class _Fuser:
    def __init__(self, graph_module: GraphModule, shapes: Shapes) -> None:
        self._root = graph_module
        self._graph = graph_module.graph
        self._shapes = shapes
        self._sites = call_sites(graph_module)
        # The graph as it was, by the names of its nodes.
        self._readers = {node.name: [user.name for user in node.users] for node in self._graph.nodes}
        self._names = {node: [node.name] for node in self._graph.nodes}
        self._parts: dict[str, list[str]] = {}
        self._links: list[tuple[Node, Node]] = []
        self._added: dict[str, list[str]] = {}  # by the node of the graph as it was, those that it became

    def note(self, layer: str, part: str) -> None:
        self._parts.setdefault(layer, []).append(part)

    def _product(self, node: Node) -> nn.Module | None:
        """Return the int8 layer that this node alone calls."""
        layer = module_of(self._root, node)
        usable = type(layer) in PRODUCTS and is_plain(layer) and self._sites[layer] == [node]
        return layer if usable and isinstance(input_of(node), Node) else None

    def _take_over(self, node: Node, gone: Node, part: str) -> None:
        self.note(str(node.target), part)
        self._names[node] += self._names.pop(gone)
        gone.replace_all_uses_with(node)
        self._graph.erase_node(gone)
        node.name = gone.name

    def take_activations(self) -> None:
        for node in list(self._graph.nodes):
            layer = self._product(node)
            users = [user for user in node.users if not reads_shape(user)]
            if layer is None or layer.activation != "none" or len(users) != 1:
                continue
            activation = activation_of(self._root, users[0])
            if activation is not None:
                layer.activation = activation
                self._take_over(node, users[0], activation)

    def take_residuals(self) -> None:
        for add in list(self._graph.nodes):
            summands = summands_of(add)
            if summands is None:
                continue
            place = {node: position for position, node in enumerate(self._graph.nodes)}
            for node in sorted(summands, key=place.__getitem__, reverse=True):  # the later one takes the earlier one
                other = summands[0] if node is summands[1] else summands[1]
                if self._can_take(node, other, add):
                    add.prepend(node)  # where `other` is there, and still the same
                    node.args, node.kwargs = (input_of(node), other), {}
                    self._take_over(node, add, "residual")
                    break

    def _can_take(self, node: Node, other: Node, add: Node) -> bool:
        layer = self._product(node)
        if layer is None or layer.activation != "none" or list(node.users) != [add] or other is node:
            return False
        if has_residual(node):
            return False
        alike = self._shapes.get(add.name)
        if alike is None or any(self._shapes.get(each.name) != alike for each in (node, other)):
            return False
        if not all(dtype.is_floating_point for _, dtype in alike) or not _is_fed(other):
            return False
        private = self._product(other) is not None and list(other.users) == [add]
        if is_in_place_addition(add) and input_of(add) is other and not private:
            return False  # others may see what the addition writes
        between = node.next
        while between is not add:
            if may_write(self._root, between):
                return False
            between = between.next
        return True

    def pass_int8(self, out_dtype: torch.dtype) -> None:
        for node in self._graph.nodes:
            layer = self._product(node)
            if layer is None or layer.out_scale is not None:
                continue
            readers = self._int8_readers(node)
            if readers:
                self._links += [(node, reader) for reader in readers]
                reader = self._product(readers[0])
                layer.out_scale, layer.out_zero_point = reader.input_scale, reader.input_zero_point
                layer.out_dtype = None
                self.note(str(node.target), "int8 out")
                for user in list(node.users):
                    self._take_int8(user)
        for _, node in self._links:
            reader = self._product(node)
            if reader.out_scale is None:
                reader.out_dtype = out_dtype

    def _take_int8(self, user: Node) -> None:
        """Let the poolings among those that move a value to int8 layers take int8."""
        if self._product(user) is not None or reads_shape(user):
            return
        if max_pool_of(self._root, user) is not None:
            put_int8_pool(self._root, user)
        for each in list(user.users):
            self._take_int8(each)

    def _int8_readers(self, node: Node) -> list[Node]:
        """Return the int8 layers that read the node's output, all by one scale; none if anything else reads it."""
        readers = self._behind(node)
        kinds = {self._taken_as(reader) for reader in readers}
        static = all(kind is not None and kind[0] is not None for kind in kinds)
        return readers if static and len(kinds) == 1 else []

    def _behind(self, node: Node) -> list[Node]:
        """Return the int8 layers to which all of the node's value goes, also through what only moves it; else none."""
        readers: list[Node] = []
        for user in node.users:
            if not reads_shape(user):
                found = self._beyond(node, user)
                if not found:
                    return []
                readers += found
        return readers

    def _beyond(self, value: Node, user: Node) -> list[Node]:
        """Return the int8 layers to which the user takes the value; none if it does anything else with it."""
        if input_of(user) is not value or value in user.args[1:]:
            return []
        if self._product(user) is not None:
            return [user]
        return self._behind(user) if moves_values(self._root, user) else []

    def _taken_as(self, reader: Node) -> tuple[float | None, int] | None:
        """Return scale and zero point by which an int8 layer quantizes its input; None if it multiplies it before."""
        layer = self._product(reader)
        return None if layer.packed.input_factors() is not None else (layer.input_scale, layer.input_zero_point)

    def take_norms(self, out_dtype: torch.dtype) -> None:
        """Let layer norms write int8 for the int8 layers that quantize their result alike."""
        for node in list(self._graph.nodes):
            norm = NormCall.of(self._root, node)
            if norm is None or (norm.module is not None and self._sites[norm.module] != [node]):
                continue
            if not computes_in_float32({dtype for _, dtype in self._shapes.get(node.name, ())}):
                continue
            scale, zero_point, readers = self._norm_readers(node)
            if readers and not (float_readers(node, readers) and self._written_before(node, readers)):
                self._take_norm(node, norm, readers, scale, zero_point, out_dtype)

    def _norm_readers(self, node: Node) -> tuple[float | None, int, dict[Node, list[Node]]]:
        """Return how most of the int8 layers quantize that read the node, and its users that lead to those alone."""
        kinds: dict[tuple[float | None, int], dict[Node, list[Node]]] = {}
        for user in node.users:
            found = [] if reads_shape(user) else self._beyond(node, user)
            alike = {self._taken_as(reader) for reader in found}
            if len(alike) != 1 or None in alike:
                continue
            (kind,) = alike
            if kind[0] is not None or (found == [user] and takes_rows(self._product(user))):
                kinds.setdefault(kind, {})[user] = found
        if not kinds:
            return None, 0, {}
        (scale, zero_point), readers = max(kinds.items(), key=lambda item: sum(map(len, item[1].values())))
        return scale, zero_point, readers

    def _written_before(self, node: Node, readers: dict[Node, list[Node]]) -> bool:
        """Return whether anything may write to the node's value before the last of its readers reads it."""
        waiting = {reader for found in readers.values() for reader in found}
        each = node.next
        while waiting:
            if may_write(self._root, each):
                return True
            waiting.discard(each)
            each = each.next
        return False

    def _take_norm(
        self,
        node: Node,
        norm: NormCall,
        readers: dict[Node, list[Node]],
        scale: float | None,
        zero_point: int,
        out_dtype: torch.dtype,
    ) -> None:
        layers = [reader for found in readers.values() for reader in found]
        for reader in readers:
            self._take_int8(reader)
        names = self._names.pop(node)
        self._added[names[0]] = put_int8_norm(self._root, node, norm, readers, scale, zero_point)
        self._names[layers[0]] += names
        self._links += [(layers[0], reader) for reader in layers[1:]]
        for reader in layers:
            self._parts.setdefault(str(reader.target), []).insert(0, f"norm {norm.name}")
            product = self._product(reader)
            if product.out_scale is None:
                product.out_dtype = out_dtype

    def joinable(self) -> list[list[Node]]:
        """Return the calls of layers that can be one product, several in each group, and link them to one region.

        Layers of one module alone: what one module reads of another's result, as the layers of a decoder do, would
        have to be kept from the first of them to the last.
        """
        groups: dict[tuple[object, ...], list[Node]] = {}
        for node in self._graph.nodes:
            layer = self._product(node)
            common = None if layer is None else joins_of(layer)
            if common is None or has_residual(node) or not is_read_as_values(self._root, node):
                continue
            key = (input_of(node), node.kwargs.get("row_scales"), common, str(node.target).rpartition(".")[0])
            groups.setdefault(key, []).append(node)
        found = []
        for nodes in groups.values():
            nodes = nodes[: 1 + self._unwritten(nodes)]
            if len(nodes) > 1:
                names = [str(node.target) for node in nodes]
                self.note(names[0], f"joined with {', '.join(names[1:])}")
                self._links += [(nodes[0], node) for node in nodes[1:]]
                found.append(nodes)
        return found

    def _unwritten(self, nodes: list[Node]) -> int:
        """Return how many of the nodes after the first can be computed with it: nothing between may write."""
        each, reached = nodes[0].next, 0
        while reached + 1 < len(nodes) and not may_write(self._root, each):
            reached += each is nodes[reached + 1]
            each = each.next
        return reached

    def regions(self) -> list[Region]:
        place = {node: position for position, node in enumerate(self._graph.nodes)}
        names = {layer: name for name, layer in self._root.named_modules() if isinstance(layer, INT8_LAYERS)}
        groups: dict[Node, list[Node]] = {}
        found: list[tuple[int, Region]] = []
        for layer, name in names.items():
            sites = self._sites.get(layer, [])
            if all(module_of(self._root, site) is layer for site in sites):
                group = list(sites)
                groups.update((site, group) for site in sites)
            else:
                found.append((min(place[site] for site in sites), Region([name], [], {name: []})))
        for one, other in self._links:
            if groups[one] is not groups[other]:
                groups[one] += groups[other]
                for node in groups[other]:
                    groups[node] = groups[one]
        for group in {id(group): group for group in groups.values()}.values():
            group.sort(key=place.__getitem__)
            layers = list(dict.fromkeys(names[module_of(self._root, node)] for node in group))
            parts = {name: self._parts.get(name, []) for name in layers}
            found.append((place[group[0]], Region(layers, self._enclosed(group), parts)))
        return [region for _, region in sorted(found, key=lambda pair: pair[0])]

    def _enclosed(self, group: list[Node]) -> list[str]:
        """Return the names that the nodes stand for, and of all that lies on a path between two of them."""
        own = {name for node in group for name in self._names[node]}
        below, above = set(own), set(own)
        for name, readers in self._readers.items():
            if name in below:
                below.update(readers)
        for name, readers in reversed(self._readers.items()):
            if not above.isdisjoint(readers):
                above.add(name)
        inside = [name for name in self._readers if name in below and name in above]
        return inside + [each for name in inside for each in self._added.get(name, [])]


def _is_fed(node: Node) -> bool:
    """Return whether the value comes from an input of the model: a constant's shape says nothing of the next batch."""
    waiting, seen = [node], {node}
    while waiting:
        each = waiting.pop()
        if each.op == "placeholder":
            return True
        new = [source for source in each.all_input_nodes if source not in seen]
        seen.update(new)
        waiting += new
    return False
