"""The float model in the form in which its layers become int8: attention taken apart, traced and folded if proven."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from halfstep.calibration_data import Batch, naming
from halfstep.half_model import cast_floats, name_of
from halfstep.int8_attention import SplitAttention, replace_attention
from halfstep.int8_batches import floating_tensors_of
from halfstep.int8_chains import fuse
from halfstep.int8_folding import fold_batch_norms
from halfstep.int8_graph import subgraph, trace
from halfstep.int8_judge import call
from halfstep.int8_layers import Int8Embedding
from halfstep.int8_model import Candidate, find_candidates, is_product, not_selected, replace_layers
from halfstep.int8_report import Report
from halfstep.int8_runs import Shapes, capture, disagreement, given_arguments, shapes_of
from halfstep.int8_speed import Timing, time_on_device
from halfstep.int8_uses import NEVER_CALLED, read_elsewhere, uses_of
from halfstep.int8_weights import WeightProducts, bare_weights

_PROVEN_ON = 3  # batches on which the traced model must give the model's bits
_PROBED = 32  # samples that shapes are taken from
_ROUNDING = 1e-6  # the share of its power by which an output may differ when attention is computed in parts

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class Region:
    """Layers between which values stay int8, in the order in which they run, and the graph's nodes that they are.

    Without nodes it is one layer that is taken by itself: the model is not traced, or not where the layer is called.
    """

    layers: list[str]
    fused: list[str] = field(default_factory=list)
    nodes: list[str] = field(default_factory=list)


def example_of(batches: list[Batch], device: torch.device) -> Batch:
    """Return the batch that shapes are taken from: the beginning of the first one, in memory of its own."""
    return batches[0].part(0, _PROBED).copied().on(device)


def call_with(model: nn.Module, arguments: Arguments) -> Any:
    """Call the model with (args, kwargs)."""
    return model(*arguments[0], **arguments[1])


class Form:
    """`model` is the float model whose layers are replaced; the reference is not changed.

    If torch.fx can trace the model, and the traced one gives the same bits on batches of two sizes, it is a GraphModule
    in which batch norms are folded; else it keeps the class of the reference, and no layer takes over its neighbours.
    """

    def __init__(self, reference: nn.Module, batches: list[Batch], fold: bool, report: Report) -> None:
        self.attention: list[str] = []
        self.norms: list[tuple[str, str]] = []
        self.model = self._with_split_attention(reference, batches[0].part(0, _PROBED), report)
        # Arguments alone, as a saved plan has them: there the same shapes must be found.
        self._example = batches[0].part(0, _PROBED).arguments()
        self._shapes: dict[torch.dtype, Shapes] = {}
        # What users know layers by, and all names of each layer with large weights. A trace drops what is not called.
        self._names = dict.fromkeys(
            name for each in (reference, self.model) for name, _ in each.named_modules(remove_duplicate=False)
        )
        self._products = _products_of(self.model)
        self._bare = bare_weights(self.model)
        graph, why = self._traced(batches)
        if graph is None:
            report.graph = f"not traced ({why}): layers are taken one by one"
            return
        report.graph = "traced" + (f"; {why}" if why else "")
        self.model = graph
        if fold:
            self.norms, kept = fold_batch_norms(graph)
            report.folded = [f"{norm} into {conv}" for conv, norm in self.norms]
            report.notes.extend(f"batch norm {name} is not folded: {reason}" for name, reason in kept.items())

    def _with_split_attention(self, reference: nn.Module, batch: Batch, report: Report) -> nn.Module:
        """Return a copy with attention taken apart, if that gives the reference's outputs but for rounding."""
        model, replaced, left = replace_attention(copy.deepcopy(reference))
        report.left.update(left)
        if not replaced:
            return model
        with torch.no_grad():
            with naming(batch, reference):
                expected = floating_tensors_of(batch(reference))
            try:
                outputs = floating_tensors_of(batch(model))
                shares = [torch.ops.halfstep.output_noise(*pair) for pair in zip(expected, outputs, strict=True)]
                different = max((max(share.tolist()) for share in shares), default=0.0)
                why = "" if different <= _ROUNDING else f"outputs differ by {different:.2g} of their power"
            except Exception as error:  # code of the model that reads weights of a layer that is gone
                why = f"{type(error).__name__}: {error}"
        if why:
            report.left.update(dict.fromkeys(replaced, f"attention cannot be taken apart ({why})"))
            return copy.deepcopy(reference)
        split = [name for name in replaced if isinstance(model.get_submodule(name), SplitAttention)]
        report.attention = split
        self.attention = replaced
        return model

    def _traced(self, batches: list[Batch]) -> tuple[GraphModule | None, str]:
        try:
            with naming(batches[0], self.model):
                given = given_arguments(self.model, self._example, call_with)
            signature = inspect.signature(self.model.forward)
            names = {tuple(signature.bind(*batch.args, **batch.kwargs).arguments) for batch in batches}
        except TypeError as error:
            return None, str(error)
        if len(names) > 1:  # a traced model takes the same ones in every call
            return None, "batches give different arguments"
        graph, why = trace(self.model, given=given)
        if graph is None:
            return None, why
        different = disagreement(graph, self.model, batches[:_PROVEN_ON], call)
        return (None, f"the traced model differs {different}") if different else (graph, why)

    def candidates(
        self, batches: list[Batch], include: tuple[str, ...], exclude: tuple[str, ...]
    ) -> tuple[dict[str, Candidate], dict[str, str]]:
        """Return the layers of `model` that can be int8, and of each other one with large weights why it stays float.

        Runs the model on some of the batches: a layer whose weight other code reads stays float, and so does one that
        is never called. Parameters that code multiplies by and that are no layer's stand by their names among those
        that stay float. include, exclude: globs of names that layers have in the reference or the model; ValueError for
        one that names none.
        """
        found, left = find_candidates(self.model, include, exclude, self._names)
        products = WeightProducts(self._bare, self.model) if self._bare else None
        uses = uses_of(self.model, {name: candidate.module for name, candidate in found.items()}, batches, products)
        for name, use in uses.items():
            if use.obstacle:
                left[name] = use.obstacle
                del found[name]
        nodes = self.model.graph.nodes if isinstance(self.model, GraphModule) else ()
        read = dict(str(node.target).rpartition(".")[::2] for node in nodes if node.op == "get_attr")
        for names in self._products:
            if not any(name in found or name in left for name in names):
                reason = next((read_elsewhere(read[name]) for name in names if name in read), NEVER_CALLED)
                left[names[0]] = not_selected(names[0], include, exclude) or reason
        if products is not None:
            for name, reason in products.found.items():
                left[name] = not_selected(name, include, exclude) or reason
        return found, left

    def build(self, inner: nn.Module, layers: dict[str, nn.Module], dtype: torch.dtype) -> nn.Module:
        """Return a copy of `inner`, which is `model` in `dtype`, with these layers in place."""
        return self._build(inner, layers, dtype)[0]

    def regions(self, inner: nn.Module, layers: dict[str, nn.Module], dtype: torch.dtype) -> list[Region]:
        """Return the regions that these layers make."""
        return self._build(inner, layers, dtype)[1]

    def _build(
        self, inner: nn.Module, layers: dict[str, nn.Module], dtype: torch.dtype
    ) -> tuple[nn.Module, list[Region]]:
        built = replace_layers(inner, layers)
        if not isinstance(built, GraphModule):
            return built, [Region([name]) for name in layers]
        if dtype not in self._shapes:
            self._shapes[dtype] = shapes_of(inner, cast_floats(self._example, dtype), call_with)
        found = fuse(built, self._shapes[dtype], dtype, self.norms)
        return built, [Region(region.layers, region.fused, region.nodes) for region in found]

    def time_region(
        self,
        region: Region,
        inners: Mapping[torch.dtype, nn.Module],
        layers: dict[str, nn.Module],
        batch: Batch,
        carrier: torch.dtype,
    ) -> dict[str, Timing]:
        """Time a region alone on what the batch gives it: in the float types of `inners`, and in int8 in the carrier.

        Empty for embeddings, which take next to no time in any type, and for layers that the batch does not reach.
        """
        if all(isinstance(layers[name], Int8Embedding) for name in region.layers):
            return {}
        arguments = batch.arguments()
        calls: dict[str, Callable[[], Any]] = {}
        device = torch.device("cpu")
        for dtype, inner in inners.items():
            given = cast_floats(arguments, dtype)
            if region.nodes:
                part, names = subgraph(inner, region.nodes)
                values = capture(inner, given, call_with, names)
                args, kwargs = [values[name] for name in names], {}
                if dtype == carrier:
                    int8, names = subgraph(self._build(inner, layers, dtype)[0], region.nodes)
                    if not set(names) <= set(values):
                        values = capture(inner, given, call_with, names)
                    calls["int8"] = partial(int8, *[values[name] for name in names])
            else:
                part = inner.get_submodule(region.layers[0])
                taken = first_call(part, inner, given)
                if taken is None:
                    return {}
                args, kwargs = taken
                if dtype == carrier:
                    calls["int8"] = partial(layers[region.layers[0]], *args, **kwargs)
            calls[name_of(dtype)] = partial(part, *args, **kwargs)
            device = next((v.device for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)), device)
        return dict(zip(calls, time_on_device(list(calls.values()), device), strict=True))


def first_call(layer: nn.Module, model: nn.Module, arguments: Arguments) -> Arguments | None:
    """Return what the layer is called with in the first of its calls, None if there is none."""
    taken: list[Arguments] = []
    handle = layer.register_forward_pre_hook(lambda _m, *call: taken.append(call), with_kwargs=True)
    try:
        with torch.no_grad():
            call_with(model, arguments)
    finally:
        handle.remove()
    return taken[0] if taken else None


def _products_of(model: nn.Module) -> list[list[str]]:
    """Return all names of each layer that has large weights."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if is_product(module):
            names.setdefault(module, []).append(name)
    return list(names.values())
