"""Where results live: in memory up to a bound, beyond it in files that vanish with the arrays."""

from __future__ import annotations

import math
import mmap
import os
import weakref
from pathlib import Path

import numpy as np

_own_maps: weakref.WeakSet = weakref.WeakSet()
_RAM_BACKED = {"tmpfs", "ramfs", "devtmpfs"}


def file_system(folder: Path) -> str:
    """Return the type of the file system that holds a folder, "" where the system does not tell."""
    try:
        lines = Path("/proc/self/mounts").read_text().splitlines()
    except OSError:
        return ""
    best, kind = -1, ""
    for line in lines:
        _, place, name = line.split()[:3]
        place = place.replace("\\040", " ")
        if folder.is_relative_to(place) and len(place) >= best:
            best, kind = len(place), name
    return kind


def _remove(path: str, owner: int) -> None:
    if os.getpid() == owner:  # a forked process inherits the map, and the duty with it
        Path(path).unlink(missing_ok=True)


class Memory:
    """Allocates the results of one call: the first `budget` bytes in memory, what does not fit there in files.

    folder: where files go; None is the system's folder for temporary files, which must not itself lie in memory.
    """

    def __init__(self, budget: float, folder: str | os.PathLike | None) -> None:
        self.left = budget
        self._folder = folder

    def fits(self, nbytes: int) -> bool:
        """Return whether so many bytes may be allocated in memory."""
        return nbytes <= self.left

    def take(self, nbytes: int) -> None:
        """Count an allocation that others make."""
        self.left -= nbytes

    def give_back(self, nbytes: int) -> None:
        """Count an allocation as freed."""
        self.left += nbytes

    def empty_like(self, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """Return an array of the shape and the order of `array`: a np.memmap if it exceeds the bound."""
        nbytes = array.size * dtype.itemsize
        if self.fits(nbytes) or dtype.hasobject:  # objects do not live in files
            self.left -= nbytes
            return np.empty_like(array, dtype=dtype, subok=False)
        # The strides that np.empty_like would choose, of an array that takes no memory of this size: 0 to 2 a side.
        order = sorted(range(array.ndim), key=lambda axis: -abs(array.strides[axis]))
        flat = self._file(nbytes, dtype)
        return flat.reshape([array.shape[axis] for axis in order]).transpose(np.argsort(order))

    def _file(self, nbytes: int, dtype: np.dtype) -> np.memmap:
        import tempfile  # not above: it takes longer to import than all of this

        folder = Path(self._folder or tempfile.gettempdir()).resolve()
        if self._folder is None and file_system(folder) in _RAM_BACKED:
            raise ValueError(
                f"the result takes {nbytes / 2**20:.0f} MB, more than memory_threshold_mb leaves, and the folder for "
                f"temporary files ({folder}) lies in memory too: pass memmap_dir, or a larger memory_threshold_mb"
            )
        free = math.prod(getattr(os.statvfs(folder), name) for name in ("f_bavail", "f_frsize"))
        if free < nbytes:
            raise OSError(
                f"the result takes {nbytes / 2**20:.0f} MB, more than memory_threshold_mb leaves, and {folder} has "
                f"only {free / 2**20:.0f} MB left: pass another memmap_dir, or a larger memory_threshold_mb"
            )
        handle, path = tempfile.mkstemp(prefix="halfstep-", suffix=".mmap", dir=folder)
        os.close(handle)
        try:
            result = np.memmap(path, dtype=dtype, mode="w+", shape=(nbytes // dtype.itemsize,))
        except BaseException:
            Path(path).unlink(missing_ok=True)
            raise
        # Views outlive the array, none outlives the map.
        weakref.finalize(result._mmap, _remove, path, os.getpid())
        _own_maps.add(result._mmap)
        return result


def _own_map(array: np.ndarray | None) -> mmap.mmap | None:
    """Return the map that a Memory made for an array, None for others: users' maps may be private to the process."""
    while isinstance(array, np.ndarray):
        if isinstance(array, np.memmap) and array._mmap is not None and array._mmap in _own_maps:
            return array._mmap
        array = array.base
    return None


def is_own_file(array: np.ndarray | None) -> bool:
    """Return whether an array lies in a file that a Memory made."""
    return _own_map(array) is not None


def let_go(array: np.ndarray) -> None:
    """Let the system write an own file's array to the disk and take its memory back."""
    own = _own_map(array)
    if own is not None:
        own.flush()
        own.madvise(mmap.MADV_DONTNEED)
