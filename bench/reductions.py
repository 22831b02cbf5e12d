"""Norms and cross entropy on half precision against autocast's path, which casts to float32 and back, and the limit.

    python bench/reductions.py [--device cuda|cpu] [--rows 8192] [--accuracy]

With --accuracy: the largest error of result and gradients against float64, relative to the largest value, of both.

On a GPU both are replayed from CUDA graphs, so that the kernels are timed and not their launches. A row or two of the
table fits the L2 cache of a GPU and may then pass its limit.

Limit: the bytes that must move over the bandwidth of a large copy, measured in the same run. A norm reads and writes
once forward, reads twice and writes once backward; cross entropy reads once forward, reads and writes once backward.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import halfstep
import torch
import torch.nn.functional as F
from timing import copy_bandwidth, machine, measure, replayed

halfstep.load_library()
ops = torch.ops.halfstep

Case = tuple[str, int, int, Callable, Callable, list[torch.Tensor]]


def wide(x: torch.Tensor) -> torch.Tensor:
    """Return x as autocast casts it; the float64 of a reference stays."""
    return x if x.dtype is torch.float64 else x.float()


def cases(rows: int, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """Yield (name, passes over two bytes an element forward and backward, ours, autocast's path, the inputs)."""

    def half(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype).requires_grad_()

    def parameters(size: int) -> list[torch.Tensor]:
        return [torch.randn(size, device=device, requires_grad=True) for _ in range(2)]

    for cols in (768, 1600):
        yield (
            f"layer_norm {rows} x {cols}",
            2,
            3,
            lambda x, w, b: ops.layer_norm(x, x.shape[-1:], w, b),
            lambda x, w, b: F.layer_norm(wide(x), x.shape[-1:], w, b).to(x.dtype),
            [half(rows, cols), *parameters(cols)],
        )
    yield (
        f"layer_norm {rows} x 768 of float32",
        3,
        5,
        lambda x, w, b: ops.layer_norm(x, x.shape[-1:], w, b, out_dtype=dtype),
        lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b).to(dtype if x.dtype is torch.float32 else x.dtype),
        [torch.randn(rows, 768, device=device, requires_grad=True), *parameters(768)],
    )
    yield (
        f"rms_norm {rows} x 4096",
        2,
        3,
        lambda x, w: ops.rms_norm(x, x.shape[-1:], w),
        lambda x, w: F.rms_norm(wide(x), x.shape[-1:], w).to(x.dtype),
        [half(rows, 4096), parameters(4096)[0]],
    )
    yield (
        "group_norm 32 x 320 x 64 x 64, 32 groups",
        2,
        3,
        lambda x, w, b: ops.group_norm(x, 32, w, b),
        lambda x, w, b: F.group_norm(wide(x), 32, w, b).to(x.dtype),
        [half(32, 320, 64, 64), *parameters(320)],
    )
    target = torch.randint(50257, (rows,), device=device)
    yield (
        f"cross_entropy {rows} x 50257",
        1,
        2,
        lambda logits: ops.cross_entropy(logits, target),
        lambda logits: F.cross_entropy(wide(logits), target),
        [half(rows, 50257)],
    )


def steps(function: Callable, inputs: list[torch.Tensor]) -> tuple[Callable, Callable]:
    """Return the forward without autograd, and the forward and backward."""
    grad = torch.ones_like(function(*inputs))

    def forward() -> None:
        with torch.no_grad():
            function(*inputs)

    return forward, lambda: torch.autograd.grad(function(*inputs), inputs, grad)


def results(function: Callable, inputs: list[torch.Tensor], grad: torch.Tensor) -> list[torch.Tensor]:
    """Return what function returns, and the gradients of its inputs; `grad` is that of a result with dimensions."""
    out = function(*inputs)
    grad = torch.ones_like(out) if out.dim() == 0 else grad.to(out.dtype)
    return [out, *torch.autograd.grad(out, inputs, grad)]


def print_accuracy(rows: int, device: torch.device) -> None:
    print("| op | dtype | of | torch's error | halfstep's error |")
    print("|---|---|---|---|---|")
    for dtype in (torch.bfloat16, torch.float16):
        for name, _, _, ours, torchs, inputs in cases(rows, dtype, device):
            grad = torch.randn_like(inputs[0], dtype=dtype)
            exact = results(torchs, [value.detach().double().requires_grad_() for value in inputs], grad)
            got = zip(exact, results(torchs, inputs, grad), results(ours, inputs, grad), strict=True)
            for of, (expected, *both) in zip(("result", "grad of input", "weight", "bias"), got, strict=False):
                largest = expected.abs().max()
                theirs, mine = (((value.double() - expected).abs().max() / largest).item() for value in both)
                print(
                    f"| {name} | {str(dtype).removeprefix('torch.')} | {of} | {theirs:.2e} | {mine:.2e} |", flush=True
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=int, help="tokens (default: 8192 on a GPU, 1024 on a CPU)")
    parser.add_argument("--accuracy", action="store_true", help="errors against float64 instead of times")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    rows = arguments.rows or (8192 if device.type == "cuda" else 1024)
    if arguments.accuracy:
        print(f"{machine(device)}, halfstep {torch.ops.halfstep.version()}\n")
        print_accuracy(rows, device)
        return
    bandwidth = copy_bandwidth(device)
    print(f"{machine(device)}, halfstep {torch.ops.halfstep.version()}, copy {bandwidth / 1e9:.0f} GB/s\n")
    print("| op | dtype | direction | torch, ms | halfstep, ms | times torch | limit, ms | of copy bandwidth |")
    print("|---|---|---|---|---|---|---|---|")
    for dtype in (torch.bfloat16, torch.float16):
        for name, forward, backward, ours, torchs, inputs in cases(rows, dtype, device):
            nbytes = inputs[0].numel() * 2
            directions = zip(
                ("forward", "forward + backward"),
                (forward, forward + backward),
                steps(ours, inputs),
                steps(torchs, inputs),
                strict=True,
            )
            for direction, passes, run, run_torch in directions:
                limit = passes * nbytes / bandwidth * 1e3
                time, peer = (measure(replayed(each, device), device) for each in (run, run_torch))
                print(
                    f"| {name} | {str(dtype).removeprefix('torch.')} | {direction} | {peer:.3f} | {time:.3f} | "
                    f"{peer / time:.2f}x | {limit:.3f} | {limit / time:.0%} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
