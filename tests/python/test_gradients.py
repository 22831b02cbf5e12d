"""check_gradients_ and unscale_ as torch ops, against float64 arithmetic and torch's own op."""

from __future__ import annotations

import math

import halfstep
import pytest
import torch

halfstep.load_library()
ops = torch.ops.halfstep

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
COLUMNS = ["non_finite", "max", "sum_of_squares", "zeros", "below_half", "elements"]


def scalar(value: float, device: torch.device) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float32, device=device)


def reference(grads: list[torch.Tensor], scale: float) -> tuple[bool, float, torch.Tensor]:
    """The op's contract on float64 tensors."""
    inverse = torch.tensor(1.0 / scale, dtype=torch.float64).float()
    rows = []
    for grad in grads:
        compute = torch.float64 if grad.dtype is torch.float64 else torch.float32
        u = (grad.detach().cpu().to(compute) * inverse.to(compute)).double().flatten()
        finite = u[u.isfinite()]
        rows.append(
            [
                (~u.isfinite()).sum().item(),
                finite.abs().max().item() if finite.numel() else 0.0,
                u.square().sum().item(),
                (u == 0).sum().item(),
                ((u != 0) & (u.abs() < 2.0**-14)).sum().item(),
                u.numel(),
            ]
        )
    table = torch.tensor(rows, dtype=torch.float64).reshape(-1, 6)
    return bool(table[:, 0].sum() > 0), math.sqrt(table[:, 2].sum().item()), table


def mixed_grads(device: torch.device) -> list[torch.Tensor]:
    shapes = [(3, 5), (0,), (), (70_001,), (64, 3, 7, 7), (1,)]
    return [(torch.randn(shape, device=device) * 8).to(dtype) for dtype in DTYPES for shape in shapes]


def check(grads: list[torch.Tensor], scale: float, device: torch.device):
    found, norm = scalar(0.0, device), scalar(-1.0, device)
    stats = torch.full((len(grads), 6), -1.0, device=device)
    ops.check_gradients_(grads, scalar(scale, device), found, norm, stats)
    return found.item(), norm.item(), stats.cpu().double()


def test_check_agrees_with_the_reference(device: torch.device) -> None:
    grads = mixed_grads(device)
    before = [grad.clone() for grad in grads]
    for scale in (1.0, 65536.0, 3.0):
        found, norm, stats = check(grads, scale, device)
        expected_found, expected_norm, table = reference(grads, scale)
        assert found == expected_found
        assert norm == pytest.approx(expected_norm, rel=1e-6)
        for column in (0, 3, 4, 5):
            assert torch.equal(stats[:, column], table[:, column].float().double()), COLUMNS[column]
        torch.testing.assert_close(stats[:, 1], table[:, 1], rtol=1e-7, atol=0)
        torch.testing.assert_close(stats[:, 2], table[:, 2], rtol=1e-5, atol=0)
    for grad, original in zip(grads, before, strict=True):
        assert torch.equal(grad, original)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_bad_element_is_found(device: torch.device, dtype: torch.dtype, bad: float) -> None:
    for position in (0, 20_000, 39_999):
        grads = [torch.randn(40_000, device=device).to(dtype), torch.randn(7, device=device)]
        grads[0][position] = bad
        found, norm, stats = check(grads, 4.0, device)
        assert found == 1.0
        assert math.isnan(norm) == math.isnan(bad)
        assert stats[:, 0].tolist() == [1.0, 0.0]


def test_unscale_equals_torchs_op_bit_for_bit(device: torch.device) -> None:
    # torch's CUDA op knows no bfloat16, which is one reason for ours.
    dtypes = [torch.float32, torch.float64, torch.float16] + ([torch.bfloat16] if device.type == "cpu" else [])
    for dtype in dtypes:
        for scale in (65536.0, 3.0):
            grads = [(torch.randn(shape, device=device) * 50).to(dtype) for shape in ((1001,), (8, 8), ())]
            ours = [grad.clone() for grad in grads]
            found, torch_found = scalar(0.0, device), scalar(0.0, device)
            inverse = scalar(scale, device).double().reciprocal().float()
            torch._amp_foreach_non_finite_check_and_unscale_(grads, torch_found, inverse)
            ops.unscale_(ours, scalar(scale, device), found)
            also_ours = [grad.clone() for grad in ours]
            for got, expected in zip(ours, grads, strict=True):
                assert torch.equal(got, expected)
            ops.unscale_(also_ours, inverse, found, scale_is_inverse=True)
            assert found.item() == torch_found.item() == 0.0


