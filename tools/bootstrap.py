"""Set-up behind `make`: environment, compiler and build, from nothing, with the system's Python alone.

    python3 tools/bootstrap.py [--torch 2.11.0] [--cuda auto|on|off] [--architectures LIST]
    python3 tools/bootstrap.py --tensorflow 2.21.0 [--tensorflow-python PYTHON]

The first leaves .venv-<torch> (and .venv, a link to it), build/<torch>-<cpu|cuda>, and the library in the Python
package; the second .venv-tf, build/tf-<version>, and TensorFlow's library beside the other. Each part says what it does
and how long that takes, and is skipped when its stamp says that it is done.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "tools" / "requirements.txt"
TENSORFLOW_REQUIREMENTS = ROOT / "tools" / "requirements-tf.txt"
TENSORFLOW = "2.21.0"


def say(text: str) -> None:
    """Print a line at once."""
    print(f"[halfstep] {text}", flush=True)


def fail(text: str) -> None:
    """End with an explanation."""
    sys.exit(f"[halfstep] {text}")


def run(*command: str | Path, **options) -> None:
    """Run a command; end with its exit code if it fails."""
    result = subprocess.run([str(part) for part in command], **options)
    if result.returncode != 0:
        fail(f"failed with exit code {result.returncode}: {' '.join(map(str, command))}")


# ------------------------------------------------------------------------------------------------- what the system has


def compiler_version(name: str) -> tuple[int, ...]:
    """Return the version of a g++, or ()."""
    try:
        text = subprocess.run([name, "-dumpfullversion"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ()
    return tuple(int(part) for part in text.strip().split("."))


def system_python() -> str:
    """Return the stem of the running Python's Debian packages: python3, or python3.12 beside another python3."""
    number = f"python3.{sys.version_info.minor}"
    return "python3" if Path("/usr/bin/python3").resolve().name == number else number


def check_system() -> None:
    """End with one line that installs whatever is missing."""
    missing = []
    if sys.version_info < (3, 10):  # noqa: UP036  (this file runs with whatever python3 is)
        fail(f"python3 is {sys.version.split()[0]}, expected 3.10 or newer; choose one with PYTHON=python3.12 make ...")
    try:
        import ensurepip  # noqa: F401
    except ImportError:
        missing.append(f"{system_python()}-venv")
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        missing.append(f"{system_python()}-dev")  # torch.compile on the CPU compiles against it
    if compiler_version(os.environ.get("CXX", "g++")) < (11,):
        missing.append("g++")
    gtest = ("/usr/include/gtest/gtest.h", "/usr/local/include/gtest/gtest.h")
    if not any(Path(path).exists() for path in gtest):
        missing.append("libgtest-dev")
    if missing:
        sudo = "" if os.geteuid() == 0 else "sudo "
        fail(
            f"missing: {', '.join(missing)}. Install with\n\n"
            f"    {sudo}apt-get update && {sudo}apt-get install -y {' '.join(missing)}\n\n"
            "and run make again. (g++ must be 11 or newer.)"
        )


def nvcc_major(nvcc: str | Path) -> str:
    """Return the CUDA major of an nvcc, or "" if it does not run: a wrapper whose toolkit is gone, for one."""
    try:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
    release = re.search(r"release (\d+)\.", text)
    return release[1] if release else ""


def gpu_capabilities() -> list[str]:
    """Ask the driver for the compute capabilities of this machine's GPUs, such as ['9.0']; [] without a GPU."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count = ctypes.c_int()
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return []
    capabilities = set()
    for ordinal in range(count.value):
        device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        cuda.cuDeviceGet(ctypes.byref(device), ordinal)
        cuda.cuDeviceGetAttribute(ctypes.byref(major), 75, device)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
        cuda.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)
        capabilities.add(f"{major.value}.{minor.value}")
    too_old = {capability for capability in capabilities if float(capability) < 7.5}  # CUDA 13 builds none for them
    if too_old:
        say(
            f"no CUDA kernels for GPUs of compute capability {', '.join(sorted(too_old))}: torch supports 7.5 and newer"
        )
    return sorted(capabilities - too_old)


def architectures_of(capabilities: list[str]) -> str:
    """Return CMake's architectures for exactly these GPUs: 9.0 needs the features of 90a, others their own number."""
    names = [capability.replace(".", "") for capability in capabilities]
    return ";".join(f"{name}a-real" if name == "90" else f"{name}-real" for name in names)


# --------------------------------------------------------------------------------------------------------- environment


