"""Finds and loads the compiled library for the running torch.

The library is a plain shared object without Python, one per torch minor version, in `halfstep/torch-<minor>/`. torch
promises no C++ ABI between minors, so versions are compared before anything is loaded.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

from halfstep._version import __version__
from halfstep.errors import LibraryMismatchError

_PACKAGE = Path(__file__).resolve().parent
_HOW_TO_BUILD = (
    "Build it: `make setup` in halfstep's folder, or `pip install --no-build-isolation .` there with the Python that "
    "has this torch."
)


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _folders() -> dict[str, Path]:
    return {path.name.removeprefix("torch-"): path for path in sorted(_PACKAGE.glob("torch-*")) if path.is_dir()}


def find_folder(torch_version: str) -> Path:
    """Return the folder with the build for `torch_version`; raise LibraryMismatchError if there is no right one."""
    folders = _folders()
    folder = folders.get(_minor(torch_version))
    if folder is None:
        have = f"for torch {', '.join(folders)}" if folders else "for no torch at all"
        raise LibraryMismatchError(
            f"halfstep {__version__} has a compiled library {have}, but this is torch {torch_version}. {_HOW_TO_BUILD}"
        )
    try:
        info = json.loads((folder / "build_info.json").read_text())
    except (OSError, ValueError) as error:
        raise LibraryMismatchError(f"{folder}: build_info.json cannot be read ({error}). {_HOW_TO_BUILD}") from error
    if _minor(str(info.get("torch"))) != _minor(torch_version):
        raise LibraryMismatchError(
            f"{folder}: the library was built for torch {info.get('torch')}, but this is torch {torch_version}. "
            f"{_HOW_TO_BUILD}"
        )
    if info.get("halfstep") != __version__:
        raise LibraryMismatchError(
            f"{folder}: the library is of halfstep {info.get('halfstep')}, but this is halfstep {__version__}. "
            f"{_HOW_TO_BUILD}"
        )
    return folder


def _loaded_version() -> str | None:
    """Return the version of a halfstep library that this process has loaded already, by whomever."""
    import torch

    try:
        return torch.ops.halfstep.version()
    except AttributeError:
        return None


@functools.cache
def load_library() -> None:
    """Load the library for the running torch: torch.ops.halfstep and torch.classes.halfstep are there afterwards.

    Classes such as GradScaler do it by themselves. A library of the same version that is loaded already stays in use;
    LibraryMismatchError if there is none for this torch, or one of another version is loaded.
    """
    import torch

    loaded = _loaded_version()
    if loaded is None:
        torch.ops.load_library(library_path())
        loaded = _loaded_version()
    if loaded != __version__:
        raise LibraryMismatchError(
            f"this process has loaded the library of halfstep {loaded} already, but this is halfstep {__version__}. "
            "Load only one: let `import halfstep` do it, or install the matching package."
        )


def library_path() -> Path:
    """Return the library of the ops and classes for the running torch, which processes without the package load."""
    import torch

    return find_folder(torch.__version__) / "lib" / "libhalfstep_torch.so"


def build_info() -> dict[str, str]:
    """Return how the library for the running torch was built: versions, CUDA architectures, compilers."""
    import torch

    return json.loads((find_folder(torch.__version__) / "build_info.json").read_text())


def cmake_prefix() -> tuple[Path, Path]:
    """Return the folders for CMAKE_PREFIX_PATH in which find_package(halfstep) finds halfstep and its torch."""
    import torch

    return find_folder(torch.__version__) / "cmake", Path(torch.utils.cmake_prefix_path)
