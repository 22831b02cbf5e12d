"""One linear layer in float32, bfloat16 and int8, with peers and the limit: the table of sizes of the targets.

    python bench/int8_gemm.py [--device cuda|cpu] [--threads N] [--rounds 25] [--peers onnxruntime] [--out FILE.json]

"int8 -> bfloat16" has an int8 activation already, "bfloat16 -> int8 -> bfloat16" quantizes one, by one scale or by
rows. The limit is that of the first: bytes over the copy bandwidth of this machine, or operations over the tensor
cores' peak (1979 TOPS on an H100 SXM), whichever is longer; on a CPU it is not stated.

On a GPU a time is that of 20 calls in a CUDA graph. They go over copies of the weights that together are larger than
the L2 cache, because a layer of a model finds its weights in memory, too.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from halfstep.int8_layers import Int8Linear, pack
from int8_peers import onnx_linear
from timing import PEAKS, copy_bandwidth, machine, measure_in_turns, replayed
from torch import nn

# rows of the input, features in and out
SIZES = {
    "cpu": [(512, 1024, 1024), (2048, 384, 1536), (1, 1024, 1024)],
    "cuda": [
        (8192, 8192, 8192),
        (8192, 4096, 4096),
        (8192, 1024, 4096),
        (8192, 768, 768),
        (4096, 768, 3072),
        (4096, 3072, 768),
        (512, 4096, 4096),
        (128, 4096, 4096),
        (32, 4096, 4096),
        (1, 4096, 4096),
    ],
}
CALLS = 20
CACHE = 150e6  # bytes of weights that no cache holds


def in_turns(runs: list[Callable[[], Any]]) -> Callable[[], Any]:
    """Return a call of one after the other."""
    turns = itertools.cycle(runs)
    return lambda: next(turns)()


def eager_int8(
    x: torch.Tensor, scale: float, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """Return what torch's own operations make of an int8 product."""
    quantized = (x / scale).round().clamp(-128, 127).to(torch.int8)
    return (torch._int_mm(quantized, weight) * scales + bias).to(x.dtype)


def calls_of(rows: int, inside: int, outside: int, device: torch.device, peers: str) -> dict[str, Callable[[], Any]]:
    half = torch.bfloat16
    copies = min(CALLS, int(CACHE / (inside * outside)) + 1) if device.type == "cuda" else 1
    x = torch.randn(rows, inside, device=device)
    bias = torch.randn(outside, device=device)
    weight = torch.randn(outside, inside, device=device) / inside**0.5
    scale = x.abs().max().item() / 127
    xh, xq = x.to(half), torch.ops.halfstep.quantize_int8(x, scale, 0)
    packed = [pack(weight, bias) for _ in range(copies)]
    weights = [weight.to(half) for _ in range(copies)]

    def int8(x: torch.Tensor, **options: Any) -> Callable[[], Any]:
        layers: list[nn.Module] = [Int8Linear(each, **options) for each in packed]
        for layer in layers:  # the first call prepares the weights, which no capture may
            layer(x)
        return in_turns([partial(layer, x) for layer in layers])

    calls = {
        "bfloat16": in_turns([partial(F.linear, xh, each, bias.to(half)) for each in weights]),
        "int8 -> bfloat16": int8(xq, input_scale=scale, out_dtype=half),
        "int8 -> gelu -> int8": int8(xq, input_scale=scale, out_scale=4 * scale, activation="gelu"),
        "bfloat16 -> int8 -> bfloat16": int8(xh, input_scale=scale),
        "bfloat16 -> int8 by row -> bfloat16": int8(xh),
        "quantize bfloat16 alone": partial(torch.ops.halfstep.quantize_int8, xh, scale, 0),
    }
    if device.type == "cpu":
        calls["float32"] = partial(F.linear, x, weight, bias)
        calls["float32 -> int8 -> float32"] = int8(x, input_scale=scale)
    elif rows > 16:
        calls["torch._int_mm alone"] = in_turns([partial(torch._int_mm, xq, each.weight().t()) for each in packed])
        calls["bfloat16 -> torch._int_mm and eager code -> bfloat16"] = in_turns(
            [partial(eager_int8, xh, scale, each.weight().t(), scale * each.scales(), bias) for each in packed]
        )
    if device.type == "cpu" and "onnxruntime" in peers:
        try:
            calls["onnxruntime int8 static, float32"] = partial(onnx_linear(weight, bias, x), x)
        except Exception as error:
            print(f"onnxruntime: {type(error).__name__}: {error}", file=sys.stderr)
    return calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--peers", default="onnxruntime")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    bandwidth = copy_bandwidth(device)
    many = CALLS if device.type == "cuda" else 1
    found = []
    print(f"{machine(device)}, copy {bandwidth / 1e9:.0f} GB/s\n")
    print("| rows x in x out | linear layer | ms | TOPS | bfloat16's time / its | limit, ms |")
    print("|---|---|---|---|---|---|")
    for size in SIZES[device.type]:
        torch.manual_seed(0)
        rows, inside, outside = size
        with torch.inference_mode():
            calls = {
                name: replayed(call, device, many) for name, call in calls_of(*size, device, options.peers).items()
            }
            times = {name: ms / many for name, ms in measure_in_turns(calls, device, options.rounds).items()}
        operations, nbytes = 2 * rows * inside * outside, rows * inside + inside * outside + 2 * rows * outside
        limit = max(operations / PEAKS["int8"], nbytes / bandwidth) * 1e3
        for name, ms in times.items():
            found.append({"size": size, "run": name, "milliseconds": ms, "limit": limit})
            tops = "-" if name.startswith("quantize") else f"{operations / ms * 1e-9:.3g}"
            bound = f"{limit:.4f}" if name == "int8 -> bfloat16" and device.type == "cuda" else ""
            sizes = " x ".join(map(str, size))
            print(f"| {sizes} | {name} | {ms:.4f} | {tops} | {times['bfloat16'] / ms:.2f}x | {bound} |", flush=True)
    if options.out:
        options.out.write_text(json.dumps({"machine": machine(device), "rows": found}, indent=1))


if __name__ == "__main__":
    main()
