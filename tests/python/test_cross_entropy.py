"""cross_entropy as a torch op and under autocast, against torch in float64 and against autocast's path."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import halfstep
import pytest
import torch
import torch.nn.functional as F

halfstep.load_library()
ops = torch.ops.halfstep

HALF = [torch.float16, torch.bfloat16]
DTYPES = [torch.float32, *HALF]
REDUCTIONS = ["none", "mean", "sum"]  # torch codes them 0, 1 and 2
IGNORED = -100


def ours(logits, target, weight=None, reduction="mean", **options) -> torch.Tensor:
    return ops.cross_entropy(logits, target, weight, REDUCTIONS.index(reduction), **options)


def problem(rows: int, classes: int, dtype: torch.dtype, device: torch.device):
    """Return logits as a model has them in the middle of training, and targets, some of them ignored."""
    logits = (torch.randn(rows, classes, device=device) * 3).to(dtype)
    target = torch.randint(classes, (rows,), device=device)
    target[1::5] = IGNORED
    return logits.requires_grad_(), target


def loss_and_gradient(function, logits: torch.Tensor, *arguments, **options) -> list[torch.Tensor]:
    loss = function(logits, *arguments, **options)
    factors = torch.arange(1, loss.numel() + 1, device=loss.device, dtype=loss.dtype).reshape(loss.shape)
    return [loss, torch.autograd.grad(loss, logits, factors)[0]]


def cast_first(logits: torch.Tensor, *arguments, **options) -> torch.Tensor:
    """What autocast does: a float32 copy of the logits."""
    return F.cross_entropy(logits.float(), *arguments, **options)


SETTINGS = list(itertools.product(REDUCTIONS, [False, True], [0.0, 0.1, 1.0], [IGNORED, 0]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7, 1), (40, 10), (33, 1027), (5, 50257)])
def test_never_further_from_float64_than_autocasts_path(
    device: torch.device, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    logits, target = problem(*shape, dtype, device)
    weights = torch.rand(shape[1], device=device)
    for reduction, weighted, smoothing, ignore_index in SETTINGS:
        labels = target.clamp(min=0) if ignore_index == 0 else target
        options = {"reduction": reduction, "label_smoothing": smoothing, "ignore_index": ignore_index}
        weight = weights if weighted else None
        wide = logits.detach().double().requires_grad_()
        exact = loss_and_gradient(F.cross_entropy, wide, labels, weight.double() if weighted else None, **options)
        got = loss_and_gradient(ours, logits, labels, weight, **options)
        peer = loss_and_gradient(cast_first, logits, labels, weight, **options)
        for name, value, other, expected in zip(("loss", "gradient"), got, peer, exact, strict=True):
            where = f"{name}, {options}, weighted {weighted}"
            assert value.dtype == other.dtype, where
            assert value.shape == other.shape, where
            if not expected.isfinite().all():
                torch.testing.assert_close(value, other, equal_nan=True, rtol=1e-5, atol=1e-6)
                continue
            error, other_error = ((result.double() - expected).abs() for result in (value, other))
            slack = 1e-6 * max(expected.abs().max().item(), 0.01)  # float32 sums in another order
            assert error.max().item() <= 1.05 * other_error.max().item() + slack, where
            assert error.mean().item() <= 1.05 * other_error.mean().item() + slack, where


@pytest.mark.parametrize("dtype", HALF)
def test_masked_classes(device: torch.device, dtype: torch.dtype) -> None:
    logits, target = problem(8, 300, dtype, device)
    with torch.no_grad():
        logits[:, 100:] = -torch.inf
        logits[2] = -torch.inf  # nothing is left
        logits[3, 5] = torch.inf
        logits[4, 5] = torch.nan
    target = target % 100
    target[0] = 200  # masked: the loss is infinite
    got = loss_and_gradient(ours, logits, target, reduction="none")
    expected = loss_and_gradient(cast_first, logits, target, reduction="none")
    for value, other in zip(got, expected, strict=True):
        torch.testing.assert_close(value, other, equal_nan=True, rtol=1e-2, atol=1e-5)


def test_without_rows_and_with_all_rows_ignored(device: torch.device) -> None:
    for rows in (0, 3):
        logits = torch.randn(rows, 5, device=device).half().requires_grad_()
        target = torch.full((rows,), IGNORED, device=device)
        for reduction in REDUCTIONS:
            for got, expected in zip(
                loss_and_gradient(ours, logits, target, reduction=reduction),
                loss_and_gradient(cast_first, logits, target, reduction=reduction),
                strict=True,
            ):
                torch.testing.assert_close(got, expected, equal_nan=True)


def test_shapes_and_strides(device: torch.device) -> None:
    logits = torch.randn(6, 40, device=device).half()
    target = torch.randint(20, (6,), device=device)
    for view in (logits[:, :20], logits[:, 1::2], logits[:, 3:23], torch.randn(30, 6, device=device).half().t()):
        for got, expected in zip(
            loss_and_gradient(ours, view.detach().requires_grad_(), target),
            loss_and_gradient(cast_first, view.detach().requires_grad_(), target),
            strict=True,
        ):
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-6)
    for reduction in REDUCTIONS:  # one sample
        got = ours(logits[0], target[0], reduction=reduction)
        torch.testing.assert_close(got, cast_first(logits[0], target[0], reduction=reduction), rtol=1e-5, atol=1e-6)


def test_what_goes_to_aten(device: torch.device) -> None:
    logits = torch.randn(3, 7, 4, 5, device=device).half().requires_grad_()
    pixels = torch.randint(7, (3, 4, 5), device=device)
    probabilities = torch.rand(3, 7, 4, 5, device=device).half()
    for target in (pixels, probabilities):
        got = loss_and_gradient(ours, logits, target, label_smoothing=0.1)
        target = target.float() if target.is_floating_point() else target
        expected = loss_and_gradient(cast_first, logits, target, label_smoothing=0.1)
        for value, other in zip(got, expected, strict=True):
            torch.testing.assert_close(value, other)


def test_a_target_out_of_bounds() -> None:
    for target in (torch.tensor([1, 7]), torch.tensor([-1, 2])):
        with pytest.raises(IndexError, match=r"Target (7|-1) is out of bounds\. .*expected 0 to 6"):
            ours(torch.randn(2, 7).half(), target)


def test_the_same_bits_in_every_run(device: torch.device) -> None:
    logits, target = problem(300, 5003, torch.bfloat16, device)
    first = loss_and_gradient(ours, logits, target, label_smoothing=0.1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        again = loss_and_gradient(ours, logits, target, label_smoothing=0.1)
    finally:
        torch.set_num_threads(threads)
    for got, expected in zip(again, first, strict=True):
        assert torch.equal(got, expected)


def test_a_second_derivative_is_refused(device: torch.device) -> None:
    logits, target = problem(4, 8, torch.float16, device)
    (gradient,) = torch.autograd.grad(ours(logits, target), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="halfstep::cross_entropy is differentiable once"):
        gradient.float().sum().backward()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_without_a_graph_break(device: torch.device, backend: str) -> None:
    torch._dynamo.reset()
    logits, target = problem(16, 100, torch.bfloat16, device)
    compiled = torch.compile(ours, fullgraph=True, backend=backend)
    for got, expected in zip(
        loss_and_gradient(compiled, logits, target), loss_and_gradient(ours, logits, target), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-5)


def test_function_transforms(device: torch.device) -> None:
    logits, target = problem(4, 8, torch.float16, device)
    expected = loss_and_gradient(ours, logits, target)[1]
    torch.testing.assert_close(torch.func.grad(ours)(logits.detach(), target), expected, rtol=2e-3, atol=1e-4)


def test_opcheck(device: torch.device) -> None:
    logits, target = problem(6, 9, torch.float16, device)
    logits, weight = logits.detach(), torch.rand(9, device=device)
    for reduction in range(3):
        settings = (reduction, IGNORED, 0.1)
        torch.library.opcheck(ops.cross_entropy_forward.default, (logits, target, weight, *settings))
        loss, lse, totals = ops.cross_entropy_forward(logits, target, weight, *settings)
        arguments = (torch.ones_like(loss), logits, target, weight, lse, totals, *settings)
        torch.library.opcheck(ops.cross_entropy_backward.default, arguments)


@contextmanager
def half_reductions(enabled: bool = True) -> Iterator[None]:
    previous = ops.set_half_reductions(enabled)
    try:
        yield
    finally:
        assert ops.set_half_reductions(previous) == enabled


@contextmanager
def cuda_autocast(dtype: torch.dtype = torch.bfloat16) -> Iterator[None]:
    """CUDA autocast as the dispatcher sees it, for tensors of any device."""
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)
    with torch._C._ForceDispatchKeyGuard(
        torch._C._dispatch_tls_local_include_set() | key,
        torch._C._dispatch_tls_local_exclude_set() - key,
    ):
        yield


def test_the_switch_returns_what_was() -> None:
    assert ops.set_half_reductions(True) is False
    assert ops.set_half_reductions(False) is True
    assert ops.set_half_reductions(False) is False


def test_torchs_function_under_autocast(device: torch.device) -> None:
    logits, target = problem(40, 1001, torch.bfloat16, device)
    with cuda_autocast():
        as_before = loss_and_gradient(F.cross_entropy, logits, target)
        with half_reductions():
            got = loss_and_gradient(F.cross_entropy, logits, target)
            again = loss_and_gradient(F.cross_entropy, logits.detach().float().requires_grad_(), target)
    for value, expected in zip(got, loss_and_gradient(ours, logits, target), strict=True):
        assert torch.equal(value, expected)
    assert "CrossEntropyFunction" in got[0].grad_fn.name()
    assert "CrossEntropyFunction" not in as_before[0].grad_fn.name()
    assert "CrossEntropyFunction" not in again[0].grad_fn.name(), "float32 logits stay torch's"


def test_under_saved_tensor_hooks_it_stays_torchs(device: torch.device) -> None:
    """Checkpointing computes it again in backward(), where the thread's switch is off."""
    logits, target = problem(40, 1001, torch.bfloat16, device)
    with cuda_autocast(), half_reductions(), torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        loss, gradient = loss_and_gradient(F.cross_entropy, logits, target)
    assert "CrossEntropyFunction" not in loss.grad_fn.name()
    for value, expected in zip((loss, gradient), loss_and_gradient(ours, logits, target), strict=True):
        torch.testing.assert_close(value, expected, rtol=2e-2, atol=1e-4, check_dtype=False)


