"""The bar of large conversions, which must change nothing else."""

from __future__ import annotations

import sys

import halfstep.shrink
import numpy as np
import pytest
from halfstep.sklearn import SklearnPrecisionOptimizer


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("kind", ["float", "late", "integers", "complex", "3-D"])
def test_blocks_between_two_steps_of_the_bar_change_nothing(kind: str, order: str, monkeypatch, capsys) -> None:
    X = np.asarray(np.random.default_rng(0).standard_normal((1500, 6)), order=order)
    if kind == "late":
        X[-2, 4] = 1e300
    if kind == "integers":
        X = np.asarray(np.arange(9000).reshape(1500, 6), order=order)
    if kind == "complex":
        X = (X.astype(np.float32) * (1 - 1j)).astype(complex, order=order)
    if kind == "3-D":
        X = np.asarray(X.reshape(50, 30, 6), order=order)[:, ::-1]
    mode = "exact" if kind == "complex" else "rtol"
    plain = SklearnPrecisionOptimizer(mode=mode)
    expected = plain.optimize_data_precision(X)[0]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(halfstep.shrink, "_BLOCK", 700)
    barred = SklearnPrecisionOptimizer(mode=mode, progress=True)
    result = barred.optimize_data_precision(X)[0]
    assert "halfstep: " in capsys.readouterr().err
    assert barred.report() == plain.report()
    assert (result.dtype, result.tobytes("A")) == (expected.dtype, expected.tobytes("A"))


def test_no_bar_where_none_is_wanted_or_stderr_is_no_terminal(monkeypatch, capsys) -> None:
    monkeypatch.setattr(halfstep.shrink, "_LARGE", 0)
    for progress in (None, False):
        SklearnPrecisionOptimizer(progress=progress).optimize_data_precision(np.ones(5000))
    assert capsys.readouterr().err == ""


def test_without_tqdm_there_is_no_bar_and_no_error(monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    X = SklearnPrecisionOptimizer(progress=True).optimize_data_precision(np.ones(5000))[0]
    assert X.dtype == np.float32
    assert capsys.readouterr().err == ""
