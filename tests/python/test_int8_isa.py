"""int8 gives the same integers whatever oneDNN, which torch's own kernels stand on, may use of the processor."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SHIM = Path(__file__).resolve().parents[2] / "python_shim"
ISAS = ("AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI", "DEFAULT")
PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy as np
import torch
import torch.nn.functional as F
from halfstep.int8_layers import load_library

load_library()
generator = torch.Generator().manual_seed(0)


def packed(weight, padding):
    return torch.classes.halfstep.PackedInt8(
        weight, torch.ones(weight.shape[0]), None, [1, 1], padding, [1, 1], 1, None
    )


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
                x.to(torch.int8), packed(w.to(torch.int8), [0, 0]), 1.0, zero_point, out_dtype=torch.int32
            )
            assert np.array_equal(sums.numpy(), exact), (rows, terms, channels, fill, zero_point)
x = torch.randint(-128, 128, (2, 16, 9, 7), generator=generator)
w = torch.randint(-127, 128, (24, 16, 3, 3), generator=generator)
sums = torch.ops.halfstep.int8_conv2d(
    x.to(torch.int8), packed(w.to(torch.int8), [1, 1]), 1.0, 5, out_dtype=torch.int32
)
assert torch.equal(sums.long(), F.conv2d((x - 5).double(), w.double(), padding=1).long())
print("exact by", torch.ops.halfstep.int8_kernel(torch.device("cpu")))
"""


@pytest.mark.parametrize("isa", ISAS)
def test_sums_are_exact(isa: str) -> None:
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": isa, "OMP_NUM_THREADS": "2"}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(SHIM)], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.startswith("exact by halfstep")
