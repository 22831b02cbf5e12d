"""Loading the compiled library: the right one, once, with an error that helps otherwise."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import halfstep
import pytest
import torch
from halfstep import LibraryMismatchError, _library

ROOT = Path(__file__).resolve().parents[2]
halfstep.load_library()
LIBRARY = _library.library_path()


def python(code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "python_shim")}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(_library, "_PACKAGE", tmp_path)
    return tmp_path


def add_build(package: Path, folder: str, **info: str) -> None:
    path = package / f"torch-{folder}"
    path.mkdir()
    (path / "build_info.json").write_text(json.dumps({"halfstep": halfstep.__version__, "torch": folder, **info}))


def test_versions_are_the_librarys_own() -> None:
    assert torch.ops.halfstep.version() == halfstep.__version__
    info = halfstep.build_info()
    assert info["halfstep"] == halfstep.__version__
    assert torch.__version__.startswith(info["torch"])


def test_no_library_at_all(package: Path) -> None:
    with pytest.raises(
        LibraryMismatchError, match=r"for no torch at all, but this is torch 2\.11\.0\. Build it: `make setup`"
    ):
        _library.find_folder("2.11.0+cpu".removesuffix("+cpu"))


def test_a_library_for_another_minor(package: Path) -> None:
    add_build(package, "2.10")
    add_build(package, "2.12")
    with pytest.raises(LibraryMismatchError, match=r"for torch 2\.10, 2\.12, but this is torch 2\.11\.0"):
        _library.find_folder("2.11.0")
    assert _library.find_folder("2.12.1+cu130") == package / "torch-2.12"


def test_a_folder_that_lies_about_its_torch(package: Path) -> None:
    add_build(package, "2.11", torch="2.12.0")
    with pytest.raises(LibraryMismatchError, match=r"was built for torch 2\.12\.0, but this is torch 2\.11\.0"):
        _library.find_folder("2.11.0")


def test_a_library_of_another_halfstep(package: Path) -> None:
    add_build(package, "2.11", halfstep="0.0.1")
    with pytest.raises(LibraryMismatchError, match=r"is of halfstep 0\.0\.1, but this is halfstep"):
        _library.find_folder("2.11.0")


def test_a_damaged_build_info(package: Path) -> None:
    add_build(package, "2.11")
    (package / "torch-2.11" / "build_info.json").write_text("{")
    with pytest.raises(LibraryMismatchError, match="build_info.json cannot be read"):
        _library.find_folder("2.11.0")


def test_the_library_may_be_loaded_before_the_package() -> None:
    result = python(
        f"import torch; torch.ops.load_library({str(LIBRARY)!r}); import halfstep; halfstep.GradScaler('cpu')"
    )
    assert result.returncode == 0, result.stderr


def test_a_second_copy_of_the_library_stays_idle(tmp_path: Path) -> None:
    copy = shutil.copy(LIBRARY, tmp_path / "second.so")
    result = python(
        "import torch, halfstep; halfstep.GradScaler('cpu')\n"
        f"torch.ops.load_library({str(copy)!r})\n"
        "s = halfstep.GradScaler('cpu', init_scale=2.0)\n"
        "assert s.scale(torch.ones(())).item() == 2.0\n"
        "print('alive')"
    )
    assert result.stdout == "alive\n", result.stderr
    assert "registers nothing and the first one stays in use" in result.stderr


def test_a_loaded_library_of_another_version_is_an_error() -> None:
    result = python(
        f"import torch; torch.ops.load_library({str(LIBRARY)!r})\n"
        "import halfstep._version; halfstep._version.__version__ = '9.9.9'\n"
        "import halfstep._library; halfstep._library.__version__ = '9.9.9'\n"
        "try:\n    halfstep._library.load_library()\n"
        "except halfstep._library.LibraryMismatchError as error:\n    print(error)"
    )
    assert f"has loaded the library of halfstep {torch.ops.halfstep.version()} already, but this is halfstep 9.9.9" in (
        result.stdout
    ), result.stderr


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_a_process_with_another_torch_is_told_and_ended(tmp_path: Path) -> None:
    # The program answers for torch 2.99; symbols of the executable come before those of libraries.
    (tmp_path / "main.c").write_text(
        "#include <dlfcn.h>\n#include <stdint.h>\n#include <stdio.h>\n"
        "uint64_t aoti_torch_abi_version(void) { return (2ull << 56) | (99ull << 48); }\n"
        'int main(int c, char** v) { void* h = dlopen(v[1], RTLD_LAZY); puts(h ? "loaded" : dlerror()); return 0; }\n'
    )
    subprocess.run(["gcc", "-rdynamic", "main.c", "-o", "main", "-ldl"], cwd=tmp_path, check=True)
    torch_lib = Path(torch.__file__).parent / "lib"
    nvidia = ":".join(str(path) for path in Path(torch.__file__).parents[1].glob("nvidia/*/lib"))
    environment = {**os.environ, "LD_LIBRARY_PATH": f"{torch_lib}:{nvidia}"}
    result = subprocess.run([tmp_path / "main", LIBRARY], capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 1
    assert "was built for torch" in result.stderr
    assert "but this process runs torch 2.99. Build halfstep against that torch" in result.stderr
    assert "loaded" not in result.stdout


def test_importing_the_package_imports_neither_torch_nor_numpy() -> None:
    result = python(
        "import sys, halfstep, halfstep.config, modules.engine.mixed_precision\n"
        "halfstep.MixedPrecisionConfig(); halfstep.MixedPrecisionManager; halfstep.MixedPrecisionStatistics\n"
        "print([name for name in ('torch', 'numpy') if name in sys.modules])"
    )
    assert result.stdout == "[]\n", result.stderr


def test_without_torch_the_manager_says_what_to_install() -> None:
    result = python(
        "import sys, importlib.util; find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'torch' else find(name, *rest)\n"
        "import halfstep\n"
        "try:\n    halfstep.MixedPrecisionManager(framework='pytorch')\n"
        "except ImportError as error:\n    print(error)"
    )
    assert "torch is not installed: pip install torch" in result.stdout, result.stderr


def test_a_users_own_modules_package_stays_visible(tmp_path: Path) -> None:
    (tmp_path / "modules" / "mine").mkdir(parents=True)
    (tmp_path / "modules" / "mine" / "thing.py").write_text("value = 3\n")
    result = python(
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import modules.mine.thing as t, modules.engine.mixed_precision as m\n"
        "print(t.value, m.MixedPrecisionConfig.__name__)"
    )
    assert result.stdout == "3 MixedPrecisionConfig\n", result.stderr


def test_the_command_line() -> None:
    for option, expected in (
        ("--cmake-prefix", "torch-"),
        ("--library", "libhalfstep_torch.so"),
        ("--build-info", "cuda_architectures"),
    ):
        result = subprocess.run([sys.executable, "-m", "halfstep", option], capture_output=True, text=True, check=True)
        assert expected in result.stdout
