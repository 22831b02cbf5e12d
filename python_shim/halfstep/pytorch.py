"""The PyTorch side of MixedPrecisionManager."""

from __future__ import annotations

import dataclasses
import functools
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from halfstep.autocast import AutocastContext
from halfstep.config import (
    MixedPrecisionConfig,
    check_bool,
    check_choice,
    check_count,
    check_number,
    check_scale,
)
from halfstep.grad_scaler import GradScaler
from halfstep.gradients import name_parameters
from halfstep.half_weights import RESIDUALS, HalfWeights
from halfstep.monitoring import SAMPLED_FIELDS, Monitor
from halfstep.policy import CustomPrecisionPolicy, PrecisionPlan, PrecisionPolicy
from halfstep.reductions import remove_half_norms, use_half_norms
from halfstep.scopes import apply_plan, planned_dtypes, remove_plan
from halfstep.shadow import obstacle, unwrapped
from halfstep.statistics import MixedPrecisionStatistics
from halfstep.step_graph import StepGraph, Training
from halfstep.underflow import Underflow
from halfstep.watched import Watched, take_out, watch

if TYPE_CHECKING:
    from halfstep.analysis_timeline import Timeline

_HALF_TYPES = {"mixed_float16": torch.float16, "mixed_bfloat16": torch.bfloat16}

_SCALER_FIELDS = ("overflow_events", "scale_adjustments", "steps", "skipped_steps", "loss_scale", "host_syncs")
_MEASURED_FIELDS = (*SAMPLED_FIELDS, "underflow_events")


