"""halfstep's GradScaler: torch.amp.GradScaler with one-read checks, a fused step, a richer scale rule and a memory.

It is a subclass: protocol, errors and checkpoints are torch's. What differs is under the hood (the ops of the compiled
library) and in the additions that the class names.
"""

from __future__ import annotations

import contextlib
import functools
import numbers
import warnings
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch.amp.grad_scaler import OptState, _refresh_per_optimizer_state

from halfstep.config import check_scale
from halfstep.errors import ScaleCollapsed
from halfstep.gradients import (
    check_gradient,
    count_in_words,
    element_count,
    local_shard,
    moved,
    named_parameters,
    parameters_of,
    reduce_over_meshes,
)
from halfstep.optimizer import (
    FusedStep,
    current,
    fused_step,
    has_step_hooks,
    is_half,
    keep_masters,
    obstacle,
    release,
)
from halfstep.scaler_state import ScalerState

_ops = torch.ops.halfstep

# Columns of the gradient statistics: csrc/include/halfstep/gradients.h.
GRADIENT_STATISTICS = ("non_finite", "max_magnitude", "sum_of_squares", "zeros", "below_half", "elements")


class GradScaler(ScalerState):
    """A drop-in for torch.amp.GradScaler.

    The first six parameters are torch's. With them alone the scale moves exactly as torch's does, bit for bit.

    min_scale, max_scale: bounds of the scale, 0 and the largest float32 by default.
    hysteresis: how many overflows a credit tolerates before the scale backs off; 1: every overflow backs off.
    refill: when the credit is restored: "on_growth", "on_clean_step" or "on_clean_step_and_backoff".
    growth_delay: clean steps after the start or an overflow that do not count towards growth_interval.
    allow_fp16_gradients: unscale float16 gradients (of float16 parameters) instead of raising as torch does.
    master_state: step float16 and bfloat16 parameters of Adam, AdamW and SGD through float32 masters: their states are
        float32, and optimizer.state[parameter]["master"] holds what the parameter is rounded from; so updates that are
        too small for the parameter's own dtype add up. A step that needs torch raises then. float16 gradients are
        accepted. Values written to a parameter reach its master with the next step (seen by the version that torch
        counts; not those written through `.data`). Call prepare(optimizer) before optimizer.load_state_dict().
        halfstep.release(optimizer), and a step that torch takes by itself, end it and round the states.
    max_consecutive_skips: raise ScaleCollapsed after so many skipped steps in a row, naming the parameters with the
        most infinite or NaN elements. This reads one counter on the host at each update(). None: never.

    name_overflows: let last_step() name the parameters with infinite or NaN gradients (the check then keeps statistics
        per parameter, which takes it up to a third longer).
    scale_from_norm: the loss scale as a function of the gradients' L2 norm, such as a policy's get_loss_scale_factor.
        update() asks it with the norm of the newest applied step before the one that ends: it never waits for that one.
        None leaves the scale as the rule has it. After an overflow no more than the backed-off scale is granted, until
        the rule's growth has raised that limit. It is not asked where there is no norm (sharded gradients). Not part of
        a checkpoint, but where it stands is. A CUDA graph that holds update() needs after_replay() after each replay;
        StepGraph does that.

    Beyond torch: bfloat16 (and all other floating) gradients may be mixed in one optimizer on every device; an
    overflow that unscaling itself makes is found; a step that overflowed on two devices is skipped by fused
    optimizers too; gradients that were freed, resized or added between unscale_() and step() are an error;
    last_step(), counters() and history() tell what happened. Adam, AdamW and SGD are stepped by halfstep's own kernels:
    gradients are read twice and never written, so that they stay scaled after step(), and nothing waits for the device.
    With step hooks they are unscaled and clipped in place first, as the hooks would see them without halfstep.
    """

    def prepare(self, optimizer: torch.optim.Optimizer) -> None:
        """Make the optimizer known before its first step. Of use only with master_state=True, before a checkpoint.

        optimizer.load_state_dict() rounds the states of half parameters, unless it is known that they are float32.
        """
        if self._master_state and not obstacle(optimizer):
            keep_masters(optimizer)

    def _refuse_without_masters(self, optimizer: torch.optim.Optimizer, reason: str) -> None:
        """Raise if torch would have to step parameters that were to have masters."""
        if self._master_state and any(is_half(param) for group in optimizer.param_groups for param in group["params"]):
            raise RuntimeError(
                f"GradScaler.step: master_state=True, but {type(optimizer).__name__} cannot be stepped through float32 "
                f"masters: {reason}. Nothing was stepped."
            )

    def scale(self, outputs: Any) -> Any:
        """Multiply a tensor, or each tensor of an iterable, by the scale."""
        if self._enabled and not self._warned_of_autocast and torch.is_autocast_enabled(self._device):
            self._warned_of_autocast = True
            warnings.warn(
                "GradScaler.scale() was called where autocast is on: if backward() runs there too, its products are "
                "cast to half once more. Leave the autocast context before scale(loss).backward().",
                stacklevel=2,
            )
        return super().scale(outputs)

    def _check_gradients(
        self,
        optimizer: torch.optim.Optimizer,
        scale: torch.Tensor,
        found: torch.Tensor,
        *,
        allow_fp16: bool,
        unscale: bool,
    ) -> dict[torch.device, torch.Tensor]:
        """Read the gradients once and return the flag of each device.

        With `unscale`, `scale` is the inverse of the loss scale and the gradients are replaced by the unscaled ones.
        """
        named = [(name, parameter) for name, parameter in named_parameters(optimizer) if parameter.grad is not None]
        for name, parameter in named:  # all of them, before anything is written
            check_gradient(name, parameter.grad, allow_fp16=allow_fp16, written=unscale)
        by_device: dict[torch.device, list[torch.Tensor]] = defaultdict(list)
        names: dict[torch.device, list[str]] = defaultdict(list)
        meshes: dict[torch.device, dict[Any, None]] = {}
        with torch.no_grad():
            for name, parameter in named:
                mesh, grad = local_shard(parameter.grad)
                if mesh is not None:
                    meshes.setdefault(grad.device, {})[mesh] = None
                if grad.is_sparse:
                    if grad.dtype is torch.float16:  # duplicate indices can overflow only when they are summed
                        grad = parameter.grad = grad.coalesce()
                    grad = grad._values()
                by_device[grad.device].append(grad)
                names[grad.device].append(name)
            counts = [element_count(parameter) for parameter in parameters_of(optimizer)]

            state = self._per_optimizer_states[id(optimizer)]
            founds: dict[torch.device, torch.Tensor] = {}
            norms: list[torch.Tensor] = []
            statistics: list[tuple[list[str], torch.Tensor]] = []
            for device, grads in by_device.items():
                flag = found.to(device, copy=True)
                norm = torch.empty((), dtype=torch.float32, device=device)
                table = None
                if self._statistics:
                    table = torch.empty((len(grads), len(GRADIENT_STATISTICS)), dtype=torch.float32, device=device)
                    statistics.append((names[device], table))
                local_scale = moved(scale, device)
                if self._underflow is not None and device not in meshes:
                    self._underflow.look(device, len(grads), functools.partial(_ops.check_gradients_, grads))
                if unscale:
                    _ops.unscale_(grads, local_scale, flag, norm, table, scale_is_inverse=True)
                else:
                    _ops.check_gradients_(grads, local_scale, flag, norm, table)
                founds[device] = flag
                norms.append(norm)
                if device in meshes:
                    reduce_over_meshes(flag, meshes[device])
        state.update(norms=norms, sharded=bool(meshes), elements=counts, statistics=statistics)
        return founds

    def _unscale_grads_(
        self, optimizer: torch.optim.Optimizer, inv_scale: torch.Tensor, found_inf: torch.Tensor, allow_fp16: bool
    ) -> dict[torch.device, torch.Tensor]:
        allow_fp16 = allow_fp16 or self._allow_fp16_gradients or self._master_state
        return self._check_gradients(optimizer, inv_scale, found_inf, allow_fp16=allow_fp16, unscale=True)

    def _check_inf_per_device(self, optimizer: torch.optim.Optimizer) -> dict[torch.device, torch.Tensor]:
        scale, _ = self._check_scale_growth_tracker("_check_inf_per_device")
        found = torch.zeros((), dtype=torch.float32, device=scale.device)
        founds = self._check_gradients(optimizer, scale, found, allow_fp16=True, unscale=False)
        self._per_optimizer_states[id(optimizer)]["found_inf_per_device"] = founds
        self._combine_devices(optimizer)
        return self._per_optimizer_states[id(optimizer)]["found_inf_per_device"]

    def _combine_devices(self, optimizer: torch.optim.Optimizer) -> None:
        """Make one flag of several devices' flags. torch adds them, and its fused optimizers skip on exactly 1."""
        state = self._per_optimizer_states.get(id(optimizer)) if self._enabled else None
        founds = state["found_inf_per_device"] if state else {}
        if len(founds) > 1:
            device = self._scale.device
            combined = _ops.combine_found([moved(found, device) for found in founds.values()])
            state["found_inf_per_device"] = {device: combined}

    @contextlib.contextmanager
    def _no_trace_of_a_refusal(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Drop the record that torch has begun for an optimizer whose gradients were then refused unread."""
        known = id(optimizer) in self._per_optimizer_states if self._enabled else True
        try:
            yield
        except BaseException:
            if not known and self._per_optimizer_states[id(optimizer)]["stage"] is OptState.READY:
                del self._per_optimizer_states[id(optimizer)]
            raise

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the optimizer's gradients by the scale, once before step(). A refusal changes nothing."""
        if not self._enabled:
            self._unscaled_while_disabled.add(id(optimizer))  # step() must not clip by itself then
            return
        recorder = getattr(current, "recorder", None)
        if recorder is not None:
            recorder.before_unscale(optimizer)
        with self._no_trace_of_a_refusal(optimizer):
            super().unscale_(optimizer)

    def _maybe_opt_step(
        self, optimizer: torch.optim.Optimizer, optimizer_state: dict[str, Any], *args: Any, **kwargs: Any
    ) -> float | None:
        self.host_syncs += 1
        return super()._maybe_opt_step(optimizer, optimizer_state, *args, **kwargs)

    def step(
        self, optimizer: torch.optim.Optimizer, *args: Any, max_norm: float | None = None, **kwargs: Any
    ) -> float | None:
        """Unscale the gradients unless unscale_() has, and step the optimizer unless one of them is infinite or NaN.

        max_norm: clip the L2 norm of this optimizer's unscaled gradients first.
        Returns what optimizer.step() returns, None for a skipped step. Further arguments go to optimizer.step().
        """
        is_number = isinstance(max_norm, numbers.Real) and not isinstance(max_norm, bool)  # NumPy's too
        if max_norm is not None and not (is_number and max_norm > 0):
            raise ValueError(f"GradScaler.step: max_norm is {max_norm!r}, expected a number > 0")
        if args and isinstance(args[0], numbers.Real):
            raise TypeError(f"GradScaler.step: got {args[0]!r} for the optimizer's closure; the norm is max_norm=")
        # Not [...]: that would leave a record of a step that then raises.
        state = self._per_optimizer_states.get(id(optimizer)) if self._enabled else None
        state = state or {"stage": OptState.READY}
        if state["stage"] is OptState.UNSCALED:
            self._check_unchanged(optimizer, state)
        elif max_norm is None and id(optimizer) not in self._unscaled_while_disabled:
            max_norm = self._max_norm
        self._unscaled_while_disabled.discard(id(optimizer))
        ours = self._enabled and not args and not kwargs and state["stage"] is not OptState.STEPPED
        if not ours and state["stage"] is not OptState.STEPPED:
            reason = "step() got further arguments" if self._enabled else "the scaler is disabled"
            self._refuse_without_masters(optimizer, reason)
        if ours and self._fused_step(optimizer, max_norm):
            torch.clear_autocast_cache()
            return None
        if max_norm is not None and "closure" not in kwargs and state["stage"] is not OptState.STEPPED:
            if self._enabled and state["stage"] is OptState.READY:
                self.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(parameters_of(optimizer), max_norm)
        self._combine_devices(optimizer)
        with self._no_trace_of_a_refusal(optimizer):
            result = super().step(optimizer, *args, **kwargs)
        # An enclosing autocast region must not go on with casts of the weights as they were.
        torch.clear_autocast_cache()
        return result

    def _fused_step(self, optimizer: torch.optim.Optimizer, max_norm: float | None) -> bool:
        """Check, unscale, clip and step in two reads of the gradients; False, and nothing done, where torch must."""
        scale, _ = self._check_scale_growth_tracker("step")
        recorder = getattr(current, "recorder", None)
        torch_is_fused = all(group.get("fused") for group in optimizer.param_groups)
        reason = obstacle(optimizer)
        if not reason:
            if self._master_state:
                keep_masters(optimizer)
            fused = fused_step(optimizer)
            reason = fused.collect(optimizer, allow_float16=self._allow_fp16_gradients or torch_is_fused)
            if not reason and not fused.has_gradients():
                return False  # torch's error
        if reason:
            self._refuse_without_masters(optimizer, reason)
            if recorder is None:
                release(optimizer)
            else:
                recorder.refused(optimizer, reason)
            return False
        known = self._per_optimizer_states.get(id(optimizer))
        ready = known is None or known["stage"] is OptState.READY
        if not torch_is_fused and has_step_hooks(optimizer):
            if recorder is not None:
                recorder.reason = f"{type(optimizer).__name__} has step hooks, which run on the host"
            # The hooks see the gradients that torch would show them.
            if ready:
                self.unscale_(optimizer)
                ready = False
            if max_norm is not None:
                torch.nn.utils.clip_grad_norm_(parameters_of(optimizer), max_norm)
                max_norm = None
            fused.collect(optimizer, allow_float16=True)  # half ones were replaced
        state = self._per_optimizer_states[id(optimizer)]
        if ready:
            if self._underflow is not None:
                for part in fused.parts:
                    self._underflow.look(part.device, part.fused.count(), part.fused.check)
            norms = self._check_collected(fused, state, scale)
        elif max_norm is not None:
            one = torch.ones((), dtype=torch.float32, device=scale.device)
            norms = self._check_collected(fused, {}, one)  # of the gradients as they are now
        norm = None
        if max_norm is not None:
            norm = norms[0] if len(norms) == 1 else _ops.combine_norms(norms)
        self._combine_devices(optimizer)
        found = state["found_inf_per_device"]
        if len(fused.parts) > 1 or fused.parts[0].device not in found:
            flag = next(iter(found.values()))
            found = {part.device: moved(flag, part.device) for part in fused.parts}
        stepped = fused.step(optimizer, found, scale if ready else None, norm, max_norm)
        if recorder is not None:
            recorder.stepped(stepped)
        state["stage"] = OptState.STEPPED
        return True

    def _check_collected(self, fused: FusedStep, state: dict[str, Any], scale: torch.Tensor) -> list[torch.Tensor]:
        """Read the collected gradients once; note flags and norms in the state, and return the norms."""
        founds: dict[torch.device, torch.Tensor] = {}
        norms: list[torch.Tensor] = []
        statistics: list[tuple[list[str], torch.Tensor]] = []
        for part in fused.parts:
            flag = founds.get(part.device)
            if flag is None:
                flag = founds[part.device] = torch.zeros((), dtype=torch.float32, device=part.device)
            norm = torch.empty((), dtype=torch.float32, device=part.device)
            table = None
            if self._statistics:
                names = part.collected_names()
                table = torch.empty((len(names), len(GRADIENT_STATISTICS)), dtype=torch.float32, device=part.device)
                statistics.append((names, table))
            part.fused.check(moved(scale, part.device), flag, norm, table)
            norms.append(norm)
        state.update(found_inf_per_device=founds, norms=norms, statistics=statistics)
        return norms

    def _check_unchanged(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Raise if gradients were freed, resized or added since unscale_(): they would be applied unchecked."""
        before = state.get("elements")
        if before is None:
            return
        parameters = parameters_of(optimizer)
        if len(parameters) != len(before):
            raise RuntimeError(
                f"GradScaler.step: the optimizer has {len(parameters)} parameters, but had {len(before)} when "
                "unscale_() read their gradients. Add parameters before unscale_() or after step()."
            )
        for place, (parameter, count) in enumerate(zip(parameters, before, strict=True)):
            now = element_count(parameter)
            if now != count:
                name, _ = list(named_parameters(optimizer))[place]
                raise RuntimeError(
                    f"GradScaler.step: the gradient of {name} was freed, resized or added since unscale_(): it had "
                    f"{count_in_words(count)} and has {count_in_words(now)}. Nothing was stepped."
                )

    def update(self, new_scale: float | torch.Tensor | None = None) -> None:
        """Apply the scale rule to what was found since the last update, or set the scale.

        new_scale: a number > 0 within float32 and the scaler's bounds, or a 1-element tensor (whose value is not
        checked: that would wait for the device).
        """
        if not self._enabled:
            return
        if new_scale is not None:
            if not isinstance(new_scale, torch.Tensor):
                check_scale("new_scale", new_scale)
                if not self._min_scale <= new_scale <= self._max_scale:
                    raise ValueError(
                        f"new_scale is {new_scale!r}, expected min_scale ({self._min_scale:g}) to max_scale "
                        f"({self._max_scale:g})"
                    )
                new_scale = float(new_scale)
            super().update(new_scale)
            return

        scale, tracker = self._check_scale_growth_tracker("update")
        states = list(self._per_optimizer_states.values())
        founds = [moved(found, scale.device) for state in states for found in state["found_inf_per_device"].values()]
        if not founds:
            raise AssertionError("No inf checks were recorded prior to update.")
        norms = [moved(norm, scale.device) for state in states for norm in state.get("norms", ())]
        if any(state.get("sharded") for state in states):
            norms = []  # the norm of one rank's shards is not the gradients'
        asks = self._request is not None and not (scale.is_cuda and torch.cuda.is_current_stream_capturing())
        wanted = self._request.wanted() if asks else None  # may raise: nothing has changed yet
        _ops.update_scale_(
            scale,
            tracker,
            self._hysteresis_left,
            self._counters,
            self._history,
            founds,
            norms,
            **self._rule(),
        )
        if asks:
            self._request.grant(wanted, scale, self._counters, self._history, self._rule())
        if self._underflow is not None:
            self._underflow.updated(self._counters)
        recorder = getattr(current, "recorder", None)
        if recorder is not None:
            recorder.updated[self] = None
        self._per_optimizer_states = defaultdict(_refresh_per_optimizer_state)
        self._tables = [entry for state in states for entry in state.get("statistics", ())]
        if self._max_consecutive_skips is not None:
            self._raise_if_collapsed(states)

    def after_replay(self) -> None:
        """Do what update() leaves to the host, after each replay of a CUDA graph of your own that holds update().

        Only with scale_from_norm is there anything to do.
        """
        if self._request is not None and self._counters is not None:
            self._request.grant(self._request.wanted(), self._scale, self._counters, self._history, self._rule())

    def _raise_if_collapsed(self, states: list[dict[str, Any]]) -> None:
        skips = self.counters()["consecutive_skipped"]
        if skips < self._max_consecutive_skips:
            return
        worst = sorted(
            (
                (row[0], row[5], name)
                for state in states
                for names, table in state.get("statistics", ())
                for name, row in zip(names, table.tolist(), strict=True)
                if row[0] > 0
            ),
            reverse=True,
        )
        listed = "; ".join(f"{name}: {bad:.0f} of {total:.0f}" for bad, total, name in worst[:5])
        raise ScaleCollapsed(
            f"{skips} steps in a row had infinite or NaN gradients; the loss scale is {self.get_scale():g} (min_scale "
            f"{self._min_scale:g}). Parameters with the most infinite or NaN gradient elements: {listed or 'none now'}."
        )