@pytest.mark.cuda
def test_autocast_on_a_gpu() -> None:
    logits, target = problem(40, 1001, torch.float16, torch.device("cuda"))
    with torch.autocast("cuda", dtype=torch.float16):
        as_before = loss_and_gradient(F.cross_entropy, logits, target)
        with half_reductions():
            got = loss_and_gradient(F.cross_entropy, logits, target)
            image = F.cross_entropy(
                logits.view(40, 7, 11, 13), torch.zeros(40, 11, 13, dtype=torch.int64, device="cuda")
            )
            compiled = loss_and_gradient(torch.compile(F.cross_entropy, fullgraph=True), logits, target)
    assert "CrossEntropyFunction" in got[0].grad_fn.name()
    assert image.dtype is torch.float32
    for value, expected, fused in zip(got, as_before, compiled, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(fused, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.cuda
def test_no_float32_copy_of_the_logits() -> None:
    logits, target = problem(1024, 50257, torch.bfloat16, torch.device("cuda"))
    copy = logits.numel() * logits.element_size()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ours(logits, target).backward()
    assert torch.cuda.max_memory_allocated() - before < 1.1 * copy, "the gradient, and nothing of its size"


@pytest.mark.cuda
def test_no_host_synchronisation() -> None:
    logits, target = problem(64, 1000, torch.float16, torch.device("cuda"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours(logits, target).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


BAD_ARGUMENTS = {
    "integer input": ({"input": torch.ones(2, 3).long()}, TypeError, "input has dtype Long, expected Float, Half"),
    "too few targets": ({"target": torch.zeros(1, dtype=torch.int64)}, ValueError, r"target has shape \[1\], expected"),
    "short weight": ({"weight": torch.ones(2)}, ValueError, r"weight has shape \[2\], expected \[3\]"),
    "reduction": ({"reduction": 3}, ValueError, r"reduction is 3, expected 0 \(none\), 1 \(mean\) or 2 \(sum\)"),
    "smoothing": ({"label_smoothing": 1.5}, ValueError, "label_smoothing is 1.5, expected 0 to 1"),
    "target elsewhere": (
        {"target": torch.zeros(2, dtype=torch.int64, device="meta")},
        RuntimeError,
        "target is on meta, expected cpu",
    ),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments_are_named(case: str) -> None:
    changes, error, message = BAD_ARGUMENTS[case]
    arguments = {"input": torch.ones(2, 3).half(), "target": torch.zeros(2, dtype=torch.int64), **changes}
    with pytest.raises(error, match=f"cross_entropy: {message}"):
        ops.cross_entropy(**arguments)
