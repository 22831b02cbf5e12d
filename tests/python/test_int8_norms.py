"""Layer and RMS norms that write int8: the ops against what they stand for, and models against those without them."""

from __future__ import annotations

import contextlib
import copy
import pickle
from pathlib import Path
from typing import Any
from unittest import mock

import int8_norm_cases as cases
import pytest
import torch
import torch.nn.functional as F
from halfstep import InferencePrecisionOptimizer, int8_chains
from halfstep.int8_chains import Region
from halfstep.int8_graph import subgraph
from halfstep.int8_layers import Int8Linear, pack
from halfstep.int8_model import share
from halfstep.int8_norms import Int8LayerNorm, Int8RMSNorm
from halfstep.int8_runs import capture, shapes_of
from int8_file_cases import plan_in, taken_apart, with_plan
from int8_graph_cases import call, run, traced, with_int8
from torch import nn
from torch.fx import GraphModule

ops = torch.ops.halfstep
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype is other.dtype and torch.equal(one, other)


# ------------------------------------------------------------------------------------------------------------ the ops


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5, 64), (7, 33), (2, 5001), (1,), (0, 8), (3, 0), (2, 0, 8)])
@pytest.mark.parametrize("affine", ["both", "weight", "none"])
def test_the_op_is_a_norm_and_a_quantization(
    dtype: torch.dtype, shape: tuple[int, ...], affine: str, device: torch.device
) -> None:
    size = shape[-1]
    x = (torch.randn(shape) * 3 + 2).to(device, dtype)
    weight = torch.randn(size).to(device, dtype) if affine != "none" else None
    bias = torch.randn(size, device=device) if affine == "both" else None
    norm = ops.layer_norm(x, [size], weight, bias, 1e-3)
    for keep in (False, True):
        quantized, scales, out = ops.layer_norm_int8(x, [size], weight, bias, 1e-3, 0.03, -7, keep)
        assert same(quantized, ops.quantize_int8(norm, 0.03, -7))
        assert same(scales, torch.empty(0, device=device))
        assert same(out, norm if keep else norm.new_empty(0))
        quantized, scales, out = ops.layer_norm_int8(x, [size], weight, bias, 1e-3, keep_float=keep)
        assert all(map(same, (quantized, scales), ops.quantize_int8_rows(norm)))
        assert same(out, norm if keep else norm.new_empty(0))


def test_the_op_is_near_torchs_norm_in_float64(device: torch.device) -> None:
    x, weight, bias = torch.randn(4, 6, 10) + 100, torch.randn(6, 10), torch.randn(6, 10)
    exact = F.layer_norm(x.double(), (6, 10), weight.double(), bias.double())
    given = [each.to(device) for each in (x, weight, bias)]
    quantized, _, out = ops.layer_norm_int8(given[0].transpose(0, 0), [6, 10], *given[1:], 1e-5, 0.05, 3, True)
    assert ((quantized.cpu().double() - 3) * 0.05 - exact).abs().max() <= 0.0255  # half a step, and what 100 costs
    torch.testing.assert_close(out.cpu().double(), exact, rtol=1e-4, atol=1e-4)
    turned = x.transpose(0, 1).contiguous().transpose(0, 1).to(device)  # another order in memory
    assert same(ops.layer_norm_int8(turned, [6, 10], *given[1:], 1e-5, 0.05, 3)[0], quantized)


