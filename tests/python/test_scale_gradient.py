"""scale_gradient and cast: values against the chain rule, in every way that torch runs an op."""

from __future__ import annotations

import io
from collections.abc import Callable

import halfstep
import pytest
import torch
from torch import nn

halfstep.load_library()
ops = torch.ops.halfstep

HALF = [torch.float16, torch.bfloat16]
DTYPES = [*HALF, torch.float32, torch.float64]
BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


def gradient(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Return the gradient of sum(function(x) * (1, 2, 3...)), in float32 or wider so that no factor overflows."""
    x = x.detach().requires_grad_()
    out = function(x)
    factors = torch.arange(1, out.numel() + 1, device=x.device, dtype=torch.float64).reshape(out.shape)
    (result,) = torch.autograd.grad(out, x, factors.to(out.dtype))
    return result


class Scaled(nn.Module):
    """A layer behind whose output the gradient is scaled by a buffer."""

    def __init__(self, scale: float = 3.0) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("scale", torch.tensor(scale))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.halfstep.scale_gradient(self.layer(x), self.scale)


class Narrow(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.halfstep.cast(x * 2, torch.float16) * 3


# ------------------------------------------------------------------------------------------------------ scale_gradient


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [4.0, 0.3, 0.0, -2.0])
def test_forward_is_the_input_and_the_gradient_is_scaled(
    device: torch.device, dtype: torch.dtype, scale: float
) -> None:
    x = torch.tensor([[1.5, -0.0, torch.inf], [torch.nan, 2.0, 6e-8]], device=device).to(dtype)
    for factor in (scale, torch.tensor(scale), torch.tensor(scale, device=device), torch.tensor([[scale]])):
        out = ops.scale_gradient(x, factor)
        assert out.dtype == dtype
        assert out.data_ptr() == x.data_ptr()
        assert torch.equal(out.view(torch.uint8), x.view(torch.uint8))
        got = gradient(lambda t, factor=factor: ops.scale_gradient(t, factor), x)
        assert got.dtype == dtype
        exact = torch.arange(1, 7, device=device, dtype=torch.float64).reshape(2, 3) * torch.tensor(scale).double()
        expected = exact.float().to(dtype) if dtype in HALF else exact.to(dtype)
        torch.testing.assert_close(got, expected, rtol=0 if dtype in HALF else 1e-7, atol=0)


@pytest.mark.parametrize("dtype", HALF)
def test_the_scale_itself_is_not_rounded_to_half(device: torch.device, dtype: torch.dtype) -> None:
    """2^20 is infinite in float16, 1 + 2^-10 is 1 in bfloat16."""
    small = torch.full((3,), 2.0**-20, device=device, dtype=dtype)
    for factor in (2.0**20, torch.tensor(2.0**20, device=device), torch.tensor(2.0**20)):
        x = torch.zeros(3, device=device, dtype=dtype, requires_grad=True)
        ops.scale_gradient(x, factor).backward(small)
        assert torch.equal(x.grad, torch.ones_like(x))
    x = torch.zeros((), device=device, dtype=dtype, requires_grad=True)
    factor = torch.tensor(1 + 2.0**-10, device=device)
    ops.scale_gradient(x, factor).backward(torch.tensor(1 + 2.0**-7, device=device, dtype=dtype))
    assert x.grad.item() == torch.tensor((1 + 2.0**-7) * (1 + 2.0**-10)).to(dtype).item()


def test_a_scale_written_between_forward_and_backward_takes_effect(device: torch.device) -> None:
    for where in (device, torch.device("cpu")):
        scale = torch.tensor(2.0, device=where)
        x = torch.ones(3, device=device, requires_grad=True)
        out = ops.scale_gradient(x, scale)
        for value in (8.0, 16.0):
            scale.fill_(value)
            (got,) = torch.autograd.grad(out.sum(), x, retain_graph=True)
            assert torch.equal(got, torch.full_like(x, value))


def test_no_gradient_flows_to_the_scale() -> None:
    scale = torch.tensor(2.0, requires_grad=True)
    x = torch.ones(3, requires_grad=True)
    (ops.scale_gradient(x, scale).sum() + scale).backward()
    assert scale.grad.item() == 1.0
    assert not ops.scale_gradient(x.detach(), scale).requires_grad


def test_derivatives_of_second_order(device: torch.device) -> None:
    """s(x)^3 has the derivatives 3 x^2 s and, t being the scale in the second pass, 6 x t t."""
    x = torch.randn(5, device=device, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(2.0, device=device)
    (first,) = torch.autograd.grad((ops.scale_gradient(x, scale) ** 3).sum(), x, create_graph=True)
    torch.testing.assert_close(first, 3 * x**2 * 2)
    scale.fill_(5.0)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, 6 * x * 5 * 5)


def test_gradcheck() -> None:
    """A scale of 1 is the identity for gradcheck; the gradient of any is a function that gradgradcheck can check."""
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    for scale in (1.0, torch.tensor(1.0)):
        torch.autograd.gradcheck(lambda t, scale=scale: ops.scale_gradient(t, scale) ** 3, (x,))
        torch.autograd.gradgradcheck(lambda t, scale=scale: ops.scale_gradient(t, scale) ** 3, (x,))
    for scale in (-3.0, torch.tensor(0.7)):
        torch.autograd.gradgradcheck(lambda t, scale=scale: ops.scale_gradient(t**3, scale), (x,))
    torch.autograd.gradgradcheck(lambda t: ops.cast(t**3, torch.float64), (x,))


def test_under_autocast_no_grad_and_inference_mode(device: torch.device) -> None:
    layer = nn.Linear(4, 4).to(device)
    x = torch.randn(2, 4, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = ops.scale_gradient(layer(x), 2.0)
        assert out.dtype is torch.bfloat16
        wide = ops.cast(out, torch.float32)
        assert wide.dtype is torch.float32
        wide.sum().backward()  # within the region
    torch.testing.assert_close(layer.bias.grad, torch.full_like(layer.bias, 4.0))
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert torch.equal(ops.scale_gradient(x, 2.0), x)
            assert torch.equal(ops.scale_gradient(x, torch.tensor(2.0)), x)
            assert torch.equal(ops.cast(x, torch.float16), x.half())


@pytest.mark.parametrize("write_output", [True, False])
def test_writing_to_the_shared_memory_is_an_error(write_output: bool) -> None:
    x = torch.ones(3, requires_grad=True) * 1
    out = ops.scale_gradient(x, 2.0)
    with pytest.raises(RuntimeError, match="created inside a custom Function"):
        (out if write_output else x).mul_(2)
        out.sum().backward()


def test_scripted_saved_and_loaded(device: torch.device) -> None:
    eager = Scaled().to(device)
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(eager), file)
    file.seek(0)
    loaded = torch.jit.load(file)
    x = torch.randn(2, 4, device=device)
    for scale in (3.0, 7.0, 7.0):  # also what TorchScript makes of it after its profiling runs
        for model in (eager, loaded):
            model.zero_grad()
            model.scale.fill_(scale)
            model(x).sum().backward()
        for got, expected in zip(loaded.parameters(), eager.parameters(), strict=True):
            assert torch.equal(got.grad, expected.grad)

    @torch.jit.script
    def by_a_number(x: torch.Tensor) -> torch.Tensor:
        return torch.ops.halfstep.scale_gradient(x, 5.0)

    assert torch.equal(gradient(by_a_number, x), gradient(lambda t: t * 5, x))
    scripted = torch.jit.script(Narrow())
    for _ in range(3):
        got = gradient(scripted, x)
        assert got.dtype is torch.float32
        assert torch.equal(got, gradient(Narrow(), x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_a_graph_break(device: torch.device, backend: str) -> None:
    torch._dynamo.reset()
    eager = Scaled().to(device)
    compiled = torch.compile(eager, fullgraph=True, backend=backend)
    x = torch.randn(2, 4, device=device)
    gradients = []
    for model, scale in ((eager, 3.0), (compiled, 3.0), (eager, 7.0), (compiled, 7.0)):
        eager.zero_grad()
        eager.scale.fill_(scale)  # before forward: the compiled graph takes it as an input
        model(x).sum().backward()
        gradients.append(eager.layer.weight.grad.clone())
    for got, expected in zip(gradients[1::2], gradients[::2], strict=True):
        torch.testing.assert_close(got, expected)
    for function in (lambda t: ops.scale_gradient(t.sin(), 0.5), Narrow()):
        run = torch.compile(function, fullgraph=True, backend=backend)
        torch.testing.assert_close(gradient(run, x), gradient(function, x))
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x), eager(x))


def test_compiled_a_scale_written_after_forward_is_an_error() -> None:
    torch._dynamo.reset()
    model = Scaled()
    out = torch.compile(model, fullgraph=True, backend="aot_eager")(torch.ones(2, 4)).sum()
    model.scale.fill_(5.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_compiled_autograd_reads_the_scale_when_it_runs() -> None:
    torch._dynamo.reset()
    model = Scaled()
    x = torch.randn(2, 4)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        for scale in (5.0, 9.0):
            model.zero_grad()
            out = model(x).sum()
            model.scale.fill_(scale)
            out.backward()
            torch.testing.assert_close(model.layer.weight.grad, (x.sum(0) * scale).expand(4, 4))


def test_exported_programs_keep_the_op_and_train(device: torch.device) -> None:
    eager = Scaled().to(device)
    x = torch.randn(2, 4, device=device)
    program = torch.export.export(eager, (x,))
    assert ops.scale_gradient.default in [node.target for node in program.graph.nodes]
    module = program.module()
    for model in (eager, module):
        model(x).sum().backward()
    expected = dict(eager.named_parameters())
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter.grad, expected[name].grad)
    assert torch.equal(program.run_decompositions({}).module()(x), eager(x))
    narrow = torch.export.export(Narrow(), (x,))
    assert torch.equal(narrow.module()(x), Narrow()(x))


def test_function_transforms() -> None:
    """C++ autograd functions know none; an error, never a gradient that is not scaled."""
    x = torch.randn(2, 3)
    for transform in (
        lambda: torch.func.grad(lambda t: ops.scale_gradient(t, 2.0).sum())(x),
        lambda: torch.func.jvp(lambda t: ops.scale_gradient(t, 2.0), (x,), (x,)),
        lambda: torch.func.vmap(lambda t: ops.scale_gradient(t, 2.0))(x),
    ):
        with pytest.raises(RuntimeError, match=r"C\+\+ torch::autograd::Function|Batching rule not implemented"):
            transform()
    cast = torch.func.grad(lambda t: ops.cast(t * 3, torch.float16).sum())(x)
    assert torch.equal(cast, torch.full_like(x, 3.0))
    assert torch.equal(torch.func.vmap(lambda t: ops.cast(t, torch.float16))(x), x.half())


@pytest.mark.cuda
def test_backward_waits_for_nothing_and_can_be_captured() -> None:
    x = torch.ones(4, device="cuda", dtype=torch.float16, requires_grad=True)
    x.grad = torch.zeros_like(x)
    scale = torch.tensor(2.0, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        ops.scale_gradient(x, scale).backward(torch.ones_like(x))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.scale_gradient(x, scale).backward(torch.ones_like(x))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph, ones = torch.cuda.CUDAGraph(), torch.ones_like(x)
    with torch.cuda.graph(graph, stream=stream):
        ops.scale_gradient(x, scale).backward(ones)
    for value in (8.0, 16.0):
        scale.fill_(value)
        x.grad.zero_()
        graph.replay()
        assert torch.equal(x.grad, torch.full_like(x, value))


# ---------------------------------------------------------------------------------------------------------------- cast


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", DTYPES)
def test_cast_and_its_gradients(device: torch.device, source: torch.dtype, target: torch.dtype) -> None:
    x = torch.randn(3, 4, device=device).to(source).t().requires_grad_()
    out = ops.cast(x, target)
    assert out.dtype == target
    assert torch.equal(out, x.to(target))
    (got,) = torch.autograd.grad((out.double() ** 3).sum(), x, create_graph=True)
    assert got.dtype == source
    torch.testing.assert_close(got, (3 * out.double() ** 2).to(target).to(source))
    (second,) = torch.autograd.grad(got.double().sum(), x)
    assert second.dtype == source
    torch.testing.assert_close(second.double(), 6 * x.double(), rtol=2e-2, atol=1e-6)


BAD_ARGUMENTS = {
    "integers": (lambda x: ops.scale_gradient(x.long(), 2.0), TypeError, "scale_gradient: x has dtype Long, expected"),
    "complex": (lambda x: ops.scale_gradient(x + 0j, 2.0), TypeError, "x has dtype ComplexFloat, expected Half"),
    "half scale": (
        lambda x: ops.scale_gradient(x, torch.tensor(2.0).half()),
        TypeError,
        "scale_gradient: scale has dtype Half, expected Float",
    ),
    "two scales": (
        lambda x: ops.scale_gradient(x, torch.ones(2)),
        ValueError,
        "scale_gradient: scale has 2 elements, expected 1",
    ),
    "scale elsewhere": (
        lambda x: ops.scale_gradient(x, torch.ones((), device="meta")),
        RuntimeError,
        "scale_gradient: scale is on meta, expected cpu, the device of x, or cpu",
    ),
    "infinite": (lambda x: ops.scale_gradient(x, torch.inf), ValueError, "scale is inf, expected a finite number"),
    "cast of integers": (lambda x: ops.cast(x.int(), torch.float16), TypeError, "cast: x has dtype Int, expected Half"),
    "cast to integers": (
        lambda x: ops.cast(x, torch.int32),
        TypeError,
        "cast: dtype is Int, expected Half, BFloat16, Float or Double",
    ),
    "cast to float8": (lambda x: ops.cast(x, torch.float8_e4m3fn), TypeError, "cast: dtype is Float8_e4m3fn, expected"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments_are_named(case: str) -> None:
    call, error, message = BAD_ARGUMENTS[case]
    with pytest.raises(error, match=message):
        call(torch.ones(3))
