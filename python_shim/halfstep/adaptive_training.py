"""One model that an AdaptivePrecisionManager trains: what is looked at, when it is decided, and the batch in hand."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import weakref
from typing import Any

import torch
from torch import nn

from halfstep._library import load_library
from halfstep.adaptive_plan import Installed, base_plan, watched_layers
from halfstep.adaptive_scaling import LossScaling
from halfstep.autocast import AutocastContext
from halfstep.calls import without_compiler
from halfstep.checkpoints import check_keys
from halfstep.grad_scaler import GradScaler
from halfstep.gradients import name_parameters
from halfstep.host_copy import send
from halfstep.layer_watch import watch_outputs, watching
from halfstep.policy import PrecisionPlan
from halfstep.scopes import cast
from halfstep.step_graph import runs_as_it_is

load_library()
_ops = torch.ops.halfstep

_DECISION = ("batch", "layer", "from", "to", "score", "hold", "reason")
_LAYER = ("name", "state", "hold", "left", "demotions", "promotions", "score", "reason")
_COUNTS = (
    "batches",
    "sampled_batches",
    "unstable_batches",
    "fallback_batches",
    "demotions",
    "promotions",
    "trials",
)
_COUNT_OF = {"float32": "demotions", "trial": "trials", "half": "promotions"}
_MODEL = 0  # the number of the layer "", which is the model
_DECISIONS_KEPT = 1000
_LAG = 2
_OWNER = "AdaptivePrecisionManager"
# So many skipped steps in a row of a GradScaler are looked into at once.
_SKIPS_LOOKED_INTO = 3
_CONSECUTIVE_SKIPPED = 2  # in GradScaler's counters
_LOWEST_SCALE = 1.0


@dataclasses.dataclass(frozen=True)
class Settings:
    """What AdaptivePrecisionManager was made with."""

    stability_threshold: float
    interval: int
    gradients: bool
    half: torch.dtype
    sampling_interval: int
    hold: int
    max_hold: int
    policy: Any
    initial_loss_scale: float
    process_group: Any


class AdaptiveTraining:
    """The state of one model's training. Between begin() and end() a batch is open."""

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        devices = {parameter.device.type for parameter in model.parameters()}
        if not devices <= {"cpu", "cuda"} or len(devices) > 1:
            raise ValueError(f"the model's parameters are on {sorted(devices)}, expected all on cpu or all on cuda")
        self._settings = settings
        self._model = weakref.ref(model)
        name_parameters(model)
        base = base_plan(model, settings.half, settings.policy)
        self._monitor = torch.classes.halfstep.StabilityMonitor(
            base._plan, settings.stability_threshold, settings.hold, settings.max_hold, _LOWEST_SCALE
        )
        self._watched: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary(
            watched_layers(model, base)
        )
        self._installed = Installed(model, self, settings.half, base, settings.policy)
        self._scaling: LossScaling | None = None
        self._counts = dict.fromkeys(_COUNTS, 0)
        self._decisions: collections.deque[dict[str, Any]] = collections.deque(maxlen=_DECISIONS_KEPT)
        self._new = []
        self._sample_next = True
        self._skips = _SkipCounter()
        self.is_open = False

    @property
    def in_fp32(self) -> bool:
        """Whether the latest batch has fallen back."""
        return self._scaling is not None and self._scaling.in_fp32

    # --------------------------------------------------------------------------------------------------- the batch

    def begin(self, batch: int, scaler: Any) -> None:
        """Open a batch."""
        if self.is_open:
            raise RuntimeError("a precision context of this model is open already")
        model = self._alive()
        if self._scaling is None:
            self._scaling = self._make_scaling(model)
        self._looks_into_skips = self._skips.in_a_row() >= _SKIPS_LOOKED_INTO
        regular = (self._counts["batches"] + 1) % self._settings.sampling_interval == 0  # the last one of an interval
        self._sampled = self._sample_next or regular or self._looks_into_skips
        self._batch = batch
        self._new: list[dict[str, Any]] = []
        self._seen = self._unstable = False
        self._scaling.open()
        if scaler is not None and scaler.is_enabled():
            self._scaling.other_scaler = scaler
        self.is_open = True
        runs_as_it_is.append(self.watches)
        if self._sampled:
            self._monitor.reset()

    def _make_scaling(self, model: nn.Module) -> LossScaling:
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        scales = self._settings.half is torch.float16
        if scales:
            # Below that it would only shrink gradients; what still overflows there is a layer's fault.
            scale = self._settings.initial_loss_scale
            rule = {"init_scale": scale, "min_scale": min(_LOWEST_SCALE, scale)}
        else:
            rule = {"init_scale": 1.0, "min_scale": 1.0, "max_scale": 1.0}
        return LossScaling(model, GradScaler(device.type, name_overflows=True, **rule), device, scales=scales)

    def watches(self) -> bool:
        """Whether calls of the model in the open batch are looked at, and cannot be replays of a captured one."""
        return self.is_open and (self._sampled or self.in_fp32)

    def run(self, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the model for the open batch."""
        model = self._alive()
        device = next((parameter.device.type for parameter in model.parameters()), "cpu")
        # Where the loop has autocast around model and loss, results stay as it wants them.
        outer = torch.is_autocast_enabled(device)
        used = torch.get_autocast_dtype(device)
        if outer and not self.in_fp32 and used is not self._settings.half:
            raise ValueError(
                f"autocast is on for {used}, but this AdaptivePrecisionManager adapts {self._settings.half}: make it "
                f'with precision="{str(used).removeprefix("torch.")}"'
            )
        looked_at = self.watches() and torch.is_grad_enabled()
        with contextlib.ExitStack() as stack:
            if self.in_fp32:
                for kind in ("cpu", "cuda"):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            elif not outer:
                stack.enter_context(AutocastContext(device, dtype=self._settings.half))
            if looked_at:
                self._seen = True
                stack.enter_context(without_compiler(model))
                gradients = self._settings.gradients and not self.in_fp32
                stack.enter_context(watching(self._monitor, self._watched, gradients=gradients))
            result = forward(*args, **kwargs)
            if looked_at:
                watch_outputs(self._monitor, _MODEL, result, gradients=False)
        return result if outer else cast(result, torch.float32)

    def is_stable(self, loss: torch.Tensor) -> bool:
        """Return whether the loss is finite on all ranks (waits)."""
        found = torch.zeros((), dtype=torch.float32, device=loss.device)
        norm, one = torch.zeros_like(found), torch.full_like(found, 1.0)
        with torch.no_grad():
            _ops.check_gradients_([loss.detach()], one, found, norm)
        if self._largest_of_ranks(found).item() == 0.0:
            return True
        if not self._unstable:
            self._unstable = True
            self._counts["unstable_batches"] += 1
            if self._seen and not self.in_fp32:
                self._observe("unstable")
        return False

    def fall_back(self) -> None:
        """Run the rest of the batch in float32."""
        if self.in_fp32:
            return
        self._counts["fallback_batches"] += 1
        self._scaling.in_fp32 = True
        self._seen = False
        self._monitor.reset()

    def end(self, *, failed: bool) -> list[dict[str, Any]]:
        """Close the batch, decide if it is time, and return what was decided in it."""
        self.is_open = False
        runs_as_it_is.remove(self.watches)
        self._scaling.close()
        if failed:
            self._sample_next = True
        else:
            self._sample_next &= not self._seen
            self._scaling.finish()
            self._counts["batches"] += 1
            self._look()
        self._skips.follow(self._scaling.other_scaler or self._scaling.scaler)
        self._sample_next |= self._demoted() or self._unstable
        if self._new:
            self._installed.apply(self._alive(), self.plan())
        self._decisions.extend(self._new)
        return self._new

    # ------------------------------------------------------------------------------------------------- decisions

    def _look(self) -> None:
        """Read what was seen in the batch, and decide at the end of an interval. The same on every rank."""
        if self._seen and self.in_fp32:
            self._observe("float32")
        elif self._seen and not self._unstable:
            self._counts["sampled_batches"] += 1
            self._observe("usual")
        due = self._counts["batches"] % self._settings.interval == 0
        if not due and not (self._looks_into_skips and self._seen):
            return
        scale = self._loss_scale()
        if due or scale <= _LOWEST_SCALE:
            self._note(self._monitor.decide(self._batch, scale))
            if self._scaling.scales and scale <= _LOWEST_SCALE and self._demoted():  # what held it down is mended
                self._scaling.scaler.set_scale(self._settings.initial_loss_scale)

    def _demoted(self) -> bool:
        return any(decision["to"] == "float32" != decision["from"] for decision in self._new)

    def _observe(self, kind: str) -> None:
        summary = self._largest_of_ranks(self._monitor.summary())
        self._note(self._monitor.observe(self._batch, summary, kind))

    def _note(self, decisions: list[tuple[Any, ...]]) -> None:
        for decision in (dict(zip(_DECISION, values, strict=True)) for values in decisions):
            self._new.append(decision)
            if (decision["from"], decision["to"]) == ("float32", "half"):
                self._counts["demotions"] -= 1  # it is taken back
            elif decision["from"] != decision["to"]:
                self._counts[_COUNT_OF[decision["to"]]] += 1

    def _largest_of_ranks(self, values: torch.Tensor) -> torch.Tensor:
        """Return the maximum over the ranks that decide together, element by element."""
        distributed = torch.distributed
        group = self._settings.process_group
        if group is False or not (distributed.is_available() and distributed.is_initialized()):
            return values
        model = self._alive()
        if group is None and isinstance(model, nn.parallel.DistributedDataParallel):
            group = model.process_group
        # NCCL takes no memory of a CPU, nor of another GPU than this rank's, which need not be the current one.
        device: torch.device | str = "cpu"
        if distributed.get_backend(group) == "nccl":
            device = next((each.device for each in model.parameters() if each.is_cuda), "cuda")
        shared = values.to(device, copy=True)
        distributed.all_reduce(shared, op=distributed.ReduceOp.MAX, group=group)
        return shared.to(values.device)

    def _loss_scale(self) -> float:
        scaler = self._scaling.other_scaler
        return (self._scaling.scaler if scaler is None else scaler).get_scale()

    # ------------------------------------------------------------------------------------------------- the whole

    def _alive(self) -> nn.Module:
        model = self._model()
        if model is None:
            raise RuntimeError("the model of this precision context does not exist any more")
        return model

    def plan(self) -> PrecisionPlan:
        """Return the plan of now."""
        return PrecisionPlan._of(self._monitor.plan())

    def release(self) -> None:
        """Take everything out of the model."""
        if self.is_open:
            raise RuntimeError("a precision context of this model is open")
        model = self._model()
        if model is not None:
            self._installed.remove(model)

    def statistics(self) -> dict[str, Any]:
        """Return AdaptivePrecisionManager.get_adaptation_stats()."""
        layers = [dict(zip(_LAYER, values, strict=True)) for values in self._monitor.layers()]
        report = None if self._scaling is None else self._scaling.scaler.last_step(wait=True)
        skipped = 0
        if self._scaling is not None:
            self._scaling.finish()
            skipped = self._scaling.skipped_in_fp32 + self._scaling.scaler.counters()["skipped"]
            other = self._scaling.other_scaler
            skipped += other.counters()["skipped"] if isinstance(other, GradScaler) else 0
        return {
            "fp16_ratio": self._monitor.half_share(),
            "layers": {layer.pop("name"): layer for layer in layers if layer["state"] != "fixed"},
            **self._counts,
            "skipped_steps": skipped,
            "loss_scale": self._settings.initial_loss_scale if self._scaling is None else self._loss_scale(),
            "overflowed": () if report is None else report.overflowed,
            "decisions": list(self._decisions) + (self._new if self.is_open else []),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        scaler = None if self._scaling is None else self._scaling.scaler.state_dict()
        return {"layers": self._monitor.to_json(), "counts": dict(self._counts), "scaler": scaler}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        check_keys("", state_dict, ("layers", "counts", "scaler"), owner=_OWNER)
        check_keys("['counts']", state_dict["counts"], _COUNTS, owner=_OWNER)
        if self.is_open:
            raise RuntimeError("a precision context of this model is open")
        model = self._alive()
        if state_dict["scaler"] is not None:
            scaling = self._make_scaling(model)
            scaling.scaler.load_state_dict(state_dict["scaler"])
        self._monitor.restore(state_dict["layers"])
        if state_dict["scaler"] is not None:
            self._scaling = scaling
        self._counts = dict(state_dict["counts"])
        self._installed.apply(model, self.plan())
        self._sample_next = True


class _SkipCounter:
    """How many steps in a row a GradScaler has skipped, as of two batches before.

    So every rank knows the same, and the host waits for nothing that the device has still to begin. torch's scaler
    counts no skips, but each one lowers its scale.
    """

    def __init__(self) -> None:
        self._copies: collections.deque[tuple[torch.Tensor, torch.cuda.Event | None]] = collections.deque()
        self._scale = 0.0
        self._falls = 0

    def follow(self, scaler: Any) -> None:
        """Send the count of now to the host."""
        counters = getattr(scaler, "_counters", None)
        counters = scaler._scale if counters is None else counters
        if counters is None:
            return
        self._copies.append(send(counters))

    def in_a_row(self) -> int:
        """Return the count."""
        if len(self._copies) < _LAG:
            return 0
        copy, event = self._copies.popleft()
        if event is not None:
            event.synchronize()
        if copy.dim():
            return int(copy[_CONSECUTIVE_SKIPPED].item())
        scale = float(copy.item())
        self._falls = self._falls + 1 if scale < self._scale else 0
        self._scale = scale
        return self._falls
