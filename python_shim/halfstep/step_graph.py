"""A whole training step as one CUDA graph, on half copies of the weights."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from halfstep.arguments import UnsupportedArgument, describe, flatten
from halfstep.graph_capture import NotCapturable
from halfstep.half_weights import HalfWeights
from halfstep.optimizer import FusedStep, hyperparameters, obstacle
from halfstep.step_capture import CapturedStep, FusedSteps, Recorder, Watch, detached, pool_bytes

if TYPE_CHECKING:
    from halfstep.analysis_timeline import Timeline

_CHANGING = "changing"
_MOST_VALUES = 8  # of constants beside tensors of the same shapes; also there are modes of the model
_MOST_ENTRIES = 1000

_PROTOTYPE = "Synchronization debug mode is a prototype"
_SYNCHRONIZES = "called a synchronizing CUDA operation"


# Asked before each capture and replay: whether this step must run as it is instead, since its layers are looked at.
runs_as_it_is: list[Callable[[], bool]] = []


@dataclasses.dataclass(frozen=True)
class Training:
    """What a step trains, and by which scaler."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scaler: Any


@dataclasses.dataclass
class _Entry:
    """Arguments of one shape."""

    shapes: str
    reason: str  # why these are not captured
    warm: int = 0
    graph: CapturedStep | None = None
    replays: int = 0
    bytes: int = 0


