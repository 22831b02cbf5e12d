"""A whole training step, clipped to a norm of 1, with fused Adam: halfstep against torch.amp, with peak memory.

    python bench/train_step.py [--device cuda|cpu] [--dtype float16|bfloat16] [--models mlp,resnet50,gpt2,...]
                               [--only COLUMN,...] [--repeats 25] [--json PATH] [--profile COLUMN]

Columns: "amp" and "ours" run the model as written, "... compiled" under torch.compile; "captured" is manager.capture
around the same step. Each has a new model from the same seed, and one batch that it learns by heart. Peak memory is
that of the variant's whole life, from building the model. Losses are those of the first step and of a fixed later one.
Nothing is monitored; bench/monitoring.py times that.
A CPU has no capture, and runs the MLP in bfloat16 so that the script can be tried. ResNet-50 needs torchvision,
gpt2-transformers needs transformers.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable
from pathlib import Path

import halfstep
import torch
from halfstep import MixedPrecisionConfig, MixedPrecisionManager
from timing import machine, measure
from train_models import MODELS, Problem

COLUMNS = ("amp", "amp compiled", "ours", "ours compiled", "captured", "captured compiled")
WARMUP, LATER = 10, 5  # steps before the timed ones, and after them until the loss that is shown

Step = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def amp_step(problem: Problem, model: torch.nn.Module, dtype: torch.dtype, device: torch.device) -> Step:
    """Return the step as torch's documentation writes it."""
    optimizer = torch.optim.Adam(problem.model.parameters(), lr=problem.lr, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)

    def train_step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype=dtype):
            loss = problem.loss(model, x, y)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(problem.model.parameters(), 1.0, foreach=True)
        scaler.step(optimizer)
        scaler.update()
        return loss.detach()

    return train_step


def our_step(problem: Problem, model: torch.nn.Module, dtype: torch.dtype, capture: bool) -> Step:
    """Return the same with halfstep."""
    policy = f"mixed_{str(dtype).removeprefix('torch.')}"
    config = MixedPrecisionConfig(policy, gradient_clipping_threshold=1.0)
    manager = MixedPrecisionManager(framework="pytorch", config=config, enable_monitoring=False)
    optimizer = torch.optim.Adam(problem.model.parameters(), lr=problem.lr, fused=True)
    _, optimizer, scaler = manager.setup_pytorch_training(problem.model, optimizer)

    def train_step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        with manager.autocast_context():
            loss = problem.loss(model, x, y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.detach()

    return manager.capture(train_step) if capture else train_step


def run_variant(name: str, column: str, options: argparse.Namespace) -> dict[str, float] | None:
    """Return ms, peak bytes and two losses of one variant, or profile it; None if it does not exist here."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    captured = column.startswith("captured")
    if captured and device.type != "cuda":
        return None
    torch.manual_seed(0)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    problem = MODELS[name](device)
    model = torch.compile(problem.model) if column.endswith("compiled") else problem.model
    if column.startswith("amp"):
        step = amp_step(problem, model, dtype, device)
    else:
        step = our_step(problem, model, dtype, captured)

    def run() -> torch.Tensor:
        return step(problem.x, problem.y)

    first = run().item()
    if options.profile:
        profile(run, device)
        return None
    ms = measure(run, device, options.repeats, WARMUP)
    for _ in range(LATER):
        loss = run()
    measured = {"ms": ms, "first_loss": first, "later_loss": loss.item()}
    return measured | ({"peak_bytes": torch.cuda.max_memory_allocated()} if device.type == "cuda" else {})


def profile(run: Callable[[], object], device: torch.device, steps: int = 10) -> None:
    """Print the kernels of a step by their time."""
    activity = torch.profiler.ProfilerActivity
    kinds = [activity.CPU, activity.CUDA] if device.type == "cuda" else [activity.CPU]
    for _ in range(WARMUP):
        run()
    with torch.profiler.profile(activities=kinds) as trace:
        for _ in range(steps):
            run()
        if device.type == "cuda":
            torch.cuda.synchronize()
    by = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(f"{steps} steps:")
    print(trace.key_averages().table(sort_by=by, row_limit=40, max_name_column_width=90))


def clean_up() -> None:
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch._C._cuda_clearCublasWorkspaces()  # one for each stream, or they count in the next variant's peak
        torch.cuda.empty_cache()


def print_tables(results: dict[str, dict[str, dict[str, float]]], columns: list[str]) -> None:
    def table(title: str, cell: Callable[[dict, str], str]) -> None:
        print(f"\n{title}\n\n| model | {' | '.join(columns)} |\n|{'---|' * (1 + len(columns))}")
        for name, row in results.items():
            print(f"| {name} | {' | '.join(cell(row, column) if column in row else '-' for column in columns)} |")

    def time(row: dict, column: str) -> str:
        peer = row.get("amp compiled" if column.endswith("compiled") else "amp")
        ratio = f" ({peer['ms'] / row[column]['ms']:.2f}x)" if peer and not column.startswith("amp") else ""
        return f"{row[column]['ms']:.3f}{ratio}"

    table("ms (times as fast as torch.amp, eager or compiled):", time)
    if any("peak_bytes" in cells for row in results.values() for cells in row.values()):
        table("peak, MB:", lambda row, column: f"{row[column]['peak_bytes'] / 1e6:.0f}")
    table(
        "loss, first and later step:",
        lambda row, column: f"{row[column]['first_loss']:.4f} {row[column]['later_loss']:.4f}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), help="default: float16 on a GPU")
    parser.add_argument("--models", help=f"out of {','.join(MODELS)}; default: all on a GPU, mlp on a CPU")
    parser.add_argument("--only", default=",".join(COLUMNS), help="columns, separated by commas")
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--profile", choices=COLUMNS, help="print the kernels of this variant instead")
    options = parser.parse_args()
    on_gpu = options.device.startswith("cuda")
    options.dtype = options.dtype or ("float16" if on_gpu else "bfloat16")
    names = options.models.split(",") if options.models else (list(MODELS) if on_gpu else ["mlp"])
    columns = [options.profile] if options.profile else options.only.split(",")
    if unknown := (set(names) - set(MODELS)) | (set(columns) - set(COLUMNS)):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; models {tuple(MODELS)}, columns {COLUMNS}")
    halfstep.load_library()
    head = f"{machine(torch.device(options.device))}, halfstep {torch.ops.halfstep.version()}, {options.dtype}"
    print(head, flush=True)
    results: dict[str, dict[str, dict[str, float]]] = {}
    failures = []
    for name in names:
        results[name] = {}
        for column in columns:
            try:
                result = run_variant(name, column, options)
            except Exception as error:  # one variant that fails must not hide the others
                failures.append(f"{name}, {column}: {type(error).__name__}: {error}")
                result = None
            if result is not None:
                results[name][column] = result
            clean_up()
    if not options.profile:
        print_tables(results, columns)
    if options.json:
        options.json.write_text(json.dumps({"machine": head, "models": results, "failures": failures}, indent=1))
    if failures:
        raise SystemExit("failed:\n" + "\n".join(failures))


if __name__ == "__main__":
    main()
