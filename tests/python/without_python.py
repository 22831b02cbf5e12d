"""Saved models in a process without Python: halfstep_run_script of the build folder."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import torch


def run_without_python(program: Path, module: torch.jit.ScriptModule, inputs: list, folder: Path) -> tuple:
    """Return what `module`, saved and loaded there, makes of `inputs`."""
    module.save(str(folder / "model.pt"))
    return run_file(program, folder / "model.pt", inputs, folder)


def run_file(program: Path, model: Path, inputs: list, folder: Path) -> tuple:
    """Return what a TorchScript file, or a package of AOTInductor (`.pt2`, a tuple), makes of `inputs`."""
    torch.save(inputs, folder / "inputs.pt")
    libraries = Path(torch.__file__).parent / "lib"  # a package loads libtorch.so, which the program does not link
    result = subprocess.run(
        [program, model, folder / "inputs.pt", folder / "outputs.pt"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "LD_LIBRARY_PATH": f"{libraries}:{os.environ.get('LD_LIBRARY_PATH', '')}"},
    )
    assert result.returncode == 0, result.stderr
    return torch.load(folder / "outputs.pt", weights_only=True)
