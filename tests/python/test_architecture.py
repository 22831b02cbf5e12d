"""The rules of the house (docs/architecture.md) that a program can check."""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from halfstep import MixedPrecisionConfig, MixedPrecisionManager, shadow
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[2]
SHIM = ROOT / "python_shim"


def sources(*folders: str) -> list[Path]:
    suffixes = {".h", ".cpp", ".cu", ".cuh", ".py"}
    return [
        path
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.suffix in suffixes and not any(part.startswith("torch-") for part in path.parts)
    ]


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


def test_the_core_knows_no_framework() -> None:
    frameworks = re.compile(r"^(torch|ATen|c10|Python\.h|pybind11|tensorflow|numpy)\b")
    offenders = [(path, name) for path in sources("csrc") for name in includes(path) if frameworks.match(name)]
    assert offenders == []
    assert len(sources("csrc")) > 10


def test_the_tensorflow_door_knows_the_c_interface_alone() -> None:
    """TensorFlow's C++ headers would tie the library to one minor version."""
    offenders = [
        (path, name)
        for path in sources("tf_ops")
        for name in includes(path)
        if re.match(r"(tensorflow|tsl|xla|absl|Eigen|google|unsupported)/(?!c/)", name)
    ]
    assert offenders == []
    assert any("tensorflow/c/kernels.h" in includes(path) for path in sources("tf_ops"))


def test_cuda_files_stay_in_the_core() -> None:
    assert [path for path in sources("torch_ops", "tf_ops", "python_shim") if path.suffix in {".cu", ".cuh"}] == []


def test_host_logic_never_calls_cuda() -> None:
    for path in [*(ROOT / "csrc").glob("*.cpp"), *(ROOT / "csrc" / "cpu").iterdir()]:
        assert not [name for name in includes(path) if "cuda" in name], path
        assert "cuda::" not in path.read_text(), path


def test_no_file_is_too_long() -> None:
    code = sources("csrc", "numpy_ops", "tf_ops", "torch_ops", "python_shim", "tests", "examples", "bench", "tools")
    lengths = {path.relative_to(ROOT): len(path.read_text().splitlines()) for path in code}
    generated = Path("tests/core/golden_trajectories.h")
    assert {path: n for path, n in lengths.items() if n > 600 and path != generated} == {}


def test_cmake_has_the_only_source_lists() -> None:
    text = (ROOT / "CMakeLists.txt").read_text()
    listed = set(re.findall(r"^\s+((?:csrc|tf_ops|torch_ops)/\S+\.(?:cpp|cu))", text, re.MULTILINE))
    present = {str(p.relative_to(ROOT)) for p in sources("csrc", "tf_ops", "torch_ops") if p.suffix in {".cpp", ".cu"}}
    assert listed == present
    assert "GLOB" not in text


# torch's optimizers, clipping, layers and backward passes do their own arithmetic.
OF_TORCH = (
    "torch/optim/optimizer.py",
    "torch/nn/utils/clip_grad.py",
    "torch/nn/modules/module.py",
    "torch/autograd/__init__.py",
)


class CallerOfEachOp(TorchDispatchMode):
    """Records which aten ops the package's own lines call, and which torch.amp's do on its behalf."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, set[str]] = defaultdict(set)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        frame = sys._getframe(1)
        while frame is not None:
            name = frame.f_code.co_filename
            if name.endswith("halfstep/watched.py"):
                break  # it only hands on to the model's own forward
            if name.startswith(str(SHIM)):
                self.calls["shim"].add(str(func))
                break
            if name.endswith("torch/amp/grad_scaler.py"):
                self.calls["torch.amp"].add(str(func))
                break
            if "/torch/" not in name:
                break
            if name.endswith(OF_TORCH):
                break
            frame = frame.f_back
        return func(*args, **(kwargs or {}))


# Allocate, view, copy, fill and read scalars. halfstep's own ops are where the arithmetic is.
ALLOWED_IN_THE_SHIM = {
    "aten.full.default",
    "aten.zeros.default",
    "aten.zeros_like.default",
    "aten.stack.default",
    "aten.empty.memory_format",
    "aten.lift_fresh.default",
    "aten.detach.default",
    "aten._to_copy.default",
    "aten.copy_.default",
    "aten.fill_.Tensor",
    "aten.fill_.Scalar",
    "aten.zero_.default",
    "aten._local_scalar_dense.default",
    "aten.select.int",
    "aten.unbind.int",
}
# A sample compares two results and looks whether a copy has changed, and the gradient that its backward passes start
# with is 1; no number of the training depends on these.
ALLOWED_IN_A_SAMPLE = {
    "aten.clone.default",
    "aten.equal.default",
    "aten.ones_like.default",
    "aten.sub.Tensor",
}
# What torch.amp.GradScaler's own code computes when the subclass calls it: loss * scale, 1 / scale in float64, and
# 0 + found for a fused optimizer.
INHERITED_FROM_TORCH = {
    "aten.mul.Tensor",
    "aten.add.Tensor",
    "aten._to_copy.default",
    "aten.reciprocal.default",
    "aten.full.default",
    "aten.fill_.Scalar",
    "aten.fill_.Tensor",
    "aten._local_scalar_dense.default",
}


@pytest.mark.filterwarnings("ignore:.*float16 arithmetic")
@pytest.mark.parametrize("optimizer_name", ["SGD", "Adam"])
def test_the_package_does_no_tensor_arithmetic(optimizer_name: str) -> None:
    model = torch.nn.Linear(4, 2)
    fused = {"fused": True} if optimizer_name == "Adam" else {}
    optimizer = getattr(torch.optim, optimizer_name)(model.parameters(), lr=0.1, **fused)
    with CallerOfEachOp() as recorded:
        manager = MixedPrecisionManager(config=MixedPrecisionConfig())
        _, _, scaler = manager.setup_pytorch_training(model, optimizer)
        for explicit in (False, True):
            optimizer.zero_grad()
            with manager.autocast_context():
                loss = model(torch.ones(3, 4)).sum()
            scaler.scale(loss).backward()
            if explicit:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        scaler.load_state_dict(scaler.state_dict())
        scaler.history()
        manager.update_config(loss_scale=4.0)
        manager.get_statistics()
    own = {name for name in recorded.calls["shim"] if not name.startswith("halfstep.")}
    assert own - ALLOWED_IN_THE_SHIM == set()
    assert recorded.calls["torch.amp"] - INHERITED_FROM_TORCH == set()
    assert any(name.startswith("halfstep.unscale_") for name in recorded.calls["shim"])


def test_a_sample_does_no_other_arithmetic() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2))
    x = torch.randn(3, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16), CallerOfEachOp() as recorded:
        for first in (True, False):
            assert shadow.take(model, (x,), {}, step=0, first=first).difference > 0
    own = {name for name in recorded.calls["shim"] if not name.startswith("halfstep.")}
    assert own - ALLOWED_IN_THE_SHIM - ALLOWED_IN_A_SAMPLE == set()
    assert "aten.sub.Tensor" in own
    assert any(name.startswith("halfstep.check_gradients_") for name in recorded.calls["shim"])
