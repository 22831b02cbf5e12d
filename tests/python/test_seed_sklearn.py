"""The scikit-learn block of the user's document, run word for word."""

from __future__ import annotations

import contextlib
import io
import os
import re

import numpy as np
import pytest
from seed_document import block


def run(code: str) -> tuple[str, dict]:
    output, namespace = io.StringIO(), {"__name__": "seed"}
    with contextlib.redirect_stdout(output):
        exec(compile(code, "seed.md", "exec"), namespace)
    return output.getvalue(), namespace


def check(printed: str, namespace: dict) -> None:
    assert "Original data types: X=float64, y=int64\n" in printed
    assert "Optimized data types: X=float32, y=int32\n" in printed
    assert re.search(r"^Memory reduction: 50\.0%$", printed, re.MULTILINE)
    assert re.search(r"^  Accuracy difference: 0\.0000$", printed, re.MULTILINE), "a forest computes in float32 anyway"
    assert re.search(r"^  Training speedup: [0-9.]+x$", printed, re.MULTILINE)
    predictions = [
        namespace["model_original"].predict_proba(namespace["X_test"]),
        namespace["model_optimized"].predict_proba(namespace["X_test_opt"]),
    ]
    assert np.array_equal(*predictions)


def test_the_block_with_fewer_rows() -> None:
    code = block("Scikit-learn Precision Optimization")
    assert code.count("50000") == 1
    check(*run(code.replace("50000", "2000")))


@pytest.mark.slow
def test_the_block() -> None:
    """HALFSTEP_SEED_SAMPLES=1000 makes it quick; without it the text is run as it stands."""
    code = block("Scikit-learn Precision Optimization")
    samples = os.environ.get("HALFSTEP_SEED_SAMPLES")
    check(*run(code if samples is None else code.replace("50000", str(int(samples)))))
