"""Reference simulators of the dynamic loss scale rules of other libraries, used as oracles in tests.

Each class restates one library's rule on its own, so that a mistake in halfstep's unified rule, or in one simulator,
cannot hide in another. The rules were restated by reading these files (not copied from them):

    torch       PyTorch       torch/amp/grad_scaler.py, aten/src/ATen/native/cuda/AmpKernels.cu
    keras       Keras 3       keras/src/optimizers/loss_scale_optimizer.py
    tf_keras    tf-keras      tf_keras/mixed_precision/loss_scale_optimizer.py
    megatron    Megatron-LM   megatron/core/optimizer/grad_scaler.py, optimizer_config.py
    deepspeed   DeepSpeed     deepspeed/runtime/fp16/loss_scaler.py, precision_config.py (the ZeRO scaler)
    apex        Apex          csrc/update_scale_hysteresis.cu
    paddle      Paddle        python/paddle/amp/grad_scaler.py, paddle/phi/kernels/impl/amp_kernel_impl.h

The scale is a float32 and is rounded after each operation. Where this departs from a peer:

  * Keras 3, tf-keras and DeepSpeed have a single factor, or a fixed 2; here all take `growth_factor` and
    `backoff_factor`. At the defaults, 2 and 0.5, this changes nothing.
  * DeepSpeed keeps its scale as a Python float. Here it is a float32 too; with powers of two the two agree up to
    2^127, above which only the float32 overflows. Its option to raise at the minimum scale is left out.
  * Paddle's and tf-keras's floor of 1 is fixed there and a keyword here.

Megatron, Keras 3 and DeepSpeed grow without a finite check, so their scale may reach infinity, and does here.

Run as a script, this file writes tests/core/golden_trajectories.h, the same trajectories for the C++ tests.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np


class Scaler(Protocol):
    """What every simulator offers."""

    scale: float

    def step(self, found: bool) -> float:
        """Take one step's found-non-finite flag; return the scale after the update."""
        ...


def _f32(value: float) -> float:
    """Round a double to the nearest float32 (ties to even, denormals kept, infinity on overflow)."""
    with np.errstate(over="ignore", under="ignore"):
        return float(np.float32(value))


class TorchScaler:
    """torch.amp.GradScaler: backs off on every overflow, without a floor; growth never leaves the finite range."""

    def __init__(
        self,
        *,
        init_scale: float = 2.0**16,
        growth_interval: int = 2000,
        hysteresis: int = 1,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
    ) -> None:
        del hysteresis  # no such thing in PyTorch
        self.scale = _f32(init_scale)
        self.growth_interval = growth_interval
        self.growth_factor = growth_factor
        self.backoff_factor = backoff_factor
        self.growth_tracker = 0

    def step(self, found: bool) -> float:
        """Return the scale after one update."""
        if found:
            self.scale = _f32(self.scale * self.backoff_factor)
            self.growth_tracker = 0
            return self.scale
        self.growth_tracker += 1
        if self.growth_tracker == self.growth_interval:
            grown = _f32(self.scale * self.growth_factor)
            if math.isfinite(grown):
                self.scale = grown
            self.growth_tracker = 0
        return self.scale


class KerasScaler:
    """Keras 3 LossScaleOptimizer: neither a floor nor a finite check."""

    def __init__(
        self,
        *,
        init_scale: float = 2.0**15,
        growth_interval: int = 2000,
        hysteresis: int = 1,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
    ) -> None:
        del hysteresis  # no such thing in Keras
        self.scale = _f32(init_scale)
        self.growth_interval = growth_interval
        self.growth_factor = growth_factor
        self.backoff_factor = backoff_factor
        self.finite_steps = 0

    def step(self, found: bool) -> float:
        """Return the scale after one update."""
        if found:
            self.finite_steps = 0
            self.scale = _f32(self.scale * self.backoff_factor)
        elif self.finite_steps == self.growth_interval - 1:
            self.finite_steps = 0
            self.scale = _f32(self.scale * self.growth_factor)
        else:
            self.finite_steps += 1
        return self.scale


class TfKerasScaler:
    """tf-keras LossScaleOptimizer: a floor of 1, and growth never leaves the finite range."""

    def __init__(
        self,
        *,
        init_scale: float = 2.0**15,
        growth_interval: int = 2000,
        hysteresis: int = 1,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        min_scale: float = 1.0,
    ) -> None:
        del hysteresis  # no such thing in tf-keras
        self.scale = _f32(init_scale)
        self.growth_interval = growth_interval
        self.growth_factor = growth_factor
        self.backoff_factor = backoff_factor
        self.min_scale = _f32(min_scale)
        self.counter = 0

    def step(self, found: bool) -> float:
        """Return the scale after one update."""
        if found:
            self.counter = 0
            self.scale = max(_f32(self.scale * self.backoff_factor), self.min_scale)
        elif self.counter + 1 >= self.growth_interval:
            self.counter = 0
            grown = _f32(self.scale * self.growth_factor)
            self.scale = grown if math.isfinite(grown) else self.scale
        else:
            self.counter += 1
        return self.scale


