"""Models of TorchScript as the input of int8 quantization."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Dict, NamedTuple  # noqa: UP035

import pytest
import torch
import torch.nn.functional as F
from halfstep import InferencePrecisionOptimizer
from halfstep._library import library_path
from halfstep.int8_layers import Int8Conv2d, Int8Embedding, Int8Linear
from int8_file_cases import carry
from int8_script_cases import calls, frozen, noise, optimized, scripted, traced
from torch import nn

pytestmark = pytest.mark.usefixtures("no_jit_fuser")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
LIBRARY = library_path()


class Cnn(nn.Module):
    """Convolutions whose batch norms fold, one that gives int8, a pooling, and a residual addition."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.pool = nn.MaxPool2d(2)
        self.inner, self.inner_norm = nn.Conv2d(8, 8, 3, padding="same"), nn.BatchNorm2d(8)
        self.last, self.last_norm = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(8, 4)
        for norm in (self.norm, self.inner_norm, self.last_norm):
            nn.init.normal_(norm.running_mean, std=0.1)
            nn.init.uniform_(norm.weight, 0.5, 1.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(F.relu(self.norm(self.stem(x))))
        y = F.relu(self.inner_norm(self.inner(x)))
        x = F.relu(x + self.last_norm(self.last(y)))
        return self.head(self.drop(x.mean((2, 3))))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, activation="gelu", batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(self.words(ids)).mean(1))


class Branching(nn.Module):
    """A loop, a branch that data decides, a signal, a bare product, and an LSTM, which stays float."""

    def __init__(self) -> None:
        super().__init__()
        self.turn, self.other = nn.Linear(8, 8), nn.Linear(8, 8)
        self.signal = nn.Conv1d(1, 4, 3, padding=1)
        self.mix = nn.Parameter(torch.randn(8, 8))
        self.lstm = nn.LSTM(8, 8, batch_first=True)

    def forward(self, x: torch.Tensor, turns: int = 3) -> torch.Tensor:
        for _ in range(turns):
            x = F.gelu(self.turn(x)) if float(x.sum()) > 0 else self.other(x)
        y = self.lstm(x.unsqueeze(1))[0][:, 0]
        return F.silu(self.signal(x.unsqueeze(1)).mean(1) @ self.mix) + y


