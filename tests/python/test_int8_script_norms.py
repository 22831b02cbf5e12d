"""Layer and RMS norms of TorchScript that write int8, against traced models and norms whose readers quantize."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import int8_norm_cases as cases
import pytest
import torch
import torch.nn.functional as F
from halfstep import InferencePrecisionOptimizer, int8_chains
from halfstep.int8_layers import Int8Linear, pack
from halfstep.int8_model import share
from halfstep.int8_runs import shapes_of
from int8_graph_cases import call, run, traced, with_int8
from torch import nn

pytestmark = pytest.mark.usefixtures("no_jit_fuser")

OPS = ("halfstep::layer_norm_int8", "halfstep::rms_norm_int8")
NAMES = {"functions": {"a": "scale", "b": "layer_norm"}}  # by the weight, where there is one


def scripted(model: nn.Module, _batch: torch.Tensor) -> torch.jit.ScriptModule:
    return torch.jit.script(model)


def jit_traced(model: nn.Module, batch: torch.Tensor) -> torch.jit.ScriptModule:
    return torch.jit.trace(model, (batch,), check_trace=False)


def frozen(model: nn.Module, batch: torch.Tensor) -> torch.jit.ScriptModule:
    script = torch.jit.script(model)
    if batch.is_cuda:  # there torch.jit.freeze would make one layer of query, key and value, which lose their names
        return torch.jit._recursive.wrap_cpp_module(torch._C._freeze_module(script._c))
    return torch.jit.freeze(script)


def built(
    script: torch.jit.ScriptModule, batch: torch.Tensor, layers: dict[str, Int8Linear]
) -> tuple[torch.jit.ScriptModule, list[tuple[list[str], list[str]]]]:
    """Return the script with these layers, in the batch's dtype, and its regions: layers, and what each took over."""
    form = torch.classes.halfstep.ScriptForm(script._c, True)
    form.probe((batch.float(),))
    called = {name for name, *_ in form.layers()}
    layers = {name: layer for name, layer in layers.items() if name in called}
    module, regions = form.build(
        list(layers),
        [layer.packed for layer in layers.values()],
        [layer.input_scale or 0.0 for layer in layers.values()],
        [layer.input_zero_point for layer in layers.values()],
        batch.dtype,
    )
    return torch.jit._recursive.wrap_cpp_module(module).to(batch.dtype), regions


def norms_of(regions: list[tuple[list[str], list[str]]]) -> dict[str, str]:
    """Return the norm that each layer has taken over."""
    found = [line.split(" + ") for _, lines in regions for line in lines]
    return {parts[0]: part.removeprefix("norm ") for parts in found for part in parts if part.startswith("norm ")}


def keeps_float(script: torch.jit.ScriptModule) -> list[bool]:
    """Return of each norm that writes int8 whether it writes float too."""
    return [list(node.inputs())[-1].toIValue() for op in OPS for node in script.graph.findAllNodes(op, True)]


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype is other.dtype and torch.equal(one, other)


