"""The wheel, away from the source tree: what is in it, and that Python and C++ programs can use it."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow
BIN = Path(sys.executable).parent


def run(*command: str | Path, **options) -> str:
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", **options.pop("env", {})}
    result = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, env=environment, check=False, **options
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def copy_working_tree(target: Path) -> None:
    for name in run("git", "ls-files", "-co", "--exclude-standard", cwd=ROOT).splitlines():
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes((ROOT / name).read_bytes())


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel without build isolation and without CUDA, and install it into a folder of its own."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    run("git", "clone", "--quiet", "--no-hardlinks", ROOT, source) if (ROOT / ".git").exists() else None
    # The working tree, not the last commit, is what is tested.
    copy_working_tree(source)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-build-isolation", "--no-deps", "-w", folder, source, env={"HALFSTEP_CUDA": "OFF"})
    (wheel,) = folder.glob("*.whl")
    assert "-py3-none-linux_" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert not [name for name in names if name.startswith("tests/") or name.endswith((".cu", ".o"))]
    assert "modules/engine/mixed_precision.py" in names
    assert not [name for name in names if name in ("modules/__init__.py", "modules/engine/__init__.py")]
    assert len([name for name in names if name.endswith("/lib/libhalfstep_numpy.so")]) == 1
    for needed in ("lib/libhalfstep_torch.so", "include/halfstep/torch.h", "cmake/halfstepConfig.cmake"):
        assert len([name for name in names if name.endswith(needed)]) == 1, needed
    run(*pip, "install", "--no-deps", "--target", folder / "site", wheel)
    return folder / "site"


def test_the_installed_wheel_trains(installed: Path, tmp_path: Path) -> None:
    code = (
        "import halfstep, torch; print(halfstep.__file__)\n"
        "from modules.engine.mixed_precision import MixedPrecisionManager\n"
        "m = torch.nn.Linear(2, 1); o = torch.optim.SGD(m.parameters(), lr=0.1)\n"
        "mp = MixedPrecisionManager(); m, o, s = mp.setup_pytorch_training(m, o)\n"
        "with mp.autocast_context(): loss = m(torch.ones(4, 2)).sum()\n"
        "s.scale(loss).backward(); s.step(o); s.update(); print(mp.get_statistics().steps)\n"
    )
    printed = run(sys.executable, "-c", code, cwd=tmp_path, env={"PYTHONPATH": str(installed)}).splitlines()
    assert printed == [str(installed / "halfstep" / "__init__.py"), "1"]


def test_the_numpy_part_builds_without_torch(tmp_path: Path) -> None:
    """In an environment that has NumPy and the tools for the build, and nothing of torch."""
    source, site = tmp_path / "source", tmp_path / "site"
    copy_working_tree(source)
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "torch.py").write_text("raise ImportError('there is no torch here')\n")
    environment = {"HALFSTEP_TORCH": "OFF", "PYTHONPATH": str(blocked)}
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "install", "--no-build-isolation", "--no-deps", "--target", site, source, env=environment)
    assert [path.name for path in site.rglob("*.so")] == ["libhalfstep_numpy.so"]
    code = (
        "from modules.engine.mixed_precision import SklearnPrecisionOptimizer\n"
        "import halfstep, numpy as np; print(halfstep.__file__)\n"
        "print(SklearnPrecisionOptimizer().optimize_data_precision(np.ones(3))[0].dtype)\n"
    )
    printed = run(sys.executable, "-c", code, cwd=tmp_path, env={"PYTHONPATH": f"{site}:{blocked}"}).splitlines()
    assert printed == [str(site / "halfstep" / "__init__.py"), "float32"]


@pytest.mark.parametrize("layout", ["wheel", "make"])
def test_a_cmake_project_uses_it(installed: Path, tmp_path: Path, layout: str) -> None:
    """tests/consumer names the ops only as text: its linker must still keep the library.

    The library of `make` lies far from torch, and with CUDA it needs more of it: the program must find all of that.
    """
    folder = installed if layout == "wheel" else ROOT / "python_shim"
    environment = {"PYTHONPATH": str(folder)}
    prefix = run(sys.executable, "-m", "halfstep", "--cmake-prefix", env=environment).strip()
    assert str(folder) in prefix
    # No CUDA toolkit may be needed: hide this machine's.
    hidden = {"PATH": f"{BIN}:/usr/bin:/bin", "CUDA_PATH": "", "CUDACXX": ""}
    options = (f"-DCMAKE_PREFIX_PATH={prefix}", "-DCMAKE_EXE_LINKER_FLAGS=-Wl,--as-needed", "-G", "Ninja")
    run(BIN / "cmake", "-S", ROOT / "tests" / "consumer", "-B", tmp_path, *options, env=hidden)
    run(BIN / "cmake", "--build", tmp_path, env=hidden)
    assert run(tmp_path / "consumer") == "halfstep says 0.5 1.5\n"


def test_another_torch_minor_is_refused_when_cmake_configures(installed: Path, tmp_path: Path) -> None:
    fake = tmp_path / "torch" / "include" / "torch" / "headeronly"
    fake.mkdir(parents=True)
    (fake / "version.h").write_text(
        "#define TORCH_VERSION_MAJOR 2\n#define TORCH_VERSION_MINOR 99\n#define TORCH_VERSION_PATCH 0\n"
    )
    (config,) = installed.glob("halfstep/torch-*/cmake")
    command = [BIN / "cmake", "-S", ROOT / "tests" / "consumer", "-B", tmp_path / "build", "-G", "Ninja"]
    options = [f"-Dhalfstep_DIR={config}", f"-DHALFSTEP_TORCH_ROOT={tmp_path / 'torch'}"]
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}
    result = subprocess.run([*command, *options], capture_output=True, text=True, check=False, env=environment)
    assert result.returncode != 0
    assert "halfstep was built for LibTorch" in result.stderr


def test_an_isolated_build_without_torch_prints_the_command_that_works(tmp_path: Path) -> None:
    code = "import sys; sys.modules['torch'] = None; sys.argv = ['setup.py', 'build_py']; exec(open('setup.py').read())"
    result = subprocess.run(
        [sys.executable, "-c", f"__file__ = {str(ROOT / 'setup.py')!r}\n{code}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert result.returncode != 0
    assert "pip install --no-build-isolation ." in result.stderr
