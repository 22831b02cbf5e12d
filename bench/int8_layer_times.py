"""One linear layer in float32, half and int8, for bench/int8_models.py; sizes of the table of targets."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from halfstep.int8_layers import Int8Linear, pack
from int8_peers import onnx_linear
from timing import measure_in_turns, replayed

# rows of the input, features in and out
SIZES = {
    "cpu": [(512, 1024, 1024), (2048, 384, 1536), (1, 1024, 1024)],
    "cuda": [
        (8192, 8192, 8192),
        (8192, 4096, 4096),
        (8192, 1024, 4096),
        (4096, 768, 3072),
        (512, 4096, 4096),
        (32, 4096, 4096),
        (1, 4096, 4096),
    ],
}


def _calls(rows: int, inside: int, outside: int, device: torch.device, peers: str) -> dict[str, Callable[[], Any]]:
    x = torch.randn(rows, inside, device=device)
    weight, bias = torch.randn(outside, inside, device=device) / inside**0.5, torch.randn(outside, device=device)
    packed, scale = pack(weight, bias), x.abs().max().item() / 127
    half = torch.bfloat16
    xh, wh, bh = x.to(half), weight.to(half), bias.to(half)
    xq = torch.ops.halfstep.quantize_int8(x, scale, 0)
    static, rowwise = Int8Linear(packed, input_scale=scale), Int8Linear(packed)
    chained = Int8Linear(packed, input_scale=scale, out_scale=4 * scale)
    to_half = Int8Linear(packed, input_scale=scale, out_dtype=half)
    calls = {
        "float32": partial(F.linear, x, weight, bias),
        "bfloat16": partial(F.linear, xh, wh, bh),
        "int8 -> bfloat16": partial(to_half, xq),
        "int8 -> int8": partial(chained, xq),
        "bfloat16 -> int8 -> bfloat16": partial(static, xh),
        "bfloat16 -> int8 by row -> bfloat16": partial(rowwise, xh),
        "float32 -> int8 -> float32": partial(static, x),
        "float32 -> int8 by row -> float32": partial(rowwise, x),
        "quantize bfloat16 alone": partial(torch.ops.halfstep.quantize_int8, xh, scale, 0),
    }
    if device.type == "cuda" and rows > 16:
        calls["torch._int_mm alone"] = partial(torch._int_mm, xq, packed.weight().t())
    if device.type == "cpu" and "onnxruntime" in peers:
        try:
            calls["onnxruntime int8 static, float32"] = partial(onnx_linear(weight, bias, x), x)
        except Exception as error:
            print(f"onnxruntime: {type(error).__name__}: {error}", file=sys.stderr)
    return calls


def layer_tables(device: torch.device, rounds: int, peers: str) -> list[dict[str, Any]]:
    """Measure all sizes, print the table, and return its rows. On a GPU times are those of CUDA graphs."""
    found = []
    print("\n| rows x in x out | linear layer | ms | TOPS | float32's time / its | bfloat16's / its |")
    print("|---|---|---|---|---|---|")
    for size in SIZES[device.type]:
        torch.manual_seed(0)
        with torch.inference_mode():
            calls = {name: replayed(call, device) for name, call in _calls(*size, device, peers).items()}
            times = measure_in_turns(calls, device, rounds)
        operations = 2 * size[0] * size[1] * size[2]
        for name, taken in times.items():
            row = {
                "size": list(size),
                "run": name,
                "milliseconds": taken,
                "over float32": times["float32"] / taken,
                "over bfloat16": times["bfloat16"] / taken,
            }
            found.append(row)
            tops = "-" if name.startswith("quantize") else f"{operations / taken * 1e-9:.3g}"
            print(
                f"| {' x '.join(map(str, size))} | {name} | {taken:.4f} | {tops} | {row['over float32']:.2f}x "
                f"| {row['over bfloat16']:.2f}x |",
                flush=True,
            )
    return found
