"""The gradient check against its limit and against torch's ops: one read of the gradients, or a read and a write.

    python bench/gradients.py [--device cuda|cpu] [--millions 350]

Limit: the bytes that must move (each gradient read once; for unscaling also written once) over the bandwidth of a large
copy, measured in the same run.
"""

from __future__ import annotations

import argparse

import halfstep
import torch
from timing import copy_bandwidth, machine, measure

halfstep.load_library()
ops = torch.ops.halfstep


def tensors(shapes: list[tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    return [torch.randn(shape, device=device, dtype=torch.float32).to(dtype) for shape in shapes]


def workloads(millions: int) -> list[tuple[str, list[tuple[int, ...]]]]:
    layers = -(-millions * 1_000_000 // (4096 * 4096))
    return [
        (f"{layers} x 4096 x 4096", [(4096, 4096)] * layers),
        ("1000 x 100 x 100", [(100, 100)] * 1000),
    ]


def rows(grads: list[torch.Tensor], device: torch.device):
    """Yield (name, passes over the gradients, ours, torch's or None)."""
    scale, found, norm = (torch.tensor(value, device=device) for value in (65536.0, 0.0, 0.0))
    inverse = 1.0 / scale
    stats = torch.zeros(len(grads), 6, device=device)
    has_torch_op = grads[0].dtype is not torch.bfloat16 or device.type == "cpu"

    def torch_check() -> None:
        torch._amp_foreach_non_finite_check_and_unscale_(grads, found, torch.ones_like(inverse))

    def torch_check_and_norm() -> None:
        torch_check()
        torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))

    yield (
        "check + norm",
        1,
        lambda: ops.check_gradients_(grads, scale, found, norm),
        torch_check_and_norm if has_torch_op else None,
    )
    yield "check + norm + statistics", 1, lambda: ops.check_gradients_(grads, scale, found, norm, stats), None
    one = torch.ones_like(scale)
    yield (
        "unscale (read + write)",
        2,
        lambda: ops.unscale_(grads, one, found),
        torch_check if has_torch_op else None,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--millions", type=int, help="elements of the large list (default: 350 on a GPU, 50 on a CPU)")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    millions = arguments.millions or (350 if device.type == "cuda" else 50)
    bandwidth = copy_bandwidth(device)
    print(f"{machine(device)}, halfstep {torch.ops.halfstep.version()}, copy {bandwidth / 1e9:.0f} GB/s\n")
    print("| gradients | dtype | op | torch, ms | halfstep, ms | times torch | limit, ms | of copy bandwidth |")
    print("|---|---|---|---|---|---|---|---|")
    for label, shapes in workloads(millions):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            grads = tensors(shapes, dtype, device)
            nbytes = sum(grad.numel() * grad.element_size() for grad in grads)
            for name, passes, ours, torchs in rows(grads, device):
                limit = passes * nbytes / bandwidth * 1e3
                time = measure(ours, device)
                peer = measure(torchs, device) if torchs else float("nan")
                ratio = f"{peer / time:.2f}x" if torchs else "-"
                peer_text = f"{peer:.3f}" if torchs else "-"
                print(
                    f"| {label} | {str(dtype).removeprefix('torch.')} | {name} | {peer_text} | {time:.3f} | {ratio} | "
                    f"{limit:.3f} | {limit / time:.0%} |",
                    flush=True,
                )
            del grads


if __name__ == "__main__":
    main()
