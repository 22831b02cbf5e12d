"""MixedPrecisionManager(framework="sklearn"), and what loading the NumPy part imports."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import halfstep
import numpy as np
import pytest
from halfstep import LibraryMismatchError, MixedPrecisionManager, numpy_library

SHIM = Path(__file__).resolve().parents[2] / "python_shim"


def python(code: str) -> subprocess.CompletedProcess[str]:
    start = f"import sys; sys.path.insert(0, {str(SHIM)!r})\n"
    return subprocess.run([sys.executable, "-c", start + code], capture_output=True, text=True, check=False)


def test_the_manager_reaches_the_optimizer() -> None:
    manager = MixedPrecisionManager(framework="sklearn")
    assert manager.framework == "sklearn"
    stats = manager.get_statistics()
    assert math.isnan(stats.memory_reduction)
    assert "no data" in stats.notes["memory_reduction"]
    X, y = manager.optimize_data_precision(np.full((10, 4), 0.5), np.arange(10))
    assert (X.dtype, y.dtype) == (np.float32, np.int32)
    stats = manager.get_statistics()
    assert (stats.memory_saved_bytes, stats.memory_reduction) == (10 * 4 * 4 + 10 * 4, 0.5)
    assert math.isnan(stats.speedup_factor)
    assert set(stats.notes) == {name for name, value in stats.as_dict().items() if value != value}
    json.dumps(manager.get_comprehensive_stats())
    assert manager.optimizer.report().bytes_before == 10 * 4 * 8 + 10 * 8


def test_what_is_of_pytorch_says_so() -> None:
    manager = MixedPrecisionManager(framework="sklearn")
    for call in (
        manager.autocast_context,
        lambda: manager.setup_pytorch_training(None, None),
        lambda: manager.capture(len),
    ):
        with pytest.raises(AttributeError, match="this manager's framework is 'sklearn', which has no"):
            call()
    with pytest.raises(AttributeError, match="optimizer"):
        _ = MixedPrecisionManager(framework="pytorch").optimizer
    with pytest.raises(ValueError, match="scikit-learn has no layers"):
        MixedPrecisionManager(framework="sklearn", custom_policy=halfstep.PrecisionPolicy("p", "float16"))
    manager.update_config(gradient_clipping_threshold=2.0)
    manager.adjust_loss_scale(2.0)
    assert manager.config.gradient_clipping_threshold == 2.0


def test_auto_takes_scikit_learn_where_there_is_no_torch() -> None:
    result = python(
        "import importlib.util; find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'torch' else find(name, *rest)\n"
        "from halfstep import MixedPrecisionManager; print(MixedPrecisionManager().framework)"
    )
    assert result.stdout == "sklearn\n", result.stderr


@pytest.mark.parametrize("home", ["halfstep.sklearn", "modules.engine.mixed_precision", "halfstep"])
def test_the_optimizer_imports_neither_torch_nor_scikit_learn(home: str) -> None:
    result = python(
        f"from {home} import SklearnPrecisionOptimizer; import numpy as np\n"
        "X, _ = SklearnPrecisionOptimizer().optimize_data_precision(np.ones((3, 2)))\n"
        "print(X.dtype, [name for name in ('torch', 'sklearn', 'pandas', 'scipy', 'tqdm') if name in sys.modules])"
    )
    assert result.stdout == "float32 []\n", result.stderr


def test_no_library_and_one_of_another_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    numpy_library._library.cache_clear()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(numpy_library, "_FILE", tmp_path / "none.so")
            with pytest.raises(LibraryMismatchError, match=r"cannot be loaded .*HALFSTEP_TORCH=OFF pip install"):
                numpy_library.no_columns(np.dtype("f8"), 1)
        with monkeypatch.context() as patch:
            patch.setattr(numpy_library, "__version__", "9.9.9")
            with pytest.raises(LibraryMismatchError, match=r"is of halfstep .* but this is halfstep 9\.9\.9"):
                numpy_library.no_columns(np.dtype("f8"), 1)
    finally:
        numpy_library._library.cache_clear()


def test_the_numbers_of_the_interface_are_those_of_its_header() -> None:
    header = (SHIM.parent / "numpy_ops/include/halfstep/numpy.h").read_text()
    assert f"#define HALFSTEP_NUMPY_ABI {numpy_library.ABI}\n" in header
    assert numpy_library.COLUMN.itemsize == 48, "as halfstep_column"


def test_the_library_links_neither_torch_nor_cuda() -> None:
    result = subprocess.run(["readelf", "-d", numpy_library._FILE], capture_output=True, text=True, check=True)
    needed = [line.split("[")[1] for line in result.stdout.splitlines() if "(NEEDED)" in line]
    assert needed
    assert not [name for name in needed if "torch" in name or "cuda" in name or "python" in name]