def test_rows_that_are_not_finite(device: torch.device) -> None:
    x = torch.randn(3, 40, device=device)
    x[1, 7] = float("nan")
    assert (ops.layer_norm_int8(x, [40], scale=0.1, zero_point=9)[0][1] == 9).all()
    scales = ops.layer_norm_int8(x, [40])[1]
    assert scales.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"input": torch.ones(2, 8, dtype=torch.float64)}, TypeError, "input has dtype Double"),
        ({"normalized_shape": [4]}, ValueError, r"input has shape \[2, 8\], expected one that ends in .*\[4\]"),
        ({"normalized_shape": []}, ValueError, "expected one that ends in"),
        ({"normalized_shape": [2, 8]}, ValueError, "expected one dimension where scale is absent"),
        ({"weight": torch.ones(7)}, ValueError, r"weight has shape \[7\], expected \[8\]"),
        ({"bias": torch.ones(8, dtype=torch.int32)}, TypeError, "bias has dtype Int"),
        ({"scale": 0.0}, ValueError, "scale is 0, expected a positive"),
        ({"scale": float("nan")}, ValueError, "scale is nan"),
        ({"scale": 1.0, "zero_point": 128}, ValueError, "is 128, expected -128 to 127"),
        ({"zero_point": 1}, ValueError, "zero_point is 1, expected 0 where scale is absent"),
    ],
)
def test_the_op_refuses(arguments: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=f"layer_norm_int8: .*{said}"):
        ops.layer_norm_int8(**{"input": torch.ones(2, 8), "normalized_shape": [8], **arguments})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5, 64), (7, 33), (2, 5001), (1,), (0, 8), (3, 0), (2, 0, 8)])
@pytest.mark.parametrize("eps", [None, 1e-3])
def test_rms_norms_are_a_norm_and_a_quantization(
    dtype: torch.dtype, shape: tuple[int, ...], eps: float | None, device: torch.device
) -> None:
    size = shape[-1]
    x = (torch.randn(shape) * 3 + 2).to(device, dtype)
    weight = torch.randn(size).to(device, dtype) if eps is None else None
    norm = ops.rms_norm(x, [size], weight, eps)
    for keep in (False, True):
        quantized, scales, out = ops.rms_norm_int8(x, [size], weight, eps, 0.03, -7, keep)
        assert same(quantized, ops.quantize_int8(norm, 0.03, -7))
        assert same(scales, torch.empty(0, device=device))
        assert same(out, norm if keep else norm.new_empty(0))
        quantized, scales, out = ops.rms_norm_int8(x, [size], weight, eps, keep_float=keep)
        assert all(map(same, (quantized, scales), ops.quantize_int8_rows(norm)))
        assert same(out, norm if keep else norm.new_empty(0))
    with pytest.raises(ValueError, match="rms_norm_int8: .*expected 0 where scale is absent"):
        ops.rms_norm_int8(x, [size], zero_point=3)


def test_the_op_without_values() -> None:
    x, weight = torch.randn(4, 3, 8).transpose(0, 1).bfloat16(), torch.randn(8)
    for options in ({"scale": 0.1, "keep_float": True}, {}):
        for op in (ops.layer_norm_int8, ops.rms_norm_int8):
            real = op(x, [8], weight, **options)
            meta = op(x.to("meta"), [8], weight.to("meta"), **options)
            for one, other in zip(real, meta, strict=True):
                assert other.is_meta
                assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_linear_layer_takes_rows_that_were_quantized_before_it(dtype: torch.dtype, device: torch.device) -> None:
    layer = Int8Linear(pack(torch.randn(6, 24), torch.randn(6)), out_dtype=dtype).to(device)
    x = torch.randn(2, 5, 24).to(device, dtype)
    residual = torch.randn(2, 5, 6).to(device, dtype)
    quantized, scales = ops.quantize_int8_rows(x)
    assert same(layer(quantized, row_scales=scales), layer(x))
    assert same(layer(quantized, residual, scales), layer(x, residual))
    strided = torch.stack((scales, scales), -1)[..., 0]
    assert same(layer(quantized, row_scales=strided), layer(x))
    assert same(torch.jit.script(layer)(quantized, residual, scales), layer(x, residual))


@pytest.mark.parametrize(
    ("input", "scales", "options", "error", "said"),
    [
        (torch.ones(2, 8), torch.ones(2), {}, ValueError, "expected them for an int8 input without input_scale"),
        (torch.ones(2, 8).char(), torch.ones(2), {"input_scale": 1.0}, ValueError, "beside input_scale"),
        (torch.ones(2, 8).char(), torch.ones(2).half(), {}, TypeError, "has dtype Half, expected Float"),
        (torch.ones(2, 8).char(), torch.ones(3), {}, ValueError, r"has shape \[3\], expected \[2\], one for each row"),
    ],
)
def test_a_linear_layer_refuses_scales_that_are_not_its_rows(
    input: torch.Tensor, scales: torch.Tensor, options: dict[str, float], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=f"int8_linear: .*input_row_scales.*{said}"):
        Int8Linear(pack(torch.randn(4, 8), None), **options)(input, row_scales=scales)


