"""The PyTorch blocks of the user's document, run word for word."""

from __future__ import annotations

import contextlib
import io
import os
import re
import warnings

import pytest
import torch
from halfstep import MixedPrecisionManager
from seed_document import block
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


@pytest.fixture(autouse=True)
def _quiet() -> None:
    warnings.filterwarnings("ignore", message=".*has no float16 arithmetic.*")
    warnings.filterwarnings("ignore", message=".*where autocast is on.*")


@pytest.mark.slow
def test_pytorch_mixed_precision_training() -> None:
    """HALFSTEP_SEED_SAMPLES=1000 makes it quick; without it the text is run as it stands."""
    code = block("PyTorch Mixed Precision Training")
    samples = os.environ.get("HALFSTEP_SEED_SAMPLES")
    if samples is not None:
        assert code.count("10000") == 2
        code = code.replace("10000", str(int(samples)))
    output = io.StringIO()
    namespace: dict = {"__name__": "seed"}
    with contextlib.redirect_stdout(output):
        exec(compile(code, "seed.md", "exec"), namespace)
    printed = output.getvalue()
    losses = [float(text) for text in re.findall(r"Average Loss: ([0-9.]+)", printed)]
    assert len(losses) == 5
    assert losses[-1] < losses[0], "it learns the random labels a little"
    assert len(re.findall(r"^Memory saved: -?[0-9.]+ MB, Speedup: [0-9.]+x$", printed, re.MULTILINE)) == 5
    assert re.search(r"^  Memory reduction: -?[0-9.]+%$", printed, re.MULTILINE)
    assert re.search(r"^  Average speedup: [0-9.]+x$", printed, re.MULTILINE)
    assert re.search(r"^  Accuracy preservation: (0\.9[0-9]+|1\.000)$", printed, re.MULTILINE)
    stats = namespace["final_stats"]
    assert stats["steps"] == 5 * len(namespace["dataloader"])
    assert stats["underflow_events"] >= 0
    counted = "total_operations" not in stats["notes"]
    assert counted or "not counted by dtype in this build" in stats["notes"]["total_operations"]
    assert re.search(
        r"^  FP16 operations: [1-9][0-9]*$" if counted else "^  FP16 operations: nan$", printed, re.MULTILINE
    )


class Robust:
    """What the block under "Error Handling and Fallbacks" expects around it: a manager and two training functions."""

    def __init__(self, inject: Exception | None = None) -> None:
        torch.manual_seed(0)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 1)).to(self.device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.02)
        x = torch.randn(256, 10)
        self.data = DataLoader(TensorDataset(x, x[:, :1].sin()), batch_size=64)
        self.manager = MixedPrecisionManager(framework="pytorch")
        self.model, self.optimizer, self.scaler = self.manager.setup_pytorch_training(self.model, self.optimizer)
        self.inject = inject
        self.calls: list[str] = []
        self.losses: list[float] = []
        self.namespace = {
            "torch": torch,
            "mp_manager": self.manager,
            "train_with_mixed_precision": self.train,
            "train_with_fp32": self.train_fp32,
        }
        exec(compile(block("3. Error Handling and Fallbacks"), "seed.md", "exec"), self.namespace)

    def run(self) -> None:
        self.namespace["robust_mixed_precision_training"](self.model, self.data)

    def train(self, model: nn.Module, data: DataLoader) -> None:
        """The document's loop, with its own autocast context inside the block's outer one."""
        self.calls.append("mixed")
        if self.inject is not None:
            error, self.inject = self.inject, None
            raise error
        for _ in range(25):
            for x, y in data:
                x, y = x.to(self.device), y.to(self.device)
                self.optimizer.zero_grad()
                with self.manager.autocast_context():
                    loss = nn.functional.mse_loss(model(x).float(), y)
                self.scaler.scale(loss).backward()
                self.scaler.step(self.optimizer)
                self.scaler.update()
                self.losses.append(loss.item())

    def train_fp32(self, model: nn.Module, data: DataLoader) -> None:
        self.calls.append("fp32")
        assert not torch.is_autocast_enabled(self.device.type)


def test_robust_training_learns_inside_the_outer_context() -> None:
    robust = Robust()
    robust.run()
    assert robust.calls == ["mixed"]
    assert robust.losses[-1] < 0.2 * robust.losses[0]


def test_robust_training_falls_back_on_out_of_memory() -> None:
    robust = Robust(inject=torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    robust.run()
    assert robust.calls == ["mixed", "fp32"]
    assert robust.scaler.get_scale() == 2**15


def test_robust_training_lets_other_runtime_errors_through() -> None:
    robust = Robust(inject=RuntimeError("shape mismatch"))
    with pytest.raises(RuntimeError, match="shape mismatch"):
        robust.run()
    assert robust.calls == ["mixed"]
    assert not torch.is_autocast_enabled(robust.device.type)


def test_robust_training_lowers_the_scale_on_overflow() -> None:
    robust = Robust(inject=OverflowError("numerical overflow"))
    robust.run()
    assert robust.calls == ["mixed", "mixed"]
    assert robust.scaler.history()[0].scale == 2**14
    assert robust.losses[-1] < 0.2 * robust.losses[0]


def test_the_import_path_of_the_document_is_a_re_export() -> None:
    import halfstep.mixed_precision
    import modules.engine.mixed_precision as documented

    for name in halfstep.mixed_precision.__all__:
        assert getattr(documented, name) is getattr(halfstep.mixed_precision, name)
