"""Half copies of float32 parameters, on which the layers of a captured step compute.

Autocast casts every weight in every forward pass and every weight gradient back. Here each parameter has a half copy
that the optimizer's own pass rewrites. While a module's forward runs, its parameters are replaced by their copies;
gradients arrive in half on the parameter itself, and the fused step reads them so. Everything outside of a step sees
float32 parameters, and nothing of this.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

RESIDUALS = ("half", "float32")

# Layers whose arithmetic autocast runs in half anyway: half copies change none of their results.
_PRODUCTS = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.MultiheadAttention, nn.RNNCellBase)
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)

Place = tuple[nn.Module, str, nn.Parameter]


class _HalfOf(torch.autograd.Function):
    """The half copy of a parameter. The gradient goes to the parameter as it is, without a cast."""

    @staticmethod
    def forward(ctx: Any, parameter: torch.Tensor, copy: torch.Tensor) -> torch.Tensor:
        return copy.detach()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


def _is_product(module: nn.Module) -> bool:
    kind = type(module)
    return isinstance(module, _PRODUCTS) or (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D")


def _obstacle(module: nn.Module, parameter: nn.Parameter, device: torch.device, residual: str) -> str:
    """Return "" or why this parameter of this module stays float32."""
    if type(parameter) is not nn.Parameter:
        return f"it is a {type(parameter).__name__}"
    if parameter.dtype is not torch.float32 or parameter.device != device:
        return f"it is {parameter.dtype} on {parameter.device}"
    if isinstance(module, _NORMS):
        return "weights of norms stay float32"
    if isinstance(module, nn.RNNBase):
        return f"{type(module).__name__} keeps its weights in one buffer"
    if isinstance(module, nn.utils.parametrize.ParametrizationList):
        return "it is parametrized"
    if getattr(module, "sparse", False) or getattr(module, "max_norm", None) is not None:
        return "sparse gradients and max_norm need the parameter itself"
    if isinstance(module, nn.EmbeddingBag):
        return "EmbeddingBag"
    if residual == "float32" and not _is_product(module):
        return 'residual="float32"'
    if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
        return "a hook reads its gradient"
    return ""


class HalfWeights:
    """The half copies of one model's parameters, made once and kept in step with them.

    model: float32 parameters on one device. dtype: torch.float16 or torch.bfloat16. residual: "half" gives every
    parameter but those of norms a copy, so that embeddings, and with them the residual stream, are half; "float32"
    only those of linear and convolution layers. The parameters of a model under DistributedDataParallel have none.
    always: copy anew at the start of every step, whatever changed.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, residual: str, *, always: bool = False) -> None:
        self.model = model
        self.dtype = dtype
        self.residual = residual
        self.always = always
        self.kept: dict[str, str] = {}  # qualified name: why it stays float32
        self.places: list[Place] = []
        first = next(model.parameters(), None)
        self._device = torch.device("cpu") if first is None else first.device
        reduced = any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules())
        for prefix, module in model.named_modules():
            for name, parameter in module._parameters.items():
                if parameter is None:
                    continue
                reason = "DistributedDataParallel reads its gradient" if reduced else ""
                reason = reason or _obstacle(module, parameter, self._device, residual)
                if reason:
                    self.kept[f"{prefix}.{name}" if prefix else name] = reason
                else:
                    self.places.append((module, name, parameter))
        self.copies = {
            parameter: torch.empty_like(parameter, dtype=dtype, requires_grad=False) for _, _, parameter in self.places
        }
        self.parameters = list(self.copies)
        self._versions: list[int] = []
        self._stale = self.parameters  # to be copied at the start of a step, since nothing rewrites them in it
        self._written: dict[nn.Parameter, int] = {}
        self._summed: set[nn.Parameter] = set()
        self.accumulates = False  # several backward passes per step: their sum is kept in float32
        self.gradients: dict[nn.Parameter, torch.Tensor] = {}  # half, of the last step
        self._replaced: dict[tuple[nn.Module, str], tuple[Any, Any]] = {}  # attribute: what was and what is there

    def _trainable(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.parameters if parameter.requires_grad]

    def is_current(self) -> bool:
        """Return whether the model still holds the parameters that this was made of, and where they were."""
        return all(
            module._parameters.get(name) is parameter and parameter.device == self.copies[parameter].device
            for module, name, parameter in self.places
        )

    def explain(self) -> str:
        """Return how many parameters have copies, and why others have none."""
        bytes_ = sum(copy.numel() * copy.element_size() for copy in self.copies.values())
        dtype = str(self.dtype).removeprefix("torch.")
        lines = [f"{len(self.copies)} parameters have {dtype} copies, {bytes_ / 2**20:.1f} MiB"]
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.kept.items():
            by_reason.setdefault(reason, []).append(name)
        for reason, names in by_reason.items():
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"  stay as they are: {', '.join(names[:3])}{more}: {reason}")
        return "\n".join(lines)

    # ------------------------------------------------------------------------------------------- keeping in step

    def _copy(self, parameters: list[nn.Parameter]) -> None:
        if parameters:
            with torch.no_grad():
                torch._foreach_copy_([self.copies[parameter] for parameter in parameters], parameters)

    def refresh(self, *, everything: bool = False) -> None:
        """Copy what was changed since the last step, by its version; before the first step everything."""
        now = list(map(_version, self.parameters))
        if everything or not self._versions:
            self._copy(self.parameters)
        elif now != self._versions:
            pairs = zip(self.parameters, now, self._versions, strict=True)
            self._copy([parameter for parameter, new, old in pairs if new != old])
        self._versions = now

    def written(self, parameters: Iterable[nn.Parameter]) -> None:
        """Note that the optimizer has just written these parameters together with their copies."""
        self._written.update((parameter, parameter._version) for parameter in parameters if parameter in self.copies)

    def stepped(self) -> None:
        """Note the versions after a step that wrote its own copies."""
        self._versions = list(map(_version, self.parameters))

    # -------------------------------------------------------------------------------------------- within a step

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Let the modules compute on the copies; afterwards everything is as it was, but for new gradients."""
        self._copy(self.parameters if self.always else self._stale)
        self._written.clear()
        self._summed.clear()
        self.gradients = {}
        before = {parameter: parameter._version for parameter in self.parameters}
        trainable = self._trainable()
        grad_dtypes = [parameter.grad_dtype for parameter in trainable]
        hooks = []
        for parameter in trainable:
            parameter.grad_dtype = None  # any
            hooks.append(parameter.register_post_accumulate_grad_hook(self._accumulated))
        try:
            with self._installed():
                yield
        finally:
            for hook in hooks:
                hook.remove()
            for parameter, grad_dtype in zip(trainable, grad_dtypes, strict=True):
                if parameter.grad is not None and parameter.grad.dtype is self.dtype:
                    if parameter in self._written:
                        self.gradients[parameter], parameter.grad = parameter.grad, None
                    else:  # nothing has used it yet: it is the user's
                        self.to_float32([parameter])
                parameter.grad_dtype = grad_dtype
        self._stale = [
            parameter
            for parameter in self.parameters  # frozen ones too: a step may move them, as averages of others
            if parameter._version != self._written.get(parameter, before[parameter])
        ]

    def _accumulated(self, parameter: nn.Parameter) -> None:
        """After a backward pass has added its gradient: half for one pass, a float32 sum for several."""
        if parameter in self._summed:
            self.accumulates = True
        self._summed.add(parameter)
        if self.accumulates:
            self.to_float32([parameter])

    def to_float32(self, parameters: Iterable[torch.Tensor]) -> None:
        """Turn the half gradients of these parameters into float32 ones, for whoever else reads them."""
        for parameter in parameters:
            grad = parameter.grad
            if parameter in self.copies and grad is not None and grad.dtype is self.dtype:
                parameter.grad = grad.float()

    def _applies(self) -> bool:
        kind = self._device.type
        return torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) is self.dtype

    @contextlib.contextmanager
    def _swapped(self, places: list[Place]) -> Iterator[None]:
        if not self._applies():
            yield
            return
        half: dict[nn.Parameter, torch.Tensor] = {}
        swapped: list[Place] = []
        for module, name, parameter in places:
            if module._parameters.get(name) is not parameter:
                continue  # an outer forward has done it
            if parameter not in half:
                needs_grad = parameter.requires_grad and torch.is_grad_enabled()
                copy = self.copies[parameter]
                half[parameter] = _HalfOf.apply(parameter, copy) if needs_grad else copy
            module._parameters[name] = half[parameter]
            swapped.append((module, name, parameter))
        try:
            yield
        finally:
            for module, name, parameter in swapped:
                module._parameters[name] = parameter

    @contextlib.contextmanager
    def _installed(self) -> Iterator[None]:
        """Put a replacement around the forward of each module, and around the call of each compiled one."""
        by_module: dict[nn.Module, list[Place]] = {}
        for place in self.places:
            by_module.setdefault(place[0], []).append(place)
        for module, places in by_module.items():
            if isinstance(module, nn.MultiheadAttention):  # uses out_proj's parameters without calling it
                places = places + by_module.get(module.out_proj, [])
            self._replaced[module, "forward"] = (
                module.__dict__.get("forward", _ABSENT),
                _Forward(self, places, module),
            )
        for module in self.model.modules():
            if module.__dict__.get("_compiled_call_impl") is not None:
                call = functools.partial(self._call_compiled, module, module._compiled_call_impl)
                self._replaced[module, "_compiled_call_impl"] = (module._compiled_call_impl, call)
        frames = sys.modules.get("torch._dynamo.eval_frame")
        original = frames.OptimizedModule.__call__ if frames else None
        try:
            self._put(self._replaced, 1)
            if frames:
                frames.OptimizedModule.__call__ = lambda compiled, *args, **kwargs: self._call_compiled(
                    compiled._orig_mod, functools.partial(original, compiled), *args, **kwargs
                )
            yield
        finally:
            if frames:
                frames.OptimizedModule.__call__ = original
            self._put(self._replaced, 0)
            self._replaced.clear()

    def _put(self, keys: Iterable[tuple[nn.Module, str]], which: int) -> None:
        """Put the originals (0) or the replacements (1) of these attributes in their place."""
        for module, name in keys:
            value = self._replaced[module, name][which]
            if value is _ABSENT:
                module.__dict__.pop(name, None)
            else:
                module.__dict__[name] = value

    def _call_compiled(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a compiled module with all parameters below it replaced, and nothing else within it."""
        below = set(module.modules())
        keys = [key for key in self._replaced if key[0] in below]
        self._put(keys, 0)
        try:
            with self._swapped([place for place in self.places if place[0] in below]):
                return call(*args, **kwargs)
        finally:
            self._put(keys, 1)


class _Forward:
    """Stands in for module.forward within a step."""

    def __init__(self, owner: HalfWeights, places: list[Place], module: nn.Module) -> None:
        self._owner = owner
        self._places = places
        self._forward = module.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # within a compiled function that is no module: autocast casts there
            return self._forward(*args, **kwargs)
        with self._owner._swapped(self._places):
            return self._forward(*args, **kwargs)


_ABSENT = object()
_version = operator.attrgetter("_version")
