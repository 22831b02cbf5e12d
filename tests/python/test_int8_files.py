"""Files of optimized models: the same bits come back, and other code is told from the code that was optimized."""

from __future__ import annotations

import copy
import os
import resource
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from halfstep import InferencePrecisionOptimizer, int8_device, int8_load
from halfstep.half_model import CastModel
from halfstep.int8_load import load_int8
from halfstep.int8_nodes import INT8_LAYERS
from halfstep.int8_report import Report
from halfstep.int8_save import SavedResult, save_result
from inference_cases import Cnn, batches, digits, trained_cnn
from int8_file_cases import KINDS, Small, call, carry, optimized, plan_in, taken_apart, with_plan
from safetensors import safe_open
from torch import nn

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def layers_of(model: nn.Module) -> list[tuple[str, str]]:
    return [(name, repr(module)) for name, module in model.named_modules() if isinstance(module, INT8_LAYERS)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activations", ["static", "dynamic"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_the_same_bits_come_back(kind: str, activations: str, device: str, tmp_path: Path) -> None:
    inference, result, batch = optimized(kind, device, activations=activations)
    inference.save(tmp_path / "model.safetensors")
    other = KINDS[kind][0]()  # of other weights
    before = copy.deepcopy(other.state_dict())
    loaded = InferencePrecisionOptimizer.load(tmp_path / "model.safetensors", other, device)
    assert torch.equal(call(loaded, batch), call(result, batch))
    assert layers_of(loaded) == layers_of(result)
    assert layers_of(loaded)
    assert type(loaded).__name__ == type(result).__name__
    assert not loaded.training
    assert all(torch.equal(before[key], value) for key, value in other.state_dict().items())
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["resnet", "encoder", "branching", "signal"])
@pytest.mark.parametrize("carrier", [torch.bfloat16, torch.float16])
def test_int8_in_a_half_carrier(
    carrier: torch.dtype, kind: str, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    carry(carrier, monkeypatch)
    inference, result, batch = optimized(kind, device, speed_guard=True)
    assert isinstance(result, CastModel)
    inference.save(tmp_path / "m")
    loaded = load_int8(tmp_path / "m", KINDS[kind][0](), device)
    assert torch.equal(call(loaded, batch), call(result, batch))
    assert layers_of(loaded) == layers_of(result)
    assert {p.dtype for p in loaded.parameters()} <= {carrier}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("target", ["float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["resnet", "encoder", "tied", "channels last"])
def test_float_results(kind: str, target: str, device: str, tmp_path: Path) -> None:
    inference, result, batch = optimized(kind, device, target)
    inference.save(tmp_path / "m")
    loaded = load_int8(tmp_path / "m", KINDS[kind][0](), device)
    assert torch.equal(call(loaded, batch), call(result, batch))
    assert type(loaded) is CastModel
    with pytest.raises(ValueError, match=r"of a model in float32, but this model is float64"):
        load_int8(tmp_path / "m", KINDS[kind][0]().double(), device)


def test_the_float_model_that_came_back(tmp_path: Path) -> None:
    inference = InferencePrecisionOptimizer(
        bits=2, accuracy_threshold=0.0, calibrator="min_max", speed_guard=False, progress=False
    )
    with pytest.warns(UserWarning, match="the float model came back"):
        result = inference.optimize_for_inference(trained_cnn(), batches(), "cpu")
    inference.save(tmp_path / "m")
    images, _ = digits()
    assert torch.equal(call(load_int8(tmp_path / "m", Cnn()), images), call(result, images))


def test_a_model_on_the_meta_device(tmp_path: Path) -> None:
    for kind in ("resnet", "encoder"):
        inference, result, batch = optimized(kind)
        inference.save(tmp_path / "m")
        loaded = load_int8(tmp_path / "m", KINDS[kind][0]().to("meta"))
        assert torch.equal(call(loaded, batch), call(result, batch))


def test_smoothing_factors_are_kept(tmp_path: Path) -> None:
    inference, result, batch = optimized("mlp", smooth_quant=True)
    inference.save(tmp_path / "m")
    header, _ = taken_apart(tmp_path / "m")
    assert header["fc1.input_factors"]["shape"] == [16]
    loaded = load_int8(tmp_path / "m", KINDS["mlp"][0]())
    assert loaded.fc1.packed.input_factors() is not None
    assert torch.equal(call(loaded, batch), call(result, batch))


def test_what_is_in_the_file(tmp_path: Path) -> None:
    inference, result, _ = optimized("resnet")
    inference.save(tmp_path / "m")
    plan = plan_in(taken_apart(tmp_path / "m")[0])
    assert plan["version"] == 3
    assert plan["outside"] == plan["carrier"] == "float32"
    assert len(plan["graph"]) == 64
    assert ["conv1", "bn1"] in plan["folded"]
    layers = {layer["name"]: layer for layer in plan["layers"]}
    assert layers["layer1.0.conv2"]["residual"]
    assert not layers["layer1.0.conv1"]["residual"]
    assert layers["layer1.0.conv1"]["activation"] == "relu"
    assert layers["layer1.0.conv1"]["out_scale"] == layers["layer1.0.conv2"]["input_scale"]
    assert layers["layer2.0.conv1"]["stride"] == [2, 2]
    assert layers["fc"]["layer"] == "Int8Linear"
    assert any("+ residual" in line for region in plan["regions"] for line in region["fused"])
    assert plan["device"]["name"]
    assert plan["device"]["kernel"]
    with safe_open(tmp_path / "m", "pt") as file:  # the packed weight is channels last, the file is not
        assert torch.equal(
            file.get_tensor("layer1.0.conv1.weight"),
            result.get_submodule("layer1.0.conv1").packed.weight().contiguous(),
        )


def test_an_existing_file_is_replaced_or_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inference, _, _ = optimized("small")
    file = tmp_path / "m"
    file.write_text("old")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(
            "safetensors.torch.save_file", lambda *_args, **_kwargs: (_ for _ in ()).throw(OSError("no space"))
        )
        inference.save(file)
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]
    inference.save(file)
    load_int8(file, Small())
    with pytest.raises(IsADirectoryError, match="is a folder"):
        inference.save(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere' for 'm' does not exist"):
        inference.save(tmp_path / "nowhere" / "m")


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    inference, result, batch = optimized("small")
    file = tmp_path / "m"
    inference.save(file)
    assert file.stat().st_mode & 0o777 == 0o666 & ~umask()
    before = file.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match=f"{file} cannot be written: .*too large"):
            inference.save(file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]
    assert torch.equal(call(load_int8(file, Small()), batch), call(result, batch))


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_odd_places_are_named(tmp_path: Path) -> None:
    inference, _, _ = optimized("small")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path(os.devnull), Path("/proc/m"), tmp_path / ("m" * 300)):
        with pytest.raises(OSError, match=path.name):
            inference.save(path)
    (tmp_path / "empty").touch()
    for path, said in ((tmp_path / "pipe", "not a file"), (tmp_path / "empty", "empty"), ("/proc/cpuinfo", "empty")):
        with pytest.raises(ValueError, match=f"{path} is {said}"):
            load_int8(path, Small())
    unmappable = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if unmappable.exists():
        with pytest.raises(OSError, match=f"{unmappable} cannot be mapped to memory"):
            load_int8(unmappable, Small())


def test_a_model_of_mixed_types_that_stayed_float(tmp_path: Path) -> None:
    """It keeps its types."""
    model = Small().bfloat16().eval()
    model.norm.float()
    model.forward = None  # so that a call would raise: nothing is run
    saved = SavedResult(model, torch.bfloat16, torch.device("cpu"), report_of("bfloat16"), ((), {}))
    save_result(tmp_path / "m", saved)
    other = Small().bfloat16()
    other.norm.float()
    loaded = load_int8(tmp_path / "m", other)
    for (name, found), (_, expected) in zip(loaded.state_dict().items(), model.state_dict().items(), strict=True):
        assert found.dtype == expected.dtype, name
        assert torch.equal(found, expected)


def report_of(result: str) -> Report:
    return Report("int8", "cpu", result=result, carrier=result)


def test_the_file_may_be_overwritten_while_its_model_is_used(tmp_path: Path) -> None:
    inference, result, batch = optimized("mlp")
    inference.save(tmp_path / "m")
    loaded = load_int8(tmp_path / "m", KINDS["mlp"][0]())
    (tmp_path / "m").write_bytes(b"")
    assert torch.equal(call(loaded, batch), call(result, batch))


def replace(**changes: Any) -> nn.Module:
    model = Small()
    for name, module in changes.items():
        setattr(model, name, module)
    return model


class OtherActivation(Small):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(nn.functional.hardswish(self.bn(self.conv(x))).mean((2, 3))))


