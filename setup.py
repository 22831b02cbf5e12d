"""Drives CMake into the package; CMakeLists.txt is the only place with source lists.

Environment:
  HALFSTEP_TORCH               OFF builds the NumPy part alone, for machines without torch; default: ON
  HALFSTEP_TF                  ON builds the TensorFlow door too, for the TensorFlow of this Python; default: OFF
  HALFSTEP_CUDA                ON or OFF; default: ON if nvcc is found (devices are not asked: a Docker build sees none)
  HALFSTEP_CUDA_ARCHITECTURES  CMake's list, such as 90a-real; default: CMakeLists.txt
  CMAKE_BUILD_PARALLEL_LEVEL   compile jobs
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def torch_folder() -> tuple[Path, str]:
    """Return the folder and the version of the torch to build for."""
    try:
        import torch
    except ImportError:
        sys.exit(
            "\nhalfstep is built against the torch you use, and there is none here.\n"
            "If torch is installed, pip has hidden it (build isolation). Both cases are cured by\n\n"
            "    pip install torch 'setuptools>=77,<82' wheel 'cmake>=3.26' ninja numpy\n"
            "    pip install --no-build-isolation .\n\n"
            "The NumPy dtype optimizer alone, for scikit-learn, needs no torch:\n\n"
            "    HALFSTEP_TORCH=OFF pip install .\n"
        )
    return Path(torch.__file__).parent, torch.__version__


def check_tensorflow() -> None:
    """End with the command that works where this Python cannot import the TensorFlow to build for."""
    if importlib.util.find_spec("tensorflow") is None:
        sys.exit(
            "\nHALFSTEP_TF=ON builds for the TensorFlow you use, and there is none here.\n"
            "If TensorFlow is installed, pip has hidden it (build isolation). Both cases are cured by\n\n"
            "    pip install tensorflow 'setuptools>=77,<82' wheel 'cmake>=3.26' ninja 'nlohmann-json>=3.12'\n"
            "    HALFSTEP_TORCH=OFF HALFSTEP_TF=ON pip install --no-build-isolation .\n"
        )


def choice_of(variable: str) -> str:
    """Return ON, OFF or "" as an environment variable says."""
    choice = os.environ.get(variable, "").upper()
    if choice not in ("", "ON", "OFF"):
        sys.exit(f"{variable} is {choice!r}, expected ON or OFF")
    return choice


def wants_cuda() -> bool:
    """Return whether to build the CUDA kernels."""
    choice = choice_of("HALFSTEP_CUDA")
    return choice == "ON" or (choice == "" and shutil.which("nvcc") is not None)


def json_include() -> Path:
    """Return where nlohmann-json's package keeps its headers: beside torch, or in pip's environment for the build."""
    return Path(str(importlib.metadata.distribution("nlohmann-json").locate_file("nlohmann_json/include")))


def search_path() -> str:
    """Return PATH with the programs of this Python's environment, which need not be activated, in front."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def program(name: str) -> str:
    """Return the path of cmake or ninja."""
    found = shutil.which(name, path=search_path())
    if found is None:
        sys.exit(f"halfstep: no {name} found: pip install 'cmake>=3.26' ninja")
    return found


def cmake(*arguments: str | Path) -> None:
    """Run cmake. Its failure ends the build."""
    # Not an exception: setuptools swallows those in editable installs and installs a package without its library.
    command = [program("cmake"), *arguments]
    if subprocess.run(command, env={**os.environ, "PATH": search_path()}, check=False).returncode != 0:
        sys.exit(f"halfstep: failed: cmake {' '.join(map(str, arguments))}")


class BuildWithCMake(build_py):
    """build_py that first builds the library and installs it into the package."""

    def run(self) -> None:
        """Build, install, then copy the package."""
        torch = choice_of("HALFSTEP_TORCH") != "OFF"
        tensorflow = choice_of("HALFSTEP_TF") == "ON"
        if tensorflow:
            check_tensorflow()
        cuda = torch and wants_cuda()
        if torch:
            torch_root, torch_version = torch_folder()
            what, minor = f"torch {torch_version}", ".".join(torch_version.split(".")[:2])
        else:
            what, minor = "NumPy alone", "numpy"
        what += " and TensorFlow" if tensorflow else ""
        print(f"halfstep: building for {what}, CUDA {'ON' if cuda else 'OFF'}", flush=True)
        # Editable installs keep their build folder and put the library beside the sources.
        base = ROOT if self.editable_mode else Path(self.get_finalized_command("build").build_temp).resolve()
        build = base / "build" / f"pip-{minor}-{'cuda' if cuda else 'cpu'}"
        package = ROOT / "python_shim/halfstep" if self.editable_mode else Path(self.build_lib).resolve() / "halfstep"
        architectures = os.environ.get("HALFSTEP_CUDA_ARCHITECTURES")
        options = [
            f"-DHALFSTEP_TORCH={'ON' if torch else 'OFF'}",
            f"-DHALFSTEP_TF={'ON' if tensorflow else 'OFF'}",
            *([f"-DHALFSTEP_TF_PYTHON={sys.executable}"] if tensorflow else []),
            *([f"-DHALFSTEP_TORCH_ROOT={torch_root}"] if torch else []),
            # pip's environments for builds come and go: what an earlier one has left in the cache must not count.
            f"-DHALFSTEP_JSON_INCLUDE={json_include()}",
            f"-DCMAKE_MAKE_PROGRAM={program('ninja')}",
            f"-DHALFSTEP_CUDA={'ON' if cuda else 'OFF'}",
            "-DHALFSTEP_TESTS=OFF",
            *([f"-DCMAKE_CUDA_ARCHITECTURES={architectures}"] if architectures else []),
        ]
        cmake("-G", "Ninja", "-S", ROOT, "-B", build, *options)
        cmake("--build", build)
        super().run()
        if not self.editable_mode:
            for stale in package.glob("*-[0-9]*"):  # builds that lie in the source tree
                shutil.rmtree(stale)
        cmake("--install", build, "--prefix", package)


class PlatformWheel(bdist_wheel):
    """The library holds machine code but no Python: py3-none-<platform>."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return the wheel's tag."""
        return "py3", "none", super().get_tag()[2]


class BinaryDistribution(Distribution):
    """A distribution with machine code in it."""

    def has_ext_modules(self) -> bool:
        """Return True: the wheel is not pure Python."""
        return True


setup(cmdclass={"build_py": BuildWithCMake, "bdist_wheel": PlatformWheel}, distclass=BinaryDistribution)