class Environment:
    """A virtual environment with one framework, which `wanted` names as pip does, and what `requirements` lists."""

    def __init__(self, folder: Path, wanted: str, requirements: Path, what: str) -> None:
        self.folder = folder
        self.wanted = wanted
        self.requirements = requirements
        self.what = what
        self.bin = self.folder / "bin"
        self.python = self.bin / "python"

    def pip(self, *arguments: str | Path) -> None:
        """Run pip, quietly but for errors."""
        run(self.python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments)

    def ensure(self) -> None:
        """Make the environment and fill it, unless its stamp says that this was done with the same requirements."""
        stamp = self.folder / "halfstep.stamp"
        contents = hashlib.sha256(f"{self.wanted}\n{self.requirements.read_text()}{ROOT}".encode()).hexdigest()
        if not (stamp.exists() and stamp.read_text() == contents):
            say(f"making {self.folder.name}: downloading {self.wanted} and tools from PyPI")
            say(f"  ({self.what})")
            start = time.monotonic()
            if not self.python.exists():
                run(sys.executable, "-m", "venv", "--clear", self.folder)
            self.pip(self.wanted, "-r", self.requirements)
            purelib = subprocess.check_output(
                [self.python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"], text=True
            ).strip()
            Path(purelib, "halfstep-dev.pth").write_text(f"{ROOT / 'python_shim'}\n")
            stamp.write_text(contents)
            say(f"  done in {time.monotonic() - start:.0f} s")

    def query(self, code: str) -> str:
        """Return what a line of Python prints there."""
        return subprocess.check_output([self.python, "-c", code], text=True).strip()

    def site_packages(self) -> Path:
        """Return the folder that holds the framework."""
        return Path(self.query("import sysconfig; print(sysconfig.get_paths()['purelib'])"))


class TorchEnvironment(Environment):
    """The environment of one torch version, to which .venv links."""

    def __init__(self, torch_version: str) -> None:
        what = "torch alone is 0.5 GB, its CUDA libraries 2 GB more; 1 to 2 minutes on a fast line, 5 GB on disk"
        super().__init__(ROOT / f".venv-{torch_version}", f"torch=={torch_version}", REQUIREMENTS, what)
        self.torch_version = torch_version

    def ensure(self) -> None:
        """Make the environment and the link."""
        super().ensure()
        link = ROOT / ".venv"
        if not link.exists() or link.is_symlink():
            link.unlink(missing_ok=True)
            link.symlink_to(self.folder.name)

    def cuda_major(self) -> str:
        """Return the major of the CUDA that torch was built with, or "" for a CPU build."""
        version = (self.site_packages() / "torch" / "version.py").read_text()
        cuda = re.search(r"^cuda\b.*= '(\d+)\.", version, re.MULTILINE)
        return cuda[1] if cuda else ""


def find_nvcc(environment: TorchEnvironment) -> tuple[Path, list[str]]:
    """Return nvcc and the CMake options it needs: the system's if it is of torch's CUDA, else PyPI's."""
    major = environment.cuda_major()
    if not major:
        fail(f"torch {environment.torch_version} here is a CPU build: use HALFSTEP_CUDA=off")
    candidates = [shutil.which("nvcc"), *sorted(Path("/usr/local").glob("cuda*/bin/nvcc"))]
    for candidate in candidates:
        if candidate is not None and nvcc_major(candidate) == major:
            return Path(candidate), []
    toolkit = environment.site_packages() / "nvidia" / f"cu{major}"
    if not (toolkit / "bin" / "nvcc").exists():
        version = environment.query(
            "import importlib.metadata as m, re;"
            "print(next(re.search(r'==([0-9.]+)', r)[1] for r in m.requires('torch') if r.startswith('cuda-toolkit')))"
        )
        say(f"no nvcc {major} on this machine: installing cuda-toolkit {version} (compiler and headers) from PyPI")
        environment.pip(f"cuda-toolkit[nvcc,crt,nvvm,cccl,cudart]=={version}")
    return toolkit / "bin" / "nvcc", [f"-DCMAKE_CUDA_FLAGS=-L{toolkit / 'lib'}"]


# --------------------------------------------------------------------------------------------------------------- build


def compile_jobs() -> int:
    """Return how many compilers to run: one a core, but 2 GB of memory each."""
    with open("/proc/meminfo") as meminfo:
        available = next(int(line.split()[1]) for line in meminfo if line.startswith("MemAvailable")) // 2**20
    return max(1, min(len(os.sched_getaffinity(0)), available // 2))


def compile_and_install(
    environment: Environment, folder: Path, options: list[str], news: str, time_needed: str
) -> None:
    """Configure `folder` where its stamp says otherwise, compile, and install into the Python package."""
    stamp = folder / "halfstep.configured"
    configured = "\n".join(options)
    if not (stamp.exists() and stamp.read_text() == configured):
        say(f"configuring {folder.relative_to(ROOT)}{news}")
        shutil.rmtree(folder, ignore_errors=True)
        run(environment.bin / "cmake", "-G", "Ninja", "-S", ROOT, "-B", folder, *options, stdout=subprocess.DEVNULL)
        stamp.write_text(configured)
        say(f"compiling ({time_needed})")
    # ninja's "no work to do" is no news.
    dry_run = [str(environment.bin / "ninja"), "-C", str(folder), "-n"]
    if "no work to do" not in subprocess.run(dry_run, capture_output=True, text=True, check=False).stdout:
        start = time.monotonic()
        run(environment.bin / "cmake", "--build", folder, "-j", str(compile_jobs()))
        say(f"  compiled in {time.monotonic() - start:.0f} s")
    run(
        environment.bin / "cmake", "--install", folder, "--prefix", ROOT / "python_shim" / "halfstep",
        stdout=subprocess.DEVNULL,
    )  # fmt: skip


def build(environment: TorchEnvironment, cuda: bool, architectures: str) -> None:
    """Build for torch, and link build/latest to it."""
    folder = ROOT / "build" / f"{environment.torch_version}-{'cuda' if cuda else 'cpu'}"
    options = [
        f"-DHALFSTEP_TORCH_ROOT={environment.site_packages() / 'torch'}",
        f"-DHALFSTEP_CUDA={'ON' if cuda else 'OFF'}",
        f"-DCMAKE_MAKE_PROGRAM={environment.bin / 'ninja'}",
    ]
    if cuda:
        nvcc, extra = find_nvcc(environment)
        options += [f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DCMAKE_CUDA_ARCHITECTURES={architectures}", *extra]
    news = f" for GPU architectures {architectures}" if cuda else ""
    needed = "about 5 minutes on 2 cores" + ("; with CUDA 13" if cuda else "")
    compile_and_install(environment, folder, options, news, needed)
    latest = ROOT / "build" / "latest"
    latest.unlink(missing_ok=True)
    latest.symlink_to(folder.name)


def set_up_tensorflow(version: str, python: str, only_tools: bool) -> None:
    """Make TensorFlow's environment and build its library, for the TensorFlow of `python` if that is given.

    Ends with exit code 3 where TensorFlow does not install.
    """
    name = ".venv-tf" if version == TENSORFLOW else f".venv-tf-{version}"
    what = "0.3 GB, 2 GB on disk; about a minute on a fast line"
    environment = Environment(ROOT / name, f"tensorflow-cpu=={version}", TENSORFLOW_REQUIREMENTS, what)
    try:
        environment.ensure()
    except SystemExit as error:
        print(error)
        sys.exit(3)
    if only_tools:
        return
    options = [
        "-DHALFSTEP_TORCH=OFF",
        "-DHALFSTEP_TF=ON",
        "-DHALFSTEP_TESTS=OFF",
        f"-DHALFSTEP_TF_PYTHON={python or environment.python}",
        f"-DHALFSTEP_JSON_INCLUDE={environment.site_packages() / 'nlohmann_json' / 'include'}",
        f"-DCMAKE_MAKE_PROGRAM={environment.bin / 'ninja'}",
    ]
    folder = ROOT / "build" / f"tf-{'python' if python else version}"
    compile_and_install(environment, folder, options, f" for the TensorFlow of {python}" if python else "", "1 minute")


def main() -> None:
    """Do all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", default="2.11.0", help="torch version (default: %(default)s)")
    parser.add_argument("--cuda", default="auto", choices=("auto", "on", "off"), type=str.lower)
    parser.add_argument("--architectures", default="", help="CMake's CUDA architectures (default: this machine's GPUs)")
    parser.add_argument("--only-tools", action="store_true", help="make the environment, build nothing")
    parser.add_argument("--tensorflow", default="", help="TensorFlow version: set its door up instead of torch's")
    parser.add_argument("--tensorflow-python", default="", help="a Python whose own TensorFlow to build for")
    arguments = parser.parse_args()

    check_system()
    if arguments.tensorflow:
        set_up_tensorflow(arguments.tensorflow, arguments.tensorflow_python, arguments.only_tools)
        return
    environment = TorchEnvironment(arguments.torch)
    if arguments.only_tools:
        environment.ensure()
        return
    capabilities = gpu_capabilities()
    cuda = arguments.cuda == "on" or (arguments.cuda == "auto" and bool(capabilities))
    if cuda and not capabilities and not arguments.architectures:
        fail(
            "--cuda on: there is no GPU here to ask for its architecture; pass CUDA_ARCHITECTURES=90a-real or the like"
        )
    environment.ensure()
    build(environment, cuda, arguments.architectures or architectures_of(capabilities))


if __name__ == "__main__":
    main()
