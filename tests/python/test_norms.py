"""layer_norm, rms_norm and group_norm as torch ops, against torch in float64 and against autocast's path."""

from __future__ import annotations

import halfstep
import pytest
import torch
import torch.nn.functional as F

halfstep.load_library()
ops = torch.ops.halfstep

HALF = [torch.float16, torch.bfloat16]
DTYPES = [torch.float32, *HALF]
KINDS = ["layer", "rms", "group"]
SHAPES = {
    "layer": [(64, 768), (3, 5, 100), (7, 33), (4, 5000)],
    "rms": [(64, 768), (3, 5, 100), (7, 33), (4, 5000)],
    "group": [(2, 12, 7, 7), (3, 6, 16, 8), (2, 12), (2, 6, 5000)],
}
GROUPS = 3


def ours(kind: str, x: torch.Tensor, weight, bias, **options) -> torch.Tensor:
    if kind == "layer":
        return ops.layer_norm(x, x.shape[-1:], weight, bias, **options)
    if kind == "rms":
        return ops.rms_norm(x, x.shape[-1:], weight, 1e-5, **options)
    return ops.group_norm(x, GROUPS, weight, bias, **options)


def torchs(kind: str, x: torch.Tensor, weight, bias) -> torch.Tensor:
    if kind == "layer":
        return F.layer_norm(x, x.shape[-1:], weight, bias)
    if kind == "rms":
        return F.rms_norm(x, x.shape[-1:], weight, 1e-5)
    return F.group_norm(x, GROUPS, weight, bias)


def parameters(kind: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> list:
    size = shape[1] if kind == "group" else shape[-1]
    weight = torch.randn(size, device=device).to(dtype).requires_grad_()
    bias = None if kind == "rms" else torch.randn(size, device=device).to(dtype).requires_grad_()
    return [weight, bias]


def gradients(out: torch.Tensor, grad: torch.Tensor, inputs: list) -> list[torch.Tensor]:
    inputs = [value for value in inputs if value is not None]
    return list(torch.autograd.grad(out, inputs, grad.to(out.dtype)))


def doubles(values: list) -> list:
    return [None if value is None else value.detach().double().requires_grad_() for value in values]


def results(kind: str, offset: float, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], device: torch.device):
    """Return (ours, autocast's path, float64), each a list: the output and the gradients."""
    dtype, parameter_dtype, out_dtype = dtypes
    x = (torch.randn(shape, device=device) + offset).to(dtype).requires_grad_()
    inputs = [x, *parameters(kind, shape, parameter_dtype, device)]
    grad = torch.randn(shape, device=device).to(out_dtype)
    out = ours(kind, *inputs, out_dtype=out_dtype)
    # What autocast does: float32 copies, the op in float32, and the result cast for the product that follows.
    peer = torchs(kind, *(None if value is None else value.float() for value in inputs)).to(out_dtype)
    wide = doubles(inputs)
    exact = torchs(kind, *wide)
    return (
        [out, *gradients(out, grad, inputs)],
        [peer, *gradients(peer, grad, inputs)],
        [exact, *gradients(exact, grad, wide)],
    )


@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("kind", KINDS)
def test_never_further_from_float64_than_autocasts_path(device: torch.device, kind: str, offset: float) -> None:
    for shape in SHAPES[kind]:
        for dtypes in [(a, b, c) for a in DTYPES for b in {torch.float32, a} for c in {torch.float32, a}]:
            for name, got, peer, exact in zip(
                ("out", "grad_input", "grad_weight", "grad_bias"),
                *results(kind, offset, shape, dtypes, device),
                strict=False,
            ):
                assert got.dtype == peer.dtype
                assert got.shape == peer.shape
                error, peer_error = ((value.double() - exact).abs() for value in (got, peer))
                # float32 sums in another order may differ in their last places: 1e-6 of the largest value, which the
                # saved mean of offset data, itself a float32, multiplies.
                slack = (1e-6 + (1e-7 * offset)) * exact.abs().max().item()
                where = f"{name}, {shape}, {dtypes}"
                assert error.max().item() <= 1.05 * peer_error.max().item() + slack, where
                assert error.mean().item() <= 1.05 * peer_error.mean().item() + slack, where


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", HALF)
def test_half_in_half_out_is_float64_rounded_once(device: torch.device, kind: str, dtype: torch.dtype) -> None:
    for shape in SHAPES[kind]:
        got, _, exact = results(kind, 0.0, shape, (dtype, torch.float32, dtype), device)
        for value, expected in zip(got, exact, strict=True):
            half_ulp = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 0.0}[value.dtype]
            torch.testing.assert_close(value.double(), expected, rtol=half_ulp + 1e-6, atol=3e-5)


