"""The document's block "Mixed Precision Inference Optimization", word for word, on a model that the test saves."""

from __future__ import annotations

import contextlib
import copy
import io
import re
import time
from pathlib import Path

import pytest
import torch
from inference_cases import Mlp, batches, trained_mlp
from seed_document import block

HEADING = "Mixed Precision Inference Optimization"


def run(text: str, device: str) -> tuple[dict, str]:
    """Save the model from its device, allow the classes that `torch.load` meets in it, and run the block."""
    torch.save(copy.deepcopy(trained_mlp()).to(device), "pretrained_model.pth")
    namespace = {
        "__name__": "seed",
        "time": time,
        "calibration_loader": batches(1200),
        "test_loader": batches(300),
    }
    output = io.StringIO()
    with torch.serialization.safe_globals([Mlp, torch.nn.Linear]), contextlib.redirect_stdout(output):
        exec(compile(text, "seed.md", "exec"), namespace)
    return namespace, output.getvalue()


def check(namespace: dict, printed: str) -> None:
    assert re.search(r"Inference speedup: \d+\.\d\dx", printed)
    assert re.search(r"Memory reduction: -?\d+\.\d%", printed)
    report = namespace["inference_optimizer"].report()
    assert report["kept"]
    assert report["bound"] <= 0.02
    assert report["metric"] == "top-1"
    images, _ = batches(60)[0]
    device = next(iter(namespace["optimized_model"].state_dict().values()), images)
    device = device.device if isinstance(device, torch.Tensor) else images.device
    assert namespace["optimized_model"](images.to(device)).shape == (60, 10)


@pytest.mark.cuda
def test_word_for_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check(*run(block(HEADING), "cuda"))


def test_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same block without a GPU: its device and its two memory counters are the only words that change."""
    monkeypatch.chdir(tmp_path)
    text = block(HEADING).replace('"cuda"', '"cpu"').replace("data.cuda()", "data.cpu()")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 1 << 20)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    check(*run(text, "cpu"))


def test_a_model_of_unknown_classes_is_not_loaded(tmp_path: Path) -> None:
    """torch's own safety is left as it is: nobody sets weights_only=False behind the user's back."""
    torch.save(trained_mlp(), tmp_path / "model.pth")
    with pytest.raises(Exception, match="add_safe_globals"):
        torch.load(tmp_path / "model.pth")
