"""A model as a torch.fx graph: traced as far as it can be, and parts of it cut out to be run alone.

Layers keep their names and nodes theirs through copies, so that the name of a node means the same value in each copy
of a traced model, whatever its layers compute in.
"""

from __future__ import annotations

import dataclasses
import inspect
import operator
import threading
import typing
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node, Proxy, Tracer
from torch.fx.immutable_collections import immutable_dict

from halfstep.calls import HOOKS, copy_of
from halfstep.containers import is_dataclass
from halfstep.half_model import CastModel
from halfstep.int8_model import is_product
from halfstep.int8_nodes import INT8_LAYERS, input_of, is_idle
from halfstep.int8_report import grouped

_WHOLE = (*INT8_LAYERS, torch.jit.ScriptModule)
# torch.fx puts itself in the place of nn.Module's calls, and takes itself out again. Compiled models refuse to be
# called meanwhile.
TRACING = threading.Lock()


class TracedModule(GraphModule):
    """A graph module that torch.jit.script takes without warnings of the annotations in GraphModule's own __init__."""

    def __init__(self, root: nn.Module | dict[str, Any], graph: Graph, class_name: str = "GraphModule") -> None:
        super().__init__(root, graph, class_name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model. TypeError for other arguments than those that it was traced with says which these are."""
        try:
            return super().__call__(*args, **kwargs)
        except TypeError:
            signature = inspect.signature(self.forward)
            try:
                signature.bind(*args, **kwargs)
            except TypeError as misfit:
                raise TypeError(
                    f"{misfit}: this model was traced with the arguments ({', '.join(signature.parameters)}); others "
                    "keep their defaults, pass calibration batches that give them"
                ) from None
            raise


def trace(model: nn.Module, given: Collection[str] | None = None) -> tuple[GraphModule | None, str]:
    """Trace a copy of the model, which shares the parameters' memory, in eval mode.

    The graph calls modules of torch.nn (but Sequential) whole, scripted ones, int8 layers and layers that can
    be int8, subclasses included, and every module that cannot be traced itself.

    given: the parameters of forward that calls will pass (given_arguments() tells); the others keep their defaults, and
    the traced model does not take them. None: those without a default.

    Returns (graph module, "" or which modules were left whole and why), or (None, why the model cannot be traced).
    A trace may have baked in what is not constant: disagreement() is the proof. Assertions on tensors and their shapes
    count as control flow. Identities and dropouts are left out, and views are reshapes.
    """
    if model.training:
        return None, "the model is in training mode"
    if isinstance(model, torch.jit.ScriptModule):
        return None, "the model is scripted"
    if "forward" in vars(model):
        return None, "the model's forward was replaced, or it is compiled"
    if any(getattr(model, hooks) for hooks in HOOKS):
        return None, "the model itself has hooks"
    try:
        twin = copy_of(model)
    except TypeError as error:
        return None, f"the model cannot be copied: {_in_short(error.__cause__ or error)}"
    tracer = _Tracer(_defaults(model, given))
    if tracer.is_leaf_module(twin, ""):
        kind = type(twin)
        has_layers = any(is_product(module) for module in twin.modules() if module is not twin)
        return None, f"nn.{kind.__name__} is called whole" if has_layers else "the model is a single layer"
    try:
        with TRACING:
            graph = tracer.trace(twin)
        _finish(graph, model)
        for node in list(graph.nodes):
            if is_idle(twin, node):
                node.replace_all_uses_with(input_of(node))
                graph.erase_node(node)
            elif node.op == "call_method" and node.target == "view" and not _views_bits(node):
                node.target = "reshape"  # int8 convolutions answer in channels last, of which few views can be taken
        graph.lint()
        graph_module = TracedModule(twin, graph, type(model).__name__)
    except Exception as error:  # the model's own code, given something that is no tensor, may raise anything
        return None, _in_short(error)
    for module in graph_module.modules():
        if type(module) is nn.Module:  # stands for a container that was traced through
            module.training = False
    return graph_module, "; ".join(
        grouped({name: f"left whole, {why}" for name, why in tracer.left_whole.items()}, "modules")
    )


def taken_by(model: nn.Module) -> tuple[str, ...] | None:
    """Return the arguments that a model of trace() takes, or one in a CastModel; None for other models: all."""
    model = model.module if isinstance(model, CastModel) else model
    return tuple(inspect.signature(model.forward).parameters) if isinstance(model, TracedModule) else None


class _Tracer(Tracer):
    """Calls modules whole that cannot be traced, and leaves out the parameters that keep their defaults."""

    def __init__(self, defaults: dict[str, Any]) -> None:
        super().__init__(param_shapes_constant=True)
        self.left_whole: dict[str, str] = {}
        self._defaults = defaults
        self._thread = threading.get_ident()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _WHOLE) or is_product(m) or super().is_leaf_module(m, module_qualified_name)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        root_fn, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        for position, value in enumerate(args):
            if isinstance(value, Proxy) and value.node.target in self._defaults:
                args[position] = self._defaults[value.node.target]
                self.graph.erase_node(value.node)
        return root_fn, args

    def create_arg(self, a: Any) -> Any:
        """Let the graph make mappings of the class that they have; torch.fx alone makes dicts of them, or refuses."""
        if not isinstance(a, Mapping) or type(a) in (dict, immutable_dict):
            return super().create_arg(a)
        if is_dataclass(a):  # a dict by inheritance, as ModelOutput is
            names = [each.name for each in dataclasses.fields(a)]
            return self.create_node("call_function", type(a), (), {n: self.create_arg(getattr(a, n)) for n in names})
        return self.create_node("call_function", type(a), (self.create_arg(dict(a.items())),), {})

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:  # while one thread traces, torch.fx takes the calls of all
            return forward(*args, **kwargs)
        if self.is_leaf_module(m, ""):
            if not isinstance(m, _WHOLE) and not is_product(m) and any(map(is_product, m.modules())):
                self.left_whole[self.path_of_module(m)] = f"as modules of torch.nn are ({type(m).__name__})"
            return super().call_module(m, forward, args, kwargs)
        before = [(module, dict(vars(module))) for module in m.modules()]
        count = len(self.graph.nodes)
        whole = dict(self.left_whole)
        stack = self.module_stack.copy()
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception as error:
            self.module_stack = stack  # torch.fx leaves the failed modules on it
            name = self.path_of_module(m)
            self.left_whole = {**whole, name: _in_short(error)}
            for module, attributes in before:  # a proxy may have been kept in one
                vars(module).clear()
                vars(module).update(attributes)
            for node in list(reversed(self.graph.nodes))[: len(self.graph.nodes) - count]:
                self.graph.erase_node(node)
            return self.create_proxy("call_module", name, args, kwargs)


def _in_short(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def _defaults(model: nn.Module, given: Collection[str] | None) -> dict[str, Any]:
    """Return what stands for the parameters that no call passes, under the names of their placeholders."""
    defaults: dict[str, Any] = {}
    for name, parameter in inspect.signature(model.forward).parameters.items():
        if name in (given or ()):
            continue
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            defaults[f"*{name}"] = ()
        elif parameter.kind is inspect.Parameter.VAR_KEYWORD:
            defaults[f"**{name}"] = {}
        elif parameter.default is not inspect.Parameter.empty:
            defaults[name] = parameter.default
    return defaults


def _views_bits(node: Node) -> bool:
    """Return whether this view is of another dtype."""
    return bool(node.kwargs) or any(isinstance(each, torch.dtype) for each in node.args)


def _finish(graph: Graph, model: nn.Module) -> None:
    """Give parameters types that a script can read, no defaults, and the graph a tracer that pickle can make."""
    try:
        types = typing.get_type_hints(type(model).forward)
    except Exception:  # names that exist for type checkers only
        types = {}
    for node in graph.nodes:
        node.type = None
        if node.op == "placeholder":
            node.args = ()  # what is here is passed by every call
            kinds = set(typing.get_args(types.get(node.target))) - {type(None)}
            node.type = torch.Tensor if kinds == {torch.Tensor} else types.get(node.target)
    graph._tracer_cls = None


def subgraph(graph_module: GraphModule, nodes: Collection[str]) -> tuple[GraphModule, list[str]]:
    """Cut out the nodes of these names; those that this graph lacks, having fused them, are not missed.

    Returns a module that shares its layers with `graph_module`, and the names of the nodes whose values it takes, in
    the order of its arguments; it returns the value, or the tuple of values, that other nodes read. Inputs are not
    written to. ValueError if the graph has none of the nodes.
    """
    inside = [node for node in graph_module.graph.nodes if node.name in nodes]
    if not inside:
        raise ValueError(f"the graph has none of the nodes {sorted(nodes)}, expected names of its nodes")
    sources = {source: None for node in inside for source in node.all_input_nodes if source not in inside}
    graph = Graph()
    copies = {source: graph.placeholder(source.name) for source in sources if source.op != "get_attr"}
    inputs = [source.name for source in copies]
    copies.update({source: graph.node_copy(source) for source in sources if source.op == "get_attr"})
    for node in inside:
        copies[node] = graph.node_copy(node, copies.__getitem__)
        if node.args and node.args[0] in sources:
            copies[node].target = {operator.iadd: operator.add, "add_": "add"}.get(node.target, node.target)
    order = list(nodes)
    read = [node for node in inside if not node.users or any(user not in copies for user in node.users)]
    outputs = [copies[node] for node in sorted(read, key=lambda node: order.index(node.name))]
    graph.output(outputs[0] if len(outputs) == 1 else tuple(outputs))
    graph.lint()
    return TracedModule(graph_module, graph, "Region"), inputs
