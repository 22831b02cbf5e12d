"""What monitoring costs: whole training steps with it off, on as it is by default, and sampled in every step.

"layers": the same loop with its layers looked at by an AdaptivePrecisionManager, by default in every 100th step.
"adaptive loop": without a scaler, as that manager's own loop, which reads a flag twice a step.

    python bench/monitoring.py [--device cuda|cpu] [--model gpt2|mlp|...] [--steps 800] [--only "VARIANT;..."]

The variants run in one process in turns of some steps, each with a model of its own from the same seed and one batch.
Median and mean are of the turns' times per step: samples are rare, so a median alone would not see them. A variant's
monitor has a clock that stands still while others run. "samples": how many, and the share of the time that they took.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable

import torch
from halfstep import AdaptivePrecisionManager, MixedPrecisionManager
from timing import machine
from train_models import MODELS, Problem

TURN = 5  # steps
WARMUP = 3  # turns; the first sample of all is taken in them

Step = Callable[[], object]


class Clock:
    """Seconds that have passed while it was running."""

    def __init__(self) -> None:
        self._passed, self._since = 0.0, None

    def __call__(self) -> float:
        """Return them."""
        return self._passed + (0.0 if self._since is None else time.perf_counter() - self._since)

    def start(self) -> None:
        """Run."""
        self._since = time.perf_counter()

    def stop(self) -> None:
        """Stand still."""
        self._passed, self._since = self(), None


class Variant:
    """One way to train the model: `step` trains one step, `clock` runs while it is this one's turn.

    monitored: by the manager, every_step: in each step. layers: the layers are looked at every so many steps by an
    AdaptivePrecisionManager; own_scale: whose loss scale is used, in its own loop.
    """

    def __init__(
        self,
        problem: Problem,
        dtype: torch.dtype,
        *,
        monitored: bool = False,
        every_step: bool = False,
        layers: int | None = None,
        own_scale: bool = False,
    ) -> None:
        policy = f"mixed_{str(dtype).removeprefix('torch.')}"
        manager = MixedPrecisionManager("pytorch", policy, enable_monitoring=monitored)
        optimizer = torch.optim.Adam(problem.model.parameters(), lr=problem.lr, fused=True)
        model, optimizer, scaler = manager.setup_pytorch_training(problem.model, optimizer)
        self.clock = Clock()
        self.monitor = manager._manager.monitor
        self.turns: list[float] = []
        if self.monitor is not None:
            self.monitor._clock = self.clock
            if every_step:
                self.monitor.budget = 0.0
                if self.monitor.gradients is not None:
                    self.monitor.gradients._every = 1

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            with manager.autocast_context():
                loss = problem.loss(model, problem.x, problem.y)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

        half = str(dtype).removeprefix("torch.")
        adaptive = AdaptivePrecisionManager(precision=half, sampling_interval=layers)
        number = itertools.count()

        def watched_step() -> None:
            with adaptive.adaptive_context(model, next(number), scaler=scaler):
                step()

        def adaptive_step() -> None:
            with adaptive.adaptive_context(model, next(number)) as context:
                optimizer.zero_grad(set_to_none=True)
                with manager.autocast_context():
                    loss = problem.loss(model, problem.x, problem.y)
                if context.is_stable(loss):
                    loss.backward()
                    optimizer.step()

        self.step: Step = adaptive_step if own_scale else watched_step if layers else step

    def sampled(self) -> tuple[int, float]:
        """Return how many samples there were, and the seconds that they took."""
        samples = [] if self.monitor is None else self.monitor.samples
        return len(samples), sum(sample.seconds for sample in samples)


VARIANTS: dict[str, Callable[[Problem, torch.dtype], Variant]] = {
    "off": lambda problem, dtype: Variant(problem, dtype, monitored=False),
    "on": lambda problem, dtype: Variant(problem, dtype, monitored=True),
    "every step": lambda problem, dtype: Variant(problem, dtype, monitored=True, every_step=True),
    "layers": lambda problem, dtype: Variant(problem, dtype, layers=100),
    "layers, every step": lambda problem, dtype: Variant(problem, dtype, layers=1),
    "adaptive loop": lambda problem, dtype: Variant(problem, dtype, own_scale=True),
}


def take_turn(variant: Variant, device: torch.device, steps: int) -> float:
    """Return the milliseconds per step."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    variant.clock.start()
    begin = variant.clock()
    for _ in range(steps):
        variant.step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    passed = variant.clock() - begin
    variant.clock.stop()
    return passed / steps * 1e3


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", choices=MODELS, help="default: gpt2 on a GPU, mlp on a CPU")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--only", default=";".join(VARIANTS), help="variants, separated by semicolons")
    options = parser.parse_args()
    device = torch.device(options.device)
    dtype = torch.float16 if device.type == "cuda" else torch.bfloat16
    name = options.model or ("gpt2" if device.type == "cuda" else "mlp")
    wanted = options.only.split(";")
    if unknown := set(wanted) - set(VARIANTS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; variants {tuple(VARIANTS)}")
    variants = {}
    for key in wanted:
        torch.manual_seed(0)
        variants[key] = VARIANTS[key](MODELS[name](device), dtype)
    print(f"{machine(device)}; {name}, {str(dtype).removeprefix('torch.')}, {options.steps} steps each\n")
    for variant in variants.values():
        for _ in range(WARMUP):
            take_turn(variant, device, TURN)
    before = {key: variant.sampled() for key, variant in variants.items()}
    for _ in range(max(1, options.steps // TURN)):
        for variant in variants.values():
            variant.turns.append(take_turn(variant, device, TURN))
    first = next(iter(variants.values()))
    print(
        f"| monitoring | ms a step, median | mean | mean over {wanted[0]} | median of turn over turn | samples "
        "| their share of the time |"
    )
    print("|---|---|---|---|---|---|---|")
    for key, variant in variants.items():
        mean = statistics.fmean(variant.turns)
        count, seconds = (now - then for now, then in zip(variant.sampled(), before[key], strict=True))
        share = seconds / (mean * 1e-3 * TURN * len(variant.turns))
        over = mean / statistics.fmean(first.turns) - 1
        beside = statistics.median(a / b for a, b in zip(variant.turns, first.turns, strict=True)) - 1
        print(
            f"| {key} | {statistics.median(variant.turns):.3f} | {mean:.3f} | {over:+.2%} | {beside:+.2%} | {count} "
            f"| {share:.2%} |"
        )


if __name__ == "__main__":
    main()
