"""One convolution in float32, bfloat16 and int8, over the sizes of ResNets, with the limit of a GPU.

    python bench/int8_conv.py [--device cuda|cpu] [--threads N] [--rounds 25] [--out FILE.json]

Images lie with their channels last in all types, and relu follows each convolution: int8 does it in its epilogue.
"int8 -> int8" is a convolution between others, "bfloat16 -> int8 -> bfloat16" one that quantizes its input. The limit
is that of "int8 -> int8": bytes over the copy bandwidth of this machine, or operations over the tensor cores' peak
(1979 TOPS on an H100 SXM), whichever is longer; on a CPU it is not stated. On a GPU times are those of CUDA graphs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from halfstep.int8_layers import Int8Conv2d, pack
from timing import PEAKS, copy_bandwidth, machine, measure_in_turns, replayed


@dataclass(frozen=True)
class Size:
    """A square convolution of square images, padded by half of its kernel, or patches of them."""

    batch: int
    pixels: int
    inside: int
    outside: int
    kernel: int = 3
    stride: int = 1

    @property
    def padding(self) -> int:
        """The pixels around an image."""
        return 0 if self.stride == self.kernel else self.kernel // 2

    @property
    def out_pixels(self) -> int:
        """The height of the output."""
        return (self.pixels + 2 * self.padding - self.kernel) // self.stride + 1

    def operations(self) -> int:
        """Return multiplications and additions."""
        return 2 * self.batch * self.out_pixels**2 * self.outside * self.inside * self.kernel**2

    def int8_bytes(self) -> int:
        """Return what is read and written if both are int8."""
        images = self.batch * (self.pixels**2 * self.inside + self.out_pixels**2 * self.outside)
        return images + self.outside * self.inside * self.kernel**2

    def __str__(self) -> str:
        images = f"{self.batch} x {self.pixels} x {self.pixels} x {self.inside}"
        return f"{images} to {self.outside}, {self.kernel} x {self.kernel}, stride {self.stride}"


SIZES = {
    "cpu": [
        Size(16, 56, 16, 16),
        Size(16, 56, 32, 32),
        Size(16, 56, 64, 64),
        Size(16, 28, 128, 128),
        Size(16, 14, 256, 256),
        Size(16, 7, 512, 512),
        Size(16, 56, 64, 128, 3, 2),
        Size(16, 56, 64, 256, 1),
        Size(16, 112, 3, 32, 3, 2),
    ],
    "cuda": [
        Size(64, 224, 3, 64, 7, 2),
        Size(64, 56, 64, 64),
        Size(64, 28, 128, 128),
        Size(64, 14, 256, 256),
        Size(64, 7, 512, 512),
        Size(64, 56, 128, 128, 3, 2),
        Size(64, 56, 256, 512, 1, 2),
        Size(64, 56, 64, 256, 1),
        Size(256, 16, 128, 128, 5),
        Size(64, 224, 3, 768, 16, 16),
        Size(1, 56, 64, 64),
    ],
}


def calls_of(size: Size, device: torch.device) -> dict[str, Callable[[], Any]]:
    half, last = torch.bfloat16, torch.channels_last
    x = torch.randn(size.batch, size.inside, size.pixels, size.pixels, device=device).to(memory_format=last)
    bias = torch.randn(size.outside, device=device)
    weight = torch.randn(size.outside, size.inside, size.kernel, size.kernel, device=device)
    weight = (weight / weight[0].numel() ** 0.5).to(memory_format=last)
    scale = x.abs().max().item() / 127
    xq, padding = torch.ops.halfstep.quantize_int8(x, scale, 0), size.padding
    packed = pack(weight, bias, stride=size.stride, padding=padding)

    def plain(dtype: torch.dtype) -> Callable[[], Any]:
        given = [each.to(dtype) for each in (x, weight, bias)]
        return lambda: F.relu_(F.conv2d(*given, size.stride, padding))

    def int8(x: torch.Tensor, **options: Any) -> Callable[[], Any]:
        return partial(Int8Conv2d(packed, input_scale=scale, activation="relu", **options), x)

    calls = {
        "bfloat16": plain(half),
        "int8 -> int8": int8(xq, out_scale=4 * scale),
        "int8 -> bfloat16": int8(xq, out_dtype=half),
        "bfloat16 -> int8 -> bfloat16": int8(x.to(half)),
    }
    if device.type == "cpu":
        calls["float32"] = plain(torch.float32)
        calls["float32 -> int8 -> float32"] = int8(x)
    return calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.backends.cudnn.benchmark = True
    device = torch.device(options.device)
    bandwidth, peak, found = copy_bandwidth(device), PEAKS["int8"], []
    print(f"{machine(device)}, copy {bandwidth / 1e9:.0f} GB/s\n")
    print("| images to channels, kernel | convolution | ms | TOPS | bfloat16's time / its | limit, ms |")
    print("|---|---|---|---|---|---|")
    for size in SIZES[device.type]:
        torch.manual_seed(0)
        with torch.inference_mode():
            calls = calls_of(size, device)
            for call in calls.values():  # the first call prepares the weights, which no capture may
                call()
            calls = {name: replayed(call, device) for name, call in calls.items()}
            times = measure_in_turns(calls, device, options.rounds)
        limit = max(size.operations() / peak, size.int8_bytes() / bandwidth) * 1e3
        for name, ms in times.items():
            found.append({"size": astuple(size), "run": name, "milliseconds": ms, "limit": limit})
            bound = f"{limit:.4f}" if name == "int8 -> int8" and device.type == "cuda" else ""
            tops = f"{size.operations() / ms * 1e-9:.3g}"
            print(f"| {size} | {name} | {ms:.4f} | {tops} | {times['bfloat16'] / ms:.2f}x | {bound} |", flush=True)
    if options.out:
        options.out.write_text(json.dumps({"machine": machine(device), "rows": found}, indent=1))


if __name__ == "__main__":
    main()
