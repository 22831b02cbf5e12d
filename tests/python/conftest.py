"""What all tests share: the rule for GPU tests, devices, and the build folder."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if torch.cuda.device_count() < 2 and item.get_closest_marker("two_gpus"):
            item.add_marker(pytest.mark.skip(reason="needs two GPUs"))
    if torch.cuda.is_available():
        return
    required = os.environ.get("HALFSTEP_REQUIRE_CUDA") == "1"
    for item in items:
        if item.get_closest_marker("cuda"):
            if required:
                pytest.exit("HALFSTEP_REQUIRE_CUDA=1, but torch sees no GPU", returncode=1)
            item.add_marker(pytest.mark.skip(reason="no GPU on this machine"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(scope="session")
def build_folder() -> Path:
    """The CMake build folder that holds the C++ test programs; `make test` names it."""
    return ROOT / os.environ.get("HALFSTEP_BUILD", "build/latest")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command line of `python -m halfstep` in this process: (exit code, stdout, stderr)."""
    from halfstep.__main__ import main

    def run_line(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["halfstep", *map(str, arguments)])
        try:
            code = main()
        except SystemExit as exit:
            code = exit.code
        return code, *capsys.readouterr()

    return run_line


@pytest.fixture
def no_jit_fuser() -> Iterator[None]:
    """Keep TorchScript's fuser out of comparisons of bits: on a GPU, from the second call on, it rounds less often."""
    before = torch._C._jit_texpr_fuser_enabled()
    torch._C._jit_set_texpr_fuser_enabled(False)
    yield
    torch._C._jit_set_texpr_fuser_enabled(before)
