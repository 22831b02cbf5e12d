"""memory_threshold_mb: what exceeds it lives in files that vanish with the arrays."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import halfstep.shrink
import numpy as np
import pandas as pd
import polars as pl
import pytest
import scipy.sparse as sp
from halfstep import shrink_memory
from halfstep.sklearn import SklearnPrecisionOptimizer

SHIM = str(Path(halfstep.__file__).resolve().parents[1])


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape)


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("halfstep-*"))


def optimizer(folder: Path, threshold: float = 0, **options) -> SklearnPrecisionOptimizer:
    return SklearnPrecisionOptimizer(memory_threshold_mb=threshold, memmap_dir=folder, **options)


def shrink(X, folder: Path, **options):
    return optimizer(folder, **options).optimize_data_precision(X)[0]


def run(code: str, *arguments: object) -> str:
    """Run a program in a fresh interpreter and return what it prints."""
    program = f"import sys\nsys.path.insert(0, {SHIM!r})\n" + textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ------------------------------------------------------------------------------------------------- values in files

ARRAYS = {
    "C": (numbers(3000, 3), np.float32),
    "F": (np.asfortranarray(numbers(3000, 3)), np.float32),
    "backwards": (numbers(6000, 3)[::-2], np.float32),
    "3-D, axes exchanged": (numbers(20, 30, 5).transpose(2, 0, 1), np.float32),
    "1-D": (numbers(5000), np.float32),
    "0-d": (numbers(), np.float32),
    "repeated": (np.broadcast_to(numbers(7), (50, 7)), np.float32),
    "other byte order": (numbers(50, 3).astype(">f8"), np.float32),
    "integers": (np.arange(-300, 5700).reshape(3000, 2), np.int16),
    "unsigned, F": (np.asfortranarray(np.arange(6000, dtype=np.uint64)[::-1].reshape(3000, 2)), np.uint16),
    "complex": ((numbers(500, 3).astype(np.float32) * (1 + 2j)).astype(complex), np.complex64),
    "masked": (np.ma.MaskedArray(numbers(50, 3), mask=numbers(50, 3) > 1), np.float32),
}


def backing(array) -> np.memmap | None:
    while array is not None and not isinstance(array, np.memmap):
        array = getattr(array, "base", None)
    return array


@pytest.mark.parametrize("block", [1 << 26, 1000, 1])
@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_of_every_sort(name: str, block: int, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(halfstep.shrink, "_BLOCK", block)  # bytes of input between two writes to the disk
    array, dtype = ARRAYS[name]
    if block == 1:
        array = array[:20] if array.ndim else array
    mode = "exact" if name == "complex" else "rtol"
    result = shrink(array, tmp_path, mode=mode)
    expected = array.astype(dtype)
    assert backing(result.data if name == "masked" else result) is not None
    assert len(files(tmp_path)) == 1
    assert result.dtype == dtype
    assert np.ma.allequal(result, expected)
    assert np.array_equal(np.asarray(result), np.asarray(expected))
    assert result.strides == expected.strides
    assert result.flags.writeable
    result[...] = 1
    assert (np.asarray(result) == 1).all()
    again = shrink(result, tmp_path, mode=mode, enable_int_downcasting=False)
    assert again is result
    del result, again
    gc.collect()
    assert files(tmp_path) == []


def test_frames_sparse_matrices_structures_and_targets(tmp_path: Path) -> None:
    block = pd.DataFrame(numbers(3000, 3), columns=list("abc"), copy=False)
    mixed = pd.DataFrame({"a": numbers(3000), "n": np.arange(3000), "text": "x", "i": pd.array([1, None] * 1500)})
    structure = np.ones(3000, [("a", "f8"), ("b", "i8")])
    for frame, count in ((block, 1), (mixed, 3)):
        result = shrink(frame, tmp_path)
        assert len(files(tmp_path)) == count
        pd.testing.assert_frame_equal(result, frame.astype(result.dtypes))
        assert all(type(series.to_numpy()) is np.ndarray for _, series in result.items())
        assert [str(dtype) for dtype in result.dtypes] != [str(dtype) for dtype in frame.dtypes]
        del result
        gc.collect()
        assert files(tmp_path) == []
    result = shrink(structure, tmp_path)
    assert isinstance(result, np.memmap)
    assert result.tolist() == structure.tolist()
    matrix = sp.csr_array(np.where(numbers(60, 50) > 1, numbers(60, 50), 0))
    small = shrink(matrix, tmp_path)
    assert all(backing(part) is not None for part in (small.data, small.indices, small.indptr))
    assert np.array_equal(small.toarray(), matrix.toarray().astype(np.float32))
    assert np.array_equal(
        (small @ small.T).toarray(), (matrix.astype(np.float32) @ matrix.astype(np.float32).T).toarray()
    )
    X, y = optimizer(tmp_path).optimize_data_precision([numbers(50), numbers(60)], np.arange(50))
    assert all(isinstance(part, np.memmap) for part in (*X, y))
    assert (y.dtype, y.tolist()) == (np.int32, list(range(50)))
    del result, small, X, y
    gc.collect()
    assert files(tmp_path) == []


def test_the_threshold_counts_the_results_of_one_call(tmp_path: Path) -> None:
    one = numbers(2**18)  # 1 MiB as float32
    both = optimizer(tmp_path, 2)
    for _ in range(3):  # each call anew
        results = both.optimize_data_precision([one, one])[0]
        assert not any(isinstance(result, np.memmap) for result in results)
    results = both.optimize_data_precision([one, one, one[:1]])[0]
    assert [isinstance(result, np.memmap) for result in results] == [False, False, True]
    results = optimizer(tmp_path, 1.5).optimize_data_precision([one, one, one[: 2**17]])[0]
    assert [isinstance(result, np.memmap) for result in results] == [False, True, False]


def test_what_is_rolled_back_is_not_counted(tmp_path: Path) -> None:
    late = numbers(2**18 + 1)
    late[-2] = 1e300  # outside of the sample
    integers = np.ones(2**20 + 3, np.int64)
    integers[-2] = 1000  # int16 after all: 2 MiB
    results = optimizer(tmp_path, 2.1).optimize_data_precision([late, late, integers])[0]
    assert results[0] is late
    assert results[2].dtype == np.int16
    assert not isinstance(results[2], np.memmap)
    assert files(tmp_path) == []


def test_what_stays_needs_no_file_and_a_plan_needs_none(tmp_path: Path) -> None:
    blocked = np.array([0.5, 1e300])
    assert shrink(blocked, tmp_path) is blocked
    assert optimizer(tmp_path).plan(numbers(5000)).columns[0].after == "float32"
    out = np.empty(3, np.float32)
    assert optimizer(tmp_path).optimize_data_precision(numbers(3), out=out)[0] is out
    assert files(tmp_path) == []


def test_polars_says_that_it_cannot_use_files(tmp_path: Path) -> None:
    frame = pl.DataFrame({"a": numbers(2**18)})
    with pytest.raises(ValueError, match="column 'a': polars cannot keep columns in files"):
        shrink(frame, tmp_path)
    assert shrink(frame, tmp_path, threshold=1)["a"].dtype == pl.Float32
    twice = frame.with_columns(b=pl.col("a"))
    with pytest.raises(ValueError, match="column 'b'"):
        shrink(twice, tmp_path, threshold=1)


# ----------------------------------------------------------------------------------------------------- life of the file


def test_the_file_lives_as_long_as_the_last_view(tmp_path: Path) -> None:
    result = shrink(numbers(3000, 3), tmp_path)
    view = np.asarray(result)[::2].T
    expected = np.array(view)
    del result
    gc.collect()
    assert len(files(tmp_path)) == 1
    assert np.array_equal(view, expected)
    del view
    gc.collect()
    assert files(tmp_path) == []


def test_the_file_vanishes_when_the_interpreter_exits(tmp_path: Path) -> None:
    code = """
    import os, sys, numpy as np
    from halfstep.sklearn import SklearnPrecisionOptimizer
    optimizer = SklearnPrecisionOptimizer(memory_threshold_mb=0, memmap_dir=sys.argv[1])
    X, _ = optimizer.optimize_data_precision(np.ones(999))
    print(len(os.listdir(sys.argv[1])))
    {end}
    """
    for end in ("", "raise SystemExit(0)", "import threading; cycle = [X]; cycle.append(cycle)"):
        assert run(code.format(end=end), tmp_path).split() == ["1"]
        assert files(tmp_path) == []


def _child(array: np.ndarray, queue) -> None:
    queue.put(float(array.sum()))
    del array
    gc.collect()


def test_a_forked_child_that_is_done_does_not_remove_the_file(tmp_path: Path) -> None:
    result = shrink(np.ones(3000), tmp_path)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            total = float(result.sum())
            del result
            gc.collect()
            status = 0 if total == 3000 else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert len(files(tmp_path)) == 1
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_child, args=(result, queue))
    process.start()
    assert queue.get(timeout=60) == 3000
    process.join()
    assert process.exitcode == 0
    assert len(files(tmp_path)) == 1
    assert result.sum() == 3000


def test_pickles_are_copies_and_joblib_workers_read_the_file(tmp_path: Path) -> None:
    import joblib

    folder = tmp_path / "maps"
    folder.mkdir()
    X = numbers(3000, 3)
    result = shrink(X, folder)
    copy = pickle.loads(pickle.dumps(result))
    sums = joblib.Parallel(n_jobs=2)(joblib.delayed(np.sum)(part) for part in (result, result[::2], result.T))
    assert np.allclose(sums, [result.sum(), result[::2].sum(), result.sum()], rtol=1e-4)
    joblib.dump(result, tmp_path / "x.joblib")
    del result
    gc.collect()
    assert files(folder) == []
    assert np.array_equal(copy, X.astype(np.float32))
    assert np.array_equal(joblib.load(tmp_path / "x.joblib"), X.astype(np.float32))


# ------------------------------------------------------------------------------------------------------------ refusals


def test_a_folder_for_temporary_files_that_lies_in_memory_is_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    X = numbers(2**18)
    for kind in ("tmpfs", "ramfs"):
        monkeypatch.setattr(shrink_memory, "file_system", lambda folder, kind=kind: kind)
        with pytest.raises(ValueError, match=r"takes 1 MB.*lies in memory too: pass memmap_dir"):
            SklearnPrecisionOptimizer(memory_threshold_mb=0.5).optimize_data_precision(X)
        assert files(tmp_path) == []
        in_memory = shrink(X, tmp_path)  # who names the folder has decided
        assert isinstance(in_memory, np.memmap)
        del in_memory
        gc.collect()
    monkeypatch.setattr(shrink_memory, "file_system", lambda folder: "ext4")
    result = SklearnPrecisionOptimizer(memory_threshold_mb=0.5).optimize_data_precision(X)[0]
    assert isinstance(result, np.memmap)
    assert len(files(tmp_path)) == 1


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch) -> None:
    real = os.statvfs(tmp_path)

    class Full:
        f_frsize, f_bavail = 4096, 2**20 // 4096 - 1
        f_bfree = real.f_bfree  # what only root may use does not count

    monkeypatch.setattr(shrink_memory.os, "statvfs", lambda folder: Full)
    made = optimizer(tmp_path)
    with pytest.raises(OSError, match="has only 1 MB left: pass another memmap_dir"):
        made.optimize_data_precision(numbers(2**18))
    assert list(tmp_path.iterdir()) == []
    assert made.report().columns == ()
    assert isinstance(made.optimize_data_precision(numbers(2**17))[0], np.memmap)


def test_the_file_systems_of_this_machine_are_told_apart(tmp_path: Path, monkeypatch) -> None:
    mounts = "rootfs / ext4 rw 0 0\nshm /dev/shm tmpfs rw 0 0\nx /dev/shm/my\\040disk xfs rw 0 0\ny /data ext4 rw 0 0\n"
    mounts += "z /data tmpfs rw 0 0\n"  # mounted over the one before
    monkeypatch.setattr(Path, "read_text", lambda self, *a: mounts)
    kinds = {
        "/srv/a": "ext4",
        "/dev/shm/a": "tmpfs",
        "/dev/shmem": "ext4",
        "/dev/shm/my disk/b": "xfs",
        "/data/c": "tmpfs",
    }
    assert {place: shrink_memory.file_system(Path(place)) for place in kinds} == kinds


# ------------------------------------------------------------------------------------------------------ peaks of memory

PEAK = """
import sys, threading, time, numpy as np
from halfstep.sklearn import SklearnPrecisionOptimizer

