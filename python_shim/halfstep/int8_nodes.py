"""What the nodes of a traced model do: which layer they call, what they compute, and whether they write to memory."""

from __future__ import annotations

import collections
import inspect
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._ops import OpOverload, OpOverloadPacket
from torch.fx import GraphModule, Node

from halfstep.calls import HOOKS
from halfstep.int8_attention import refuse_nested
from halfstep.int8_layers import Int8Conv1d, Int8Conv2d, Int8Embedding, Int8Linear

PRODUCTS = (Int8Linear, Int8Conv1d, Int8Conv2d)
INT8_LAYERS = (*PRODUCTS, Int8Embedding)

_ACTIVATION_MODULES = {nn.ReLU: "relu", nn.ReLU6: "relu6", nn.SiLU: "silu", nn.Hardswish: "hardswish"}
_ACTIVATION_FUNCTIONS = {
    torch.relu: "relu",
    torch.relu_: "relu",
    F.relu: "relu",
    F.relu_: "relu",
    F.relu6: "relu6",
    F.silu: "silu",
    F.hardswish: "hardswish",
}
_GELUS = {"none": "gelu", "tanh": "gelu_tanh"}

_IDLE_MODULES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
_DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout)

# These move values and change none, so that they commute with quantization.
_MOVING_MODULES = (nn.Identity, nn.Flatten, nn.Unflatten)
_MOVING_FUNCTIONS = (
    torch.flatten,
    torch.reshape,
    torch.permute,
    torch.transpose,
    torch.squeeze,
    torch.unsqueeze,
    torch.movedim,
)
_MOVING_METHODS = (
    "flatten",
    "reshape",
    "view",
    "permute",
    "transpose",
    "squeeze",
    "unsqueeze",
    "movedim",
    "contiguous",
)
# These show a part of a value, or all of it, in another shape.
_SHOWING = {
    *("bfloat16", "chunk", "expand", "float", "getitem", "half", "narrow", "select", "split", "t", "to", "type_as"),
    *("unbind", "unflatten", *_MOVING_METHODS),
}
_SHOWING -= {"contiguous", "view"}  # the one is about layout, the other, where a trace still has it, about dtypes
# These read values, wherever they lie in memory, and return memory of their own.
_READING = {
    *("abs", "add", "addmm", "attend", "baddbmm", "bmm", "cat", "clone", "cos", "div", "einsum", "elu", "exp", "gelu"),
    *("leaky_relu", "log_softmax", "logsumexp", "matmul", "mean", "mul", "neg", "normalize", "pow", "relu", "rsqrt"),
    *("scaled_dot_product_attention", "sigmoid", "silu", "sin", "softmax", "softplus", "sqrt", "square", "stack"),
    *("sub", "sum", "tanh", "truediv"),
}
_POOLS = (F.max_pool2d, torch.max_pool2d)
_POOL_ARGUMENTS = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")

_SHAPE_METHODS = ("size", "dim", "numel", "nelement", "ndimension")
_ADDITIONS = (operator.add, operator.iadd, torch.add)
_IN_PLACE = (
    operator.iadd,
    operator.isub,
    operator.imul,
    operator.imatmul,
    operator.itruediv,
    operator.ifloordiv,
    operator.imod,
    operator.ipow,
    operator.iand,
    operator.ior,
    operator.ixor,
    operator.ilshift,
    operator.irshift,
    operator.iconcat,
    operator.setitem,
    operator.delitem,
)
_IN_PLACE_METHODS = {f"__{function.__name__}__" for function in _IN_PLACE}


def module_of(root: nn.Module, node: Node) -> nn.Module | None:
    """Return the module that the node calls."""
    return root.get_submodule(str(node.target)) if node.op == "call_module" else None


def is_plain(module: nn.Module) -> bool:
    """Return whether a call of the module is its class's forward and nothing else."""
    return not any(getattr(module, hooks) for hooks in HOOKS) and "forward" not in vars(module)


