"""TorchScript files of optimized models: the same bits without the package, in Python and in C++."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from halfstep._library import library_path
from halfstep.int8_layers import Int8Conv1d, Int8Conv2d, Int8Embedding, Int8Linear, pack
from int8_file_cases import KINDS, call, carry, optimized
from torch import nn
from without_python import run_without_python

pytestmark = pytest.mark.usefixtures("no_jit_fuser")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
LIBRARY = library_path()
ALONE = """
import sys, torch
torch.ops.load_library(sys.argv[1])
model = torch.jit.load(sys.argv[2])
args, kwargs = torch.load(sys.argv[3])
with torch.no_grad():
    torch.save(model(*args, **kwargs), sys.argv[4])
assert not [name for name in sys.modules if name.startswith("halfstep")]
"""


def alone(folder: Path, batch: object) -> torch.Tensor:
    """Run model.pt in a process that has the library and no package."""
    pair = ((), batch) if isinstance(batch, dict) else (tuple(batch) if isinstance(batch, list) else (batch,), {})
    torch.save(pair, folder / "inputs.pt")
    files = [folder / name for name in ("model.pt", "inputs.pt", "outputs.pt")]
    command = [sys.executable, "-I", "-W", "ignore", "-c", ALONE, LIBRARY, *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr
    out = torch.load(folder / "outputs.pt")
    return out["logits"] if isinstance(out, dict) else out


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["resnet", "signal", "tied", "single"])
def test_the_same_bits_in_a_process_without_the_package(kind: str, device: str, tmp_path: Path) -> None:
    inference, result, batch = optimized(kind, device)
    inference.save_torchscript(tmp_path / "model.pt")
    assert torch.equal(alone(tmp_path, batch), call(result, batch))
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("kind", ["resnet", "encoder"])
def test_int8_in_a_half_carrier(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    carry(torch.bfloat16, monkeypatch)
    inference, result, batch = optimized(kind, speed_guard=True)
    inference.save_torchscript(tmp_path / "model.pt")
    if isinstance(batch, dict):
        batch = {"ids": batch["ids"]}
        expected = result(ids=batch["ids"], scale=0.5)["logits"]
    else:
        expected = call(result, batch)
    assert torch.equal(alone(tmp_path, batch), expected)


@pytest.mark.parametrize("target", ["float16", "bfloat16"])
def test_a_half_model(target: str, tmp_path: Path) -> None:
    inference, result, batch = optimized("resnet", "cpu", target)
    inference.save_torchscript(tmp_path / "model.pt")
    assert torch.equal(alone(tmp_path, batch), call(result, batch))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["resnet", "mlp"])
def test_in_cpp(kind: str, device: str, build_folder: Path, tmp_path: Path) -> None:
    program = build_folder / "tests" / "halfstep_run_script"
    assert program.exists(), f"{program} is not built; run these tests with make test"
    inference, result, batch = optimized(kind, device)
    inference.save_torchscript(tmp_path / "model.pt")
    out = run_without_python(program, torch.jit.load(tmp_path / "model.pt"), [batch], tmp_path)
    assert torch.equal(out[0] if isinstance(out, (tuple, list)) else out, call(result, batch))


class FixedSize(nn.Module):
    """What a trace keeps of it is the size of the batch that it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + torch.tensor([float(len(x))] * 4)


class Unscriptable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * (1 if x.sum() < 1e6 else 2)


def test_what_cannot_be_scripted_is_traced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "unscriptable", (lambda: Unscriptable().eval(), lambda n: torch.randn(n, 16)))
    inference, result, batch = optimized("unscriptable")
    inference.save_torchscript(tmp_path / "model.pt")
    assert torch.equal(alone(tmp_path, batch), call(result, batch))


def test_a_trace_of_one_size_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "fixed", (lambda: FixedSize().eval(), lambda n: torch.randn(n, 16)))
    inference, _, _ = optimized("fixed", "cpu", "bfloat16")
    monkeypatch.setattr(torch.jit, "script", lambda _model: (_ for _ in ()).throw(RuntimeError("no script")))
    with pytest.raises(ValueError, match=r"scripted: RuntimeError: no script; traced: it differs .* fewer samples"):
        inference.save_torchscript(tmp_path / "model.pt")
    assert not list(tmp_path.iterdir())


@dataclass
class Sample:
    x: torch.Tensor


def test_an_argument_that_a_trace_cannot_take_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Held(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 4)

        def forward(self, sample: Any, other: torch.Tensor) -> torch.Tensor:
            return self.layer(sample.x) + other

    kind = (lambda: Held().eval(), lambda n: [Sample(torch.randn(n, 16)), torch.randn(n, 4)])
    monkeypatch.setitem(KINDS, "held", kind)
    inference, _, _ = optimized("held")
    with pytest.raises(
        ValueError, match="traced: TypeError: argument sample is a Sample, expected tensors, or"
    ) as caught:
        inference.save_torchscript(tmp_path / "model.pt")
    assert "the model returns" not in str(caught.value)
    assert not list(tmp_path.iterdir())


class Output(OrderedDict):
    """Like transformers' ModelOutput."""


@dataclass
class Fields:
    logits: torch.Tensor


Scores = namedtuple("Scores", "logits")


@pytest.mark.parametrize(
    ("wrap", "named"),
    [
        (lambda y: Output(logits=y), "Output"),
        (lambda y: (y, [Output(logits=y)]), "Output"),
        (OrderedDict, "OrderedDict"),
        (Fields, "Fields"),
        (Scores, "Scores"),
    ],
)
def test_an_output_that_a_script_cannot_return_is_named(
    wrap: Callable[[torch.Tensor], Any], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 4)

        def forward(self, x: torch.Tensor) -> Any:
            y = self.layer(x)
            return wrap({"logits": y}) if wrap is OrderedDict else wrap(y)

    monkeypatch.setitem(KINDS, "wrapped", (lambda: Wrapped().eval(), lambda n: torch.randn(n, 16)))
    inference, _, _ = optimized("wrapped")
    with pytest.raises(ValueError, match=f"; the model returns {named}, and .*return_dict=False") as caught:
        inference.save_torchscript(tmp_path / "model.pt")
    assert "traced: " in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_the_layers_are_scripted_without_warnings() -> None:
    weight, image = torch.randn(8, 16), torch.randn(4, 4, 3, 3)
    layers: list[tuple[nn.Module, torch.Tensor]] = [
        (Int8Linear(pack(weight, None)), torch.randn(2, 16)),
        (Int8Linear(pack(weight, None), input_scale=0.1, out_dtype=torch.float16), torch.randn(2, 16)),
        (Int8Conv2d(pack(image, None)), torch.randn(2, 4, 5, 5)),
        (Int8Conv1d(pack(image[:, :, :1], None)), torch.randn(2, 4, 5)),
        (Int8Embedding(pack(weight, None)), torch.tensor([1, 2])),
    ]
    for layer, x in layers:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", category=DeprecationWarning)  # TorchScript itself is deprecated
            scripted = torch.jit.script(layer.eval())
        assert torch.equal(scripted(x), layer(x))


def test_damaged_files_are_refused_by_torch(tmp_path: Path) -> None:
    inference, _, _ = optimized("small")
    file = tmp_path / "model.pt"
    inference.save_torchscript(file)
    content = file.read_bytes()
    for length in (0, 1, 100, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:length])
        with pytest.raises((RuntimeError, ValueError)):
            torch.jit.load(file)