def test_any_strides(device: torch.device) -> None:
    x = torch.randn(6, 40, 16, device=device).half()
    for view in (x.transpose(0, 1), x[:, ::2], x[:, 1:], x[:1].expand(4, 40, 16), x.flatten()[3:643].view(40, 16)):
        expected = F.layer_norm(view.double(), view.shape[-1:])
        torch.testing.assert_close(ops.layer_norm(view, view.shape[-1:]).double(), expected, rtol=1e-3, atol=1e-5)
    image = torch.randn(2, 6, 8, 8, device=device).half().to(memory_format=torch.channels_last)
    torch.testing.assert_close(ops.group_norm(image, 3).double(), F.group_norm(image.double(), 3), rtol=1e-3, atol=1e-5)


def test_several_normalized_dimensions(device: torch.device) -> None:
    x = torch.randn(3, 4, 5, device=device).bfloat16().requires_grad_()
    weight = torch.randn(4, 5, device=device, requires_grad=True)
    out = ops.layer_norm(x, [4, 5], weight, weight)
    out.sum().backward()
    assert weight.grad.shape == (4, 5)
    torch.testing.assert_close(
        out.double(), F.layer_norm(x.double(), [4, 5], weight.double(), weight.double()), rtol=4e-3, atol=1e-5
    )


def test_empty_inputs(device: torch.device) -> None:
    for shape in ((0, 8), (3, 0)):
        x = torch.empty(shape, device=device, dtype=torch.float16, requires_grad=True)
        weight = torch.ones(shape[-1], device=device, requires_grad=True)
        out = ops.layer_norm(x, shape[-1:], weight, weight)
        assert out.shape == shape
        out.sum().backward()
        assert weight.grad.tolist() == [0.0] * shape[-1]
    assert ops.group_norm(torch.empty(0, 6, 4, device=device), 2).shape == (0, 6, 4)


def test_only_what_is_asked_for_is_computed(device: torch.device) -> None:
    x = torch.randn(4, 8, device=device).half()
    weight, bias = torch.ones(8, device=device), torch.zeros(8, device=device, requires_grad=True)
    ops.layer_norm(x, [8], weight, bias).sum().backward()
    assert bias.grad.tolist() == [4.0] * 8
    ops.layer_norm(x, [8], None, bias).sum().backward()
    assert bias.grad.tolist() == [8.0] * 8
    assert not ops.layer_norm(x, [8], weight).requires_grad


