"""Mixed precision that adapts: layers that half precision harms run in float32, and are tried again later."""

from __future__ import annotations

import contextlib
import logging
import weakref
from typing import Any

import torch
from torch import nn

from halfstep.adaptive_training import AdaptiveTraining, Settings
from halfstep.config import check_bool, check_choice, check_count, check_number, check_scale
from halfstep.policy import CustomPrecisionPolicy, PrecisionPlan, PrecisionPolicy
from halfstep.scopes import DTYPES

_log = logging.getLogger("halfstep.adaptive")


class AdaptivePrecisionManager:
    """Half precision where it is stable, float32 where it is not, decided per layer while a model trains.

        adaptive = AdaptivePrecisionManager()
        for batch_idx, (x, y) in enumerate(loader):
            with adaptive.adaptive_context(model, batch_idx) as context:
                optimizer.zero_grad()
                loss = criterion(model(x), y)
                if context.is_stable(loss):
                    loss.backward()
                    optimizer.step()
                else:
                    context.fallback_to_fp32()
                    optimizer.zero_grad()
                    criterion(model(x), y).backward()
                    optimizer.step()

    stability_threshold: a layer leaves half precision if more than this share of the squared norm of its outputs, or of
        the gradients that it sends on, may be lost below half's range (> 0), or if it is where infinite or NaN values
        begin.
    adaptation_interval: batches between two decisions, >= 1. After a loss that is not finite one comes at once.
    enable_gradient_monitoring: look at gradients too; False looks at outputs alone.
    precision: "float16" or "bfloat16".
    sampling_interval: every so many batches the layers are looked at, >= 1; by default in the last one of each
        adaptation interval. The first batch, and one after a layer has left half, are as well.
    hold_intervals: how long a layer stays in float32 at first, in intervals. Each failed trial doubles it, up to
        max_hold_intervals.
    custom_policy: a precision for each layer to start from: a CustomPrecisionPolicy, PrecisionPolicy or PrecisionPlan.
        Layers that it has in float32 stay so. Without it, what apply_plan() or a manager has put into the model.
    initial_loss_scale: of the loss scale that is used while no GradScaler is, in float16.
    process_group: whose ranks decide together, by all-reduces in is_stable() and at decisions: None for all where
        torch.distributed is initialised, False for none.

    Decisions are logged to the logger "halfstep.adaptive" and kept in get_adaptation_stats(). Several models may be
    trained by one manager; none is kept alive. release(model) gives a model back as it was.
    """

    def __init__(
        self,
        stability_threshold: float = 1e-4,
        adaptation_interval: int = 100,
        enable_gradient_monitoring: bool = True,
        *,
        precision: str = "float16",
        sampling_interval: int | None = None,
        hold_intervals: int = 1,
        max_hold_intervals: int = 64,
        custom_policy: CustomPrecisionPolicy | PrecisionPolicy | PrecisionPlan | None = None,
        initial_loss_scale: float = 2.0**16,
        process_group: Any = None,
    ) -> None:
        check_number("a number > 0", lambda value: 0 < value < float("inf"))("stability_threshold", stability_threshold)
        check_count("adaptation_interval", adaptation_interval)
        check_bool("enable_gradient_monitoring", enable_gradient_monitoring)
        check_choice("float16", "bfloat16")("precision", precision)
        sampling_interval = adaptation_interval if sampling_interval is None else sampling_interval
        check_count("sampling_interval", sampling_interval)
        check_count("hold_intervals", hold_intervals)
        check_count("max_hold_intervals", max_hold_intervals)
        if max_hold_intervals < hold_intervals:
            raise ValueError(f"max_hold_intervals is {max_hold_intervals}, expected at least {hold_intervals}")
        if not isinstance(custom_policy, (CustomPrecisionPolicy, PrecisionPolicy, PrecisionPlan, type(None))):
            raise TypeError(
                f"custom_policy is {custom_policy!r}, expected a CustomPrecisionPolicy, PrecisionPolicy or "
                "PrecisionPlan"
            )
        check_scale("initial_loss_scale", initial_loss_scale)
        self._settings = Settings(
            stability_threshold=float(stability_threshold),
            interval=adaptation_interval,
            gradients=enable_gradient_monitoring,
            half=DTYPES[precision],
            sampling_interval=sampling_interval,
            hold=hold_intervals,
            max_hold=max_hold_intervals,
            policy=custom_policy,
            initial_loss_scale=float(initial_loss_scale),
            process_group=process_group,
        )
        self._trainings: weakref.WeakKeyDictionary[nn.Module, AdaptiveTraining] = weakref.WeakKeyDictionary()
        self._latest: weakref.ref[AdaptiveTraining] | None = None

    def adaptive_context(self, model: nn.Module, batch_idx: int = 0, scaler: Any = None) -> PrecisionContext:
        """Return a context manager for one whole training step of `model`, from zero_grad() to optimizer.step().

        Inside, calls of the model run in its present plan, with autocast around the model alone, and return float32.
        Where the loop has autocast on around model and loss, that one is used, and results stay as they are.
        batch_idx: an integer, for the log. scaler: the GradScaler of the loop, if there is one: its scale is used, and
        none is applied here. What a GradScaler has scaled is noticed without, too.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is {type(model).__name__}, expected torch.nn.Module")
        if not isinstance(batch_idx, int):
            raise TypeError(f"batch_idx is {batch_idx!r}, expected an integer")
        if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
            raise TypeError(f"scaler is {type(scaler).__name__}, expected a GradScaler")
        training = self._trainings.get(model)
        if training is None:
            training = self._trainings[model] = AdaptiveTraining(model, self._settings)
        self._latest = weakref.ref(training)
        return PrecisionContext(training, batch_idx, scaler)

    def precision_plan(self, model: nn.Module) -> PrecisionPlan:
        """Return the plan in which the model runs now; the reasons of changed layers say what happened."""
        return self._known(model).plan()

    def get_adaptation_stats(self, model: nn.Module | None = None) -> dict[str, Any]:
        """Return what was seen and decided for a model, by default the one of the latest context.

        fp16_ratio: share of the layers that run in half now (NaN before the first context).
        layers: for each monitored layer its state ("half", "float32", "trial"), score at the last decision, the
            intervals it is held for, demotions, promotions, and the reason of its last change.
        batches, sampled_batches, unstable_batches (is_stable() was False), fallback_batches (fallback_to_fp32() was
            called), skipped_steps (infinite or NaN gradients), demotions, promotions, trials: counts.
        loss_scale: now (waits for the device). overflowed: parameters whose gradients were infinite or NaN in the last
            skipped step, where the scale is this manager's.
        decisions: the last 1000 changes, each with batch, layer, from, to, score, hold and reason.
        """
        training = self._latest() if model is None and self._latest is not None else None
        if model is not None:
            training = self._known(model)
        if training is None:
            return {"fp16_ratio": float("nan"), "layers": {}, "batches": 0, "decisions": []}
        return training.statistics()

    def release(self, model: nn.Module) -> None:
        """Give the model back as it was before its first context: no trace of this manager stays in it.

        RuntimeError while a context of it is open.
        """
        training = self._trainings.get(model)
        if training is not None:
            training.release()
            del self._trainings[model]

    def state_dict(self, model: nn.Module) -> dict[str, Any]:
        """Return what a resumed run needs for this model: the states of its layers, counts and the loss scale."""
        return self._known(model).state_dict()

    def load_state_dict(self, model: nn.Module, state_dict: dict[str, Any]) -> None:
        """Go on from a state_dict() of a model with the same layers; ValueError, and nothing changed, for others."""
        training = self._trainings.get(model)
        if training is None:
            training = AdaptiveTraining(model, self._settings)
        try:
            training.load_state_dict(state_dict)
        except BaseException:
            if model not in self._trainings:
                training.release()
            raise
        self._trainings[model] = training

    def _known(self, model: nn.Module) -> AdaptiveTraining:
        training = self._trainings.get(model)
        if training is None:
            raise ValueError("this manager has had no adaptive_context of that model")
        return training


class PrecisionContext(contextlib.AbstractContextManager["PrecisionContext"]):
    """One training step of a model (AdaptivePrecisionManager.adaptive_context). It can be entered once."""

    def __init__(self, training: AdaptiveTraining, batch: int, scaler: Any) -> None:
        self._training = training
        self._batch = batch
        self._scaler = scaler
        self._state = "new"

    def __enter__(self) -> PrecisionContext:
        if self._state != "new":
            raise RuntimeError("this precision context was entered before; make one for each batch")
        self._training.begin(self._batch, self._scaler)
        self._state = "open"
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        self._state = "over"
        for decision in self._training.end(failed=kind is not None):
            _log.log(logging.WARNING if decision["to"] == "float32" else logging.INFO, "%s", _in_words(decision))

    def is_stable(self, loss: torch.Tensor) -> bool:
        """Return whether all elements of the loss are finite, on every rank. Waits for the device.

        If not, the layer at fault leaves half precision with the next batch.
        """
        self._check_open("is_stable")
        if not isinstance(loss, torch.Tensor) or not loss.is_floating_point():
            raise TypeError(f"loss is {getattr(loss, 'dtype', type(loss).__name__)}, expected a floating-point tensor")
        return self._training.is_stable(loss)

    def fallback_to_fp32(self) -> None:
        """Run the rest of this batch in float32: autocast off on every device, no plan, no loss scale."""
        self._check_open("fallback_to_fp32")
        self._training.fall_back()

    @property
    def in_fp32(self) -> bool:
        """Whether this batch has fallen back."""
        return self._state == "open" and self._training.in_fp32

    def _check_open(self, what: str) -> None:
        if self._state != "open":
            raise RuntimeError(f"{what}() is for use inside the precision context, which is {self._state}")


def _in_words(decision: dict[str, Any]) -> str:
    change = decision["to"] if decision["from"] == decision["to"] else f"{decision['from']} -> {decision['to']}"
    intervals = "interval" if decision["hold"] == 1 else "intervals"
    held = f", held for {decision['hold']} {intervals}" if decision["to"] == "float32" else ""
    return (
        f"batch {decision['batch']}: layer {decision['layer']!r} {change}{held}: {decision['reason']} "
        f"(score {decision['score']:.3g})"
    )
