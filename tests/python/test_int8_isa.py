"""int8 gives the same integers by every kernel of the CPU, and whatever oneDNN may use of the processor."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

SHIM = Path(__file__).resolve().parents[2] / "python_shim"
# HALFSTEP_MAX_INT8_ISA, and the value of oneDNN's variable that is its like: no kernel of halfstep reads that one.
ISAS = {
    "portable": "AVX2",
    "AVX2": "AVX2",
    "AVX-VNNI": "AVX2_VNNI",
    "AVX512-VNNI": "AVX512_CORE_VNNI",
    "AMX": "DEFAULT",
    "": "AVX512_CORE",
}
PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy as np
import torch
import torch.nn.functional as F
from halfstep.int8_layers import load_library

load_library()
generator = torch.Generator().manual_seed(0)


def packed(weight, stride=1, padding=0, dilation=1, groups=1):
    pairs = [[size, size] for size in (stride, padding, dilation)]
    return torch.classes.halfstep.PackedInt8(weight, torch.ones(weight.shape[0]), None, *pairs, groups, None)


for rows, terms, channels in ((1, 1, 1), (2, 64, 48), (17, 130, 33), (64, 1027, 65), (3, 32768, 5)):
    for fill in (None, 127, -128):
        shape = (rows, terms)
        x = torch.randint(-128, 128, shape, generator=generator) if fill is None else torch.full(shape, fill)
        w = torch.randint(-127, 128, (channels, terms), generator=generator) if fill is None else torch.full(
            (channels, terms), 127
        )
        for zero_point in (0, -128):
            exact = (x.numpy().astype(np.int64) - zero_point) @ w.numpy().astype(np.int64).T
            sums = torch.ops.halfstep.int8_linear(
                x.to(torch.int8), packed(w.to(torch.int8)), 1.0, zero_point, out_dtype=torch.int32
            )
            assert np.array_equal(sums.numpy(), exact), (rows, terms, channels, fill, zero_point)
for channels, outputs, size, geometry in (
    (16, 24, 3, {"padding": 1}),
    (3, 20, 7, {"padding": 3, "stride": 2}),
    (12, 18, 3, {"groups": 3, "dilation": 2}),
    (32, 32, 3, {"groups": 32, "padding": 1}),
    (70, 33, 1, {"stride": 2}),
):
    x = torch.randint(-128, 128, (2, channels, 11, 9), generator=generator)
    w = torch.randint(-127, 128, (outputs, channels // geometry.get("groups", 1), size, size), generator=generator)
    for layout in (torch.contiguous_format, torch.channels_last):
        images = x.to(torch.int8).contiguous(memory_format=layout)
        sums = torch.ops.halfstep.int8_conv2d(
            images, packed(w.to(torch.int8), **geometry), 1.0, 5, out_dtype=torch.int32
        )
        assert torch.equal(sums.long(), F.conv2d((x - 5).double(), w.double(), **geometry).long()), geometry
print("exact by", torch.ops.halfstep.int8_kernel(torch.device("cpu")))
"""


def run(isa: str, program: str = PROGRAM) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "HALFSTEP_MAX_INT8_ISA": isa,
        "ONEDNN_MAX_CPU_ISA": ISAS.get(isa, ""),
        "OMP_NUM_THREADS": "2",
    }
    return subprocess.run(
        [sys.executable, "-c", program, str(SHIM)], env=environment, capture_output=True, text=True, check=False
    )


@functools.cache
def best() -> str:
    """The kernel that is taken without a limit."""
    return run("").stdout.strip().removeprefix("exact by halfstep ")


@pytest.mark.parametrize("isa", ISAS)
def test_sums_are_exact(isa: str) -> None:
    result = run(isa)
    assert result.returncode == 0, result.stderr[-2000:]
    order = list(ISAS)[:-1]
    taken = result.stdout.strip().removeprefix("exact by halfstep ")
    if isa in ("portable", "AVX2", best()) and order.index(isa) <= order.index(best()):
        assert taken == isa
    else:  # the processor may lack it, or have a better one
        assert order.index(taken) <= order.index(isa or best())


def test_a_name_that_no_kernel_has_is_refused() -> None:
    result = run("AVX9")
    assert "ValueError: " in result.stderr or "InvalidArgument" in result.stderr
    assert "HALFSTEP_MAX_INT8_ISA is AVX9; expected portable, AVX2, AVX-VNNI, AVX512-VNNI or AMX" in result.stderr
