"""Which layers' quantization errors do most harm to a model's output, to first order."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from halfstep._library import load_library
from halfstep.int8_batches import first_samples, floating_tensors_of, size_of
from halfstep.int8_noise import Powers, powers_of, share_of

load_library()

EFFECT = "effect on the output"
NOISE = "noise of the layer's own output"

_BATCHES = 2
_SAMPLES = 32


@dataclass(frozen=True)
class Ranking:
    """The layers, most harmful first, with their scores.

    scores by EFFECT: an estimate of how much the squared norm of a sample's output error owes to the layer. By NOISE:
    the share of noise in the power of the layer's output. NaN or infinite ones come first. note: what a reader must
    know, or "".
    """

    order: tuple[str, ...]
    scores: dict[str, float]
    method: str
    note: str = ""


class _NotDifferentiable(Exception):
    """Why there are no gradients."""


def rank_layers(
    model: nn.Module,
    int8_layers: Mapping[str, nn.Module],
    batches: Sequence[Any],
    call: Callable[[nn.Module, Any], Any],
    probes: int = 4,
    seed: int = 0,
) -> Ranking:
    """Rank layers of a float model by what quantizing each would do to the output.

    int8_layers: for the name of each layer a module that takes the same input and gives the same kind of output. The
    first 32 samples of the first two batches are run. Each layer's error is the difference of the two outputs for the
    float model's input; its effect is the square of its product with the gradient of the outputs, multiplied by random
    signs and summed: over many `probes` the mean is the squared norm of what the error does to the output (Hutchinson,
    1989). Each probe is one backward pass. A layer whose output got no gradient scores 0.

    Where the model cannot be differentiated, layers are ranked by the noise in their own output, and `note` says so.
    Neither model, gradients, hooks nor random numbers are changed. ValueError for names that the model lacks.
    """
    if probes < 1:
        raise ValueError(f"probes is {probes}, expected at least 1")
    if not batches:
        raise ValueError("batches is empty, expected at least one")
    layers = dict(model.named_modules())
    if unknown := [name for name in int8_layers if name not in layers]:
        raise ValueError(f"the model has no layer {unknown[0]!r}")
    pairs = {name: (layers[name], int8) for name, int8 in int8_layers.items()}
    cuda = {tensor.device for tensor in (*model.parameters(), *model.buffers()) if tensor.is_cuda}
    with torch.random.fork_rng(list(cuda)):
        samples = [_first(model, batch, call) for batch in batches[:_BATCHES]]
        try:
            scores, note = _effects(model, pairs, samples, call, probes, seed)
            method = EFFECT
        except _NotDifferentiable as error:
            note = f"the model cannot be differentiated, so layers are ranked by their own output's noise: {error}"
            scores, method = _noises(model, pairs, samples, call), NOISE
    return Ranking(tuple(sorted(scores, key=lambda name: _harm(scores[name]), reverse=True)), scores, method, note)


def _harm(score: float) -> float:
    return score if math.isfinite(score) else math.inf


def _first(model: nn.Module, batch: Any, call: Callable[[nn.Module, Any], Any]) -> Any:
    """Return the first samples of a batch, or all where the model cannot be called with fewer."""
    part = first_samples(batch, _SAMPLES)
    if part is batch:
        return batch
    try:
        with torch.no_grad():
            call(model, part)
    except Exception:  # a fault of the model itself is met again
        return batch
    return part


class _Watch:
    """A forward hook that keeps a layer's outputs, as places to differentiate at, and what the int8 layer gives."""

    def __init__(self, name: str, int8: nn.Module, busy: list[str]) -> None:
        self._name = name
        self._int8 = int8
        self._busy = busy  # the name of the layer whose int8 form runs: it may call layers of the model
        self.outputs: list[torch.Tensor] = []
        self.quantized: list[torch.Tensor] = []

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if self._busy:
            return output
        self._busy.append(self._name)
        try:
            with torch.no_grad():
                others = floating_tensors_of(self._int8(*args, **kwargs))
        finally:
            self._busy.clear()
        leaves, structure = pytree.tree_flatten(output)
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
        if len(places) != len(others):
            raise ValueError(
                f"the int8 layer for {self._name!r} gives {len(others)} floating-point tensors, expected {len(places)}"
            )
        for i, other in zip(places, others, strict=True):
            leaf = leaves[i]
            if torch.is_grad_enabled() and not leaf.requires_grad:  # frozen weights, and none before them
                leaf = leaf.detach().requires_grad_()
            self.outputs.append(leaf)
            self.quantized.append(other.detach())
            # The model goes on with a copy, and may write to it.
            leaves[i] = leaf.clone()
        return pytree.tree_unflatten(leaves, structure)