def test_unscale_writes_bfloat16(device: torch.device) -> None:
    grad = torch.randn(1000, device=device).to(torch.bfloat16)
    expected = (grad.float() * (1 / 3.0)).to(torch.bfloat16)
    ops.unscale_([grad], scalar(3.0, device), scalar(0.0, device))
    torch.testing.assert_close(grad, expected, rtol=0.008, atol=0)


def test_any_strides_are_read_and_written(device: torch.device) -> None:
    base = torch.randn(6, 8, 10, device=device)
    views = {
        "transposed": base.transpose(0, 2),
        "channels_last": torch.randn(2, 3, 4, 5, device=device).to(memory_format=torch.channels_last),
        "strided": base[:, ::2, 1:],
        "offset": base.flatten()[1:],
        "expanded": torch.randn(1, 4, device=device).expand(3, 4),
    }
    for name, view in views.items():
        found, norm, stats = check([view], 2.0, device)
        expected_found, expected_norm, table = reference([view], 2.0)
        assert norm == pytest.approx(expected_norm, rel=1e-6), name
        assert stats[0, 5] == table[0, 5], name
        if name == "expanded":
            continue  # an overlapping tensor cannot be written: torch says so
        expected = view * 0.5
        ops.unscale_([view], scalar(2.0, device), scalar(0.0, device))
        assert torch.equal(view, expected), name


def test_writing_an_overlapping_gradient_is_refused(device: torch.device) -> None:
    grad = torch.ones(1, 4, device=device).expand(3, 4)
    first, found = torch.full((2,), math.inf, device=device), scalar(0.0, device)
    with pytest.raises(ValueError, match=r"unscale_: grads\[1\] is expanded"):
        ops.unscale_([first, grad], scalar(2.0, device), found)
    assert first.tolist() == [math.inf] * 2
    assert found.item() == 0.0


def test_empty_lists_and_empty_tensors(device: torch.device) -> None:
    assert check([], 2.0, device)[:2] == (0.0, 0.0)
    assert check([torch.empty(0, 3, device=device)], 2.0, device)[:2] == (0.0, 0.0)


def test_found_is_set_but_never_cleared(device: torch.device) -> None:
    found = scalar(1.0, device)
    ops.check_gradients_([torch.ones(3, device=device)], scalar(1.0, device), found, scalar(0.0, device))
    assert found.item() == 1.0


def test_an_overflow_made_by_unscaling_is_found(device: torch.device) -> None:
    found = scalar(0.0, device)
    ops.check_gradients_([torch.tensor([1e38], device=device)], scalar(0.125, device), found, scalar(0.0, device))
    assert found.item() == 1.0


def test_the_same_bits_in_every_run(device: torch.device) -> None:
    grads = mixed_grads(device)
    first = check(grads, 1024.0, device)
    for threads in (1, 2):
        previous = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            again = check(grads, 1024.0, device)
        finally:
            torch.set_num_threads(previous)
        assert again[:2] == first[:2]
        assert torch.equal(again[2], first[2])


def test_autograd_learns_of_the_write(device: torch.device) -> None:
    grad = torch.ones(3, device=device)
    version = grad._version
    ops.check_gradients_([grad], scalar(2.0, device), scalar(0.0, device), scalar(0.0, device))
    assert grad._version == version
    ops.unscale_([grad], scalar(2.0, device), scalar(0.0, device))
    assert grad._version > version


@pytest.mark.cuda
def test_work_goes_to_the_current_stream() -> None:
    device = torch.device("cuda")
    stream = torch.cuda.Stream()
    grad = torch.zeros(1 << 24, device=device)
    found, norm = scalar(0.0, device), scalar(0.0, device)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for _ in range(50):  # long enough that a check on another stream would come too early
            grad.add_(1.0)
        ops.check_gradients_([grad], scalar(1.0, device), found, norm)
    stream.synchronize()
    assert norm.item() == pytest.approx(50 * math.sqrt(grad.numel()), rel=1e-6)