class MegatronScaler:
    """Megatron DynamicGradScaler: only growth refills the hysteresis credit; no finite check.

    Once the credit is spent, every further overflow backs off.
    """

    def __init__(
        self,
        *,
        init_scale: float = 2.0**32,
        growth_interval: int = 1000,
        hysteresis: int = 2,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        min_scale: float = 1.0,
    ) -> None:
        self.scale = _f32(init_scale)
        self.growth_interval = growth_interval
        self.hysteresis = hysteresis
        self.growth_factor = growth_factor
        self.backoff_factor = backoff_factor
        self.min_scale = _f32(min_scale)
        self.growth_tracker = 0
        self.credit = hysteresis

    def step(self, found: bool) -> float:
        """Return the scale after one update."""
        if found:
            self.growth_tracker = 0
            self.credit -= 1
            if self.credit <= 0:
                self.scale = max(_f32(self.scale * self.backoff_factor), self.min_scale)
        else:
            self.growth_tracker += 1
            if self.growth_tracker == self.growth_interval:
                self.growth_tracker = 0
                self.credit = self.hysteresis
                self.scale = _f32(self.scale * self.growth_factor)
        return self.scale


class DeepSpeedScaler:
    """DeepSpeed DynamicLossScaler as ZeRO uses it: counts iterations since the last overflow; no finite check.

    The overflow iteration is remembered as -1 at the start, and the one after an overflow does not count, so growth
    takes `growth_interval` + 1 clean steps after an overflow or the start, and `growth_interval` from then on. With
    `consecutive_hysteresis` any clean step refills the credit, else only growth does.
    """

    def __init__(
        self,
        *,
        init_scale: float = 2.0**16,
        growth_interval: int = 1000,
        hysteresis: int = 2,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        min_scale: float = 1.0,
        consecutive_hysteresis: bool = False,
    ) -> None:
        self.scale = _f32(init_scale)
        self.growth_interval = growth_interval
        self.hysteresis = hysteresis
        self.growth_factor = growth_factor
        self.backoff_factor = backoff_factor
        self.min_scale = _f32(min_scale)
        self.consecutive_hysteresis = consecutive_hysteresis
        self.credit = hysteresis
        self.iteration = 0
        self.last_overflow = -1

    def step(self, found: bool) -> float:
        """Return the scale after one update."""
        if found:
            if self.hysteresis == 1 or self.credit == 1:
                self.scale = max(_f32(self.scale * self.backoff_factor), self.min_scale)
            else:
                self.credit -= 1
            self.last_overflow = self.iteration
        else:
            if self.consecutive_hysteresis:
                self.credit = self.hysteresis
            stable = self.iteration - self.last_overflow - 1
            if stable > 0 and stable % self.growth_interval == 0:
                if not self.consecutive_hysteresis:
                    self.credit = self.hysteresis
                self.scale = _f32(self.scale * self.growth_factor)
        self.iteration += 1
        return self.scale


class ApexScaler:
    """Apex's device op update_scale_hysteresis: any clean step refills the credit; no floor.

    The op takes every setting as an argument, so there are no defaults for the first three.
    """

    def __init__(
        self,
        *,
        init_scale: float,
        growth_interval: int,
        hysteresis: int,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
    ) -> None:
        self.scale = _f32(init_scale)
        self.growth_interval = growth_interval
        self.hysteresis = hysteresis
        self.growth_factor = growth_factor
        self.backoff_factor = backoff_factor
        self.growth_tracker = 0
        self.hysteresis_tracker = hysteresis

    def step(self, found: bool) -> float:
        """Return the scale after one update."""
        if found:
            self.growth_tracker = 0
            self.hysteresis_tracker -= 1
            if self.hysteresis_tracker <= 0:
                self.scale = _f32(self.scale * self.backoff_factor)
            return self.scale
        self.hysteresis_tracker = self.hysteresis
        self.growth_tracker += 1
        if self.growth_tracker == self.growth_interval:
            self.growth_tracker = 0
            grown = _f32(self.scale * self.growth_factor)
            if math.isfinite(grown):
                self.scale = grown
        return self.scale


class PaddleScaler:
    """Paddle GradScaler: each backoff takes `hysteresis` (decr_every_n) new overflows in a row; a floor of 1."""

    def __init__(
        self,
        *,
        init_scale: float = 2.0**16,
        growth_interval: int = 2000,
        hysteresis: int = 1,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        min_scale: float = 1.0,
    ) -> None:
        self.scale = _f32(init_scale)
        self.incr_every = growth_interval
        self.decr_every = hysteresis
        self.growth_factor = growth_factor
        self.backoff_factor = backoff_factor
        self.min_scale = _f32(min_scale)
        self.good_steps = 0
        self.bad_steps = 0

    def step(self, found: bool) -> float:
        """Return the scale after one update."""
        if found:
            self.good_steps = 0
            self.bad_steps += 1
            if self.bad_steps == self.decr_every:
                self.scale = max(_f32(self.scale * self.backoff_factor), self.min_scale)
                self.bad_steps = 0
        else:
            self.bad_steps = 0
            self.good_steps += 1
            if self.good_steps == self.incr_every:
                grown = _f32(self.scale * self.growth_factor)
                if math.isfinite(grown):
                    self.scale = grown
                self.good_steps = 0
        return self.scale


