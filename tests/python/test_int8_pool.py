"""Maximum pooling of int8: the op against torch's pooling of the same numbers as floats, and in optimized models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import halfstep
import pytest
import torch
import torch.nn.functional as F
from int8_file_cases import call
from torch import nn

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]

pool = torch.ops.halfstep.int8_max_pool2d


def images(*shape: int, device: str = "cpu") -> torch.Tensor:
    torch.manual_seed(3)
    return torch.randint(-128, 128, shape, dtype=torch.int8, device=device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 2},
        {"kernel_size": [3]},
        {"kernel_size": [3, 2], "stride": [2, 1]},
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": 3, "stride": 2, "padding": [1, 0], "ceil_mode": True},
        {"kernel_size": 2, "stride": 3, "padding": 1, "ceil_mode": True},
        {"kernel_size": [2, 4], "stride": 1, "padding": [1, 2], "dilation": [3, 2]},
        {"kernel_size": [1, 7], "stride": [1, 4]},
    ],
)
@pytest.mark.parametrize("shape", [(2, 3, 13, 17), (1, 16, 12, 12), (3, 9, 8), (0, 4, 9, 9), (1, 1, 7, 7)])
def test_as_torch_pools_floats(shape: tuple[int, ...], options: dict[str, Any], device: str) -> None:
    x = images(*shape, device=device)
    expected = F.max_pool2d(x.float(), **options)
    views = [x, x.transpose(-1, -2).contiguous().transpose(-1, -2)]
    if x.dim() == 4:
        views += [x.to(memory_format=torch.channels_last), torch.cat([x, x], 1)[:, : x.shape[1]]]
    for view in views:
        out = pool(view, **options)
        assert out.dtype is torch.int8
        assert torch.equal(out.float(), expected)
        assert x.dim() == 3 or out.is_contiguous(memory_format=torch.channels_last)
        meta = pool(view.to("meta"), **options)
        assert (meta.shape, meta.stride(), meta.dtype) == (out.shape, out.stride(), out.dtype)


@pytest.mark.parametrize(("size", "kernel"), [(2, 3), (1, 2), (3, 4), (2, 2)])
def test_windows_larger_than_the_picture(size: int, kernel: int) -> None:
    x = images(2, 3, size, 9)
    options = {"kernel_size": kernel, "stride": 2, "ceil_mode": True}
    assert torch.equal(pool(x, **options).float(), F.max_pool2d(x.float(), **options))


def test_what_padding_alone_gives_is_the_int8_of_minus_infinity() -> None:
    x = images(1, 2, 2, 2)
    options = {"kernel_size": 2, "stride": 1, "padding": 1, "dilation": 3}
    expected = F.max_pool2d(x.float(), **options)
    assert expected.isinf().any()
    assert torch.equal(pool(x, **options).float(), expected.clamp(min=-128))


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ((torch.zeros(1, 2, 4, 4), 2), TypeError, "input is Float, expected Char"),
        ((torch.zeros(4, 4, dtype=torch.int8), 2), ValueError, r"input has shape \[4, 4\], expected \[batch, channels"),
        ((images(1, 2, 4, 4), []), ValueError, r"kernel_size is \[\], expected one or two numbers of 1 .. 268435456"),
        ((images(1, 2, 4, 4), [2, 2, 2]), ValueError, r"kernel_size is \[2, 2, 2\], expected one or two numbers"),
        ((images(1, 2, 4, 4), 0), ValueError, "kernel_size is .*expected one or two numbers of 1 .. 268435456"),
        ((images(1, 2, 4, 4), 2, 0), ValueError, "stride is .*expected one or two numbers of 1 .. 268435456"),
        ((images(1, 2, 4, 4), 2, 1, -1), ValueError, "padding is .*expected one or two numbers of 0 .. 268435456"),
        ((images(1, 2, 4, 4), 2, 1, 2), ValueError, r"padding is \[2, 2\], expected at most half of kernel_size"),
        ((images(1, 2, 4, 4), 2, 1, 0, 0), ValueError, "dilation is .*expected one or two numbers of 1 .. 268435456"),
        ((images(1, 2, 4, 4), [1, 5]), ValueError, "the padded input is 4 wide, expected at least 5"),
        (
            (images(1, 2, 4, 4), [1, 9], [1, 3], 0, 1, True),
            ValueError,
            "the padded input is 4 wide, expected at least 7",
        ),
        ((images(1, 2, 0, 4), 2), ValueError, r"input has shape \[1, 2, 0, 4\], expected sizes of at least 1"),
        ((images(1, 2, 4, 4), 2, 1, 0, 2**62), ValueError, "dilation is .*expected one or two numbers"),
    ],
)
def test_errors(arguments: tuple[Any, ...], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=f"int8_max_pool2d: {said}"):
        pool(*arguments)


def test_opcheck() -> None:
    for x in (images(2, 3, 9, 8), images(3, 9, 8)):
        torch.library.opcheck(pool.default, (x, [3, 3], [2, 2], [1, 1], [1, 1], True))


@pytest.mark.parametrize("device", DEVICES)
def test_compiled(device: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: pool(x, 3, 2, 1) + 1, fullgraph=True, dynamic=True)
    for size in (9, 12, 31):
        x = images(2, 5, size, size + 1, device=device)
        assert torch.equal(compiled(x), pool(x, 3, 2, 1) + 1)


class Small(nn.Module):
    """Pools pictures that may be smaller than the window, and rounds as the batch says."""

    def __init__(self, rounds: bool) -> None:
        super().__init__()
        self.a, self.b, self.rounds = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1), rounds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x).relu()
        return self.b(F.max_pool2d(x, 3, 2, ceil_mode=True if self.rounds else x.size(0) > 4))


@pytest.mark.parametrize("rounds", [True, False])
def test_pictures_of_every_size_and_batch(rounds: bool) -> None:
    model = Small(rounds).eval()
    inference = halfstep.InferencePrecisionOptimizer(
        "int8", accuracy_threshold=1.0, eval_fn=lambda _model: 1.0, speed_guard=False, progress=False
    )
    result = inference.optimize_for_inference(model, [torch.randn(4, 3, 16, 16) for _ in range(3)], "cpu")
    assert [region["layers"] for region in inference.report()["regions"]] == (
        [["a", "b"]] if rounds else [["a"], ["b"]]
    )
    for shape in ((2, 3, 16, 16), (8, 3, 15, 15), *([(2, 3, 2, 2)] if rounds else [])):
        x = torch.randn(shape)
        out, expected = call(result, x), call(model, x)
        assert out.shape == expected.shape
        assert (out - expected).norm() <= 0.05 * expected.norm()


class Picture(nn.Module):
    """A convolution, a pooling as a module, one as a function, and views on the way to a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 8, 1)
        self.pool = nn.MaxPool2d(3, 2, padding=1)
        self.head = nn.Linear(8 * 64, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(self.pool(self.first(x).relu()))
        return self.head(F.max_pool2d(x, 2).flatten(1))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", ["eager", "script"])
def test_int8_passes_large_pictures(form: str, device: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Picture().eval().to(device)
    inference = halfstep.InferencePrecisionOptimizer(
        "int8", accuracy_threshold=1.0, eval_fn=lambda _model: 1.0, speed_guard=False, progress=False
    )
    data = [torch.randn(4, 3, 32, 32) for _ in range(4)]
    given = torch.jit.script(model) if form == "script" else model
    result = inference.optimize_for_inference(given, data, device)
    (region,) = inference.report()["regions"]
    assert region["layers"] == ["first", "second", "head"]
    assert [line.endswith("int8 out") for line in region["fused"]] == [True, True]
    x = data[0].to(device)
    out = call(result, x)
    assert ((out - call(model, x)).norm() / out.norm()).item() < 0.05
    graph = str(result.graph if form == "eager" else torch.jit.freeze(result).inlined_graph)
    assert graph.count("int8_max_pool2d") >= 2
    assert torch.equal(out, call(result, x.contiguous(memory_format=torch.channels_last)))
    inference.save_torchscript(tmp_path / "model.pt")
    assert torch.equal(call(torch.jit.load(tmp_path / "model.pt"), x), out)
    if form == "eager":
        inference.save(tmp_path / "model.safetensors")
        loaded = halfstep.InferencePrecisionOptimizer.load(tmp_path / "model.safetensors", Picture(), device)
        assert torch.equal(call(loaded, x), out)
