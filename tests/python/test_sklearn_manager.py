"""MixedPrecisionManager(framework="sklearn")."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import halfstep
import numpy as np
import pytest
from halfstep import MixedPrecisionManager

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
