"""Recurrent layers with int8 weights: the same as torch's own with weights rounded to int8, and the option for them."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from halfstep import InferencePrecisionOptimizer
from halfstep.half_model import CastModel
from halfstep.int8_layers import pack
from halfstep.int8_recurrent import Int8LSTM, Int8Recurrent, int8_recurrent
from halfstep.int8_recurrent_weights import bytes_of
from inference_cases import batches, digits, trained
from int8_file_cases import carry
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

KINDS = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "tanh": nn.RNN,
    "relu": lambda *args, **kwargs: nn.RNN(*args, nonlinearity="relu", **kwargs),
}


def rounded(layer: nn.RNNBase) -> nn.RNNBase:
    """A copy of torch's layer with weights rounded to 127 levels by the largest of their row, as float32 does it."""
    layer = copy.deepcopy(layer).eval().requires_grad_(False)  # with gradients torch takes another kernel for some
    with torch.no_grad():
        for name, weight in layer.named_parameters():
            if name.startswith("weight"):
                largest = weight.double().abs().amax(1, keepdim=True)
                scale = (largest / 127).float()
                weight.copy_(torch.clamp(torch.round(weight.double() / scale), -127, 127).float() * scale)
    return layer


def same(a: Any, b: Any, **tolerance: float) -> None:
    for left, right in zip(torch.utils._pytree.tree_leaves(a), torch.utils._pytree.tree_leaves(b), strict=True):
        torch.testing.assert_close(left, right, **tolerance)


OPTIONS = [
    {},
    {"num_layers": 3, "bidirectional": True},
    {"bias": False, "batch_first": True},
    {"num_layers": 2, "dropout": 0.5},
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [*OPTIONS, {"proj_size": 5, "num_layers": 2, "bidirectional": True}])
def test_as_torch_with_rounded_weights(kind: str, options: dict[str, Any], device: torch.device) -> None:
    if "proj_size" in options and kind != "lstm":
        with pytest.raises(ValueError, match="proj_size"):  # torch has it for LSTM alone
            KINDS[kind](7, 12, **options)
        return
    layer = KINDS[kind](7, 12, **options).eval().to(device)
    int8 = int8_recurrent(layer)
    expected = rounded(layer)
    x = torch.randn(6, 4, 7, device=device)
    exact = {"rtol": 0, "atol": 0} if device.type == "cpu" else {"rtol": 1e-3, "atol": 1e-3}
    with torch.no_grad():
        out, state = expected(x)
        same(int8(x), (out, state), **exact)
        same(int8(x, state), expected(x, state), **exact)
        same(int8(x[:, 0]), expected(x[:, 0]), **exact)  # no batch
        same(int8(x[:, 0], expected(x[:, 0])[1]), expected(x[:, 0], expected(x[:, 0])[1]), **exact)
        same(int8(x[:1]), expected(x[:1]), **exact)
    assert not torch.equal(layer(x)[0], out)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("enforce_sorted", [True, False])
