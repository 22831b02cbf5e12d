"""Plans by measured cost: each layer that is planned in half is timed against float32, casts included."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from halfstep.arguments import UnsupportedArgument, flatten, rebuild
from halfstep.calls import HOOKS, Example, Recorder, copy_of, dtype_of, half_of, tensors_in
from halfstep.config import check_bool, check_number
from halfstep.policy import PlannedLayer, PrecisionPlan, named_modules, with_inherited
from halfstep.reductions import HalfNorm
from halfstep.scopes import LayerScope, apply_plan

_WARM_UP = 3
_LEAST_ROUNDS, _MOST_ROUNDS = 7, 25
_BUDGET = 0.5  # seconds for a layer, once it has had its least rounds
_SAMPLE = 5e-4  # seconds that one sample should take at least
_MOST_RUNS = 50  # in one sample


@dataclasses.dataclass
class _Timing:
    """Seconds of a layer's calls, one sample for each round."""

    half: list[float]
    full: list[float]
    backward: bool
    layer: str  # which was timed

    def half_is_slower(self, margin: float) -> bool:
        """Whether half's median is beyond the margin, and further than two standard errors of the difference."""
        slower = statistics.median(self.half) - statistics.median(self.full)
        error = math.hypot(_error_of_median(self.half), _error_of_median(self.full))
        return slower > margin * statistics.median(self.full) and slower > 2 * error

    def decide(self, layer: PlannedLayer, margin: float) -> PlannedLayer:
        """Return the layer with its precision and the reason."""
        half, full = (f"{1e3 * statistics.median(samples):.3g} ms" for samples in (self.half, self.full))
        passes = "forward and backward" if self.backward else "forward"
        how = f"casts included ({passes})" + ("" if self.layer == layer.name else f", as {self.layer or 'the model'}")
        if self.half_is_slower(margin):
            reason = f"float32: {full} against {half} in {layer.precision}, {how}"
            return layer._replace(precision="float32", reason=reason)
        within = ", within margin or noise" if statistics.median(self.half) > statistics.median(self.full) else ""
        reason = f"{layer.reason}; {layer.precision}: {half} against {full} in float32{within}, {how}"
        return layer._replace(reason=reason)


def _error_of_median(samples: list[float]) -> float:
    """Return the standard error of the median, by the quartiles: a machine that others use too has outliers."""
    first, _, third = statistics.quantiles(samples, n=4, method="inclusive")
    sigma = (third - first) / 1.349
    return 1.253 * sigma / math.sqrt(len(samples))


def tune(
    plan: PrecisionPlan,
    model: nn.Module,
    example: Any,
    kwargs: Mapping[str, Any] | None,
    backward: bool | None,
    margin: float,
) -> PrecisionPlan:
    """Return the plan without the halves that cost time. Parameters: PrecisionPolicy.tune."""
    if backward is not None:
        check_bool("backward", backward)
    check_number("a finite number >= 0", lambda value: 0 <= value < float("inf"))("margin", margin)
    arguments = Example(model, example, kwargs)
    twin = copy_of(model)
    apply_plan(twin, plan)
    modules = dict(named_modules(twin))
    if backward is None:
        backward = model.training and torch.is_grad_enabled()
    dtype = dtype_of(half_of(plan))
    with arguments.random_numbers_kept():
        with torch.set_grad_enabled(backward):
            recorded = _Recorded(plan, twin)
            arguments.call(twin, dtype)
        recorded.stop()
        entries = recorded.entries()
        timings = {id(entry): _time(entry, arguments.device, dtype, backward) for entry in _distinct(entries.values())}
    layers = []
    for layer in plan.layers():
        if layer.name in entries:
            layer = _decide(layer, timings[id(entries[layer.name])], margin)
        layers.append(layer)
    originals = dict(named_modules(model))
    uncalled = {originals[name] for name in plan if modules[name] not in recorded.calls}
    return with_inherited(PrecisionPlan(f"{plan.policy}, tuned", layers), model, uncalled)


def _distinct(entries: Iterable[_Entry]) -> Iterable[_Entry]:
    return {id(entry): entry for entry in entries}.values()