class OtherFloatCode(Small):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(nn.functional.relu(self.bn(self.conv(x))).amax((2, 3))))


class OtherConstant(Small):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(nn.functional.relu(self.bn(self.conv(x))).mean((3, 2))))


class OtherArgument(Small):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.relu(self.bn(self.conv(x))).mean((2, 3))
        self.norm(x)
        return self.head(x)


class OtherPlace(Small):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.bn(torch.relu(self.conv(x))).mean((2, 3))))


class Untraceable(Small):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if x.sum() < 1e6 else x


class OtherArguments(Small):
    def forward(self, *, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (replace(head=nn.Identity()), r"layer 'head' cannot be int8 in this model: there is no such layer"),
        (replace(head=nn.Linear(8, 5)), r"layer 'head': weight: \[4, 8\] in the file, \[5, 8\] by the model's code"),
        (replace(conv=nn.Conv2d(2, 8, 3, padding=1, dilation=2)), r"layer 'conv': dilation: \[1, 1\] in the file"),
        (replace(conv=nn.Conv2d(2, 8, 3, padding=1, padding_mode="reflect")), "its padding_mode is reflect"),
        (replace(norm=nn.LayerNorm(8, bias=False)), r"has \['norm.bias'\], which the model has not"),
        (replace(norm=nn.LayerNorm([1, 8])), r"norm.weight is F32 \[8\], expected float32 \[1, 8\]"),
        (replace(norm=nn.Linear(8, 8)), r"norm.weight is F32 \[8\], expected float32 \[8, 8\]"),
        (replace(bn=nn.Identity()), r"batch norms that are folded: \[\('conv', 'bn'\)\] in the file, \[\] by"),
        (OtherActivation(), "layer 'conv': activation: relu in the file, hardswish by the model's code"),
        (OtherPlace(), "batch norms that are folded"),
        (OtherFloatCode(), "it is of other code than the model's: the traced operations"),
        (OtherConstant(), "it is of other code than the model's"),
        (OtherArgument(), "layer 'head': out_dtype: float32 in the file, None by the model's code"),
        (replace(norm=nn.LayerNorm(8, eps=1e-3)), "it is of other code than the model's"),
        (Untraceable(), "this model cannot be: TraceError"),
        (OtherArguments(), "does not take the arguments that it was optimized with"),
    ],
)
def test_other_code_is_named(model: nn.Module, said: str, tmp_path: Path) -> None:
    inference, _, _ = optimized("small")
    inference.save(tmp_path / "m")
    with pytest.raises(ValueError, match=said) as caught:
        load_int8(tmp_path / "m", model)
    assert str(caught.value).startswith(f"{tmp_path / 'm'}: it is of ")