class StepGraph:
    """A training step that is captured once per shape of its arguments and then replayed.

    Made by MixedPrecisionManager.capture(); called like the step itself. The first `warmup` calls with arguments of one
    shape run the step as it is; the next one captures it, and that call and all later ones replay the capture. Each
    call trains one step, to the same bits either way. What cannot be captured runs as it is, and explain() says why.
    On a GPU a call enqueues on the current stream and waits for nothing, but for the capture itself.

    Tensors in the arguments are copied into the capture's own; results are detached copies of its own.
    Python code in the step runs only while it is captured: prints, counters and a scheduler's step() belong outside.
    Learning rates and all other hyperparameters of the optimizers' groups are read before each replay. Replaced
    parameters or states, other settings of the scaler, freezing, and train() or eval() of the model lead to a new
    capture. Not thread-safe.
    """

    def __init__(
        self,
        step: Callable[..., Any],
        trainings: list[Training],
        make_half: Callable[[], list[HalfWeights]],
        settings: Callable[[], Any],
        *,
        warmup: int,
        max_graphs: int,
        copy_outputs: bool,
        timelines: list[Timeline],
    ) -> None:
        self._step = step
        self._timelines = timelines  # the manager's: of the analyses that are running
        self._trainings = trainings
        self._make_half = make_half
        self._settings = settings
        self._warmup = warmup
        self._max_graphs = max_graphs
        self._copy_outputs = copy_outputs
        self._device = next(trainings[0].model.parameters()).device
        self._stream = self._pool = None
        if self._device.type == "cuda":
            self._stream = torch.cuda.Stream(self._device)
        self._entries: dict[Any, _Entry] = {}
        self._fused: FusedSteps = {}  # of the steps that are not replayed
        self._restarts: collections.deque[str] = collections.deque(maxlen=5)
        self.captures = 0
        self.replays = 0
        self._start()

    def _new_pool(self) -> None:
        """Take a new memory pool: torch frees one with its last capture, and it cannot be used again."""
        if self._device.type == "cuda":
            self._pool = torch.cuda.graph_pool_handle()

    def _start(self) -> None:
        self._new_pool()
        self._half = self._make_half()
        for half in self._half:
            half.refresh(everything=True)  # `parameter.data = other` moves a parameter without a new version
        self._generations = self._generations_now()
        self._watch = Watch([training.model for training in self._trainings])
        self._set = self._settings()

    def _generations_now(self) -> list[int]:
        return [half.generation for half in self._half]

    def _changed(self) -> str:
        """Return "" or what has changed that all captures are made of."""
        if self._settings() is not self._set:
            return "the manager's settings changed"
        if self._generations_now() != self._generations:
            return "a parameter has no half copy any more"
        return self._watch.changed()

    # ------------------------------------------------------------------------------------------------------- calls

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Train one step."""
        for timeline in self._timelines:  # replays open no autocast_context(), which tells them too
            timeline.tick()
        changed = self._changed()
        if changed:
            self.reset(changed)
        tensors: list[torch.Tensor] = []
        key = self._key((args, kwargs), tensors)
        entry = self._entries.get(key)
        outdated = entry.graph.outdated() if entry is not None and entry.graph is not None else ""
        if outdated:
            self.reset(outdated)
            entry = None
        if entry is None:
            entry = self._new_entry(key, (args, kwargs), tensors)
        for half in self._half:
            half.refresh()
        beside = any(watches() for watches in runs_as_it_is)
        if entry.graph is None and not entry.reason and entry.warm >= self._warmup and not beside:
            entry.reason = self._no_room()  # shapes may have warmed up side by side
            if not entry.reason:
                self._capture(entry, (args, kwargs))
        if entry.graph is None or beside:
            return self._run(entry, args, kwargs)
        self.replays += 1
        entry.replays += 1
        return entry.graph.replay(tensors, copy_outputs=self._copy_outputs)

    def expect(self, arguments: tuple[Any, ...]) -> None:
        """Look at the arguments of one call, without training on them: explain() then says what becomes of them."""
        tensors: list[torch.Tensor] = []
        key = self._key((arguments, {}), tensors)
        self._new_entry(key, (arguments, {}), tensors)

    def _new_entry(self, key: Any, arguments: Any, tensors: list[torch.Tensor]) -> _Entry:
        """Return the entry of arguments that have none; of what changes endlessly all further ones share one."""
        shapes = describe(arguments)
        values = sum(entry.shapes == shapes for entry in self._entries.values())
        if values >= max(self._max_graphs, _MOST_VALUES):
            changing = f"a constant argument changes from call to call ({values} values so far): pass a tensor instead"
            return self._entries.setdefault((_CHANGING, shapes), _Entry(shapes, changing))
        if len(self._entries) >= _MOST_ENTRIES:
            shapes = "other shapes"
            return self._entries.setdefault(_CHANGING, _Entry(shapes, f"there were {_MOST_ENTRIES} others before"))
        entry = self._entries[key] = _Entry(shapes, self._obstacle(key, tensors))
        return entry

    def _key(self, arguments: Any, tensors: list[torch.Tensor]) -> Any:
        """Return what tells captures apart, or a string that says why the arguments cannot be captured."""
        try:
            return flatten(arguments, tensors), self._watch.modes()
        except UnsupportedArgument as error:
            return f"an argument cannot be captured: {error}"

    def _obstacle(self, key: Any, tensors: list[torch.Tensor]) -> str:
        """Return "" or why a step with these arguments is not captured."""
        if isinstance(key, str):
            return key
        if self._device.type != "cuda":
            return f"the model is on the {self._device.type.upper()}"
        for tensor in tensors:
            if tensor.device != self._device:
                return f"an argument is on {tensor.device}, the model on {self._device}: move it before the call"
            if tensor.requires_grad:
                return "an argument requires a gradient"
        return self._no_room()

    def _no_room(self) -> str:
        if sum(entry.graph is not None for entry in self._entries.values()) >= self._max_graphs:
            return f"there are max_graphs = {self._max_graphs} captures already"
        return ""

    def _run(self, entry: _Entry, args: Any, kwargs: Any) -> Any:
        """Run the step as it is; while warming up, look for what a capture would break."""
        recorder = Recorder(self._fused, self._half)
        if entry.reason or entry.warm >= self._warmup:
            with recorder.recording():
                result = detached(self._step(*args, **kwargs))
        else:
            before = self._hyperparameters()
            # The first step of all makes states and compiles, which may wait; the last one is like those to come.
            last = entry.warm == self._warmup - 1
            with self._beside(), _noticed_waits(last) as waits, recorder.recording():
                result = detached(self._step(*args, **kwargs))
            if not any(half.looked for half in self._half):  # else a compiler has not run yet
                entry.warm += 1
            if recorder.reason:
                entry.reason = recorder.reason
            elif waits:
                entry.reason = f"the step waits for the device ({waits[0]})"
            elif self._hyperparameters() != before:
                entry.reason = "the step changes hyperparameters; call the scheduler's step() after it"
        for half in self._half:
            half.stepped()
        return result

    def _hyperparameters(self) -> list[Any]:
        optimizers = [training.optimizer for training in self._trainings]
        return [hyperparameters(optimizer)[0] for optimizer in optimizers if not obstacle(optimizer)]

    @contextlib.contextmanager
    def _beside(self) -> Iterator[None]:
        """Run on the stream that will capture, as torch asks of steps before a capture."""
        outer = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(outer)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            outer.wait_stream(self._stream)

    def _capture(self, entry: _Entry, arguments: Any) -> None:
        copies = {parameter: copy for half in self._half for parameter, copy in half.copies.items()}
        fused = {optimizer: FusedStep(optimizer, copies) for optimizer in self._fused}
        scalers = list({training.scaler: None for training in self._trainings if training.scaler.is_enabled()})
        before = pool_bytes(self._pool)
        try:
            entry.graph = CapturedStep(
                self._step, arguments, fused, self._half, scalers, self._watch, self._pool, self._stream
            )
        except NotCapturable as error:
            entry.reason = str(error)
        except Exception as error:  # whatever the step raises: it may be able to run where it cannot be captured
            message = str(error).strip().splitlines() or [""]
            entry.reason = f"capturing raised {type(error).__name__}: {message[0]}"
        if entry.graph is None:
            for fused_step in fused.values():
                fused_step.close()
            if not any(other.graph for other in self._entries.values()):
                self._new_pool()
            return
        entry.bytes = pool_bytes(self._pool) - before
        self.captures += 1

    # ----------------------------------------------------------------------------------------------------- control

    def reset(self, reason: str = "reset() was called") -> None:
        """Drop all captures and start anew. Nothing that was trained is lost."""
        self._restarts.append(reason)
        for entry in self._entries.values():
            if entry.graph is not None:
                entry.graph.close()
        for fused_step in self._fused.values():
            fused_step.close()
        self._entries.clear()
        self._fused.clear()
        self._start()

    def gradients(self) -> dict[str, torch.Tensor]:
        """Return the gradients of the last step by parameter name, float32, still multiplied by its loss scale."""
        half = {parameter: grad for weights in self._half for parameter, grad in weights.gradients.items()}
        named = {
            name: parameter for training in self._trainings for name, parameter in training.model.named_parameters()
        }
        found = {name: half.get(parameter, parameter.grad) for name, parameter in named.items()}
        return {name: grad.float() for name, grad in found.items() if grad is not None}

    def memory(self) -> int:
        """Return the bytes of device memory that the captures hold: activations, gradients, results."""
        return 0 if self._pool is None else pool_bytes(self._pool)

    def explain(self) -> str:
        """Return what is captured, what is not and why, and which parameters have half copies."""
        lines = [f"{self.captures} captures, {self.replays} replays, {_size(self.memory())}"]
        for entry in self._entries.values():
            if entry.graph is not None:
                state = f"captured, {entry.replays} replays, {_size(entry.bytes)}"
            elif entry.reason:
                state = f"runs as it is: {entry.reason}"
            else:
                state = f"warming up, {entry.warm} of {self._warmup}"
            lines.append(f"  {entry.shapes}: {state}")
        lines += [f"  started anew: {reason}" for reason in self._restarts]
        for half in self._half:
            lines.append(half.explain())
        return "\n".join(lines)


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"


@contextlib.contextmanager
def _noticed_waits(look: bool) -> Iterator[list[str]]:
    """Collect where the block waited for the device; other warnings pass."""
    waits: list[str] = []
    if not look:
        yield waits
        return
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode(before)
    for warning in caught:
        if _SYNCHRONIZES in str(warning.message):
            waits.append(f"{warning.filename}:{warning.lineno}")
        elif _PROTOTYPE not in str(warning.message):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
