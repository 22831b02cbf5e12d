"""`python -m halfstep shrink`: a file of data in smaller dtypes. npy needs NumPy alone; csv and parquet need pandas."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from halfstep.shrink_report import ShrinkReport
from halfstep.sklearn_optimizer import SklearnPrecisionOptimizer


def _read_npy(path: Path) -> np.ndarray:
    # Mapped: only the result takes memory. Arrays of objects would be pickles, which can run code.
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _read_csv(path: Path) -> Any:
    # Nullable types: integers with missing values stay integers.
    return _pandas(path).read_csv(path, dtype_backend="numpy_nullable")


def _read_parquet(path: Path) -> Any:
    pandas = _pandas(path)
    try:
        return pandas.read_parquet(path, dtype_backend="pyarrow")  # the file's own types
    except ImportError as error:
        raise ImportError(f"{path}: reading parquet needs pyarrow: pip install pyarrow") from error


def _pandas(path: Path) -> Any:
    try:
        import pandas
    except ImportError as error:
        raise ImportError(f"{path}: reading it needs pandas: pip install pandas") from error
    return pandas


_READERS: dict[str, Callable[[Path], Any]] = {".npy": _read_npy, ".csv": _read_csv, ".parquet": _read_parquet}


def _check(path: Path) -> None:
    if path.suffix not in _READERS:
        raise ValueError(f"{path}: its suffix is {path.suffix!r}, expected one of {', '.join(_READERS)}")


def read(source: str) -> Any:
    """Return the array or frame of a file; ValueError for a type that is not known."""
    path = Path(source)
    _check(path)
    return _READERS[path.suffix](path)


def _write(data: Any, path: Path) -> None:
    if path.suffix == ".npy":
        with open(path, "wb") as file:
            np.save(file, data, allow_pickle=False)
    else:
        data.to_parquet(path)


def shrink_file(
    source: str, target: str | None, optimizer: SklearnPrecisionOptimizer, force: bool
) -> tuple[ShrinkReport, Path]:
    """Read a .npy, .csv or .parquet file, write it in smaller dtypes, and return the report and where it was written.

    target: a .npy for a .npy, else a .parquet, since a .csv has no dtypes; None puts `-small` before the suffix. An
    existing target is an error unless `force`, and the source itself always is. Nothing is left half written.
    """
    path = Path(source)
    _check(path)
    default = ".parquet" if path.suffix == ".csv" else path.suffix
    result = Path(target) if target else path.with_name(f"{path.stem}-small{default}")
    if result.suffix != default:
        raise ValueError(f"{result}: its suffix is {result.suffix!r}, expected {default}")
    if result.exists() and path.exists() and result.samefile(path):
        raise FileExistsError(f"{result} is the source itself")
    if result.exists() and not force:
        raise FileExistsError(f"{result} exists: --force replaces it")
    data, _ = optimizer.optimize_data_precision(read(source))
    part = result.with_name(f".{result.name}.part{result.suffix}")
    try:
        _write(data, part)
        part.replace(result)
    finally:
        part.unlink(missing_ok=True)
    return optimizer.report(), result