def test_the_default_eps_of_rms_norm_is_float32s(device: torch.device) -> None:
    x = torch.full((2, 8), 1e-4, device=device).half()
    expected = F.rms_norm(x.double(), [8], eps=torch.finfo(torch.float32).eps)
    torch.testing.assert_close(ops.rms_norm(x, [8]).double(), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_in_every_run(device: torch.device, kind: str) -> None:
    shape = (256, 12, 10, 10) if kind == "group" else (3000, 768)
    x = torch.randn(shape, device=device).bfloat16().requires_grad_()
    inputs = [x, *parameters(kind, shape, torch.float32, device)]
    grad = torch.randn(shape, device=device)

    def run() -> list[torch.Tensor]:
        out = ours(kind, *inputs)
        return [out, *gradients(out, grad, inputs)]

    first = run()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        again = run()
    finally:
        torch.set_num_threads(threads)
    for got, expected in zip(again, first, strict=True):
        assert torch.equal(got, expected)


def test_a_second_derivative_is_refused(device: torch.device) -> None:
    x = torch.randn(4, 8, device=device).half().requires_grad_()
    (gradient,) = torch.autograd.grad(ops.layer_norm(x, [8]).float().square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="halfstep::layer_norm is differentiable once"):
        gradient.float().sum().backward()


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_casts_nothing(device: torch.device, kind: str) -> None:
    shape = SHAPES[kind][0]
    x = torch.randn(shape, device=device).half().requires_grad_()
    inputs = [x, *parameters(kind, shape, torch.float32, device)]
    with torch.autocast(device.type, dtype=torch.float16):
        out = ours(kind, *inputs)
    assert out.dtype is torch.float16
    assert torch.equal(out, ours(kind, *inputs))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_without_a_graph_break(device: torch.device, kind: str, backend: str) -> None:
    torch._dynamo.reset()
    shape = SHAPES[kind][0]
    inputs = [
        torch.randn(shape, device=device).half().requires_grad_(),
        *parameters(kind, shape, torch.float32, device),
    ]
    grad = torch.randn(shape, device=device)
    compiled = torch.compile(lambda *values: ours(kind, *values), fullgraph=True, backend=backend)
    got, expected = (run(*inputs) for run in (compiled, lambda *values: ours(kind, *values)))
    for value, other in zip(
        [got, *gradients(got, grad, inputs)], [expected, *gradients(expected, grad, inputs)], strict=True
    ):
        torch.testing.assert_close(value, other, rtol=2e-3, atol=1e-3)


def test_traced_programs_hold_aten_ops_alone() -> None:
    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return ops.group_norm(ops.rms_norm(ops.layer_norm(x, [8]), [8]), 2)

    x = torch.randn(3, 4, 8).half()
    program = torch.export.export(Model(), (x,)).run_decompositions()
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert called
    assert not [name for name in called if "halfstep" in name]
    torch.testing.assert_close(program.module()(x), Model()(x), rtol=2e-3, atol=1e-3)


def test_function_transforms(device: torch.device) -> None:
    x, tangent = (torch.randn(4, 8, device=device).half() for _ in range(2))

    def loss(x: torch.Tensor) -> torch.Tensor:
        return ops.layer_norm(x, [8]).float().square().mul(torch.arange(8, device=device)).sum()

    leaf = x.clone().requires_grad_()
    loss(leaf).backward()
    torch.testing.assert_close(torch.func.grad(loss)(x), leaf.grad, rtol=2e-3, atol=1e-3)
    torch.testing.assert_close(torch.func.vmap(lambda row: ops.layer_norm(row, [8]))(x), ops.layer_norm(x, [8]))
    _, product = torch.func.jvp(loss, (x,), (tangent,))
    torch.testing.assert_close(product, (leaf.grad.float() * tangent.float()).sum(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("center", [True, False])
def test_opcheck(device: torch.device, center: bool) -> None:
    x = torch.randn(6, 2, 5, device=device).half()
    weight = torch.randn(6, device=device)
    shape = (6, 2, 5, 3)
    arguments = (x, weight, weight, *shape, center, 1e-5, torch.float32)
    torch.library.opcheck(ops.norm_forward.default, arguments)
    out, mean, rstd = ops.norm_forward(*arguments)
    for mask in ([True, True, True], [False, True, False]):
        torch.library.opcheck(ops.norm_backward.default, (out, x, weight, mean, rstd, *shape, center, mask))


BAD_ARGUMENTS = {
    "integer input": (lambda x: ops.layer_norm(x.long(), [8]), TypeError, "layer_norm: input has dtype Long"),
    "double input": (lambda x: ops.rms_norm(x.double(), [8]), TypeError, "rms_norm: input has dtype Double"),
    "sparse input": (lambda x: ops.layer_norm(x.to_sparse(), [8]), ValueError, "layer_norm: input has layout Sparse"),
    "wrong shape": (
        lambda x: ops.layer_norm(x, [7]),
        ValueError,
        r"input has shape \[4, 8\], .* normalized_shape \[7\]",
    ),
    "no shape": (lambda x: ops.rms_norm(x, []), ValueError, "rms_norm: input has shape"),
    "short weight": (
        lambda x: ops.layer_norm(x, [8], torch.ones(7)),
        ValueError,
        r"layer_norm: weight has shape \[7\], expected \[8\]",
    ),
    "double bias": (
        lambda x: ops.layer_norm(x, [8], None, torch.ones(8).double()),
        TypeError,
        "layer_norm: bias has dtype Double, expected Float, Half or BFloat16",
    ),
    "weight elsewhere": (
        lambda x: ops.layer_norm(x, [8], torch.ones(8, device="meta")),
        RuntimeError,
        "weight is on meta, expected cpu",
    ),
    "integer output": (lambda x: ops.layer_norm(x, [8], out_dtype=torch.int32), TypeError, "out_dtype is Int"),
    "groups": (lambda x: ops.group_norm(x, 3), ValueError, "group_norm: num_groups is 3, expected a divisor of the 8"),
    "no groups": (lambda x: ops.group_norm(x, 0), ValueError, "group_norm: num_groups is 0"),
    "one dimension": (lambda x: ops.group_norm(x[0], 2), ValueError, r"group_norm: input has shape \[8\]"),
    "low level": (
        lambda x: ops.norm_forward(x, None, None, 4, 7, 1, 1, True, 1e-5, torch.half),
        ValueError,
        "norm_forward: input has 32 elements, expected 4 rows of 7 channels",
    ),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments_are_named(case: str) -> None:
    call, error, message = BAD_ARGUMENTS[case]
    with pytest.raises(error, match=message):
        call(torch.randn(4, 8))


@pytest.mark.cuda
def test_no_host_synchronisation() -> None:
    x = torch.randn(64, 768, device="cuda").half().requires_grad_()
    weight = torch.ones(768, device="cuda", requires_grad=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.layer_norm(x, [768], weight, weight).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