def test_what_the_saved_weights_have_in_them_is_not_compared(tmp_path: Path) -> None:
    """A folded batch norm, and the bias of an int8 layer."""
    inference, result, batch = optimized("small")
    inference.save(tmp_path / "m")
    loaded = load_int8(tmp_path / "m", replace(bn=nn.BatchNorm2d(8, eps=0.5), head=nn.Linear(8, 4, bias=False)))
    assert torch.equal(call(loaded, batch), call(result, batch))


def test_long_lists_of_another_model_are_cut(tmp_path: Path) -> None:
    inference, _, _ = optimized("resnet")
    inference.save(tmp_path / "m")
    with pytest.raises(ValueError, match="m: it is of another model, or of other code than the model's: ") as caught:
        load_int8(tmp_path / "m", Small())
    folded = inference.report()["folded"]
    first = [tuple(reversed(each.split(" into "))) for each in folded[:4]]
    assert f"folded: {first} and {len(folded) - 4} more in the file, [('conv', 'bn')] by" in str(caught.value)
    assert len(folded) > 4


@pytest.mark.parametrize(
    ("saved", "here", "said"),
    [
        ([1, 2], [1, 3], r"regions: \[1, 2\] in the file, \[1, 3\] by"),
        ([1, 2, 3, 4, 5], [1, 2, 3, 0, 5], r"regions: \[4\] in the file, \[0\] by"),
        ([*range(9)], [], r"regions: \[0, 1, 2, 3\] and 5 more in the file, \[\] by"),
        ([1], [*range(1, 7)], r"regions: \[\] in the file, \[2, 3, 4, 5\] and 1 more by"),
    ],
)
def test_what_differs_in_lists(saved: list[int], here: list[int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        int8_load._same("regions", saved, here)


def test_bad_calls_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = InferencePrecisionOptimizer()
    for act in (fresh.save, fresh.save_torchscript):
        with pytest.raises(RuntimeError, match="call optimize_for_inference"):
            act(tmp_path / "m")
    inference, _, _ = optimized("small")
    inference.save(tmp_path / "m")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_int8(tmp_path / "n", Small())
    with pytest.raises(ValueError, match="is not a file"):
        load_int8(tmp_path, Small())
    with pytest.raises(TypeError, match="model is str"):
        load_int8(tmp_path / "m", "Small")
    with pytest.raises(ValueError, match="device is meta"):
        load_int8(tmp_path / "m", Small(), "meta")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ModuleNotFoundError, match="pip install safetensors"):
        load_int8(tmp_path / "m", Small())


def test_times_are_taken_again_on_another_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inference, result, batch = optimized("small")
    inference.save(tmp_path / "here")
    plan = plan_in(taken_apart(tmp_path / "here")[0])
    plan["device"]["name"] = "another"
    file = with_plan(tmp_path / "there", tmp_path / "here", plan)
    with pytest.warns(UserWarning, match=r"optimized on another, this is .*; int8 takes .* ms here, float32 .* ms"):
        loaded = load_int8(file, Small())
    assert torch.equal(call(loaded, batch), call(result, batch))
    with pytest.warns(UserWarning, match=r"optimized on another, this is [^;]*$"):
        load_int8(file, Small(), retime=False)
    monkeypatch.setattr(int8_device, "loses", lambda _mine, _rival: True)
    with pytest.warns(UserWarning, match="int8 is slower, optimize the model for this device again"):
        load_int8(tmp_path / "here", Small(), retime=True)
    with pytest.warns(UserWarning, match="meta device"):
        load_int8(file, Small().to("meta"))


@pytest.mark.cuda
@pytest.mark.parametrize("kind", ["plain", "resnet", "encoder"])
def test_a_file_of_another_kind_of_device(kind: str, tmp_path: Path) -> None:
    """The sums are the same integers there, and the rest is float32."""
    for one, other in (("cpu", "cuda"), ("cuda", "cpu")):
        inference, result, batch = optimized(kind, one)
        inference.save(tmp_path / "m")
        with pytest.warns(UserWarning, match="was optimized on"):
            loaded = load_int8(tmp_path / "m", KINDS[kind][0](), other)
        moved = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t, other=other: t.to(other), batch)
        expected = call(result, batch)
        torch.testing.assert_close(
            call(loaded, moved).to(one), expected, rtol=0, atol=0.05 * float(expected.abs().max())
        )