# --------------------------------------------------------------------------------------------------------- the graphs


def fused(
    graph_module: GraphModule, batch: torch.Tensor, *, with_norms: bool = True
) -> tuple[GraphModule, list[Region]]:
    twin = share(graph_module)
    with contextlib.nullcontext() if with_norms else mock.patch.object(int8_chains._Fuser, "take_norms"):
        return twin, int8_chains.fuse(twin, shapes_of(graph_module, batch, call), batch.dtype)


def norms_of(regions: list[Region]) -> dict[str, str]:
    """Return the norm that each layer has taken over."""
    found = [(name, part) for region in regions for name, parts in region.parts.items() for part in parts]
    return {name: part.removeprefix("norm ") for name, part in found if part.startswith("norm ")}


@pytest.mark.parametrize("rows", [False, True], ids=["static", "by rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", cases.MODELS)
def test_models_give_the_bits_of_those_whose_layers_quantize(
    name: str, dtype: torch.dtype, rows: bool, device: torch.device
) -> None:
    model, batch = cases.made(name)
    unfused = with_int8(traced(model), batch)
    unfused = (cases.by_rows(unfused) if rows else unfused).to(device, dtype)
    batch = batch.to(device, dtype)
    result, regions = fused(unfused, batch)
    expected = dict(cases.FUSED[name])
    if rows:
        expected.pop("a", None)  # by rows int8 passes through no view
    assert norms_of(regions) == expected
    apart, others = fused(cases.with_own_norms(unfused, expected.values()), batch, with_norms=False)
    assert not norms_of(others)
    torchs, _ = fused(unfused, batch, with_norms=False)
    for samples in (batch, batch[:1], 3 * batch - 2):
        assert same(run(result, samples), run(apart, samples))
        near = run(torchs, samples)
        assert (run(result, samples) - near).norm() <= 0.02 * near.norm()
    kept = [module.keep_float for module in result.modules() if isinstance(module, Int8LayerNorm)]
    assert kept == {"pre-norm": [False] * 3, "post-norm": [True] * 2, "functions": []}[name]


@pytest.mark.parametrize("name", cases.MODELS)
def test_values_have_their_names_and_regions_are_whole(name: str) -> None:
    model, batch = cases.made(name)
    graph_module = traced(model)
    result, regions = fused(with_int8(graph_module, batch), batch)
    floats = capture(graph_module, batch, call, [node.name for node in graph_module.graph.nodes if node.op != "output"])
    values = capture(result, batch, call, [node.name for node in result.graph.nodes if node.op != "output"])
    for node, value in values.items():  # named as the float graph's, of the same shape, and near them if float
        if node in floats and isinstance(value, torch.Tensor):
            assert value.shape == floats[node].shape
            if value.is_floating_point():
                assert (value - floats[node]).norm() <= 0.1 * floats[node].norm(), node
    for region in regions:
        part, inputs = subgraph(result, region.nodes)
        assert set(inputs) <= set(floats)
        with torch.no_grad():
            outputs = part(*[values[each] for each in inputs])
        for out in outputs if isinstance(outputs, tuple) else (outputs,):
            assert any(isinstance(v, torch.Tensor) and same(out, v) for v in values.values())
        whole, float_inputs = subgraph(graph_module, region.nodes)
        assert set(float_inputs) == set(inputs)
    lines = [line for region in regions for line in region.fused]
    assert {
        "pre-norm": "fc1 + norm ln2 + relu + int8 out",
        "post-norm": "attention.q + norm ln0 + joined with attention.k, attention.v",
    }.get(name, "a + norm layer_norm") in lines
    assert {"pre-norm": ["attention.q", "attention.k", "attention.v"], "post-norm": ["fc1", "fc2"]}.get(
        name, ["a"]
    ) in [region.layers for region in regions]


class Two(nn.Module):
    """A norm that is read by two layers, in the way that a test is about."""

    def __init__(self, forward: Any, **layers: nn.Module) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)
        for name, layer in layers.items():
            setattr(self, name, layer)
        self._forward = forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._forward(self, x)


