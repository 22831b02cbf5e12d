"""The library that ctypes loads: its absence, its version, its errors; and what importing the package imports."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import halfstep
import numpy as np
import pytest
from halfstep import numpy_library
from halfstep.errors import LibraryMismatchError

SHIM = str(Path(halfstep.__file__).resolve().parents[1])


@pytest.fixture
def fresh(monkeypatch):
    """Let the library be loaded again, and again after the test."""
    numpy_library.library.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    numpy_library.library.cache_clear()


def test_a_library_that_is_not_there_says_how_to_build_it(fresh, tmp_path: Path) -> None:
    fresh.setattr(numpy_library, "_FILE", tmp_path / "none.so")
    with pytest.raises(
        LibraryMismatchError,
        match=r"cannot be loaded .*none\.so.*Build it: `make setup`.*HALFSTEP_TORCH=OFF pip install",
    ):
        numpy_library.no_columns(np.dtype(float), 1)


@pytest.mark.parametrize(("name", "value"), [("ABI", 99), ("__version__", "0.0.0")])
def test_a_library_of_another_version_is_refused_with_both(fresh, name: str, value) -> None:
    fresh.setattr(numpy_library, name, value)
    with pytest.raises(LibraryMismatchError, match=rf"is of halfstep .* but this is halfstep .*{value}"):
        numpy_library.no_columns(np.dtype(float), 1)


def test_mistakes_of_the_caller_are_value_errors_with_the_words_of_the_core() -> None:
    X = np.ones((3, 2))
    with pytest.raises(ValueError, match="column_axis is 2, expected -1 to 1"):
        numpy_library.scan(X, numpy_library.no_columns(X.dtype, 2), 2)
    with pytest.raises(ValueError, match="rules"):
        numpy_library.decide_floats(numpy_library.no_columns(X.dtype, 2), "rtol", 7)
    for out in (np.zeros((2, 3), np.float32), np.zeros((3, 2), np.int8), np.zeros((3, 2))):
        before = out.copy()
        with pytest.raises(ValueError, match=r"."):
            numpy_library.scan(X, numpy_library.no_columns(X.dtype, 2), 1, out)
        assert np.array_equal(out, before)


def test_threads_are_bounded_by_what_pools_set(monkeypatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    processors = numpy_library.available_threads()
    assert processors >= 1
    for text, wanted in (("1", 1), ("100000", processors), ("0", processors), ("-2", processors), ("a", processors)):
        monkeypatch.setenv("OMP_NUM_THREADS", text)
        assert numpy_library.available_threads() == wanted


@pytest.mark.parametrize("home", ["halfstep.sklearn", "modules.engine.mixed_precision", "halfstep"])
def test_importing_the_optimizer_imports_nothing_heavy(home: str) -> None:
    heavy = ("torch", "sklearn", "scipy", "pandas", "polars", "pyarrow", "tqdm")
    code = (
        f"import sys; sys.path.insert(0, {SHIM!r})\nimport numpy as np\n"
        f"from {home} import SklearnPrecisionOptimizer\n"
        "SklearnPrecisionOptimizer().optimize_data_precision(np.ones(3), [1, 2])\n"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


def test_the_numbers_of_the_interface_are_those_of_its_header() -> None:
    header = (Path(SHIM).parent / "numpy_ops/include/halfstep/numpy.h").read_text()
    assert f"#define HALFSTEP_NUMPY_ABI {numpy_library.ABI}\n" in header
    assert numpy_library.COLUMN.itemsize == 48, "as halfstep_column"


def test_the_library_links_neither_torch_nor_cuda() -> None:
    result = subprocess.run(["readelf", "-d", numpy_library._FILE], capture_output=True, text=True, check=True)
    needed = [line.split("[")[1] for line in result.stdout.splitlines() if "(NEEDED)" in line]
    assert needed
    assert not [name for name in needed if "torch" in name or "cuda" in name or "python" in name]
