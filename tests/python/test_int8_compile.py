"""torch.compile on whole int8 models: one graph, halfstep's ops whole in it, and the bits of eager calls."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from halfstep.int8_layers import Int8Conv1d, Int8Conv2d, Int8Embedding, Int8Layer, Int8Linear, pack
from halfstep.int8_norms import Int8LayerNorm, Int8RMSNorm
from int8_compile_cases import EXPECTED, calls_in, calls_of, int8_model, noise
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter
from torch._inductor.compile_fx import compile_fx, compile_fx_inner

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
DTYPES = [torch.float32, torch.bfloat16]
SIZES = (8, 5, 12, 3)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Backend:
    """A backend, and the calls of halfstep's ops in each graph that it was given, which is one of ATen ops.

    inductor: whether the graphs are compiled; if not, they run op by op.
    """

    def __init__(self, inductor: bool) -> None:
        self.graphs: list[Counter[str]] = []
        self._inductor = inductor

    def __call__(self, graph_module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        if self._inductor:
            return compile_fx(graph_module, inputs, inner_compile=self._compile)
        return aot_autograd(fw_compiler=self._compile)(graph_module, inputs)

    def _compile(self, graph_module: torch.fx.GraphModule, inputs: list[Any], **options: Any) -> Callable[..., Any]:
        self.graphs.append(calls_in(graph_module.graph))
        return compile_fx_inner(graph_module, inputs, **options) if self._inductor else graph_module


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", EXPECTED)
def test_one_graph_has_all_ops_and_the_bits_of_eager_calls(
    kind: str, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a compiler behind it: what the float operations in the graph are made into is no business of ours."""
    model, batch = int8_model(kind, dtype, device, monkeypatch)
    backend = Backend(inductor=False)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        for size in SIZES:
            x = batch(size)
            assert torch.equal(compiled(x), model(x))
    assert backend.graphs == [EXPECTED[kind]] * 2  # of the first size, and of all sizes


@pytest.mark.slow  # a minute for all: Inductor compiles with the C++ compiler
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", EXPECTED)
def test_inductor_calls_each_op_as_often(
    kind: str, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = int8_model(kind, dtype, device, monkeypatch)
    backend = Backend(inductor=True)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    # A graph that is in torch's cache would not reach the backend.
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        for size in SIZES:
            x = batch(size)
            # Inductor sums in another order, and rounds to bfloat16 less often than torch does.
            assert noise(compiled(x), model(x)) <= (0.002 if dtype == torch.float32 else 0.02)
        assert backend.graphs == [EXPECTED[kind]] * 2
        assert calls_of(compiled, x) == EXPECTED[kind]
        assert len(backend.graphs) == 2


@pytest.mark.parametrize("device", DEVICES)
def test_int8_between_float_operations_without_reductions_has_equal_bits(device: str) -> None:
    """In float32, Inductor's additions and products are torch's."""
    layers = [Int8Linear(pack(torch.randn(16, 16)), input_scale=0.1), nn.ReLU()]
    layers += [Int8Linear(pack(torch.randn(8, 16)))]
    model = nn.Sequential(*layers).to(device)
    compiled = torch.compile(lambda x: model(x * 2) + 1, fullgraph=True)
    x = torch.randn(5, 16, device=device)
    assert torch.equal(compiled(x), model(x * 2) + 1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", ["quantize_int8", "dequantize_int8"])
@pytest.mark.parametrize("view", ["sliced", "expanded", "permuted"])
def test_tensors_of_any_strides_are_quantized_in_compiled_code(view: str, op: str, device: str) -> None:
    x = torch.randint(-100, 100, (4, 6, 8), device=device)
    x = x.to(torch.int8) if op == "dequantize_int8" else x.float()
    x = {
        "sliced": lambda: x.transpose(0, 1)[:, :, ::2],
        "expanded": lambda: x[:, :, :1].transpose(0, 1).expand(6, 4, 5),
        "permuted": lambda: x.permute(2, 0, 1),
    }[view]()
    function = getattr(torch.ops.halfstep, op)
    expected = function(x, 0.5, 1)
    assert function(x.to("meta").as_strided(x.shape, x.stride()), 0.5, 1).stride() == expected.stride()
    assert torch.equal(torch.compile(lambda x: function(x, 0.5, 1), fullgraph=True)(x), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_weights_that_are_loaded_later_are_used(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = int8_model("bag", torch.float32, device, monkeypatch)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = batch(4)
    with torch.no_grad():
        before = compiled(x)
        other = copy.deepcopy(model)
        for module in other.modules():
            if isinstance(module, Int8Layer):
                state = module.get_extra_state()
                module.set_extra_state({**state, "weight": -state["weight"]})
        model.load_state_dict(other.state_dict())
        assert torch.equal(compiled(x), other(x))
        assert not torch.equal(compiled(x), before)


class StopsEarly(nn.Module):
    """Layers in a loop that the values may end: torch.compile leaves such code to Python, which calls each layer."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outs = []
        for layer in self.layers:
            outs.append(layer(x)[0])
            if outs[-1].abs().max() > 1e4:
                break
        return torch.stack(outs)


@pytest.mark.parametrize(
    ("make", "x"),
    [
        (lambda scale: Int8Linear(pack(torch.randn(8, 8)), input_scale=scale), torch.randn(3, 8)),
        (lambda scale: Int8Conv2d(pack(torch.randn(4, 2, 3, 3)), input_scale=scale), torch.randn(3, 2, 6, 6)),
        (lambda scale: Int8Conv1d(pack(torch.randn(4, 2, 1, 3)), input_scale=scale), torch.randn(3, 2, 6)),
        (lambda scale: Int8Embedding(pack(torch.randn(9, 4) * scale)), torch.arange(5)),
        (lambda scale: Int8LayerNorm(8, None, None, scale), torch.randn(3, 8)),
        (lambda scale: Int8RMSNorm(8, None, scale), torch.randn(3, 8)),
    ],
    ids=["linear", "conv2d", "conv1d", "embedding", "layer norm", "rms norm"],
)
def test_layers_that_python_calls_are_not_compiled_one_by_one(
    make: Callable[[float], nn.Module], x: torch.Tensor
) -> None:
    """Twelve would be more than torch.compile recompiles; in a graph they are inlined all the same."""
    model = StopsEarly([make(0.01 * (number + 1)) for number in range(12)])
    counter, whole = CompileCounter(), Backend(inductor=False)
    with torch.no_grad():
        assert torch.equal(torch.compile(model, backend=counter)(x), model(x))
        assert counter.frame_count == 0
        together = torch.compile(lambda x: [layer(x)[0] for layer in model.layers], fullgraph=True, backend=whole)
        assert torch.equal(torch.stack(together(x)), model(x))
    assert [sum(calls.values()) for calls in whole.graphs] == [12]


def test_the_layers_do_not_import_the_compiler() -> None:
    """Which takes a second and more."""
    code = """
import sys, torch
before = "torch._dynamo" in sys.modules
from halfstep import InferencePrecisionOptimizer
import halfstep.int8_norms, halfstep.int8_recurrent
print(before, "torch._dynamo" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