def both(self: Two, x: torch.Tensor) -> torch.Tensor:
    y = self.norm(x)
    return self.a(y) + self.b(y)


def twice(self: Two, x: torch.Tensor) -> torch.Tensor:
    return self.a(self.norm(x)) + self.b(self.norm(x * 2))


def written_before(self: Two, x: torch.Tensor) -> torch.Tensor:
    y = self.norm(x)
    z = y.reshape(-1, 8)
    z.add_(1)
    return self.a(y) + z.mean()


def written_afterwards(self: Two, x: torch.Tensor) -> torch.Tensor:
    y = self.norm(x)
    z = self.a(y)
    y.add_(1)
    return z + y


def own_residual(self: Two, x: torch.Tensor) -> torch.Tensor:
    y = self.norm(x)
    return self.a(y) + y


def not_read(self: Two, x: torch.Tensor) -> torch.Tensor:
    return self.norm(self.a(x) + self.b(x))


def computed_weight(self: Two, x: torch.Tensor) -> torch.Tensor:
    return self.a(F.layer_norm(x, (8,), self.norm.weight * 2, self.norm.bias)) + self.b(x)


def rms_functions(self: Two, x: torch.Tensor) -> torch.Tensor:
    x = self.a(F.rms_norm(x, (8,), self.norm.weight, eps=1e-4))
    return self.b(torch.rms_norm(x, [8]))


class Inherited(nn.LayerNorm):
    """Is traced through."""


class Doubled(nn.LayerNorm):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input * 2) * 2


def _with_hook() -> nn.LayerNorm:
    norm = nn.LayerNorm(8)
    norm.register_forward_pre_hook(lambda _module, args: (args[0] * 2,))
    return norm


