"""Whole int8 models exported, and as packages of AOTInductor: here, without the Python package, and in C++."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from halfstep import int8_layers
from halfstep._library import library_path
from int8_compile_cases import EXPECTED, calls_in, int8_model, noise
from torch import nn
from without_python import run_file

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
CASES = [("resnet", torch.float32), ("text", torch.bfloat16), ("bag", torch.float16)]
IDS = [f"{kind}-{dtype}".replace("torch.", "") for kind, dtype in CASES]

# The library is all that it takes: there is no halfstep to import.
SERVE = """
import sys, torch
library, package, inputs, outputs = sys.argv[1:]
torch.ops.load_library(library)
model = torch._inductor.aoti_load_package(package)
torch.save(model(*torch.load(inputs)), outputs)
assert "halfstep" not in sys.modules
"""


def exported(model: nn.Module, x: torch.Tensor) -> torch.export.ExportedProgram:
    """Export the model for batches of 2 to 64."""
    shapes = torch.export.ShapesCollection()  # the tensor's, wherever it stands among the arguments
    shapes[x] = {0: torch.export.Dim("batch", min=2, max=64)}
    with torch.no_grad():
        return torch.export.export(model, (x,), dynamic_shapes=shapes, strict=False)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("kind", "dtype"), [*CASES, ("mobilenet", torch.float16), ("signal", torch.bfloat16)])
def test_exported_programs_are_saved_with_all_ops_whole(
    kind: str, dtype: torch.dtype, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = int8_model(kind, dtype, device, monkeypatch)
    program = exported(model, batch(4))
    assert calls_in(program.graph) == EXPECTED[kind]
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2")
    for size in (2, 5):
        x = batch(size)
        with torch.no_grad():
            expected = model(x)
            assert torch.equal(program.module()(x), expected)
            assert torch.equal(loaded.module()(x), expected)


@pytest.mark.slow  # half a minute each, for the C++ compiler
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("kind", "dtype"), CASES, ids=IDS)
def test_aot_inductor(
    kind: str, dtype: torch.dtype, device: str, tmp_path: Path, build_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One package, called in three processes with batches of two sizes; torch.compile's bits in all of them."""
    model, batch = int8_model(kind, dtype, device, monkeypatch)
    program = exported(model, batch(4))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    here: Any = torch._inductor.aoti_load_package(package)
    for size in (2, 5):
        x = batch(size)
        with torch.no_grad():
            out = here(x)
            assert noise(out, model(x)) <= (0.002 if dtype == torch.float32 else 0.02)
        assert torch.equal(without_halfstep(package, x, tmp_path), out)
        assert torch.equal(in_cpp(package, x, tmp_path, build_folder), out)


def without_halfstep(package: str, x: torch.Tensor, folder: Path) -> torch.Tensor:
    """Call the package in a new process of Python that loads the library alone."""
    library = library_path()
    torch.save([x], folder / "inputs.pt")
    command = [sys.executable, "-c", SERVE, library, package, folder / "inputs.pt", folder / "outputs.pt"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=environment)
    assert result.returncode == 0, result.stderr
    return torch.load(folder / "outputs.pt")


def in_cpp(package: str, x: torch.Tensor, folder: Path, build_folder: Path) -> torch.Tensor:
    program = build_folder / "tests" / "halfstep_run_script"
    assert program.exists(), f"{program} is not built; run these tests with make test"
    (out,) = run_file(program, Path(package), [x], folder)
    return out


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_the_ops_of_exported_programs_take_types_by_name(name: str, device: str) -> None:
    dtype, ops = getattr(torch, name), torch.ops.halfstep
    linear = int8_layers.pack(torch.randn(8, 16)).to(torch.device(device))
    x = torch.randn(3, 16, device=device)
    q = ops.quantize_int8(x, 0.02)
    images = torch.randn(2, 16, 5, 5, device=device)
    conv = int8_layers.pack(torch.randn(8, 16, 3, 3)).to(torch.device(device))
    ids = torch.tensor([1, 7, 0], device=device)
    for op, args, kwargs in (
        ("int8_linear", (q, linear, 0.02), {"activation": "relu"}),
        ("int8_linear", (x, linear), {"residual": torch.randn(3, 8, device=device)}),
        ("int8_conv2d", (images, conv, 0.02, 3), {}),
        ("int8_embedding", (ids, linear), {}),
        ("dequantize_weight", (linear,), {}),
    ):
        expected = getattr(ops, op)(*args, out_dtype=dtype, **kwargs)
        out = getattr(ops, op + "_named_dtype")(*args, out_dtype=name, **kwargs)
        assert out.dtype == dtype
        assert torch.equal(out, expected)
    assert ops.int8_linear_named_dtype(x, linear, 0.02, out_dtype="int32").dtype == torch.int32
    assert ops.int8_linear_named_dtype(x, linear, out_dtype="int8", out_scale=0.1).dtype == torch.int8
    with pytest.raises(ValueError, match="int8_linear_named_dtype: out_dtype is 'double', expected float32, float16"):
        ops.int8_linear_named_dtype(x, linear, out_dtype="double")