class PyTorchManager:
    """Autocast, loss scaling, the half reductions and the plans of a PyTorch loop, from one configuration."""

    framework = "pytorch"

    def __init__(
        self, config: MixedPrecisionConfig, enable_loss_scaling: bool, monitor: bool, *, clip: bool, custom_policy: Any
    ) -> None:
        if not isinstance(custom_policy, (CustomPrecisionPolicy, PrecisionPolicy, type(None))):
            raise TypeError(
                f"custom_policy is {custom_policy!r}, expected an instance of a CustomPrecisionPolicy or a "
                "PrecisionPolicy"
            )
        self.config = config
        self._custom_policy = custom_policy
        self._loss_scaling = enable_loss_scaling
        self._monitoring = monitor
        self.monitor: Monitor | None = None  # of the latest setup
        self._clip = clip
        self._device_type: str | None = None  # the model's, once there is one
        self._scaler: GradScaler | None = None
        self._scaler_kind = ""
        self._models: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
        self._plans: weakref.WeakKeyDictionary[torch.nn.Module, PrecisionPlan] = weakref.WeakKeyDictionary()
        # Of all setups; neither models nor optimizers are kept alive.
        self._trainings: list[tuple[weakref.ref[Any], weakref.ref[Any], GradScaler]] = []
        self._half: weakref.WeakSet[HalfWeights] = weakref.WeakSet()  # of the captured steps
        self.timelines: list[Timeline] = []  # of the analyses that are running

    @property
    def device_type(self) -> str:
        """Where autocast acts: the model's device, before that the configured one if this machine has it."""
        if self._device_type is not None:
            return self._device_type
        if self.config.autocast_device_type == "cuda" and not torch.cuda.is_available():
            return "cpu"
        return self.config.autocast_device_type

    def setup(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, use_custom_policy: bool | None = None
    ) -> GradScaler:
        """Put the policy into the model and return the scaler for the loop. The optimizer is not changed."""
        if not isinstance(model, torch.nn.Module):
            raise TypeError(f"model is {type(model).__name__}, expected torch.nn.Module")
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer is {type(optimizer).__name__}, expected torch.optim.Optimizer")
        device_types = {parameter.device.type for parameter in model.parameters()}
        if not device_types <= {"cpu", "cuda"} or len(device_types) > 1:
            raise ValueError(
                f"the model's parameters are on {sorted(device_types)}, expected all on cpu or all on cuda"
            )
        if use_custom_policy is None:
            use_custom_policy = self._custom_policy is not None
        check_bool("use_custom_policy", use_custom_policy)
        if use_custom_policy and self._custom_policy is None:
            raise ValueError("use_custom_policy is True, but the manager was made without custom_policy")
        scaler_device = next(iter(device_types), self.device_type)
        plan = self._plan(model) if use_custom_policy else None
        kind = self._kind(self.config)
        if kind == "check" and self._loss_scaling and plan is not None and _has_float16(plan):
            kind = "scale"  # a float16 layer needs it wherever it stands
        scaler = self._make_scaler(scaler_device, kind, asks=plan is not None)
        self._device_type = scaler_device
        self._scaler, self._scaler_kind = scaler, kind
        self._models.add(model)
        name_parameters(model)
        self._apply_policy(model, plan)
        if self._monitoring:
            self._start_monitoring(model, scaler)
        others = [training for training in self._trainings if training[1]() not in (None, optimizer)]
        self._trainings = [*others, (weakref.ref(model), weakref.ref(optimizer), scaler)]
        if scaler_device == "cpu" and self.config.precision_policy == "mixed_float16":
            _warn_of_emulated_float16()
        return scaler

    def _plan(self, model: torch.nn.Module) -> PrecisionPlan:
        """Ask the custom policy. Its half is that of the configuration; under float32 there is nothing to ask for."""
        half = self.config.precision_policy.removeprefix("mixed_")
        if half == "float32":
            return PrecisionPolicy.named("float32").plan(model)
        if isinstance(self._custom_policy, PrecisionPolicy):
            plan = self._custom_policy.plan(model)
        else:
            plan = self._custom_policy.plan(model, half)
        planned_dtypes(model, plan)  # raises where apply_plan would
        return plan

    def plan_of(self, model: torch.nn.Module) -> PrecisionPlan | None:
        """Return the plan that setup() has applied to the model."""
        return self._plans.get(model)

    def _apply_policy(self, model: torch.nn.Module, plan: PrecisionPlan | None) -> None:
        """Let the model's layers run as the configuration and its plan say, whatever was set up before."""
        config = self.config
        half = _HALF_TYPES.get(config.precision_policy) if config.enable_autocast else None
        place = unwrapped(model)[0]
        watched = take_out(place, Watched)
        try:
            if plan is not None or self._plans.pop(model, None) is not None:
                remove_plan(model)  # one that the user has applied stays
            use_half_norms(model, config.half_reductions if half is not None else ())
            if plan is not None:
                self._plans[model] = plan
                if half is not None:
                    apply_plan(model, plan, half)
        finally:
            if watched is not None:  # the same object: compiled code and captured steps know it
                watch(place, watched)

    def _start_monitoring(self, model: torch.nn.Module, scaler: GradScaler) -> None:
        """Sample the training of this model from now on, and that of no other."""
        if self.monitor is not None:  # its Watched stays where it is: a forward that is replaced is captured anew
            self.monitor.note = "another model was set up"
        mixed = self.config.precision_policy != "float32"
        place, inside = unwrapped(model)
        self.monitor = Monitor(scaler, obstacle(inside) if mixed else "the policy is float32: both runs would be one")
        if self._scaler_kind == "scale" or (self.config.precision_policy == "mixed_float16" and scaler.is_enabled()):
            self.monitor.gradients = scaler._underflow = Underflow()
        watched = place.__dict__.get("forward")
        if not isinstance(watched, Watched) or watched.module is not place:
            watched = None if self.monitor.note else watch(place)
        if watched is not None:
            watched.monitor = self.monitor

    def remove_policy(self, model: torch.nn.Module) -> None:
        """Take out of the model what setup() has put in."""
        if not isinstance(model, torch.nn.Module):
            raise TypeError(f"model is {type(model).__name__}, expected torch.nn.Module")
        self._models.discard(model)
        watched = take_out(unwrapped(model)[0], Watched)
        if watched is not None and watched.monitor is not None:
            watched.monitor.note = "remove_policy() has ended it"
        if self._plans.pop(model, None) is not None:
            remove_plan(model)
        remove_half_norms(model)
        self.config = dataclasses.replace(self.config)  # another object: captured steps are captured anew

    def _kind(self, config: MixedPrecisionConfig) -> str:
        """Return what the scaler is for: to "scale" the loss, to "check" gradients without a scale, or for nothing."""
        if config.precision_policy == "mixed_float16" and self._loss_scaling:
            return "scale"
        return "check" if config.precision_policy != "float32" and config.numerical_stability_check else "nothing"

    def _make_scaler(self, device_type: str, kind: str, *, asks: bool) -> GradScaler:
        config = self.config
        policy = self._custom_policy
        asks = asks and isinstance(policy, CustomPrecisionPolicy) and policy.chooses_loss_scale()
        if kind == "scale":
            scaler = GradScaler(
                device_type,
                init_scale=config.loss_scale,
                growth_factor=config.loss_scale_growth_factor,
                backoff_factor=config.loss_scale_backoff_factor,
                growth_interval=config.loss_scale_growth_interval,
                scale_from_norm=policy.get_loss_scale_factor if asks else None,
                name_overflows=self._monitoring,
            )
        elif kind == "check":  # multiply by 1, but still skip steps with infinite or NaN gradients
            scaler = GradScaler(
                device_type, init_scale=1.0, min_scale=1.0, max_scale=1.0, name_overflows=self._monitoring
            )
        else:
            scaler = GradScaler(device_type, enabled=False)
        self._set_clipping(scaler)
        return scaler

    def _set_clipping(self, scaler: GradScaler) -> None:
        threshold = self.config.gradient_clipping_threshold
        scaler._max_norm = threshold if self._clip and threshold != float("inf") else None

    def autocast_context(self) -> AutocastContext:
        """Return a new context manager for the forward pass."""
        for timeline in self.timelines:
            timeline.tick()
        half = _HALF_TYPES.get(self.config.precision_policy)
        enabled = half is not None and self.config.enable_autocast
        return AutocastContext(
            self.device_type,
            dtype=half or torch.bfloat16,
            enabled=enabled,
            half_cross_entropy="cross_entropy" in self.config.half_reductions,
        )

    def capture(
        self,
        step: Callable[..., Any],
        example: tuple[Any, ...] | None,
        *,
        residual: str,
        half_weights: bool,
        recheck: str,
        warmup: int,
        max_graphs: int,
        copy_outputs: bool,
    ) -> StepGraph:
        """Return the step as one that is captured and replayed. Parameters: MixedPrecisionManager.capture."""
        if not callable(step):
            raise TypeError(f"step is {type(step).__name__}, expected a function that trains one step")
        check_choice(*RESIDUALS)("residual", residual)
        check_choice("version", "always")("recheck", recheck)
        check_bool("half_weights", half_weights)
        check_bool("copy_outputs", copy_outputs)
        check_number("an integer >= 2", lambda value: value >= 2 and int(value) == value)("warmup", warmup)
        check_count("max_graphs", max_graphs)
        if example is not None and not isinstance(example, tuple):
            raise TypeError(f"example is {type(example).__name__}, expected a tuple: the arguments of one step")
        trainings = [Training(model(), optimizer(), scaler) for model, optimizer, scaler in self._trainings]
        trainings = [
            training for training in trainings if training.model is not None and training.optimizer is not None
        ]
        if not trainings:
            raise RuntimeError(
                "capture() needs to know model, optimizer and scaler: call setup_pytorch_training() first"
            )
        models = list({training.model: None for training in trainings})

        def make_half() -> list[HalfWeights]:
            dtype = _HALF_TYPES.get(self.config.precision_policy)
            if not half_weights or dtype is None or not self.config.enable_autocast:
                return []
            return [self._half_of(model, dtype, residual, always=recheck == "always") for model in models]

        graph = StepGraph(
            step,
            trainings,
            make_half,
            lambda: self.config,
            warmup=warmup,
            max_graphs=max_graphs,
            copy_outputs=copy_outputs,
            timelines=self.timelines,
        )
        if example is not None:
            graph.expect(example)
        return graph

    def _half_of(self, model: torch.nn.Module, dtype: torch.dtype, residual: str, *, always: bool) -> HalfWeights:
        """Return the model's half weights, the same ones for all captured steps that ask for the same kind."""
        for half in self._half:
            same = half.model is model and (half.dtype, half.residual, half.always) == (dtype, residual, always)
            if same and half.is_current():
                return half
        half = HalfWeights(model, dtype, residual, always=always)
        self._half.add(half)
        return half

    def invalidate(self) -> None:
        """Copy all half weights anew."""
        for half in self._half:
            half.refresh(everything=True)

    def apply_config(self, config: MixedPrecisionConfig, changed: set[str]) -> None:
        """Put a checked new configuration into force, on the running scaler and the models of setup() too."""
        scaler = self._scaler
        if scaler is not None and self._kind(config) != self._kind(self.config):
            raise ValueError(
                "precision_policy and numerical_stability_check decide whether the scaler scales, checks or does "
                "nothing; after setup_pytorch_training that cannot change. Make a new MixedPrecisionManager."
            )
        self.config = config
        if changed & {"precision_policy", "enable_autocast", "half_reductions"}:  # scopes that stay need no recompiling
            for model in self._models:
                self._apply_policy(model, self._plan(model) if model in self._plans else None)
        self._clip |= "gradient_clipping_threshold" in changed
        if scaler is None:
            return
        if self._scales:
            scaler.set_growth_factor(config.loss_scale_growth_factor)
            scaler.set_backoff_factor(config.loss_scale_backoff_factor)
            scaler.set_growth_interval(config.loss_scale_growth_interval)
            if "loss_scale" in changed:
                self._scaler.set_scale(config.loss_scale)
        self._set_clipping(scaler)

    @property
    def _scales(self) -> bool:
        return (self._scaler_kind or self._kind(self.config)) == "scale"

    def adjust_loss_scale(self, factor: float) -> None:
        """Multiply the loss scale by `factor`, a finite number > 0, within float32 (reads the scale on the host)."""
        check_number("a finite number > 0", lambda value: 0 < value < float("inf"))("factor", factor)
        if not self._scales:
            return
        scale = (self.config.loss_scale if self._scaler is None else self._scaler.get_scale()) * factor
        try:
            check_scale("the loss scale", scale)
        except ValueError as error:
            raise ValueError(f"factor is {factor!r}: {error}") from None
        if self._scaler is None:
            self.config.loss_scale = scale
        else:
            self._scaler.set_scale(scale)

    def statistics(self) -> MixedPrecisionStatistics:
        """Return what was measured so far (waits for the device)."""
        result = MixedPrecisionStatistics(self.framework, self.config.precision_policy)
        scaler = self._scaler
        unknown: dict[str, str] = {}
        if not self._monitoring:
            reason = "monitoring is off (enable_monitoring=False)"
            unknown.update(dict.fromkeys((*_MEASURED_FIELDS, *_SCALER_FIELDS), reason))
        elif scaler is None:
            reason = "setup_pytorch_training has not been called"
            unknown.update(dict.fromkeys((*_MEASURED_FIELDS, *_SCALER_FIELDS), reason))
        elif not scaler.is_enabled():
            unknown.update(dict.fromkeys(_SCALER_FIELDS, "the policy checks no gradients, so no steps were counted"))
        else:
            counters = scaler.counters()
            result.steps = counters["steps"]
            result.skipped_steps = result.overflow_events = counters["skipped"]
            result.scale_adjustments = counters["growths"] + counters["backoffs"]
            result.loss_scale = scaler.get_scale()
            result.host_syncs = scaler.host_syncs
        if self.monitor is not None:
            unknown.update(self.monitor.fill(result))
        result.notes = unknown
        return result


def _has_float16(plan: PrecisionPlan) -> bool:
    return any(layer.precision == "float16" for layer in plan.layers())


@functools.cache
def _warn_of_emulated_float16() -> None:
    """Warn, once, on a processor without float16 arithmetic."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return
    if not any(flag in flags for flag in ("avx512_fp16", "amx_fp16", "asimdhp")):
        warnings.warn(
            "mixed_float16 on this processor: it has no float16 arithmetic, so float16 will be slower than float32. "
            "mixed_bfloat16 is the better policy here.",
            stacklevel=4,
        )