@pytest.mark.parametrize(
    ("forward", "layers", "expected"),
    [
        (both, {}, {"a": "norm", "b": "norm"}),
        (both, {"norm": nn.LayerNorm(8, elementwise_affine=False)}, {"a": "norm", "b": "norm"}),
        (both, {"norm": nn.LayerNorm(8, bias=False)}, {"a": "norm", "b": "norm"}),
        (both, {"norm": _with_hook()}, {}),
        (both, {"norm": Inherited(8)}, {"a": "layer_norm", "b": "layer_norm"}),
        (both, {"norm": Doubled(8)}, {}),
        (both, {"norm": nn.LayerNorm((5, 8))}, {}),
        (both, {"norm": nn.RMSNorm(8)}, {"a": "norm", "b": "norm"}),
        (both, {"norm": nn.RMSNorm(8, eps=0.01, elementwise_affine=False)}, {"a": "norm", "b": "norm"}),
        (both, {"norm": nn.RMSNorm((5, 8))}, {}),
        (rms_functions, {"norm": nn.RMSNorm(8)}, {"a": "rms_norm", "b": "rms_norm_1"}),
        (twice, {}, {}),
        (written_before, {}, {}),
        (written_afterwards, {}, {"a": "norm"}),
        (own_residual, {}, {}),
        (not_read, {}, {}),
        (computed_weight, {}, {}),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_which_norms_are_taken_over(forward: Any, layers: dict[str, nn.Module], expected: dict[str, str]) -> None:
    model = Two(forward, **copy.deepcopy(layers)).eval().requires_grad_(False)
    x = torch.randn(3, 5, 8)
    unfused = with_int8(traced(model), x)
    result, regions = fused(unfused, x)
    assert norms_of(regions) == expected
    apart, _ = fused(cases.with_own_norms(unfused, expected.values()), x, with_norms=False)
    assert same(run(result, x), run(apart, x))
    made = [module for module in result.modules() if isinstance(module, (Int8LayerNorm, Int8RMSNorm))]
    assert len(made) == ("norm" in expected.values())


def test_readers_that_quantize_otherwise_get_floats() -> None:
    model = Two(both).eval().requires_grad_(False)
    x = torch.randn(3, 5, 8)
    unfused = with_int8(traced(model), x)
    unfused.b.input_scale *= 1.5
    result, regions = fused(unfused, x)
    assert norms_of(regions) == {"a": "norm"}
    assert result.norm.keep_float
    assert same(run(result, x), run(fused(cases.with_own_norms(unfused, ["norm"]), x, with_norms=False)[0], x))
    smoothed = with_int8(traced(model), x)
    weight, bias = smoothed.a.packed.weight().float(), None
    smoothed.a.packed = pack(weight, bias, input_factors=torch.rand(8) + 0.5)
    assert norms_of(fused(smoothed, x)[1]) == {"b": "norm"}


@pytest.mark.parametrize(("name", "rows"), [("post-norm", True), ("functions", False)])
def test_fused_models_are_copied_pickled_scripted_and_exported(name: str, rows: bool) -> None:
    model, batch = cases.made(name)
    unfused = with_int8(traced(model), batch)
    result, _ = fused(cases.by_rows(unfused) if rows else unfused, batch)
    expected = run(result, batch)
    assert same(run(copy.deepcopy(result), batch), expected)
    assert same(run(pickle.loads(pickle.dumps(result)), batch), expected)
    assert same(run(torch.jit.script(result), batch), expected)
    program = torch.export.export(result, (batch,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    assert same(run(program.module(), batch), expected)
    assert same(run(program.module(), batch[:3]), run(result, batch[:3]))
    other = {key: value for key, value in result.state_dict().items() if isinstance(value, torch.Tensor)}
    assert set(other) == {key for key, value in unfused.state_dict().items() if isinstance(value, torch.Tensor)}


# ---------------------------------------------------------------------------------------------------------- the files


def optimized(name: str, device: torch.device, **options: Any) -> tuple[InferencePrecisionOptimizer, nn.Module]:
    inference = InferencePrecisionOptimizer(
        accuracy_threshold=1.0,
        eval_fn=lambda _model: 1.0,
        speed_guard=False,
        smooth_quant=False,
        progress=False,
        **options,
    )
    calibration = [cases.batch_of(12) for _ in range(3)]
    return inference, inference.optimize_for_inference(cases.made(name)[0], calibration, str(device))


@pytest.mark.parametrize(
    ("name", "activations"), [("pre-norm", "static"), ("post-norm", "dynamic"), ("functions", "static")]
)
def test_files_bring_the_bits_back(name: str, activations: str, device: torch.device, tmp_path: Path) -> None:
    inference, result = optimized(name, device, activations=activations)
    assert " + norm " in inference.explain()
    assert any(" + norm " in line for region in inference.report()["regions"] for line in region["fused"])
    inference.save(tmp_path / "m")
    batch = cases.batch_of(5).to(device)
    loaded = InferencePrecisionOptimizer.load(tmp_path / "m", cases.MODELS[name](), device)
    assert same(run(loaded, batch), run(result, batch))
    assert str(loaded.graph) == str(result.graph)
    inference.save_torchscript(tmp_path / "script")
    assert same(run(torch.jit.load(tmp_path / "script"), batch), run(result, batch))


def test_files_of_other_norms_are_refused(tmp_path: Path) -> None:
    inference, _ = optimized("pre-norm", torch.device("cpu"))
    inference.save(tmp_path / "m")
    plan = plan_in(taken_apart(tmp_path / "m")[0])
    for region in plan["regions"]:
        region["fused"] = [line.replace("norm ln2", "norm ln3") for line in region["fused"]]
    with_plan(tmp_path / "other", tmp_path / "m", plan)
    with pytest.raises(ValueError, match="regions: "):
        InferencePrecisionOptimizer.load(tmp_path / "other", cases.PreNorm())