class Tied(nn.Module):
    """A layer that is called twice, and two layers that share a weight but not their biases."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(8, 8)
        self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 8)
        self.right.weight = self.left.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.one(torch.tanh(self.one(x))))
        return self.right(torch.tanh(self.left(x)))


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU6(), nn.Linear(32, 4))


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[int], torch.Tensor]]] = {
    "mlp": (_mlp, lambda n: torch.randn(n, 8)),
    "cnn": (Cnn, lambda n: torch.randn(n, 3, 20, 20)),
    "encoder": (Encoder, lambda n: torch.randint(0, 20, (n, 6))),
    "branching": (Branching, lambda n: torch.randn(n, 8)),
    "tied": (Tied, lambda n: torch.randn(n, 8)),
}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", [scripted, traced, frozen])
@pytest.mark.parametrize("kind", list(CASES))
def test_int8_of_a_script(kind: str, way: Callable[..., Any], device: str, tmp_path: Path) -> None:
    """Little noise, on other sizes too; the model as it was; the same bits from the file."""
    make, batch = CASES[kind]
    model = make().eval().to(device)  # what is frozen or made in a trace cannot move later
    script = way(model, batch(8).to(device))
    inference, result = optimized(script, batch, device)
    report = inference.report()
    assert report["result"] == "int8"
    assert report["kept"]
    int8 = [name for region in report["regions"] if region["state"] == "int8" for name in region["layers"]]
    least = {"mlp": 3, "cnn": 4, "encoder": 6, "branching": 3, "tied": 3}[kind]
    if (kind, way) == ("encoder", frozen):  # whose fast path of attention can no longer be turned off
        least = 2
        assert "attention runs as one op" in report["left"]["layer.self_attn"]
    assert len(int8) >= least, inference.explain()
    assert calls(result, "halfstep::int8_") >= len(int8)
    assert isinstance(result, torch.jit.ScriptModule)

    x = batch(5).to(device)
    with torch.no_grad():
        before = script(x)
        got = result(x)
        assert 0 < noise(before, got) < 0.05
        assert torch.equal(script(x), before)
        if (kind, way) != ("branching", traced):  # a trace has one of the branches
            other_sums = (kind, device) == ("encoder", "cuda")  # attention's fast path adds in another order
            assert noise(model(x), before) < (1e-8 if other_sums else 1e-10)
    inference.save_torchscript(tmp_path / "model.pt")
    with torch.no_grad():
        assert torch.equal(torch.jit.load(tmp_path / "model.pt", map_location=device)(x), got)


def test_what_layers_are_called_and_why_others_stay_float() -> None:
    inference, _ = optimized(scripted(Branching().eval(), None), CASES["branching"][1], exclude=["mix"])
    report = inference.report()
    assert report["left"] == {"lstm": "a recurrent layer", "mix": "in exclude"}
    names = {name for region in report["regions"] for name in region["layers"]}
    assert names == {"turn", "other", "signal"}
    fused = [line for region in report["regions"] for line in region["fused"]]
    assert fused == ["turn + gelu"]
    with pytest.raises(ValueError, match="include has 'nowhere', which names no layer"):
        optimized(scripted(Branching().eval(), None), CASES["branching"][1], include="nowhere")


def test_batch_norms_fold_and_int8_passes_on() -> None:
    inference, result = optimized(scripted(Cnn().eval(), None), CASES["cnn"][1])
    report = inference.report()
    assert report["folded"] == ["norm into stem", "inner_norm into inner", "last_norm into last"]
    regions = {tuple(region["layers"]): region["fused"] for region in report["regions"]}
    assert regions["inner", "last"] == ["inner + relu + int8 out", "last + residual + relu"]
    assert regions["stem",] == ["stem + relu"]  # what it gives is added too
    assert calls(result, "aten::batch_norm") == calls(result, "aten::conv2d") == calls(result, "aten::dropout") == 0
    assert calls(result, "aten::add") == 0
    assert not hasattr(result, "norm")
    assert not hasattr(result.stem, "weight")


def test_int8_stays_int8_between_layers() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Hardswish(), nn.Flatten(), nn.Linear(8 * 36, 8), nn.Unflatten(1, (2, 4))
    )
    model.append(nn.Linear(4, 2))
    inference, result = optimized(scripted(model.eval(), None), lambda n: torch.randn(n, 3, 8, 8))
    (region,) = inference.report()["regions"]
    assert region["layers"] == ["0", "3", "5"]
    assert region["fused"] == ["0 + hardswish + int8 out", "3 + int8 out"]
    assert calls(result, "halfstep::int8_") == 3


@pytest.mark.parametrize("way", [scripted, frozen])
def test_the_report_counts_the_bytes_of_all_layers(way: Callable[..., Any]) -> None:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(40))).eval()
    inference, _ = optimized(way(model, None), lambda n: torch.randn(n, 64), accuracy_threshold=1.0)
    a_layer = 64 * 64 + 4 * 64 + 4 * 64  # weight, scales, bias
    assert inference.report()["bytes"] == {"float32": 40 * (4 * 64 * 64 + 4 * 64), "int8": 40 * a_layer}


def test_int8_passes_a_pooling() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 4, 1), nn.Flatten())
    batch = CASES["cnn"][1]
    inference, result = optimized(scripted(model.eval(), None), batch)
    regions = [region["layers"] for region in inference.report()["regions"]]
    assert regions == [["0", "3"]]
    x = batch(5)
    assert noise(model(x), result(x)) < 0.01


def test_the_bits_of_eager_layers() -> None:
    """With the same scales, layers in eager code give what the script does."""
    make, batch = CASES["mlp"]
    model = make().eval()
    _, result = optimized(scripted(model, None), batch, bias_correction=False)
    layers = nn.Sequential(
        *(
            Int8Linear(
                getattr(result, name).packed,
                input_scale=constants[2],
                input_zero_point=constants[3],
                activation=constants[5],
                out_dtype=None if constants[6] is None else torch.float32,
                out_scale=constants[7],
                out_zero_point=constants[8],
            )
            for name, constants in zip("024", _constants(result, "halfstep::int8_linear"), strict=True)
        )
    )
    x = batch(7)
    with torch.no_grad():
        assert torch.equal(layers(x), result(x))
    weight = model[2].weight.detach()
    packed = getattr(result, "2").packed
    assert (packed.weight() * packed.scales()[:, None] - weight).abs().max() <= 0.501 * packed.scales().max()

    _, result = optimized(scripted(Encoder().eval(), None), CASES["encoder"][1], include="words")
    ids = torch.randint(0, 20, (4, 6))
    table = Int8Embedding(result.words.packed)
    assert calls(result, "halfstep::int8_") == 1
    assert table(ids).shape == (4, 6, 16)

    conv = nn.Conv2d(3, 8, 3, stride=2, padding=1, groups=1).eval()
    _, result = optimized(torch.jit.script(conv), lambda n: torch.randn(n, 3, 8, 8), activations="dynamic")
    (layer,) = [each for each in result.modules() if hasattr(each, "packed")]
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(Int8Conv2d(layer.packed)(x), result(x))


def _constants(script: torch.jit.ScriptModule, op: str) -> list[list[Any]]:
    """Return the constant arguments of each call, None where an argument is none."""
    nodes = [node for node in script.graph.nodes() if node.kind() == op]
    return [[value.toIValue() for value in node.inputs()] for node in nodes]


def test_products_of_old_traces() -> None:
    """addmm, mm and matmul with constants are layers, with the addition behind them."""

    class Old(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 8)
            self.c = nn.Linear(8, 4, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.addmm(self.a.bias, x, self.a.weight.t()).relu_()
            x = torch.matmul(x, self.b.weight.t()) + self.b.bias
            return x.mm(self.c.weight.transpose(0, 1))

    model = Old().eval()
    inference, result = optimized(traced(model, torch.randn(8, 8)), lambda n: torch.randn(n, 8))
    regions = [region["layers"] for region in inference.report()["regions"]]
    assert regions == [["a", "b", "c"]]
    assert calls(result, "aten::") == 0
    assert calls(result, "halfstep::int8_linear") == 3
    x = torch.randn(5, 8)
    assert noise(model(x), result(x)) < 0.01


def test_weights_that_forward_writes_or_computes_stay_float() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.written, self.scaled, self.plain = (nn.Parameter(torch.randn(8, 8)) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                self.written.mul_(1.0)
            x = F.linear(x, self.written)
            return F.linear(F.linear(x, self.scaled.t().contiguous()[:, :]), self.plain)

    inference, result = optimized(scripted(Odd().eval(), None), CASES["tied"][1])
    left = inference.report()["left"]
    assert left == dict.fromkeys(("written", "scaled"), "its weight is computed, or written to, in forward")
    assert calls(result, "halfstep::int8_linear") == 1


def test_attention_that_was_traced_as_one_op() -> None:
    model = Encoder().eval()
    with torch.no_grad():
        whole = torch.jit.trace(model, torch.randint(0, 20, (4, 6)), check_trace=False)
    inference, _ = optimized(whole, CASES["encoder"][1])
    assert "set_fastpath_enabled(False)" in inference.report()["left"]["layer.self_attn"]


def test_the_guard_gives_layers_back_or_the_float_model() -> None:
    make, batch = CASES["mlp"]
    script = scripted(make().eval(), None)
    inference, _ = optimized(script, batch, bits=5, accuracy_threshold=1.0)
    threshold = 0.8 * inference.report()["bound"]
    inference, result = optimized(script, batch, bits=5, accuracy_threshold=threshold)
    report = inference.report()
    assert report["kept"]
    assert report["bound"] <= threshold
    assert 0 < len(report["given_back"]) < 3
    assert calls(result, "halfstep::int8_") == 3 - len(report["given_back"])
    assert "number 1 of the most harmful" in inference.explain()
    inference, result = optimized(script, batch, accuracy_threshold=0.0)
    assert inference.report()["result"] == "float32"
    assert calls(result, "halfstep::int8_") == 0


def test_a_batch_of_nan_is_no_reason_to_stay_float() -> None:
    inference = InferencePrecisionOptimizer(speed_guard=False, progress=False, accuracy_threshold=1.0)
    data = [torch.randn(8, 8) for _ in range(6)]
    data[0].fill_(float("nan"))
    with pytest.warns(UserWarning, match=r"not finite|NaN"):
        inference.optimize_for_inference(scripted(_mlp().eval(), None), data, "cpu")
    assert inference.report()["result"] == "int8"


def test_a_batch_on_which_the_script_raises_is_named() -> None:
    with pytest.raises(ValueError, match="batch 0 of calibration_data makes the model raise RuntimeError"):
        optimized(scripted(_mlp().eval(), None), lambda n: torch.randn(n, 5))


def test_labels_and_top1(tmp_path: Path) -> None:
    script = scripted(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)).eval(), None)

    def batch(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(n, 8)
        with torch.no_grad():
            return x, script(x).argmax(1)

    inference, _ = optimized(script, batch, accuracy_threshold=0.5)
    assert inference.report()["metric"] == "top-1"
    seen = []
    inference, _ = optimized(script, batch, eval_fn=lambda model: seen.append(type(model)) or 1.0)
    assert inference.report()["metric"] == "score"
    assert all(issubclass(each, nn.Module) for each in seen)
    with pytest.raises(ValueError, match=r"TorchScript.*use save_torchscript\(\)"):
        inference.save(tmp_path / "model.safetensors")


def test_integers_that_forward_takes_are_no_labels() -> None:
    class Lengths(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 4)

        def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
            return self.layer(x) / lengths.unsqueeze(1)

    inference, _ = optimized(scripted(Lengths().eval(), None), lambda n: (torch.randn(n, 8), torch.randint(1, 9, (n,))))
    assert inference.report()["metric"] == "agreement"
    assert inference.report()["result"] == "int8"


@pytest.mark.parametrize("kind", ["cnn", "encoder"])
def test_int8_in_a_half_carrier(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    carry(torch.bfloat16, monkeypatch)
    make, batch = CASES[kind]
    model = make().eval()
    inference, result = optimized(scripted(model, None), batch, speed_guard=True, eval_fn=lambda _model: 1.0)
    assert inference.report()["carrier"] == "bfloat16"
    assert inference.report()["result"] == "int8"
    x = batch(5)
    with torch.no_grad():
        got = result(x)
        assert got.dtype == torch.float32
        assert noise(model(x), got) < 0.01
        inference.save_torchscript(tmp_path / "model.pt")
        assert torch.equal(torch.jit.load(tmp_path / "model.pt")(x), got)
    assert inference.report()["regions"][0]["milliseconds"].keys() >= {"int8", "float32"} or kind == "encoder"


@pytest.mark.parametrize("target", ["float16", "bfloat16"])
def test_half_targets(target: str) -> None:
    make, batch = CASES["cnn"]
    model = make().eval()
    inference, result = optimized(scripted(model, None), batch, target=target)
    x = batch(5)
    assert inference.report()["result"] == target
    with torch.no_grad():
        assert 0 < noise(model(x), result(x)) < 0.01


def test_a_file_in_a_process_without_the_package(tmp_path: Path) -> None:
    make, batch = CASES["branching"]
    torch.jit.script(make().eval()).save(tmp_path / "float.pt")
    loaded = torch.jit.load(tmp_path / "float.pt")
    inference, result = optimized(loaded, batch)
    inference.save_torchscript(tmp_path / "int8.pt")
    x = batch(5)
    with torch.no_grad():
        torch.save((x, result(x, 2)), tmp_path / "pair.pt")
    code = (
        "import sys, torch\n"
        "torch.ops.load_library(sys.argv[1])\n"
        "x, expected = torch.load('pair.pt')\n"
        "with torch.no_grad():\n"
        "    assert torch.equal(torch.jit.load('int8.pt')(x, 2), expected)\n"
        "assert 'halfstep' not in sys.modules\n"
    )
    command = [sys.executable, "-I", "-W", "ignore", "-c", code, str(LIBRARY)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_scripts_that_cannot_be_taken_apart() -> None:
    class Forking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.jit.wait(torch.jit.fork(self.layer, x))

    with pytest.raises(ValueError, match=r"quantize: the module uses prim::fork; that cannot be quantized"):
        optimized(scripted(Forking().eval(), None), CASES["tied"][1])


def test_what_optimize_for_inference_changed_is_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)).eval()
    script = torch.jit.optimize_for_inference(torch.jit.script(model))
    if "prim::ConstantMKLDNNTensor" not in str(script.graph):
        pytest.skip("this torch leaves convolutions as they are")
    inference, _ = optimized(script, lambda n: torch.randn(n, 3, 8, 8))
    assert inference.report()["left"] == {
        "0": "torch.jit.optimize_for_inference changed it; give the script as it was before"
    }
    with pytest.raises(ValueError, match="optimize_for_inference changed it"):
        optimized(script, lambda n: torch.randn(n, 3, 8, 8), strict=True)


def test_a_script_without_forward() -> None:
    with pytest.raises(ValueError, match="module is a LSTM without a method forward"):
        optimized(torch.jit.script(nn.LSTM(4, 4)), lambda n: torch.randn(n, 3, 4))


class Answer(NamedTuple):
    logits: torch.Tensor
    parts: Dict[str, torch.Tensor]  # noqa: UP006 (what scripts read)


def test_structures_and_state(tmp_path: Path) -> None:
    """Named results, optional arguments, and buffers that forward writes: calibration leaves no mark in the result."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])
            self.register_buffer("steps", torch.zeros(1))
            self.calls = 0

        def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> Answer:
            self.steps += 1
            self.calls += 1
            for layer in self.layers:
                x = F.relu(layer(x), inplace=True)
            if mask is not None:
                x = x * mask
            return Answer(x, {"first": x[:, :1]})

    script = torch.jit.script(Counting().eval())
    inference, result = optimized(
        script, lambda n: {"x": torch.randn(n, 8), "mask": torch.ones(n, 1)}, accuracy_threshold=1.0
    )
    assert [region["layers"] for region in inference.report()["regions"]] == [["layers.0", "layers.1"]]
    assert script.steps == 0
    assert script.calls == 0
    inference.save_torchscript(tmp_path / "model.pt")
    loaded = torch.jit.load(tmp_path / "model.pt")
    x = torch.randn(5, 8)
    before = int(loaded.calls)
    out = loaded(x)
    assert torch.equal(out.logits, result(x).logits)
    assert torch.equal(out.parts["first"], out.logits[:, :1])
    assert loaded.calls == before + 1
    assert noise(script(x).logits, out.logits) < 0.02


def test_signals_and_pictures_without_a_batch_stay_float() -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv1d(4, 4, 3, padding=1), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(torch.stack([self.conv(each) for each in x]))

    inference, _ = optimized(scripted(Single().eval(), None), lambda n: torch.randn(n, 4, 8))
    assert inference.report()["left"] == {"conv": "it is called without a batch dimension"}
    assert inference.report()["result"] == "int8"
