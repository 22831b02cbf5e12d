"""Half copies of float32 parameters, on which the layers of a captured step compute.

Autocast casts every weight in every forward pass and every weight gradient back. Here each parameter has a half copy
that the optimizer's own pass rewrites. While a module's forward runs, its parameters are replaced by their copies;
gradients arrive in half on the parameter itself, and the fused step reads them so. Everything outside of a step sees
float32 parameters, and nothing of this. A parameter that a forward turns out to need in float32 loses its copy.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from halfstep.half_tensor import ERRORS, NOT_IN_HALF, OF_NORM, WRITTEN, HalfOf, HalfTensor, attempted
from halfstep.reductions import float32_stream_kept
from halfstep.scopes import LayerScope
from halfstep.watched import beside_watched

RESIDUALS = ("half", "float32")
OUT_OF_RANGE = "float16 does not hold its values"

# Layers that do nothing with their parameters but what autocast runs in half anyway: half copies change none of their
# results. Exactly these classes: a subclass may compute on its weight in float32 first, as weight standardization does.
_PRODUCTS = {nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear, nn.MultiheadAttention}
_PRODUCTS |= {nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d}
_PRODUCTS |= {nn.RNNCell, nn.LSTMCell, nn.GRUCell}
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
# Hooks before forward that make the weight anew of other parameters.
_REWRITERS = (SpectralNorm, WeightNorm)

Place = tuple[nn.Module, str, nn.Parameter]


def _is_product(module: nn.Module, parameter: nn.Parameter) -> bool:
    """Return whether the module, as its class says, only multiplies by the parameter or adds it, in half."""
    kind = type(module)
    if beside_watched(module) is not None or any(
        parameter is getattr(module, name, None) for name in ("bias_k", "bias_v")
    ):
        return False  # attention repeats these two before they are cast, and so sums their gradients in float32
    return kind in _PRODUCTS or (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D")


def _fits_float16(parameter: nn.Parameter) -> bool:
    """Return whether float16 holds the values: none becomes infinite, and most that are not 0 are normal numbers."""
    values = parameter.detach()
    if (values.half().isinf() & values.isfinite()).any():
        return False
    tiny = (values.abs() < torch.finfo(torch.float16).smallest_normal) & (values != 0)
    return 2 * int(tiny.sum()) <= int((values != 0).sum())


def _scopes_of(model: nn.Module) -> dict[nn.Module, torch.dtype]:
    """Return the layers that a plan runs in a precision of their own."""
    forwards = {module: beside_watched(module) for module in model.modules()}
    return {module: forward.dtype for module, forward in forwards.items() if isinstance(forward, LayerScope)}


def _obstacle(
    module: nn.Module, parameter: nn.Parameter, device: torch.device, residual: str, dtype: torch.dtype
) -> str:
    """Return "" or why this parameter of this module stays float32."""
    if type(parameter) is not nn.Parameter:
        return f"it is a {type(parameter).__name__}"
    if parameter.dtype is not torch.float32 or parameter.device != device:
        return f"it is {parameter.dtype} on {parameter.device}"
    if isinstance(module, _NORMS):
        return OF_NORM
    scope = beside_watched(module)
    if isinstance(scope, LayerScope) and scope.dtype is not dtype:
        return f"the plan runs its layer in {str(scope.dtype).removeprefix('torch.')}"
    if isinstance(module, nn.RNNBase):
        return f"{type(module).__name__} keeps its weights in one buffer"
    hooks = module._forward_pre_hooks.values()
    if isinstance(module, nn.utils.parametrize.ParametrizationList) or any(isinstance(h, _REWRITERS) for h in hooks):
        return "it is parametrized"
    if getattr(module, "sparse", False) or getattr(module, "max_norm", None) is not None:
        return "sparse gradients and max_norm need the parameter itself"
    if isinstance(module, nn.EmbeddingBag):
        return "EmbeddingBag"
    product = _is_product(module, parameter)
    if residual == "float32" and not product:
        return 'residual="float32"'
    if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
        return "a hook reads its gradient"
    if dtype is torch.float16 and not product and not _fits_float16(parameter):
        return OUT_OF_RANGE
    return ""


class HalfWeights:
    """The half copies of one model's parameters, made once and kept in step with them.

    model: float32 parameters on one device. dtype: torch.float16 or torch.bfloat16. residual: "half" gives every
    parameter but those of norms a copy, so that embeddings, and with them the residual stream, are half; "float32"
    only those of torch's own linear and convolution layers, not of subclasses. The parameters of a model under
    DistributedDataParallel have none, nor those outside of torch's own layers whose values float16 does not hold now.
    always: copy anew at the start of every step, whatever changed.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, residual: str, *, always: bool = False) -> None:
        self.model = model
        self.dtype = dtype
        self.residual = residual
        self.always = always
        self.kept: dict[str, str] = {}  # qualified name: why it stays float32
        self.places: list[Place] = []
        self._names: dict[tuple[nn.Module, str], str] = {}
        first = next(model.parameters(), None)
        self.device = torch.device("cpu") if first is None else first.device
        reduced = any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules())
        for prefix, module in model.named_modules():
            for name, parameter in module._parameters.items():
                if parameter is None:
                    continue
                reason = "DistributedDataParallel reads its gradient" if reduced else ""
                reason = reason or _obstacle(module, parameter, self.device, residual, dtype)
                self._names[module, name] = f"{prefix}.{name}" if prefix else name
                if reason:
                    self.kept[self._names[module, name]] = reason
                else:
                    self.places.append((module, name, parameter))
        self._scopes = _scopes_of(model)
        self.copies = {
            parameter: torch.empty_like(parameter, dtype=dtype, requires_grad=False) for _, _, parameter in self.places
        }
        self.parameters = list(self.copies)
        self.generation = 0  # how often parameters have lost their copies: what was captured before is void
        self._versions: list[int] = []
        self._stale = self.parameters  # to be copied at the start of a step, since nothing rewrites them in it
        self._written: dict[nn.Parameter, int] = {}
        self._current: dict[nn.Parameter, tuple[int, int]] = {}  # versions of parameter and copy when they were equal
        self.noted: dict[nn.Parameter, str] = {}  # why these must be seen in float32
        self.held: dict[nn.Parameter, list[torch.Tensor]] = {}  # gradients under way, see HalfOf
        self._closure_hooks: list[Any] = []
        self.gradients: dict[nn.Parameter, torch.Tensor] = {}  # half, of the last step
        self._stepped: list[nn.Parameter] = []  # in it, with and without copies
        self._final: BaseException | None = None  # an error that no second attempt is made after
        self.looked = False  # whether a compiled module ran as it is in the last step
        self._looked_into: set[Any] = set()
        self._replaced: dict[tuple[nn.Module, str], tuple[Any, Any]] = {}  # attribute: what was and what is there

    def _trainable(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.parameters if parameter.requires_grad]

    def is_current(self) -> bool:
        """Return whether the model still holds the parameters that this was made of, where they were, and its plan."""
        return self._scopes == _scopes_of(self.model) and all(
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
            self._note_current(parameters)

    def _note_current(self, parameters: Iterable[nn.Parameter]) -> None:
        self._current.update((each, (each._version, self.copies[each]._version)) for each in parameters)

    def refresh(self, *, everything: bool = False) -> None:
        """Copy what was changed since the last step, by its version; before the first step everything."""
        now = list(map(_version, self.parameters))
        if everything or not self._versions:
            self._copy(self.parameters)
        elif now != self._versions:
            pairs = zip(self.parameters, now, self._versions, strict=True)
            self._copy([parameter for parameter, new, old in pairs if new != old])
        self._versions = now

    def written(self, parameters: list[nn.Parameter], copies: Mapping[torch.Tensor, torch.Tensor]) -> None:
        """Note that the optimizer has just written these parameters together with these copies."""
        # A parameter of two models has a copy for each, and the optimizer writes one.
        mine = [each for each in parameters if each in self.copies and copies.get(each) is self.copies[each]]
        self._written.update((parameter, parameter._version) for parameter in mine)
        self._stepped += parameters
        self._note_current(mine)

    def stepped(self) -> None:
        """Note the versions after a step that wrote its own copies."""
        self._versions = list(map(_version, self.parameters))

    # -------------------------------------------------------------------------------------------- within a step

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Let the modules compute on the copies; afterwards everything is as it was, but for new gradients."""
        self._copy(self.parameters if self.always else self._stale)
        self._note_current(self.parameters)
        self._written.clear()
        self.looked = False
        before = {parameter: parameter._version for parameter in self.parameters}
        trainable = self._trainable()
        grad_dtypes = [parameter.grad_dtype for parameter in trainable]
        hooks = []
        for parameter in trainable:
            parameter.grad_dtype = None  # any
            hooks.append(parameter.register_hook(functools.partial(self._arrived, parameter)))
        stream = float32_stream_kept(self.model) if self.residual == "float32" else contextlib.nullcontext()
        try:
            with self._refusing_sums(), stream, self._installed():
                yield
        finally:
            self._final = None
            self._put_parameters_back()
            self.held.clear()
            self.end_closure()
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
        if self.noted:
            self._keep_noted()

    @contextlib.contextmanager
    def _refusing_sums(self) -> Iterator[None]:
        """Raise where a step adds to the gradients of the last one: half ones are gone, float32 ones not."""
        left = self._stepped if self.gradients else []
        hooks = [
            parameter.register_hook(functools.partial(_refuse_sum, parameter, parameter.grad, parameter.grad._version))
            for parameter in left
            if parameter not in self.copies and parameter.grad is not None
        ]
        self.gradients, self._stepped = {}, []
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _put_parameters_back(self) -> None:
        """Where a forward has registered what stood for a parameter once more, register the parameter."""
        for module in self.model.modules():
            for name, value in module._parameters.items():
                if type(value) is HalfTensor:
                    module._parameters[name] = value._source[1]

    def _keep_noted(self) -> None:
        """Drop the copies of the parameters that must be seen in float32."""
        for module, name, parameter in self.places:
            if parameter in self.noted:
                self.kept[self._names[module, name]] = self.noted[parameter]
        self.places = [place for place in self.places if place[2] not in self.noted]
        self.copies = {parameter: copy for parameter, copy in self.copies.items() if parameter not in self.noted}
        self.parameters = list(self.copies)
        self._stale = [parameter for parameter in self._stale if parameter in self.copies]
        self._versions = []
        self.noted.clear()
        self.generation += 1

    def _arrived(self, parameter: nn.Parameter, grad: torch.Tensor) -> None:
        """Before a backward pass adds its gradient to .grad: a sum is float32."""
        self.held.pop(parameter, None)
        self.to_float32([parameter])

    def begin_closure(self) -> None:
        """Let backward passes leave float32 gradients: an optimizer that torch steps makes them itself."""
        self._closure_hooks += [
            parameter.register_post_accumulate_grad_hook(lambda parameter: self.to_float32([parameter]))
            for parameter in self._trainable()
        ]

    def end_closure(self) -> None:
        """Let gradients be half again."""
        for hook in self._closure_hooks:
            hook.remove()
        self._closure_hooks.clear()

    def to_float32(self, parameters: Iterable[torch.Tensor]) -> None:
        """Turn the half gradients of these parameters into float32 ones, for whoever else reads them."""
        for parameter in parameters:
            grad = parameter.grad
            if parameter in self.copies and grad is not None and grad.dtype is self.dtype:
                parameter.grad = grad.float()

    def applies(self) -> bool:
        """Return whether autocast computes in the copies' dtype here."""
        kind = self.device.type
        return torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) is self.dtype

    def _half_of(self, parameter: nn.Parameter, *, plain: bool) -> torch.Tensor:
        """Return what stands for the parameter in a forward. plain: a tensor of torch's own class."""
        copy = self.copies[parameter]
        half = HalfOf.apply(parameter, copy, self) if parameter.requires_grad and torch.is_grad_enabled() else copy
        return half if plain else HalfTensor.of(self, parameter, half)

    @contextlib.contextmanager
    def _swapped(self, places: list[Place], *, plain: bool = False) -> Iterator[bool]:
        """Put half copies in the place of parameters; yield whether there are any."""
        if not self.applies():
            yield False
            return
        # An outer forward may have replaced some already.
        swapped = [
            place for place in places if place[0]._parameters.get(place[1]) is place[2] and place[2] not in self.noted
        ]
        parameters = dict.fromkeys(parameter for _, _, parameter in swapped)
        # Changed earlier in this step, and not by the fused optimizer.
        self._copy([each for each in parameters if each._version != self._current[each][0]])
        half = {parameter: self._half_of(parameter, plain=plain) for parameter in parameters}
        for module, name, parameter in swapped:
            module._parameters[name] = half[parameter]
        try:
            yield bool(swapped)
        finally:
            for module, name, parameter in swapped:
                if module._parameters.get(name) is half[parameter]:
                    module._parameters[name] = parameter
            self._refuse_lost_writes(swapped)

    def _refuse_lost_writes(self, places: list[Place]) -> None:
        """Raise if a forward has written to a copy in a way that could not be led to the parameter."""
        for module, name, parameter in places:
            if self.copies[parameter]._version != self._current[parameter][1]:
                self.noted[parameter] = WRITTEN
                self._final = RuntimeError(
                    f"{self._names[module, name]} was written within forward, through a view of it or in compiled "
                    "code. That went to its half copy and is lost. From the next call on the parameter has no half "
                    "copy; capture(..., half_weights=False) gives copies to none."
                )
                raise self._final

    def _may_be_of_half(self, error: Exception) -> bool:
        """Return whether a second attempt may help. One is made where an error comes from, not further out again."""
        if error is self._final or isinstance(error, torch.OutOfMemoryError):
            return False
        self._final = error
        return True

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
        """Call a compiled module with all parameters below it replaced, and nothing else within it.

        In each mode it first runs once as it is, to find out which parameters must be seen in float32.
        """
        below = set(module.modules())
        places = [place for place in self.places if place[0] in below]
        kind = module, module.training, torch.is_grad_enabled()
        if places and self.applies() and kind not in self._looked_into:
            self._looked_into.add(kind)
            self.looked = True
            with contextlib.suppress(torch.OutOfMemoryError):  # compiled it may need much less
                return module._call_impl(*args, **kwargs)
        swapped = False
        try:
            with self._without_replacements(below), self._swapped(places, plain=True) as swapped:
                return call(*args, **kwargs)
        except ERRORS as error:  # something that it has not done before
            again = attempted(module._call_impl, *args, **kwargs) if swapped and self._may_be_of_half(error) else []
            if not again:
                raise
            self.looked = True
            return again[0]

    @contextlib.contextmanager
    def _without_replacements(self, modules: set[nn.Module]) -> Iterator[None]:
        """Let these modules be what they are outside of the step."""
        keys = [key for key in self._replaced if key[0] in modules]
        self._put(keys, 0)
        try:
            yield
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
        owner, swapped = self._owner, False
        try:
            with owner._swapped(self._places) as swapped:
                return self._forward(*args, **kwargs)
        except ERRORS as error:  # of an operation on something made of a half copy, as HalfTensor has seen to the rest
            again = attempted(self._forward, *args, **kwargs) if swapped and owner._may_be_of_half(error) else []
            if not again:
                raise
            for _, _, parameter in self._places:
                owner.noted.setdefault(parameter, NOT_IN_HALF)
            return again[0]


def _refuse_sum(parameter: torch.Tensor, before: torch.Tensor, version: int, grad: torch.Tensor) -> None:
    if parameter.grad is before and before._version == version:
        raise RuntimeError(
            "the captured step adds to the gradients of the step before: call optimizer.zero_grad() in it. Half "
            "gradients do not outlive a step; capture(..., half_weights=False) keeps all"
        )


_ABSENT = object()
_version = operator.attrgetter("_version")