def resident():  # memory of its own and pages of files, in MiB
    lines = [line.split() for line in open("/proc/self/status")]
    return sum(int(line[1]) for line in lines if line[0] in ("RssAnon:", "RssFile:")) / 1024

kind, folder, threshold, order = sys.argv[1], sys.argv[2], float(sys.argv[3]), sys.argv[4]
X = np.ones((5_000_000, 10), np.float64 if kind != "int" else np.int64, order=order)  # 381 MiB
if kind == "late":
    X[-2, 3] = 1e300
if kind == "frame":
    import pandas
    X = pandas.DataFrame(X, copy=False)
SklearnPrecisionOptimizer().optimize_data_precision(np.ones((2000, 10)))  # the library is loaded
made = SklearnPrecisionOptimizer(memory_threshold_mb=threshold, memmap_dir=folder, n_jobs=2)
before, peak, done = resident(), 0.0, False

def watch():
    global peak
    while not done:
        peak = max(peak, resident())
        time.sleep(0.002)

thread = threading.Thread(target=watch)
thread.start()
result, _ = made.optimize_data_precision(X)
done = True
thread.join()
print(peak - before, resident() - before, "float32" in str(getattr(result, "dtype", "")) or result is X)
"""


def peak(folder: Path, kind: str, threshold: float, order: str = "C") -> tuple[float, float]:
    """Return the MiB of memory that a process took during a call, its pages of files included, and held after it."""
    most, held, _ = run(PEAK, kind, folder, threshold, order).split()
    return float(most), float(held)


@pytest.mark.parametrize(("kind", "order"), [("float", "C"), ("float", "F"), ("int", "C"), ("frame", "C")])
def test_beyond_the_threshold_no_memory_is_taken(kind: str, order: str, tmp_path: Path) -> None:
    most, held = peak(tmp_path, kind, 16, order)
    assert most < 32 + 48  # of the 191 MiB of the file the block that is being written stays in memory
    assert held < 48


def test_within_the_threshold_the_result_is_all_that_is_taken(tmp_path: Path) -> None:
    most, held = peak(tmp_path, "float", 1024)
    assert 150 < held < 191 + 32
    assert most < 191 + 32


def test_a_conversion_that_is_undone_gives_its_memory_back(tmp_path: Path) -> None:
    most, held = peak(tmp_path, "late", 1024)
    assert most > 150  # it was tried: this is what is given back
    assert held < 32


def test_arrow_columns_beyond_the_bound_are_refused(tmp_path: Path) -> None:
    frame = pd.DataFrame({"a": pd.array(numbers(2**18), dtype="float64[pyarrow]")})
    with pytest.raises(ValueError, match="column 'a': Arrow cannot keep columns in files"):
        SklearnPrecisionOptimizer(memory_threshold_mb=0.5, memmap_dir=tmp_path).optimize_data_precision(frame)
    assert list(tmp_path.iterdir()) == []