class Attending(nn.Module):
    """Attention as users write it; with control flow it is not traced."""

    def __init__(self, is_traced: bool, heads: int, **options: bool) -> None:
        super().__init__()
        self.is_traced, self.attention = is_traced, nn.MultiheadAttention(32, heads, **options)
        self.head = nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.is_traced and x.sum() > 1e9:
            x = -x
        return self.head(self.attention(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize("is_traced", [True, False], ids=["traced", "untraced"])
def test_attention_of_other_settings_is_refused(tmp_path: Path, is_traced: bool) -> None:
    inference, file = (
        InferencePrecisionOptimizer(speed_guard=False, progress=False, accuracy_threshold=1.0),
        tmp_path / "f",
    )
    model = Attending(is_traced, 4, batch_first=True).eval()
    result = inference.optimize_for_inference(model, [torch.randn(6, 5, 32) for _ in range(3)], "cpu")
    assert inference.report()["graph"].startswith("traced" if is_traced else "not traced")
    inference.save(file)
    x = torch.randn(2, 5, 32)
    assert torch.equal(InferencePrecisionOptimizer.load(file, Attending(is_traced, 4, batch_first=True))(x), result(x))
    for heads, options in ((8, {"batch_first": True}), (4, {}), (4, {"batch_first": True, "add_zero_attn": True})):
        said = "the traced operations, .* differ" if is_traced else "the settings of torch's layers differ"
        with pytest.raises(ValueError, match=said):
            InferencePrecisionOptimizer.load(file, Attending(is_traced, heads, **options))
