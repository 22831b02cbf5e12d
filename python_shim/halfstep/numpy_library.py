"""The core's functions on NumPy arrays, through ctypes: no torch, and one library for all Python versions.

Contract of each function: `numpy_ops/include/halfstep/numpy.h`. ctypes lets other Python threads run during a call.
"""

from __future__ import annotations

import ctypes
import functools
import os

import numpy as np

from halfstep._version import __version__
from halfstep.errors import LibraryMismatchError

ABI = 2
_FILE = os.path.join(os.path.dirname(os.path.realpath(__file__)), f"numpy-{ABI}", "lib", "libhalfstep_numpy.so")
_HOW_TO_BUILD = (
    "Build it: `make setup` (with torch) or `make setup-tf` (with TensorFlow) in halfstep's folder, or "
    "`HALFSTEP_TORCH=OFF pip install .` there."
)

# halfstep::ArrayType
TYPES = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float32", "float64")
_CODES = {np.dtype(name): code for code, name in enumerate(TYPES)}
MODES = ("exact", "rtol", "force")  # halfstep::ShrinkMode
INTEGER_RULE, SPREAD_RULE = 1, 2  # halfstep::ColumnRules
FITS, OVERFLOW, UNDERFLOW, INEXACT, INTEGER, SPREAD = range(6)  # halfstep::Blocked
COLUMN = np.dtype(
    [
        ("minimum", "f8"),
        ("maximum", "f8"),
        ("error", "f8"),
        ("low", "i8"),
        ("high", "i8"),
        ("fractional", "i4"),
        ("unused", "i4"),
    ]
)
_BYTES_PER_THREAD = 1 << 22  # a thread takes some ten microseconds to start
_STREAM_FROM = 1 << 22  # bytes of output that no cache of a core holds


class _Array(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("type", ctypes.c_int32),
        ("swapped", ctypes.c_int32),
        ("dimensions", ctypes.c_int32),
        ("unused", ctypes.c_int32),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
    )


@functools.cache
def library() -> ctypes.CDLL:
    """Load the library; LibraryMismatchError if there is none, or one of another interface or version."""
    try:
        library = ctypes.CDLL(str(_FILE))
    except OSError as error:
        raise LibraryMismatchError(f"halfstep's NumPy library cannot be loaded ({error}). {_HOW_TO_BUILD}") from error
    library.halfstep_numpy_version.restype = ctypes.c_char_p
    abi, version = library.halfstep_numpy_abi(), library.halfstep_numpy_version().decode()
    if (abi, version) != (ABI, __version__):
        raise LibraryMismatchError(
            f"{_FILE}: the library is of halfstep {version} with interface {abi}, but this is halfstep {__version__} "
            f"with interface {ABI}. {_HOW_TO_BUILD}"
        )
    return library


def _call(name: str, *arguments: object) -> None:
    message = ctypes.create_string_buffer(512)
    code = getattr(library(), name)(*arguments, message, ctypes.c_int64(len(message)))
    if code == 1:
        raise ValueError(message.value.decode())
    if code != 0:
        raise RuntimeError(message.value.decode())


def _describe(array: np.ndarray) -> _Array:
    native = array.dtype.newbyteorder("=")
    return _Array(
        array.ctypes.data,
        _CODES[native],
        not array.dtype.isnative,
        array.ndim,
        0,
        ctypes.cast(array.ctypes.shape_as(ctypes.c_int64), ctypes.c_void_p) if array.ndim else None,
        ctypes.cast(array.ctypes.strides_as(ctypes.c_int64), ctypes.c_void_p) if array.ndim else None,
    )


def available_threads() -> int:
    """Return how many threads this process may use: its processors, or fewer if OMP_NUM_THREADS says so.

    joblib and other pools set that variable in their workers, so that these do not take all processors each.
    """
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = os.environ.get("OMP_NUM_THREADS", "")
    return min(processors, int(limit)) if limit.isdigit() and int(limit) > 0 else processors


def no_columns(dtype: np.dtype, count: int) -> np.ndarray:
    """Return the statistics of `count` columns of `dtype` without elements, an array of COLUMN."""
    columns = np.empty(count, COLUMN)
    _call("halfstep_shrink_reset", _CODES[dtype.newbyteorder("=")], ctypes.c_int64(count), _pointer(columns))
    return columns


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def scan(array: np.ndarray, columns: np.ndarray, axis: int, out: np.ndarray | None = None, *, threads: int = 1) -> None:
    """Add the elements of `array` to `columns`, one for each index along `axis` (-1: one); convert into `out`.

    array: integers or float64, any layout. out: the same shape, a smaller type of the same kind, no shared memory.
    """
    threads = max(1, min(threads, array.nbytes // _BYTES_PER_THREAD))
    streaming = out is not None and out.nbytes >= _STREAM_FROM
    source = _describe(array)
    target = None if out is None else ctypes.byref(_describe(out))
    _call("halfstep_shrink", ctypes.byref(source), target, axis, _pointer(columns), int(streaming), int(threads))


def decide_floats(columns: np.ndarray, mode: str, rules: int) -> tuple[np.ndarray, np.ndarray]:
    """Return why each column may not become float32 (FITS: it may), and whether its values are integers."""
    blocked, integers = np.empty(len(columns), np.int32), np.empty(len(columns), np.int32)
    arguments = (ctypes.c_int64(len(columns)), MODES.index(mode), rules, _pointer(blocked), _pointer(integers))
    _call("halfstep_shrink_decide", _pointer(columns), *arguments)
    return blocked, integers.astype(bool)


def decide_integers(columns: np.ndarray, dtype: np.dtype) -> list[np.dtype]:
    """Return the smallest type of the sign kind of `dtype` for each column."""
    types = np.empty(len(columns), np.int32)
    code = _CODES[dtype.newbyteorder("=")]
    _call("halfstep_shrink_integers", _pointer(columns), ctypes.c_int64(len(columns)), code, _pointer(types))
    return [np.dtype(TYPES[code]) for code in types]


def find_first(array: np.ndarray, axis: int, blocked: np.ndarray) -> np.ndarray:
    """Return where in each column of a float64 array what `blocked` says is seen first; -1 where nothing is."""
    positions = np.empty(len(blocked), np.int64)
    source = _describe(array)
    _call("halfstep_shrink_find", ctypes.byref(source), axis, _pointer(blocked), _pointer(positions))
    return positions