WAYS = [(way, dtype) for way in (scripted, jit_traced) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
WAYS.append((frozen, torch.float32))  # what is frozen keeps its type


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(("way", "dtype"), WAYS)
@pytest.mark.parametrize("rows", [False, True], ids=["static", "by rows"])
@pytest.mark.parametrize("name", cases.MODELS)
def test_scripts_give_the_bits_of_traced_models(
    name: str, dtype: torch.dtype, rows: bool, way: Callable[..., torch.jit.ScriptModule], device: torch.device
) -> None:
    model, batch = cases.made(name)
    graph_module = with_int8(traced(model), batch)
    graph_module = (cases.by_rows(graph_module) if rows else graph_module).to(device)
    model, batch = model.to(device), batch.to(device)
    layers = {each: layer for each, layer in graph_module.named_modules() if isinstance(layer, Int8Linear)}
    script = way(model, batch)
    batch = batch.to(dtype)
    result, regions = built(script, batch, layers)
    names = dict(NAMES.get(name, cases.FUSED[name]))
    if rows:
        names.pop("a", None)  # by rows int8 passes through no view
    assert norms_of(regions) == names
    assert len(keeps_float(result)) == len(set(names.values()))

    graph_module.to(dtype)
    expected = share(graph_module)
    int8_chains.fuse(expected, shapes_of(graph_module, batch, call), dtype)
    for samples in (batch, batch[:1], 3 * batch - 2):
        assert same(run(result, samples), run(expected, samples))
    assert keeps_float(result) == {"pre-norm": [False] * 3, "post-norm": [True] * 2}.get(name, [False] * (2 - rows))


def test_layers_that_share_a_norm_are_a_region() -> None:
    model, batch = cases.made("pre-norm")
    graph_module = with_int8(traced(model), batch)
    layers = {each: layer for each, layer in graph_module.named_modules() if isinstance(layer, Int8Linear)}
    _, regions = built(torch.jit.script(model), batch, layers)
    shared = [f"attention.{each}" for each in "qkv"]
    assert (shared, [f"{each} + norm ln1" for each in shared]) in regions
    assert (["fc1", "fc2"], ["fc1 + norm ln2 + relu + int8 out", "fc2 + residual"]) in regions
    assert (["head"], ["head + norm ln3"]) in regions


# ---------------------------------------------------------------------------------------------- which norms write int8


class Two(nn.Module):
    """A norm that two layers read, in the way that a test is about."""

    def __init__(self, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.norm, self.a, self.b = norm or nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return self.a(y) + self.b(y)


class Shapes(Two):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return self.a(y.reshape(y.size(0) * y.size(1), y.shape[2])) * y.dim() + self.b(y).sum()


class Returned(Two):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.norm(x)
        return self.a(y) + self.b(y), y


class ReturnedFromABranch(Two):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        z = self.a(y)
        if bool(z.sum() > 0):
            y = self.b(y)
        return y


class Twice(Two):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(self.norm(x)) + self.b(self.norm(x * 2))


class OwnResidual(Two):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return self.a(y) + y


class Residual(Two):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return self.b(torch.tanh(self.a(y))) + y


class InALoop(Two):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        for i in range(3):
            x = x + self.a(y) * i
        return x


class RmsFunctions(Two):
    """One by a weight that is not the module's only tensor, one without a weight or an epsilon."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(F.rms_norm(x, [8], self.norm.weight, 1e-3)) + self.b(torch.rms_norm(x * 2, [8]))


class OwnRmsFunctions(Two):
    """The same by halfstep's float norms."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = torch.ops.halfstep.rms_norm(x, [8], self.norm.weight, 1e-3)
        return self.a(first) + self.b(torch.ops.halfstep.rms_norm(x * 2, [8]))


class Unread(Two):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.a(x) + self.b(x))


class ComputedWeight(Two):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(F.layer_norm(x, [8], self.norm.weight * 2, self.norm.bias)) + self.b(x)


class GrowingShape(Two):
    """The list of the sizes is not what its construction says."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        sizes = [8]
        sizes.insert(0, 5)
        return self.a(F.layer_norm(x, sizes)) + self.b(x)


class WrittenBefore(Two):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        z = y.reshape(-1, 8)
        z.add_(1)
        return self.a(y) + z.mean()


class WrittenInAList(Two):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        several = [x, y]
        several[1].mul_(2)
        return self.a(y) + several[0]


class WrittenInABranch(Two):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        if bool(x.sum() < 1e9):
            y.add_(1)
        return self.a(y)


class WrittenInALoop(Two):
    """Behind the layer in the text, before its next call."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        for _ in range(3):
            x = x + self.a(y)
            y.mul_(0.5)
        return x


class WrittenBetween(Two):
    """After the first of two layers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        z = self.a(y)
        y.add_(1)
        return z + self.b(y)


class WrittenAfterwards(Two):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        z = self.a(y)
        y.add_(1)
        return z + y


def _layers(model: Two) -> dict[str, Int8Linear]:
    return {name: Int8Linear(pack(layer.weight, layer.bias), input_scale=0.06) for name, layer in _linears(model)}


def _linears(model: Two) -> list[tuple[str, nn.Linear]]:
    return [(name, layer) for name, layer in (("a", model.a), ("b", model.b))]


def _apart(model: Two) -> Two:
    """Return a copy whose norms are halfstep's in float."""
    twin = copy.deepcopy(model)
    if type(model) is RmsFunctions:
        twin.__class__ = OwnRmsFunctions
    else:
        cases.make_own(twin.norm)
    return twin


@pytest.mark.parametrize("rows", [False, True], ids=["static", "by rows"])
@pytest.mark.parametrize(
    ("kind", "norm", "expected", "keep"),
    [
        (Two, None, {"a": "norm", "b": "norm"}, [False]),
        (Two, nn.LayerNorm(8, elementwise_affine=False), {"a": "layer_norm", "b": "layer_norm"}, [False]),
        (Two, nn.LayerNorm(8, bias=False), {"a": "norm", "b": "norm"}, [False]),
        (Two, nn.LayerNorm((5, 8)), {}, []),
        (Shapes, None, {"a": "norm", "b": "norm"}, [False]),
        (Returned, None, {"a": "norm", "b": "norm"}, [True]),
        (ReturnedFromABranch, None, {"a": "norm", "b": "norm"}, [True]),
        (Twice, None, {"a": "norm", "b": "norm"}, [False, False]),
        (OwnResidual, None, {"a": "norm"}, [True]),
        (Residual, None, {"a": "norm"}, [True]),
        (InALoop, None, {"a": "norm"}, [False]),
        (Unread, None, {}, []),
        (ComputedWeight, None, {}, []),
        (GrowingShape, None, {}, []),
        (WrittenBefore, None, {}, []),
        (WrittenInAList, None, {}, []),
        (WrittenInABranch, None, {}, []),
        (WrittenInALoop, None, {}, []),
        (WrittenBetween, None, {}, []),
        (WrittenAfterwards, None, {"a": "norm"}, [True]),
        (Two, nn.RMSNorm(8), {"a": "norm", "b": "norm"}, [False]),
        (Two, nn.RMSNorm(8, eps=0.01, elementwise_affine=False), {"a": "rms_norm", "b": "rms_norm"}, [False]),
        (Two, nn.RMSNorm((5, 8)), {}, []),
        (Shapes, nn.RMSNorm(8), {"a": "norm", "b": "norm"}, [False]),
        (Residual, nn.RMSNorm(8), {"a": "norm"}, [True]),
        (WrittenInALoop, nn.RMSNorm(8), {}, []),
        (RmsFunctions, None, {"a": "norm", "b": "rms_norm"}, [False, False]),
    ],
)
def test_which_norms_write_int8(
    kind: type[Two], norm: nn.Module | None, expected: dict[str, str], keep: list[bool], rows: bool
) -> None:
    model = kind(copy.deepcopy(norm)).eval().requires_grad_(False)
    x = torch.randn(3, 5, 8)
    layers = _layers(model)
    for parameter in model.norm.parameters():
        nn.init.uniform_(parameter, 0.4, 1.0)
    if rows:
        layers = {name: Int8Linear(layer.packed) for name, layer in layers.items()}
        if kind is Shapes:  # by rows int8 passes through no view
            expected, keep = {"b": "norm"}, [True]
    script = torch.jit.script(model)
    result, regions = built(script, x, layers)
    assert norms_of(regions) == expected
    assert keeps_float(result) == keep
    apart = torch.jit.script(_apart(model) if expected else model)
    unfused, others = built(apart, x, layers)
    assert not norms_of(others)
    for samples in (x, x[:1], 2 - x):
        with torch.no_grad():
            got, bits, near = result(samples.clone()), unfused(samples.clone()), script(samples.clone())
        got, bits, near = ((each,) if isinstance(each, torch.Tensor) else each for each in (got, bits, near))
        assert all(map(same, got, bits))
        assert all((one - other).norm() <= 0.05 * other.norm() for one, other in zip(got, near, strict=True))


def test_readers_that_quantize_otherwise_get_floats() -> None:
    model = Two().eval().requires_grad_(False)
    x = torch.randn(3, 5, 8)
    script, apart = torch.jit.script(model), torch.jit.script(_apart(model))
    for change in ({"input_scale": 0.05}, {"input_scale": 0.06, "input_zero_point": 1}, {"input_scale": None}):
        layers = {**_layers(model), "b": Int8Linear(pack(model.b.weight, model.b.bias), **change)}
        result, regions = built(script, x, layers)
        assert norms_of(regions) == {"a": "norm"}
        assert [names for names, _ in regions] == [["a"], ["b"]]
        assert keeps_float(result) == [True]
        assert same(run(result, x), run(built(apart, x, layers)[0], x))
    only = {"b": _layers(model)["b"]}  # the other one is float
    result, regions = built(script, x, only)
    assert (norms_of(regions), keeps_float(result)) == ({"b": "norm"}, [True])
    assert same(run(result, x), run(built(apart, x, only)[0], x))


@pytest.mark.parametrize("options", [{"input_scale": 0.06}, {}], ids=["static", "by rows"])
def test_smoothed_layers_get_floats(options: dict[str, float]) -> None:
    model = Two().eval().requires_grad_(False)
    x = torch.randn(3, 5, 8)
    layers = {
        name: Int8Linear(pack(layer.weight, layer.bias, input_factors=torch.rand(8) + 0.5 if name == "a" else None))
        for name, layer in _linears(model)
    }
    for layer in layers.values():
        layer.input_scale = options.get("input_scale")
    result, regions = built(torch.jit.script(model), x, layers)
    assert norms_of(regions) == {"b": "norm"}
    assert keeps_float(result) == [True]
    assert same(run(result, x), run(built(torch.jit.script(_apart(model)), x, layers)[0], x))


# ---------------------------------------------------------------------------------------------------- the whole


def optimized(name: str, **options: Any) -> tuple[InferencePrecisionOptimizer, nn.Module]:
    inference = InferencePrecisionOptimizer(accuracy_threshold=1.0, smooth_quant=False, progress=False, **options)
    calibration = [cases.batch_of(12) for _ in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        script = torch.jit.script(cases.made(name)[0])
        return inference, inference.optimize_for_inference(script, calibration, "cpu")


@pytest.mark.parametrize("activations", ["static", "dynamic"])
@pytest.mark.parametrize(("name", "keep"), [("pre-norm", [False] * 3), ("post-norm", [True] * 2)])
def test_reports_and_files(name: str, keep: list[bool], activations: str, tmp_path: Path) -> None:
    inference, result = optimized(name, activations=activations, speed_guard=False)
    regions = {tuple(region["layers"]): region["fused"] for region in inference.report()["regions"]}
    norm = {"pre-norm": "ln1", "post-norm": "ln0"}[name]
    shared = tuple(f"attention.{each}" for each in "qkv")
    assert regions[shared] == [f"{each} + norm {norm}" for each in shared]
    assert f"attention.k + norm {norm}" in inference.explain()
    assert keeps_float(result) == keep
    inference.save_torchscript(tmp_path / "model.pt")
    batch = cases.batch_of(5)
    assert same(run(torch.jit.load(tmp_path / "model.pt"), batch), run(result, batch))


@pytest.mark.parametrize("activations", ["static", "dynamic"])
def test_layers_that_share_a_norm_are_timed(activations: str) -> None:
    inference, _ = optimized("pre-norm", activations=activations, eval_fn=lambda _model: 1.0)
    (region,) = [each for each in inference.report()["regions"] if "attention.q" in each["layers"]]
    assert region["milliseconds"].keys() >= {"int8", "float32"}