def _decide(layer: PlannedLayer, timing: _Timing | str, margin: float) -> PlannedLayer:
    if isinstance(timing, str):
        return layer._replace(reason=f"{layer.reason}; not timed: {timing}")
    return timing.decide(layer, margin)


@dataclasses.dataclass
class _Entry:
    """A layer to time: its scope, which knows what else stands in `forward`, and the arguments of its calls."""

    name: str
    scope: LayerScope
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]


class _Recorded:
    """The calls of the layers of a plan, while `forward` is a Recorder; arguments are kept once for layers alike."""

    def __init__(self, plan: PrecisionPlan, model: nn.Module) -> None:
        modules = dict(named_modules(model))
        self._model = model
        self._names: dict[nn.Module, str] = {}
        for name in plan:
            self._names.setdefault(modules[name], name)
        self._scopes = {module: module.__dict__.get("forward") for module in self._names}
        # What inherits has no scope, and what is float32 already has nothing to lose.
        half = (m for m, name in self._names.items() if plan[name].precision != "float32" and not plan[name].inherits)
        self._kinds = {module: _look_of(module) for module in half}
        self.calls: dict[nn.Module, list[Any]] = {}  # what their arguments look like
        self._arguments: dict[Any, Any] = {}  # by what the layer and the arguments look like
        for module in self._names:
            module.forward = Recorder(module, self._note)

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        looks = self.calls.setdefault(module, [])
        if module in self._kinds:
            look, arguments = _detached((args, kwargs))
            looks.append(look)
            self._arguments.setdefault((self._kinds[module], look), arguments)

    def stop(self) -> None:
        """Put the scopes back, and take away the hooks of the copy: they are not timed."""
        for module, scope in self._scopes.items():
            del module.forward
            if scope is not None:
                module.forward = scope
        for module in self._model.modules():
            for hooks in HOOKS:
                getattr(module, hooks).clear()

    def entries(self) -> dict[str, _Entry]:
        """Return for each layer to time, by its first name, what stands for it: itself or one like it."""
        alike: dict[Any, _Entry] = {}
        result = {}
        for module, kind in self._kinds.items():
            looks = self.calls.get(module)
            if looks is None:
                continue
            name, calls = self._names[module], [self._arguments[kind, look] for look in looks]
            entry = alike.setdefault((kind, tuple(looks)), _Entry(name, self._scopes[module], calls))
            result[name] = entry
        return result


def _detached(value: Any) -> tuple[Any, Any]:
    """Return what arguments look like, to compare by, and the same tensors without the graph that they came from."""
    tensors: list[torch.Tensor] = []
    try:
        look = flatten(value, tensors)
    except UnsupportedArgument:
        return object(), value  # like no other
    twins = {id(tensor): tensor.detach().requires_grad_(tensor.requires_grad) for tensor in tensors}
    same = [next(i for i, first in enumerate(tensors) if first is tensor) for tensor in tensors]
    return (look, tuple(same)), rebuild(value, iter([twins[id(tensor)] for tensor in tensors]))


def _look_of(module: nn.Module) -> Any:
    """Return what a module looks like, to compare by: its class, its settings, its tensors' shapes, its children."""
    if isinstance(module, torch.jit.ScriptModule):
        return id(module)
    tensors = {**module._parameters, **module._buffers}
    shapes = tuple([(key, None if tensor is None else flatten(tensor, [])) for key, tensor in tensors.items()])
    own = {key: value for key, value in vars(module).items() if key not in ("_parameters", "_buffers", "_modules")}
    inner = tuple([(key, None if child is None else _look_of(child)) for key, child in module._modules.items()])
    return type(module), shapes, _look_of_value(own), inner


def _look_of_value(value: Any) -> Any:
    """Return what an attribute looks like. What is not known to be alike is like itself alone."""
    if isinstance(value, LayerScope):
        return LayerScope, value.dtype, value.holds, _look_of_value(value.inner)
    if isinstance(value, HalfNorm):
        return HalfNorm, value.float32_input
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
        return type(value), value
    if isinstance(value, (tuple, list)):
        return type(value), tuple([_look_of_value(item) for item in value])
    if isinstance(value, (set, frozenset)) and all(isinstance(item, str) for item in value):
        return type(value), frozenset(value)
    if isinstance(value, dict):
        return type(value), tuple([(key, _look_of_value(item)) for key, item in value.items()])
    return id(value)


