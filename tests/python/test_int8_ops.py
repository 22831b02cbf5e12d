"""The int8 ops against NumPy's integers and PyTorch's own float and quantized functions, on every device."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from halfstep.int8_layers import Int8Conv1d, Int8Conv2d, Int8Embedding, Int8Linear, pack

ops = torch.ops.halfstep
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
ACTIVATIONS = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "hardswish": F.hardswish,
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_int8(*shape: int, seed: int = 0, low: int = -128) -> torch.Tensor:
    return torch.randint(low, 128, shape, generator=generator(seed), dtype=torch.int8)


def packed_of(weight: torch.Tensor, bias: torch.Tensor | None = None, **geometry: Any) -> torch.ScriptObject:
    scales = torch.rand(weight.shape[0], generator=generator(9)) + 0.5
    names = ("stride", "padding", "dilation")
    lists = [list(geometry.get(name, (0, 0) if name == "padding" else (1, 1))) for name in names]
    return torch.classes.halfstep.PackedInt8(weight, scales, bias, *lists, geometry.get("groups", 1), None)


def numpy_sums(x: torch.Tensor, w: torch.Tensor, zero_point: int) -> torch.Tensor:
    exact = (x.cpu().numpy().astype(np.int64) - zero_point) @ w.cpu().numpy().astype(np.int64).T
    return torch.from_numpy(exact)


# ------------------------------------------------------------------------------------------------------ quantization


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("scale", "zero_point"), [(0.03, 0), (0.5, -128), (1e-3, 127), (0.1, 17)])
def test_quantize_is_torchs(device: str, dtype: torch.dtype, scale: float, zero_point: int) -> None:
    x = (torch.randn(7, 301, generator=generator()) * 4).to(dtype)
    expected = torch.quantize_per_tensor(x.float(), scale, zero_point, torch.qint8).int_repr()
    q = ops.quantize_int8(x.to(device), scale, zero_point)
    assert q.dtype == torch.int8
    assert torch.equal(q.cpu(), expected)
    back = ops.dequantize_int8(q, scale, zero_point, dtype)
    assert torch.equal(back.cpu(), ((expected.float() - zero_point) * scale).to(dtype))


@pytest.mark.parametrize("device", DEVICES)
def test_quantize_of_what_is_not_finite(device: str) -> None:
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.5, 1.5, 2.5, -0.5], device=device)
    assert ops.quantize_int8(x, 1.0, 3).tolist() == [3, 127, -128, 3, 5, 5, 3]
    rows, scales = ops.quantize_int8_rows(torch.stack([x, torch.ones_like(x)]))
    assert scales[0].isnan()
    assert scales[1].item() == pytest.approx(1 / 127)
    assert rows[1].tolist() == [127] * 7


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 7, 130), (4, 5000), (2, 0), (0, 3)])
def test_rows_have_their_own_scale(device: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=generator())
    q, scales = ops.quantize_int8_rows(x.to(device))
    assert q.shape == x.shape
    assert scales.shape == x.shape[:-1]
    if x.numel():
        expected = x.abs().amax(-1) / 127
        assert torch.equal(scales.cpu(), expected)
        wanted = (x * (1 / expected).unsqueeze(-1)).round().clamp(-128, 127)
        assert torch.equal(q.cpu().float(), wanted)


@pytest.mark.parametrize("device", DEVICES)
def test_quantize_keeps_strides(device: str) -> None:
    x = torch.randn(2, 3, 5, 7, device=device).to(memory_format=torch.channels_last)
    q = ops.quantize_int8(x, 0.1)
    assert q.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(q, ops.quantize_int8(x.contiguous(), 0.1))
    assert torch.equal(ops.quantize_int8(x[:, :, ::2], 0.1), q[:, :, ::2])


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weights_by_channel(search: bool, bits: int) -> None:
    w = torch.randn(6, 5, 3, 3, generator=generator())
    w[2] = 0
    q, scales = ops.quantize_int8_weight(w, bits, search)
    levels = (1 << (bits - 1)) - 1
    assert q.abs().max() <= levels
    largest = w.abs().amax((1, 2, 3)) / levels
    assert scales[2] == 1
    kept = [0, 1, 3, 4, 5]
    error = ((q * scales.view(-1, 1, 1, 1) - w) ** 2).sum((1, 2, 3))
    if search:
        plain, plain_scales = ops.quantize_int8_weight(w, bits, False)
        plain_error = ((plain * plain_scales.view(-1, 1, 1, 1) - w) ** 2).sum((1, 2, 3))
        assert (error <= plain_error * 1.000001).all()
        assert bits == 8 or (error < plain_error).any()
    else:
        assert torch.equal(scales[kept], largest[kept])
        assert ((q * scales.view(-1, 1, 1, 1) - w).abs() <= scales.view(-1, 1, 1, 1) * 0.5001).all()


# ------------------------------------------------------------------------------------------------------------- linear


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("zero_point", [0, -128, 127, 5])
@pytest.mark.parametrize(
    ("m", "k", "n"),
    [(1, 1, 1), (1, 4096, 3), (2, 3, 5), (7, 16, 8), (16, 64, 48), (17, 65, 33), (33, 130, 100), (129, 257, 31)],
)
def test_linear_sums_are_exact(device: str, m: int, k: int, n: int, zero_point: int) -> None:
    x, w = random_int8(m, k), random_int8(n, k, seed=1, low=-127)
    weight = packed_of(w).to(device)
    sums = ops.int8_linear(x.to(device), weight, 1.0, zero_point, out_dtype=torch.int32)
    assert sums.dtype == torch.int32
    assert torch.equal(sums.cpu().long(), numpy_sums(x, w, zero_point))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("terms", "zero_point"), [(32768, 0), (32768, -128), (65793, 127), (131071, 0)])
def test_saturating_sums_are_exact(device: str, terms: int, zero_point: int) -> None:
    """Every product at its largest: 16-bit partial sums would saturate after two."""
    x = torch.full((2, terms), -128, dtype=torch.int8)
    x[1] = 127
    w = torch.full((3, terms), 127, dtype=torch.int8)
    w[1] = -127
    sums = ops.int8_linear(x.to(device), packed_of(w).to(device), 1.0, zero_point, out_dtype=torch.int32)
    assert torch.equal(sums.cpu().long(), numpy_sums(x, w, zero_point))


@pytest.mark.parametrize("device", DEVICES)
def test_too_many_terms_are_refused(device: str) -> None:
    x = torch.zeros(1, 65794, dtype=torch.int8, device=device)
    weight = packed_of(torch.zeros(1, 65794, dtype=torch.int8)).to(device)
    assert ops.int8_linear(x, weight, 1.0).item() == 0
    with pytest.raises(ValueError, match="65793"):
        ops.int8_linear(x, weight, 1.0, 1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_linear_epilogue(device: str, activation: str, out_dtype: torch.dtype) -> None:
    x, w = random_int8(9, 50), random_int8(21, 50, seed=1, low=-127)
    bias = torch.randn(21, generator=generator(2))
    residual = torch.randn(9, 21, generator=generator(3)).to(torch.bfloat16)
    weight = packed_of(w, bias)
    scale = 0.001
    step = torch.tensor(scale) * weight.scales()
    exact = numpy_sums(x, w, 7).float() * step + bias + residual.float()
    expected = ACTIVATIONS[activation](exact)
    out = ops.int8_linear(x.to(device), weight.to(device), scale, 7, residual.to(device), activation, out_dtype)
    if activation in ("none", "relu", "relu6"):
        assert torch.equal(out.cpu(), expected.to(out_dtype))
    else:
        torch.testing.assert_close(
            out.cpu(), expected.to(out_dtype), rtol=1e-5 if out_dtype == torch.float32 else 1e-2, atol=1e-6
        )
    q = ops.int8_linear(
        x.to(device), weight.to(device), scale, 7, residual.to(device), activation, out_scale=0.02, out_zero_point=-9
    )
    assert q.dtype == torch.int8
    difference = (q.cpu().int() - ops.quantize_int8(expected, 0.02, -9).int()).abs().max()
    assert difference <= (0 if activation in ("none", "relu", "relu6") else 1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_float_input_is_quantized_first(device: str, dtype: torch.dtype) -> None:
    x = torch.randn(3, 11, 40, generator=generator()).to(dtype).to(device)
    weight = packed_of(random_int8(13, 40, low=-127)).to(device)
    static = ops.int8_linear(x, weight, 0.02, -3)
    assert static.dtype == dtype
    assert torch.equal(static, ops.int8_linear(ops.quantize_int8(x, 0.02, -3), weight, 0.02, -3, out_dtype=dtype))
    dynamic = ops.int8_linear(x, weight, out_dtype=torch.float32)
    q, scales = ops.quantize_int8_rows(x)
    exact = numpy_sums(q.reshape(33, 40), weight.weight(), 0).float() * (
        scales.cpu().reshape(33, 1) * weight.scales().cpu()
    )
    assert torch.equal(dynamic.cpu().reshape(33, 13), exact)


@pytest.mark.parametrize("device", DEVICES)
def test_a_row_that_is_not_finite_stays_so(device: str) -> None:
    x = torch.randn(4, 8, device=device)
    x[1, 3] = float("nan")
    x[2, 0] = float("inf")
    out = ops.int8_linear(x, packed_of(random_int8(5, 8, low=-127)).to(device))
    assert out.isnan().any(1).tolist() == [False, True, True, False]


@pytest.mark.parametrize("device", DEVICES)
def test_input_factors(device: str) -> None:
    x = torch.randn(6, 10, device=device)
    factors = torch.rand(10) + 0.1
    plain = packed_of(random_int8(4, 10, low=-127))
    smooth = torch.classes.halfstep.PackedInt8(
        plain.weight(), plain.scales(), None, [1, 1], [0, 0], [1, 1], 1, factors
    ).to(device)
    scaled = x * factors.to(device)
    assert torch.equal(ops.int8_linear(x, smooth, 0.02), ops.int8_linear(scaled, plain.to(device), 0.02))
    assert torch.equal(ops.int8_linear(x, smooth), ops.int8_linear(scaled, plain.to(device)))


@pytest.mark.parametrize("device", DEVICES)
def test_strided_inputs(device: str) -> None:
    """Among them rows of stride 0, which a peer multiplies wrongly."""
    weight = packed_of(random_int8(6, 12, low=-127)).to(device)
    x = torch.randn(12, 8, device=device)
    assert torch.equal(ops.int8_linear(x.t(), weight, 0.02), ops.int8_linear(x.t().contiguous(), weight, 0.02))
    row = torch.randn(1, 12, device=device)
    wide = row.expand(5, 12)
    assert torch.equal(ops.int8_linear(wide, weight, 0.02), ops.int8_linear(wide.clone(), weight, 0.02))
    single = torch.randn(1, device=device).expand(1, 12)
    assert torch.equal(ops.int8_linear(single, weight, 0.02), ops.int8_linear(single.clone(), weight, 0.02))
    assert ops.int8_linear(x.new_empty(0, 12), weight, 0.02).shape == (0, 6)
    assert ops.int8_linear(x[:, 0], weight, 0.02).shape == (6,)


# -------------------------------------------------------------------------------------------------------- convolution

GEOMETRIES = [
    (3, 8, {}),
    (3, 8, {"padding": (1, 1), "stride": (2, 1)}),
    (6, 9, {"padding": (2, 0), "dilation": (2, 1), "groups": 3}),
    (8, 8, {"padding": (1, 1), "groups": 8}),
    (8, 16, {"padding": (1, 1), "groups": 8, "stride": (2, 2)}),
    (16, 32, {"padding": (1, 1)}),
    (5, 7, {"padding": (3, 3), "stride": (3, 3)}),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("zero_point", [0, -128, 11])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (2, 5)])
@pytest.mark.parametrize(("inputs", "outputs", "geometry"), GEOMETRIES)
def test_convolution_sums_are_exact(
    device: str, inputs: int, outputs: int, geometry: dict[str, Any], kernel: tuple[int, int], zero_point: int
) -> None:
    x = random_int8(2, inputs, 11, 9)
    w = random_int8(outputs, inputs // geometry.get("groups", 1), *kernel, seed=1, low=-127)
    expected = F.conv2d((x.double() - zero_point), w.double(), **geometry).long()
    weight = packed_of(w, **geometry).to(device)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        sums = ops.int8_conv2d(
            x.to(device, memory_format=memory_format), weight, 1.0, zero_point, out_dtype=torch.int32
        )
        assert torch.equal(sums.cpu().long(), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_convolution_epilogue(device: str) -> None:
    x = torch.randn(3, 8, 6, 6, generator=generator())
    w, bias = random_int8(16, 8, 3, 3, low=-127), torch.randn(16)
    weight = packed_of(w, bias, padding=(1, 1))
    residual = torch.randn(3, 16, 6, 6)
    q = ops.quantize_int8(x, 0.03, 5)
    sums = F.conv2d(q.double() - 5, w.double(), padding=1).float()
    step = (torch.tensor(0.03) * weight.scales()).view(1, -1, 1, 1)
    expected = F.relu(sums * step + bias.view(1, -1, 1, 1) + residual)
    out = ops.int8_conv2d(x.to(device), weight.to(device), 0.03, 5, residual.to(device), "relu")
    assert torch.equal(out.cpu(), expected)
    assert out.is_contiguous(memory_format=torch.channels_last)
    dynamic = ops.int8_conv2d(x.to(device), weight.to(device))
    for image in range(3):
        scale = x[image].abs().max() / 127
        one = ops.int8_conv2d(ops.quantize_int8(x[image : image + 1], scale.item()), weight, scale.item())
        assert torch.equal(dynamic[image].cpu(), one[0])


# ---------------------------------------------------------------------------------------------------------- embedding


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_embedding(device: str, index_dtype: torch.dtype, dtype: torch.dtype) -> None:
    table = random_int8(10, 33, low=-127)
    weight = packed_of(table)
    indices = torch.randint(0, 10, (4, 5), generator=generator(), dtype=index_dtype)
    expected = (table.float() * weight.scales().unsqueeze(1)).to(dtype)[indices.long()]
    assert torch.equal(ops.int8_embedding(indices.to(device), weight.to(device), dtype).cpu(), expected)


def test_embedding_refuses_indices_outside_of_the_table() -> None:
    weight = packed_of(random_int8(10, 3))
    for index in (-1, 10):
        with pytest.raises(ValueError, match=f"index {index} at 1 is outside of the table; expected 0 .. 9"):
            ops.int8_embedding(torch.tensor([0, index]), weight)


# ------------------------------------------------------------------------------------------------------------- errors


def test_bad_calls_are_named() -> None:
    weight, x = packed_of(random_int8(4, 8, low=-127)), torch.randn(2, 8)
    conv = packed_of(random_int8(4, 8, 3, 3, low=-127))
    for call, error, message in (
        (lambda: ops.int8_linear(torch.randn(2, 7), weight), ValueError, r"\[2, 7\], expected one that ends in 8"),
        (lambda: ops.int8_linear(x.double(), weight), TypeError, "Double"),
        (lambda: ops.int8_linear(x.to(torch.int8), weight), ValueError, "needs input_scale"),
        (lambda: ops.int8_linear(x, weight, 0.0), ValueError, "input_scale is 0"),
        (lambda: ops.int8_linear(x, weight, float("nan")), ValueError, "input_scale"),
        (lambda: ops.int8_linear(x, weight, 1.0, 128), ValueError, "zero point"),
        (lambda: ops.int8_linear(x, weight, None, 1), ValueError, "expected 0"),
        (lambda: ops.int8_linear(x, weight, activation="tanh"), ValueError, "'tanh', expected none, relu"),
        (lambda: ops.int8_linear(x, weight, residual=torch.randn(2, 5)), ValueError, r"\[2, 5\], expected \[2, 4\]"),
        (lambda: ops.int8_linear(x, weight, out_dtype=torch.float64), TypeError, "Double"),
        (lambda: ops.int8_linear(x, weight, out_dtype=torch.float32, out_scale=1.0), ValueError, "expected Char"),
        (lambda: ops.int8_linear(x, conv), ValueError, "of a convolution"),
        (lambda: ops.int8_conv2d(torch.randn(2, 8, 4, 4), weight), ValueError, "two dimensions"),
        (lambda: ops.int8_conv2d(torch.randn(2, 7, 4, 4), conv), ValueError, r"\[2, 7, 4, 4\]"),
        (lambda: ops.int8_conv2d(torch.randn(2, 8, 2, 4), conv), ValueError, "2 high"),
        (lambda: ops.quantize_int8(x, 1e-40), ValueError, "normal float32"),
        (lambda: ops.quantize_int8_weight(torch.randn(3, 3), 9), ValueError, "bits is 9"),
        (
            lambda: ops.quantize_int8_weight(torch.cat([torch.ones(2, 3), torch.full((1, 3), float("inf"))])),
            ValueError,
            "channel 2 of weight holds a NaN or an infinity",
        ),
        (lambda: packed_of(torch.zeros(3, 3)), TypeError, "expected Char"),
        (lambda: packed_of(random_int8(4, 3), torch.zeros(3)), ValueError, r"bias has shape \[3\], expected \[4\]"),
        (lambda: packed_of(random_int8(4, 3, 3, 3), groups=3), ValueError, "groups is 3"),
        (lambda: packed_of(random_int8(4, 3, 3, 3), stride=(0, 1)), ValueError, "stride"),
    ):
        with pytest.raises(error, match=message):
            call()


# ----------------------------------------------------------------------------------------- objects, scripts, programs


def small_layers() -> dict[str, tuple[torch.nn.Module, torch.Tensor]]:
    torch.manual_seed(0)
    linear, conv = torch.nn.Linear(20, 10), torch.nn.Conv2d(4, 6, 3, padding=1)
    conv1d = torch.nn.Conv1d(4, 6, 3, padding=1)
    table = torch.nn.Embedding(12, 7)
    batched = {
        "conv2d": Int8Conv2d(pack(conv.weight, conv.bias, padding=(1, 1)), input_scale=0.03, input_zero_point=4),
        "conv1d": Int8Conv1d(pack(conv1d.weight.unsqueeze(2), conv1d.bias, padding=(0, 1)), input_scale=0.03),
    }
    return {
        "linear": (Int8Linear(pack(linear.weight, linear.bias), input_scale=0.03), torch.randn(5, 20)),
        "rows": (Int8Linear(pack(linear.weight, None), activation="gelu"), torch.randn(2, 5, 20)),
        "conv2d": (batched["conv2d"], torch.randn(2, 4, 7, 7)),
        "conv1d": (batched["conv1d"], torch.randn(2, 4, 9)),
        "image": (batched["conv2d"], torch.randn(4, 7, 7)),
        "signal": (batched["conv1d"], torch.randn(4, 9)),
        "embedding": (Int8Embedding(pack(table.weight, None)), torch.tensor([[1, 2], [11, 0]])),
    }


KINDS = ["linear", "rows", "conv2d", "conv1d", "embedding"]
SINGLE = ["image", "signal"]  # without a batch


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", SINGLE)
@pytest.mark.parametrize("scale", [0.03, None])
def test_a_convolution_without_a_batch(kind: str, scale: float | None, device: str) -> None:
    layer, x = small_layers()[kind]
    layer, x = copy.deepcopy(layer).to(device), x.to(device)
    layer.input_scale, layer.input_zero_point = scale, 0
    residual = torch.randn_like(layer(x))
    for added in (None, residual):
        expected = layer(x.unsqueeze(0), None if added is None else added.unsqueeze(0)).squeeze(0)
        for called in (layer, torch.jit.script(layer)):
            assert torch.equal(called(x, added), expected)
    assert residual.dim() == x.dim()


def test_a_signal_of_another_shape_is_named_as_it_came() -> None:
    layer, _ = small_layers()["signal"]
    for shape in ((2, 5, 9), (5, 9), (9,), (2, 2, 4, 9)):
        for called, error in ((layer, ValueError), (torch.jit.script(layer), torch.jit.Error)):
            with pytest.raises(error) as raised:
                called(torch.randn(shape))
            assert f"input has shape {list(shape)}, expected [batch, 4, length] or [4, length]" in str(raised.value)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS + SINGLE)
def test_layers_can_be_copied_pickled_scripted_exported(kind: str, device: str) -> None:
    layer, x = small_layers()[kind]
    layer, x = layer.to(device), x.to(device)
    expected = layer(x)
    assert expected.device.type == device
    copied = copy.deepcopy(layer)
    assert copied.packed is not layer.packed
    pickled = pickle.loads(pickle.dumps(layer))
    scripted = torch.jit.script(layer)
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    traced = torch.jit.trace(layer, x)
    exported = torch.export.export(layer, (x,)).module()
    for other in (copied, pickled, scripted, loaded, traced, exported):
        assert torch.equal(other(x), expected)
    saved = io.BytesIO()
    torch.save(layer.state_dict(), saved)
    saved.seek(0)
    state = torch.load(saved, weights_only=True)
    other = copy.deepcopy(layer)
    other.packed = torch.classes.halfstep.PackedInt8(
        torch.zeros_like(layer.packed.weight()), layer.packed.scales(), None, [1, 1], [0, 0], [1, 1], 1, None
    )
    other.load_state_dict(state)
    assert torch.equal(other(x), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS + SINGLE)
def test_layers_compile_in_one_graph(kind: str, device: str) -> None:
    layer, x = small_layers()[kind]
    layer, x = layer.to(device), x.to(device)
    compiled = torch.compile(lambda value: layer(value) * 2, fullgraph=True)
    assert torch.equal(compiled(x), layer(x) * 2)


@pytest.mark.parametrize("kind", KINDS)
def test_exported_programs_take_other_batches(kind: str) -> None:
    layer, x = small_layers()[kind]
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: batch},))
    wide = torch.cat([x, x, x])
    assert torch.equal(program.module()(wide), layer(wide))


@pytest.mark.parametrize("kind", KINDS)
def test_meta_says_shape_and_dtype(kind: str) -> None:
    layer, x = small_layers()[kind]
    expected = layer(x)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        pass
    op = {"embedding": ops.int8_embedding, "linear": ops.int8_linear, "rows": ops.int8_linear}.get(kind)
    if op is None:
        op, x, expected = ops.int8_conv2d, torch.randn(2, 4, 7, 7), small_layers()["conv2d"][0](torch.randn(2, 4, 7, 7))
        layer = small_layers()["conv2d"][0]
    out = op(x.to("meta"), layer.packed)
    assert out.shape == expected.shape
    assert out.dtype == expected.dtype
    assert out.stride() == expected.stride()


@pytest.mark.parametrize("name", ["stride", "padding", "dilation"])
def test_geometry_of_which_no_size_can_be_made_is_refused(name: str) -> None:
    for size in (-1, 2**31, 2**62, 2**63 - 1):
        with pytest.raises(ValueError, match=rf"PackedInt8: {name} is \[1, {size}\], expected \d .. 2147483647"):
            packed_of(random_int8(2, 1, 3, 3), **{name: (1, size)})
    far = packed_of(random_int8(2, 1, 3, 3), dilation=(2**31 - 1, 1))
    with pytest.raises(ValueError, match="expected at least 4294967295, the kernel's reach"):
        ops.int8_conv2d(random_int8(1, 1, 3, 3), far, 1.0, 0)


def test_threads_share_packed_weights() -> None:
    """Each thread may be the first to call."""
    weight = packed_of(random_int8(64, 128, low=-127))
    x = torch.randn(4, 128)
    barrier = threading.Barrier(8)
    results: list[torch.Tensor] = []

    def call() -> None:
        barrier.wait()
        results.append(ops.int8_linear(x, weight, 0.02))

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.cuda
@pytest.mark.parametrize("kind", KINDS)
def test_layers_follow_the_module_and_are_captured(kind: str) -> None:
    layer, x = small_layers()[kind]
    expected = layer(x)
    moved = torch.nn.Sequential(copy.deepcopy(layer)).cuda()
    on_gpu = x.cuda()
    assert moved[0].packed.weight().is_cuda
    result = moved(on_gpu)
    torch.testing.assert_close(result.cpu(), expected, rtol=1e-5, atol=1e-6)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = moved(on_gpu)
    out.zero_()
    graph.replay()
    assert torch.equal(out, result)
    scripted = torch.jit.script(layer)
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    loaded = torch.jit.load(file, map_location="cuda")
    assert torch.equal(loaded(on_gpu), result)
    assert torch.equal(scripted(on_gpu), result)  # a weight that stayed behind is prepared where the input is


@pytest.mark.cuda
def test_a_capture_before_the_first_call_says_so() -> None:
    weight = packed_of(random_int8(4, 8, low=-127))
    x = torch.randn(2, 8, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="Call the model once before the capture"), torch.cuda.graph(graph):
        ops.int8_linear(x, weight, 0.02)
    torch.cuda.synchronize()
    assert ops.int8_linear(x, weight, 0.02).shape == (2, 4)


@pytest.mark.cuda
def test_devices_agree_to_the_bit() -> None:
    x = torch.randn(65, 300)
    weight = packed_of(random_int8(77, 300, low=-127), torch.randn(77))
    for arguments in ((0.02, -5, None, "relu"), (None, 0, torch.randn(65, 77), "hardswish")):
        on_cpu = ops.int8_linear(x, weight, *arguments)
        moved = tuple(a.cuda() if isinstance(a, torch.Tensor) else a for a in arguments)
        assert torch.equal(ops.int8_linear(x.cuda(), weight, *moved).cpu(), on_cpu)


def test_pack_takes_what_torchs_layers_take() -> None:
    conv = torch.nn.Conv2d(3, 4, 3, stride=2, padding=1)
    x = torch.randn(2, 3, 8, 8)
    one, pair = (
        pack(conv.weight, conv.bias, stride=s, padding=p, dilation=d)
        for s, p, d in ((2, 1, 1), ((2, 2), (1, 1), (1, 1)))
    )
    assert torch.equal(Int8Conv2d(one)(x), Int8Conv2d(pair)(x))
    assert (one.stride(), one.padding(), one.dilation()) == ([2, 2], [1, 1], [1, 1])
    plain = pack(conv.weight)
    assert plain.bias() is None
    assert (plain.stride(), plain.padding()) == ([1, 1], [0, 0])
    for weight, bias, kind, message in (
        (None, None, TypeError, "weight is NoneType, expected a tensor"),
        ([[1.0]], None, TypeError, "weight is list"),
        (torch.ones(2, 2), 0.5, TypeError, "bias is float"),
        (torch.ones(0, 4), None, ValueError, r"weight is empty: \[0, 4\]"),
    ):
        with pytest.raises(kind, match=message):
            pack(weight, bias)
