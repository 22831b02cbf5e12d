"""Batch norms folded into the convolutions before them, where the traced graph proves that nobody can tell."""

from __future__ import annotations

import collections
from collections.abc import Iterator

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.nn.modules.batchnorm import _BatchNorm

from halfstep._library import load_library
from halfstep.int8_nodes import call_sites, input_of, is_plain, module_of

_NORMS: dict[type[nn.Module], type[nn.Module]] = {nn.Conv1d: nn.BatchNorm1d, nn.Conv2d: nn.BatchNorm2d}


def fold_batch_norms(graph_module: GraphModule) -> tuple[list[tuple[str, str]], dict[str, str]]:
    """Fold what can be folded, in place: new weights and biases for the convolutions, and the norms are gone.

    A norm is folded into the convolution whose output it alone reads, if each of the two is called once, has no hooks
    and no parametrization, nobody else holds the weight's memory, and the norm is in eval mode with running statistics.
    Returns the names of (convolution, norm) that were folded, and why each of the other batch norms was not. The
    parameters' memory is not written to. Results differ in the last bits.
    """
    load_library()
    sites = call_sites(graph_module)
    holders = collections.Counter(_storages(graph_module))
    folded: list[tuple[str, str]] = []
    kept: dict[str, str] = {}
    for node in list(graph_module.graph.nodes):
        if not isinstance(module_of(graph_module, node), _BatchNorm):
            continue
        reason = _obstacle(graph_module, node, sites, holders)
        if reason:
            kept[str(node.target)] = reason
        else:
            folded.append((str(input_of(node).target), str(node.target)))
            _fold(graph_module, node)
    graph_module.recompile()
    return folded, kept


def _storages(graph_module: GraphModule) -> Iterator[int]:
    """Yield the memory of each tensor of each module."""
    for module in graph_module.modules():
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            yield tensor.untyped_storage().data_ptr()


def _obstacle(
    graph_module: GraphModule, node: Node, sites: dict[nn.Module, list[Node]], holders: collections.Counter[int]
) -> str:
    """Return "" or why this norm stays."""
    norm, source = module_of(graph_module, node), input_of(node)
    conv = module_of(graph_module, source) if isinstance(source, Node) else None
    if type(conv) not in _NORMS:
        return "its input is not the output of a Conv1d or Conv2d"
    if type(norm) is not _NORMS[type(conv)]:
        return f"it is a {type(norm).__name__} behind a {type(conv).__name__}"
    if len(source.users) != 1:
        return f"the output of {source.target} has {len(source.users)} readers"
    for module, name in ((conv, source.target), (norm, node.target)):
        if len(sites[module]) != 1:
            return f"{name} is used {len(sites[module])} times"
        if not is_plain(module):
            return f"{name} has hooks or a forward of its own"
    if norm.training:
        return "it is in training mode"
    if norm.running_mean is None or norm.running_var is None:
        return "it has no running statistics"
    if holders[conv.weight.untyped_storage().data_ptr()] != 1:
        return f"the weight of {source.target} is shared"
    return ""


def _fold(graph_module: GraphModule, node: Node) -> None:
    norm, source = module_of(graph_module, node), input_of(node)
    conv = module_of(graph_module, source)
    weight, bias = torch.ops.halfstep.fold_batch_norm(
        conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps
    )
    conv.weight = nn.Parameter(weight, requires_grad=conv.weight.requires_grad)
    conv.bias = nn.Parameter(bias, requires_grad=conv.weight.requires_grad)
    node.replace_all_uses_with(source)
    graph_module.graph.erase_node(node)
    graph_module.delete_submodule(str(node.target))
