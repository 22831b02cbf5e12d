"""The dtype optimizer against memcpy, NumPy, pandas and polars: `python bench/shrink.py [--mb 512]`.

The first table converts into memory that is there already: how close the pass comes to a copy of the input. The second
times whole calls, from the user's array to a new one, on fresh memory as in a program. Peers check less: pandas
compares with an absolute tolerance, polars does not check floats at all, astype checks nothing, and same_value has to
be told the dtype. Values are float32 numbers, which same_value would refuse otherwise. pandas and polars are left out
where they are not installed.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import statistics
import sys
import threading
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python_shim"))
import numpy as np
from halfstep import __version__
from halfstep import numpy_library as core
from halfstep.sklearn import SklearnPrecisionOptimizer


def measure(runs: dict[str, Callable[[], object]], repeats: int = 15) -> dict[str, float]:
    """Return the median of each in milliseconds, all of them in turn, so that a busy moment hits every one."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(2 + repeats):
        for name, run in runs.items():
            begin = time.perf_counter()
            result = run()
            times[name].append((time.perf_counter() - begin) * 1e3)
            del result
    return {name: statistics.median(values[2:]) for name, values in times.items()}


def copy_with(threads: int, target: np.ndarray, source: np.ndarray) -> Callable[[], None]:
    """Return a copy of memory by so many threads."""
    parts = list(zip(np.array_split(target, threads), np.array_split(source, threads), strict=True))

    def run() -> None:
        helpers = [threading.Thread(target=np.copyto, args=part) for part in parts[1:]]
        for helper in helpers:
            helper.start()
        np.copyto(*parts[0])
        for helper in helpers:
            helper.join()

    return run


def warm(nbytes: int, threads: int) -> list[str]:
    """Return rows: conversions into warm memory beside memcpy of the input, with the same number of threads."""
    rng = np.random.default_rng(0)
    flat = rng.normal(size=nbytes // 8)
    rows = []
    for name, array, dtype in (
        ("float64 -> float32, one column", flat, np.float32),
        ("float64 -> float32, 100 columns, C order", flat[: flat.size // 100 * 100].reshape(-1, 100), np.float32),
        ("int64 -> int8", rng.integers(-100, 100, size=flat.size), np.int8),
    ):
        target, copy = np.zeros_like(array, dtype), np.zeros_like(array)
        axis = 1 if array.ndim == 2 else -1
        columns = core.no_columns(array.dtype, array.shape[1] if array.ndim == 2 else 1)
        times = measure(
            {
                "memcpy": copy_with(threads, copy, array),
                "ours": lambda a=array, c=columns, x=axis, t=target: core.scan(a, c, x, t, threads=threads),
                "scan": lambda a=array, c=columns, x=axis: core.scan(a, c, x, threads=threads),
            }
        )
        moved = array.nbytes + target.nbytes
        share = moved / times["ours"] / (2 * array.nbytes / times["memcpy"])
        cells = [
            name,
            threads,
            f"{times['memcpy']:.1f}",
            f"{times['ours']:.1f}",
            f"{times['ours'] / times['memcpy']:.2f}x",
        ]
        cells += [f"{share:.0%}", f"{moved / times['ours'] / 1e6:.1f}", f"{times['scan']:.1f}"]
        rows.append(f"| {' | '.join(map(str, cells))} |")
    return rows


def peers(array: np.ndarray, dtype: type) -> dict[str, Callable[[], object]]:
    """Return the calls of others that give the same array."""
    found: dict[str, Callable[[], object]] = {"astype": lambda: array.astype(dtype)}
    if np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        found["astype same_value"] = lambda: array.astype(dtype, casting="same_value")
    try:
        import pandas

        column = pandas.Series(array)
        found["pandas to_numeric"] = lambda: pandas.to_numeric(
            column, downcast="float" if array.dtype.kind == "f" else "integer"
        )
    except ImportError:
        pass
    try:
        import polars

        series = polars.Series(array)
        found["polars shrink_dtype"] = lambda: series.shrink_dtype()
    except ImportError:
        pass
    return found


def whole(nbytes: int, threads: int) -> list[str]:
    """Return rows: whole calls on fresh memory, ours with one thread and with all."""
    rng = np.random.default_rng(0)
    rows = []
    for name, array, dtype in (
        ("float64 -> float32", rng.normal(size=nbytes // 8).astype(np.float32).astype(np.float64), np.float32),
        ("int64 -> int8", rng.integers(-100, 100, size=nbytes // 8), np.int8),
        ("int64 -> int32", rng.integers(-(10**9), 10**9, size=nbytes // 8), np.int32),
    ):
        runs = peers(array, dtype)
        for n in sorted({1, threads}):
            optimizer = SklearnPrecisionOptimizer(n_jobs=n, memory_threshold_mb=10**6)

            def ours(optimizer: SklearnPrecisionOptimizer = optimizer, array: np.ndarray = array) -> np.ndarray:
                optimizer.forget()
                return optimizer.optimize_data_precision(array)[0]

            runs[f"halfstep, {n} thread{'s' if n > 1 else ''}"] = ours
        assert all(str(run().dtype).lower() == np.dtype(dtype).name for run in runs.values()), name
        times = measure(runs)
        best = min(value for key, value in times.items() if key.startswith("halfstep"))
        one = times["halfstep, 1 thread"]
        for key, value in times.items():
            ratio = "-" if key.startswith("halfstep") else f"{value / one:.2f}x | {value / best:.2f}x"
            rows.append(f"| {name} | {key} | {value:.1f} | {ratio if ratio != '-' else '- | -'} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=512, help="MiB of input (default: %(default)s)")
    arguments = parser.parse_args()
    threads = len(os.sched_getaffinity(0))
    names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    cpu = names[0] if names else platform.processor()
    versions = []
    for package in ("numpy", "pandas", "polars"):
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            versions.append(f"no {package}")
    print(
        f"### {cpu}, {threads} processors, {', '.join(versions)}, halfstep {__version__}; {arguments.mb} MiB of input\n"
    )
    print(
        "| warm memory | threads | memcpy of the input, ms | ours, ms | times memcpy | of its bytes/s | GB/s | scan, ms"
        " |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for n in sorted({1, 2, threads}):
        print("\n".join(warm(arguments.mb << 20, n)), flush=True)
    print("\n| whole call, fresh memory | by | ms | ours is faster, 1 thread | all threads |\n|---|---|---|---|---|")
    print("\n".join(whole(arguments.mb << 20, threads)))


if __name__ == "__main__":
    main()