@pytest.mark.cuda
def test_no_host_synchronisation() -> None:
    device = torch.device("cuda")
    grads = [torch.randn(1000, device=device) for _ in range(2000)]
    arguments = scalar(2.0, device), scalar(0.0, device), scalar(0.0, device)
    stats = torch.empty(2000, 6, device=device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.check_gradients_(grads, *arguments, stats)
        ops.unscale_(grads, *arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("op", ["check_gradients_", "unscale_"])
def test_opcheck(device: torch.device, op: str) -> None:
    grads = [torch.randn(10, device=device), torch.randn(4, device=device).half()]
    arguments = (grads, scalar(2.0, device), scalar(0.0, device), scalar(0.0, device), torch.zeros(2, 6, device=device))
    torch.library.opcheck(getattr(ops, op).default, arguments)


def test_compiles_without_a_graph_break(device: torch.device) -> None:
    def unscale(grad: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = torch.zeros((), device=grad.device)
        norm = torch.zeros((), device=grad.device)
        doubled = grad * 2
        ops.unscale_([doubled], scale, found, norm)
        return doubled, norm

    grad = torch.randn(100, device=device)
    compiled = torch.compile(unscale, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(grad, scalar(4.0, device)), unscale(grad, scalar(4.0, device)), strict=True):
        assert torch.equal(got, expected)


def test_meta_tensors_are_checked_but_not_read() -> None:
    meta = torch.device("meta")
    found = torch.zeros((), device=meta)
    ops.check_gradients_([torch.empty(5, device=meta)], torch.ones((), device=meta), found, found.clone())
    with pytest.raises(TypeError, match=r"grads\[0\] has dtype Long"):
        ops.check_gradients_(
            [torch.empty(5, device=meta, dtype=torch.int64)], torch.ones((), device=meta), found, found.clone()
        )


BAD_ARGUMENTS = {
    "integer gradient": ({"grads": [torch.ones(2), torch.ones(2, dtype=torch.int32)]}, TypeError, r"grads\[1\] .* Int"),
    "complex gradient": ({"grads": [torch.ones(2, dtype=torch.complex64)]}, TypeError, r"grads\[0\] .*ComplexFloat"),
    "sparse gradient": ({"grads": [torch.eye(2).to_sparse()]}, ValueError, r"grads\[0\] has layout Sparse"),
    "two scales": ({"scale": torch.ones(2)}, ValueError, "scale has 2 elements, expected 1"),
    "half scale": ({"scale": torch.ones((), dtype=torch.float16)}, TypeError, "scale has dtype Half, expected Float"),
    "double found": ({"found": torch.zeros((), dtype=torch.float64)}, TypeError, "found has dtype Double"),
    "long norm": ({"norm": torch.zeros((), dtype=torch.int64)}, TypeError, "norm has dtype Long"),
    "short stats": ({"stats": torch.zeros(1, 5)}, ValueError, "stats has 5 elements, expected 6"),
    "strided stats": ({"stats": torch.zeros(6, 2)[:, ::2]}, ValueError, "stats must be a contiguous"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
@pytest.mark.parametrize("op", ["check_gradients_", "unscale_"])
def test_bad_arguments_are_named_and_nothing_is_written(op: str, case: str) -> None:
    changes, error, message = BAD_ARGUMENTS[case]
    arguments = {
        "grads": [torch.full((2,), math.inf)],
        "scale": torch.tensor(2.0),
        "found": torch.tensor(0.0),
        "norm": torch.tensor(-1.0),
        "stats": None,
        **changes,
    }
    if len(arguments["grads"]) > 1:
        arguments["grads"][0].fill_(math.inf)
    copies = {name: value.clone() for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    with pytest.raises(error, match=f"{op}: {message}"):
        getattr(ops, op)(*arguments.values())
    for name, copy in copies.items():
        assert torch.equal(arguments[name], copy), name


@pytest.mark.cuda
def test_mixed_devices_are_refused() -> None:
    grads = [torch.ones(2, device="cuda"), torch.ones(2)]
    cuda = torch.device("cuda")
    with pytest.raises(RuntimeError, match=r"unscale_: grads\[0\] is on cuda:0, expected cpu"):
        ops.unscale_(grads, torch.tensor(2.0), torch.tensor(0.0))
    with pytest.raises(RuntimeError, match=r"grads\[1\] is on cpu, expected cuda:0"):
        ops.unscale_(grads, scalar(2.0, cuda), scalar(0.0, cuda))
    assert grads[0].tolist() == [1.0, 1.0]


def test_a_meta_gradient_beside_cpu_ones_is_refused() -> None:
    grads = [torch.ones(2), torch.ones(2, device="meta")]
    with pytest.raises(RuntimeError, match=r"grads\[[01]\] is on (meta|cpu), expected (meta|cpu)"):
        ops.unscale_(grads, torch.tensor(2.0), torch.tensor(0.0))
    assert grads[0].tolist() == [1.0, 1.0]