PEERS: dict[str, Callable[..., Scaler]] = {
    "torch": TorchScaler,
    "keras": KerasScaler,
    "tf_keras": TfKerasScaler,
    "megatron": MegatronScaler,
    "deepspeed": DeepSpeedScaler,
    "deepspeed_consecutive": functools.partial(DeepSpeedScaler, consecutive_hysteresis=True),
    "apex": ApexScaler,
    "paddle": PaddleScaler,
}


def trajectory(peer: str, found: str, *, init_scale: float, growth_interval: int, hysteresis: int) -> list[float]:
    """Return the scale after each step of `found`, a string of '0' and '1'."""
    scaler = PEERS[peer](init_scale=init_scale, growth_interval=growth_interval, hysteresis=hysteresis)
    return [scaler.step(flag == "1") for flag in found]


class Case(NamedTuple):
    """One found-sequence with its settings, and the peers it is simulated for."""

    title: str
    found: str
    init_scale: float
    growth_interval: int
    hysteresis: int
    peers: Sequence[str] = tuple(PEERS)


def _random_found(seed: int, length: int, probability: float) -> str:
    draw = random.Random(seed)
    return "".join("1" if draw.random() < probability else "0" for _ in range(length))


_FINITE_GROWTH = ("torch", "tf_keras", "apex", "paddle")
# Seeds chosen so that the two sequences together tell most of the rules apart.
_RARE = _random_found(seed=80, length=60, probability=0.15)
_OFTEN = _random_found(seed=5, length=60, probability=0.5)

CASES: tuple[Case, ...] = (
    Case("alternating, clean, then a burst", "1010100000111", 1024.0, 4, 2),
    Case("never an overflow", "0" * 30, 1024.0, 3, 2),
    Case("only overflows: to the floor, or below 1 where there is none", "1" * 40, 2.0**15, 4, 2),
    Case("growth up to the float32 maximum, peers with a finite check", "0" * 6, 2.0**125, 1, 1, _FINITE_GROWTH),
    Case("collapse through the denormals to 0, peers without a floor", "1" * 20, 2.0**-140, 4, 2, ("torch", "apex")),
    Case("random, about 15 % overflows, hysteresis 1", _RARE, 2.0**16, 5, 1),
    Case("random, about 15 % overflows, hysteresis 3", _RARE, 2.0**16, 5, 3),
    Case("random, about 50 % overflows, hysteresis 1", _OFTEN, 2.0**16, 5, 1),
    Case("random, about 50 % overflows, hysteresis 3", _OFTEN, 2.0**16, 5, 3),
)

_HEADER = """\
// Generated by `python tests/peers.py`; do not edit. The rules, and where they come from, are in that file.
//
// Loss scale trajectories of other libraries: scales[i] is the scale after the update of step i, whose
// found-non-finite flag is found[i]. Growth factor 2, backoff factor 0.5. The minimum scale is 1 for tf_keras,
// megatron, deepspeed, deepspeed_consecutive and paddle; the others have none. hysteresis means nothing to torch,
// keras and tf_keras, and is decr_every_n for paddle.
#pragma once

#include <string_view>
#include <vector>

namespace halfstep::test {

struct Golden {
  std::string_view peer;
  float init_scale;
  int growth_interval;
  int hysteresis;
  std::string_view found;
  std::vector<float> scales;
};

inline const std::vector<Golden> kGolden = {
"""

_FOOTER = """\
};

}  // namespace halfstep::test
"""


def _literal(value: float) -> str:
    if not math.isfinite(value) or _f32(value) != value:
        raise ValueError(f"{value} has no float32 literal")
    return value.hex() + "f"


def _wrapped(items: Sequence[str], indent: str, width: int = 120) -> str:
    """Join items with commas into lines of at most `width` columns."""
    lines = [indent + items[0]]
    for item in items[1:]:
        if len(lines[-1]) + len(", ,") + len(item) <= width:
            lines[-1] += ", " + item
        else:
            lines[-1] += ","
            lines.append(indent + item)
    return "\n".join(lines)


def render_header() -> str:
    """Return the text of tests/core/golden_trajectories.h."""
    parts = [_HEADER]
    for case in CASES:
        parts.append(f"    // {case.title}\n")
        for peer in case.peers:
            scales = trajectory(
                peer,
                case.found,
                init_scale=case.init_scale,
                growth_interval=case.growth_interval,
                hysteresis=case.hysteresis,
            )
            parts.append(
                f'    {{"{peer}", {_literal(case.init_scale)}, {case.growth_interval}, {case.hysteresis},\n'
                f'     "{case.found}",\n'
                f"     {{\n{_wrapped([_literal(scale) for scale in scales], ' ' * 9)}}}}},\n"
            )
    parts.append(_FOOTER)
    return "".join(parts)


def main() -> None:
    """Write the C++ header next to the core tests."""
    path = Path(__file__).resolve().parent / "core" / "golden_trajectories.h"
    path.write_text(render_header(), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
