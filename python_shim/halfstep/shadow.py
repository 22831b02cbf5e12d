"""One sample of a training step: forward and backward of the model in float32 beside the loop's mixed precision.

Both run on copies that share the parameters' memory, before the loop's own forward, on the same inputs. Nothing of
them stays: gradients are returned and not accumulated, buffers are the copies' own, random generators are set back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as _module

from halfstep._library import load_library
from halfstep.arguments import UnsupportedArgument, flatten, rebuild
from halfstep.calls import Example, is_compiled, without_compiler
from halfstep.optimizer import current
from halfstep.shadow_copies import CannotSample, sampled_copy, shared_functions, traceless_copy

load_library()
_ops = torch.ops.halfstep


@dataclasses.dataclass(frozen=True)
class Sample:
    """What one sampled step showed.

    step: updates of the scaler before it, 0 if none. time: when, as time.time() gives it. fp32_ms, mixed_ms: one
    forward and backward pass. fp32_bytes, mixed_bytes: what the forward pass left for the backward one, its result
    included on a GPU. difference: of the two outputs in eval mode, relative to float32's, in L2; NaN where they cannot
    be compared. seconds: what the sample cost. operations: by the dtype that they computed in, of the mixed pass, empty
    where they were not counted. casts, cast_bytes: how many, and the bytes that they read and wrote.
    """

    step: int
    time: float
    fp32_ms: float
    mixed_ms: float
    fp32_bytes: int
    mixed_bytes: int
    difference: float
    seconds: float
    operations: dict[str, int]
    casts: int
    cast_bytes: int


def unwrapped(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Return (where the monitor's Watched stands, what is copied and sampled) of a model as setup() gets it.

    DistributedDataParallel calls the module inside, and compiled code is not interrupted: so the first is the outermost
    module that torch.compile stands around, else the one inside of all wrappers, which is also the second.
    """
    outer = None
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif type(model).__name__ == "OptimizedModule":
            outer = model if outer is None else outer  # not `or`: it asks a module for its len()
            model = model._orig_mod
        else:
            return model if outer is None else outer, model


def obstacle(model: nn.Module) -> str:
    """Return "" or why this model is never sampled, as far as its modules tell."""
    for name, module in model.named_modules():
        if isinstance(module, nn.DataParallel):
            return "the model has a DataParallel, whose replicas share what stands in forward"
        if isinstance(module, nn.SyncBatchNorm):
            return f"the model has a SyncBatchNorm ({name}), and a float32 run would enter its collectives"
        if type(module).__name__ == "FullyShardedDataParallel" or any(
            kind.__name__ == "FSDPModule" for kind in type(module).__mro__
        ):
            return "the model is under FSDP, and a float32 run would enter its collectives"
        if isinstance(module, torch.jit.ScriptModule):
            return f"{name or 'the model'} is a TorchScript module, which cannot be watched"
    tensor = sys.modules.get("torch.distributed.tensor")
    if tensor is not None and any(isinstance(parameter, tensor.DTensor) for parameter in model.parameters()):
        return "the model has sharded parameters (DTensor), and a float32 run would enter their collectives"
    own = type(model).forward is not nn.Module.forward or "forward" in model.__dict__
    return "" if own else f"{type(model).__name__} has no forward, so no call of the model is seen"


def hindrance(device: torch.device) -> str:
    """Return "" or why there is no sample in this call, though there may be in others."""
    if not torch.is_autocast_enabled(device.type):
        return "autocast was off"
    if getattr(current, "recorder", None) is not None:
        return "captured steps (manager.capture) are not sampled"
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph was being captured"
    if device.type == "cuda" and torch.cuda.get_sync_debug_mode():
        return "torch.cuda's sync debug mode would have seen the sample's waits"
    if torch.jit.is_tracing() or torch._C._functorch.peek_interpreter_stack() is not None:
        return "it was traced or under torch.func"
    modes = torch.overrides._get_current_function_mode_stack()
    if torch._C._len_torch_dispatch_stack() or any(type(mode).__name__ != "DeviceContext" for mode in modes):
        return "a mode of torch's dispatch would have seen the sample's operations"
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return "hooks for saved tensors would have seen the sample's"
    if _module._has_any_global_hook():
        return "global hooks of modules would have seen the sample's calls"
    if torch.autograd._profiler_enabled():
        return "a profiler would have seen the sample's operations"
    counter = torch.classes.halfstep.OperationCounter()
    if not counter.start():
        return "operations were being counted, and the sample's would have been among them"
    counter.stop()
    return ""