@contextlib.contextmanager
def _watching(pairs: Mapping[str, tuple[nn.Module, nn.Module]]) -> Iterator[dict[str, _Watch]]:
    busy: list[str] = []
    watches = {name: _Watch(name, int8, busy) for name, (_, int8) in pairs.items()}
    hooks = []
    try:
        for name, (layer, _) in pairs.items():
            hooks.append(layer.register_forward_hook(watches[name], with_kwargs=True))
        yield watches
    finally:
        for hook in hooks:
            hook.remove()


def _effects(
    model: nn.Module,
    pairs: Mapping[str, tuple[nn.Module, nn.Module]],
    samples: Sequence[Any],
    call: Callable[[nn.Module, Any], Any],
    probes: int,
    seed: int,
) -> tuple[dict[str, float], str]:
    """Return the scores by first-order effect, or raise _NotDifferentiable."""
    generator = torch.Generator().manual_seed(seed)
    totals = dict.fromkeys(pairs, 0.0)
    reached: set[str] = set()
    called: set[str] = set()
    count = 0
    for batch in samples:
        size = size_of(batch)
        count += size
        with torch.inference_mode(False), torch.enable_grad(), _watching(pairs) as watches:
            try:
                ends = [tensor for tensor in floating_tensors_of(call(model, batch)) if tensor.requires_grad]
            except (RuntimeError, NotImplementedError) as error:
                raise _NotDifferentiable(_first_line(error)) from error
            if not ends:
                raise _NotDifferentiable("no output depends on a layer in a way that torch can follow")
            places = [(name, i) for name, watch in watches.items() for i in range(len(watch.outputs))]
            outputs = [watches[name].outputs[i] for name, i in places]
            called.update(name for name, _ in places)
            for probe in range(probes):
                try:
                    gradients = torch.autograd.grad(
                        ends,
                        outputs,
                        [_signs(end, generator) for end in ends],
                        retain_graph=probe + 1 < probes,
                        allow_unused=True,
                    )
                except (RuntimeError, NotImplementedError) as error:
                    raise _NotDifferentiable(_first_line(error)) from error
                for (name, i), gradient in zip(places, gradients, strict=True):
                    if gradient is not None:
                        reached.add(name)
                        watch = watches[name]
                        totals[name] += _effect(gradient, watch.outputs[i], watch.quantized[i], size)
    if called and not reached:
        raise _NotDifferentiable("no layer's output got a gradient")
    scores = {name: total / (probes * max(count, 1)) for name, total in totals.items()}
    if reached and not any(math.isfinite(scores[name]) for name in reached):
        raise _NotDifferentiable("all gradients are NaN or infinite")
    silent = [name for name in pairs if name in called and name not in reached]
    return scores, f"no gradient reached {', '.join(silent)}" if silent else ""


def _signs(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return random signs, the same on every device."""
    drawn = torch.randint(2, tensor.shape, generator=generator, dtype=torch.int32)
    return torch.tensor([-1.0, 1.0], dtype=tensor.dtype)[drawn].to(tensor.device)


def _effect(gradient: torch.Tensor, output: torch.Tensor, quantized: torch.Tensor, size: int) -> float:
    """Return the sum over samples of (gradient . error)^2.

    An output whose rows are not samples, such as the windows or the tokens of each, is put together by sample. Where it
    is not a whole number of rows for each, all is one sum: signs are random from sample to sample, so its square has
    the same mean.
    """
    if output.numel() == 0:
        return 0.0
    rows = size if output.dim() > 0 and size > 0 and output.shape[0] % size == 0 else 1
    shape = (rows, -1)
    by_sample = [tensor.detach().reshape(shape) for tensor in (gradient, output, quantized)]
    return rows * torch.ops.halfstep.error_effect(*by_sample)


def _noises(
    model: nn.Module, pairs: Mapping[str, tuple[nn.Module, nn.Module]], samples: Sequence[Any], call: Any
) -> dict[str, float]:
    """Return the share of noise in each layer's own output, of all samples and calls together."""
    powers: dict[str, list[Powers]] = {name: [] for name in pairs}
    for batch in samples:
        with torch.no_grad(), _watching(pairs) as watches:
            call(model, batch)
            for name, watch in watches.items():
                for output, quantized in zip(watch.outputs, watch.quantized, strict=True):
                    if output.numel():
                        powers[name] += powers_of(output.detach(), quantized)
    return {name: share_of(samples) for name, samples in powers.items()}


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0] or type(error).__name__