def call_sites(graph_module: GraphModule) -> dict[nn.Module, list[Node]]:
    """Return the nodes that use each module: its calls, also inside of one called whole, and reads of its tensors."""
    sites: dict[nn.Module, list[Node]] = collections.defaultdict(list)
    for node in graph_module.graph.nodes:
        if node.op == "call_module":
            for module in graph_module.get_submodule(str(node.target)).modules():
                sites[module].append(node)
        elif node.op == "get_attr":
            sites[graph_module.get_submodule(str(node.target).rpartition(".")[0])].append(node)
    return sites


def input_of(node: Node) -> Any:
    """Return the first argument of a call."""
    return node.args[0] if node.args else node.kwargs.get("input")


def has_residual(node: Node) -> bool:
    """Return whether a call of an int8 product adds a second tensor."""
    return len(node.args) + len(node.kwargs.keys() - {"row_scales"}) == 2


def argument(node: Node, position: int, name: str, default: Any) -> Any:
    """Return an argument of a call by its position or name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def activation_of(root: nn.Module, node: Node) -> str | None:
    """Return which activation of the int8 layers the node applies to its one input."""
    if len(node.all_input_nodes) != 1 or input_of(node) is not node.all_input_nodes[0]:
        return None
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        if not is_plain(module):
            return None
        if type(module) is nn.GELU:
            return _GELUS.get(module.approximate)
        return _ACTIVATION_MODULES.get(type(module))
    if node.op == "call_method":
        return "relu" if node.target in ("relu", "relu_") else None
    if node.target is F.gelu:
        return _GELUS.get(argument(node, 1, "approximate", "none"))
    return _ACTIVATION_FUNCTIONS.get(node.target) if node.op == "call_function" else None


def summands_of(node: Node) -> tuple[Node, Node] | None:
    """Return the two nodes that the node adds, the one that it may write to first."""
    addition = node.op == "call_function" and node.target in _ADDITIONS
    if not addition and not (node.op == "call_method" and node.target in ("add", "add_")):
        return None
    if set(node.kwargs) - {"input", "other", "alpha"} or node.kwargs.get("alpha", 1) != 1 or len(node.args) > 2:
        return None
    left, right = input_of(node), argument(node, 1, "other", None)
    return (left, right) if isinstance(left, Node) and isinstance(right, Node) else None


def is_in_place_addition(node: Node) -> bool:
    """Return whether a node of summands_of() writes to its first summand."""
    return node.target in (operator.iadd, "add_")


def is_idle(root: nn.Module, node: Node) -> bool:
    """Return whether the node returns its input as it is: Identity, or a dropout outside of training."""
    if len(node.all_input_nodes) != 1 or input_of(node) is not node.all_input_nodes[0]:
        return False
    module = module_of(root, node)
    if module is not None:
        return (
            type(module) in _IDLE_MODULES
            and is_plain(module)
            and (isinstance(module, nn.Identity) or not module.training)
        )
    if node.op != "call_function":
        return False
    if node.target is torch.dropout:
        return argument(node, 2, "train", True) is False
    return node.target in _DROPOUTS and argument(node, 2, "training", True) is False


def reads_shape(node: Node) -> bool:
    """Return whether the node asks its input for sizes alone, or for what else is the same in int8."""
    if node.op == "call_method":
        return node.target in _SHAPE_METHODS
    return node.target is refuse_nested or (node.target is getattr and node.args[1] in ("shape", "ndim"))


def moves_values(root: nn.Module, node: Node) -> bool:
    """Return whether the node computes the same of int8 as of the numbers that they stand for: views and maxima.

    A maximum pooling does once it is int8_max_pool2d: put_int8_pool().
    """
    module = module_of(root, node)
    if max_pool_of(root, node) is not None:
        return True
    if module is not None:
        return type(module) in _MOVING_MODULES and is_plain(module)
    if node.op == "call_method":
        return node.target in _MOVING_METHODS and not any(isinstance(each, torch.dtype) for each in _constants(node))
    return node.op == "call_function" and node.target in _MOVING_FUNCTIONS


def max_pool_of(root: nn.Module, node: Node) -> tuple[Any, ...] | None:
    """Return what int8_max_pool2d takes beside the picture, of a maximum pooling that it can stand for; else None."""
    module = module_of(root, node)
    if module is not None:
        if type(module) is not nn.MaxPool2d or not is_plain(module) or len(node.args) + len(node.kwargs) != 1:
            return None
        given = [getattr(module, name) for name in _POOL_ARGUMENTS]
    elif node.op == "call_function" and node.target in _POOLS:
        defaults = (None, None, 0, 1, False, False)
        given = [
            argument(node, 1 + i, name, default)
            for i, (name, default) in enumerate(zip(_POOL_ARGUMENTS, defaults, strict=True))
        ]
    else:
        return None
    kernel_size, stride, padding, dilation, ceil_mode, return_indices = given
    sizes = [[each] if type(each) is int else each for each in (kernel_size, stride or [], padding, dilation)]
    known = all(isinstance(each, (tuple, list)) and all(type(size) is int for size in each) for each in sizes)
    if not known or type(ceil_mode) is not bool or return_indices is not False:
        return None
    return (*map(list, sizes), ceil_mode)


def put_int8_pool(root: nn.Module, node: Node) -> None:
    """Let a maximum pooling, one of max_pool_of(), take int8 and give it. The module that it called stays."""
    arguments = max_pool_of(root, node)
    picture = input_of(node)
    node.op, node.target = "call_function", torch.ops.halfstep.int8_max_pool2d
    node.args, node.kwargs = (picture, *arguments), {}


def is_read_as_values(root: nn.Module, node: Node) -> bool:
    """Return whether the node's value may lie in memory in another way: as columns of a wider tensor.

    It may if all that is done with it is known to read numbers: what writes to it, asks for its layout, views its bits,
    hands it out of the model or to code that is not torch's would see the difference.
    """
    waiting, seen = [node], {node}
    while waiting:
        for user in waiting.pop().users:
            if reads_shape(user) or user in seen:
                continue
            if user.op == "output" or may_write(root, user):
                return False
            seen.add(user)
            if user.op == "call_module":
                if type(module_of(root, user)) in (*_MOVING_MODULES, *_IDLE_MODULES):
                    waiting.append(user)
                continue  # a module of torch's or ours, since it writes to nothing
            name = str(user.target) if user.op == "call_method" else getattr(user.target, "__name__", "")
            if name in _SHOWING:
                waiting.append(user)
            elif name not in _READING:
                return False
    return True


def _constants(node: Node) -> list[Any]:
    return [each for each in (*node.args, *node.kwargs.values()) if not isinstance(each, Node)]


def may_write(root: nn.Module, node: Node) -> bool:
    """Return whether the node may write to memory that others see. A module or function that is not torch's may."""
    if node.op == "call_module":
        return any(map(_module_may_write, root.get_submodule(str(node.target)).modules()))
    if node.op == "call_method":
        name = str(node.target)
        return name in _IN_PLACE_METHODS or (name.endswith("_") and not name.endswith("__"))
    if node.op != "call_function":
        return False
    function, room = node.target, getattr(node.target, "__module__", "") or ""
    if function in _IN_PLACE or "out" in node.kwargs:
        return True
    if isinstance(function, (OpOverload, OpOverloadPacket)):  # ours write where their names say so
        return not str(function).startswith("halfstep.") or function.__name__.partition(".")[0].endswith("_")
    if room == F.__name__ and any(each is True for each in _constants(node)):
        return True  # `inplace`, or another flag that is taken for it
    if room == "halfstep.int8_attention":
        return False
    if not inspect.isbuiltin(function) and room.partition(".")[0] not in ("torch", "math", "operator", "builtins"):
        return True
    return getattr(function, "__name__", "_").endswith("_")


def _module_may_write(module: nn.Module) -> bool:
    ours = type(module).__module__.partition(".")[0] in ("torch", "halfstep")
    return (
        not ours
        or isinstance(module, torch.jit.ScriptModule)
        or bool(getattr(module, "inplace", False))
        or not is_plain(module)
    )