def take(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, step: int, first: bool) -> Sample:
    """Take a sample in the loop's autocast region, with these arguments of the model's call (waits for the device).

    first: look too for what a copy cannot keep apart from the model. Raises CannotSample, or whatever the model raises.
    """
    start = time.perf_counter()
    reason = obstacle(model) or shared_functions(model)
    if reason:
        raise CannotSample(reason)
    try:
        call = _Call(model, args, kwargs)
    except UnsupportedArgument as error:
        raise CannotSample(f"an argument cannot be copied: {error}") from None
    except ValueError as error:
        raise CannotSample(str(error)) from None
    with call.example.random_numbers_kept(), without_compiler(model), contextlib.ExitStack() as copies:
        # New parameters for each run in half: the loop's autocast has cached casts of the others, and clearing its
        # cache would change what the loop computes.
        if first:
            with traceless_copy(model) as twin:
                counted = call.run(twin, autocast=True, count=True)
        else:
            counted = call.run(copies.enter_context(sampled_copy(model)), autocast=True, count=True)
        twin = copies.enter_context(sampled_copy(model))
        mixed_ms = call.run(twin, autocast=True).ms
        fp32_bytes = call.run(twin, autocast=False, measure=True).bytes
        fp32_ms = call.run(twin, autocast=False).ms
        apart = call.difference(twin)
    return Sample(
        step,
        time.time(),
        fp32_ms,
        mixed_ms,
        fp32_bytes,
        counted.bytes,
        apart,
        time.perf_counter() - start,
        counted.operations,
        counted.casts,
        counted.cast_bytes,
    )


def compiled_parts(model: nn.Module) -> bool:
    """Return whether a sample leaves a compiler out that the loop has, in or around the model."""
    return any(map(is_compiled, model.modules()))


@dataclasses.dataclass
class _Run:
    ms: float = math.nan
    bytes: int = 0
    operations: dict[str, int] = dataclasses.field(default_factory=dict)
    casts: int = 0
    cast_bytes: int = 0


class _Call:
    """The arguments of one call, and what a copy of the model does with copies of them."""

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.example = Example(model, args, kwargs)
        self._arguments = (args, kwargs)
        self._given: list[torch.Tensor] = []
        flatten(self._arguments, self._given)
        self._device = self.example.device

    def _inputs(self) -> tuple[tuple[Any, ...], dict[str, Any], list[torch.Tensor]]:
        """Return arguments that the model may write to, and what gradients reach; one in two places stays one."""
        leaves: dict[int, torch.Tensor] = {}
        copies: dict[int, torch.Tensor] = {}
        for tensor in self._given:
            if id(tensor) not in copies:
                leaf = tensor.detach().requires_grad_(tensor.requires_grad)
                copies[id(tensor)] = leaf.clone()
                if leaf.requires_grad:
                    leaves[id(tensor)] = leaf
        args, kwargs = rebuild(self._arguments, iter([copies[id(tensor)] for tensor in self._given]))
        return args, kwargs, list(leaves.values())

    def _precision(self, autocast: bool) -> contextlib.AbstractContextManager[Any]:
        """Return the loop's autocast as it is, or none."""
        return contextlib.nullcontext() if autocast else torch.autocast(self._device.type, enabled=False)

    def run(self, twin: nn.Module, *, autocast: bool, count: bool = False, measure: bool = False) -> _Run:
        """Run forward and backward once; count operations and bytes, or bytes alone, or take the time."""
        args, kwargs, leaves = self._inputs()
        wanted = [parameter for parameter in twin.parameters() if parameter.requires_grad] + leaves
        run = _Run()
        counter = _counter() if count else None
        saved = _saved(twin, args, kwargs) if count or measure else _Saved()
        elapsed = _stopwatch(self._device)
        before = _allocated(self._device)
        try:
            with self._precision(autocast), saved.noted(self._device):
                output = twin(*args, **kwargs)
            run.bytes = saved.bytes if self._device.type == "cpu" else _allocated(self._device) - before
            results = [tensor for tensor in _floats(output) if tensor.requires_grad]
            if not results:
                raise CannotSample("the model returns nothing from which a backward pass starts")
            with self._precision(False):  # as after the loop's region
                torch.autograd.grad(results, wanted, list(map(torch.ones_like, results)), allow_unused=True)
        finally:
            if counter is not None:
                counter.stop()
        run.ms = elapsed()
        if counter is not None:
            for _, dtype, number in counter.counts():
                run.operations[dtype] = run.operations.get(dtype, 0) + number
            for _, _, number, nbytes in counter.casts():
                run.casts += number
                run.cast_bytes += nbytes
        return run

    def difference(self, twin: nn.Module) -> float:
        """Return the relative L2 difference of the outputs in eval mode: dropout differs with the dtype."""
        outputs = []
        twin.eval()
        with torch.no_grad():
            for autocast in (True, False):
                args, kwargs, _ = self._inputs()
                with self._precision(autocast):
                    outputs.append(_floats(twin(*args, **kwargs)))
        mixed, full = outputs
        if not full or [tensor.shape for tensor in mixed] != [tensor.shape for tensor in full]:
            return math.nan
        apart = [torch.sub(*pair) for pair in zip(full, mixed, strict=True)]
        norm, distance = _norm(full, self._device), _norm(apart, self._device)
        if not math.isfinite(norm):
            return math.nan
        if not math.isfinite(distance):
            return math.inf
        return distance / norm if norm else math.inf if distance else 0.0


