"""What makes an optimization's candidates int8 layers: packed weights, the ranges of inputs, and corrected biases."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from halfstep.calibration_data import Batch
from halfstep.int8_calibration import Calibration, first_argument
from halfstep.int8_layers import pack
from halfstep.int8_model import Candidate, Int8Settings
from halfstep.int8_noise import Powers, finite_of, powers_of, share_of

_NOISY = 1e-3  # the share of noise, 30 dB, up to which a layer needs no smoothing
_FOR_BIASES = 8  # batches by which biases are corrected
_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Scheme:
    """How weights and inputs are quantized, as the user chose it; see InferencePrecisionOptimizer."""

    activations: str
    smooth_quant: bool | str
    bits: int


class LayerSettings:
    """The settings of each candidate: `settings` by name, once quantize() and use() were called.

    model: the float model that calls the candidates, in `dtype` on `device`; it is not changed. batches: what it is
    called with to compare layers, of which the first samples, `probe`, serve for noise. `smoothed` names the layers
    whose large input channels were moved into their weights.
    """

    def __init__(
        self,
        model: nn.Module,
        candidates: dict[str, Candidate],
        batches: list[Batch],
        probe: Batch,
        scheme: Scheme,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._model, self._batches, self._probe = model, batches, probe
        self._candidates, self._scheme, self._device, self._dtype = candidates, scheme, device, dtype
        self._packed: dict[str, torch.ScriptObject] = {}
        self._ranges: dict[str, tuple[float, int]] = {}  # of smoothed layers
        self.smoothed: set[str] = set()
        self.settings: dict[str, Int8Settings] = {}

    # ------------------------------------------------------------------------------------------------------- the steps

    def quantize(self, calibration: Calibration, method: str) -> dict[str, str]:
        """Quantize the weights of all candidates, smoothed where that helps.

        Returns of each one that cannot be quantized the reason; it is no candidate any more.
        """
        refused: dict[str, str] = {}
        self.smoothed = set()
        smoothed: dict[str, torch.ScriptObject] = {}
        scheme = self._scheme
        for name, candidate in list(self._candidates.items()):
            try:
                self._packed[name] = self._pack(candidate)
            except ValueError as error:
                refused[name] = str(error)
                del self._candidates[name]
                continue
            if scheme.smooth_quant and candidate.can_be_smoothed:
                with contextlib.suppress(ValueError):  # factors or products that no float32 holds
                    smoothed[name] = self._smooth(candidate, calibration.observers[name])
        if scheme.activations == "static":
            ranges = {name: self._smoothed_range(calibration, name, packed) for name, packed in smoothed.items()}
            self._ranges = {name: found for name, found in ranges.items() if found[0] <= _LARGEST}
            smoothed = {name: smoothed[name] for name in self._ranges}
        if scheme.smooth_quant == "auto" and smoothed:
            variants = {
                name: [
                    self._settings_of(name, calibration, method),
                    Int8Settings(packed, *self._ranges.get(name, ())),  # none: by rows
                ]
                for name, packed in smoothed.items()
            }
            noise = self.noise_of(variants)
            smoothed = {name: packed for name, packed in smoothed.items() if name in noise and _is_worth(*noise[name])}
        self.smoothed = set(smoothed)
        self._packed.update(smoothed)
        return refused

    def use(self, calibration: Calibration, method: str) -> None:
        """Take the ranges of the inputs by this estimator."""
        self.settings = {name: self._settings_of(name, calibration, method) for name in self._candidates}

    def with_mean_shifts(self, names: Iterable[str]) -> dict[str, Int8Settings]:
        """Return settings whose biases make up for the mean of the quantization error of each layer's output."""
        shifts: dict[str, list[torch.Tensor]] = {}

        def visit(name: str, value: torch.Tensor, output: torch.Tensor) -> None:
            candidate = self._candidates[name]
            dim = candidate.channel_dim % output.dim()
            int8 = self.settings[name].layer(candidate, self._dtype)(value)
            shift = torch.ops.halfstep.mean_difference(output, int8, dim)
            if shift.isfinite().all():  # of nothing it is NaN
                shifts.setdefault(name, []).append(shift)

        self._visit([n for n in names if self._candidates[n].kind != "embedding"], self._batches[:_FOR_BIASES], visit)
        return {
            name: replace(self.settings[name], packed=self.settings[name].packed.corrected(found))
            for name, found in shifts.items()
        }

    # -------------------------------------------------------------------------------------------------- what they give

    def layers(self, names: Iterable[str], dtype: torch.dtype) -> dict[str, nn.Module]:
        """Return the int8 layers of these names for a model of `dtype`, in the order of the candidates."""
        wanted = frozenset(names)
        return {
            name: self.settings[name].layer(candidate, dtype)
            for name, candidate in self._candidates.items()
            if name in wanted
        }

    def noise(self) -> dict[str, float]:
        """Return the share of noise in the output of each int8 layer that the probe calls."""
        variants = {name: [settings] for name, settings in self.settings.items() if name in self._candidates}
        return {name: shares[0] for name, shares in self.noise_of(variants).items()}

    def noise_of(self, variants: Mapping[str, list[Int8Settings]]) -> dict[str, list[float]]:
        """Return, for layers that the probe calls, the share of noise in the output of each of their int8 variants.

        All samples and calls together; those for which the float layer gives NaN or infinity are left out.
        """
        samples: dict[str, list[list[Powers]]] = {}

        def visit(name: str, value: torch.Tensor, output: torch.Tensor) -> None:
            found = samples.setdefault(name, [[] for _ in variants[name]])
            for settings, powers in zip(variants[name], found, strict=True):
                powers += powers_of(output, settings.layer(self._candidates[name], self._dtype)(value))

        self._visit(variants, [self._probe], visit)
        return {name: [share_of(finite_of(powers)) for powers in found] for name, found in samples.items()}

    # ------------------------------------------------------------------------------------------------ what they use

    def _visit(self, names: Iterable[str], batches: list[Batch], visit: Callable[..., None]) -> None:
        """Call visit(name, input, output) at every call of these layers in the float model."""
        handles = []

        def hook_for(name: str) -> Callable[..., None]:
            def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> None:
                visit(name, first_argument(args, kwargs), output)

            return hook

        try:
            handles = [
                self._model.get_submodule(name).register_forward_hook(hook_for(name), with_kwargs=True)
                for name in names
            ]
            with torch.no_grad():
                for batch in batches:
                    batch(self._model)
        finally:
            for handle in handles:
                handle.remove()

    def _settings_of(self, name: str, calibration: Calibration, method: str) -> Int8Settings:
        if self._candidates[name].kind == "embedding" or self._scheme.activations == "dynamic":
            return Int8Settings(self._packed[name])
        if name in self.smoothed:
            return Int8Settings(self._packed[name], *self._ranges[name])
        return Int8Settings(self._packed[name], *calibration.parameters(name, method, self._scheme.bits))

    def _pack(self, candidate: Candidate, weight: torch.Tensor | None = None, factors: Any = None) -> Any:
        return pack(
            candidate.weight if weight is None else weight,
            candidate.bias,
            bits=self._scheme.bits,
            input_factors=factors,
            **candidate.geometry,
        )

    def _smooth(self, candidate: Candidate, observer: Any) -> torch.ScriptObject:
        largest = observer.channel_max().to(self._device)
        factors, inverse = torch.ops.halfstep.smoothing_factors(largest, candidate.weight)
        return self._pack(candidate, torch.ops.halfstep.scale_columns(candidate.weight, factors), inverse)

    def _smoothed_range(self, calibration: Calibration, name: str, packed: Any) -> tuple[float, int]:
        """Return scale and zero point for the smoothed input, by its largest magnitude."""
        observer, bits = calibration.observers[name], self._scheme.bits
        # The histogram is of the input as it came; what is known of the smoothed one is its largest magnitude and sign.
        positive = observer.min() >= 0
        levels = (1 << bits) - 1 if positive else (1 << (bits - 1)) - 1
        largest = observer.channel_max().to(self._device)
        scale = torch.ops.halfstep.smoothed_scale(largest, packed.input_factors(), levels)
        return scale, -(1 << (bits - 1)) if positive else 0


def _is_worth(plain: float, smoothed: float) -> bool:
    """Return whether smoothing pays: it costs a product for each element of the input, and no int8 can come in."""
    return plain > _NOISY and smoothed < 0.5 * plain