class _Run:
    """All calls of one layer in one precision, under the autocast that a loop would have.

    name, dtype: which layer, in what. backward: whether a backward pass belongs to it.
    copies: the layer writes to its arguments, which autograd allows for copies alone.
    """

    def __init__(
        self,
        entry: _Entry,
        dtype: torch.dtype,
        device: torch.device,
        autocast: torch.dtype,
        *,
        grad: bool,
        copies: bool,
    ) -> None:
        planned = entry.scope
        inner = (module.__dict__.get("forward") for module in planned.module.modules() if module is not planned.module)
        holds = dtype is torch.float32 and any(isinstance(f, LayerScope) and f.dtype is not dtype for f in inner)
        self.name = entry.name
        self.dtype = dtype
        self._scope = LayerScope(planned.module, dtype, planned.inner, holds=holds)
        self._calls = entry.calls
        self._device_type, self._autocast_dtype = device.type, autocast
        self._grad, self._copies = grad, copies
        results = self._forward()  # without room for a backward pass yet
        given = [tensor for call in entry.calls for tensor in tensors_in(call)]
        wanted = [tensor for tensor in (*given, *planned.module.parameters()) if tensor.requires_grad]
        self._wanted = list({id(tensor): tensor for tensor in wanted}.values())
        self._grads = [torch.ones_like(result) for result in results]
        self.backward = bool(results)

    def _forward(self) -> list[torch.Tensor]:
        """Return those of the results from which a backward pass starts."""
        torch.clear_autocast_cache()  # weights are cast anew in each step
        results = []
        with torch.set_grad_enabled(self._grad), torch.autocast(self._device_type, dtype=self._autocast_dtype):
            for args, kwargs in self._calls:
                if self._copies:
                    tensors = tensors_in((args, kwargs))
                    args, kwargs = rebuild((args, kwargs), iter([tensor.clone() for tensor in tensors]))
                results += tensors_in(self._scope(*args, **kwargs))
        return [result for result in results if result.requires_grad]

    def __call__(self) -> None:
        """Run once."""
        results = self._forward()
        if results:
            torch.autograd.grad(results, self._wanted, self._grads, allow_unused=True)


def _time(entry: _Entry, device: torch.device, autocast: torch.dtype, grad: bool) -> _Timing | str:
    """Return the timing of a layer in its half type and in float32, or why there is none."""

    def runs(*, copies: bool) -> list[_Run]:
        return [
            _Run(entry, dtype, device, autocast, grad=grad, copies=copies)
            for dtype in (entry.scope.dtype, torch.float32)
        ]

    try:
        try:
            half, full = runs(copies=False)
        except RuntimeError:  # a write to a leaf is one
            half, full = runs(copies=True)
        return _Timing(*_measure(half, full, device), half.backward, entry.name)
    except Exception as error:  # a layer that cannot be called alone, such as one that reads what another has left
        return f"alone it raises {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _measure(half: _Run, full: _Run, device: torch.device) -> tuple[list[float], list[float]]:
    """Return seconds of a run of each, sample by sample, in turns: what slows the machine down slows both."""
    times = []
    for run in (half, full):
        taken = [_seconds(run, device, 1) for _ in range(_WARM_UP)]
        times.append(max(1, min(_MOST_RUNS, round(_SAMPLE / max(taken[-1], 1e-9)))))
    samples: tuple[list[float], list[float]] = ([], [])
    spent = 0.0
    for i in range(_MOST_ROUNDS):
        if i >= _LEAST_ROUNDS and spent > _BUDGET:
            break
        for which in (0, 1) if i % 2 == 0 else (1, 0):
            run = (half, full)[which]
            samples[which].append(_seconds(run, device, times[which]))
            spent += samples[which][-1] * times[which]
    return samples


def _seconds(run: _Run, device: torch.device, times: int) -> float:
    """Return the time of one of `times` runs in a row, on the GPU by its own clock."""
    if device.type == "cpu":
        start = time.perf_counter()
        for _ in range(times):
            run()
        return (time.perf_counter() - start) / times
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(times):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / times