def test_packed_sequences(kind: str, enforce_sorted: bool) -> None:
    layer = KINDS[kind](7, 12, num_layers=2, bidirectional=True).eval()
    int8, expected = int8_recurrent(layer), rounded(layer)
    lengths = (5, 3, 1) if enforce_sorted else (3, 5, 1)
    packed = pack_sequence([torch.randn(length, 7) for length in lengths], enforce_sorted=enforce_sorted)
    with torch.no_grad():
        (out, state), (wanted, wanted_state) = int8(packed), expected(packed)
        same(pad_packed_sequence(out), pad_packed_sequence(wanted), rtol=0, atol=0)
        same(state, wanted_state, rtol=0, atol=0)
        same(int8(packed, state)[1], expected(packed, state)[1], rtol=0, atol=0)
    assert torch.equal(out.batch_sizes, wanted.batch_sizes)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(kind: str, dtype: torch.dtype) -> None:
    """The weights are rounded from float32 to int8, then to the input's type."""
    layer = KINDS[kind](7, 12).eval()
    x = torch.randn(6, 4, 7, dtype=dtype)
    with torch.no_grad():
        same(int8_recurrent(layer)(x), rounded(layer).to(dtype)(x), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dequantize_weight(dtype: torch.dtype, device: torch.device) -> None:
    for rows, columns in ((1, 1), (5, 3), (64, 33), (300, 128)):
        packed = pack(torch.randn(rows, columns, device=device), None)
        weight, scales = packed.weight(), packed.scales()
        wanted = (weight.double() * scales.double()[:, None]).float().to(dtype)
        out = torch.ops.halfstep.dequantize_weight(packed, dtype)
        assert out.dtype == dtype
        assert out.device == weight.device
        assert torch.equal(out, wanted)
    with pytest.raises(TypeError, match="out_dtype is Double"):
        torch.ops.halfstep.dequantize_weight(packed, torch.float64)
    with pytest.raises(ValueError, match="expected rows and columns"):
        torch.ops.halfstep.dequantize_weight(pack(torch.randn(4, 3, 2, 2), None), dtype)


def copies_of(layer: Int8Recurrent) -> dict[str, nn.Module]:
    other = int8_recurrent(nn.LSTM(7, 12, num_layers=2, bidirectional=True, proj_size=3), bits=3)
    other.load_state_dict(layer.state_dict())
    saved = io.BytesIO()
    torch.save(layer, saved)
    saved.seek(0)
    script = io.BytesIO()
    torch.jit.save(torch.jit.script(layer), script)
    script.seek(0)
    return {
        "deepcopy": copy.deepcopy(layer),
        "pickle": pickle.loads(pickle.dumps(layer)),
        "torch.save": torch.load(saved, weights_only=False),
        "state_dict": other,
        "script": torch.jit.script(layer),
        "script file": torch.jit.load(script),
    }


def test_copies_and_scripts() -> None:
    layer = int8_recurrent(nn.LSTM(7, 12, num_layers=2, bidirectional=True, proj_size=3).eval())
    x = torch.randn(6, 4, 7)
    with torch.no_grad():
        out = layer(x)
        for name, other in copies_of(layer).items():
            same(other(x), out, rtol=0, atol=0)
            same(other(x[:, 0], _first(out[1])), layer(x[:, 0], _first(out[1])), rtol=0, atol=0)
            assert isinstance(other, torch.jit.ScriptModule) == name.startswith("script")


def _first(state: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(part[:, 0] for part in state)


@pytest.mark.parametrize("kind", ["gru", "tanh", "relu"])
def test_scripts_of_the_other_kinds(kind: str) -> None:
    layer = int8_recurrent(KINDS[kind](7, 12, num_layers=2, batch_first=True).eval())
    x = torch.randn(6, 4, 7)
    with torch.no_grad():
        same(torch.jit.script(layer)(x), layer(x), rtol=0, atol=0)


def test_export() -> None:
    layer = int8_recurrent(nn.LSTM(7, 12).eval())
    x = torch.randn(6, 4, 7)
    with torch.no_grad():
        program = torch.export.export(layer, (x,), strict=False)
        same(program.module()(x), layer(x), rtol=1e-5, atol=1e-6)


@pytest.mark.cuda
def test_moves_to_a_gpu_and_back() -> None:
    layer = int8_recurrent(nn.LSTM(7, 12, num_layers=2).eval())
    x = torch.randn(6, 4, 7)
    with torch.no_grad():
        before = layer(x)
        there = layer.cuda()(x.cuda())
        assert there[0].is_cuda
        same([part.cpu() for part in (there[0], *there[1])], [before[0], *before[1]], rtol=1e-3, atol=1e-3)
        same(layer.cpu()(x), before, rtol=0, atol=0)


def test_size() -> None:
    layer = nn.LSTM(64, 128)
    int8 = int8_recurrent(layer)
    weights = 4 * 128 * (64 + 128)
    assert bytes_of(layer) == 4 * (weights + 2 * 4 * 128)
    assert bytes_of(int8) == weights + 2 * 2 * 4 * 4 * 128  # scales and biases are float32
    assert sum(packed.weight().nbytes for packed in (each.packed for each in int8.weights)) == weights
    assert "64, 128" in repr(int8)


def test_bad_calls_are_named() -> None:
    layer = int8_recurrent(nn.LSTM(7, 12))
    with pytest.raises(TypeError, match="module is LSTMCell"):
        int8_recurrent(nn.LSTMCell(3, 4))
    with pytest.raises(ValueError, match=r"input has shape \[6, 4, 8\], expected .* the last of 7"):
        layer(torch.zeros(6, 4, 8))
    with pytest.raises(ValueError, match=r"hx has shape \[1, 3, 12\], expected \[1, 4, 12\]"):
        layer(torch.zeros(6, 4, 7), (torch.zeros(1, 3, 12), torch.zeros(1, 4, 12)))
    bad = nn.GRU(3, 4)
    with torch.no_grad():
        bad.weight_hh_l0[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or an infinity"):
        int8_recurrent(bad)


class Reader(nn.Module):
    """Reads the rows of a digit by an LSTM, then by a GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 48, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(96, 32, batch_first=True)
        self.hidden = nn.Linear(32, 32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, _ = self.lstm(x.squeeze(1))
        _, last = self.gru(rows)
        return self.head(torch.relu(self.hidden(last[0])))


@pytest.fixture(scope="module")
def reader() -> nn.Module:
    torch.manual_seed(0)
    return trained(Reader(), 6)


def optimized(model: nn.Module, **options: Any) -> tuple[nn.Module, dict[str, Any], str]:
    optimizer = InferencePrecisionOptimizer(
        **{"speed_guard": False, "progress": False, "recurrent_weights": True, "calibration_samples": 1797, **options}
    )
    result = optimizer.optimize_for_inference(model, batches(1797), "cpu")
    return result, optimizer.report(), optimizer.explain()


def recurrent(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, Int8Recurrent)]


def drop_of(model: nn.Module, result: nn.Module) -> float:
    """The drop on the guard's batches, every third."""
    with torch.no_grad():
        guard = list(itertools.islice(batches(1797), 2, None, 3))
        right = [[(each(x).argmax(1) == y).sum().item() for x, y in guard] for each in (model, result)]
    return (sum(right[0]) - sum(right[1])) / sum(len(y) for _, y in guard)


def test_the_option_stores_recurrent_weights(reader: nn.Module) -> None:
    before = copy.deepcopy(reader.state_dict())
    result, report, text = optimized(reader, strict=True)
    assert recurrent(result) == ["lstm", "gru"]
    assert report["result"] == "int8"
    assert report["kept"]
    assert report["bound"] <= 0.02
    assert report["drop"] == pytest.approx(drop_of(reader, result), abs=1e-12)
    assert not report["left"]
    assert report["bytes"]["int8"] < 0.35 * report["bytes"]["float32"]
    (region,) = (region for region in report["regions"] if region["layers"] == ["lstm"])
    assert f"{bytes_of(reader.lstm)} bytes in float32" in region["why"]
    assert f"{bytes_of(result.get_submodule('lstm'))} in int8" in region["why"]
    assert region["milliseconds"].keys() == {"float32", "int8"}
    assert all(each > 0 for each in region["milliseconds"].values())
    assert "the speed guard is not asked" in text
    assert all(torch.equal(before[key], value) for key, value in reader.state_dict().items())
    plain, report, _ = optimized(reader, recurrent_weights=False)
    assert recurrent(plain) == []
    assert "recurrent_weights" in report["left"]["lstm"]


@pytest.mark.parametrize("carrier", [torch.float32, torch.bfloat16])
def test_with_the_speed_guard_the_report_is_of_the_model_that_comes_back(
    reader: nn.Module, carrier: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    carry(carrier, monkeypatch)
    result, report, _ = optimized(reader, speed_guard=True)
    assert recurrent(result.module if isinstance(result, CastModel) else result) == ["lstm", "gru"]
    assert report["result"] == "int8"
    assert report["carrier"] == str(carrier).removeprefix("torch.")
    assert report["milliseconds"]["int8"] > 0
    assert report["drop"] == pytest.approx(drop_of(reader, result), abs=1e-12)
    images, _ = digits()
    assert result(images[:5]).dtype == torch.float32


def test_files(reader: nn.Module, tmp_path: Path) -> None:
    optimizer = InferencePrecisionOptimizer(recurrent_weights=True, speed_guard=False, progress=False)
    result = optimizer.optimize_for_inference(reader, batches(), "cpu")
    optimizer.save_torchscript(tmp_path / "reader.pt")
    images, _ = digits()
    assert torch.equal(torch.jit.load(tmp_path / "reader.pt")(images), result(images))
    optimizer.save(tmp_path / "reader.safetensors")
    loaded = optimizer.load(tmp_path / "reader.safetensors", Reader())
    assert recurrent(loaded) == ["lstm", "gru"]
    assert torch.equal(loaded(images), result(images))


def test_include_exclude_and_obstacles(reader: nn.Module) -> None:
    result, report, _ = optimized(reader, exclude="gru")
    assert recurrent(result) == ["lstm"]
    assert report["left"] == {"gru": "in exclude"}
    result, report, _ = optimized(reader, include=["gru", "head"])
    assert recurrent(result) == ["gru"]
    hooked = copy.deepcopy(reader)
    hooked.gru.register_forward_hook(lambda *_: None)
    result, report, _ = optimized(hooked)
    assert recurrent(result) == ["lstm"]
    assert report["left"] == {"gru": "it has hooks"}


def test_a_layer_that_costs_too_much_stays_float(reader: nn.Module) -> None:
    """One huge weight in each row of the GRU makes its others vanish; the LSTM is as before."""
    model = copy.deepcopy(reader)
    model.lstm = nn.LSTM(9, 48, batch_first=True, bidirectional=True)
    names = [name for name, _ in reader.lstm.named_parameters()]
    with torch.no_grad():
        for name in names:
            old, new = getattr(reader.lstm, name), getattr(model.lstm, name)
            new.zero_()
            new[..., : old.shape[-1]] = old
            if name.startswith("weight_ih"):
                new[:, 8] = 1e4  # of an input that is always 0

    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            rows, _ = self.inner.lstm(nn.functional.pad(x.squeeze(1), (0, 1)))
            _, last = self.inner.gru(rows)
            return self.inner.head(torch.relu(self.inner.hidden(last[0])))

    padded = Padded().eval()
    images, _ = digits()
    assert torch.allclose(padded(images), reader(images), atol=1e-4)
    result, report, _ = optimized(padded)
    assert recurrent(result) == ["inner.gru"]
    assert "the drop is" in report["left"]["inner.lstm"]
    assert report["bound"] <= 0.02
    assert report["drop"] == pytest.approx(drop_of(padded, result), abs=1e-12)
    with pytest.raises(ValueError, match=r"inner\.lstm: a recurrent layer"):
        optimized(padded, strict=True)


def test_a_model_that_is_a_recurrent_layer() -> None:
    torch.manual_seed(0)
    model = nn.GRU(8, 32, batch_first=True).eval()
    data = [images.squeeze(1) for images in batches(600, labels=False)]
    optimizer = InferencePrecisionOptimizer(recurrent_weights=True, speed_guard=False, progress=False)
    result = optimizer.optimize_for_inference(model, data, "cpu")
    assert isinstance(result, Int8Recurrent)
    assert optimizer.report()["result"] == "int8"
    same(result(data[0]), rounded(model)(data[0]), rtol=0, atol=0)


def test_packed_sequences_inside_of_a_model() -> None:
    class Packing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(8, 16, batch_first=True)
            self.head = nn.Linear(16, 10)

        def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
            packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            return self.head(self.lstm(packed)[1][0][-1])

    lengths = torch.arange(60) % 7 + 2
    data = [{"x": images.squeeze(1), "lengths": lengths} for images in batches(600, labels=False)]
    optimizer = InferencePrecisionOptimizer(recurrent_weights=True, speed_guard=False, progress=False)
    result = optimizer.optimize_for_inference(Packing().eval(), data, "cpu")
    assert isinstance(result.get_submodule("lstm"), Int8LSTM)
    assert result(**data[0]).shape == (60, 10)