def _floats(output: Any) -> list[torch.Tensor]:
    """Return the floating tensors of a result."""
    tensors: list[torch.Tensor] = []
    try:
        flatten(output, tensors)
    except UnsupportedArgument as error:
        raise CannotSample(f"the model's result cannot be looked into: {error}") from None
    return [tensor for tensor in tensors if tensor.is_floating_point()]


def _norm(tensors: list[torch.Tensor], device: torch.device) -> float:
    one = torch.full((), 1.0, dtype=torch.float32, device=device)
    found = torch.zeros((), dtype=torch.float32, device=device)
    norm = torch.empty((), dtype=torch.float32, device=device)
    _ops.check_gradients_(tensors, one, found, norm)
    return norm.item()


def _stopwatch(device: torch.device) -> Callable[[], float]:
    """Start; the function that is returned gives the milliseconds since then, on a GPU by its own clock (waits)."""
    if device.type == "cpu":
        begin = time.perf_counter()
        return lambda: (time.perf_counter() - begin) * 1e3
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()

    def elapsed() -> float:
        with torch.cuda.device(device):
            end.record()
            end.synchronize()
        return start.elapsed_time(end)

    return elapsed


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


class _Saved:
    """The memory that autograd keeps for the backward pass, each piece once."""

    def __init__(self, known: set[int] | None = None) -> None:
        self._known = known  # pieces that are there anyway; None: nothing is noted
        self.bytes = 0

    def noted(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """Return a context that notes what is saved; on a GPU its allocator knows."""
        if self._known is None or device.type != "cpu":
            return contextlib.nullcontext()
        return torch.autograd.graph.saved_tensors_hooks(self._note, lambda tensor: tensor)

    def _note(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.layout is torch.strided:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._known:
                self._known.add(storage.data_ptr())
                self.bytes += storage.nbytes()
        return tensor


def _saved(twin: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Saved:
    """Return what notes the memory saved beside that of the model and its arguments."""
    given: list[torch.Tensor] = []
    flatten((args, kwargs), given)
    tensors = [tensor for tensor in (*twin.parameters(), *twin.buffers(), *given) if tensor.layout is torch.strided]
    return _Saved({tensor.untyped_storage().data_ptr() for tensor in tensors})


def _counter() -> Any:
    """Return a running counter of operations; None if this build has none, or another one runs."""
    try:
        counter = torch.classes.halfstep.OperationCounter()
    except RuntimeError:
        return None
    return counter if counter.start() else None
