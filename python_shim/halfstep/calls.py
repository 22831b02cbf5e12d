"""One call of a model on an example, on a copy: which layers it calls, and with what."""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from halfstep.arguments import UnsupportedArgument, flatten
from halfstep.policy import PrecisionPlan, named_modules
from halfstep.scopes import DTYPES, apply_plan

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_FILE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


class Example:
    """The arguments of one call of a model, and the device on which it happens.

    Raises TypeError for arguments of another kind, ValueError where model and arguments are not on one CPU or one GPU.
    """

    def __init__(self, model: nn.Module, example: Any, kwargs: Mapping[str, Any] | None) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is {type(model).__name__}, expected torch.nn.Module")
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            raise ValueError(f"model is a {type(model).__name__}, expected the model inside of it: pass model.module")
        if example is not None and not isinstance(example, (torch.Tensor, tuple)):
            raise TypeError(f"example is {type(example).__name__}, expected a tensor or a tuple: the model's arguments")
        if kwargs is not None and not isinstance(kwargs, Mapping):
            raise TypeError(f"kwargs is {type(kwargs).__name__}, expected a mapping: the model's keyword arguments")
        self.args = (example,) if isinstance(example, torch.Tensor) else example or ()
        self.kwargs = dict(kwargs or {})
        self.device = self._device(model)

    def _device(self, model: nn.Module) -> torch.device:
        own = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
        given = {tensor.device for tensor in tensors_in((self.args, self.kwargs))}
        if len(own) > 1:
            raise ValueError(f"the model is on {sorted(map(str, own))}, expected one device")
        if own and given and not own & given:  # lengths of a packed sequence are on the CPU, whatever the rest
            raise ValueError(f"the example is on {sorted(map(str, given))}, but the model on {next(iter(own))}")
        device = next(iter(own or given), torch.device("cpu"))
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"the model is on {device}, expected a CPU or a CUDA GPU")
        return device

    def call(self, model: nn.Module, dtype: torch.dtype | None) -> None:
        """Call `model` under an autocast to `dtype`, without its compiler; None for no autocast."""
        with without_compiler(model), torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            model(*self.args, **self.kwargs)
        torch.clear_autocast_cache()  # has casts of the copy's weights, where this happens in another region

    @contextlib.contextmanager
    def random_numbers_kept(self) -> Iterator[None]:
        """Restore the states of the generators that the call may use: torch's, Python's, and NumPy's if it is here."""
        devices = [self.device] if self.device.type == "cuda" else []
        numpy = sys.modules.get("numpy")
        python_state, numpy_state = random.getstate(), numpy and numpy.random.get_state()
        try:
            with torch.random.fork_rng(devices):
                yield
        finally:
            random.setstate(python_state)
            if numpy:
                numpy.random.set_state(numpy_state)


def is_compiled(module: nn.Module) -> bool:
    """Return whether torch.compile stands around this module, or acts when it is called."""
    return type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None


def without_compiler(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which `model` runs as it is written."""
    if any(map(is_compiled, model.modules())):
        return torch.compiler.set_stance("force_eager")
    return contextlib.nullcontext()


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Return the tensors in `value`, as far as they can be found."""
    tensors: list[torch.Tensor] = []
    with contextlib.suppress(UnsupportedArgument):
        flatten(value, tensors)
    return tensors


def half_of(plan: PrecisionPlan) -> str | None:
    """Return the half precision of most layers of the plan, None if no layer has one."""
    counts = collections.Counter(
        layer.precision for layer in plan.layers() if layer.precision in ("float16", "bfloat16")
    )
    return counts.most_common(1)[0][0] if counts else None


def dtype_of(precision: str | None) -> torch.dtype | None:
    """Return the dtype of a half precision."""
    return None if precision is None else DTYPES[precision]


def copy_of(model: nn.Module, *, hooks: bool = True, shared: bool = True) -> nn.Module:
    """Return a copy that shares the memory of the parameters and nothing else: no gradients, no hooks of tensors.

    hooks: False leaves the hooks of modules out, but for those by which torch.nn.utils computes weights.
    shared: False gives the parameters memory of their own too.
    Raises TypeError for a model that cannot be copied, and says why.
    """
    memo: dict[int, Any] = {}
    parameters = list(model.parameters())  # alive meanwhile: TorchScript makes the objects, whose ids stand in memo
    for parameter in parameters:
        if not isinstance(parameter, nn.parameter.UninitializedTensorMixin):
            values = parameter.detach()
            memo[id(parameter)] = nn.Parameter(values if shared else values.clone(), parameter.requires_grad)
    for module in model.modules():
        if not hooks:  # in memo: copying one that is a method would copy all that its object holds
            for kept in map(functools.partial(getattr, module), HOOKS + _FILE_HOOKS):
                memo[id(kept)] = type(kept)({key: hook for key, hook in kept.items() if computes_weights(hook)})
        for value in vars(module).values():  # results that a module keeps cannot be copied by deepcopy
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach()
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise TypeError(f"the example runs on a copy of the model, which cannot be copied: {error}") from error


def computes_weights(hook: Any) -> bool:
    """Return whether the hook is of weight_norm, spectral_norm or prune."""
    return type(hook).__module__.startswith("torch.nn.utils.")


class Recorder:
    """The `forward` of one module during the call: it tells `note` of each call that is not within another one."""

    def __init__(self, module: nn.Module, note: Callable[..., None]) -> None:
        self.inner = module.forward
        self._module = module
        self._note = note
        self._depth = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the module returns."""
        if not self._depth:
            self._note(self._module, args, kwargs)
        self._depth += 1
        try:
            return self.inner(*args, **kwargs)
        finally:
            self._depth -= 1


def uncalled(plan: PrecisionPlan, model: nn.Module, example: Any, kwargs: Mapping[str, Any] | None) -> set[nn.Module]:
    """Return the layers of `model` that a call on the example does not call, with the plan applied if it can be."""
    arguments = Example(model, example, kwargs)
    twin = copy_of(model)
    if all(layer.precision in DTYPES for layer in plan.layers()):
        apply_plan(twin, plan)
    modules, twins = dict(named_modules(model)), dict(named_modules(twin))
    called: set[nn.Module] = set()
    for module in {twins[name]: None for name in plan}:
        module.forward = Recorder(module, lambda module, args, kwargs: called.add(module))
    with arguments.random_numbers_kept():
        arguments.call(twin, dtype_of(half_of(plan)))
    return {modules[name] for name in plan if twins[name] not in called}
